"""The fields of adapter_config.json: PEFT's defaults for missing fields; what is not plain LoRA is refused by name."""

import copy
import dataclasses
import logging
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import regex

from osrm_peft.checks import integer, number

logger = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
BAKE = "bake it into full weights (osrm-peft bake) and merge the checkpoints"
BAKE_BY_PEFT = "bake it into full weights with PEFT's merge_and_unload and merge the checkpoints"

# LoraConfig fields under which an adapter is not just s·B·A: {field: what to do}
NOT_PLAIN = {
    "use_dora": f"DoRA rescales whole weight columns: {BAKE}",
    "lora_bias": f"lora_B has a bias: {BAKE}",
    "trainable_token_indices": f"trained token embeddings: {BAKE}",
    "layer_replication": "layers are replicated: merge adapters trained without layer_replication",
    "alora_invocation_tokens": "activated LoRA acts on some tokens only: it has no single task vector",
    "use_qalora": f"QALoRA pools its inputs: {BAKE}",
    "use_bdlora": f"block-diagonal LoRA: {BAKE}",
    "arrow_config": "Arrow routes between adapters: merge the single adapters",
    "kasa_config": f"KaSA changed the base weights: {BAKE_BY_PEFT}",
    "monteclora_config": f"MonteCLoRA draws its weights: {BAKE_BY_PEFT}",
}
_INITIAL = (
    "save it as a plain adapter with PEFT's save_pretrained(…, path_initial_model_for_weight_conversion=…), or "
    + BAKE_BY_PEFT
)
# initialisations that changed the base model's weights: {beginning of the name: what to do}
BASE_CHANGING_INITS = {
    "pissa": _INITIAL, "olora": _INITIAL, "corda": _INITIAL, "lora_ga": _INITIAL,
    "loftq": f"load it on its own quantised base and {BAKE_BY_PEFT}",
}  # fmt: skip

_NUMBER, _TEXT, _FLAG, _MAPPING, _NAMES, _LIST = (
    "a finite number",
    "text",
    "true or false",
    "a mapping",
    "text or a list of it",
    "a list of text",
)
_KINDS = {
    "lora_alpha": _NUMBER, "use_rslora": _FLAG, "fan_in_fan_out": _FLAG, "use_dora": _FLAG, "lora_bias": _FLAG,
    "ensure_weight_tying": _FLAG, "inference_mode": _FLAG, "bias": _TEXT, "base_model_name_or_path": _TEXT,
    "revision": _TEXT, "task_type": _TEXT, "peft_type": _TEXT, "target_modules": _NAMES, "exclude_modules": _NAMES,
    "modules_to_save": _NAMES, "target_parameters": _LIST, "rank_pattern": _MAPPING,
    "alpha_pattern": _MAPPING, "auto_mapping": _MAPPING,
}  # fmt: skip
_MATCH_SECONDS = 0.5  # the time that a pattern of alpha_pattern or rank_pattern may take on one name

# the fields by which PEFT finds what it adapts
TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")


# The fields of a LoraConfig and their defaults, and the task types that it takes, of this version of PEFT: importing
# PEFT takes seconds. Another version is asked itself.
KNOWN_PEFT = "0.21.2"
_DEFAULTS: dict[str, Any] = {
    "task_type": None, "peft_type": None, "auto_mapping": None, "peft_version": None, "base_model_name_or_path": None,
    "revision": None, "inference_mode": False, "r": 8, "target_modules": None, "exclude_modules": None, "lora_alpha": 8,
    "lora_dropout": 0.0, "fan_in_fan_out": False, "bias": "none", "use_rslora": False, "modules_to_save": None,
    "init_lora_weights": True, "layers_to_transform": None, "layers_pattern": None, "rank_pattern": {},
    "alpha_pattern": {}, "megatron_config": None, "megatron_core": "megatron.core", "trainable_token_indices": None,
    "loftq_config": {}, "eva_config": None, "corda_config": None, "lora_ga_config": None, "use_dora": False,
    "velora_config": None, "alora_invocation_tokens": None, "use_qalora": False, "qalora_group_size": 16,
    "monteclora_config": None, "layer_replication": None, "runtime_config": {"ephemeral_gpu_offload": False},
    "lora_bias": False, "target_parameters": None, "use_bdlora": None, "arrow_config": None, "kasa_config": None,
    "ensure_weight_tying": False,
}  # fmt: skip
_TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


def defaults() -> dict[str, Any]:
    """{field: PEFT's default} of a LoraConfig."""
    if version("peft") == KNOWN_PEFT:
        return copy.deepcopy(_DEFAULTS)
    return defaults_of_peft()


def defaults_of_peft() -> dict[str, Any]:
    """The same, asked of PEFT itself."""
    from peft import LoraConfig

    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(LoraConfig)
    }


def content_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `adapter_config.json` for these fields of a LoraConfig: that of PEFT, sets as sorted lists."""
    by_layers = any(fields.get(name) is not None for name in ("layers_to_transform", "layers_pattern"))
    if version("peft") != KNOWN_PEFT or by_layers or fields.get("task_type") not in (None, *_TASK_TYPES):
        return content_of_peft(fields)  # it checks these
    content = defaults() | copy.deepcopy(dict(fields)) | {"peft_type": "LORA", "peft_version": KNOWN_PEFT}
    del content["runtime_config"]
    for name in ("target_modules", "exclude_modules"):
        content[name] = sorted(set(content[name])) if isinstance(content[name], list) else content[name]
    return content


def content_of_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same, asked of PEFT itself."""
    from peft import LoraConfig

    return {name: _plain(value) for name, value in LoraConfig(**fields).to_dict().items()}


