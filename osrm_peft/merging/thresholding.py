"""The singular values of a matrix above a threshold, and no others: what LoRE's steps need, in a fraction of an SVD."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

SMALL = 256  # up to this width a full SVD in float64 is quick
_TOLERANCE = 1e-5  # of the norm of what is found
_NEXT = 0.5  # of μ: as far as the directions go that are iterated
_ROUNDS = 30


class Triplets(NamedTuple):
    """Singular triplets: U (o, k), S (k,) descending, V (n, k); and in `more` (n, p) where the next ones lie about."""

    U: Tensor
    S: Tensor
    V: Tensor
    more: Tensor | None = None

    def dense(self) -> Tensor:
        """(o, n) U diag(S) Vᵀ."""
        return (self.U * self.S) @ self.V.mT

    def add_to_(self, X: Tensor, factor: float) -> Tensor:
        """X + factor · U diag(S) Vᵀ, in place."""
        return X.addmm_(self.U * self.S, self.V.mT, alpha=factor)

    def soft(self, mu: float) -> "Triplets":
        """Each singular value less μ."""
        return self._replace(S=self.S - mu)

    def distance(self, other: "Triplets | None") -> float:
        """‖this − other‖_F, without cancellation and without an (o, n) matrix; None is 0."""
        if other is None:
            return float(self.S.norm())
        left = torch.linalg.qr(torch.cat([self.U, other.U], 1)).R
        right = torch.linalg.qr(torch.cat([self.V, other.V], 1)).R
        return float(((left * torch.cat([self.S, -other.S])) @ right.mT).norm())


def above(X: Tensor, mu: float, start: Triplets | None = None) -> Triplets:
    """The singular triplets of (o, n) X with σ > μ.

    Up to a width of 256 by a full SVD. Wider: subspace iterations from `start` (those of a matrix near by) or from
    random directions, until what is left of XV − US changes SVT(X; μ) by 10⁻⁵ at most, and power iterations find
    nothing above μ in the rest; where more than a quarter of all directions are needed, by the eigenvectors of the
    smaller Gram matrix.
    """
    narrow = min(X.shape)
    if narrow <= SMALL:
        return _cut(_svd(X), mu)
    generator = torch.Generator(X.device).manual_seed(0)
    V = _random(X, 32 if start is None or start.more is None else 4, generator)
    if start is not None and start.more is not None:
        V = torch.cat([start.V, start.more, V], 1)
    found: Triplets | None = None
    for _ in range(_ROUNDS):
        if V.shape[1] > narrow // 4:
            break
        Y = X @ V
        if found is not None:
            wanted, misfit = _cut(found, mu), Y[:, : len(found.S)] - found.U * found.S
            k = len(wanted.S)
            # What is left lies in directions with σ ≤ S[-1], and moves U(Σ − μ)Vᵀ by (σ − μ)/(σ − S[-1]) of itself.
            share = (wanted.S - mu) / (wanted.S - found.S[-1]).clamp_min(torch.finfo(X.dtype).tiny)
            allowed = _TOLERANCE * (wanted.S - mu).norm()
            settled = bool((misfit[:, :k] * share.clamp_max(1)).norm() <= allowed) and bool(found.S[-1] <= _NEXT * mu)
            # Near a value s that is found to r lies a singular value of at most s + r: may it be above μ?
            below = found.S[k:] + misfit[:, k:].norm(dim=0) <= mu + allowed + 1e-6 * mu
            if settled and bool(below.all()):
                missed = _strongest_of_rest(X, found, generator)
                if missed is None or float((X @ missed).norm()) <= mu:
                    return wanted
                Y = torch.cat([Y, X @ missed[:, None]], 1)
        Q = torch.linalg.qr(Y).Q
        basis, R = torch.linalg.qr(X.mT @ Q)
        u, S, vh = torch.linalg.svd(R.mT, full_matrices=False)
        found = Triplets(Q @ u, S, basis @ vh.mT)
        V = found.V
        if S[-1] > _NEXT * mu:  # too few directions to tell, or too close to the next to settle soon
            V = torch.cat([V, _random(X, max(8, V.shape[1] // 2), generator)], 1)
    return _cut(_by_gram(X), mu)


def strongest(X: Tensor, rank: int) -> Triplets:
    """The singular triplets of the `rank` largest singular values."""
    found = _svd(X) if min(X.shape) <= SMALL else _by_gram(X)
    return Triplets(found.U[:, :rank], found.S[:rank], found.V[:, :rank])


def top_value(X: Tensor) -> float:
    """The largest singular value of (o, n) X."""
    if min(X.shape) <= SMALL:
        return float(torch.linalg.matrix_norm(X, ord=2))
    V, last = _random(X, 8, torch.Generator(X.device).manual_seed(0)), 0.0
    for _ in range(200):
        V, R = torch.linalg.qr(X.mT @ (X @ V))
        top = math.sqrt(float(torch.linalg.matrix_norm(R, ord=2)))
        if abs(top - last) <= 1e-7 * top:
            break
        last = top
    return top


def _strongest_of_rest(X: Tensor, found: Triplets, generator: torch.Generator) -> Tensor | None:
    """(n,) unit vector near the strongest direction that is orthogonal to those found."""
    V = _random(X, 2, generator)
    for _ in range(3):
        V = V - found.V @ (found.V.mT @ V)
        V = X.mT @ (X @ V)
    V = V - found.V @ (found.V.mT @ V)
    norms = V.norm(dim=0)
    return V[:, norms.argmax()] / norms.max() if norms.max() > 0 else None


def _by_gram(X: Tensor) -> Triplets:
    """All of them, from the eigenvectors of XᵀX or XXᵀ in float64: σ² above rounding of the largest only."""
    if len(X) < X.shape[1]:
        turned = _by_gram(X.mT)
        return Triplets(turned.V, turned.S, turned.U)
    squares, V = torch.linalg.eigh((X.mT @ X) if X.dtype == torch.float64 else _gram(X))
    squares, V = squares.flip(0), V.flip(1)
    V = V[:, squares > 1e-12 * squares[0].clamp_min(1e-300)]
    Y = X @ V.to(X.dtype)
    S = Y.norm(dim=0)
    return Triplets(Y / S.clamp_min(torch.finfo(X.dtype).tiny), S, V.to(X.dtype))


def _gram(X: Tensor) -> Tensor:
    """XᵀX in float64, some rows at a time."""
    total = X.new_zeros(X.shape[1], X.shape[1], dtype=torch.float64)
    for rows in X.split(1024):
        total.addmm_(rows.mT.double(), rows.double())
    return total


def _svd(X: Tensor) -> Triplets:
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    return Triplets(U, S, Vh.mT)


def _cut(found: Triplets, mu: float) -> Triplets:
    k = int((mu < found.S).sum())
    return Triplets(found.U[:, :k], found.S[:k], found.V[:, :k], found.V[:, k:])


def _random(X: Tensor, columns: int, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(X.shape[1], columns, generator=generator, device=X.device, dtype=X.dtype)
    return torch.linalg.qr(drawn).Q
