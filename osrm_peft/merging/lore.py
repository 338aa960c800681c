"""LoRE-Merging: an implicit base and low-rank task vectors by coordinate descent."""

import math
from typing import Any

import torch
from torch import Tensor

from osrm_peft.checks import choice, integer, number
from osrm_peft.merging.registry import Merged, register
from osrm_peft.merging.sparsify import check_density
from osrm_peft.merging.ties import ties

COMBINE = ("sum", "average", "ties")


def check(
    mu: float | None,
    mu_ratio: float | None,
    rank_ratio: float | None,
    combine: str,
    density: float,
    max_iterations: int,
    tolerance: float,
) -> None:
    """Raise ValueError for options out of range or in conflict."""
    given = {"mu": mu, "mu_ratio": mu_ratio, "rank_ratio": rank_ratio}
    named = [f"{name}={value}" for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise ValueError(f"give one of mu, mu_ratio and rank_ratio, not {' and '.join(named)}")
    for name, value in (("mu", mu), ("mu_ratio", mu_ratio)):
        if value is not None:
            number(name, value, 0)
    if rank_ratio is not None:
        number("rank_ratio", rank_ratio, 0, 1, open_low=True)
    choice("combine", combine, COMBINE)
    check_density(density)
    integer("max_iterations", max_iterations, 1)
    number("tolerance", tolerance, 0)


@register(
    "lore",
    paper="LoRE-Merging (Liu et al., EMNLP Findings 2025), arXiv:2502.10749",
    commutes=True,
    check=check,
)
def lore(
    tau: Tensor,
    weights: Tensor,
    *,
    mu: float | None = None,
    mu_ratio: float | None = None,
    rank_ratio: float | None = None,
    combine: str = "sum",
    density: float = 0.2,
    max_iterations: int = 200,
    tolerance: float = 1e-6,
) -> Merged:
    r"""Find θ₀ and low-rank δ_t with θ_t ≈ θ₀ + δ_t, then θ* = θ₀ + λ τ (Liu et al., Algorithm 1).

        δ_t = 0;   repeat:   θ₀ = mean_t(θ_t − δ_t),   δ_t = SVT(θ_t − θ₀; μ);   then   τ = Σ δ_t, mean δ_t or TIES(δ_t)

    SVT(X; μ) = U (Σ − μ)₊ Vᵀ is the exact minimiser for ½‖θ_t − θ₀ − δ‖_F² + μ‖δ‖_*, so these steps never raise
    Σ_t ½‖θ_t − θ₀ − δ_t‖_F² + μ_t‖δ_t‖_* (the paper's Eq. 1 prints ‖δ‖_*²; we follow its algorithm). A common base
    added to all θ_t moves θ₀ alone, so the steps run on task vectors, and the returned offset is θ₀ − W₀.

    Args:
        tau: (T, o, n) task vectors of one layer, or of any space with orthonormal bases. Solved in float64.
        weights: (T,) scale the task vectors beforehand (the paper has none).
        mu: absolute threshold μ.
        mu_ratio: μ as a share of the mean top singular value of θ_t − mean θ. Default, with 0.1, if nothing is given.
        rank_ratio: instead of a threshold keep ⌈rank_ratio · min(o, n)⌉ singular values (the paper's dynamic rank).
            In the core space o = n ≤ T·r; a share of the layer's own width would keep everything there.
        combine: `"sum"` (Algorithm 1, option 1), `"average"`, or `"ties"`: TIES selection of the δ_t, trimmed over each
            layer, on the layer's own entries in any space.
        density: of the TIES selection.
        max_iterations, tolerance: stop when no θ₀ or δ moves by more than tolerance · ‖θ‖_F.

    Returns:
        Merged(direction τ, offset θ₀ − W₀, report {iterations, converged, mu, objective}), both in the dtype of `tau`.
    """
    check(mu, mu_ratio, rank_ratio, combine, density, max_iterations, tolerance)
    theta = weights.double()[:, None, None] * tau.double()
    if mu is None and rank_ratio is None:
        spread = torch.linalg.matrix_norm(theta - theta.mean(0), ord=2)  # (T,) top singular values
        mu = float((0.1 if mu_ratio is None else mu_ratio) * spread.mean())
    rank = math.ceil(rank_ratio * min(theta.shape[1:])) if rank_ratio is not None else None

    size = float(theta.norm())
    delta, base = torch.zeros_like(theta), torch.zeros_like(theta[0])
    moved, iterations = math.inf, 0
    while moved > tolerance * size and iterations < max_iterations:
        new_base = (theta - delta).mean(0)
        new_delta = _truncate(theta - new_base, rank) if rank is not None else svt(theta - new_base, mu or 0.0)
        moved = max(float((new_base - base).norm()), float((new_delta - delta).norm())) if iterations else math.inf
        base, delta, iterations = new_base, new_delta, iterations + 1
        if size == 0:
            break
    report: dict[str, Any] = {"iterations": iterations, "converged": moved <= tolerance * size or size == 0}
    report |= {"rank": rank} if rank is not None else {"mu": mu, "objective": objective(theta, base, delta, mu or 0.0)}
    offset = base.to(tau.dtype)
    if combine == "ties":
        return Merged(delta.to(tau.dtype), offset, report, lambda tau: ties(tau, torch.ones(len(tau)), density=density))
    return Merged((delta.sum(0) if combine == "sum" else delta.mean(0)).to(tau.dtype), offset, report)


def svt(X: Tensor, mu: float) -> Tensor:
    """(…, o, n) singular value thresholding: U (Σ − μ)₊ Vᵀ."""
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    return (U * (S - mu).clamp_min(0)[..., None, :]) @ Vh


def objective(theta: Tensor, base: Tensor, delta: Tensor, mu: float) -> float:
    """Σ_t ½‖θ_t − θ₀ − δ_t‖_F² + μ‖δ_t‖_*: what the steps of `lore` never raise."""
    misfit = (theta - base - delta).square().sum() / 2
    return float(misfit + mu * torch.linalg.svdvals(delta).sum())


def _truncate(X: Tensor, rank: int) -> Tensor:
    """(…, o, n) best approximation of this rank."""
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    return (U[..., :rank] * S[..., None, :rank]) @ Vh[..., :rank, :]
