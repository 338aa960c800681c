"""The singular values of a matrix above a threshold, and no others: what LoRE's steps need, in a fraction of an SVD."""

import math
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from osrm_peft.merging.lowrank import SMALL, symmetric_eigh, thin_svd

TOLERANCE = 1e-5  # of the norm of what is found
_NEXT = 0.7  # of μ: as far as the directions go that are iterated
_SPARE = 8  # of those beyond
_ROUNDS = 30
SAFE = 0.05  # of the largest value: from there on those of XᵀX in float64 are singular values to 20 times its rounding
_FEW = 16  # directions at least, and a multiple of it where it can be: kernels take as long, or longer, for fewer


class Directions(NamedTuple):
    """Right singular vectors V (n, k), values S (k,) descending; in `more` (n, p) where the next ones lie about."""

    V: Tensor
    S: Tensor
    more: Tensor | None = None

    def soft(self, rows: Tensor, mu: float) -> Tensor:
        """(b, n) rows of SVT(X; μ) = U (Σ − μ) Vᵀ from the same (b, n) rows of X."""
        return self.shrunk(rows, mu) @ self.V.mT

    def shrunk(self, rows: Tensor, mu: float) -> Tensor:
        """(b, k) rows of U (Σ − μ) from (b, n) rows of X: U Σ = X V, so U is not kept."""
        return rows @ self.V * (1 - mu / self.S.clamp_min(torch.finfo(self.S.dtype).tiny))


