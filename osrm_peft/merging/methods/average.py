"""Simple averaging of task vectors."""

import torch
from torch import Tensor

from osrm_peft.merging.methods.registry import register


def check_weights(weights: Tensor) -> None:
    """Raise ValueError for weights that sum to 0."""
    if weights.sum().abs() <= 1e-12 * weights.abs().sum():
        raise ValueError(f"the weights {weights.tolist()} sum to 0, so they have no average: use task_arithmetic")


@register(
    "average",
    paper="Model soups (Wortsman et al., ICML 2022), arXiv:2203.05482",
    linear="mean",
    commutes=True,
    baseless=True,
    check_weights=check_weights,
)
def average(tau: Tensor, weights: Tensor) -> Tensor:
    """Σ_t w_t τ_t / Σ_t w_t.

    Args:
        tau: (T, o, n) task vectors of one layer.
        weights: (T,) one a task, negative ones too; their sum must not be 0.

    Returns:
        (o, n) in the dtype of `tau`.
    """
    check_weights(weights)
    return torch.tensordot(weights, tau, 1) / weights.sum()
