"""Modules of the pre-trained model that adapters trained whole (`lm_head`, norms), and copies of its weights."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from itertools import combinations

import torch
from torch import Tensor

from osrm_peft.adapter_keys import is_embedding
from osrm_peft.adapters import LoraAdapter, shape_in
from osrm_peft.merging.weights import weights_by_layer
from osrm_peft.vocabulary import first_difference, tokens_in

logger = logging.getLogger(__name__)

POLICIES = ("average", "per_task", "error")

_WAYS = "modules='per_task' keeps each task's own, modules=TASK takes one task's"


@dataclass(frozen=True)
class MergedModules:
    """What becomes of trained modules and of copied base weights.

    Attributes:
        shared: {parameter: tensor} of trained modules that the result has for all tasks.
        copies: the same of frozen base weights.
        own: {task: {parameter: tensor}} of modules that each task keeps for itself.
        own_copies: the same of copies.
        manifest: {parameter: what was done with it}.
    """

    shared: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)
    own: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    own_copies: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    manifest: dict[str, str] = field(default_factory=dict)


def check_modules(
    adapters: Mapping[str, LoraAdapter], policy: str | None, weights: Mapping[str, Mapping[str, float]]
) -> None:
    """Check that trained modules and copies can be merged under this policy, before any work.

    Args:
        policy: one of `POLICIES`, a task's name, or None: `"average"` of trained modules, equal copies.
        weights: {task: {name pattern: number}}.

    Raises:
        ValueError: an unknown policy, `"error"` and there are some, vocabularies that differ (names the token), shapes
            that differ, a module that only some trained, weights that add up to 0 or less, or copies of base weights
            that differ.
    """
    if policy is not None and policy not in (*POLICIES, *adapters):
        raise ValueError(f"unknown modules policy {policy!r}: choose from {', '.join([*POLICIES, *adapters])}")
    trained = sorted({name for adapter in adapters.values() for name in adapter.modules})
    if policy == "error" and trained:
        owners = [task for task, adapter in adapters.items() if adapter.modules]
        raise ValueError(f"{', '.join(owners)} trained {', '.join(trained[:4])} and modules='error': {_WAYS}")
    if policy == "per_task" or policy in adapters:
        return
    _check_vocabularies(adapters)
    for name in trained:
        holders = _holders(adapters, name)
        lacking = [task for task in adapters if task not in holders]
        if lacking:
            raise ValueError(
                f"{name!r} was trained by {', '.join(holders)} and not by {', '.join(lacking)}, whose base weights are "
                f"not in the adapters, so it has no average: {_WAYS}"
            )
        _check_shapes(adapters, name, holders)
        _shares(name, holders, weights)
    for name in _copied(adapters, trained):
        holders = _holders(adapters, name)
        _check_shapes(adapters, name, holders)
        if policy is None:
            _check_equal(name, holders)
        else:
            _shares(name, holders, weights)


def merge_modules(
    adapters: Mapping[str, LoraAdapter], weights: Mapping[str, Mapping[str, float]], policy: str | None
) -> MergedModules:
    """The trained modules and copies of a merge, after `check_modules`.

    Args:
        weights: {task: {name pattern: number}}: an average is Σ w_t M_t / Σ w_t, in float32.
    """
    found = MergedModules(own={task: {} for task in adapters}, own_copies={task: {} for task in adapters})
    if policy in adapters:
        one = adapters[str(policy)]
        found.shared.update(one.modules)
        found.copies.update(one.copies)
        found.manifest.update(dict.fromkeys([*one.modules, *one.copies], f"that of {policy}"))
        return found
    if policy == "per_task":
        for task, adapter in adapters.items():
            found.own[task].update(adapter.modules)
            found.own_copies[task].update(adapter.copies)
            found.manifest.update(dict.fromkeys([*adapter.copies, *adapter.modules], "each task's own"))
        return found
    trained = sorted({name for adapter in adapters.values() for name in adapter.modules})
    for name in trained:
        found.shared[name] = _average(name, _holders(adapters, name), weights)
        found.manifest[name] = "average"
    if trained:
        logger.warning("averaged by weights: %s (%s)", ", ".join(trained), _WAYS)
    for name in _copied(adapters, trained):
        holders = _holders(adapters, name)
        equal = policy is None  # checked
        found.copies[name] = next(iter(holders.values()))[name] if equal else _average(name, holders, weights)
        found.manifest[name] = "copy of the base model's" if equal else "average"
    return found


def _copied(adapters: Mapping[str, LoraAdapter], trained: Iterable[str]) -> list[str]:
    return sorted({name for adapter in adapters.values() for name in adapter.copies} - set(trained))


def _holders(adapters: Mapping[str, LoraAdapter], name: str) -> dict[str, Mapping[str, Tensor]]:
    """{task: its modules, or its copies of base weights, with the parameter of this name}, nothing read yet."""
    parts = {task: (adapter.modules, adapter.copies) for task, adapter in adapters.items()}
    return {task: part for task, both in parts.items() for part in both[::-1] if name in part}


def _average(
    name: str, holders: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, Mapping[str, float]]
) -> Tensor:
    total: Tensor | None = None
    kinds = set()
    for share, holder in zip(_shares(name, holders, weights), holders.values(), strict=True):
        value = holder[name]
        kinds.add(value.dtype)
        total = share * value.float() if total is None else total.add_(value.float(), alpha=share)
    assert total is not None
    return total.to(reduce(torch.promote_types, kinds))


def _shares(name: str, holders: Iterable[str], weights: Mapping[str, Mapping[str, float]]) -> list[float]:
    """Each task's share in the average, Σ = 1."""
    found = weights_by_layer({task: weights[task] for task in holders}, [name])[name]
    if not float(found.sum()) > 0:
        raise ValueError(f"the weights of {name!r} add up to {float(found.sum()):g}, so it has no average: {_WAYS}")
    return (found / found.sum()).tolist()


