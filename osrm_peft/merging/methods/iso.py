"""Iso-C: the summed task vector with a flat spectrum."""

import torch
from torch import Tensor

from osrm_peft.merging.lowrank import numerical_rank, thin_svd
from osrm_peft.merging.methods.registry import register


def summed(tau: Tensor, weights: Tensor) -> Tensor:
    """(o, n) Σ_t w_t τ_t, float64."""
    return torch.einsum("t,ton->on", weights.double(), tau.double())


@register(
    "iso",
    paper="Iso-C (Marczak et al., ICML 2025), arXiv:2502.04959",
    commutes=True,
    spectral=True,
    cut_by=summed,
)
def iso(tau: Tensor, weights: Tensor) -> Tensor:
    """σ̄ U Vᵀ with U Σ Vᵀ = Σ_t w_t τ_t and σ̄ the mean of its singular values (Eq. 6–7).

    Restricted to the numerical rank: the mean is over the k singular values that are not 0, and only their directions
    are kept. (The published code fills all min(o, n) directions; on adapters most of them no task has touched.) So a
    single adapter is flattened too, not returned as it is. A lower rank of the result keeps the strongest directions of
    the sum, each with σ̄.

    Args:
        tau: (T, o, n) task vectors of one layer. Solved in float64.
        weights: (T,) one a task.

    Returns:
        (o, n) in the dtype of `tau`.
    """
    U, S, Vh = thin_svd(summed(tau, weights))
    k = numerical_rank(S)
    return (S[:k].mean() * U[:, :k] @ Vh[:k]).to(tau.dtype) if k else torch.zeros_like(tau[0])
