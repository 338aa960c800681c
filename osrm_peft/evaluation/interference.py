"""interference: before merging, how strongly each adapter acts on the other tasks' features."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from osrm_peft.adapters.lora_adapter import LoraAdapter
from osrm_peft.features.task_features import TaskFeatures
from osrm_peft.merging.inputs import gather
from osrm_peft.merging.lowrank import cross_energies
from osrm_peft.merging.statistics import statistics_of
from osrm_peft.models.layers import as_weight, base_layer, base_of, check_unmerged, weight_shape


@dataclass(frozen=True)
class Interference:
    """Who acts on whose features.

    Attributes:
        tasks: T names.
        layers: {layer: (T, T) float64}; entry [j, t] is E‖τ_j h_t‖² / E‖W₀ h_t‖², adapter j on the features of task t;
            with relative_to "own": / E‖τ_t h_t‖², so the diagonal is 1.
        relative_to: `"base"` or `"own"`.
    """

    tasks: list[str]
    layers: dict[str, Tensor]
    relative_to: str

    def mean(self) -> Tensor:
        """(T, T) float64, the geometric mean over the layers in which an adapter acts: shares span powers of ten.

        A pair of tasks without such a layer is 0.
        """
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
        return {
            "tasks": self.tasks,
            "relative_to": self.relative_to,
            "off_diagonal": self.off_diagonal() if len(self.tasks) > 1 else None,
            "mean": self.mean().tolist(),
            "layers": layers,
        }

    def off_diagonal(self) -> float:
        """The geometric mean over all pairs j ≠ t of `mean`: one number for a set of adapters (nan for one task)."""
        others = self.mean()[~torch.eye(len(self.tasks), dtype=torch.bool)]
        return float(others.log().mean().exp())


def interference(
    adapters: Mapping[str, str | Path | PeftModel | LoraAdapter],
    features: Mapping[str, str | Path | TaskFeatures],
    *,
    base: nn.Module | None = None,
    base_model: str | None = None,
    progress: bool = False,
) -> Interference:
    """For each layer and pair (j, t): how strongly adapter j acts on task t's features, from factors and moments.

        E‖τ_j h_t‖² = tr(τ_j S_t τ_jᵀ),   relative to E‖W₀ h_t‖² or, without the base model, to E‖τ_t h_t‖²

    No o×n matrix is formed for the adapters, no data and no labels are needed.

    Args:
        adapters: {task: adapter}, as for `merge_adapters`.
        features: {task: file or TaskFeatures} of the same tasks, of the pre-trained model (`collect_features`).
        base: the pre-trained model; None compares with each task's own adapter.
        base_model: the base model of all adapters, where their configs name it differently.

    Raises:
        ValueError: see `merge_adapters`; or the base lacks a layer.
    """
    inputs = gather(adapters, base_model=base_model, heads="per_task")
    moments_of = statistics_of("features", TaskFeatures, features, inputs, "interference")
    modules: dict[str, Any] = dict(base_of(base).named_modules()) if base is not None else {}
    check_unmerged({name: modules.get(name) for name in inputs.shapes})
    wrong = [name for name, shape in inputs.shapes.items() if modules and _shape_in(modules, name) != shape]
    if base is not None and wrong:
        raise ValueError(f"the base model has {_shape_in(modules, wrong[0])} at {wrong[0]!r}, the adapters "
                         f"{inputs.shapes[wrong[0]]}: it is another model")  # fmt: skip
    layers = {}
    for name, shape in tqdm(inputs.shapes.items(), desc="interference", disable=not progress):
        products, moments = inputs.products(name), moments_of(name)
        energies = torch.stack([cross_energies(products, moment).diagonal() for moment in moments], 1)  # (j, t)
        if base is None:
            below = energies.diagonal()
        else:
            module = base_layer(modules[name])
            W = as_weight(module, module.weight.detach().cpu()).reshape(shape).double()
            below = torch.stack([((W @ moment.second_moment()) * W).sum() for moment in moments])
        layers[name] = energies / below
    return Interference(list(inputs.adapters), layers, "own" if base is None else "base")


def _shape_in(modules: Mapping[str, Any], name: str) -> tuple[int, int] | None:
    return weight_shape(base_layer(modules[name])) if name in modules else None
