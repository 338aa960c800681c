"""Whether a model's config.json and the dtypes of its weights allow a merge, and why not."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

_DEEPEST, _LARGEST = 32, 2**63
_MOST = 2**14  # layers, heads or experts (rows of a tensor in Doge) that a file with fewer tensors may have
_COUNTS = re.compile(r"(^|_)(num|n)_?.*(layer|expert|block|head|group)|(^|_)(layers|depth)s?$")
_TYPES: dict[str, tuple[type, ...]] = {"model_type": (str,), "tie_word_embeddings": (bool,), "vocab_size": (int,)}
# fields, at any depth, that belong to the tokenizer
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id",
             "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")  # fmt: skip
# parts of names in packed files, which hold floats and whole numbers instead of one matrix
_PACKED = {
    "GPTQ or AWQ": r"\.(qweight|qzeros|g_idx)$",
    "bitsandbytes": r"\.(absmax|quant_map|nested_absmax|SCB)$|\.quant_state\.",
    "compressed-tensors": r"\.weight_packed$",
    "MXFP4": r"_proj_(blocks|scales)$",
    "FP8": r"\.weight_scale(_inv)?$",
}
_ANEW = (
    "merge the weights before quantisation (the folder or Hub id that this one was made from), and quantise the result"
)


FOUR_BIT = ".quant_state.bitsandbytes__"  # in the name of the tensor that says how a 4-bit weight is packed


def is_four_bit(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that bitsandbytes packed the weights into 4 bits."""
    settings = config.get("quantization_config")
    return (
        isinstance(settings, dict)
        and settings.get("quant_method") == "bitsandbytes"
        and bool(settings.get("load_in_4bit", settings.get("_load_in_4bit")))
    )


def four_bit_reader(path: Path) -> Callable[[Tensor, dict[str, Tensor]], Tensor]:
    """A function from 4-bit codes, and what is stored beside them, to the weight: bitsandbytes' own.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.functional import QuantState, dequantize_4bit
    except ImportError as error:
        raise ValueError(
            f"{path}: quantization_config says bitsandbytes, 4 bits: bitsandbytes unpacks them (pip install "
            "bitsandbytes), or give the model before quantisation, the folder or Hub id that this one was made from"
        ) from error
    return lambda codes, parts: dequantize_4bit(codes, QuantState.from_dict(parts, device=codes.device))


def check_config(path: Path, config: Mapping[str, Any], tensors: int) -> None:
    """Refuse a configuration with fields of the wrong type or absurd numbers.

    Args:
        path: the config.json.
        tensors: the number of tensors in the weight files: a model has no more layers.

    Raises:
        ValueError: names file and field.
    """
    for key, types in _TYPES.items():
        value = config.get(key)
        if value is not None and not (isinstance(value, types) and isinstance(value, bool) == (types == (bool,))):
            raise ValueError(f"{path}: {key} is {_short(value)}, and should be of type {types[0].__name__}")
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(one, str) for one in names)):
        raise ValueError(f"{path}: architectures is {_short(names)}, and should be a list of names")
    waiting: list[tuple[str, Any, int]] = [(key, value, 1) for key, value in config.items()]
    while waiting:
        field, value, depth = waiting.pop()
        shown_field = shown(field)[:100]
        if depth > _DEEPEST:
            raise ValueError(f"{path}: {shown_field} is nested more than {_DEEPEST} levels deep")
        key = field.rpartition(".")[2]
        if key in TOKEN_IDS and not (value is None or isinstance(value, (int, list))):
            raise ValueError(f"{path}: {shown_field} is {_short(value)}, and should be a number or a list of numbers")
        if isinstance(value, dict):
            waiting += [(f"{field}.{key}", one, depth + 1) for key, one in value.items()]
        elif isinstance(value, list):
            waiting += [(field, one, depth + 1) for one in value]
        elif isinstance(value, int) and not -_LARGEST <= value < _LARGEST:
            raise ValueError(f"{path}: {shown_field} is {_short(value)}, which is no size of a model")
        elif isinstance(value, int) and value > max(_MOST, tensors) and _COUNTS.search(key):
            raise ValueError(f"{path}: {shown_field} is {value}, and the weights are {tensors} tensors")


def check_not_quantised(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a model that its config.json says is quantised.

    Raises:
        ValueError: names the method and the way out.
    """
    field = "quantization_config" if config.get("quantization_config") else "quantization"  # the latter of MLX
    settings = config.get(field)
    if not settings:
        return
    default = "MLX" if field == "quantization" else None
    kind = settings.get("quant_method", default) if isinstance(settings, dict) else settings
    way_out = _ANEW
    if kind in ("fp8", "mxfp4"):
        name = "FineGrainedFP8Config" if kind == "fp8" else "Mxfp4Config"
        way_out = (
            f"save it in bfloat16 first, from_pretrained({str(path.parent)!r}, dtype='bfloat16', "
            f"quantization_config={name}(dequantize=True)).save_pretrained(folder)"
        )
    raise ValueError(f"{path}: {field} says {_short(kind)}: quantised weights cannot be merged: {way_out}")


def check_not_packed(path: Path, names: Iterable[str]) -> None:
    """Refuse weights that are packed, though the configuration does not say so.

    Raises:
        ValueError: names a tensor and the kind.
    """
    for name in names:
        for kind, pattern in _PACKED.items():
            if re.search(pattern, name):
                raise ValueError(
                    f"{path}: {name!r} is part of a quantised weight ({kind}), which cannot be merged: {_ANEW}"
                )


def refusal(dtype: Any) -> str | None:
    """Why a dtype of the safetensors format is not merged; None for a dtype that is none of the format's."""
    if not isinstance(dtype, str):
        return None
    if dtype.startswith("F8_"):
        save = "from_pretrained(…, dtype='bfloat16').save_pretrained(folder)"
        return f"the weights are FP8: save them in bfloat16 first, {save}"
    if dtype.startswith(("F4", "F6_")):
        return f"the weights are quantised to {dtype[1]} bits: {_ANEW}"
    if dtype in ("C64", "U16", "U32", "U64"):
        return "save it as float32 or int64, or remove it if from_pretrained does not need it"
    return None


def shown(text: str) -> str:
    """Text from a file that is safe in a terminal: control characters are escaped."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 2**64 else f"about 2^{value.bit_length() - 1}"
    return text if len(text) < 60 else text[:57] + "…"
