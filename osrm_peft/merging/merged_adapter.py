"""MergedAdapter: a shared LoRA and the tasks' heads; rescaled, saved, or loaded onto a base model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from osrm_peft.adapters.factors import Factors
from osrm_peft.adapters.live import applied_to
from osrm_peft.adapters.lora_adapter import HEADS, LoraAdapter, save_head
from osrm_peft.checks import number
from osrm_peft.devices import CPU, computing, in_threads
from osrm_peft.hub.card import write_manifest
from osrm_peft.hub.push import Pushable
from osrm_peft.io.manifest import new_folder
from osrm_peft.merging.lowrank import SERVING, SMALL, Compressed, compress, least_energy

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class MergedLayer(NamedTuple):
    """One layer of a merge: its task vector is offset + scale · direction.

    Attributes:
        direction: the compressed merged direction, at scale 1.
        offset: what the scale does not touch (LoRE's implicit base), or None. It may share A, the very tensor, with the
            direction: their sum then has no larger rank than one of them.
    """

    direction: Compressed
    offset: Factors | None

    def at(self, scale: float, rank: int | None, device: torch.device = CPU) -> Compressed:
        """The layer at this scale, of at most this rank: one multiply where there is no offset, else on the device."""
        B, A = self.direction.factors.B, self.direction.factors.A
        if self.offset is None:
            return Compressed(Factors(A, scale * B), self.direction.energy_kept)
        if self.offset.A is A:
            B = self.offset.B + scale * B
        else:
            B, A = torch.cat([self.offset.B, scale * B], dim=1), torch.cat([self.offset.A, A])
        found = compress(B.to(device), A.to(device), rank)
        return found._replace(factors=found.factors.to(CPU))


@dataclass(frozen=True)
class MergedAdapter(Pushable):
    """The result of `merge_adapters`.

    Attributes:
        layers: {layer name in the base model: MergedLayer}.
        scale: λ, what multiplies the merged direction.
        rank: largest rank of the result; None keeps the exact one.
        tasks: {task: its adapter with head, modules and copies of its own and config, without factors}.
        dtype: of the written factors: the adapters' own.
        manifest: how it was made.
        padded: the least rank to write; layers of lower rank get zero directions.
        modules: {parameter: tensor} of trained modules of the pre-trained model, shared by the tasks.
        copies: the same of frozen base weights that the adapters brought along (of a vocabulary with new rows).
        device: where layers are compressed again; they themselves are on the CPU.
    """

    layers: dict[str, MergedLayer]
    scale: float
    rank: int | None
    tasks: dict[str, LoraAdapter]
    dtype: torch.dtype
    manifest: dict[str, Any]
    padded: int = 1
    modules: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)
    device: torch.device = CPU

    def at_scale(self, scale: float) -> "MergedAdapter":
        """The same merge at another λ, without merging again."""
        scale = number("scale", scale)
        return replace(self, scale=scale, manifest=self.manifest | {"scale": scale})

    def deltas(self) -> dict[str, Tensor]:
        """{layer: (o, n) merged task vector}, float64: what is added to the base weights."""
        return {name: found.factors.B.double() @ found.factors.A.double() for name, found in self._found.items()}

    def energy_kept(self) -> dict[str, float]:
        """{layer: share of the merged task vector's squared norm that `rank` keeps}; 1 where it is exact."""
        return {name: found.energy_kept for name, found in self._found.items()}

    def for_task(self, task: str | None) -> LoraAdapter:
        """One ordinary adapter: the shared LoRA with this task's head (None: without any).

        Raises:
            ValueError: no such task; lists those there are.
        """
        return self._adapter(task, self._found)

    def load(self, base: "PreTrainedModel | str", task: str | None = None) -> "PeftModel":
        """A PeftModel of `base` with the shared LoRA and this task's head, in eval mode.

        `.merge_and_unload()` on it gives full weights.

        Args:
            base: the base model, with a head of the task's width, or its name (see `LoraAdapter.attach`).
        """
        return self.for_task(task).attach(base)

    @contextmanager
    def applied_to(self, model: "PreTrainedModel", task: str | None = None) -> Iterator["PreTrainedModel"]:
        """Inside the block the live base `model` is the merge with this task's head; then it is as before, exactly.

        Raises:
            ValueError: no such task, or `model` lacks a layer or has another shape. Nothing was changed then.
        """
        with applied_to(self.for_task(task), model):
            yield model

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the shared adapter, `heads/<task>.safetensors`, the manifest `osrm_peft.json` and card, all or nothing.

        Raises:
            FileExistsError: the folder holds something that is not ours, or another result (without `overwrite`).
        """
        found = self._found
        with new_folder(folder, "merged", self.manifest, overwrite) as partial:
            shared = self._adapter(None, found)
            shared.save_pretrained(partial)
            own = (adapter.heads or adapter.modules or adapter.copies for adapter in self.tasks.values())
            for name, adapter in self.tasks.items() if self.modules or any(own) else ():  # a file may be empty
                save_head(adapter, partial / HEADS / f"{name}.safetensors")
            energy = {name: one.energy_kept for name, one in found.items()}
            manifest = self.manifest | {"written_rank": shared.rank, "energy_kept": energy}
            if self.padded > 1:
                manifest["serving"] = least_energy(found.values(), [rank for rank in SERVING if rank <= shared.rank])
            write_manifest(partial, manifest)

    @cached_property
    def _found(self) -> dict[str, Compressed]:
        def found(layer: MergedLayer) -> Compressed:
            return layer.at(self.scale, self.rank, self.device)

        layers = list(self.layers.values())
        parts = [one for layer in layers for one in (layer.direction.factors, layer.offset) if one is not None]
        small = self.device == CPU and all(len(one.A) <= SMALL for one in parts)
        with computing(self.device):
            return dict(zip(self.layers, in_threads(found, layers) if small else map(found, layers), strict=True))

    def _adapter(self, task: str | None, found: dict[str, Compressed]) -> LoraAdapter:
        if task is not None and task not in self.tasks:
            raise ValueError(f"no task {task!r} was merged, only {', '.join(self.tasks)}")
        one = next(iter(self.tasks.values())) if task is None else self.tasks[task]
        own: dict[str, Any] = {} if task is None else {"heads": one.heads, "modules": one.modules, "copies": one.copies}
        names = None if task is None else one.label_names
        modules = {**self.modules, **own.get("modules", {})}
        copies = {name: one for name, one in {**self.copies, **own.get("copies", {})}.items() if name not in modules}
        return replace(
            one.with_factors({name: layer.factors for name, layer in found.items()}),
            heads=own.get("heads", {}),
            modules=modules,
            copies=copies,
            dtype=self.dtype,
            source="merge",
            sha256=None,
            padded=self.padded,
            label_names=names,
        ).apart(name for other in self.tasks.values() for name in (*other.heads, *other.modules))
