"""Base models and their tokenizers, by name."""

import logging

from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from osrm_peft.packaged import resolve_model

logger = logging.getLogger(__name__)


def load_base(model: str, num_labels: int, device_map: str | None = None) -> PreTrainedModel:
    """A pre-trained model with a fresh classification head (`num_labels=1`: regression), in its checkpoint's dtype.

    Args:
        model: Hub id, folder, or `"packaged"`.
        num_labels: width of the head. It is drawn from torch's global generator: seed it first.
        device_map: `"auto"` spreads a model over the GPUs of this machine, and its memory where they are too few.
    """
    base = AutoModelForSequenceClassification.from_pretrained(
        resolve_model(model), num_labels=num_labels, ignore_mismatched_sizes=True, device_map=device_map
    )
    config = base.config.get_text_config()
    if getattr(config, "pad_token_id", None) is None:  # of decoders such as Llama, which classify at the last token
        try:
            config.pad_token_id = load_tokenizer(model).pad_token_id
        except (OSError, ValueError) as error:
            logger.warning("%s has no padding token, and takes one row at a time: no tokenizer (%s)", model, error)
    return base


def load_tokenizer(model: str):
    """The model's tokenizer, with a padding token (the end-of-sequence token where the model has none)."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(model))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
