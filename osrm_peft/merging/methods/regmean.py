"""RegMean: the least-squares mean of linear layers, exact on LoRA factors."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from osrm_peft.adapters.factors import Factors
from osrm_peft.checks import number
from osrm_peft.features.moments import FeatureMoments
from osrm_peft.merging.methods.registry import register


def check(off_diagonal: float, ridge: float) -> None:
    """Raise ValueError for options out of range."""
    number("off_diagonal", off_diagonal, 0, 1)
    number("ridge", ridge, 0)


def check_weights(weights: Tensor) -> None:
    """Raise ValueError for weights that are all 0."""
    if not weights.any():
        raise ValueError("all weights are 0, so no task's error counts: give one of them another weight")


@register(
    "regmean",
    paper="RegMean (Jin et al., ICLR 2023), arXiv:2212.09849",
    spaces=("factors",),
    check=check,
    check_weights=check_weights,
    needs="gram",
)
def regmean(
    factors: Sequence[Factors | None],
    weights: Tensor,
    gram: Sequence[FeatureMoments],
    *,
    off_diagonal: float = 0.9,
    ridge: float = 0.0,
) -> Factors:
    """argmin_W Σ_t |w_t| E‖(W − sgn(w_t) τ_t) h_t‖² (Eq. 1–2), as factors of rank ≤ Σ r.

        W = Σ_t w_t τ_t G̃_t (Σ_u |w_u| G̃_u)⁻¹,   G_t = E h_t h_tᵀ,   G̃ = α G + (1 − α) diag G + ρ · tr(G)/n · I

    With τ_t = s B_t A_t only A changes: B = [B_1 … B_T], A = [w_t s_t A_t G̃_t (Σ|w|G̃)⁻¹]. W₀ cancels, so the base
    model is not needed. One Cholesky factorisation in float64; no o×n matrix.

    The solve sees no A, so adapters that share A need no ridge for it, and with α < 1 its condition has a bound that
    sums in float32 bear: ρ = 0 by default. At α = 1 `interference` names the ridge that the features need.

    Args:
        factors: one a task, None where it does not adapt the layer (τ_t = 0).
        weights: (T,) how much each task's error counts; a negative one negates the task vector.
        gram: T moments of the layer's inputs in the fine-tuned models; as means: a task's number of rows does not
            weigh.
        off_diagonal: α, the share of the off-diagonal entries kept; the paper has 0.9 (0.1 for T5).
        ridge: ρ, for Gram matrices that are singular even so.

    Raises:
        ValueError: Σ G̃ is not positive definite: more rows, a lower off_diagonal or a ridge.
    """
    n = next(len(f.A.mT) for f in factors if f is not None)
    total = torch.zeros(n, n, dtype=torch.float64, device=gram[0].total.device)
    reads: list[Tensor | None] = []  # (n, r_t) G̃_t A_tᵀ
    for w, f, moments in zip(weights, factors, gram, strict=True):
        G = _reduced(moments.second_moment(), off_diagonal, ridge)
        total += w.abs() * G
        reads.append(None if f is None else float(w) * f.s * (G @ f.A.double().mT))
    L, info = torch.linalg.cholesky_ex(total)
    rounding = 4 * n**0.5 * 2**-24  # of sums in float32
    if int(info) or (ridge == 0 and _least_eigenvalue(total.diagonal().sqrt(), L) < rounding):
        raise ValueError(
            f"the tasks' Gram matrices are singular together (width {n}): collect more rows, lower "
            f"off_diagonal={off_diagonal:g}, or give ridge=1e-2"
        )
    A = [torch.cholesky_solve(read, L).mT for read in reads if read is not None]
    return Factors(torch.cat(A), torch.cat([f.B.double() for f in factors if f is not None], dim=1))


def condition(S: Tensor, *, off_diagonal: float = 0.9, ridge: float = 0.0) -> float:
    """κ of the matrix that `regmean` solves with, scaled to a diagonal of ones; inf where it is singular.

    The relative error of the result, measured on outputs, is at most about κ · 2⁻²⁴ from sums in float32. The scaled
    matrix counts, since Cholesky's error is that of the best scaling of the inputs. It is at most
    (α n + 1 − α) / (1 − α), 9 n + 1 by default, unless an input is always 0.

    Args:
        S: (n, n) Σ_t |w_t| E h_t h_tᵀ, float64. Adapters do not enter.
        off_diagonal, ridge: of `regmean`.
    """
    M = _reduced(S, off_diagonal, ridge)
    if bool((M.diagonal() <= 0).any()):
        return math.inf
    size = M.diagonal().sqrt()
    M = M / (size * size[:, None])
    L, info = torch.linalg.cholesky_ex(M)
    if int(info):
        return math.inf
    return _norm(M.matmul, M) * _norm(lambda x: torch.cholesky_solve(x, L), M)


def _reduced(G: Tensor, off_diagonal: float, ridge: float) -> Tensor:
    """G̃ = α G + (1 − α) diag G + ρ · tr(G)/n · I."""
    return off_diagonal * G + torch.diag((1 - off_diagonal) * G.diagonal() + ridge * G.trace() / len(G))


def _norm(apply: Callable[[Tensor], Tensor], M: Tensor, steps: int = 50) -> float:
    """Largest eigenvalue of a positive definite matrix of the size of M, by power iteration."""
    x = torch.linspace(1, 2, len(M), dtype=torch.float64, device=M.device)[:, None]
    for _ in range(steps):
        x = apply(x / x.norm())
    return float(x.norm())


def _least_eigenvalue(size: Tensor, L: Tensor) -> float:
    """Least eigenvalue, by inverse iteration, of LLᵀ scaled to a diagonal of ones (`size`: roots of its diagonal)."""
    return 1 / _norm(lambda x: size[:, None] * torch.cholesky_solve(size[:, None] * x, L), L, steps=5)
