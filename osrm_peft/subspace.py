"""Choosing A: pool the other tasks' moments, take the directions of least energy. Pure: tensors in, tensors out."""

from collections.abc import Sequence

import torch
from torch import Tensor

from osrm_peft.checks import choice
from osrm_peft.moments import FeatureMoments

NULL_SPACES = ("random", "in_task")
IN_TASK = ("none", "difference", "ratio")
_EPS = torch.finfo(torch.float64).eps


def choose_directions(
    others: Sequence[FeatureMoments],
    r: int,
    *,
    generator: torch.Generator,
    own: FeatureMoments | None = None,
    null_space: str = "random",
    in_task: str = "none",
    in_task_weight: float = 0.5,
    ridge: float = 0.1,
    reference: bool = False,
) -> Tensor:
    r"""OSRM's A for one layer (Zhang & Zhou, ACL 2025, Eq. 2–4): argmin over AAᵀ = I of tr(A S_¬t Aᵀ).

    S_¬t = mean_t' S_t' over the other tasks, so each weighs the same. Where S_¬t has a null space wider than r the
    minimum is not unique: `null_space` chooses, never LAPACK. `in_task` trades the minimum for energy of task t:

        "difference":  top eigenvectors of  β S_t / tr S_t − (1 − β) S_¬t / tr S_¬t          (β = `in_task_weight`)
        "ratio":       top generalised eigenvectors of  S_t a = κ (S_¬t + ρ tr(S_¬t)/n I) a   (ρ = `ridge`)

    Args:
        others: moments of the same layer for the other tasks.
        r: number of directions.
        generator: CPU generator for the free choice in a null space; the same seed gives the same A on any device.
        own: task t's own moments; needed for `null_space="in_task"` and `in_task` other than `"none"`.
        reference: what the released code does: the last r right singular vectors of the stacked task means.
    Returns:
        (r, n) float64 with orthonormal rows.
    Raises:
        ValueError: r above n, no moments, unequal widths, or `own` missing where it is needed.
    """
    _check(others, own, r, null_space, in_task)
    if reference:
        means = torch.stack([moments.mean() for moments in others])
        return torch.linalg.svd(means, full_matrices=True).Vh[-r:]
    if in_task == "difference" and in_task_weight == 0:
        in_task = "none"  # the paper is this setting's limit
    if in_task == "none" and null_space == "random":
        return quietest_directions(others, r, generator)

    assert own is not None
    S_others, S_own = pool_second_moments(others), own.second_moment()
    if in_task == "difference":
        return _top_eigenvectors(
            in_task_weight * _unit_trace(S_own) - (1 - in_task_weight) * _unit_trace(S_others), r, generator
        )
    if in_task == "ratio":
        n = S_others.shape[0]
        M = S_others + ridge * S_others.trace() / n * torch.eye(n, dtype=S_others.dtype)
        found = _generalised_eigenvectors(S_own, M, r)
    else:
        null = _null_space(S_others, sum(moments.rank_bound() for moments in others))  # (n, d)
        if null.shape[1] <= r:
            return quietest_directions(others, r, generator)
        energy, vectors = torch.linalg.eigh(null.mT @ S_own @ null)
        found = (null @ vectors[:, -r:][:, energy[-r:] > _EPS * len(energy) * S_own.trace()]).mT
    if len(found) == r:
        return found
    # Task t's own features span fewer than r directions: the rest is the paper's choice, orthogonal to those found.
    out = torch.eye(found.shape[1], dtype=found.dtype) - found.mT @ found
    walled = out @ S_others @ out + (1 + S_others.trace()) * found.mT @ found
    return torch.cat([found, _top_eigenvectors(-walled, r - len(found), generator)])


def quietest_directions(others: Sequence[FeatureMoments], r: int, generator: torch.Generator) -> Tensor:
    """(r, n) orthonormal rows A with the least tr(A S Aᵀ), S the pooled second moment; ties go to `generator`.

    From vectors (statistics "mean" and "sample") in O(m²n) without an n×n matrix while m ≤ n − r, m their number.
    """
    n = others[0].width
    roots = [moments.root() for moments in others]
    if all(root is not None for root in roots):
        R = torch.cat(roots)  # type: ignore[arg-type]
        rows = _row_space(R)  # (m, n) orthonormal
        if len(rows) <= n - r:
            G = torch.randn(r, n, generator=generator, dtype=torch.float64)
            for _ in range(2):  # twice is enough (Kahan): the first pass leaves rounding, the second removes it
                G = G - (G @ rows.mT) @ rows
            return _orthonormal_rows(G)
    S = pool_second_moments(others)
    return _top_eigenvectors(-S, r, generator, zeros=n - sum(moments.rank_bound() for moments in others))


def pool_second_moments(moments: Sequence[FeatureMoments]) -> Tensor:
    """(n, n) mean of the tasks' second moments, float64: every task weighs the same, whatever its count."""
    return torch.stack([task.second_moment() for task in moments]).mean(0)


