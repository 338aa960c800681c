"""How far adapters read the same directions of a layer's inputs, and write the same ones of its outputs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from osrm_peft.merging.lowrank import product_bases

ALIKE = 0.81  # the least share of a space that counts as shared: that of principal cosines of 0.9
_HALF = 0.5  # of all directions: larger spaces share some whatever they are


@dataclass(frozen=True)
class Overlap:
    """The spaces of T adapters in one layer, in pairs: those of the rows of B·A (for A), or of its columns (for B).

    c_1 ≥ … ≥ c_k are the cosines of the principal angles between spaces of r and r′ dimensions, k = min(r, r′); r is
    the numerical rank of the product B·A, so a factor of lower rank or of zeros counts for what it does. A pair with a
    space of no dimension, such as that of an adapter without the layer, is nan.

    Attributes:
        shared: (T, T) float64, Σ c_i² / k: the share of the smaller space that lies in the other.
        largest: (T, T) float64, c_1.
        random: (T, T) float64, max(r, r′) / n, the mean of `shared` for random spaces of n dimensions (o for B).
        tsv: Σ σ_i / Σ r, the mean singular value of the T orthonormal bases side by side: the mean inner product of a
            direction and what TSV-M puts in its place. 1: they are orthogonal; 1/√T: they are the same.
    """

    shared: Tensor
    largest: Tensor
    random: Tensor
    tsv: float


def overlaps(products: Sequence[tuple[Tensor, Tensor]]) -> tuple[Overlap, Overlap]:
    """(of A, of B) of one layer, from QR of each factor: no o×n, n×n or o×o matrix.

    Args:
        products: (B (o, r_j), A (r_j, n)) of each adapter, any ranks.
    """
    columns, rows = zip(*(product_bases(B, A) for B, A in products), strict=True)
    return _overlap(rows), _overlap(columns)


def mean_overlap(layers: Iterable[Overlap]) -> Overlap:
    """The mean over layers; a pair counts in those where both have a space."""
    found = list(layers)

    def mean(name: str) -> Tensor:
        return torch.stack([getattr(one, name) for one in found]).nanmean(0)

    tsv = torch.tensor([one.tsv for one in found], dtype=torch.float64).nanmean()
    return Overlap(mean("shared"), mean("largest"), mean("random"), float(tsv))


def sharing(tasks: Sequence[str], layers: Iterable[Overlap]) -> list[str]:
    """The tasks with the same space as another, to cosines of about 0.9, in most of the layers that both have.

    Spaces of more than half of all directions do not count: they overlap whatever they are.
    """
    votes = torch.stack([torch.where(one.random <= _HALF, one.shared, torch.nan) for one in layers])
    most = ((votes >= ALIKE).sum(0) > 0.5 * votes.isfinite().sum(0)).fill_diagonal_(False)
    return [task for task, one in zip(tasks, most, strict=True) if one.any()]


def _overlap(bases: Sequence[Tensor]) -> Overlap:
    """Of (n, r_j) orthonormal bases."""
    ranks = [basis.shape[1] for basis in bases]
    inner = torch.cat(list(bases), 1)
    inner = inner.mT @ inner  # (Σr, Σr), blocks Q_iᵀ Q_j
    shared, largest, random = torch.full((3, len(bases), len(bases)), torch.nan, dtype=torch.float64)
    starts = torch.tensor([0, *ranks]).cumsum(0).tolist()
    for i, j in combinations(range(len(bases)), 2):
        if ranks[i] and ranks[j]:
            block = inner[starts[i] : starts[i + 1], starts[j] : starts[j + 1]]
            cosines = torch.linalg.svdvals(block).clamp_max(1)
            shared[i, j] = shared[j, i] = cosines.square().mean()
            largest[i, j] = largest[j, i] = cosines[0]
            random[i, j] = random[j, i] = max(ranks[i], ranks[j]) / len(bases[0])
    for i, rank in enumerate(ranks):
        if rank:
            shared[i, i], largest[i, i], random[i, i] = 1, 1, rank / len(bases[0])
    total = sum(ranks)
    squares = torch.linalg.eigvalsh(inner).clamp_min(0)  # σ² of all bases side by side
    return Overlap(shared, largest, random, float(squares.sqrt().sum()) / total if total else torch.nan)
