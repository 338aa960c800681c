"""Why a choice of A merges better: what the adapters of each init share, and what merging does to it."""

import statistics
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure

from kept.cells import Run, Study
from kept.settings import SEEDS, Cell
from osrm_peft import TaskFeatures, interference, load_adapter, merge_adapters
from osrm_peft.adapters.lora_adapter import LoraAdapter
from osrm_peft.evaluation.tables import markdown_table
from osrm_peft.io.places import new_file
from osrm_peft.merging.lowrank import cross_energies
from osrm_peft.merging.merged_adapter import MergedAdapter
from osrm_peft.merging.overlap import Overlap, mean_overlap

MEASURES = {
    "A shared": "mean squared principal cosine of two tasks' A",
    "B shared": "the same of B",
    "interference": "E‖τ_j h_t‖² / E‖τ_t h_t‖²: another adapter on a task's features, against its own",
    "turn of A": "1 − the mean product of a direction of A and what TSV-M puts in its place",
    "turn of B": "the same of B",
    "error, TSV-M": "E‖(τ_merged − τ_t) h_t‖² / E‖τ_t h_t‖² on a task's features, λ = 1",
    "error, TA": "the same of task arithmetic, λ = 0.3",
}


def explain(study: Study, inits: dict[str, Cell]) -> str:
    """The table of the measures for each init, means over layers and pairs ± deviation over seeds, and its figure."""
    measured = {}
    for label, cell in inits.items():
        by_seed = [_measured(study, replace(cell, seed=seed)) for seed in SEEDS]
        measured[label] = {name: [one[name] for one in by_seed] for name in MEASURES}
    _draw(measured, study.out / "why.png")
    lines = []
    for name, about in MEASURES.items():
        values = [one[name] for one in measured.values()]
        lines.append([name, about, *(f"{statistics.fmean(one):.3f} ± {statistics.stdev(one):.3f}" for one in values)])
    return markdown_table(["measure", "what it is", *measured], lines) + "\n"


def _measured(study: Study, cell: Cell) -> dict[str, float]:
    run = Run(study, cell, cell.rate)
    adapters = {name: load_adapter(run.place() / name) for name in run.names}
    features = {name: TaskFeatures.load(run.features[name]) for name in run.names}
    found = interference(adapters, features)
    A, B = mean_overlap(found.overlap_a.values()), mean_overlap(found.overlap_b.values())
    measured = {"A shared": _pairs(A), "B shared": _pairs(B), "interference": found.off_diagonal()}
    measured |= {"turn of A": 1 - A.tsv, "turn of B": 1 - B.tsv}
    for name, method in (("error, TSV-M", "tsv"), ("error, TA", "task_arithmetic")):
        merged = merge_adapters(adapters, method)
        assert isinstance(merged, MergedAdapter)
        measured[name] = _error(merged, adapters, features)
    return measured


def _pairs(overlap: Overlap) -> float:
    return float(overlap.shared[~torch.eye(len(overlap.shared), dtype=torch.bool)].mean())


def _error(merged: MergedAdapter, adapters: dict[str, LoraAdapter], features: dict[str, TaskFeatures]) -> float:
    errors = []
    for layer, found in merged.layers.items():
        whole = found.at(merged.scale, None).factors
        for name, adapter in adapters.items():
            pair = [(one.s * one.B.double(), one.A.double()) for one in (whole, adapter.factors[layer])]
            E = cross_energies(pair, features[name].layers[layer])
            errors.append(float((E[0, 0] + E[1, 1] - 2 * E[0, 1]) / E[1, 1]))
    return statistics.fmean(errors)


def _draw(measured: dict[str, dict[str, list[float]]], path: Path) -> None:
    figure = Figure(figsize=(2.2 * len(MEASURES), 3), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(MEASURES)), MEASURES, strict=True):
        for place, one in enumerate(measured.values()):
            axis.bar(place, statistics.fmean(one[name]), yerr=statistics.stdev(one[name]))
        axis.set_title(name, fontsize="small")
        axis.set_xticks(range(len(measured)), list(measured), rotation=60, fontsize="small")
    with new_file(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
