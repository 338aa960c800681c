"""What an adapter makes of its base's tensors: products to add, values that replace, what PEFT's layers merge."""

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from osrm_peft.adapters.keys import PREFIX, part_of, saved_modules
from osrm_peft.adapters.lora_adapter import LoraAdapter, shape_in
from osrm_peft.io.tensors import tensor_headers, tensor_reader
from osrm_peft.libraries import is_conv1d

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WRAPPERS = {"base_layer", "original_module", "token_adapter"}  # what PEFT puts into the names of the base's tensors

Read = Callable[[str], Tensor]  # from a parameter's name in the model to the base's tensor; KeyError: it has none


@dataclass(frozen=True)
class Change:
    """What becomes of one parameter.

    Attributes:
        value: the trained tensor, or a copy of the base's, that takes the place of the base's.
        product: (rows, r) and (r, width) whose product is added, in the orientation of the parameter.
        merged: its value as PEFT merges it, from the base's tensors.
        trained: the value was trained, so a scale moves it from the base's to itself.
        shape: of the result; None: the base's.
    """

    value: Callable[[], Tensor] | None = None
    product: Callable[[], tuple[Tensor, Tensor]] | None = None
    merged: Callable[[Read], Tensor] | None = None
    trained: bool = False
    shape: tuple[int, ...] | None = None


def plain_changes(adapter: LoraAdapter, model: "PreTrainedModel | None") -> dict[str, Change]:
    """{parameter name in the model: Change} of plain LoRA, with its heads, modules and copies; nothing is read.

    Args:
        adapter: its layers named as in `model`.
        model: the base, on the meta device; None: of a class that transformers does not know.
    """
    modules: dict[str, nn.Module] = {} if model is None else dict(model.named_modules())
    changes: dict[str, Change] = {}
    for part, trained in ((adapter.copies, False), (adapter.heads, False), (adapter.modules, True)):
        for name in part:
            changes[name] = Change(partial(part.__getitem__, name), trained=trained, shape=shape_in(part, name))
    for layer in adapter.factors:
        module = modules.get(layer)
        parameter = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
        turned = (
            isinstance(module, nn.Embedding)
            or is_conv1d(module)
            or (module is None and (adapter.layouts.get(layer) == () or bool(adapter.config.get("fan_in_fan_out"))))
        )
        under = changes.get(f"{layer}.{parameter}", Change())
        product = partial(_product, adapter, layer, turned)
        changes[f"{layer}.{parameter}"] = Change(under.value, product, trained=under.trained, shape=under.shape)
    return changes


def _product(adapter: LoraAdapter, layer: str, turned: bool) -> tuple[Tensor, Tensor]:
    """(rows, r) and (r, width) of a layer's task vector, `turned` where the model keeps the weight as (n, o)."""
    factors = adapter.factors[layer]
    B = factors.s * factors.B
    return (factors.A.mT, B.mT) if turned else (B, factors.A)


