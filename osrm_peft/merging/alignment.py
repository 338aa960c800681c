"""One name for each layer: adapters of one model in several layouts, or of its bare model, brought into one."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from osrm_peft.adapters.layouts import (
    bare_prefix,
    by_known_renamings,
    looks_alike,
    model_of,
    names_in,
    place_in,
    same_layout,
)
from osrm_peft.adapters.lora_adapter import LoraAdapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def align(adapters: dict[str, LoraAdapter], base: str | None) -> tuple[dict[str, LoraAdapter], dict[str, str]]:
    """The adapters with layers named alike, and {task: what was put before its layers' names}.

    Layouts of other versions of transformers are brought into that of the version installed, by transformers' own
    renamings; an adapter of the bare model (`encoder.layer.0.…`) gets the names of the task's model
    (`bert.encoder.layer.0.…`). The models' classes say which, where the adapters' configs or the base's config.json
    tell them; where not, only what is unambiguous is done.

    Raises:
        ValueError: two adapters may name one layer differently, or one is of a part of the other's model, and nothing
            tells which.
    """
    prefixes = dict.fromkeys(adapters, "")
    if same_layout(_names(adapters)):
        return adapters, prefixes
    placed = {task for task, adapter in adapters.items() if adapter.placed}
    models = {task: model_of(adapter.config, base) for task, adapter in adapters.items()}
    for task, model in models.items():
        layers = list(adapters[task].shapes)
        found = {} if model is None else names_in(model, layers)
        if model is None or len(found) < len(layers):
            models[task] = None  # not the class that the adapter was trained on
        elif any(new != name for name, new in found.items()):
            adapters = adapters | {task: adapters[task].renamed(_looked_up(found))}
    if not same_layout(_names(adapters)):
        adapters, prefixes = _with_prefixes(adapters, models)
    if not same_layout(_names(adapters)) and any(model is None for model in models.values()):
        renamed = by_known_renamings(_names(adapters))
        if renamed is not None:
            adapters = {task: adapter.renamed(_looked_up(renamed[task])) for task, adapter in adapters.items()}
    if not same_layout(_names(adapters)):
        _check_apart(adapters, models, placed)
    return adapters, prefixes


def _names(adapters: Mapping[str, LoraAdapter]) -> dict[str, list[str]]:
    return {task: list(adapter.shapes) for task, adapter in adapters.items()}


def _with_prefixes(
    adapters: dict[str, LoraAdapter], models: dict[str, "PreTrainedModel | None"]
) -> tuple[dict[str, LoraAdapter], dict[str, str]]:
    """Adapters of a bare model or of a tower put in their place in the others' model."""
    prefixes = dict.fromkeys(adapters, "")
    for task, adapter in list(adapters.items()):
        others = {other: list(one.shapes) for other, one in adapters.items() if other != task}
        part, known = models[task], [model for other in others if (model := models[other]) is not None]
        if part is not None and known:
            places = {place for whole in known for place in place_in(whole, part) if place}
            prefix = next(iter(places)) if len(places) == 1 else None
            if prefix:
                models[task] = known[0]
        else:
            prefix = bare_prefix(adapter.shapes, [name for names in others.values() for name in names])
        if prefix:
            prefixes[task] = prefix
            adapters = adapters | {task: adapter.renamed(partial(_put_before, prefix))}
    return adapters, prefixes


def _looked_up(found: Mapping[str, str]) -> Callable[[str], str]:
    return lambda name: found.get(name, name)


def _put_before(prefix: str, name: str) -> str:
    return prefix + name


def _check_apart(
    adapters: Mapping[str, LoraAdapter], models: Mapping[str, "PreTrainedModel | None"], placed: set[str]
) -> None:
    """Refuse adapters that may name one layer differently, unless their models tell that the layers are apart.

    Args:
        placed: tasks whose layers the user has named.
    """
    classes = {type(model) for model in models.values()}
    if None not in models.values() and len(classes) == 1:
        return  # all names are of one class' layers: its towers
    for task, adapter in adapters.items():
        for other, one in adapters.items():
            if task == other or {task, other} & placed:
                continue
            alike = looks_alike(adapter.shapes, set(one.shapes) - set(adapter.shapes))
            if alike and alike not in {name[: len(alike)] for name in one.shapes}:
                raise ValueError(
                    f"{task!r} names its layers {next(iter(adapter.shapes))!r}, {other!r} {next(iter(one.shapes))!r}, "
                    "and nothing tells whether these are the same layers (two versions of transformers, or a part of "
                    "the model): give base_model=FOLDER (--base-model FOLDER) of the base model's config.json, or name "
                    "them alike with load_adapter(…).renamed(lambda name: …)"
                )
