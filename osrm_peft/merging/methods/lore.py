"""LoRE-Merging: an implicit base and low-rank task vectors by coordinate descent."""

import math
import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from osrm_peft.checks import choice, integer, number
from osrm_peft.merging.lowrank import SMALL
from osrm_peft.merging.methods.registry import Merged, register
from osrm_peft.merging.methods.sparsify import check_density
from osrm_peft.merging.methods.svt import SAFE, TOLERANCE, Directions, above, strongest, top_value
from osrm_peft.merging.methods.ties import ties

Combine = Literal["sum", "average", "ties"]
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
    choice("combine", combine, get_args(Combine))
    check_density(density)
    integer("max_iterations", max_iterations, 1)
    number("tolerance", tolerance, 0)


def note(inputs: int) -> str | None:
    """What LoRE makes of two inputs."""
    if inputs != 2:
        return None
    return "LoRE of two inputs is their average, whatever λ and the options: take a third input, or method='average'"


@register(
    "lore",
    paper="LoRE-Merging (Liu et al., EMNLP Findings 2025), arXiv:2502.10749",
    commutes=True,
    baseless=True,
    weights_need_base=True,
    spectral=True,
    full_rank=lambda options: options["combine"] == "ties",
    offsets=True,
    check=check,
    note=note,
)
def lore(
    tau: Tensor,
    weights: Tensor,
    *,
    mu: float | None = None,
    mu_ratio: float | None = None,
    rank_ratio: float | None = None,
    combine: Combine = "sum",
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
        rank_ratio: keep ⌈rank_ratio · min(o, n)⌉ singular values instead (the paper's dynamic rank). In the core
            space o = n ≤ T·r; a share of the layer's own width would keep everything there.
        combine: `"sum"` (Algorithm 1, option 1), `"average"`, or `"ties"`: TIES selection of the δ_t, trimmed over each
            layer, on the layer's own entries in any space.
        density: of the TIES selection.
        max_iterations, tolerance: stop when θ₀ moves by no more than tolerance · ‖θ‖_F; no δ moves farther than θ₀.

    Returns:
        Merged(direction τ, offset θ₀ − W₀, report {iterations, converged, mu, objective}), both in the dtype of `tau`.
        Where the δ_t cancel to rounding (always those of two adapters: δ_1 = −δ_2) the direction is 0.
    """
    check(mu, mu_ratio, rank_ratio, combine, density, max_iterations, tolerance)
    dtype = torch.float64 if min(tau.shape[1:]) <= SMALL else torch.float32
    theta = tau.to(dtype) if bool((weights == 1).all()) else weights.to(dtype)[:, None, None] * tau.to(dtype)
    offset = theta.mean(0)  # the descent moves it in place
    rank = None if rank_ratio is None else math.ceil(rank_ratio * min(tau.shape[1:]))
    descent = _Descent(_tall(theta), _tall(offset), 0.0 if mu is None else mu, rank)
    if mu is None and rank is None:
        descent.mu = descent.threshold(0.1 if mu_ratio is None else mu_ratio)
    report = descent.run(max_iterations, tolerance)
    if combine == "ties":
        delta = descent.deltas()
        delta = delta if delta.shape == tau.shape else delta.mT
        return Merged(delta.to(tau.dtype), offset.to(tau.dtype), report, partial(_selected, density=density))
    direction = torch.zeros_like(offset)
    descent.add_deltas_to(_tall(direction))
    direction /= 1 if combine == "sum" else len(theta)
    return Merged(direction.to(tau.dtype), offset.to(tau.dtype), report)


def _selected(delta: Tensor, density: float) -> Tensor:
    """TIES of the (T, o, n) δ_t, wherever they are."""
    return ties(delta, torch.ones(len(delta), device=delta.device), density=density)


@dataclass
class _Descent:
    """The coordinate descent of one layer.

    Attributes:
        theta: (T, o, n) the θ_t, o ≥ n.
        base: (o, n) θ₀, moved in place; it starts as mean θ.
        mu: threshold μ of the δ_t; 0 with `rank`.
        rank: how many singular values a δ_t keeps whatever their size; None: those above μ.
        kept: the directions of each δ_t = SVT(θ_t − θ₀; μ).
    """

    theta: Tensor
    base: Tensor
    mu: float
    rank: int | None
    kept: list[Directions] = field(default_factory=list)

    def threshold(self, ratio: float) -> float:
        """μ, a share of the mean top singular value of θ_t − θ₀."""
        top = [top_value(theta_t - self.base) for theta_t in self.theta]
        return min(ratio * sum(top) / len(top), sys.float_info.max)

    def run(self, max_iterations: int, tolerance: float) -> dict[str, Any]:
        """Repeat both steps until θ₀ is at rest; returns the report."""
        size, moved, iterations = _norm(self.theta), math.inf, 0
        X = torch.empty_like(self.base)  # for all steps: new memory takes as long as what is computed into it
        while not iterations or (moved > tolerance * size and iterations < max_iterations):
            moved = self._move_base() if self.kept else math.inf
            iterations += 1
            last = moved <= tolerance * size or iterations == max_iterations
            if self._threshold_deltas(X, sure=last or iterations == 1):
                moved = math.inf  # the last look found what others had missed
        report: dict[str, Any] = {"iterations": iterations, "converged": moved <= tolerance * size}
        return report | (
            {"rank": self.rank} if self.rank is not None else {"mu": self.mu, "objective": self._objective()}
        )

    def _move_base(self) -> float:
        """θ₀ ← mean_t(θ_t − δ_t) = θ₀ + mean_t(X_t − δ_t) with X_t = θ_t − θ₀, in place; returns how far it moved."""
        squares, T = 0.0, len(self.theta)
        room, steps = (torch.empty_like(self.base[: _rows(self.base)]) for _ in range(2))
        for rows in _blocks(self.base):
            base = self.base[rows]
            X, step = room[: len(base)], steps[: len(base)].zero_()
            for theta_t, kept in zip(self.theta, self.kept, strict=True):
                torch.sub(theta_t[rows], base, out=X)
                step.add_(X).addmm_(kept.shrunk(X, self.mu), kept.V.mT, alpha=-1)
            base.add_(step, alpha=1 / T)
            squares += _norm(step) ** 2
        return math.sqrt(squares) / T

    def _threshold_deltas(self, X: Tensor, sure: bool) -> bool:
        """δ_t ← SVT(θ_t − θ₀; μ); returns whether a δ_t has more directions than before, if they are `sure` now.

        Args:
            X: (o, n) memory for θ_t − θ₀.
        """
        last, self.kept = self.kept, []
        for theta_t in self.theta:
            torch.sub(theta_t, self.base, out=X)
            start = last[len(self.kept)] if last else None
            self.kept.append(above(X, self.mu, start, sure) if self.rank is None else strongest(X, self.rank))
        return sure and any(len(one.S) > len(before.S) for one, before in zip(self.kept, last, strict=False))

    def _objective(self) -> float:
        """Σ_t ½‖X_t − δ_t‖_F² + μ‖δ_t‖_* with δ = U (S − μ) Vᵀ: values below μ, what μ cuts, and what is kept."""
        value = 0.0
        for theta_t, kept in zip(self.theta, self.kept, strict=True):
            blocks = _blocks(self.base)
            whole = sum(float((theta_t[rows] - self.base[rows]).double().square().sum()) for rows in blocks)
            S, mu = kept.S.double(), self.mu
            value += max(whole - float(S.square().sum()), 0) / 2 + len(S) * mu * mu / 2 + mu * float((S - mu).sum())
        return value

    def deltas(self) -> Tensor:
        """(T, o, n) the δ_t; 0 where they cancel to rounding."""
        pairs = zip(self.theta, self.kept, strict=True)
        delta = torch.stack([kept.soft(theta_t - self.base, self.mu) for theta_t, kept in pairs])
        return torch.zeros_like(delta) if float(delta.sum(0).norm()) <= self._rounding() else delta

    def add_deltas_to(self, total: Tensor) -> None:
        """Add Σ δ_t to (o, n) zeros, in place; 0 where it is rounding."""
        for rows in _blocks(self.base):
            for theta_t, kept in zip(self.theta, self.kept, strict=True):
                total[rows] += kept.soft(theta_t[rows] - self.base[rows], self.mu)
        if float(total.norm()) <= self._rounding():
            total.zero_()

    def _rounding(self) -> float:
        """How much of ‖Σ δ_t‖ may be rounding: of the θ_t, and of δ_t that were found by iterations."""
        narrow = self.base.shape[1]
        digits = 4 * narrow**0.5 + (2 / SAFE if narrow <= SMALL else 0)
        rounding = digits * torch.finfo(self.base.dtype).eps * sum(float(one.norm()) for one in self.theta)
        if narrow > SMALL and self.rank is None:
            rounding += 4 * TOLERANCE * sum(float((kept.S - self.mu).norm()) for kept in self.kept)
        return rounding


def _norm(X: Tensor) -> float:
    """‖X‖_F, also where float32 has no room for the squares of the entries."""
    norm = float(torch.linalg.vector_norm(X))
    return norm if norm > 1e-12 else float(torch.linalg.vector_norm(X, dtype=torch.float64))


def _tall(X: Tensor) -> Tensor:
    """A view with the shorter side last: the directions that are kept are those of the shorter side."""
    return X.mT if X.shape[-2] < X.shape[-1] else X


def _blocks(X: Tensor) -> list[slice]:
    """Slices of some rows each, so that a step makes no further (o, n) matrix."""
    return [slice(start, start + _rows(X)) for start in range(0, len(X), _rows(X))]


def _rows(X: Tensor) -> int:
    return max(1, _ENTRIES // max(X.shape[1], 1))
