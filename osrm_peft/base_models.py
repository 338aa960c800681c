"""Base models and their tokenizers, by name."""

from contextlib import suppress

from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from osrm_peft.packaged import resolve_model


def load_base(model: str, num_labels: int, device_map: str | None = None) -> PreTrainedModel:
    """A pre-trained model with a fresh classification head (`num_labels=1`: regression), in float32.

    Args:
        model: Hub id, folder, or `"packaged"`.
        num_labels: width of the head. It is drawn from torch's global generator: seed it first.
        device_map: `"auto"` spreads a model over the GPUs of this machine, and its memory where they are too few.
    """
    base = AutoModelForSequenceClassification.from_pretrained(
        resolve_model(model), num_labels=num_labels, ignore_mismatched_sizes=True, device_map=device_map
    )
    if base.config.pad_token_id is None:  # decoders such as Llama have none; classification pools at the last token
        with suppress(OSError, ValueError):  # without a tokenizer beside it, a model takes one row at a time
            base.config.pad_token_id = load_tokenizer(model).pad_token_id
    return base


def load_tokenizer(model: str):
    """The model's tokenizer, with a padding token (the end-of-sequence token where the model has none)."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(model))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
