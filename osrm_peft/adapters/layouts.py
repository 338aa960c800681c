"""Layer names of one model in several layouts: other versions of transformers, the bare model, a part of a model."""

import logging
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from osrm_peft.adapters.keys import base_name, shape_of_name, stem
from osrm_peft.libraries import is_pretrained_model
from osrm_peft.models.packaged import resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightRenaming

logger = logging.getLogger(__name__)

_AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification", "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering", "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM", "FEATURE_EXTRACTION": "AutoModel",
}  # fmt: skip


def names_in(model: nn.Module, names: Iterable[str], *, parameters: bool = False) -> dict[str, str]:
    """{name: the same layer's name in `model`}, without the names that the model has no layer for.

    transformers' own renamings of checkpoints translate the names of other versions. Depth does not count: `layers.40`
    is a layer of a model of 2 layers.

    Args:
        model: a model of transformers, or any other; it may be on the meta device.
        parameters: the names are parameters', not layers'.
    """
    known = [name for name, _ in model.named_parameters()]
    if not parameters:  # and a stack of experts has layers `….down_proj.0` …
        stacks = [f"{name}.0" for name, one in model.named_parameters() if one.dim() == 3]
        known = [*(name for name, _ in model.named_modules()), *known, *stacks]
    actual = {shape_of_name(one) for name in known for one in (name, base_name(name))}
    lost = [name for name in names if shape_of_name(name) not in actual]
    renamed = _renamed(model, lost, "" if parameters else ".weight") if lost else {}
    translated = {name: renamed.get(name, name) for name in names}
    return {name: new for name, new in translated.items() if shape_of_name(new) in actual}


def _renamed(model: nn.Module, names: list[str], suffix: str) -> dict[str, str]:
    """{name: its name after transformers' renamings}, for a transformers model."""
    if not is_pretrained_model(model):
        return {}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    rules = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    return _apply(rules, names, suffix)


def _apply(rules: list["WeightRenaming"], names: Iterable[str], suffix: str = ".weight") -> dict[str, str]:
    from transformers.core_model_loading import rename_source_key

    return {name: rename_source_key(name + suffix, rules, [])[0].removesuffix(suffix) for name in names}


def fused_in(model: nn.Module, names: Iterable[str]) -> set[str]:
    """The layers that this version of transformers fuses with others (experts): PEFT converts LoRA on them."""
    if not is_pretrained_model(model):
        return set()
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    return {name for name in names if rename_source_key(f"{name}.weight", renamings, converters)[1] is not None}


def model_of(config: Mapping[str, Any], base: str | None) -> "PreTrainedModel | None":
    """The model that an adapter was trained on, on the meta device (no weights); None if its class is unknown.

    Args:
        config: the adapter's config, with the model's class in `auto_mapping` or a `task_type`.
        base: the base model; its config.json is read if it can be reached.
    """
    import transformers

    try:
        settings: Any = None if base is None else transformers.AutoConfig.from_pretrained(resolve_model(base))
    except Exception as error:  # no folder, no network, a config that transformers does not know: the class may do
        logger.debug("no config.json of %s: %s", base, error)
        settings = None
    auto = config.get("auto_mapping") or {}
    kind: Any = getattr(transformers, str(auto.get("base_model_class")), None)
    with torch.device("meta"):
        for build in (
            lambda: kind(settings if isinstance(settings, kind.config_class) else kind.config_class()),
            lambda: getattr(transformers, _AUTO[str(config.get("task_type"))]).from_config(settings),
            lambda: getattr(transformers, settings.architectures[0])(settings),
        ):
            try:
                return build()
            except Exception as error:  # not such a class, or not such a config: the next way may do
                logger.debug("no model on the meta device: %s", error)
    return None


def place_in(whole: nn.Module, part: nn.Module) -> list[str]:
    """The names, each with a dot at its end, under which a model of `part`'s class lies in `whole`; `""` for itself."""
    return [f"{name}." if name else "" for name, module in whole.named_modules() if type(module) is type(part)]


def same_layout(names: Mapping[str, Iterable[str]]) -> bool:
    """Whether adapters name their layers alike, as far as the names show.

    They do not if each of two adapters has layers below a name (`model.layers`) below which the other has none.
    """
    stems = [{stem(name) for name in layers if stem(name) != name} for layers in names.values()]
    return not any(one - other and other - one for one in stems for other in stems)


def by_known_renamings(names: Mapping[str, Iterable[str]]) -> dict[str, dict[str, str]] | None:
    """Renamings {adapter: {layer: new name}} that one of transformers' models has and that give all one layout.

    It serves adapters whose model's class is unknown. Renamings that only cut or add a prefix do not count: they would
    put one tower's layers among another's. The renamings that give most layers to several adapters win. None if no
    model's renamings do, or if several models' differ and do equally well.
    """
    import transformers
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightRenaming
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    found: dict[tuple, tuple[int, dict[str, dict[str, str]]]] = {}
    for kind in [*CONFIG_MAPPING_NAMES, *(one for one in dir(transformers) if one.endswith("Model") or "For" in one)]:
        rules = [
            rule for rule in get_checkpoint_conversion_mapping(kind) or []
            if isinstance(rule, WeightRenaming) and not isinstance(rule, PrefixChange)
        ]  # fmt: skip
        if not rules:
            continue
        rules += [
            rule for rule in get_checkpoint_conversion_mapping("legacy") or [] if isinstance(rule, WeightRenaming)
        ]
        renamed = {task: _apply(rules, layers) for task, layers in names.items()}
        one_to_one = all(len(set(new.values())) == len(new) for new in renamed.values())
        if one_to_one and same_layout({task: new.values() for task, new in renamed.items()}):
            every = [name for new in renamed.values() for name in new.values()]
            found[tuple(every)] = len(every) - len(set(every)), renamed
    best = max((shared for shared, _ in found.values()), default=0)
    chosen = [renamed for shared, renamed in found.values() if shared == best]
    return chosen[0] if len(chosen) == 1 else None


def bare_prefix(part: Iterable[str], others: Iterable[str]) -> str | None:
    """The prefix for the layer names of an adapter of the bare model (`encoder.layer.0.…` of BertModel).

    Args:
        part: the adapter's layers.
        others: the layers of adapters of a task's model (`bert.encoder.layer.0.…`).

    Returns:
        The one prefix that puts the layers among the others', if transformers uses it for a bare model inside a task's.
        Else None: with the towers `text_model.` and `vision_model.`, only the model's class shows which.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    stems = {stem(name) for name in part}
    longer = {stem(other).removesuffix(one) for other in others for one in stems if stem(other).endswith(f".{one}")}
    bare = {"model.", "transformer.", "backbone.", "base_model."}
    known = {f"{kind.replace('-', '_')}." for kind in CONFIG_MAPPING_NAMES} | bare
    return next(iter(longer)) if len(longer) == 1 and longer <= known else None


def looks_alike(one: Iterable[str], other: Iterable[str]) -> str | None:
    """A stem that the other side may have under another name, as a layer's name ends alike; None if no layer's does."""
    ends = {re.sub(r"^.*?(?=#)", "", shape_of_name(name)) for name in other}
    found = (stem(name) for name in one if re.sub(r"^.*?(?=#)", "", shape_of_name(name)) in ends)
    return next(found, None)
