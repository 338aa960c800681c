"""MergePlan: a merge with every choice made and checked, before any work."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from osrm_peft.adapters.factors import Factors
from osrm_peft.adapters.lora_adapter import LoraAdapter
from osrm_peft.checks import choice, integer, number, shown
from osrm_peft.devices import CPU, chosen_device, described, device_of
from osrm_peft.features.fisher import DiagonalFisher
from osrm_peft.features.task_features import TaskFeatures
from osrm_peft.hub.sources import local_folder, pinned
from osrm_peft.io.manifest import MANIFEST, command, read_manifest, versions
from osrm_peft.merging.engine import Engine
from osrm_peft.merging.inputs import Inputs, check_names, gather
from osrm_peft.merging.lowrank import SERVING
from osrm_peft.merging.methods import METHODS
from osrm_peft.merging.methods.registry import Method, get_method
from osrm_peft.merging.modules import check_modules
from osrm_peft.merging.request import MergeRequest
from osrm_peft.merging.rules import WORDS, LeastSquares
from osrm_peft.merging.spaces import SPACES
from osrm_peft.merging.statistics import statistics_of
from osrm_peft.merging.weights import weights_by_layer, weights_by_task


@dataclass(frozen=True)
class MergePlan:
    """What `merge_adapters` will do.

    Attributes:
        request: what was asked for.
        method: the method.
        options: its options, defaults filled in.
        space: where it runs.
        scale: λ; 1 where features choose it.
        rank: largest rank of the result; None keeps it exact.
        padded: the least rank to write.
        modules: what becomes of trained modules of the pre-trained model; None averages them.
        fates: {parameter: the same in words}, of each trained module and copied base weight.
        task_weights: {task: {name pattern: number}}, for those.
        seed: of methods that draw.
        inputs: the adapters.
        weights: {layer: (T,)} as given; 1 each where features choose them.
        statistics: layer → that layer's statistic of each task, for methods that need one.
        features: layer → that layer's FeatureMoments of each task, where features choose something.
        sources: {"statistics" or "features": {task: file}}, for the manifest.
        device: where layers are merged; the result is on the CPU.
    """

    request: MergeRequest
    method: Method
    options: dict[str, Any]
    space: str
    scale: float
    rank: int | None
    padded: int
    modules: str | None
    fates: dict[str, str]
    task_weights: dict[str, Mapping[str, float]]
    seed: int
    inputs: Inputs
    weights: dict[str, Tensor]
    statistics: Callable[[str], list[Any]] | None
    features: Callable[[str], list[Any]] | None
    sources: dict[str, dict[str, str]]
    device: torch.device = CPU

    @property
    def weights_rule(self) -> LeastSquares | None:
        """The rule that chooses the weights."""
        return self.request.weights if isinstance(self.request.weights, LeastSquares) else None

    @property
    def chooses_scale(self) -> bool:
        """Whether features choose the scale of each layer."""
        return isinstance(self.request.scale, LeastSquares)

    @property
    def cuts_by_features(self) -> bool:
        """Whether features choose what the rank keeps."""
        return self.request.cut is not None and self.rank is not None

    def factors(self, layer: str) -> list[Factors | None]:
        """One layer of each adapter, on the device; None where it has none."""
        return [None if one is None else one.to(self.device) for one in self.inputs.factors(layer)]

    def products(self, layer: str) -> list[tuple[Tensor, Tensor]]:
        """(s·B, A) of each adapter, on the device; of rank 0 where it has none of the layer."""
        return [(B.to(self.device), A.to(self.device)) for B, A in self.inputs.products(layer)]

    def engine(self) -> Engine:
        """The method, ready to run."""
        return Engine(self.method, self.options, list(self.inputs.adapters), self.seed)

    def manifest(self) -> dict[str, Any]:
        """How the merge is made, for its folder."""
        tasks = list(self.inputs.adapters)
        by_layer = {layer: weight.tolist() for layer, weight in self.weights.items()}
        first = next(iter(by_layer.values()))
        label_names = {task: list(one.label_names) for task, one in self.inputs.adapters.items() if one.label_names}
        same = all(weight == first for weight in by_layer.values())
        weights = {
            task: first[t] if same else {layer: weight[t] for layer, weight in by_layer.items()}
            for t, task in enumerate(tasks)
        }
        return {
            "kind": self.method.kind,
            "method": self.method.name,
            "paper": self.method.paper,
            "options": self.options,
            "scale": self.scale,
            "weights": weights if self.weights_rule is None else self.weights_rule.word,
            "space": self.space,
            "rank": "serving" if self.padded > 1 else self.rank,
            **({} if self.request.cut is None else {"cut": self.request.cut.word}),
            "heads": self.request.heads,
            "modules_policy": self.modules,
            "base_model": self.inputs.base,
            "task_type": next(iter(self.inputs.adapters.values())).config.get("task_type"),
            "inputs": {
                name: {"source": adapter.source, "sha256": adapter.sha256, "rank": adapter.rank}
                for name, adapter in self.inputs.adapters.items()
            },
            "device": described(self.device),
            "command": command(),
            "versions": versions(),
            **self.sources,
            **({"modules": self.fates} if self.fates else {}),
            **({"label_names": label_names} if label_names else {}),
            **_of_training(self.inputs.adapters),
            **({"seed": self.seed} if self.method.prepare else {}),
            **({"scale_of_layers": "chosen by features, see report"} if self.chooses_scale else {}),
        }

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the result: the adapters' own, but float32 for EMR of float16, too small for its entries."""
        own = reduce(torch.promote_types, (adapter.dtype for adapter in self.inputs.adapters.values()))
        return torch.float32 if self.method.per_task and own == torch.float16 else own

    def output_rank(self, layer: str) -> int:
        """The largest rank that the layer's result can have."""
        full, summed = min(self.inputs.shapes[layer]), self.inputs.rank_sum(layer)
        if self.space == "weight" or self.method.full_rank(self.options):
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


