"""LoraAdapter: {layer: Factors(A, B, s)}, heads and modules; saves itself as PEFT does, or attaches to a model."""

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from osrm_peft.adapters.config import CONFIG, TARGETS, content_of, is_target
from osrm_peft.adapters.experts import WRAPPED, layers_of, owners, stacked, targets_of, wrappers
from osrm_peft.adapters.factors import Factors, FactorsOnDemand, TensorsOnDemand
from osrm_peft.adapters.keys import (
    PREFIX,
    TASK_HEADS,
    base_name,
    below,
    is_head,
    part_of,
    saved_modules,
    spelled,
)
from osrm_peft.adapters.layouts import fused_in, names_in
from osrm_peft.io.places import new_file
from osrm_peft.models.identity import located
from osrm_peft.models.layers import experts_in, weight_shape
from osrm_peft.models.loading import head_width, load_base, load_causal

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

WEIGHTS, HEADS = "adapter_model.safetensors", "heads"

# fields of the config that we write
_KEPT = ("base_model_name_or_path", "revision", "task_type", "auto_mapping", "fan_in_fan_out", *TARGETS)


@dataclass
class LoraAdapter:
    """A plain LoRA adapter.

    Attributes:
        factors: {layer name in the base model: Factors}, float32; a folder's are read when they are used.
        heads: {parameter name in the base model: tensor} of the task's own head, such as a trained classifier.
        config: the fields of `adapter_config.json`, PEFT's defaults where one is missing.
        dtype: the factors' dtype in the file; results are written in it.
        source: the folder, Hub id or model that the adapter came from.
        sha256: the weight file's; None for a live model.
        layouts: {layer: (channels, height, width) of a convolution's kernel, or () of an embedding}; no linear layers.
        parameters: {parameter: E} of bare parameters with LoRA (`target_parameters`), a module's in the order in which
            the module has them. Of a stack of E matrices (experts) each is a layer, `….experts.down_proj.0` …; a single
            matrix is one layer of the parameter's name, E = 0.
        padded: the least rank to write, see `save_pretrained`.
        modules: {parameter name: tensor} of the pre-trained model's modules that were trained whole (`modules_to_save`:
            `lm_head`, `embed_tokens`, a norm); a folder's are read when they are used.
        copies: {parameter name: tensor} of frozen base weights that PEFT put into the file, as the vocabulary has new
            rows; loading the adapter restores them.
        weight_hash: hash of the base model's adapted layers (`fingerprint.weight_hash`), if OSRM's manifest has it.
        initialized: whether OSRM has chosen A, of an adapter that was made with an OSRMLoraConfig; None: it was not.
        folder: the adapter's folder on this machine, in which a tokenizer may lie.
        label_names: the names of the task's classes, from our manifest; None without.
        placed: the layers were renamed (`renamed`), so a merge takes their names as they are.
    """

    factors: Mapping[str, Factors]
    heads: dict[str, Tensor]
    config: dict[str, Any]
    dtype: torch.dtype = torch.float32
    source: str = ""
    sha256: str | None = None
    layouts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    padded: int = 1
    modules: Mapping[str, Tensor] = field(default_factory=dict)
    copies: Mapping[str, Tensor] = field(default_factory=dict)
    weight_hash: str | None = None
    initialized: bool | None = None
    folder: Path | None = None
    label_names: tuple[str, ...] | None = None
    placed: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """{layer: (o, r, n)}, without reading a tensor from a file."""
        if isinstance(self.factors, FactorsOnDemand):
            return self.factors.shapes
        return {name: (len(f.B), f.rank, f.A.shape[1]) for name, f in self.factors.items()}

    @property
    def base_model(self) -> str | None:
        """Name or path of the base model, as the adapter's config has it."""
        return self.config.get("base_model_name_or_path")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors` into `folder`: rank r everywhere, alpha = r.

        Layers of lower rank are padded with zero directions, so any loader and server that takes rank r takes it.
        """
        tensors, config = self.state_dict(), self.config_content()
        with new_file(Path(folder) / WEIGHTS) as path:
            save_file(tensors, path, {"format": "pt"})
        with new_file(Path(folder) / CONFIG) as path:
            path.write_text(json.dumps(config, indent=2, sort_keys=True))

    def peft_config(self) -> "LoraConfig":
        """The LoraConfig under which stock PEFT reproduces these factors."""
        from peft import LoraConfig

        return LoraConfig(**self._fields())

    def config_content(self) -> dict[str, Any]:
        """The content of `adapter_config.json`: the same, without importing PEFT."""
        return content_of(self._fields())

    def _fields(self) -> dict[str, Any]:
        rank, saved = self.rank, [*self.heads, *self.modules]
        fields: dict[str, Any] = {name: self.config.get(name) for name in _KEPT}
        fields["base_model_name_or_path"] = located(self.base_model)
        fields["fan_in_fan_out"] = bool(fields["fan_in_fan_out"])
        known = [module for module in saved_modules(self.config) if any(map(below(module), saved))]
        if not self.heads and fields["task_type"] in TASK_HEADS:  # PEFT would add (and re-initialise) a head of its own
            fields["task_type"] = None
        unnamed = [name for name in saved if not any(below(module)(name) for module in known)]
        saved_whole = [*known, *dict.fromkeys(name.rpartition(".")[0] for name in unnamed)]
        own = {"r": rank, "lora_alpha": rank, "modules_to_save": saved_whole or None, "inference_mode": True}
        return own | fields

    def apart(self, whole: Iterable[str]) -> "LoraAdapter":
        """The same adapter, with LoRA on no layer that is trained whole: PEFT has one or the other on a layer.

        A layer that this task trained whole loses its LoRA. A layer that only other tasks trained whole is excluded
        from the targets, by which PEFT would adapt it.

        Args:
            whole: parameters that any task has trained whole.
        """
        own = {name.rpartition(".")[0] for name in (*self.heads, *self.modules)}
        bare = owners(self.parameters)
        factors = {name: self.factors[name] for name in self.factors if bare.get(name, name) not in own}
        others = sorted({name.rpartition(".")[0] for name in whole} - own - set(factors))
        config, targets = self.config, self.config.get("target_modules")
        all_linear = isinstance(targets, str) and targets.lower() == "all-linear"
        hit = others if all_linear else [name for name in others if is_target(config, name)]
        if hit:
            excluded = config.get("exclude_modules")
            if isinstance(excluded, str):
                config = config | {"exclude_modules": "|".join([f"(?:{excluded})", *map(re.escape, hit)])}
            else:
                config = config | {"exclude_modules": sorted({*(excluded or []), *hit})}
        return replace(self, config=config).with_factors(factors)

    def with_factors(self, factors: Mapping[str, Factors]) -> "LoraAdapter":
        """The same adapter with these factors: a bare parameter without any is no target."""
        parameters = {name: E for name, E in self.parameters.items() if layers_of(name, E)[0] in factors}
        config = self.config
        if parameters != self.parameters:  # exclude_modules would not keep PEFT from a parameter
            targets = {"target_parameters": sorted(parameters) or None}
            config = config | targets | {"target_modules": config.get("target_modules") or []}
        return replace(self, factors=factors, parameters=parameters, config=config)

    @property
    def rank(self) -> int:
        """The largest rank of any layer, at least `padded`."""
        return max([self.padded, *(rank for _, rank, _ in self.shapes.values())])

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors as PEFT names them, in the adapter's dtype; s is folded into B (alpha = r)."""
        tensors: dict[str, Tensor] = {}
        rank, adapted = self.rank, self._wrapped()
        for place, layers in self.places().items():
            found = _as_peft(*self.pair(layers, rank), self.layouts.get(layers[0]))
            tensors |= {f"{PREFIX}{place}.{key}": tensor for key, tensor in found}
        for name, tensor in self.copies.items():
            tensors[f"{PREFIX}{spelled(name, adapted)}"] = tensor.clone().contiguous()
        saved = {**self.heads, **self.modules}
        return tensors | {f"{PREFIX}{name}": tensor.clone().contiguous() for name, tensor in saved.items()}

    def places(self) -> dict[str, list[str]]:
        """{PEFT's name of a pair of factors: its layers}, a layer alone or the experts of a stack."""
        bare, adapted = owners(self.parameters), self._wrapped()
        found = {spelled(name, adapted): [name] for name in self.factors if name not in bare}
        for parameter, (module, depth) in wrappers(self.parameters).items():
            found[spelled(module, adapted) + WRAPPED * depth] = layers_of(parameter, self.parameters[parameter])
        return found

    def _wrapped(self) -> Mapping[str, int]:
        """{module: how many of PEFT's wrappers it has}."""
        bare = owners(self.parameters)
        modules = [name.rpartition(".")[0] for name in self.parameters]
        return Counter([*(name for name in self.factors if name not in bare), *modules])

    def pair(self, layers: Sequence[str], rank: int) -> tuple[Tensor, Tensor]:
        """(E·r, n) A and (o, r·E) s·B of a place's layers at this rank, in the adapter's dtype."""
        pairs = []
        for name in layers:
            factors = self.factors[name]
            pad = rank - factors.rank
            A = torch.nn.functional.pad(factors.A, (0, 0, 0, pad)).to(self.dtype)
            B = torch.nn.functional.pad(factors.s * factors.B, (0, pad)).to(self.dtype)
            if not B.isfinite().all():
                raise ValueError(
                    f"layer {name!r} overflows {self.dtype}: lower the scale, or give the adapters the dtype float32"
                )
            pairs.append((A, B))
        return stacked(pairs)

    def attach(self, base: "PreTrainedModel | str") -> "PeftModel":
        """A PeftModel of `base` with this adapter and its head, in eval mode.

        Args:
            base: the base model (its layers get wrapped, as PEFT does), or its name, by which it is loaded with a head
                of the right width (sequence classification or causal language models).

        Raises:
            ValueError: `base` lacks a layer, or its head or a trained module has another shape.
        """
        from peft import PeftModel, get_peft_model, set_peft_model_state_dict
        from peft.tuners.tuners_utils import BaseTunerLayer

        model = self.load_base_model(base) if isinstance(base, str) else base
        if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise TypeError("the base model carries an adapter already: pass the model without it (`.unload()`)")
        adapter = self.named_as_in(model)
        adapter._check_fits(model)
        config = adapter.peft_config()
        config.base_model_name_or_path = None  # PEFT fills in this model's, and would warn of another
        for field_name, value in (dict.fromkeys(TARGETS) | targets_of(adapter.factors, adapter.parameters)).items():
            setattr(config, field_name, value)
        peft_model = get_peft_model(model, config)
        result: Any = set_peft_model_state_dict(peft_model, adapter.state_dict())
        lost = [key for key in result.missing_keys if part_of(key, ()).kind == "lora"] + list(result.unexpected_keys)
        if lost:
            raise ValueError(f"{type(model).__name__} and the adapter do not fit: {', '.join(sorted(lost)[:6])}")
        return peft_model.eval()

    def renamed(self, new: Callable[[str], str]) -> "LoraAdapter":
        """The same adapter with other names for its layers and for the modules that it has trained.

        Args:
            new: from a name in the base model (a layer's or a parameter's) to another.
        """
        back = {new(name): name for name in self.factors}
        if len(back) < len(self.factors):
            raise ValueError(f"{self.source}: two layers would get one name")
        shapes = {name: self.shapes[old] for name, old in back.items()}
        layouts = {new(name): layout for name, layout in self.layouts.items()}
        heads = {new(name): tensor for name, tensor in self.heads.items()}
        factors = FactorsOnDemand(shapes, lambda name: self.factors[back[name]])
        modules, copies = (_renamed(part, new) for part in (self.modules, self.copies))
        return replace(
            self, factors=factors, layouts=layouts, parameters=self._renamed_parameters(new), heads=heads,
            modules=modules, copies=copies, placed=True,
        )  # fmt: skip

    def _renamed_parameters(self, new: Callable[[str], str]) -> dict[str, int]:
        """`parameters` by the new names of their layers."""
        found: dict[str, int] = {}
        for parameter, experts in self.parameters.items():
            names = [new(layer) for layer in layers_of(parameter, experts)]
            stack = names[0].removesuffix(".0") if experts else names[0]
            if names != layers_of(stack, experts):
                raise ValueError(
                    f"{self.source}: the experts of {parameter!r} would get the names {', '.join(names[:3])} …: give "
                    "those of one stack one name, and leave them their numbers"
                )
            found[stack] = experts
        return found

    def named_as_in(self, model: "PreTrainedModel") -> "LoraAdapter":
        """The same adapter with its layers' names in this model (in this version of transformers)."""
        actual = {base_name(name): name for name, _ in model.named_modules()}
        tensors = tensors_of(model)
        actual |= {base_name(name): name for name in tensors}
        for name, tensor in tensors.items() if self.parameters else ():
            experts = len(tensor) if tensor.dim() == 3 else 0
            actual |= {base_name(layer): layer for layer in layers_of(name, experts)}
        actual |= {name: name for name in actual.values()}
        names = [*self.factors, *self.heads, *self.modules, *self.copies]
        lost = [name for name in names if name not in actual]
        found = {} if not lost else names_in(model, [name for name in lost if name in self.factors])
        adapter = self
        if found or any(actual.get(name, name) != name for name in names):
            adapter = self.renamed(lambda name: actual.get(found.get(name, name), found.get(name, name)))
        place = {name: index for index, name in enumerate(tensors)}
        parameters = dict(sorted(adapter.parameters.items(), key=lambda item: place.get(item[0], 0)))
        return adapter if [*parameters] == [*adapter.parameters] else replace(adapter, parameters=parameters)

    def _check_fits(self, model: "PreTrainedModel") -> None:
        """Raise ValueError unless the model has the layers, heads and modules of the adapter, in the right shapes."""
        modules = dict(model.named_modules())
        bare = owners(self.parameters)
        missing = sorted(set(self.factors) - set(modules) - {*bare} | ({*bare.values()} - set(modules)))
        fused = fused_in(model, missing) if missing else set()
        if set(missing) - fused:
            raise ValueError(
                f"{type(model).__name__} lacks {len(missing)} of the {len(self.factors)} adapted layers: "
                f"{', '.join(missing[:4])}; the adapter is of {self.base_model}"
            )
        parameters = {name: tuple(one.shape) for name, one in tensors_of(model).items()}
        for name, wanted in {one: shape_in(part, one) for part in (self.copies, self.modules) for one in part}.items():
            actual = parameters.get(name)
            if actual is None:
                raise ValueError(
                    f"{type(model).__name__} has no {name!r}, which the adapter has trained; it is of {self.base_model}"
                )
            if actual != wanted:
                remedy = "it is of another base model"
                if actual[1:] == wanted[1:]:  # another vocabulary
                    remedy = f"for its tokens call model.resize_token_embeddings({wanted[0]}) first"
                raise ValueError(f"{name!r} has shape {actual} in the model and {wanted} in the adapter: {remedy}")
        shapes = self.shapes
        for parameter, experts in self.parameters.items():
            o, _, n = shapes[layers_of(parameter, experts)[0]]
            if experts_in(model, parameter) != (experts, o, n):
                actual = parameters.get(parameter)
                raise ValueError(
                    f"the parameter {parameter!r} has shape {actual} in the model, and the adapter is of "
                    f"{experts or 1} {'matrices' if experts else 'matrix'} {o}×{n}; the adapter is of {self.base_model}"
                )
        for name, (o, _, n) in shapes.items():
            if name in fused or name in bare:
                continue
            shape, actual_shape = (o, n), weight_shape(modules[name])
            if actual_shape not in (None, shape):
                raise ValueError(
                    f"layer {name!r} is {actual_shape[0]}×{actual_shape[1]}, the adapter's is "
                    f"{shape[0]}×{shape[1]}; the adapter is of {self.base_model}"
                )
        for name, tensor in self.heads.items():
            if parameters.get(name) != tuple(tensor.shape):
                labels = head_width(model, {key: tuple(tensor.shape) for key, tensor in self.heads.items()})
                raise ValueError(
                    f"the head {name!r} has shape {tuple(tensor.shape)}, the model's is {parameters.get(name)}: load "
                    "the " + ("base model of the adapter" if labels is None else f"base model with num_labels={labels}")
                )

    def load_base_model(self, name: str) -> "PreTrainedModel":
        """The base model of this name, as this adapter needs it: of its task type, with a head of its width."""
        task_type = self.config.get("task_type")
        if self.heads and task_type == "SEQ_CLS":
            shapes = {key: tuple(tensor.shape) for key, tensor in self.heads.items()}
            width = head_width(name, shapes)
            names = self.label_names if self.label_names and len(self.label_names) == width else None
            return load_base(name, width, label_names=names)  # ours replaces the head
        if task_type == "CAUSAL_LM":
            return load_causal(name)
        raise ValueError(
            f"cannot tell which model class {name!r} needs for task_type={task_type!r}: "
            "pass the loaded base model instead of its name"
        )


def save_head(adapter: LoraAdapter, path: Path) -> None:
    """Write a task's own tensors (head, modules, copies of base weights), and the fields by which PEFT loads them."""
    notes = {key: adapter.config.get(key) for key in ("modules_to_save", "task_type", "fan_in_fan_out")}
    copies = {spelled(name, {name.rpartition(".")[0]: 1}): one for name, one in adapter.copies.items()}
    tensors = {**adapter.heads, **adapter.modules, **copies}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: one.clone().contiguous() for key, one in tensors.items()}, path, {"osrm_peft": json.dumps(notes)})


def load_head(adapter: LoraAdapter, path: Path, layers: Collection[str]) -> LoraAdapter:
    """The adapter with the tensors that `save_head` wrote for a task.

    Args:
        layers: the adapted layers.

    Raises:
        SafetensorError, KeyError, json.JSONDecodeError: the file is damaged.
    """
    with safe_open(path, framework="pt") as file:
        kept = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        config = adapter.config | json.loads((file.metadata() or {})["osrm_peft"])
    copies = {key.replace(".base_layer.", "."): kept.pop(key) for key in list(kept) if ".base_layer." in key}
    heads = {name: one for name, one in kept.items() if is_head(name, config, layers)}
    modules = {name: one for name, one in kept.items() if name not in heads}
    return replace(
        adapter,
        heads=heads,
        config=config,
        modules={**adapter.modules, **modules},
        copies={**adapter.copies, **copies},
    )


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """{name: parameter or buffer} of a model, a shared one under each of its names."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _as_peft(A: Tensor, B: Tensor, layout: tuple[int, ...] | None) -> Iterator[tuple[str, Tensor]]:
    """(end of the name, tensor) as PEFT has them for this kind of layer."""
    for half, tensor in (("A", A), ("B", B)):
        if layout == ():
            yield f"lora_embedding_{half}", tensor
        elif layout is None:
            yield f"lora_{half}.weight", tensor
        else:
            shape = (len(tensor), *layout) if half == "A" else (*tensor.shape, *[1] * (len(layout) - 1))
            yield f"lora_{half}.weight", tensor.reshape(shape)


def shape_in(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """The shape of a tensor, without reading it."""
    return tensors.shapes[name] if isinstance(tensors, TensorsOnDemand) else tuple(tensors[name].shape)


def _renamed(tensors: Mapping[str, Tensor], new: Callable[[str], str]) -> TensorsOnDemand:
    back = {new(name): name for name in tensors}
    return TensorsOnDemand(
        {name: shape_in(tensors, old) for name, old in back.items()}, lambda name: tensors[back[name]]
    )