def is_target(config: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT adapts the module `name` under this config, which names its targets. PEFT itself is asked.

    It need not be asked about a name that no entry of a list is, or ends: exclusions only take further ones away.
    """
    targets: Any = config.get("target_modules")
    plain = isinstance(targets, list) and all(config.get(field) is None for field in TARGETS[2:])
    if plain and not any(name == target or name.endswith(f".{target}") for target in targets):
        return False
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    fields: dict[str, Any] = {field: config.get(field) for field in TARGETS}
    return bool(check_target_module_exists(LoraConfig(**fields), name))


def checked_config(config: Any, source: str) -> dict[str, Any]:
    """The fields of a LoRA adapter's config, with PEFT's defaults for missing fields.

    Raises:
        ValueError: not a LoRA adapter, a field of the wrong type, or a field that makes it other than plain LoRA; names
            the field and the way out.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"{source} is damaged: its {CONFIG} is not a JSON object")
    config = {key: _plain(value) for key, value in config.items()}
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{source} is a {config.get('peft_type')} adapter: only LoRA adapters can be merged")
    known = defaults()
    unknown = sorted(set(config) - set(known))
    if unknown:
        logger.warning(
            "%s has fields that this version of PEFT does not know (%s): they are ignored, as PEFT ignores them; if "
            "they change what the adapter computes, upgrade PEFT", source, ", ".join(unknown),
        )  # fmt: skip
    check_fields(config, source)
    for option, remedy in NOT_PLAIN.items():
        if config.get(option):
            raise ValueError(f"{source} has {option}={config[option]!r}; {remedy}")
    init = config.get("init_lora_weights")
    for beginning, remedy in BASE_CHANGING_INITS.items():
        if isinstance(init, str) and init.lower().startswith(beginning):
            raise ValueError(
                f"{source} has init_lora_weights={init!r}, which changed the base model's weights: {remedy}"
            )
    return known | config


def check_fields(config: Mapping[str, Any], source: str) -> None:
    """Raise ValueError for a field of the wrong type; names it."""
    for field, kind in _KINDS.items():
        value = config.get(field)
        if value is not None and not _is_a(kind, value):
            raise ValueError(f"{source} is damaged: {field}={value!r} in its {CONFIG} must be {kind}")
        if value is None and field in config and field == "lora_alpha":
            raise ValueError(f"{source} is damaged: lora_alpha=None in its {CONFIG} must be {kind}")


def scale_of(config: Mapping[str, Any], layer: str, rank: int, source: str) -> float:
    """s of a layer: alpha/r, or alpha/√r for rsLoRA, with the layer's own rank and alpha (`alpha_pattern`).

    Raises:
        ValueError: a pattern is no regular expression or takes too long, or the alpha is no finite number.
    """
    alpha = _by_pattern(config, "alpha_pattern", layer, config["lora_alpha"], source)
    try:
        return number("lora_alpha", alpha) / (rank**0.5 if config.get("use_rslora") else rank)
    except ValueError as error:
        raise ValueError(f"{source} is damaged: {error} (layer {layer!r})") from error


def rank_of(config: Mapping[str, Any], parameter: str, source: str) -> int:
    """r of LoRA on a bare parameter, whose factors do not show it: its own (`rank_pattern`), or the adapter's.

    Raises:
        ValueError: a pattern is no regular expression or takes too long, or the rank is no whole number from 1.
    """
    rank = _by_pattern(config, "rank_pattern", parameter, config["r"], source)
    try:
        return integer("r", rank, 1)
    except ValueError as error:
        raise ValueError(f"{source} is damaged: {error} (parameter {parameter!r})") from error


def _by_pattern(config: Mapping[str, Any], field: str, layer: str, default: Any, source: str) -> Any:
    """The value of the first pattern of a field that matches, as PEFT matches them; `regex` can be interrupted."""
    for pattern, value in (config.get(field) or {}).items():
        try:
            found = regex.match(rf"(.*\.)?({pattern})$", layer, timeout=_MATCH_SECONDS)
        except (regex.error, TimeoutError, RecursionError) as error:
            reason = "takes too long" if isinstance(error, TimeoutError) else f"is no regular expression ({error})"
            raise ValueError(
                f"{source}: the pattern {pattern!r} of {field} in its {CONFIG} {reason} on {layer!r}: "
                "name the layers literally"
            ) from error
        if found:
            return value
    return default


def _plain(value: Any) -> Any:
    """A field of a live config as JSON has it: sets as lists, enumerations as text."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return getattr(value, "value", value)


def _is_a(kind: str, value: Any) -> bool:
    if kind == _FLAG:
        return isinstance(value, bool)
    if kind == _TEXT:
        return isinstance(value, str)
    if kind == _MAPPING:
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if kind in (_NAMES, _LIST):
        listed = isinstance(value, list) and all(isinstance(one, str) for one in value)
        return listed or (kind == _NAMES and isinstance(value, str))
    try:
        number("", value)
    except (ValueError, OverflowError):
        return False
    return True
