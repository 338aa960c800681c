"""Why a choice of A merges better: what the adapters of each init share, and what merging does to it."""

import statistics
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from kept.cells import Run, Study
from kept.settings import SEEDS, Cell
from osrm_peft import TaskFeatures, load_adapter, merge_adapters
from osrm_peft.adapters.factors import Factors
from osrm_peft.evaluation.tables import markdown_table
from osrm_peft.features.moments import FeatureMoments
from osrm_peft.io.places import new_file
from osrm_peft.merging.lowrank import balanced, cross_energies
from osrm_peft.merging.spaces import enter

MEASURES = {
    "A shared": "mean squared principal cosine of two tasks' rows of A",
    "B shared": "the same of the columns of B",
    "interference": "E‖τ_j h_t‖² / E‖τ_t h_t‖², the others' effect on a task's features against its own",
    "TSV-M's turn of V": "‖V⊥ − V‖² / ‖V‖² of the right singular vectors, stacked over tasks",
    "TSV-M's turn of U": "the same of the left ones",
    "error of TSV-M": "E‖(τ_merged − τ_t) h_t‖² / E‖τ_t h_t‖²",
    "error of TA": "the same of task arithmetic at λ = 0.3",
}


def explain(study: Study, inits: dict[str, Cell]) -> str:
    """The table of the measures for each init, means over layers and pairs ± std over seeds; and its figure."""
    found = {}
    for label, cell in inits.items():
        by_seed = [_measured(study, Cell(**(vars(cell) | {"seed": seed}))) for seed in SEEDS]
        found[label] = {name: [one[name] for one in by_seed] for name in MEASURES}
    _draw(found, study.out / "why.png")
    lines = [
        [
            name,
            about,
            *(f"{statistics.fmean(one[name]):.3g} ± {statistics.stdev(one[name]):.1g}" for one in found.values()),
        ]
        for name, about in MEASURES.items()
    ]
    return markdown_table(["measure", "what it is", *found], lines)


def _measured(study: Study, cell: Cell) -> dict[str, float]:
    """The measures of one set of adapters: geometric means over layers of means over pairs or tasks."""
    run = Run(study, cell, cell.rate)
    folders = {name: run.place() / name for name in run.names}
    loaded = {name: load_adapter(folder) for name, folder in folders.items()}
    features = {name: TaskFeatures.load(file) for name, file in run.features.items()}
    merges = {
        "error of TSV-M": merge_adapters(folders, "tsv"),
        "error of TA": merge_adapters(folders, "task_arithmetic", scale=0.3),
    }
    values: dict[str, list[float]] = {name: [] for name in MEASURES}
    for layer in next(iter(loaded.values())).shapes:
        factors = [one.factors[layer] for one in loaded.values()]
        moments = [features[name].layers[layer] for name in loaded]
        for name, value in _of_layer(factors, moments):
            values[name].append(value)
        for name, merged in merges.items():
            whole: Factors = merged.layers[layer].factors  # type: ignore[union-attr,attr-defined]
            values[name].append(_error(whole, merged.scale, factors, moments))
    return {name: float(torch.tensor(one).log().mean().exp()) for name, one in values.items()}


def _of_layer(factors: list[Factors], moments: list[FeatureMoments]) -> Iterator[tuple[str, float]]:
    rows = [torch.linalg.qr(one.A.double().mT).Q for one in factors]
    columns = [torch.linalg.qr(one.B.double()).Q for one in factors]
    yield "A shared", _shared(rows)
    yield "B shared", _shared(columns)
    products = [balanced(one) for one in factors]
    energies = [cross_energies(products, moment).diagonal() for moment in moments]
    ratios = [energies[t][j] / energies[t][t] for t in range(len(factors)) for j in range(len(factors)) if j != t]
    yield "interference", float(torch.stack(ratios).log().mean().exp())
    stack = enter("core", factors).stack
    U, S, Vh = torch.linalg.svd(stack, full_matrices=False)
    kept = [int((1e-6 * one[0] < one).sum()) for one in S]
    yield "TSV-M's turn of V", _turn(torch.cat([Vh[t, :k].mT for t, k in enumerate(kept)], 1))
    yield "TSV-M's turn of U", _turn(torch.cat([U[t, :, :k] for t, k in enumerate(kept)], 1))


def _shared(bases: list[Tensor]) -> float:
    return statistics.fmean(
        float((a.mT @ b).square().sum() / min(a.shape[1], b.shape[1])) for a, b in combinations(bases, 2)
    )


def _turn(X: Tensor) -> float:
    P, _, Qh = torch.linalg.svd(X, full_matrices=False)
    return float((P @ Qh - X).square().sum() / X.square().sum())


def _error(merged: Factors, scale: float, factors: list[Factors], moments: list[FeatureMoments]) -> float:
    whole = scale * merged.s * merged.B.double(), merged.A.double()
    errors = []
    for one, moment in zip(factors, moments, strict=True):
        E = cross_energies([whole, balanced(one)], moment)
        errors.append((E[0, 0] + E[1, 1] - 2 * E[0, 1]) / E[1, 1])
    return float(torch.stack(errors).mean())


def _draw(found: dict[str, dict[str, list[float]]], path: Path) -> None:
    figure, axes = plt.subplots(1, len(MEASURES), figsize=(2 * len(MEASURES), 3), layout="constrained")
    for axis, name in zip(axes, MEASURES, strict=True):
        for place, (label, one) in enumerate(found.items()):
            axis.bar(place, statistics.fmean(one[name]), yerr=statistics.stdev(one[name]), label=label)
        axis.set_title(name, fontsize="small")
        axis.set_xticks(range(len(found)), list(found), rotation=60, fontsize="small")
    with new_file(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    plt.close(figure)