def plan_merge(request: MergeRequest) -> MergePlan:
    """Check everything about a merge and read what it needs; see `merge_adapters` for errors."""
    method = get_method(request.method)
    options = method.bind(request.options)
    space = method.space(choice("space", request.space, ("auto", *SPACES)))
    serving = request.rank == "serving"
    rank = None if request.rank is None or serving else integer("rank", request.rank, 1)
    seed = integer("seed", request.seed, 0)
    scale = _scale(method, request)
    _check_cut(method, request)
    if method.per_task and (rank is not None or serving or isinstance(request.scale, LeastSquares)):
        raise ValueError(f"{method.name} gives a shared vector and masks, not one LoRA: no rank, no scale to choose")
    if method.needs is None and request.statistics is not None:
        raise ValueError(f"{method.name} takes no statistics: leave them out (for a rule: LeastSquares(features))")
    names = check_names(request.adapters)
    device = chosen_device(request.device, _home(request.adapters))
    weights = weights_by_task(None if isinstance(request.weights, LeastSquares) else request.weights, names)

    inputs = gather(request.adapters, base_model=request.base_model, heads=request.heads)
    modules = "per_task" if request.modules is None and method.per_task else request.modules
    fates = check_modules(inputs.adapters, modules, weights)
    by_layer = weights_by_layer(weights, inputs.shapes)
    for layer, weight in by_layer.items():
        try:
            method.check_weights(weight)
        except ValueError as error:
            raise ValueError(f"layer {layer!r}: {error}") from error
    statistics, features, sources = _read(method, request, inputs)
    statistics, features = (_moved(one, device) for one in (statistics, features))
    plan = MergePlan(
        request, method, options, space, scale, rank, 1, modules, fates, weights, seed, inputs, by_layer, statistics,
        features, sources, device,
    )  # fmt: skip
    if not serving:
        return plan
    exact = max(map(plan.output_rank, inputs.shapes))
    legal = next((one for one in SERVING if one >= exact), SERVING[-1])
    return replace(plan, padded=legal, rank=legal if legal < exact else None)


def _home(adapters: Mapping[str, Any]) -> torch.device:
    """The GPU that all adapters' models are on; the CPU for files, and for models elsewhere."""
    models = [one if isinstance(one, nn.Module) else None for one in adapters.values()]
    places = {CPU if model is None else device_of(next(model.parameters(), torch.empty(0))) for model in models}
    return places.pop() if len(places) == 1 else CPU


