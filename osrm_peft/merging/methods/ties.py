"""TIES: trim, elect a sign, merge what agrees with it."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from osrm_peft.checks import choice
from osrm_peft.merging.methods.registry import AddUp, Stacks, alone, register
from osrm_peft.merging.methods.sparsify import check_density, keep_above, magnitude_thresholds

Trim = Literal["model", "layer"]


def check(density: float, trim: str) -> None:
    """Raise ValueError for options out of range."""
    check_density(density)
    choice("trim", trim, get_args(Trim))


def trims_layers(options: Mapping[str, Any]) -> bool:
    """Whether each tensor has its own threshold."""
    return options["trim"] == "layer"


def summarise(stacks: Stacks, add_up: AddUp = alone, *, density: float, trim: str) -> Tensor | None:
    """(T,) trimming thresholds over the whole model; None where each layer has its own."""
    return magnitude_thresholds(stacks, density, add_up) if trim == "model" else None


@register(
    "ties",
    paper="TIES-Merging (Yadav et al., NeurIPS 2023), arXiv:2306.01708",
    check=check,
    summarise=summarise,
    whole_tensor=trims_layers,
)
def ties(
    tau: Tensor, weights: Tensor, summary: Tensor | None = None, *, density: float = 0.2, trim: Trim = "model"
) -> Tensor:
    """Trim each τ_t to its largest entries, elect γ = sgn(Σ_t w_t τ̂_t), average the entries that agree with γ.

        τ_m = Σ_{t: sgn(w_t τ̂_t) = γ} w_t τ̂_t / #{t: sgn(w_t τ̂_t) = γ}     (paper, Algorithm 1)

    Weights scale the task vectors before the election (the paper has none); where the sum is 0 to rounding nothing is
    kept.

    Args:
        tau: (T, o, n) task vectors of one layer.
        weights: (T,) one a task.
        summary: (T,) thresholds from `summarise`; None trims over this layer alone.
        density: share of each task vector's entries kept, in (0, 1]; the paper keeps the top 20 %.
        trim: `"model"`, over the whole task vector as in the paper, or `"layer"`.

    Returns:
        (o, n) in the dtype of `tau`.
    """
    thresholds = magnitude_thresholds([tau], density) if summary is None else summary
    trimmed = weights[:, None, None] * keep_above(tau, thresholds)
    sign = elected(trimmed)
    agreeing = trimmed.mul_(sign).clamp_min_(0)  # |w_t τ̂_t| where the signs are the same
    return agreeing.sum(0).mul_(sign).div_(agreeing.sign_().sum(0).clamp_min_(1))


def elected(tau: Tensor) -> Tensor:
    """(o, n) γ = sgn(Σ_t τ_t) of (T, o, n), 0 where the terms cancel: the sign of what rounding leaves is no vote."""
    tau = tau.detach()
    total = tau.sum(0)
    over = total.abs().sub_(tau.abs().sum(0).mul_(4 * torch.finfo(tau.dtype).eps))
    return over.clamp_min_(0).sign_().mul_(total.sign_())