def changes_by_peft(folder: Path, source: str, model: "PreTrainedModel") -> dict[str, Change]:
    """{parameter name in the model: Change} of an adapter that is more than s·B·A: PEFT's own layers merge it.

    Args:
        folder: the adapter's, as PEFT wrote it.
        source: its name, for errors.
        model: the base, on the meta device; it stays as it is.

    Raises:
        ValueError: the adapter does not fit the model, or PEFT keeps a part of it nowhere.
    """
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    config: Any = PeftConfig.from_pretrained(str(folder))
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # any other would look at the base's weights
    file = folder / "adapter_model.safetensors"
    headers, read = tensor_headers(file), tensor_reader(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights, which are looked at later
        try:
            wrapped: Any = get_peft_model(copy.deepcopy(model), config, low_cpu_mem_usage=True)
            parameters = dict(wrapped.named_parameters(remove_duplicate=False))
            found = get_peft_model_state_dict(wrapped, state_dict=dict(parameters), save_embedding_layers=False)
        except (ValueError, NotImplementedError, RuntimeError, AttributeError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{source} does not fit {type(model).__name__}, says PEFT: {reason}") from error
    of_file = {id(one): key for key, one in found.items()}
    keys = {name: of_file[id(one)] for name, one in parameters.items() if id(one) in of_file}
    fields = config.to_dict()
    copies = {part_of(key, saved_modules(fields)).name: key for key in headers.keys() - set(found)
              if part_of(key, saved_modules(fields)).kind == "base"}  # fmt: skip
    lost = sorted((headers.keys() ^ set(found)) - set(copies.values()))
    if lost:
        raise ValueError(f"{source} and {type(model).__name__} do not fit: {', '.join(lost[:6])}")
    for name, key in keys.items():
        if headers[key][0] != tuple(parameters[name].shape):
            raise ValueError(
                f"{source} has {key!r} of shape {headers[key][0]}, and PEFT makes it {tuple(parameters[name].shape)} "
                f"for {type(model).__name__}: the adapter is of another base model"
            )
    changes = {name.removeprefix(PREFIX): Change(partial(read, key), trained=True) for name, key in keys.items()}
    reading = _Reading(read, keys, copies)
    for place, module in _outermost(wrapped):
        inside = f"{place}."
        changes = {name: one for name, one in changes.items() if not f"{PREFIX}{name}".startswith(inside)}
        merge = _Merge(place, module, reading)
        for name in merge.parameters:
            changes[f"{place.removeprefix(PREFIX)}.{name}"] = Change(
                merged=partial(merge, name), trained=True, shape=merge.parameters[name]
            )
    return changes


@dataclass(frozen=True)
class _Reading:
    """Reads what PEFT's layers need from an adapter's file.

    Attributes:
        keys: {name in the PeftModel: key in the file}.
        copies: {parameter of the base model: key of its copy in the file}.
    """

    read: Callable[[str], Tensor]
    keys: Mapping[str, str]
    copies: Mapping[str, str]


class _Merge:
    """One module that PEFT has wrapped, merged when one of its parameters is asked for, and kept until all were."""

    def __init__(self, place: str, module: Any, reading: _Reading) -> None:
        self.place, self.module, self.reading = place, module, reading
        self.parameters = {name: tuple(one.shape) for name, one in _bare(module).named_parameters()}
        self._made: dict[str, Tensor] = {}

    def __call__(self, name: str, base: Read) -> Tensor:
        if name not in self._made:
            self._made = self._merged(base)
        return self._made.pop(name)

    @torch.no_grad()
    def _merged(self, base: Read) -> dict[str, Tensor]:
        module: Any = copy.deepcopy(self.module)
        for name, tensor in _tensors(module).items():
            if tensor.is_meta:
                self._fill(module, name, base)
        if hasattr(module, "unload_and_optionally_merge_module"):
            module = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        else:
            module.merge(safe_merge=True)
            module = module.get_base_layer()
        return {name: one.detach() for name, one in module.named_parameters()}

    def _fill(self, module: nn.Module, name: str, base: Read) -> None:
        """Give a tensor on the meta device the values of the adapter's file, or of the base model."""
        whole = f"{self.place}.{name}"
        if whole in self.reading.keys:
            value = self.reading.read(self.reading.keys[whole])
        else:
            own = ".".join(part for part in whole.removeprefix(PREFIX).split(".") if part not in _WRAPPERS)
            try:
                value = self.reading.read(self.reading.copies[own]) if own in self.reading.copies else base(own)
            except KeyError:
                if not {"original_module", "trainable_tokens_original"} & {*name.split(".")}:  # which no merge reads
                    raise ValueError(
                        f"PEFT makes {own!r} anew when it loads this adapter, so it cannot be baked: bake it with "
                        "PEFT's merge_and_unload"
                    ) from None
                value = torch.zeros(_tensors(module)[name].shape)
        owner, _, leaf = name.rpartition(".")
        value = value.float() if value.is_floating_point() and value.itemsize < 4 else value
        part = module.get_submodule(owner)
        if leaf in part._parameters:
            part._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            part._buffers[leaf] = value


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _bare(module: Any) -> nn.Module:
    """The module that stays when PEFT's wrapper goes."""
    if hasattr(module, "modules_to_save"):
        return module.modules_to_save["default"]
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module.token_adapter.get_base_layer()


def _outermost(wrapped: nn.Module) -> list[tuple[str, Any]]:
    """(name in the PeftModel, module) of the modules that PEFT has wrapped, none inside of another."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: list[tuple[str, Any]] = []
    for name, module in wrapped.named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not any(
            name.startswith(f"{place}.") for place, _ in found
        ):
            found.append((name, module))
    return found
