"""Base models and their tokenizers, by name."""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from osrm_peft.models.packaged import resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)


def load_base(
    model: str, num_labels: int | None, device_map: str | None = None, label_names: Sequence[str] | None = None
) -> "PreTrainedModel":
    """A pre-trained model with a fresh classification head (`num_labels=1`: regression), in its checkpoint's dtype.

    Args:
        model: Hub id, folder, or `"packaged"`.
        num_labels: width of the head; None: the width in the model's config. torch's global generator draws the head:
            seed it first.
        device_map: `"auto"` spreads a model over the GPUs of this machine, and over its memory if these are too small.
        label_names: the names of the classes, for the model's config; a pipeline answers with them.
    """
    from transformers import AutoModelForSequenceClassification

    labels: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
    if label_names is not None:
        labels["id2label"] = dict(enumerate(label_names))
        labels["label2id"] = {name: label for label, name in enumerate(label_names)}
    base = AutoModelForSequenceClassification.from_pretrained(
        resolve_model(model), **labels, ignore_mismatched_sizes=True, device_map=device_map
    )
    config = base.config.get_text_config()
    if getattr(config, "pad_token_id", None) is None:  # decoders such as Llama need it to find the last token
        try:
            config.pad_token_id = load_tokenizer(model).pad_token_id
        except (OSError, ValueError) as error:
            logger.warning("%s has no padding token, and takes one row at a time: no tokenizer (%s)", model, error)
    return base


def load_causal(model: str, device_map: str | None = None) -> "PreTrainedModel":
    """A pre-trained causal language model, in its checkpoint's dtype; see `load_base`."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(resolve_model(model), device_map=device_map)


def head_width(model: "str | PreTrainedModel", heads: Mapping[str, Sequence[int]]) -> int | None:
    """The number of labels of a saved classification head, whatever its layers are called.

    transformers builds the model without weights, for 3 and for 5 labels. A parameter with n = a·labels + b rows then
    gives the number.

    Args:
        model: name of the base model (for sequence classification), or the model itself.
        heads: {parameter name in the model: shape} of the saved parameters, the head's among them.

    Returns:
        None where no saved parameter depends on the number of labels.
    """
    config: Any
    make: Callable[..., nn.Module]
    if not isinstance(model, str):
        config, make = model.config, type(model)._from_config
    else:
        from transformers import AutoConfig, AutoModelForSequenceClassification

        config = AutoConfig.from_pretrained(resolve_model(model))
        make = AutoModelForSequenceClassification.from_config
    few, many = (_shapes(make, config, labels) for labels in (3, 5))
    for name, shape in heads.items():
        for axis, (of_3, of_5) in enumerate(zip(few.get(name, ()), many.get(name, ()), strict=True)):
            if of_3 != of_5 and len(shape) > axis:
                each = (of_5 - of_3) // 2
                return (shape[axis] - of_3) // each + 3
    return None


def _shapes(make: Callable[..., nn.Module], config: "PreTrainedConfig", num_labels: int) -> dict[str, tuple[int, ...]]:
    config = copy.deepcopy(config)
    config.num_labels = num_labels
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in make(config).named_parameters()}


def load_tokenizer(model: str):
    """The model's tokenizer, with a padding token (the end-of-sequence token where the model has none).

    Raises:
        ValueError: the model has no tokenizer; transformers makes one without words where the files are missing.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_model(model))
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(
            f"{model} has no tokenizer files: put them into its folder (tokenizer.json, or its vocabulary)"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
