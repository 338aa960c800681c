"""TSV-M: the tasks' singular vectors, orthogonalised against each other."""

import math

import torch
from torch import Tensor

from osrm_peft.checks import number
from osrm_peft.merging.lowrank import numerical_rank, thin_svd
from osrm_peft.merging.methods.registry import register


def check(rank_share: float) -> None:
    """Raise ValueError for options out of range."""
    number("rank_share", rank_share, 0, 1, open_low=True)


@register(
    "tsv", paper="TSV-Merge (Gargiulo et al., CVPR 2025), arXiv:2412.00081", commutes=True, spectral=True, check=check
)
def tsv(tau: Tensor, weights: Tensor, *, rank_share: float = 1.0) -> Tensor:
    """U⊥ Σ V⊥ᵀ with U = [U_1 … U_T], V = [V_1 … V_T] of the SVDs of w_t τ_t and Σ their singular values.

    X⊥ = P Qᵀ of the SVD X = P D Qᵀ is the nearest matrix with orthonormal columns (Procrustes; paper, Eq. 7–8); where
    the tasks' directions coincide X has no full rank, and P, Q are cut at the numerical rank.

    Args:
        tau: (T, o, n) task vectors of one layer. Solved in float64.
        weights: (T,) one a task (the paper has none).
        rank_share: share of each task's singular vectors kept, in (0, 1]. The paper keeps min(o, n)/T of them, which is
            more than an adapter has; for full-rank task vectors give 1/T.

    Returns:
        (o, n) in the dtype of `tau`.
    """
    lefts, values, rights = [], [], []
    for theta in weights.double()[:, None, None] * tau.double():
        U, S, Vh = thin_svd(theta)
        k = math.ceil(rank_share * numerical_rank(S))
        lefts.append(U[:, :k])
        values.append(S[:k])
        rights.append(Vh[:k].mT)
    U, V = _nearest_orthonormal(torch.cat(lefts, 1)), _nearest_orthonormal(torch.cat(rights, 1))
    return ((U * torch.cat(values)) @ V.mT).to(tau.dtype)


def _nearest_orthonormal(X: Tensor) -> Tensor:
    P, D, Qh = thin_svd(X)
    k = numerical_rank(D)
    return P[:, :k] @ Qh[:k]
