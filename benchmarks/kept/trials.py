"""Merges on trial: from the same files as the registered ones, which know them in the study's process alone."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kept.settings import Merge
from osrm_peft.adapters.factors import Factors
from osrm_peft.features.moments import FeatureMoments
from osrm_peft.merging.lowrank import balanced, compress, cross_energies
from osrm_peft.merging.methods.iso import iso
from osrm_peft.merging.methods.registry import register
from osrm_peft.merging.methods.regmean import regmean
from osrm_peft.merging.methods.tsv import tsv
from osrm_peft.merging.rules import normal_equations, solve
from osrm_peft.merging.spaces import enter
from osrm_peft.osrm.spectrum import PooledMoment


def filtered(tau: Tensor, weights: Tensor, *, ridge: float = 0.1) -> Tensor:
    """argmin_W Σ_t c_t ‖(W − τ_t) τ_tᵀ‖² + ρ ‖W‖² with c_t = ‖τ_t‖⁻²: a task's own rows stand for its inputs."""
    theta = tau.double() * weights.double()[:, None, None]
    reads = theta.mT @ theta / theta.square().sum((1, 2)).clamp_min(1e-300)[:, None, None]  # (T, q, q), each of trace 1
    total = reads.sum(0)
    total += ridge * total.trace() / len(total) * torch.eye(len(total), dtype=total.dtype)
    return torch.linalg.solve(total, (theta @ reads).sum(0), left=False).to(tau.dtype)


def whitened(
    factors: Sequence[Factors | None], weights: Tensor, gram: Sequence[FeatureMoments], *, ridge: float = 0.1,
    inner: str = "tsv",
) -> Factors:  # fmt: skip
    """TSV-M (or Iso-C) of τ_t S^½, times S^−½, with S the mean of the tasks' second moments and a ridge."""
    S = PooledMoment.of(gram).second_moment()
    values, V = torch.linalg.eigh(S)
    root = (values.clamp_min(0) + ridge * values.sum() / len(values)).sqrt()
    into, out = (V * root) @ V.mT, (V / root) @ V.mT
    layer = enter("core", [None if f is None else Factors(f.A.double() @ into, f.B, f.s) for f in factors])
    merged = layer.compress((tsv if inner == "tsv" else iso)(layer.stack, weights)).factors
    return Factors(merged.A @ out, merged.B, merged.s)


def balanced_regmean(
    factors: Sequence[Factors | None], weights: Tensor, gram: Sequence[FeatureMoments], *, ridge: float = 0.01,
    off_diagonal: float = 1.0,
) -> Factors:  # fmt: skip
    """RegMean with each task's error relative to its own effect: weights E‖τ_t h_t‖⁻²."""
    found = _own_effects(factors, gram)
    return regmean(factors, weights.double() / found, gram, off_diagonal=off_diagonal, ridge=ridge)


def kept_norm(
    factors: Sequence[Factors | None], weights: Tensor, gram: Sequence[FeatureMoments], *, inner: str = "weights"
) -> Factors:
    """A merge rescaled so that effects stay: Σ_t E‖W h_t‖² = Σ_t E‖τ_t h_t‖²."""
    merged = _merged(inner, factors, weights.double(), gram)
    whole = merged.s * merged.B.double(), merged.A.double()
    effects = torch.stack([cross_energies([whole], one)[0, 0] for one in gram])
    return Factors(merged.A, (_own_effects(factors, gram).sum() / effects.sum()).sqrt() * merged.B, merged.s)


def _merged(inner: str, factors: Sequence[Factors | None], weights: Tensor, gram: Sequence[FeatureMoments]) -> Factors:
    """A registered merge, under the name of what is tried with it."""
    if inner == "weights":
        products = _products(factors)
        w = solve(*normal_equations(products, gram)) * weights
        B = torch.cat([one * B for one, (B, _) in zip(w, products, strict=True)], 1)
        return compress(B, torch.cat([A for _, A in products])).factors
    layer = enter("core", factors)
    if inner == "sum":
        return layer.compress(torch.einsum("t,ton->on", weights, layer.stack)).factors
    return layer.compress((tsv if inner == "tsv" else iso)(layer.stack, weights)).factors


def _products(factors: Sequence[Factors | None]) -> list[tuple[Tensor, Tensor]]:
    shape = next((len(f.B), f.A.shape[1]) for f in factors if f is not None)
    empty = torch.zeros(shape[0], 0, dtype=torch.float64), torch.zeros(0, shape[1], dtype=torch.float64)
    return [empty if f is None else balanced(f) for f in factors]


def _own_effects(factors: Sequence[Factors | None], gram: Sequence[FeatureMoments]) -> Tensor:
    """(T,) E‖τ_t h_t‖²."""
    pairs = zip(_products(factors), gram, strict=True)
    return torch.stack([cross_energies([product], one)[0, 0] for product, one in pairs])


def register_trials() -> None:
    """Make the trials known to `merge_adapters`, in this process."""
    register("trial_filtered", paper="a trial", commutes=True)(filtered)
    for fn in (whitened, balanced_regmean, kept_norm):
        register(f"trial_{fn.__name__}", paper="a trial", spaces=("factors",), needs="gram")(fn)


def _trials() -> Iterator[Merge]:
    by_features = {"method": "task_arithmetic", "weights": "features"}
    yield "TA", {"method": "task_arithmetic"}, 0.3, (0.3, 0.45, 0.6)
    yield "TA, weights by features", by_features, 1.0, (1.0,)
    yield "TSV-M", {"method": "tsv"}, 1.0, (0.5, 0.75, 1.0)
    for method in ("tsv", "iso", "ties"):
        yield f"{method}, λ by features", {"method": method, "scale": "features"}, None, ()
    for inner in ("weights", "sum", "tsv", "iso"):
        yield f"{inner}, norm kept", _by("trial_kept_norm", inner=inner), 1.0, (1.0,)
    for inner, ridge in (("tsv", 1.0), ("iso", 0.1)):
        yield f"whitened {inner}, ρ {ridge:g}", _by("trial_whitened", ridge=ridge, inner=inner), 1.0, (0.75, 1.0)
    yield "RegMean by features, ρ 0.01", _by("regmean", ridge=0.01), 1.0, (1.0,)
    yield "RegMean by features, balanced, ρ 0.01", _by("trial_balanced_regmean", ridge=0.01), 1.0, (1.0,)
    yield "filtered, ρ 1", {"method": "trial_filtered", "ridge": 1.0}, 1.0, (1.0,)
    for rank in (16, 8):
        cut = {"rank": rank, "cut": "features"}
        yield f"TSV-M, rank {rank}", {"method": "tsv", "rank": rank}, 1.0, (1.0,)
        yield f"TSV-M, rank {rank} by features", {"method": "tsv"} | cut, 1.0, (1.0,)
        yield f"TA, weights by features, rank {rank}", by_features | {"rank": rank}, 1.0, (1.0,)
        yield f"TA, weights and rank {rank} by features", by_features | cut, 1.0, (1.0,)


def _by(name: str, **options: Any) -> dict[str, Any]:
    return {"method": name, "statistics": "features", **options}


TRIALS: tuple[Merge, ...] = tuple(_trials())
