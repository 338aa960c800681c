"""Skeletons: a model without weights, built from its config.json: it knows transformers' names of the tensors."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel, initialization
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from osrm_peft.checkpoints.config_checks import shown

# of a config.json: what has no say in the names of tensors
_NAMELESS = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "id2label", "label2id",
             "problem_type", "use_cache", "finetuning_task", "_attn_implementation", "attn_implementation",
             "task_specific_params", "auto_map")  # fmt: skip

_MODULES, _EACH = 20_000, 20  # modules that any model may have, and for each tensor of its file


def architecture(config: Mapping[str, Any]) -> str | None:
    """The class that a config.json names, if transformers has it; else the bare model of its `model_type`."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return None
    for name in config.get("architectures") or []:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return name
    bare: Any = MODEL_MAPPING.get(CONFIG_MAPPING[kind], None)
    bare = bare[0] if isinstance(bare, tuple) else bare
    return None if bare is None or config.get("architectures") else bare.__name__


def skeleton(path: Path, config: Mapping[str, Any], name: str | None, tensors: int) -> PreTrainedModel | None:
    """The model `name` on torch's meta device, as this configuration builds it; no code but transformers' own runs.

    Args:
        path: of the config.json, for errors.
        tensors: how many the weights are, which bounds the model.

    Returns:
        None where transformers has no such class, or lacks a package for it: names are then taken as they are.

    Raises:
        ValueError: transformers cannot build the model; names the file.
    """
    if name is None or config.get("model_type") not in CONFIG_MAPPING:
        return None
    told = {key: value for key, value in config.items() if key not in _NAMELESS}
    try:
        return _built(name, json.dumps(told, sort_keys=True), _MODULES + _EACH * tensors)
    except ImportError:
        return None
    except Exception as error:  # of transformers' checks and classes: any kind
        reason = shown(" ".join(str(error).split()))[:200] or type(error).__name__
        raise ValueError(
            f"{path}: transformers cannot build {name} from it ({reason}): mend the field, or update transformers"
        ) from error


def built_config(told: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration that a config.json tells of, infinite numbers too, which transformers writes as objects."""
    return CONFIG_MAPPING[told["model_type"]].from_dict(PreTrainedConfig._decode_special_floats(dict(told)))


class _Bound:
    """Stops the building of a model that has no end: counts come from a file, under names that classes choose."""

    def __init__(self, most: int) -> None:
        self.most, self.left = most, most

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"more than {self.most} modules, too many for the weights")


@lru_cache(maxsize=16)
def _built(name: str, told: str, most: int) -> PreTrainedModel | None:
    cls, given = getattr(transformers, name), json.loads(told)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what is said of a configuration is said when it is loaded
    try:
        config = built_config(given)
        if not isinstance(config, cls.config_class):
            return None
        with ExitStack() as stack:
            stack.callback(register_module_module_registration_hook(_Bound(most)).remove)
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(initialization.no_init_weights())
            stack.enter_context(torch.device("meta"))
            stack.enter_context(initialization.meta_device_safe_creation_ops())
            return cls._from_config(config, attn_implementation="eager")
    finally:
        logging.set_verbosity(verbosity)
