"""Task arithmetic: the scaled sum of task vectors."""

import torch
from torch import Tensor

from osrm_peft.merging.methods.registry import register


@register(
    "task_arithmetic",
    paper="Editing models with task arithmetic (Ilharco et al., ICLR 2023), arXiv:2212.04089",
    scale=0.3,
    linear="sum",
    commutes=True,
)
def task_arithmetic(tau: Tensor, weights: Tensor) -> Tensor:
    """Σ_t w_t τ_t; the engine multiplies by λ, 0.3 by default as in the paper.

    Args:
        tau: (T, o, n) task vectors of one layer.
        weights: (T,) one a task; a negative weight negates ("forgets") a task.

    Returns:
        (o, n) in the dtype of `tau`.
    """
    return torch.tensordot(weights, tau, 1)
