"""Which layers an adapter targets, by their names in the base model, and a hash of those layers' weights."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from osrm_peft.distributed import inner_module, whole_weight
from osrm_peft.hub import public_name

HASHED_ENTRIES = 1024
_LAYERS_ONLY = "v2"  # begins a hash of layers alone; earlier ones count the input embedding, with all its rows, in


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
    return unwrapped(model.get_base_model()) if isinstance(model, PeftModel) else model


def base_name(model: nn.Module) -> str:
    """Name from which the base model was loaded, see `public_name`; its class where it was made in memory."""
    base = base_of(model)
    return public_name(getattr(getattr(base, "config", None), "_name_or_path", "")) or type(base).__name__


def target_layers(model: nn.Module, target_modules: list[str] | str | LoraConfig | None = None) -> dict[str, nn.Module]:
    """The layers that LoRA with these `target_modules` adapts: {name in the base model: module}, in model order.

    Args:
        model: a base model, or a PeftModel with LoRA layers.
        target_modules: as in `LoraConfig`, or a whole LoraConfig (its `layers_to_transform`, `exclude_modules`, … then
            count too). None: the layers that carry LoRA in a PeftModel, else PEFT's default for the model type.

    Raises:
        ValueError: nothing matches, or a match is no linear layer.
    """
    base = base_of(model)
    if target_modules is None and isinstance(model, PeftModel):
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
        if isinstance(module, LoraLayer) and adapter_name in module.r
    }


def base_layer(module: Any) -> Any:
    """The layer that a LoRA layer wraps; any other module as it is."""
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def all_lora_layers(model: nn.Module) -> dict[str, Any]:
    """The LoRA layers of all adapters: {name in the base model: peft's LoraLayer}."""
    return {name: module for name, module in base_of(model).named_modules() if isinstance(module, LoraLayer)}


def check_unmerged(layers: Mapping[str, Any]) -> None:
    """Raise ValueError if an adapter is merged into the weights of one of the layers."""
    merged = [name for name, module in layers.items() if getattr(module, "merged", False)]
    if merged:
        raise ValueError(f"an adapter is merged into {merged[0]!r}: call unmerge_adapter() first")


def linear_layer(name: str, module: nn.Module) -> nn.Linear | Conv1D:
    """The linear layer that `module` is, or that its LoRA layer wraps; bitsandbytes' quantised ones are `nn.Linear`s.

    Raises:
        ValueError: it is another kind of layer; names it.
    """
    layer = base_layer(module)
    if not isinstance(layer, (nn.Linear, Conv1D)):
        raise ValueError(
            f"layer {name!r} is a {type(layer).__name__}; OSRM features are of linear layers (nn.Linear, Conv1D): "
            "narrow target_modules, or list it in exclude_modules"
        )
    return layer


def input_width(name: str, module: nn.Module) -> int:
    """n of a linear layer; raises as `linear_layer` does."""
    layer = linear_layer(name, module)
    return layer.nx if isinstance(layer, Conv1D) else layer.in_features


def weight_shape(module: nn.Module) -> tuple[int, int] | None:
    """(o, n) of the layer's task vectors; None for a kind of layer that we do not know."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, (nn.Embedding, Conv1D)):  # their weights are (n, o)
        return int(module.weight.shape[1]), int(module.weight.shape[0])
    if isinstance(module, nn.modules.conv._ConvNd):
        return len(module.weight), module.weight[0].numel()
    return None


def as_weight(module: nn.Module, delta: Tensor) -> Tensor:
    """An (o, n) task vector in the shape of the layer's own weight, for each kind that `weight_shape` knows."""
    weight: Any = module.weight
    return delta.mT if isinstance(module, (nn.Embedding, Conv1D)) else delta.reshape(weight.shape)


def weight_hash(model: nn.Module, names: Iterable[str]) -> str:
    """A hash of the named layers' pre-trained weights, which tells two base models apart.

    Hashed are each layer's name, shape and 1,024 evenly spaced entries rounded to bfloat16: equal whether the
    checkpoint was loaded in float32 or bfloat16, changed by any training, and quick on the largest models. The input
    embedding, which new tokens make longer, has a hash of its own: `embedding_hash`.

    Args:
        names: layers of the base model; of a model that an engine has split, every process must give the same ones.

    Returns:
        "v2" and 14 hexadecimal digits. (16 digits are of an earlier version, see `hash_of`: not to be compared.)
    """
    names = list(names)
    return hash_of(sampled_weights(model, names), names)


def sampled_weights(model: nn.Module, names: Iterable[str], rows: Iterable[int] = ()) -> dict[str | int, bytes]:
    """What hashes look at: {name: of this layer, V: of the first V rows of the input embedding, "": of all its rows}.

    Args:
        rows: each V that is asked for; those that the embedding does not have are left out.
    """
    base = base_of(model)
    found: dict[str | int, bytes] = {}
    for name in names:
        with whole_weight(linear_layer(name, base.get_submodule(name))) as weight:
            found[name] = _sample(name, weight)
    embedding = input_embedding(base)
    if embedding is not None:
        with whole_weight(embedding) as weight:
            found[""] = _sample("input_embeddings", weight)
            known = {len(weight), *(V for V in rows if len(weight) >= V)}
            found |= {V: _sample("input_embeddings", weight[:V]) for V in known}
    return found


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The module with the weights that a model's first layers read; None for what has none (HuBERT, ConvNeXt, …)."""
    try:
        embedding = base_of(model).get_input_embeddings()
    except (AttributeError, NotImplementedError):  # no transformers model; or one of sound or images
        return None
    return embedding if isinstance(getattr(embedding, "weight", None), Tensor) else None


def _sample(name: str, weight: Tensor) -> bytes:
    entries = weight.detach().flatten()
    index = torch.linspace(0, entries.numel() - 1, HASHED_ENTRIES, dtype=torch.float64).long().unique()
    sampled = entries[index.to(entries.device)].to("cpu", torch.bfloat16).view(torch.int16)
    return f"{name}{tuple(weight.shape)}".encode() + sampled.numpy().tobytes()


def hash_of(sampled: Mapping[str | int, bytes], names: Iterable[str], like: str = _LAYERS_ONLY) -> str:
    """The `weight_hash` over some of the `sampled_weights`; made as the hash `like` was, which is that of a file."""
    if like.startswith(_LAYERS_ONLY):
        return _LAYERS_ONLY + _digest(sampled[name] for name in sorted(names))[:14]
    every = sorted({*names, *({""} & set(sampled))}, key=lambda name: name or "input_embeddings")
    return _digest(sampled[name] for name in every)[:16]


def counts_all_rows(weight_hash: str) -> bool:
    """Whether the hash is of an earlier version, which a resized vocabulary changes."""
    return not weight_hash.startswith(_LAYERS_ONLY)


def embedding_hash(sampled: Mapping[str | int, bytes], rows: int) -> str | None:
    """16 hexadecimal digits over the first rows of the input embedding; None where `sampled` has not as many."""
    return _digest([sampled[rows]])[:16] if rows in sampled else None


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _as_config(base: nn.Module, target_modules: list[str] | str | LoraConfig | None) -> LoraConfig:
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


def last_layer(heads: Iterable[str]) -> str:
    """Of a head's parameters, by their names, one that is as wide as there are labels: see `base_models.head_width`.

    That is one of PEFT's own names for it (classifier, score), and of its last layer (classifier.out_proj); neither
    pre_classifier nor what is saved beside it (ModernBERT's head, an embedding).
    """
    return max(heads, key=lambda name: (bool(re.search(r"(^|\.)(classifier|score|classification_head)\.", name)), name))
