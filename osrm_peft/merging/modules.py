"""Modules of the pre-trained model that adapters trained whole (`lm_head`, norms), and copies of its weights."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from itertools import combinations

import torch
from torch import Tensor

from osrm_peft.adapters.keys import is_embedding
from osrm_peft.adapters.lora_adapter import LoraAdapter, shape_in
from osrm_peft.merging.weights import weights_by_layer
from osrm_peft.models.vocabulary import first_difference, tokens_in

logger = logging.getLogger(__name__)

POLICIES = ("average", "per_task", "error")

_WAYS = "modules='per_task' keeps each task's own, modules=TASK takes one task's"
_AVERAGE, _COPY, _OWN = "average", "copy of the base model's", "each task's own"


@dataclass(frozen=True)
class MergedModules:
    """What becomes of trained modules and of copied base weights.

    Attributes:
        shared: {parameter: tensor} of trained modules that the result has for all tasks.
        copies: the same of frozen base weights.
        own: {task: {parameter: tensor}} of modules that each task keeps for itself.
        own_copies: the same of copies.
    """

    shared: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)
    own: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    own_copies: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def check_modules(
    adapters: Mapping[str, LoraAdapter], policy: str | None, weights: Mapping[str, Mapping[str, float]]
) -> dict[str, str]:
    """What becomes of trained modules and copies under this policy; checked before any work.

    Args:
        policy: one of `POLICIES`, a task's name, or None: `"average"` of trained modules, equal copies.
        weights: {task: {layer name pattern: number}}.

    Returns:
        {parameter: what becomes of it}, in words.

    Raises:
        ValueError: an unknown policy, `"error"` and there are some, vocabularies that differ (names the token), shapes
            that differ, a module that only some trained or that others adapted by LoRA, weights that add up to 0 or
            less, or copies of base weights that differ.
    """
    if policy is not None and policy not in (*POLICIES, *adapters):
        raise ValueError(f"unknown modules policy {policy!r}: choose from {', '.join([*POLICIES, *adapters])}")
    trained = sorted({name for adapter in adapters.values() for name in adapter.modules})
    copied = sorted({name for adapter in adapters.values() for name in adapter.copies} - set(trained))
    if policy == "error" and trained:
        owners = [task for task, adapter in adapters.items() if adapter.modules]
        raise ValueError(f"{', '.join(owners)} trained {', '.join(trained[:4])} and modules='error': {_WAYS}")
    if policy in adapters:
        one = adapters[str(policy)]
        fates = dict.fromkeys(trained, f"the base model's, as in {policy}")
        return fates | dict.fromkeys([*one.modules, *one.copies], f"that of {policy}")
    if policy == "per_task":
        equal = [name for name in copied if _difference(name, _holders(adapters, name)) is None]
        return dict.fromkeys([*trained, *copied], _OWN) | dict.fromkeys(equal, _COPY)
    _check_vocabularies(adapters)
    for name in trained:
        _check_trained_by_all(adapters, name)
        _check_shapes(adapters, name)
        _check_tables(name, _holders(adapters, name))
        _shares(name, _holders(adapters, name), weights)
    for name in copied:
        _check_shapes(adapters, name)
        if policy is None:
            _check_equal(name, _holders(adapters, name))
        else:
            _shares(name, _holders(adapters, name), weights)
    return dict.fromkeys(trained, _AVERAGE) | dict.fromkeys(copied, _COPY if policy is None else _AVERAGE)


def merge_modules(
    adapters: Mapping[str, LoraAdapter],
    weights: Mapping[str, Mapping[str, float]],
    policy: str | None,
    fates: Mapping[str, str],
) -> MergedModules:
    """The trained modules and copies of a merge.

    Args:
        weights: {task: {layer name pattern: number}}: an average is Σ w_t M_t / Σ w_t, in float32; of a count (a whole
            number, such as BatchNorm's of its batches) the nearest one.
        fates: what `check_modules` says of them.
    """
    found = MergedModules(own={task: {} for task in adapters}, own_copies={task: {} for task in adapters})
    if policy in adapters:
        found.shared.update(adapters[str(policy)].modules)
        found.copies.update(adapters[str(policy)].copies)
        return found
    trained = {name for adapter in adapters.values() for name in adapter.modules}
    for name, fate in fates.items():
        holders = _holders(adapters, name)
        if fate == _OWN:
            for task in holders:
                place = found.own if name in adapters[task].modules else found.own_copies
                place[task][name] = holders[task][name]
        else:
            value = _finest(name, holders) if fate == _COPY else _average(name, holders, weights)
            (found.shared if name in trained else found.copies)[name] = value
    averaged = sorted(name for name in trained if fates[name] == _AVERAGE)
    if averaged:
        logger.warning("averaged by weights: %s (%s)", ", ".join(averaged), _WAYS)
    return found


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
    dtype = reduce(torch.promote_types, kinds)
    return (total if dtype.is_floating_point else total.round()).to(dtype)


def _finest(name: str, holders: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    """The copy with most digits, of copies that differ in dtype only."""
    return min((holder[name] for holder in holders.values()), key=_rounding)


def _rounding(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0


def _shares(name: str, holders: Iterable[str], weights: Mapping[str, Mapping[str, float]]) -> list[float]:
    """Each task's share in the average of a parameter, Σ = 1: the weights are those of its layer's name."""
    layer = name.rpartition(".")[0]
    found = weights_by_layer({task: weights[task] for task in holders}, [layer])[layer]
    if not float(found.sum()) > 0:
        raise ValueError(f"the weights of {name!r} add up to {float(found.sum()):g}, so it has no average: {_WAYS}")
    return (found / found.sum()).tolist()


def _check_trained_by_all(adapters: Mapping[str, LoraAdapter], name: str) -> None:
    holders, layer = _holders(adapters, name), name.rpartition(".")[0]
    by_lora = [task for task, adapter in adapters.items() if layer in adapter.shapes]
    lacking = [task for task in adapters if task not in holders]
    if by_lora or lacking:
        whole = ", ".join(task for task in holders if name in adapters[task].modules)
        others = (
            f"adapted by LoRA in {', '.join(by_lora)}"
            if by_lora
            else f"not by {', '.join(lacking)}, whose base weights are not in the adapters"
        )
        raise ValueError(f"{name!r} was trained by {whole} and {others}, so it has no average: {_WAYS}")


def _check_tables(name: str, holders: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Refuse whole numbers that differ, unless they are a count."""
    first, *others = (holder[name] for holder in holders.values())
    if not first.is_floating_point() and first.dim() and not all(torch.equal(first, other) for other in others):
        raise ValueError(f"{name!r} holds whole numbers that differ, so it has no average: {_WAYS}")


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
        difference = first_difference(tokens[one], tokens[other])
        if difference is not None:
            token = difference[0]
            places = ", ".join(f"{_row(tokens[task].get(token))} in {task!r}" for task in (one, other))
            raise ValueError(
                f"token {token!r} is {places}: their vocabularies differ, and rows would be mixed; {_WAYS}"
                ", or train them with one tokenizer"
            )


def _row(row: int | None) -> str:
    return "missing" if row is None else f"row {row}"


def _check_shapes(adapters: Mapping[str, LoraAdapter], name: str) -> None:
    shapes = {task: shape_in(holder, name) for task, holder in _holders(adapters, name).items()}
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
    found = _difference(name, holders)
    if found is not None:
        (first, task), same = found
        rows = (~same).nonzero().flatten().tolist()
        span = f"row {rows[0]}" if len(rows) == 1 else f"{len(rows)} rows from {rows[0]} to {rows[-1]}"
        raise ValueError(
            f"{first!r} and {task!r} hold copies of the base's {name!r} that differ in {span} of {len(same)}: "
            "they are of different base models, or its new rows were drawn anew for each (resize it once "
            f"and save that base); to merge them as they are, say modules='average', or {_WAYS}"
        )


def _difference(name: str, holders: Mapping[str, Mapping[str, Tensor]]) -> tuple[tuple[str, str], Tensor] | None:
    """Two tasks whose copies differ by more than the rounding to their dtypes, and which rows are equal; None if none.

    All are compared with the one that has most digits, so that their order does not matter.
    """
    first, *others = sorted(holders, key=lambda task: _rounding(holders[task][name]))
    one = holders[first][name]
    for task in others:
        other = holders[task][name]
        if one.shape != other.shape:
            return (first, task), torch.zeros(len(one), dtype=torch.bool)
        same = (one.to(other.dtype) == other).reshape(len(one), -1).all(1)
        if not bool(same.all()):
            return (first, task), same
    return None
