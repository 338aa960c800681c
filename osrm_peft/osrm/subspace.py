"""Choosing A: the directions in which the other tasks have the least energy. Pure: tensors in, tensors out."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from osrm_peft.checks import choice, integer
from osrm_peft.features.moments import FeatureMoments
from osrm_peft.osrm.spectrum import PooledMoment, Spectrum, above_rounding, check_protect

NullSpace = Literal["random", "in_task"]
Objective = Literal["least_energy", "difference", "ratio"]
_EPS = torch.finfo(torch.float64).eps


def choose_directions(
    others: Spectrum,
    r: int,
    *,
    generator: torch.Generator,
    own: FeatureMoments | None = None,
    null_space: NullSpace = "random",
    objective: Objective = "least_energy",
    in_task_weight: float = 0.5,
    ridge: float = 0.1,
    protect_rank: int | None = None,
    protect_energy: float | None = None,
) -> Tensor:
    r"""OSRM's A for one layer (Zhang & Zhou, ACL 2025, Eq. 2–4): argmin over AAᵀ = I of tr(A S_¬t Aᵀ).

    Where S_¬t has a null space wider than r the minimum is not unique: `null_space` chooses, never LAPACK. `protect_…`
    widens it: only the strongest directions of S_¬t count. `objective` trades the minimum for energy of task t:

        "difference":  top eigenvectors of  β S_t / tr S_t − (1 − β) S_¬t / tr S_¬t          (β = `in_task_weight`)
        "ratio":       top generalised eigenvectors of  S_t a = κ (S_¬t + ρ tr(S_¬t)/n I) a   (ρ = `ridge`)

    Args:
        others: the spectrum of S_¬t, pooled from the other tasks' moments of the same layer.
        r: number of directions.
        generator: CPU generator for the free choice in a null space; the same seed gives the same A on any device.
        own: task t's own moments; needed for `null_space="in_task"` and `objective` other than `"least_energy"`.
        protect_rank, protect_energy: the p strongest directions, or as many as hold this share of the energy.
    Returns:
        (r, n) float64 with orthonormal rows.
    Raises:
        ValueError: r above n, unequal widths, or `own` missing where it is needed.
    """
    _check(others, own, r, null_space, objective)
    protect_rank, protect_energy = check_protect(protect_rank, protect_energy)
    others = others.strongest(rank=protect_rank, energy=protect_energy)
    if objective == "difference" and in_task_weight == 0:
        objective = "least_energy"  # the paper is this setting's limit
    if objective == "least_energy" and (null_space == "random" or others.width - others.rank <= r):
        return quietest_directions(others, r, generator)
    assert own is not None
    if objective == "difference":
        S = others.root().mT @ others.root()
        R = Spectrum.of(
            PooledMoment.of([own])
        ).root()  # what is rounding in the own features is 0, and the seed's to choose
        M = in_task_weight * _unit_trace(R.mT @ R) - (1 - in_task_weight) * _unit_trace(S)
        values, vectors = torch.linalg.eigh(M)
        return _top(values, vectors, r, generator)
    found = (
        _free_directions(others, own, r) if objective == "least_energy" else _ratio_directions(others, own, r, ridge)
    )
    if len(found) == r:
        return found
    # Task t's own features span fewer than r directions: the rest is the paper's choice, orthogonal to those found.
    return torch.cat([found, quietest_directions(others, r - len(found), generator, beside=found)])


def quietest_directions(
    others: Spectrum, r: int, generator: torch.Generator, *, beside: Tensor | None = None
) -> Tensor:
    """(r, n) orthonormal rows A with the least tr(A S Aᵀ), orthogonal to the rows `beside`; ties go to `generator`."""
    n, m, V = others.width, others.rank, others.vectors
    found = V.new_zeros(0, n) if beside is None else beside
    if m + len(found) <= n - r:
        G = torch.randn(r, n, generator=generator, dtype=V.dtype).to(V.device)
        walls = V.mT if len(found) == 0 else _row_space(torch.cat([V.mT, found]))
        return _orthonormal_rows(_project_off(G, walls))
    if len(found) == 0:
        values, vectors = torch.cat([others.energy, V.new_zeros(n - m)]), torch.cat([V, _complement(V)], 1)
        return _top(-values, vectors, r, generator)
    C = _complement(found.mT)  # (n, n − q)
    values, vectors = torch.linalg.eigh((others.root() @ C).mT @ (others.root() @ C))
    values[: max(0, C.shape[1] - m)] = 0
    return _top(-values, C @ vectors, r, generator)


def reference_directions(others: Sequence[FeatureMoments], r: int) -> Tensor:
    """(r, n) float64, what the released OSRM code does: the last r right singular vectors of the stacked task means."""
    means = torch.stack([task.mean() for task in others])
    _check_rank(r, means.shape[1])
    return torch.linalg.svd(means, full_matrices=True).Vh[-r:]


def procrustes_drift(A: Tensor, A_init: Tensor) -> float:
    """min over orthogonal Q of ‖A − Q Ã‖_F / ‖Ã‖_F: how far A's rows moved, rotations within their span free.

    The orthogonal Procrustes distance of the OSRM paper's Fig. 3, D² = ‖A‖² + ‖Ã‖² − 2‖A Ãᵀ‖_*.
    """
    A, A_init = A.double(), A_init.double()
    nuclear = torch.linalg.svdvals(A @ A_init.mT).sum()
    squared = A.square().sum() + A_init.square().sum() - 2 * nuclear
    return float(squared.clamp_min(0).sqrt() / A_init.norm())


def _check(others: Spectrum, own: FeatureMoments | None, r: int, null_space: str, objective: str) -> None:
    if own is not None and own.width != others.width:
        raise ValueError(f"the tasks' features have different widths {sorted([own.width, others.width])}: "
                         "they are of different layers or models")  # fmt: skip
    _check_rank(r, others.width)
    choice("null_space", null_space, get_args(NullSpace))
    choice("objective", objective, get_args(Objective))
    if own is None and (objective != "least_energy" or null_space == "in_task"):
        raise ValueError(
            f"objective={objective!r}, null_space={null_space!r} look at the task's own features: give them, "
            "or use objective='least_energy' and null_space='random'"
        )


def _check_rank(r: int, n: int) -> None:
    if integer("rank r", r, 1) > n:
        raise ValueError(f"rank r={r} must lie in 1 … {n}, the layer's input width: lower r")


def _free_directions(others: Spectrum, own: FeatureMoments, r: int) -> Tensor:
    """(≤ r, n) orthonormal, of the directions that `others` leave free those with most of the own energy."""
    V, R = others.vectors, own.root()
    if R is not None:
        _, singular, Vh = torch.linalg.svd(_project_off(R, V.mT), full_matrices=False)
        energy, rows = singular.square(), Vh
    else:
        S = own.second_moment()
        energy, vectors = torch.linalg.eigh(_project_off(_project_off(S, V.mT).mT, V.mT))
        energy, rows = energy.flip(0), vectors.mT.flip(0)
    rows = rows[above_rounding(energy, rows.mT, own.rounding())][:r]
    return _orthonormal_rows(_project_off(rows, V.mT))


def _ratio_directions(others: Spectrum, own: FeatureMoments, r: int, ridge: float) -> Tensor:
    """(≤ r, n) orthonormal basis of the top eigenvectors of S_t a = κ M a with κ > 0, M = S_¬t + ρ tr(S_¬t)/n I.

    With a = M^-½ u they are those of M^-½ S_t M^-½ u = κ u.
    """
    V, e = others.vectors, others.energy
    floor = ridge * e.sum() / others.width if len(e) else e.new_ones(())  # nothing to protect: the own energy alone

    def whiten(X: Tensor) -> Tensor:  # X M^-½
        return X * floor**-0.5 + (X @ V * ((e + floor) ** -0.5 - floor**-0.5)) @ V.mT

    R = own.root()
    if R is not None:
        _, singular, rows = torch.linalg.svd(whiten(R), full_matrices=False)
        kappa = singular.square()
    else:
        kappa, vectors = torch.linalg.eigh(whiten(whiten(own.second_moment()).mT))
        kappa, rows = kappa.flip(0), vectors.mT.flip(0)
    found = whiten(rows)  # not orthonormal yet: κ is the own energy of these
    return _orthonormal_rows(found[above_rounding(kappa, found.mT, own.rounding())][:r])


def _top(values: Tensor, vectors: Tensor, r: int, generator: torch.Generator) -> Tensor:
    """(r, n) of the orthonormal columns `vectors` those with the largest `values`, as rows.

    Where the r-th value is repeated, `generator` picks.
    """
    tolerance = len(vectors) * _EPS * values.abs().max()
    cut = values.sort().values[-r]
    above = vectors[:, values > cut + tolerance]  # (n, q), q < r: surely in
    tied = vectors[:, (values - cut).abs() <= tolerance]  # (n, d), d ≥ r − q: which of these is free
    missing = r - above.shape[1]
    if missing == tied.shape[1]:
        return torch.cat([above, tied], dim=1).mT
    # Projecting an n-vector makes the pick depend on the tied space alone, not on LAPACK's basis of it.
    G = torch.randn(missing, len(vectors), generator=generator, dtype=vectors.dtype).to(tied.device) @ tied @ tied.mT
    return torch.cat([above.mT, _orthonormal_rows(G)])


def _unit_trace(S: Tensor) -> Tensor:
    return S / S.trace().clamp_min(torch.finfo(S.dtype).tiny)


def _row_space(R: Tensor) -> Tensor:
    """(rank, n) orthonormal basis of the rows of R."""
    _, singular, Vh = torch.linalg.svd(R, full_matrices=False)
    return Vh[singular > max(R.shape) * _EPS * singular.max()]


def _complement(V: Tensor) -> Tensor:
    """(n, n − m) orthonormal basis of what (n, m) orthonormal V leaves."""
    return torch.linalg.qr(V, mode="complete").Q[:, V.shape[1] :]


def _project_off(X: Tensor, rows: Tensor) -> Tensor:
    """X without its part in the span of orthonormal `rows`."""
    for _ in range(2):  # twice is enough (Kahan): the first pass leaves rounding, the second removes it
        X = X - (X @ rows.mT) @ rows
    return X


def _orthonormal_rows(G: Tensor) -> Tensor:
    """Orthonormal basis of the rows of G, by QR with a positive diagonal: unique, so the same on every machine."""
    Q, R = torch.linalg.qr(G.mT)
    return (Q * R.diagonal().sign()).mT
