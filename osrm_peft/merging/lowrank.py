"""Exact algebra on products B·A without forming them: balancing, bases, recompression. All in float64."""

from typing import NamedTuple

import torch
from torch import Tensor

from osrm_peft.adapters import Factors

_EPS = torch.finfo(torch.float64).eps


class Compressed(NamedTuple):
    """A product as factors of least rank, and the share of its squared Frobenius norm that they keep."""

    factors: Factors
    energy_kept: float


def balanced(factors: Factors) -> tuple[Tensor, Tensor]:
    """(o, k), (k, n) with the product s·B·A: U √Σ and √Σ Vᵀ of its SVD, whatever the split into B and A was."""
    U, S, Vh = _thin_svd(factors.s * factors.B.double(), factors.A.double())
    return U * S.sqrt(), S.sqrt()[:, None] * Vh


def compress(B: Tensor, A: Tensor, rank: int | None = None) -> Compressed:
    """The best approximation of B·A of at most `rank` (None: exact, at its numerical rank), balanced.

    Args:
        B: (o, p). A: (p, n), any p. The cost is that of QR of each and an SVD of p×p.

    Returns:
        Factors with s = 1 and BᵀB = AAᵀ diagonal, float64.
    """
    U, S, Vh = _thin_svd(B.double(), A.double())
    kept = S[:rank]
    energy = float(kept.square().sum() / S.square().sum()) if len(S) else 1.0
    root = kept.sqrt()
    return Compressed(Factors(root[:, None] * Vh[: len(kept)], U[:, : len(kept)] * root), energy)


def column_basis(parts: list[Tensor]) -> Tensor:
    """(o, p) orthonormal basis of the columns of all `parts` (o, k_t): left singular vectors of the stack."""
    U, S, _ = torch.linalg.svd(torch.cat(parts, dim=1), full_matrices=False)
    kept = _cutoff(S, U.shape) < S
    return U[:, kept]


def _thin_svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of B·A, cut at its numerical rank: U (o, k), S (k,), Vh (k, n)."""
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    k = int((_cutoff(S, (len(B), A.shape[1])) < S).sum())
    return Q_B @ U[:, :k], S[:k], Vh[:k] @ Q_A.mT


def _cutoff(S: Tensor, shape: torch.Size | tuple[int, ...]) -> float:
    return max(shape) * _EPS * float(S.max()) if len(S) else 0.0