def energy_share(A: Tensor, moments: Sequence[FeatureMoments]) -> float:
    """tr(A S Aᵀ) / tr S for the pooled S: the share of the features' energy that A lets through, in [0, 1]."""
    S = pool_second_moments(moments)
    return float((A.double() @ S * A.double()).sum() / S.trace().clamp_min(torch.finfo(torch.float64).tiny))


def procrustes_drift(A: Tensor, A_init: Tensor) -> float:
    """min over orthogonal Q of ‖A − Q Ã‖_F / ‖Ã‖_F: how far A's rows moved, rotations within their span free.

    The orthogonal Procrustes distance of the OSRM paper's Fig. 3, D² = ‖A‖² + ‖Ã‖² − 2‖A Ãᵀ‖_*.
    """
    A, A_init = A.double(), A_init.double()
    nuclear = torch.linalg.svdvals(A @ A_init.mT).sum()
    squared = A.square().sum() + A_init.square().sum() - 2 * nuclear
    return float(squared.clamp_min(0).sqrt() / A_init.norm())


def _check(others: Sequence[FeatureMoments], own: FeatureMoments | None, r: int, null_space: str, in_task: str) -> None:
    if not others:
        raise ValueError("no out-of-task moments: give the features of at least one other task")
    widths = sorted({moments.width for moments in [*others, *([own] if own else [])]})
    if len(widths) > 1:
        raise ValueError(f"the tasks' features have different widths {widths}: they are of different layers or models")
    if not 1 <= r <= widths[0]:
        raise ValueError(f"rank r={r} must lie in 1 … {widths[0]}, the layer's input width: lower r")
    choice("null_space", null_space, NULL_SPACES)
    choice("in_task", in_task, IN_TASK)
    if own is None and (in_task != "none" or null_space == "in_task"):
        raise ValueError(
            f"in_task={in_task!r}, null_space={null_space!r} look at the task's own features: give them, "
            "or use in_task='none' and null_space='random'"
        )


def _unit_trace(S: Tensor) -> Tensor:
    return S / S.trace().clamp_min(torch.finfo(S.dtype).tiny)


def _row_space(R: Tensor) -> Tensor:
    """(rank, n) orthonormal basis of the rows of R."""
    _, singular, Vh = torch.linalg.svd(R, full_matrices=False)
    return Vh[singular > max(R.shape) * _EPS * singular.max()]


def _null_space(S: Tensor, rank_bound: int) -> Tensor:
    """(n, d) orthonormal basis of the null space of S, at least n − rank_bound wide."""
    energy, vectors = torch.linalg.eigh(S)
    below = int((energy <= len(S) * _EPS * energy[-1]).sum())
    return vectors[:, : max(below, len(S) - rank_bound)]


def _top_eigenvectors(M: Tensor, r: int, generator: torch.Generator, zeros: int = 0) -> Tensor:
    """(r, n) top eigenvectors of symmetric M as rows. Where the r-th eigenvalue is repeated, `generator` picks.

    Args:
        zeros: how many of the largest eigenvalues are known to be exactly zero (M = −S with S of known rank): the
            sums of S were rounded to float32, so its null space shows as tiny, all different eigenvalues.
    """
    values, vectors = torch.linalg.eigh(M)
    if zeros > 0:
        values[-zeros:] = 0
    tolerance = len(M) * _EPS * values.abs().max()
    cut = values[-r]
    above = vectors[:, values > cut + tolerance]  # (n, q), q < r: surely in
    tied = vectors[:, (values - cut).abs() <= tolerance]  # (n, d), d ≥ r − q: which of these is free
    missing = r - above.shape[1]
    if missing == tied.shape[1]:
        return torch.cat([above, tied], dim=1).mT
    # Projecting an n-vector makes the pick depend on the tied space alone, not on LAPACK's basis of it.
    G = torch.randn(missing, len(M), generator=generator, dtype=M.dtype) @ tied @ tied.mT
    return torch.cat([above.mT, _orthonormal_rows(G)])


def _generalised_eigenvectors(S: Tensor, M: Tensor, r: int) -> Tensor:
    """(≤ r, n) orthonormal basis of the top eigenvectors of S a = κ M a with κ > 0, M positive definite."""
    L, info = torch.linalg.cholesky_ex(M)
    if info:
        raise ValueError("S_¬t + ρ tr(S_¬t)/n I is not positive definite: give a ridge above 0")
    half = torch.linalg.solve_triangular(L, S, upper=False)  # L⁻¹ S
    values, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(L, half.mT, upper=False))  # of L⁻¹ S L⁻ᵀ
    top = vectors[:, -r:][:, values[-r:] > len(S) * _EPS * values[-1]]
    return _orthonormal_rows(torch.linalg.solve_triangular(L.mT, top, upper=True).mT)


def _orthonormal_rows(G: Tensor) -> Tensor:
    """Orthonormal basis of the rows of G, by QR with a positive diagonal: unique, so the same on every machine."""
    Q, R = torch.linalg.qr(G.mT)
    return (Q * R.diagonal().sign()).mT
