"""What goes into a merge, read and checked before any work: adapters and weights."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from osrm_peft.adapter_reader import load_adapter
from osrm_peft.adapters import TARGETS, Factors, FactorsOnDemand, LoraAdapter
from osrm_peft.checks import choice, number, task_names
from osrm_peft.hub import is_local, public_name

Adapters = Mapping[str, str | Path | PeftModel | LoraAdapter]
Weights = Mapping[str, float | Mapping[str, float]] | Sequence[float] | None

HEAD_POLICIES = ("per_task", "error")


@dataclass(frozen=True)
class Inputs:
    """Adapters that can be merged.

    Attributes:
        adapters: {task: adapter}, layers named alike.
        base: the base model's name.
        shapes: {layer: (o, n)} of all layers that any adapter has, sorted by name.
        prefixes: {task: what was put before its layers' names}, of adapters of the bare model.
    """

    adapters: dict[str, LoraAdapter]
    base: str | None
    shapes: dict[str, tuple[int, int]]
    prefixes: dict[str, str]

    def factors(self, layer: str) -> list[Factors | None]:
        """One layer of each adapter, read now; None where it has none."""
        return [adapter.factors.get(layer) for adapter in self.adapters.values()]

    def products(self, layer: str) -> list[tuple[Tensor, Tensor]]:
        """(s·B, A) of each adapter, of rank 0 where it has none of the layer."""
        o, n = self.shapes[layer]
        nothing = torch.zeros(o, 0), torch.zeros(0, n)
        return [nothing if f is None else (f.s * f.B, f.A) for f in self.factors(layer)]

    def rank_sum(self, layer: str) -> int:
        """Σ r of the adapters that have the layer."""
        return sum(adapter.shapes[layer][1] for adapter in self.adapters.values() if layer in adapter.shapes)

    def templates(self) -> dict[str, LoraAdapter]:
        """Each task's head and config, for results; full layer names as targets unless all adapters name the same."""
        targets = [[adapter.config.get(key) for key in TARGETS] for adapter in self.adapters.values()]
        config: dict[str, Any] = {"base_model_name_or_path": self.base}
        if any(target != targets[0] for target in targets):
            config |= dict.fromkeys(TARGETS) | {"target_modules": list(self.shapes)}
        layouts = {name: layout for adapter in self.adapters.values() for name, layout in adapter.layouts.items()}
        return {
            name: replace(adapter, factors={}, config=adapter.config | config, layouts=layouts)
            for name, adapter in self.adapters.items()
        }


def check_names(adapters: Any) -> list[str]:
    """The tasks' names, checked.

    Raises:
        TypeError, ValueError: see `merge_adapters`.
    """
    if not isinstance(adapters, Mapping):
        raise TypeError(f"adapters must map task names to adapters, got a {type(adapters).__name__}")
    if not adapters:
        raise ValueError("no adapters to merge: give at least one")
    return task_names(adapters)


def gather(adapters: Adapters, *, base_model: str | None, heads: str, rank: int | None) -> Inputs:
    """Load the adapters and check that they can be merged.

    Raises:
        TypeError, ValueError: see `merge_adapters`.
    """
    choice("heads policy", heads, HEAD_POLICIES)
    check_names(adapters)
    loaded = {
        name: adapter if isinstance(adapter, LoraAdapter) else load_adapter(adapter, whole=True)
        for name, adapter in adapters.items()
    }
    base = _common_base(loaded, base_model)
    with_heads = [name for name, adapter in loaded.items() if adapter.heads]
    if heads == "error" and with_heads:
        raise ValueError(f"{', '.join(with_heads)} have trained heads and heads='error': use heads='per_task'")
    prefixes = _prefixes(loaded)
    loaded = {task: _renamed(adapter, prefixes[task]) for task, adapter in loaded.items()}
    shapes = _common_shapes(loaded)
    widest = min(min(shape) for shape in shapes.values())
    if rank is not None and rank > widest:
        raise ValueError(f"rank={rank} is above {widest}, the smallest layer's width: lower it, or None for exact")
    return Inputs(loaded, base, dict(sorted(shapes.items())), prefixes)


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


def _common_base(adapters: Mapping[str, LoraAdapter], base_model: str | None) -> str | None:
    if base_model is not None:
        return base_model
    bases = {name: (adapter.base_model, adapter.config.get("revision")) for name, adapter in adapters.items()}
    paths = {base for base, _ in bases.values() if base and is_local(base)}  # PEFT writes them, we the last part
    if len({(public_name(base), revision) for base, revision in bases.values()}) > 1 or len(paths) > 1:
        listed = ", ".join(f"{name}: {base}{f'@{rev}' if rev else ''}" for name, (base, rev) in bases.items())
        raise ValueError(
            f"the adapters have different base models ({listed}): they cannot be merged; "
            "if these are names of one and the same model, say so with base_model=NAME"
        )
    return next(iter(paths), next(iter(bases.values()))[0])


def _prefixes(adapters: dict[str, LoraAdapter]) -> dict[str, str]:
    """What to put before layer names where one adapter was trained on the bare model, another inside a task's model.

    (`encoder.layer.0.…` of BertModel is `bert.encoder.layer.0.…` of BertForSequenceClassification.)
    """
    prefixes = {}
    for task, adapter in adapters.items():
        others = sorted({name for other, one in adapters.items() if other != task for name in one.shapes})
        longer = (other.removesuffix(name) for name in adapter.shapes for other in others if other.endswith(f".{name}"))
        prefixes[task] = "" if set(others) & set(adapter.shapes) else next(longer, "")
    return prefixes


def _renamed(adapter: LoraAdapter, prefix: str) -> LoraAdapter:
    if not prefix:
        return adapter
    shapes = {prefix + name: shape for name, shape in adapter.shapes.items()}
    factors = FactorsOnDemand(shapes, lambda name: adapter.factors[name.removeprefix(prefix)])
    layouts = {prefix + name: layout for name, layout in adapter.layouts.items()}
    return replace(adapter, factors=factors, layouts=layouts)


def _common_shapes(adapters: Mapping[str, LoraAdapter]) -> dict[str, tuple[int, int]]:
    shapes: dict[str, tuple[int, int]] = {}
    layouts: dict[str, Any] = {}
    for task, adapter in adapters.items():
        for name, (o, _, n) in adapter.shapes.items():
            layout = adapter.layouts.get(name)
            if shapes.setdefault(name, (o, n)) != (o, n) or layouts.setdefault(name, layout) != layout:
                raise ValueError(
                    f"layer {name!r} is {o}×{n} in {task!r} and {shapes[name][0]}×{shapes[name][1]} in "
                    "the adapters before it: they are of different base models and cannot be merged"
                )
    return shapes