def _moved(read: Callable[[str], list[Any]] | None, device: torch.device) -> Callable[[str], list[Any]] | None:
    return None if read is None else lambda layer: [one.to(device) for one in read(layer)]


def _of_training(adapters: Mapping[str, LoraAdapter]) -> dict[str, Any]:
    """What the adapters' manifests say of their training: how long a row may be, and what a task's data was."""
    found = {task: read_manifest(one.folder) for task, one in adapters.items() if one.folder is not None}
    lengths = [about["max_length"] for about in found.values() if isinstance(about.get("max_length"), int)]
    data = {task: about["data"] for task, about in found.items() if about.get("data")}
    return {**({"max_length": max(lengths)} if lengths else {}), **({"data": data} if data else {})}


def _read(method: Method, request: MergeRequest, inputs: Inputs) -> tuple[Any, Any, dict[str, dict[str, str]]]:
    """The statistics that the method needs and the features that a rule needs, by layer; and where they are from."""
    statistics = features = None
    given: dict[str, Mapping[str, Any]] = {}
    if method.needs is not None:
        kind = {"gram": TaskFeatures, "fisher": DiagonalFisher}[method.needs]
        reason = f"method {method.name!r}"
        statistics = statistics_of("statistics", kind, request.statistics, inputs, reason)
        given["statistics"] = request.statistics or {}
    for rule in (request.weights, request.scale, request.cut):
        if isinstance(rule, LeastSquares):
            features = statistics_of("features", TaskFeatures, rule.features, inputs, "least squares")
            given["features"] = rule.features
    sources = {name: {task: _named(one) for task, one in files.items()} for name, files in given.items()}
    return statistics, features, sources


def _named(source: Any) -> str:
    """A statistic's source as the manifest names it: a file on the Hub with its commit."""
    if not isinstance(source, (str, Path)):
        return "in memory"
    if Path(source).exists():
        return str(source)
    return pinned(str(source), local_folder(str(source).partition(":")[0], [MANIFEST]))


def _check_cut(method: Method, request: MergeRequest) -> None:
    """Is the rule that chooses what a rank keeps one that can be followed?"""
    cut = request.cut
    if cut is None:
        return
    if not isinstance(cut, LeastSquares):
        raise ValueError(f"cut={shown(cut)} must be LeastSquares(features): features choose what the rank keeps")
    if request.rank is None:
        raise ValueError("cut chooses what a rank keeps, and without rank nothing is cut: give rank, or leave cut out")
    if method.per_task or method.offsets:
        raise ValueError(f"the rank of {method.name} is of no one product that features can cut: leave cut out")
    if cut.shared:
        raise ValueError("each layer is cut by its own features: give cut=LeastSquares(features), without shared=True")
    for name in ("weights", "scale"):
        rule = getattr(request, name)
        if isinstance(rule, LeastSquares) and rule.features != cut.features:
            raise ValueError(f"{name} and cut have different features: give both rules the same")


def _scale(method: Method, request: MergeRequest) -> float:
    """λ, checked; 1 where a rule chooses it, or has chosen the weights and no number is given."""
    for name in ("weights", "scale", "cut"):
        if isinstance(getattr(request, name), str) and getattr(request, name) in WORDS:
            word = getattr(request, name)
            raise ValueError(f"{name}={word!r} is a word of recipes: in Python give {name}=LeastSquares(features)")
    rules = [isinstance(one, LeastSquares) for one in (request.weights, request.scale)]
    if rules[0] and method.linear != "sum":
        sums = ", ".join(name for name, one in METHODS.items() if one.linear == "sum")
        raise ValueError(
            f"features choose the weights of a sum ({sums}), not of {method.name}: give the rule to scale=, which "
            "chooses how much of its result to take"
        )
    if all(rules):
        raise ValueError(
            "features that choose the weights leave no scale to choose: give scale a number, or leave it out"
        )
    if isinstance(request.scale, LeastSquares) and request.scale.shared:
        raise ValueError("a scale is chosen for each layer: give scale=LeastSquares(features), without shared=True")
    if rules[1] or (rules[0] and request.scale is None):
        return 1.0
    return number("scale", method.scale if request.scale is None else request.scale)
