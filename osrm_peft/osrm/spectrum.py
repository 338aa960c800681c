"""Spectrum: eigenvalues and eigenvectors of the tasks' pooled second moment. Pure: tensors in, tensors out."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from osrm_peft.checks import integer, number, shown
from osrm_peft.features.moments import FeatureMoments, symmetric

_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class PooledMoment:
    """S_¬t = mean over tasks of S_t' (n, n), float64: every task weighs the same, whatever its count.

    Attributes:
        root: (m, n) R with RᵀR = S, where all tasks know the vectors themselves and m < n; else None.
        second: (n, n) S where there is no root.
        rank_bound: S has no larger rank.
        rounding: (n,) ε, float64: up to Σ v_i² ε_i of a unit vector's energy may be rounding, see FeatureMoments.
    """

    root: Tensor | None
    second: Tensor | None
    rank_bound: int
    rounding: Tensor

    @classmethod
    def of(cls, moments: Sequence[FeatureMoments]) -> "PooledMoment":
        """Pool the tasks' moments.

        Raises:
            ValueError: no moments, or unequal widths.
        """
        if not moments:
            raise ValueError("no out-of-task moments: give the features of at least one other task")
        widths = sorted({task.width for task in moments})
        if len(widths) > 1:
            raise ValueError(
                f"the tasks' features have different widths {widths}: they are of different layers or models"
            )
        bound = min(widths[0], sum(task.rank_bound() for task in moments))
        rounding = torch.stack([task.rounding() for task in moments]).mean(0)
        roots = [root for root in (task.root() for task in moments) if root is not None]
        if len(roots) == len(moments) and sum(map(len, roots)) < widths[0]:
            return cls(torch.cat(roots) / len(roots) ** 0.5, None, bound, rounding)
        S = moments[0].second_moment()
        for task in moments[1:]:
            S += task.second_moment()
        return cls(None, S / len(moments), bound, rounding)

    def second_moment(self) -> Tensor:
        """(n, n) S."""
        if self.root is not None:
            return symmetric(self.root.mT @ self.root)
        assert self.second is not None
        return self.second

    def energy(self, A: Tensor) -> Tensor:
        """tr(A S Aᵀ) = E‖A h‖² of (r, n) A, computed in the pool's dtype; float64."""
        if self.root is not None:
            return (A.to(self.root.dtype) @ self.root.mT).double().square().sum()
        S = self.second_moment()
        return (A.to(S.dtype) @ S * A.to(S.dtype)).double().sum()

    def share(self, A: Tensor) -> float:
        """tr(A S Aᵀ) / tr S: the share of the energy that (r, n) A lets through, in [0, 1] for orthonormal rows."""
        return max(0.0, float(self.energy(A) / self.trace().clamp_min(torch.finfo(torch.float64).tiny)))

    def trace(self) -> Tensor:
        """tr S = E‖h‖², float64."""
        return (
            self.second_moment().diagonal().double().sum() if self.root is None else self.root.double().square().sum()
        )

    def times(self, V: Tensor) -> Tensor:
        """(n, m) S V."""
        return self.second_moment() @ V if self.root is None else self.root.mT @ (self.root @ V)

    def float(self) -> "PooledMoment":
        """The same in float32, to be kept."""
        root, second = (None if tensor is None else tensor.float() for tensor in (self.root, self.second))
        return PooledMoment(root, second, self.rank_bound, self.rounding)


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues and eigenvectors of a second moment S (n, n); the directions that are not in it have no energy.

    Attributes:
        energy: (m,) positive eigenvalues, largest first, float64.
        vectors: (n, m) orthonormal columns, float64.
    """

    energy: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, pool: PooledMoment) -> "Spectrum":
        """The spectrum of S_¬t; from vectors in O(m²n) without an n×n matrix, m < n their number."""
        if pool.root is not None:
            _, singular, Vh = torch.linalg.svd(pool.root, full_matrices=False)
            energy, vectors = singular.square(), Vh.mT
        else:
            energy, vectors = torch.linalg.eigh(pool.second_moment())
            energy, vectors = energy.flip(0), vectors.flip(1)
        sure = above_rounding(energy, vectors, pool.rounding)
        return cls(energy[sure][: pool.rank_bound], vectors[:, sure][:, : pool.rank_bound])

    @property
    def width(self) -> int:
        """n."""
        return len(self.vectors)

    @property
    def rank(self) -> int:
        """m, how many directions have energy."""
        return len(self.energy)

    def strongest(self, *, rank: int | None = None, energy: float | None = None) -> "Spectrum":
        """The `rank` strongest directions, or as many as hold the share `energy` of the energy; all by default."""
        if energy is not None:
            reached = self.energy.cumsum(0) >= energy * self.energy.sum() * (1 - self.width * _EPS)
            rank = 0 if energy == 0 else int((~reached).sum()) + 1
        return self if rank is None else Spectrum(self.energy[:rank], self.vectors[:, :rank])

    def root(self) -> Tensor:
        """(m, n) R with RᵀR = S."""
        return (self.vectors * self.energy.sqrt()).mT


def above_rounding(energy: Tensor, vectors: Tensor, rounding: Tensor) -> Tensor:
    """(m,) bool: which energies are more than rounding: the null space of rounded sums shows as small ones, ± alike.

    Args:
        energy: (m,) vᵀSv, largest first.
        vectors: (n, m) the v, of any length.
        rounding: (n,) ε, see FeatureMoments. It is an estimate: where energies are negative, which S has none of, they
            tell how large its rounding really is.
    """
    noise = rounding @ vectors.square() + len(vectors) * _EPS * energy[0].clamp_min(torch.finfo(energy.dtype).tiny)
    return energy > noise * (-2 * energy / noise).max().clamp_min(1)


def check_protect(rank: int | None, energy: float | None) -> tuple[int | None, float | None]:
    """`protect_rank` as an int of at least 0 or None, `protect_energy` as a float in [0, 1] or None.

    Raises:
        ValueError: another value, or both are given.
    """
    if rank is not None and energy is not None:
        raise ValueError(
            f"protect_rank={shown(rank)} and protect_energy={shown(energy)} both say how much to protect: give one"
        )
    rank = None if rank is None else integer("protect_rank", rank, 0)
    return rank, None if energy is None else number("protect_energy", energy, 0, 1)