def _check_vocabularies(adapters: Mapping[str, LoraAdapter]) -> None:
    """Refuse tokenizers that give one row to two tokens, where rows of a vocabulary are merged."""

    def rows(adapter: LoraAdapter) -> bool:
        embeddings = (is_embedding(name) for name in (*adapter.modules, *adapter.copies))
        return (
            any(embeddings)
            or () in adapter.layouts.values()
            or any(is_embedding(f"{n}.weight") for n in adapter.shapes)
        )

    if not any(map(rows, adapters.values())):
        return
    tokens = {task: tokens_in(adapter.folder) for task, adapter in adapters.items()}
    for one, other in combinations([task for task, found in tokens.items() if found], 2):
        difference = first_difference(tokens[one], tokens[other]) or first_difference(tokens[other], tokens[one])
        if difference is not None:
            token = difference[0]
            places = ", ".join(f"{_row(tokens[task].get(token))} in {task!r}" for task in (one, other))
            raise ValueError(
                f"token {token!r} is {places}: their vocabularies differ, and rows would be mixed; {_WAYS}"
                ", or train them with one tokenizer"
            )


def _row(row: int | None) -> str:
    return "missing" if row is None else f"row {row}"


def _check_shapes(adapters: Mapping[str, LoraAdapter], name: str, holders: Mapping[str, Mapping[str, Tensor]]) -> None:
    shapes = {task: shape_in(holder, name) for task, holder in holders.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{'×'.join(map(str, shape))} in {task!r}" for task, shape in shapes.items())
        why = ": vocabularies differ" if is_embedding(name) else ""
        tokens = {task: tokens_in(adapters[task].folder) for task in shapes}
        lone = [
            f" (token {token!r} is only in {task!r})"
            for task in tokens for token in sorted(tokens[task], key=tokens[task].__getitem__)
            if any(found and token not in found for found in tokens.values())
        ]  # fmt: skip
        raise ValueError(f"{name!r} is {listed}{why}{lone[0] if lone else ''}; {_WAYS}")


def _check_equal(name: str, holders: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Refuse copies of base weights that differ: adapters of different bases, or of one resized anew each time."""
    first, *others = holders
    one = holders[first][name]
    for task in others:
        other = holders[task][name]
        coarse = min(one.dtype, other.dtype, key=lambda dtype: -torch.finfo(dtype).eps)
        equal = one.to(coarse) == other.to(coarse)
        same = equal.flatten(1).all(1) if equal.dim() > 1 else equal
        if not bool(same.all()):
            rows = (~same).nonzero().flatten().tolist()
            span = f"row {rows[0]}" if len(rows) == 1 else f"{len(rows)} rows from {rows[0]} to {rows[-1]}"
            raise ValueError(
                f"{first!r} and {task!r} hold copies of the base's {name!r} that differ in {span} of {len(same)}: "
                "they are of different base models, or its new rows were drawn anew for each (resize it once "
                f"and save that base); to merge them as they are, say modules='average', or {_WAYS}"
            )
