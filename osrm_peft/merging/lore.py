"""LoRE-Merging: an implicit base and low-rank task vectors by coordinate descent."""

import math
from typing import Any

import torch
from torch import Tensor

from osrm_peft.checks import choice, integer, number
from osrm_peft.merging.registry import Merged, register
from osrm_peft.merging.sparsify import check_density
from osrm_peft.merging.thresholding import SMALL, Triplets, above, strongest, top_value
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
    baseless=True,
    spectral=True,
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
        tau: (T, o, n) task vectors of one layer, or of any space with orthonormal bases. Solved in float64 up to a
            width of 256, wider ones in float32: memory holds (T + 2) matrices, see `thresholding.above`.
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
    narrow = min(tau.shape[1:])
    dtype = torch.float64 if narrow <= SMALL else torch.float32
    theta = tau.to(dtype) if bool((weights == 1).all()) else weights.to(dtype)[:, None, None] * tau.to(dtype)
    base = theta.mean(0)
    if mu is None and rank_ratio is None:
        spread = [top_value(one - base) for one in theta]
        mu = (0.1 if mu_ratio is None else mu_ratio) * sum(spread) / len(spread)
    rank = math.ceil(rank_ratio * narrow) if rank_ratio is not None else None

    size = float(theta.norm())
    delta: list[Triplets | None] = [None] * len(theta)
    moved, iterations, value = math.inf, 0, 0.0
    while moved > tolerance * size and iterations < max_iterations and size > 0:
        _mean_of_rest(theta, delta, out=base)
        steps, value = 0.0, 0.0
        for t, one in enumerate(theta):
            X = one - base
            found = strongest(X, rank) if rank is not None else above(X, mu or 0.0, delta[t])
            new = found if rank is not None else found.soft(mu or 0.0)
            steps += new.distance(delta[t]) ** 2
            value += float(_misfit(X, found, new)) / 2 + (mu or 0.0) * float(new.S.sum())
            delta[t] = new
        moved = math.sqrt(steps) if iterations else math.inf  # θ₀ moves by less: it is a mean of these
        iterations += 1
    report: dict[str, Any] = {"iterations": iterations, "converged": moved <= tolerance * size or size == 0}
    report |= {"rank": rank} if rank is not None else {"mu": mu, "objective": value}
    offset, found_deltas = base.to(tau.dtype), [one for one in delta if one is not None]
    if combine == "ties":
        dense = torch.stack([one.dense() for one in found_deltas]) if found_deltas else torch.zeros_like(theta)
        return Merged(dense.to(tau.dtype), offset, report, lambda tau: ties(tau, torch.ones(len(tau)), density=density))
    direction = torch.zeros_like(base)
    for one in found_deltas:
        one.add_to_(direction, 1.0 if combine == "sum" else 1 / len(theta))
    return Merged(direction.to(tau.dtype), offset, report)


def _mean_of_rest(theta: Tensor, delta: list[Triplets | None], out: Tensor) -> None:
    """θ₀ = mean_t(θ_t − δ_t)."""
    torch.mean(theta, 0, out=out)
    for one in delta:
        if one is not None:
            one.add_to_(out, -1 / len(theta))


def _misfit(X: Tensor, found: Triplets, kept: Triplets) -> Tensor:
    """‖X − δ‖_F² of δ = U diag(kept.S) Vᵀ in the singular directions found: what was not found, and what was cut."""
    return (X.double().square().sum() - found.S.double().square().sum()).clamp_min(0) + (
        found.S - kept.S
    ).double().square().sum()
