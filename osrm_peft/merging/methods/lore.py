"""LoRE-Merging: an implicit base and low-rank task vectors by coordinate descent."""

import math
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

from osrm_peft.checks import choice, integer, number
from osrm_peft.merging.methods.registry import Merged, register
from osrm_peft.merging.methods.sparsify import check_density
from osrm_peft.merging.methods.svt import SMALL, TOLERANCE, Directions, above, strongest, top_value
from osrm_peft.merging.methods.ties import ties

COMBINE = ("sum", "average", "ties")
_ENTRIES = 2**20  # of a block of rows


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
    weights_need_base=True,
    spectral=True,
    full_rank=lambda options: options["combine"] == "ties",
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
            width of 256, wider ones in float32: memory holds T + 2 matrices (TIES: 2 T + 2) and the directions above μ;
            a matrix that has many of them needs a few squares of its shorter side in float64, too.
        weights: (T,) scale the task vectors beforehand (the paper has none).
        mu: absolute threshold μ.
        mu_ratio: μ as a share of the mean top singular value of θ_t − mean θ. Default, with 0.1, if nothing is given.
        rank_ratio: instead of a threshold keep ⌈rank_ratio · min(o, n)⌉ singular values (the paper's dynamic rank).
            In the core space o = n ≤ T·r; a share of the layer's own width would keep everything there.
        combine: `"sum"` (Algorithm 1, option 1), `"average"`, or `"ties"`: TIES selection of the δ_t, trimmed over each
            layer, on the layer's own entries in any space.
        density: of the TIES selection.
        max_iterations, tolerance: stop when θ₀ moves by no more than tolerance · ‖θ‖_F; no δ moves farther than θ₀.

    Returns:
        Merged(direction τ, offset θ₀ − W₀, report {iterations, converged, mu, objective}), both in the dtype of `tau`.
        Where the δ_t cancel to rounding (always those of two adapters: δ_1 = −δ_2) the direction is 0.
    """
    check(mu, mu_ratio, rank_ratio, combine, density, max_iterations, tolerance)
    narrow = min(tau.shape[1:])
    dtype = torch.float64 if narrow <= SMALL else torch.float32
    theta = tau.to(dtype) if bool((weights == 1).all()) else weights.to(dtype)[:, None, None] * tau.to(dtype)
    offset = theta.mean(0)
    theta, base = _tall(theta), _tall(offset)
    if mu is None and rank_ratio is None:
        spread = [top_value(one - base) for one in theta]
        mu = min((0.1 if mu_ratio is None else mu_ratio) * sum(spread) / len(spread), sys.float_info.max)
    threshold, rank = mu or 0.0, math.ceil(rank_ratio * narrow) if rank_ratio is not None else None

    size, moved, iterations, value = float(theta.norm()), math.inf, 0, 0.0
    found: list[Directions] = []
    while not iterations or (moved > tolerance * size and iterations < max_iterations):
        moved = _step(theta, base, found, threshold) if found else math.inf
        last, found, value = found, [], 0.0
        for one in theta:
            X, start = one - base, last[len(found)] if last else None
            found.append(strongest(X, rank) if rank is not None else above(X, threshold, start))
            value += _objective(X, found[-1].S, threshold)
            del X  # not two of them at once
        iterations += 1
    report: dict[str, Any] = {"iterations": iterations, "converged": moved <= tolerance * size}
    report |= {"rank": rank} if rank is not None else {"mu": mu, "objective": value}

    # How much of Σ δ_t may be rounding: of the θ_t, and of δ_t that were found by iterations.
    rounding = 4 * narrow**0.5 * torch.finfo(dtype).eps * sum(float(one.norm()) for one in theta)
    if narrow > SMALL and rank is None:
        rounding += 4 * TOLERANCE * sum(float((each.S - threshold).norm()) for each in found)
    if combine == "ties":
        delta = torch.stack([each.soft(one - base, threshold) for one, each in zip(theta, found, strict=True)])
        delta = delta if delta.shape == tau.shape else delta.mT
        if float(delta.sum(0).norm()) <= rounding:
            delta = torch.zeros_like(delta)
        kept = partial(ties, weights=torch.ones(len(tau)), density=density)
        return Merged(delta.to(tau.dtype), offset.to(tau.dtype), report, kept)
    direction = torch.zeros_like(offset)
    for rows in _blocks(base):
        for one, each in zip(theta, found, strict=True):
            _tall(direction)[rows] += each.soft(one[rows] - base[rows], threshold)
    if float(direction.norm()) <= rounding:
        direction.zero_()
    direction /= 1 if combine == "sum" else len(theta)
    return Merged(direction.to(tau.dtype), offset.to(tau.dtype), report)


def _tall(X: Tensor) -> Tensor:
    """With the shorter side last, as a view: the directions that are kept are those of the shorter side."""
    return X.mT if X.shape[-2] < X.shape[-1] else X


def _step(theta: Tensor, base: Tensor, found: list[Directions], mu: float) -> float:
    """θ₀ ← mean_t(θ_t − δ_t) = θ₀ + mean_t(X_t − δ_t) with X_t = θ_t − θ₀, in place; returns how far it moved."""
    moved = 0.0
    for rows in _blocks(base):
        step = torch.zeros_like(base[rows])
        for one, each in zip(theta, found, strict=True):
            X = one[rows] - base[rows]
            step += X - each.soft(X, mu)
        step /= len(theta)
        base[rows] += step
        moved += float(step.double().square().sum())
    return math.sqrt(moved)


def _objective(X: Tensor, S: Tensor, mu: float) -> float:
    """½‖X − δ‖_F² + μ‖δ‖_* of δ = U (S − μ) Vᵀ: what was not found, what was cut, and what was kept."""
    whole = sum(float(X[rows].double().square().sum()) for rows in _blocks(X))
    S = S.double()
    return max(whole - float(S.square().sum()), 0) / 2 + len(S) * mu * mu / 2 + mu * float((S - mu).sum())


def _blocks(X: Tensor) -> list[slice]:
    """Some rows at a time: a step makes no further (o, n) matrix."""
    size = max(1, _ENTRIES // max(X.shape[1], 1))
    return [slice(start, start + size) for start in range(0, len(X), size)]
