"""Rules in the place of numbers: weights and scales that keep each task's outputs, by least squares, no labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from osrm_peft.features.moments import FeatureMoments
from osrm_peft.features.task_features import TaskFeatures
from osrm_peft.merging.lowrank import sure_energies

Product = tuple[Tensor, Tensor]  # B (o, r), A (r, n)


@dataclass(frozen=True)
class LeastSquares:
    """A rule in the place of numbers: features choose the weights or the scale of each layer.

    * `weights=LeastSquares(features)`: the w that minimise Σ_t E‖Σ_j w_j τ_j h_t − τ_t h_t‖², where the result is a
      sum (`task_arithmetic`, `concat`).
    * `scale=LeastSquares(features)`: the λ that minimises Σ_t E‖(τ_merged − τ_t) h_t‖², of any method but EMR.

    h_t are the inputs of the layer on task t's samples, in the pre-trained model.

    Attributes:
        features: {task: file or TaskFeatures} of every task that is merged (`collect_features`).
        shared: weights only: the same for all layers, by the sum over layers.
    """

    features: Mapping[str, str | Path | TaskFeatures]
    shared: bool = False

    @property
    def word(self) -> str:
        """How a YAML file or a manifest names the rule."""
        return "features_global" if self.shared else "features"


WORDS = ("features", "features_global")


def normal_equations(products: Sequence[Product], moments: Sequence[FeatureMoments]) -> tuple[Tensor, Tensor]:
    """(T, T) Σ_t K_t and (T,) Σ_t K_t[:, t] with K_t[j, k] = tr(τ_j S_t τ_kᵀ): of layers they add up.

    Their solution w minimises Σ_t E‖Σ_j w_j τ_j h_t − τ_t h_t‖².
    """
    energies = [sure_energies(list(products), moment) for moment in moments]
    return sum(energies[1:], energies[0]), torch.stack([K[:, t] for t, K in enumerate(energies)], 1).sum(1)


def solve(normal: Tensor, right: Tensor) -> Tensor:
    """(T,) the least-squares weights of least norm: tasks whose adapters do nothing, or the same, share."""
    return torch.linalg.pinv(normal, rtol=1e-10, hermitian=True) @ right


def best_scale(
    direction: Product, offset: Product | None, products: Sequence[Product], moments: Sequence[FeatureMoments]
) -> float:
    """argmin_c Σ_t E‖(offset + c · direction − τ_t) h_t‖²; 0 where the direction does nothing on any features."""
    top = bottom = 0.0
    for product, moment in zip(products, moments, strict=True):
        M = sure_energies([direction, product, *([] if offset is None else [offset])], moment)
        top += float(M[0, 1] - (M[0, 2] if offset is not None else 0))
        bottom += float(M[0, 0])
    return top / bottom if bottom > 0 else 0.0
