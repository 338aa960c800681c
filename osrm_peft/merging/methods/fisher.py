"""Fisher merging: a mean in which each weight counts by how much the task's predictions depend on it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from osrm_peft.merging.methods.registry import register


@register(
    "fisher",
    paper="Fisher-weighted averaging (Matena & Raffel, NeurIPS 2022), arXiv:2111.09832",
    spaces=("weight",),
    needs="fisher",
)
def fisher(tau: Tensor, weights: Tensor, fisher: Sequence[Tensor]) -> Tensor:
    """Σ_t |w_t| F_t ⊙ sgn(w_t) τ_t / Σ_t |w_t| F_t, entry by entry (Eq. 5; W₀ cancels from both sides).

    Where no task has any Fisher information (ΣF = 0), F_t = 1: the limit of the paper's floor.

    Args:
        tau: (T, o, n) task vectors of one layer.
        weights: (T,) the paper's λ_t, 1/T each there; a negative one negates the task vector.
        fisher: T diagonals (o, n) ≥ 0, of the fine-tuned models, each a mean over examples (see `collect_fisher`).

    Returns:
        (o, n) in the dtype of `tau`.
    """
    top, bottom = torch.zeros_like(tau[0], dtype=torch.float64), torch.zeros_like(tau[0], dtype=torch.float64)
    for w, F, one in zip(weights, fisher, tau, strict=True):
        top += w * F.double() * one
        bottom += w.abs() * F.double()
    w = weights.double()
    plain = torch.einsum("t,ton->on", w, tau.double()) / w.abs().sum().clamp_min(1e-300)
    return torch.where(bottom > 0, top / bottom.clamp_min(1e-300), plain).to(tau.dtype)
