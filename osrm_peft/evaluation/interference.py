"""interference: before merging, who acts on whose features, and which adapters share A or B."""

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from osrm_peft.adapters.lora_adapter import LoraAdapter
from osrm_peft.features.task_features import TaskFeatures
from osrm_peft.merging.advice import listed
from osrm_peft.merging.inputs import gather
from osrm_peft.merging.lowrank import cross_energies
from osrm_peft.merging.methods.registry import METHODS
from osrm_peft.merging.methods.regmean import condition
from osrm_peft.merging.overlap import Overlap, mean_overlap, overlaps, sharing
from osrm_peft.merging.statistics import statistics_of
from osrm_peft.models.layers import as_weight, base_layer, base_of, check_unmerged, weight_shape

RIDGES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_ERROR = 1e-2  # the largest share of RegMean's result that may be rounding: condition · 2⁻²⁴, of sums in float32
_WIDEST = 8192  # the width above which RegMean's condition is not looked for: its factorisations take minutes
_AS_RANDOM = 2.0  # up to this multiple of what random spaces share, a pair counts as random
_UNTURNED = 0.9  # `Overlap.tsv` from which TSV-M's change of directions is not worth a word


class Solve(NamedTuple):
    """RegMean's solve of one layer, at weights of 1.

    Attributes:
        condition: that of its matrix as it is solved by default (`regmean.condition`); inf: it is singular.
        ridge: the least of 0, 10⁻⁶, 10⁻⁵, …, 1 with condition · 2⁻²⁴ ≤ 1 %: sums in float32 leave that of the result at
            most to rounding. None: 1 is too little.
        exact_ridge: the same with off_diagonal=1, plain least squares.
    """

    condition: float
    ridge: float | None
    exact_ridge: float | None


@dataclass(frozen=True)
class Interference:
    """Who acts on whose features, and what adapters share.

    Attributes:
        tasks: T names.
        layers: {layer: (T, T) float64}; entry [j, t] is E‖τ_j h_t‖² / E‖W₀ h_t‖², adapter j on the features of task t;
            with relative_to "own": / E‖τ_t h_t‖², so the diagonal is 1. Empty without features.
        relative_to: `"base"` or `"own"`; None without features.
        overlap_a: {layer: Overlap} of the spaces that the rows of A span in each product B·A: the directions of the
            inputs that an adapter reads. (T, T) `shared`, Σ c_i² / k over the k principal cosines c_i of a pair, the
            share of the smaller space in the other; `largest`, c_1; `random`, what random spaces share; and `tsv`, the
            mean inner product of a direction and what TSV-M puts in its place.
        overlap_b: the same of the columns of B, the directions of the outputs that it writes.
        regmean: {layer: Solve} of the features, for widths up to 8,192; empty without Gram matrices. RegMean's own are
            of the fine-tuned models, which these approximate.
    """

    tasks: list[str]
    layers: dict[str, Tensor]
    relative_to: str | None
    overlap_a: dict[str, Overlap] = field(default_factory=dict)
    overlap_b: dict[str, Overlap] = field(default_factory=dict)
    regmean: dict[str, Solve] = field(default_factory=dict)

    def mean(self) -> Tensor:
        """(T, T) float64, the geometric mean over the layers in which an adapter acts: shares span powers of ten.

        A pair of tasks without such a layer is 0.

        Raises:
            ValueError: no features were given.
        """
        if not self.layers:
            raise ValueError("who acts on whose features is not known without them: give features={task: file}")
        stack = torch.stack(list(self.layers.values()))
        acts = (stack > 0) & stack.isfinite()
        logs = torch.where(acts, stack, 1).log().sum(0) / acts.sum(0).clamp_min(1)
        return torch.where(acts.any(0), logs.exp(), 0)

    def to_dict(self) -> dict[str, Any]:
        """The content of a JSON file; None for a share of what a task's own adapter does if it does nothing."""
        layers = {
            name: [[share if math.isfinite(share) else None for share in row] for row in matrix.tolist()]
            for name, matrix in self.layers.items()
        }
        spaces = {"A": self.overlap_a, "B": self.overlap_b}
        return {
            "tasks": self.tasks,
            "relative_to": self.relative_to,
            "off_diagonal": self.off_diagonal() if self.layers and len(self.tasks) > 1 else None,
            "mean": self.mean().tolist() if self.layers else None,
            "layers": layers,
            "overlap": {
                name: {"mean": _json(mean_overlap(found.values())), "layers": {k: _json(v) for k, v in found.items()}}
                for name, found in spaces.items()
                if found
            },
            "regmean": {name: _json(solve) for name, solve in self.regmean.items()},
            "verdict": self.verdict(),
        }

    def verdict(self) -> str:
        """What the numbers say of a merge, in a few sentences; empty where there is nothing to compare."""
        said = [_of_spaces(self.tasks, name, found) for name, found in (("A", self.overlap_a), ("B", self.overlap_b))]
        return " ".join(filter(None, [*said, _of_tsv(self.overlap_a, self.overlap_b), _of_regmean(self.regmean)]))

    def off_diagonal(self) -> float:
        """The geometric mean over all pairs j ≠ t of `mean`: one number for a set of adapters (nan for one task)."""
        others = self.mean()[~torch.eye(len(self.tasks), dtype=torch.bool)]
        return float(others.log().mean().exp())


