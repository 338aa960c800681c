"""EMRAdapter: one shared task vector, a bit mask and a scale a task; switched on in a live model, or saved."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from osrm_peft.adapters.experts import targets_of
from osrm_peft.adapters.factors import TensorsOnDemand
from osrm_peft.adapters.live import weights_in, write, written
from osrm_peft.adapters.lora_adapter import HEADS, LoraAdapter, load_head, save_head
from osrm_peft.checks import number
from osrm_peft.hub.card import write_manifest
from osrm_peft.hub.push import Pushable
from osrm_peft.hub.sources import local_folder
from osrm_peft.io.json import parse_json
from osrm_peft.io.manifest import label_names_in, new_folder, read_manifest
from osrm_peft.merging.inputs import check_names
from osrm_peft.merging.lowrank import compress_matrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MASKS = "emr.safetensors"


class EMRLayer(NamedTuple):
    """One layer.

    Attributes:
        unified: (o, n) τ_uni, in the adapters' dtype.
        masks: (T, ⌈o·n/8⌉) uint8: the masks' bits, row by row.
    """

    unified: Tensor
    masks: Tensor

    @classmethod
    def pack(cls, unified: Tensor, masks: Tensor) -> "EMRLayer":
        """Pack an (o, n) vector and its (T, o, n) bool masks."""
        return cls(unified, torch.from_numpy(np.packbits(masks.flatten(1).numpy(), axis=1)))

    def masked(self, task: int) -> Tensor:
        """(o, n) M_t ⊙ τ_uni, float32."""
        bits = np.unpackbits(self.masks[task].numpy(), count=self.unified.numel())
        return self.unified.float() * torch.from_numpy(bits).view_as(self.unified)


@dataclass(frozen=True)
class EMRAdapter(Pushable):
    """The result of `merge_adapters(…, method="emr")`: task t's task vector is λ · scales[t] · M_t ⊙ τ_uni.

    Attributes:
        layers: {layer name in the base model: EMRLayer}.
        scales: {task: λ_t}.
        scale: λ for all tasks, 1 in the paper.
        tasks: {task: its adapter with head and config, without factors}.
        manifest: how it was made.
    """

    layers: dict[str, EMRLayer]
    scales: dict[str, float]
    scale: float
    tasks: dict[str, LoraAdapter]
    manifest: dict[str, Any]

    def at_scale(self, scale: float) -> "EMRAdapter":
        """The same merge at another λ."""
        scale = number("scale", scale)
        return replace(self, scale=scale, manifest=self.manifest | {"scale": scale})

    def deltas(self, task: str) -> Mapping[str, Tensor]:
        """{layer: (o, n) this task's vector}, float32.

        Raises:
            ValueError: no such task; lists those there are.
        """
        place = self._place(task)
        return {name: self.scale * self.scales[task] * layer.masked(place) for name, layer in self.layers.items()}

    @contextmanager
    def applied_to(self, model: "PreTrainedModel", task: str) -> Iterator["PreTrainedModel"]:
        """Inside the block the live base `model` is task t's, head included; afterwards it is as it was, exactly.

        Raises:
            ValueError: no such task, or `model` lacks a layer or has another shape. Nothing was changed then.
        """
        with written(self._weights_of(task, model)):
            yield model

    def load(self, base: "PreTrainedModel | str", task: str) -> "PreTrainedModel":
        """`base` with this task's weights and head written into it for good.

        Args:
            base: the base model, with a head of the task's width; or its name (see `LoraAdapter.attach`): then the
                model is in eval mode.

        Raises:
            ValueError: no such task, or `base` lacks a layer or has another shape. Nothing was changed then.
        """
        self._place(task)
        model = self.tasks[task].load_base_model(base) if isinstance(base, str) else base
        write(self._weights_of(task, model))
        return model

    def adapter(self, task: str, rank: int | None = None) -> LoraAdapter:
        """This task as an ordinary LoRA adapter with its head: of full rank, or the best of this rank."""
        factors = {name: compress_matrix(delta, rank).factors for name, delta in self.deltas(task).items()}
        whole = (name for other in self.tasks.values() for name in (*other.heads, *other.modules))
        return replace(self.tasks[task].with_factors(factors), source="merge", sha256=None).apart(whole)

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write shared vector, packed masks and scales (`emr.safetensors`), heads and manifest, all or nothing.

        Raises:
            FileExistsError: the folder holds something that is not ours, or another result (without `overwrite`).
        """
        tensors = {"scales": torch.tensor(list(self.scales.values()), dtype=torch.float64)}
        for name, layer in self.layers.items():
            tensors |= {f"{name}.unified": layer.unified.contiguous(), f"{name}.masks": layer.masks.contiguous()}
        one = next(iter(self.tasks.values()))
        notes = {"tasks": list(self.tasks), "layouts": one.layouts, "parameters": one.parameters}
        with new_folder(folder, "emr", self.manifest, overwrite) as partial:
            save_file(tensors, partial / MASKS, {"format": "pt", "osrm_peft": json.dumps(notes)})
            for name, adapter in self.tasks.items():
                save_head(adapter, partial / HEADS / f"{name}.safetensors")
            write_manifest(partial, self.manifest)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "EMRAdapter":
        """Read what `save_pretrained` wrote.

        Args:
            folder: or a Hub id, `user/name` or `user/name@revision`.

        Raises:
            FileNotFoundError: it is no such folder.
            ValueError: a file in it is damaged.
        """
        folder = local_folder(str(folder), [MASKS, f"{HEADS}/*.safetensors", "*.json"], "folder of an EMR merge")
        manifest = read_manifest(folder)
        if not (folder / MASKS).is_file():
            raise FileNotFoundError(f"{folder} holds no {MASKS}: it is not an EMR merge")
        try:
            with safe_open(folder / MASKS, framework="pt") as file:
                notes = parse_json((file.metadata() or {})["osrm_peft"])
            names, layouts = notes["tasks"], {name: tuple(kernel) for name, kernel in notes["layouts"].items()}
            parameters = {name: int(experts) for name, experts in notes.get("parameters", {}).items()}
            tensors = load_file(folder / MASKS)
            scales = dict(zip(names, tensors.pop("scales").tolist(), strict=True))
            layers = {
                name: EMRLayer(tensors[f"{name}.unified"], tensors[f"{name}.masks"])
                for name in sorted({key.rpartition(".")[0] for key in tensors})
            }
            for name, layer in layers.items():
                if layer.unified.dim() != 2 or layer.masks.shape != (len(names), -(-layer.unified.numel() // 8)):
                    raise ValueError(f"{name}: masks {tuple(layer.masks.shape)} of {tuple(layer.unified.shape)}")
            tasks, dtype = {}, next(iter(layers.values())).unified.dtype
            for name in check_names(dict.fromkeys(names)):  # none of them leads out of the folder
                config = {"base_model_name_or_path": manifest.get("base_model"), **targets_of(layers, parameters)}
                bare = LoraAdapter({}, {}, config, dtype, source=str(folder), layouts=layouts, parameters=parameters)
                bare.label_names = label_names_in(manifest, name)
                tasks[name] = load_head(bare, folder / HEADS / f"{name}.safetensors", layers)
            return cls(layers, scales, float(manifest["scale"]), tasks, manifest)
        except (SafetensorError, ValueError, LookupError, OSError, TypeError, AttributeError, StopIteration) as error:
            raise ValueError(f"{folder} is damaged: {type(error).__name__}: {error}") from error

    def _place(self, task: str) -> int:
        if task not in self.tasks:
            raise ValueError(f"no task {task!r} was merged, only {', '.join(self.tasks)}")
        return list(self.tasks).index(task)

    def _weights_of(self, task: str, model: "PreTrainedModel") -> dict[Tensor, Tensor]:
        """{parameter: its value for this task}, checked against the model."""
        place, scale = self._place(task), self.scale * self.scales[task]
        shapes = {name: tuple(layer.unified.shape) for name, layer in self.layers.items()}
        deltas = TensorsOnDemand(shapes, lambda name: scale * self.layers[name].masked(place))
        return weights_in(model, deltas, self.tasks[task], "use .adapter(task), whose layers and modules are apart")
