"""Weights of the tasks, as users give them, for each layer."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from osrm_peft.checks import number

Weights = Mapping[str, float | Mapping[str, float]] | Sequence[float] | None


def weights_by_task(weights: Weights, tasks: list[str]) -> dict[str, Mapping[str, float]]:
    """{task: {layer name pattern: number}}; `"*"` where the weight is one number.

    Raises:
        ValueError: not one for each adapter, or not finite.
    """
    if weights is None:
        weights = [1.0] * len(tasks)
    if isinstance(weights, Mapping):
        if set(weights) != set(tasks):
            raise ValueError(f"weights name {sorted(weights)}, the adapters are {sorted(tasks)}: give one for each")
        weights = [weights[task] for task in tasks]  # type: ignore[misc]  # numbers or mappings: told apart below
    weights = weights.tolist() if hasattr(weights, "tolist") else weights
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        raise ValueError(
            f"weights={weights!r} must be a list in the order of the adapters, or map task names to numbers"
        )
    if len(weights) != len(tasks):
        raise ValueError(f"{len(weights)} weights for {len(tasks)} adapters: give one for each")
    named: dict[str, Mapping[str, float]] = {}
    for task, weight in zip(tasks, weights, strict=True):
        patterns = weight if isinstance(weight, Mapping) else {"*": weight}
        named[task] = {
            pattern: number(f"weight of {task!r}" + ("" if patterns is not weight else f" at {pattern!r}"), value)
            for pattern, value in patterns.items()
        }
    return named


def weights_by_layer(weights: Mapping[str, Mapping[str, float]], layers: Iterable[str]) -> dict[str, Tensor]:
    """{layer: (T,) float64}, of each task's patterns the first that matches.

    Raises:
        ValueError: a layer that no pattern matches.
    """
    return {
        layer: torch.tensor([_weight(task, weight, layer) for task, weight in weights.items()], dtype=torch.float64)
        for layer in layers
    }


def _weight(task: str, patterns: Mapping[str, float], layer: str) -> float:
    for pattern, value in patterns.items():
        if fnmatchcase(layer, pattern):
            return value
    raise ValueError(
        f"no pattern of task {task!r} ({', '.join(patterns)}) matches layer {layer!r}: add '*' as the last"
    )