def interference(
    adapters: Mapping[str, str | Path | nn.Module | LoraAdapter],
    features: Mapping[str, str | Path | TaskFeatures] | None = None,
    *,
    base: nn.Module | None = None,
    base_model: str | None = None,
    progress: bool = False,
) -> Interference:
    """For each layer and pair (j, t): how strongly adapter j acts on task t's features, from factors and moments.

        E‖τ_j h_t‖² = tr(τ_j S_t τ_jᵀ),   relative to E‖W₀ h_t‖² or, without the base model, to E‖τ_t h_t‖²

    And how far the spaces of A and of B of each pair coincide, for which the adapters suffice. No o×n matrix is formed
    for the adapters, no data and no labels are needed; one layer is in memory at a time.

    Args:
        adapters: {task: adapter}, as for `merge_adapters`.
        features: {task: file or TaskFeatures} of the same tasks, of the pre-trained model (`collect_features`). None:
            only what adapters share.
        base: the pre-trained model; None compares with each task's own adapter.
        base_model: the base model of all adapters, where their configs name it differently.

    Raises:
        ValueError: see `merge_adapters`; the base lacks a layer; or a base, or one adapter alone, without features.
    """
    if features is None and base is not None:
        raise ValueError("the base model is compared with on features: give features={task: file}, or no base model")
    inputs = gather(adapters, base_model=base_model, heads="per_task")
    if features is None and len(inputs.adapters) == 1:
        raise ValueError("one adapter shares nothing with another: give a second one, or features={task: file}")
    given = None if features is None else statistics_of("features", TaskFeatures, features, inputs, "interference")
    modules: dict[str, Any] = dict(base_of(base).named_modules()) if base is not None else {}
    check_unmerged({name: modules.get(name) for name in inputs.shapes})
    wrong = [name for name, shape in inputs.shapes.items() if modules and _shape_in(modules, name) != shape]
    if base is not None and wrong:
        raise ValueError(f"the base model has {_shape_in(modules, wrong[0])} at {wrong[0]!r}, the adapters "
                         f"{inputs.shapes[wrong[0]]}: it is another model")  # fmt: skip
    relative_to = None if given is None else "own" if base is None else "base"
    found = Interference(list(inputs.adapters), {}, relative_to)
    for name, shape in tqdm(inputs.shapes.items(), desc="interference", disable=not progress):
        products = inputs.products(name)
        found.overlap_a[name], found.overlap_b[name] = overlaps(products)
        if given is None:
            continue
        moments = given(name)
        energies = torch.stack([cross_energies(products, one).diagonal() for one in moments], 1)  # (j, t)
        if base is None:
            below = energies.diagonal()
        else:
            module = base_layer(modules[name])
            W = as_weight(module, module.weight.detach().cpu()).reshape(shape).double()
            below = torch.stack([((W @ one.second_moment()) * W).sum() for one in moments])
        found.layers[name] = energies / below
        if shape[1] <= _WIDEST and all(one.statistic != "mean" for one in moments):
            found.regmean[name] = _solve(sum((one.second_moment() for one in moments[1:]), moments[0].second_moment()))
    return found


