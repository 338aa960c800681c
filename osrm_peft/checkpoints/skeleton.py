"""Skeletons: models without weights, built from config.json, which have transformers' names of the tensors."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook

from osrm_peft.checkpoints.config_checks import shown

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# fields of config.json that do not change the names of tensors
_NAMELESS = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "id2label", "label2id",
             "problem_type", "use_cache", "finetuning_task", "_attn_implementation", "attn_implementation",
             "task_specific_params", "auto_map")  # fmt: skip

_MODULES, _EACH = 20_000, 20  # modules that any model may have, and those for each tensor of its file besides


def architecture(config: Mapping[str, Any]) -> str | None:
    """The class that a config.json names, if transformers has it; else the bare model of its `model_type`."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return None
    for name in config.get("architectures") or []:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return name
    bare: Any = transformers.MODEL_MAPPING.get(CONFIG_MAPPING[kind], None)
    bare = bare[0] if isinstance(bare, tuple) else bare
    return None if bare is None or config.get("architectures") else bare.__name__


def skeleton(path: Path, config: Mapping[str, Any], name: str | None, tensors: int) -> "PreTrainedModel | None":
    """The model `name` on torch's meta device, as this configuration builds it; no code but transformers' own runs.

    Args:
        path: the config.json's, for errors.
        tensors: the number of tensors in the weight files, which bounds the model's size.

    Returns:
        None if transformers has no such class, or lacks a package for it: names then stay as they are.

    Raises:
        ValueError: transformers cannot build the model; names the file.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if name is None or config.get("model_type") not in CONFIG_MAPPING:
        return None
    fields = {key: value for key, value in config.items() if key not in _NAMELESS}
    try:
        return _built(name, json.dumps(fields, sort_keys=True), _MODULES + _EACH * tensors)
    except ImportError:
        return None
    except Exception as error:  # any kind, from transformers' checks and classes
        reason = shown(" ".join(str(error).split()))[:200] or type(error).__name__
        raise ValueError(
            f"{path}: transformers cannot build {name} from it ({reason}): mend the field, or update transformers"
        ) from error


def built_config(fields: Mapping[str, Any]) -> "PreTrainedConfig":
    """The configuration of a config.json; also infinite numbers, which transformers writes as objects."""
    from transformers import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[fields["model_type"]].from_dict(PreTrainedConfig._decode_special_floats(dict(fields)))


class _Bound:
    """Stops the building of a huge model: any class may read the number of its layers from any field of a file."""

    def __init__(self, most: int) -> None:
        self.most, self.left = most, most

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"more than {self.most} modules, too many for the weights")


@lru_cache(maxsize=16)
def _built(name: str, fields: str, most: int) -> "PreTrainedModel | None":
    import transformers
    from transformers import initialization
    from transformers.utils import logging

    cls, content = getattr(transformers, name), json.loads(fields)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # warnings about a configuration come when the user loads it
    try:
        config = built_config(content)
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
