"""Which layers an adapter targets, by their names in the base model."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from osrm_peft.distributed import inner_module
from osrm_peft.hub.privacy import public_name
from osrm_peft.libraries import is_conv1d, is_lora_layer, is_param_wrapper, is_peft_model

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D


def unwrapped(model: Any) -> Any:
    """The model inside DistributedDataParallel, a DeepSpeed engine or torch.compile; any other model as it is."""
    while True:
        inside = getattr(model, "_modules", {})  # not hasattr: a PeftModel answers for the model inside it
        inner = inside["_orig_mod"] if "_orig_mod" in inside else inner_module(model)
        if inner is None:
            return model
        model = inner


def base_of(model: Any) -> Any:
    """The base model inside a PeftModel (its layers keep their own names there), or `model` itself."""
    model = unwrapped(model)
    return unwrapped(model.get_base_model()) if is_peft_model(model) else model


def base_name(model: nn.Module) -> str:
    """The name that the base model was loaded by, see `public_name`; its class if it was made in memory."""
    base = base_of(model)
    return public_name(getattr(getattr(base, "config", None), "_name_or_path", "")) or type(base).__name__


def target_layers(
    model: nn.Module, target_modules: "list[str] | str | LoraConfig | None" = None
) -> dict[str, nn.Module]:
    """The layers that LoRA with these `target_modules` adapts: {name in the base model: module}, in model order.

    Args:
        model: a base model, or a PeftModel with LoRA layers.
        target_modules: as in `LoraConfig`, or a whole LoraConfig (its `layers_to_transform`, `exclude_modules`, … then
            count too). None: the layers that carry LoRA in a PeftModel, else PEFT's default for the model type.

    Raises:
        ValueError: nothing matches, or a match is no linear layer.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    base = base_of(model)
    if target_modules is None and is_peft_model(model):
        found: dict[str, Any] = all_lora_layers(model)
    else:
        config = _as_config(base, target_modules)
        found = {
            name: module for name, module in base.named_modules() if name and check_target_module_exists(config, name)
        }
        target_modules = config.target_modules
    if not found:
        raise ValueError(f"target_modules={target_modules!r} match no layer of {type(base).__name__}")
    for name, module in found.items():
        linear_layer(name, module)
    return found


def lora_layers(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """The LoRA layers of one adapter of a PeftModel: {name in the base model: peft's LoraLayer}."""
    return {
        name: module
        for name, module in base_of(model).named_modules()
        if is_lora_layer(module) and adapter_name in module.r
    }


def base_layer(module: Any) -> Any:
    """The layer that a LoRA layer wraps; any other module as it is."""
    return module.get_base_layer() if is_lora_layer(module) else module


def all_lora_layers(model: nn.Module) -> dict[str, Any]:
    """The LoRA layers of all adapters: {name in the base model: peft's LoraLayer}."""
    return {name: module for name, module in base_of(model).named_modules() if is_lora_layer(module)}


def check_unmerged(layers: Mapping[str, Any]) -> None:
    """Raise ValueError if an adapter is merged into the weights of one of the layers."""
    merged = [name for name, module in layers.items() if getattr(module, "merged", False)]
    if merged:
        raise ValueError(f"an adapter is merged into {merged[0]!r}: call unmerge_adapter() first")


def linear_layer(name: str, module: nn.Module) -> "nn.Linear | Conv1D":
    """The module if it is a linear layer, or the linear layer that it wraps with LoRA (bitsandbytes' are `nn.Linear`s).

    Raises:
        ValueError: the module is another kind of layer; names it.
    """
    if is_param_wrapper(module):
        raise ValueError(
            f"layer {name!r} has LoRA on its parameter {module.parameter_name!r}; OSRM features are of linear layers, "
            "not of bare parameters (experts, which PEFT adapts for target_modules='all-linear' and their old names, "
            "too): name linear layers in target_modules, such as those of the attention"
        )
    layer = base_layer(module)
    if not (isinstance(layer, nn.Linear) or is_conv1d(layer)):
        raise ValueError(
            f"layer {name!r} is a {type(layer).__name__}; OSRM features are of linear layers (nn.Linear, Conv1D): "
            "narrow target_modules, or list it in exclude_modules"
        )
    return layer


def input_width(name: str, module: nn.Module) -> int:
    """n of a linear layer; raises as `linear_layer` does."""
    layer: Any = linear_layer(name, module)
    return layer.nx if is_conv1d(layer) else layer.in_features


def weight_shape(module: nn.Module) -> tuple[int, int] | None:
    """(o, n) of the layer's task vectors; None for a kind of layer that we do not know."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, nn.Embedding) or is_conv1d(module):  # their weights are (n, o)
        return int(module.weight.shape[1]), int(module.weight.shape[0])
    if isinstance(module, nn.modules.conv._ConvNd):
        return len(module.weight), module.weight[0].numel()
    return None


def experts_in(model: nn.Module, parameter: str) -> tuple[int, int, int] | None:
    """(E, o, n) of a bare parameter, a stack of E matrices as PEFT's LoRA sees it; E = 0 of a single matrix.

    None if the model has no such parameter, or a vector.
    """
    owner, _, leaf = parameter.rpartition(".")
    module = model.get_submodule(owner)
    shape = tuple(getattr(module, leaf, torch.empty(0)).shape)
    if len(shape) == 2:
        return 0, shape[0], shape[1]
    if len(shape) != 3:
        return None
    o, n = shape[:0:-1] if _turned(module) else shape[1:]
    return (0 if shape[0] == 1 else shape[0]), o, n


def as_experts(module: nn.Module, deltas: Sequence[Tensor]) -> Tensor:
    """(E, o, n) or (E, n, o), the task vectors (o, n) of a stack in the shape of the module's parameter."""
    return torch.stack([delta.mT if _turned(module) else delta for delta in deltas])


def _turned(module: nn.Module) -> bool:
    """Whether a module of experts says that its stacks are (E, n, o), as gpt-oss' are."""
    return bool(getattr(module, "is_transposed", False))


def as_weight(module: nn.Module, delta: Tensor) -> Tensor:
    """An (o, n) task vector in the shape of the layer's own weight, for each kind that `weight_shape` knows."""
    weight: Any = module.weight
    return delta.mT if isinstance(module, nn.Embedding) or is_conv1d(module) else delta.reshape(weight.shape)


def _as_config(base: nn.Module, target_modules: "list[str] | str | LoraConfig | None") -> "LoraConfig":
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    if isinstance(target_modules, LoraConfig):
        fields = (
            "target_modules",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "modules_to_save",
        )
        config = LoraConfig(
            task_type=target_modules.task_type, **{field: getattr(target_modules, field) for field in fields}
        )
    else:
        config = LoraConfig(target_modules=target_modules)
    if config.target_modules is None:
        model_type = getattr(getattr(base, "config", None), "model_type", None)
        if model_type not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
            raise ValueError(f"PEFT knows no default target_modules for model type {model_type!r}: name them")
        config.target_modules = list(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[model_type])
    return _maybe_include_all_linear_layers(config, base)  # type: ignore[return-value]