def _shape_in(modules: Mapping[str, Any], name: str) -> tuple[int, int] | None:
    return weight_shape(base_layer(modules[name])) if name in modules else None


def _solve(S: Tensor) -> Solve:
    """RegMean with the Gram matrices whose sum is S (n, n)."""

    def least(off_diagonal: float) -> float | None:
        place = bisect_left(
            RIDGES, True, key=lambda ridge: condition(S, off_diagonal=off_diagonal, ridge=ridge) * 2**-24 <= _ERROR
        )
        return RIDGES[place] if place < len(RIDGES) else None

    options = METHODS["regmean"].options
    return Solve(condition(S, **options), least(options["off_diagonal"]), least(1.0))


def _of_spaces(tasks: Sequence[str], name: str, layers: Mapping[str, Overlap]) -> str | None:
    """Which tasks share A (or B), or how near the nearest pair is."""
    pairs = list(combinations(range(len(tasks)), 2))
    mean = mean_overlap(layers.values()) if layers else None
    known = [pair for pair in pairs if mean is not None and mean.shared[pair].isfinite()]
    if mean is None or not known:
        return None
    shared = max(known, key=lambda pair: float(mean.shared[pair]))
    up_to = f"mean squared cosine {float(mean.shared[shared]):.2g}, random spaces {float(mean.random[shared]):.2g}"
    alike = sharing(tasks, layers.values())
    if alike:
        meant = {
            "A": "sums and averages are safe, for they sum B; but nothing keeps the inputs of these tasks apart",
            "B": "they write the same directions of the outputs",
        }
        return f"{listed(alike)} share {name} ({up_to}): {meant[name]}."
    if float(mean.shared[shared]) <= _AS_RANDOM * float(mean.random[shared]):
        return f"The adapters' {name} are as far apart as random spaces ({up_to})."
    near = " and ".join(repr(tasks[place]) for place in shared)
    return f"No adapters share {name}; {near} come nearest ({up_to})."


def _of_tsv(A: Mapping[str, Overlap], B: Mapping[str, Overlap]) -> str | None:
    """Whether TSV-M leaves directions where they are."""
    kept = {name: mean_overlap(found.values()).tsv for name, found in (("A", A), ("B", B)) if found}
    if not any(value < _UNTURNED for value in kept.values()):
        return None
    cosines = " and ".join(f"{value:.2f} for {name}" for name, value in kept.items())
    return f"TSV-M does not leave the adapters' directions alone (mean product with what it puts there: {cosines})."


def _of_regmean(solves: Mapping[str, Solve]) -> str | None:
    """Which ridge RegMean needs."""
    if not solves:
        return None
    worst = max(one.condition for one in solves.values())
    own, exact = _largest(one.ridge for one in solves.values()), _largest(one.exact_ridge for one in solves.values())
    text = f"RegMean (its condition is up to {worst:.2g} on these features, whatever A is) needs {_needed(own)}"
    return f"{text}." if exact == own else f"{text}; with off_diagonal=1 it needs {_needed(exact)}."


def _largest(ridges: Iterable[float | None]) -> float | None:
    return max(ridges, key=lambda ridge: math.inf if ridge is None else ridge)


def _needed(ridge: float | None) -> str:
    if ridge is None:
        return f"a ridge above {RIDGES[-1]:g}"
    return f"ridge ≥ {ridge:g}" if ridge else "no ridge"


def _json(found: Overlap | Solve) -> dict[str, Any]:
    """Its fields as JSON has them: None for nan and inf."""
    fields = found._asdict() if isinstance(found, Solve) else vars(found)
    return {name: _finite(value.tolist() if isinstance(value, Tensor) else value) for name, value in fields.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return value if value is None or math.isfinite(value) else None
