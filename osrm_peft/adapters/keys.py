"""Keys of an adapter file: what each tensor is, and its layer's name without the wrappers around the model."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

PREFIX = "base_model.model."
# components that wrappers put into names: torch.compile, FSDP, activation checkpointing, DDP and DeepSpeed
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"}
_DOUBTFUL = re.compile(r"(^|\.)(module|base_model\.model)\.")

_HALF = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.([^.]+))?")  # matched without a trailing `.weight`
_LORA = re.compile(r"\.lora_(A|B|embedding|magnitude)")  # adapters' names; models may have others with `lora_`
_INDEX = re.compile(r"\.\d+(?=\.|$)")

# the modules that PEFT trains and saves by itself for a task type (its classes PeftModelFor…)
TASK_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
# components of names of a task's output, which no pre-trained model has
_HEADS = {"classifier", "score", "qa_outputs", "pre_classifier", "classification_head", "v_head", "value_head"}
# input and output embeddings: the only base weights that PEFT copies into an adapter's file unasked
EMBEDDINGS = {
    "embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_in", "embed_out", "tok_embeddings",
    "embed_positions", "token_embedding", "embeddings", "decoder", "proj_out", "output", "lm_head_decoder",
    "output_projection", "input_embedding", "word_embedding", "tokens_embed", "generator_lm_head", "vocab_projector",
    "lm_loss",
}  # fmt: skip
_INSIDE = {"lm_head", "embed_tokens"}  # their parts are copied with them: `lm_head.out_proj`, `embed_tokens.norm`


class Part(NamedTuple):
    """One tensor of an adapter file.

    Attributes:
        kind: `"lora"` (half of a pair), `"saved"` (a trained copy of a module), `"duplicate"` (the same once more),
            `"original"` (the module before training, switched off by the adapter), `"base"` (a frozen base weight that
            PEFT restores), `"bias"`, or `"unknown"`.
        name: the layer's name (`lora`), else the parameter's name in the base model.
        half: `"A"` or `"B"`; empty unless `lora`.
        embedding: the pair is of an embedding (`lora_embedding_A`).
        adapter: the adapter's name, if the key has it (`lora_A.default.weight`).
    """

    kind: str
    name: str
    half: str = ""
    embedding: bool = False
    adapter: str = ""


def base_name(key: str, own: bool = False) -> str:
    """A parameter's or layer's name in the base model: without PEFT's prefix, and without wrappers anywhere in it.

    Args:
        own: the base model has components of its own that are called like a wrapper's (see `is_doubtful`): they stay.
    """
    if own:
        return ".".join(part for part in _behind_prefix(key).split(".") if part not in _WRAPPERS - {"module"})
    parts = [part for part in key.split(".") if part not in _WRAPPERS]
    while parts[:2] == ["base_model", "model"] and len(parts) > 2:
        parts = parts[2:]
    return ".".join(parts)


def is_doubtful(key: str) -> bool:
    """Whether the name has components that are a wrapper's or the model's own: only the model itself shows which.

    LeViT has layers below `.module.`; a reward model may have layers below `base_model.model.`.
    """
    return bool(_DOUBTFUL.search(_behind_prefix(key)))


def _behind_prefix(key: str) -> str:
    before, prefix, behind = key.partition(PREFIX)
    return behind if prefix and {*before.split(".")} <= {"", *_WRAPPERS} else key


def part_of(key: str, saved: Iterable[str], tied: bool = False, own: bool = False) -> Part:
    """The part of an adapter that a key names.

    Args:
        saved: the config's `modules_to_save`, and the heads that PEFT adds for the task type.
        tied: the config's `ensure_weight_tying`: PEFT then also saves the modules tied to `saved`.
        own: see `base_name`.
    """
    name = base_name(key, own)
    pair = _HALF.fullmatch(name.removesuffix(".weight"))
    if pair and name.endswith(".weight") != bool(pair[2]):
        return Part("lora", pair_name(pair[1]), pair[3], bool(pair[2]), pair[4] or "")
    if _LORA.search(name):
        return Part("unknown", name)
    parameter = name.rpartition(".")[2]
    if ".base_layer." in name:
        return Part("bias" if parameter == "bias" else "base", name.replace(".base_layer.", "."))
    if ".original_module." in name:
        return Part("original", name.replace(".original_module.", "."))
    copy = re.fullmatch(r"(.+)\.modules_to_save\.(.+\.)?([^.]+)", name)
    if copy:  # the adapter's name may stand between: X.modules_to_save.default.weight
        return Part("duplicate", f"{copy[1]}.{(copy[2] or '').removeprefix('default.')}{copy[3]}")
    if any(below(module)(name) for module in saved):
        return Part("saved", name)
    if is_embedding(name):
        return Part("saved" if tied else "base", name)
    return Part("bias" if parameter == "bias" else "unknown", name)


def pair_name(name: str) -> str:
    """The name of the layer that a LoRA adapts, without PEFT's wrappers around it.

    nn.MultiheadAttention's output layer lies in one. A `.base_layer` at the end stays: PEFT has one for each further
    parameter of the module that it adapts (`experts.py`).
    """
    module, wrapped = name, ""
    while module.endswith(".base_layer"):
        module, wrapped = module.removesuffix(".base_layer"), wrapped + ".base_layer"
    return module.replace(".base_layer.", ".") + wrapped


def below(module: str) -> Callable[[str], bool]:
    """Predicate: does a parameter belong to the `modules_to_save` entry `module` (a name's end, as PEFT matches it)?"""
    return re.compile(rf".*{re.escape(module)}\..+").fullmatch  # type: ignore[return-value]


def is_embedding(parameter: str) -> bool:
    """Whether a parameter belongs to a module with the name of an input or output embedding."""
    *_, parent, layer, _ = ["", "", *parameter.split(".")]
    return layer in EMBEDDINGS or parent in _INSIDE


def spelled(name: str, adapted: Mapping[str, int]) -> str:
    """A layer's or parameter's name in PEFT, with its wrappers around it: `X.base_layer.weight`.

    Args:
        adapted: {module: how many wrappers it has}.
    """
    parts: list[str] = []
    for end, part in enumerate(name.split(".")):
        around = adapted.get(".".join(name.split(".")[:end]), 0)
        parts += [*["base_layer"] * around, part]
    return ".".join(parts)


def outermost(layers: Iterable[str]) -> list[str]:
    """The adapted layers that lie in no other: with nn.MultiheadAttention PEFT also adapts the output layer in it."""
    adapted = dict.fromkeys(layers, 1)
    return sorted(name for name in adapted if ".base_layer." not in spelled(name, adapted))


def saved_modules(config: Mapping[str, Any]) -> list[str]:
    """The modules that PEFT saves whole under this config: `modules_to_save`, and the task type's own heads."""
    task_type = config.get("task_type")
    heads = TASK_HEADS.get(str(getattr(task_type, "value", task_type)), ())
    return list(dict.fromkeys([*(config.get("modules_to_save") or []), *heads]))


def is_head(parameter: str, config: Mapping[str, Any], layers: Iterable[str]) -> bool:
    """Whether a trained parameter belongs to a task's own head, not to a module of the pre-trained model.

    For classification and question answering a head lies outside of the pre-trained model's own module, which has the
    adapted layers. For other task types its name decides.
    """
    parts = parameter.split(".")
    if _HEADS & set(parts[:-1]):
        return True
    if str(getattr(config.get("task_type"), "value", config.get("task_type"))) not in TASK_HEADS:
        return False
    inside = {layer.split(".")[0] for layer in layers if _INDEX.search(layer)}
    return parts[0] not in inside and not is_embedding(parameter)


def stem(layer: str) -> str:
    """The name before its first number, `model.layers` of `model.layers.0.mlp.up_proj`; else the name itself."""
    found = _INDEX.search(layer)
    return layer[: found.start()] if found else layer


def shape_of_name(layer: str) -> str:
    """The name with `#` for each number: equal for like layers of different depth."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "#", layer)