def above(X: Tensor, mu: float, start: Directions | None = None, sure: bool = True) -> Directions:
    """The singular values σ > μ of (o, n) X, o ≥ n for little memory, and their right singular vectors.

    Up to a width of 256 by a full SVD, or by the eigenvectors of XᵀX where these are as exact. Wider: subspace
    iterations from `start` (those of a matrix near by) or from random directions, until what is left of XV − US changes
    SVT(X; μ) by 10⁻⁵ at most, and power iterations find nothing above μ in the rest (which `sure=False` leaves to a
    later step); where more than an eighth of all directions are needed, by the eigenvectors of XᵀX.
    """
    narrow = min(X.shape)
    if narrow <= SMALL:
        return _cut(_of_narrow(X, mu), mu)
    generator = torch.Generator().manual_seed(0)
    if start is None or start.more is None:
        V = _random(X, 2 * _FEW, generator)
    else:
        near = torch.cat([start.V, start.more], 1)
        least = near.shape[1] + 4
        columns = max(least, min(math.ceil(least / _FEW) * _FEW, narrow // 8))
        V = torch.cat([near, _random(X, columns - near.shape[1], generator)], 1)
    U: Tensor | None = None
    S = V.new_zeros(0)
    for _ in range(_ROUNDS):
        if V.shape[1] > narrow // 8:
            break
        Y = X @ V
        if U is not None:
            k, misfit = int((mu < S).sum()), (Y[:, : len(S)] - U * S).norm(dim=0)
            # What is left lies in directions with σ ≤ S[-1], and moves U(Σ − μ)Vᵀ by (σ − μ)/(σ − S[-1]) of itself.
            share = (S[:k] - mu) / (S[:k] - S[-1]).clamp_min(torch.finfo(X.dtype).tiny)
            allowed = TOLERANCE * (S[:k] - mu).norm()
            settled = bool((misfit[:k] * share.clamp_max(1)).norm() <= allowed) and bool(S[-1] <= _NEXT * mu)
            # Near a value s that is found to r lies a singular value of at most s + r: may it be above μ?
            if settled and bool((S[k:] + misfit[k:] <= mu + allowed + 1e-6 * mu).all()):
                found = Directions(V[:, : len(S)], Y[:, : len(S)].norm(dim=0))  # rounded less than S
                missed = _strongest_of_rest(X, found.V, generator) if sure else None
                if missed is None or float((X @ missed).norm()) <= mu:
                    return _cut(found, mu)
                Y = torch.cat([Y, X @ missed[:, None]], 1)
            del U
        Y = torch.linalg.qr(Y).Q
        basis, R = torch.linalg.qr(X.mT @ Y)
        u, S, vh = thin_svd(R.mT)
        U, V = Y @ u, basis @ vh.mT
        if S[-1] > _NEXT * mu:  # too few directions to tell, or too close to the next to settle soon
            V = torch.cat([V, _random(X, max(8, V.shape[1] // 2), generator)], 1)
        del Y
    del U
    return _cut(_by_gram(X), mu)


def strongest(X: Tensor, rank: int) -> Directions:
    """The `rank` largest singular values of (o, n) X, and their right singular vectors."""
    found = _svd(X) if min(X.shape) <= SMALL else _by_gram(X)
    return Directions(found.V[:, :rank], found.S[:rank])


def leading(X: Tensor, rank: int) -> Directions:
    """Directions that hold as much of (o, n) X as the `rank` strongest, to about 10⁻⁶ of it, in a fraction of the time.

    Subspace iterations with some directions more, until a round adds less than 10⁻⁷ to Σσ². Where singular values lie
    close, it is those directions that settle last, and little energy depends on which of them are found. More than an
    eighth of all directions, and those of matrices up to a width of 256: `strongest`.
    """
    narrow = min(X.shape)
    if narrow <= SMALL or rank > narrow // 8:
        return strongest(X, rank)
    V, energy = _random(X, rank + max(16, rank // 4), torch.Generator().manual_seed(0)), 0.0
    for _ in range(100):
        basis, R = torch.linalg.qr(X.mT @ torch.linalg.qr(X @ V).Q)
        _, S, vh = thin_svd(R.mT)
        V, before = basis @ vh.mT, energy
        energy = float(S[:rank].double().square().sum())
        if energy - before <= 1e-7 * energy:
            break
    return Directions(V[:, :rank], S[:rank])


def top_value(X: Tensor) -> float:
    """The largest singular value of (o, n) X."""
    if min(X.shape) <= SMALL:
        return float(torch.linalg.matrix_norm(X, ord=2))
    V, last = _random(X, _FEW, torch.Generator().manual_seed(0)), 0.0
    for _ in range(200):
        V, R = torch.linalg.qr(X.mT @ (X @ V))
        top = math.sqrt(float(torch.linalg.matrix_norm(R, ord=2)))
        if abs(top - last) <= 1e-7 * top:
            break
        last = top
    return top


def _strongest_of_rest(X: Tensor, found: Tensor, generator: torch.Generator) -> Tensor | None:
    """(n,) unit vector near the strongest direction that is orthogonal to those found, (n, k)."""
    V = _random(X, _FEW, generator)
    for _ in range(3):
        V = V - found @ (found.mT @ V)
        V = X.mT @ (X @ V)
    V = V - found @ (found.mT @ V)
    norms = V.norm(dim=0)
    return V[:, norms.argmax()] / norms.max() if norms.max() > 0 else None


def _of_narrow(X: Tensor, mu: float) -> Directions:
    """All of a narrow X, or those above μ: eigenvectors of XᵀX take half of an SVD's time."""
    o, n = X.shape
    if 0 < n <= o and mu * n**0.5 >= SAFE * float(X.norm()):  # the largest value is ‖X‖_F / √n at least
        with suppress(torch.linalg.LinAlgError):  # squares that overflow
            found = _by_gram(X)
            exact = len(found.S) > 0 and 1e-100 < float(found.S[0]) <= mu / SAFE
            # on which side of μ a value lies that is as near as rounding, an SVD says
            if exact and bool(((found.S - mu).abs() > 100 * torch.finfo(X.dtype).eps * found.S[0]).all()):
                return found
    return _svd(X)


def _by_gram(X: Tensor) -> Directions:
    """All of them, from the eigenvectors of XᵀX in float64: σ² above rounding of the largest only."""
    squares, V = symmetric_eigh(_gram(X))
    squares, V = squares.flip(0), V.flip(1).to(X.dtype)
    kept = squares > 1e-12 * squares[0].clamp_min(1e-300)
    return Directions(V[:, kept], squares[kept].sqrt().to(X.dtype))


def _gram(X: Tensor) -> Tensor:
    """XᵀX in float64, some rows at a time."""
    total = X.new_zeros(X.shape[1], X.shape[1], dtype=torch.float64)
    for rows in X.split(1024):
        total.addmm_(rows.mT.double(), rows.double())
    return total


def _svd(X: Tensor) -> Directions:
    _, S, Vh = thin_svd(X)
    return Directions(Vh.mT, S)


def _cut(found: Directions, mu: float) -> Directions:
    """The directions above μ, and a start for a matrix near by: not all others, or it would grow from step to step."""
    k, near = int((mu < found.S).sum()), int((_NEXT * mu < found.S).sum()) + _SPARE
    return Directions(found.V[:, :k].clone(), found.S[:k], found.V[:, k:near].clone())


def _random(X: Tensor, columns: int, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(X.shape[1], columns, generator=generator, dtype=X.dtype)  # on the CPU: the same on any device
    return torch.linalg.qr(drawn.to(X.device)).Q
