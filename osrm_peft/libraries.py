"""Libraries that take seconds to import: whether a value is of one of their classes, asked without importing them."""

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper
    from torch.distributed.tensor import DTensor
    from transformers import PreTrainedModel
    from transformers.pytorch_utils import Conv1D


def is_peft_model(value: Any) -> TypeGuard["PeftModel"]:
    """Whether a value is PEFT's model with adapters."""
    return _is_a(value, "peft", "PeftModel")


def is_lora_layer(value: Any) -> TypeGuard["LoraLayer"]:
    """Whether a value is PEFT's layer with LoRA."""
    return _is_a(value, "peft.tuners.lora", "LoraLayer")


def is_param_wrapper(value: Any) -> TypeGuard["ParamWrapper"]:
    """Whether a value is PEFT's LoRA on a bare parameter."""
    return _is_a(value, "peft.tuners.lora.layer", "ParamWrapper")


def is_pretrained_model(value: Any) -> TypeGuard["PreTrainedModel"]:
    """Whether a value is a model of transformers."""
    return _is_a(value, "transformers.modeling_utils", "PreTrainedModel")


def is_conv1d(value: Any) -> TypeGuard["Conv1D"]:
    """Whether a value is transformers' Conv1D, a linear layer that keeps its weight as (n, o)."""
    return _is_a(value, "transformers.pytorch_utils", "Conv1D")


def is_dtensor(value: Any) -> TypeGuard["DTensor"]:
    """Whether a value is torch's tensor that is split over processes."""
    return _is_a(value, "torch.distributed.tensor", "DTensor")


def _is_a(value: Any, module: str, name: str) -> bool:
    """A class whose module nobody has imported has no instances."""
    imported = sys.modules.get(module)
    return imported is not None and isinstance(value, getattr(imported, name))
