"""Exact concatenation: the weighted sum of task vectors in the adapters' own factors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from osrm_peft.adapters.factors import Factors
from osrm_peft.merging.methods.registry import register


@register(
    "concat",
    paper="LoRA Soups (Prabhakar et al., COLING 2025), arXiv:2410.13025",
    linear="sum",
    spaces=("factors",),
)
def concat(factors: Sequence[Factors | None], weights: Tensor) -> Factors:
    """Σ_t w_t τ_t = [w_1 s_1 B_1 … w_T s_T B_T] · [A_1; …; A_T]: no arithmetic but the scales, rank Σ r.

    PEFT's `cat` (CAT with fixed weights). `task_arithmetic` with λ = 1 gives the same task vector at its least rank.

    Args:
        factors: one a task, None where it does not adapt the layer.
        weights: (T,) one a task, negative ones too.

    Returns:
        Factors with A (Σr, n), B (o, Σr), in the dtype of the input.
    """
    present = [(float(w) * f.s, f) for w, f in zip(weights, factors, strict=True) if f is not None]
    return Factors(torch.cat([f.A for _, f in present]), torch.cat([s * f.B for s, f in present], dim=1))
