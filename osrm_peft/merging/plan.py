"""MergePlan: a merge with every choice made and checked, before any work."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osrm_peft.checks import choice, integer, number
from osrm_peft.features.fisher import DiagonalFisher
from osrm_peft.features.task_features import TaskFeatures
from osrm_peft.hub.sources import local_folder, pinned
from osrm_peft.io.manifest import MANIFEST, command, versions
from osrm_peft.merging.inputs import Adapters, Inputs, check_names, gather
from osrm_peft.merging.lowrank import SERVING
from osrm_peft.merging.methods.registry import Method, get_method
from osrm_peft.merging.modules import check_modules
from osrm_peft.merging.spaces import SPACES
from osrm_peft.merging.statistics import Statistics, statistics_of
from osrm_peft.merging.weights import Weights, weights_by_layer, weights_by_task

GUIDED = ("features", "features_global")
_SUMS = ("task_arithmetic", "concat")  # methods whose result is Σ w τ: whose weights features can choose


@dataclass(frozen=True)
class MergePlan:
    """What `merge_adapters` will do.

    Attributes:
        name: the method's.
        method: its description.
        options: its options, defaults filled in.
        space: where it runs.
        scale: λ; 1 where features choose it.
        rank: largest rank of the result; None keeps it exact.
        padded: the least rank to write.
        heads: what becomes of trained heads.
        modules: what becomes of trained modules of the pre-trained model; None averages them.
        fates: {parameter: the same in words}, of each trained module and copied base weight.
        task_weights: {task: {name pattern: number}}, for those.
        seed: of methods that draw.
        inputs: the adapters.
        weights: {layer: (T,)} as given; 1 each where features choose them.
        guided_weights: None, `"features"` (for each layer) or `"features_global"`.
        guided_scale: features choose the scale of each layer.
        statistics: layer → that layer's statistic of each task, for methods that need one.
        features: layer → that layer's FeatureMoments of each task, where features choose something.
        sources: {"statistics" or "features": {task: file}}, for the manifest.
    """

    name: str
    method: Method
    options: dict[str, Any]
    space: str
    scale: float
    rank: int | None
    padded: int
    heads: str
    modules: str | None
    fates: dict[str, str]
    task_weights: dict[str, Mapping[str, float]]
    seed: int
    inputs: Inputs
    weights: dict[str, Tensor]
    guided_weights: str | None
    guided_scale: bool
    statistics: Callable[[str], list[Any]] | None
    features: Callable[[str], list[Any]] | None
    sources: dict[str, dict[str, str]]

    def manifest(self) -> dict[str, Any]:
        """How the merge is made, for its folder."""
        tasks = list(self.inputs.adapters)
        by_layer = {layer: weight.tolist() for layer, weight in self.weights.items()}
        first = next(iter(by_layer.values()))
        same = all(weight == first for weight in by_layer.values())
        weights = {
            task: first[t] if same else {layer: weight[t] for layer, weight in by_layer.items()}
            for t, task in enumerate(tasks)
        }
        return {
            "kind": "emr" if self.method.per_task else "merged",
            "method": self.name,
            "paper": self.method.paper,
            "options": self.options,
            "scale": self.scale,
            "weights": self.guided_weights or weights,
            "space": self.space,
            "rank": "serving" if self.padded > 1 else self.rank,
            "heads": self.heads,
            "modules_policy": self.modules,
            "base_model": self.inputs.base,
            "task_type": next(iter(self.inputs.adapters.values())).config.get("task_type"),
            "inputs": {
                name: {"source": adapter.source, "sha256": adapter.sha256, "rank": adapter.rank}
                for name, adapter in self.inputs.adapters.items()
            },
            "command": command(),
            "versions": versions(),
            **self.sources,
            **({"modules": self.fates} if self.fates else {}),
            **({"seed": self.seed} if self.method.prepare else {}),
            **({"scale_of_layers": "chosen by features, see report"} if self.guided_scale else {}),
        }

    @property
    def dtype(self) -> torch.dtype:
        """Of the result: the adapters' own; float16 holds the factors of a small task vector, not EMR's entries."""
        own = reduce(torch.promote_types, (adapter.dtype for adapter in self.inputs.adapters.values()))
        return torch.float32 if self.method.per_task and own == torch.float16 else own

    def output_rank(self, layer: str) -> int:
        """The largest rank that the layer's result can have."""
        full, summed = min(self.inputs.shapes[layer]), self.inputs.rank_sum(layer)
        if self.space == "weight" or self.options.get("combine") == "ties":
            exact = full
        else:
            exact = summed if self.space == "factors" else min(full, summed)
        return exact if self.rank is None else min(exact, self.rank)

    def output_bytes(self) -> int:
        """Size of the result's weights, heads left out: every layer is padded to the largest rank; EMR stores dense."""
        size, T = self.dtype.itemsize, len(self.inputs.adapters)
        if self.method.per_task:
            return sum(size * o * n + T * -(-o * n // 8) for o, n in self.inputs.shapes.values())
        rank = max(self.padded, *map(self.output_rank, self.inputs.shapes))
        return sum(size * rank * (o + n) for o, n in self.inputs.shapes.values())


def plan_merge(
    adapters: Adapters,
    method: str,
    *,
    weights: Weights | str = None,
    scale: float | str | None = None,
    space: str = "auto",
    rank: int | str | None = None,
    heads: str = "per_task",
    modules: str | None = None,
    base_model: str | None = None,
    statistics: Statistics | None = None,
    features: Statistics | None = None,
    seed: int = 0,
    **options: Any,
) -> MergePlan:
    """Check everything about a merge and read what it needs; see `merge_adapters` for arguments and errors."""
    chosen = get_method(method)
    options = chosen.bind(method, options)
    space = chosen.space(method, choice("space", space, ("auto", *SPACES)))
    serving = rank == "serving"
    rank = None if rank is None or serving else integer("rank", rank, 1)
    seed = integer("seed", seed, 0)
    guided, guided_scale, scale = _guidance(method, chosen, weights, scale)
    if chosen.per_task and (rank is not None or serving or guided_scale):
        raise ValueError(f"{method} gives a shared vector and masks, not one LoRA: it has no rank, no scale to choose")
    if chosen.needs is None and statistics is not None:
        raise ValueError(f"{method} takes no statistics: leave them out (for weights or scale='features': features=…)")
    uses_features = guided is not None or guided_scale
    if not uses_features and features is not None:
        raise ValueError("features are for weights='features' and scale='features': give one of them, or no features")
    # a string that is no choice is refused there, like any other value that is not a list or mapping
    named = weights_by_task(None if guided else weights, check_names(adapters))  # type: ignore[arg-type]

    inputs = gather(adapters, base_model=base_model, heads=heads)
    if modules is None and chosen.per_task:
        modules = "per_task"
    fates = check_modules(inputs.adapters, modules, named)
    by_layer = weights_by_layer(named, inputs.shapes)
    for layer, weight in by_layer.items():
        try:
            chosen.check_weights(weight)
        except ValueError as error:
            raise ValueError(f"layer {layer!r}: {error}") from error
    needs = moments = None
    if chosen.needs is not None:
        kind = {"gram": TaskFeatures, "fisher": DiagonalFisher}[chosen.needs]
        needs = statistics_of("statistics", kind, statistics, inputs, f"method {method!r}")
    if uses_features:
        moments = statistics_of("features", TaskFeatures, features, inputs, "'features'")
    sources = {
        name: {task: _named(one) for task, one in given.items()}
        for name, given in (("statistics", statistics), ("features", features))
        if given is not None
    }
    plan = MergePlan(
        name=method,
        method=chosen,
        options=options,
        space=space,
        scale=scale,
        rank=rank,
        padded=1,
        heads=heads,
        modules=modules,
        fates=fates,
        task_weights=named,
        seed=seed,
        inputs=inputs,
        weights=by_layer,
        guided_weights=guided,
        guided_scale=guided_scale,
        statistics=needs,
        features=moments,
        sources=sources,
    )
    if not serving:
        return plan
    exact = max(map(plan.output_rank, inputs.shapes))
    legal = next((one for one in SERVING if one >= exact), SERVING[-1])
    return replace(plan, padded=legal, rank=legal if legal < exact else None)


def _named(source: Any) -> str:
    """What the manifest tells of statistics: of a file on the Hub with the commit."""
    if not isinstance(source, (str, Path)):
        return "in memory"
    if Path(source).exists():
        return str(source)
    return pinned(str(source), local_folder(str(source).partition(":")[0], [MANIFEST]))


def _guidance(
    name: str, method: Method, weights: Weights | str, scale: float | str | None
) -> tuple[str | None, bool, float]:
    """What features choose (weights: None or the word; scale: whether), and λ."""
    guided = weights if isinstance(weights, str) and weights in GUIDED else None
    guided_scale = isinstance(scale, str) and scale == "features"
    if guided and name not in _SUMS:
        raise ValueError(
            f"weights={guided!r} chooses the weights of a sum ({', '.join(_SUMS)}), not of {name}: "
            "use scale='features', which chooses how much of its result to take"
        )
    if guided and guided_scale:
        raise ValueError(f"weights={guided!r} leaves no scale to choose: give scale a number, or leave it out")
    if guided_scale or (guided and scale is None):
        return guided, guided_scale, 1.0
    return guided, guided_scale, number("scale", method.scale if scale is None else scale)
