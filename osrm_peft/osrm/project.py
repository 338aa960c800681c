"""OSRM after the fact (paper §5.4): an adapter that is trained already, kept away from the other tasks' features."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm

from osrm_peft.adapters.experts import check_measured
from osrm_peft.adapters.factors import Factors
from osrm_peft.adapters.load import load_adapter
from osrm_peft.adapters.lora_adapter import LoraAdapter
from osrm_peft.checks import number
from osrm_peft.features.fit import check_layers, check_one_base, check_other_tasks, check_pretrained
from osrm_peft.features.task_features import TaskFeatures
from osrm_peft.hub.card import write_manifest
from osrm_peft.hub.privacy import public_name
from osrm_peft.hub.push import Pushable
from osrm_peft.hub.sources import local_folder
from osrm_peft.io.manifest import MANIFEST, command, new_folder, read_manifest, versions
from osrm_peft.osrm.others import OtherTasks, load_features, provenance_of
from osrm_peft.osrm.spectrum import PooledMoment, Spectrum
from osrm_peft.osrm.subspace import NullSpace, choose_directions
from osrm_peft.seeding import task_generator


@dataclass(frozen=True)
class LayerProjection:
    """Shares that one layer's projection from ΔW to ΔŴ kept; 1 where there was nothing to lose. Effects can also rise.

    Attributes:
        energy_kept: ‖ΔŴ‖² / ‖ΔW‖², at most 1.
        out_of_task_kept: E‖ΔŴ h‖² / E‖ΔW h‖² on the other tasks' features, each task weighing the same.
        in_task_kept: the same on the task's own features; None where they were not given.
        protected: how many of the strongest out-of-task directions ΔŴ leaves alone; None for the paper's projection.
    """

    energy_kept: float
    out_of_task_kept: float
    in_task_kept: float | None
    protected: int | None


@dataclass(frozen=True)
class Projection(Pushable):
    """A projected adapter, and what the projection cost.

    Attributes:
        adapter: plain LoRA of the same ranks, with the same heads.
        layers: {layer: LayerProjection}.
        settings: how it was made.
    """

    adapter: LoraAdapter
    layers: dict[str, LayerProjection]
    settings: dict[str, Any]

    def mean(self) -> dict[str, float]:
        """{field of LayerProjection: its mean over layers}, of those that are known."""
        columns: dict[str, list[float]] = {}
        for layer in self.layers.values():
            for key, value in asdict(layer).items():
                columns.setdefault(key, []).extend([] if value is None else [value])
        return {key: statistics.fmean(values) for key, values in columns.items() if values}

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write a stock PEFT adapter with a manifest: what it was made of, and each layer's LayerProjection.

        Raises:
            FileExistsError: `folder` holds something that is not ours, or another adapter (without `overwrite`).
        """
        source = self.adapter.source  # a folder, user/name@commit, or what a live model is called
        known = Path(source).is_dir() or "@" in source
        origin = read_manifest(local_folder(source, [MANIFEST])) if known else {}
        described: dict[str, Any] = {
            key: origin[key] for key in ("task", "num_labels", "label_names", "metric", "seed", "data") if key in origin
        }
        layers = {name: asdict(layer) for name, layer in self.layers.items()}
        manifest = {"kind": "adapter", "base_model": self.adapter.base_model, **described}
        manifest |= {"task_type": self.adapter.config.get("task_type"), "projected": self.settings, "layers": layers}
        with new_folder(folder, "adapter", manifest, overwrite) as partial:
            self.adapter.save_pretrained(partial)
            write_manifest(partial, manifest | {"command": command(), "versions": versions()})


def project_adapter(
    adapter: str | Path | PeftModel | LoraAdapter,
    out_of_task: Sequence[TaskFeatures | str | Path],
    *,
    in_task: TaskFeatures | str | Path | None = None,
    min_effect_kept: float | None = None,
    null_space: NullSpace = "random",
    protect_rank: int | None = None,
    protect_energy: float | None = None,
    seed: int = 0,
    base_model: str | None = None,
    progress: bool = False,
) -> Projection:
    r"""Project a trained adapter so that it acts less on the other tasks' features; nothing is trained.

        the paper (Zhang & Zhou, ACL 2025, §5.4):  B̂ = s B A Ãᵀ, ΔŴ = B̂ Ã, with OSRM's Ã (r, n) of each layer
        with `min_effect_kept` = ρ:  ΔŴ = s B A (I − V_p V_pᵀ), with V_p the p strongest out-of-task directions

    The first keeps what of ΔW lies in the r directions of Ã, mostly little. The second takes for each layer the largest
    p that keeps E‖ΔŴ h_t‖² ≥ ρ E‖ΔW h_t‖² on the task's own features h_t.

    Args:
        adapter: as `load_adapter` takes it; it is not changed.
        out_of_task: features of the *other* tasks, loaded or as files, of the pre-trained model.
        in_task: the task's own features: for `min_effect_kept`, `null_space="in_task"`, and to report what is kept of
            its effect.
        min_effect_kept: ρ in (0, 1]; None: the paper's projection. At 1 hardly a direction can be given up: take 0.9 to
            0.99.
        null_space, protect_rank, protect_energy, seed: how Ã is chosen where there is a choice, see `OSRMLoraConfig`;
            not with `min_effect_kept`.
        base_model: the base model of adapter and features, where they name it differently.

    Raises:
        ValueError: no features, or of other layers, widths or base models; `min_effect_kept` without `in_task`; or an
            adapter on a layer that has no features (an embedding, a convolution): no layer is passed over.
    """
    loaded = adapter if isinstance(adapter, LoraAdapter) else load_adapter(adapter)
    others = [load_features(features) for features in out_of_task]
    own = None if in_task is None else load_features(in_task)
    min_effect_kept = _checked(own, min_effect_kept, null_space, protect_rank, protect_energy)
    check_other_tasks(others, own)
    _check_fit(loaded, [*others, *([own] if own else [])], base_model)

    frame = {"null_space": null_space, "protect_rank": protect_rank, "protect_energy": protect_energy, "seed": seed}
    projector = _Projector(OtherTasks(others), own, min_effect_kept, frame)
    factors, layers = {}, {}
    for name in tqdm(loaded.shapes, desc="project", unit="layer", disable=not progress):
        factors[name], layers[name] = projector.project(name, loaded.factors[name])
    settings = {
        "adapter": loaded.source,
        "sha256": loaded.sha256,
        "out_of_task": [provenance_of(features) for features in others],
        "in_task": None if own is None else provenance_of(own),
        "min_effect_kept": min_effect_kept,
        **frame,
    }
    return Projection(replace(loaded, factors=factors, sha256=None), layers, settings)


def _checked(
    own: TaskFeatures | None, min_effect_kept: float | None, null_space: str, rank: int | None, energy: float | None
) -> float | None:
    """`min_effect_kept`, once the options agree with each other and with the features that are given."""
    if min_effect_kept is not None:
        min_effect_kept = number("min_effect_kept", min_effect_kept, 0, 1, open_low=True)
        if (null_space, rank, energy) != ("random", None, None):
            raise ValueError(
                "min_effect_kept chooses the protected directions itself: leave null_space, protect_rank and "
                "protect_energy out"
            )
    if own is None and (min_effect_kept is not None or null_space == "in_task"):
        raise ValueError("min_effect_kept and null_space='in_task' look at the task's own features: give in_task=FILE")
    return min_effect_kept


@dataclass(frozen=True)
class _Projector:
    """One way to project, for all layers.

    Attributes:
        others: the other tasks' features.
        own: the task's own, where they are known.
        min_effect_kept: ρ; None: the paper's projection.
        frame: how the paper's Ã is chosen: null_space, protect_rank, protect_energy and seed.
    """

    others: OtherTasks
    own: TaskFeatures | None
    min_effect_kept: float | None
    frame: dict[str, Any]

    def project(self, name: str, before: Factors) -> tuple[Factors, LayerProjection]:
        """One layer's factors, projected, and what is kept."""
        _, pool, spectrum = self.others.at(name)
        own = None if self.own is None else self.own.layers[name]
        own_pool = None if own is None else PooledMoment.of([own])
        L, p = _square_root(before), None
        if self.min_effect_kept is not None and own_pool is not None:
            p = _most_protected(L, spectrum, own_pool, self.min_effect_kept)
            projected = _away_from(before, spectrum.vectors[:, :p])
        else:
            choice = {key: value for key, value in self.frame.items() if key != "seed"}
            task = self.others.task if self.own is None else self.own.task
            generator = task_generator(self.frame["seed"], task, name)
            A = choose_directions(spectrum, before.rank, generator=generator, own=own, **choice)
            projected = _onto(before, A)
        after = _square_root(projected)
        return projected, LayerProjection(
            float(after.square().sum() / L.square().sum()) if L.any() else 1.0,
            _effect_kept(pool, after, L),
            None if own_pool is None else _effect_kept(own_pool, after, L),
            p,
        )


def _check_fit(adapter: LoraAdapter, features: Sequence[TaskFeatures], base_model: str | None) -> None:
    """Have all features all layers of the adapter, at their widths, and are they of its base model?"""
    widths = {name: (n,) for name, (_, _, n) in adapter.shapes.items()}
    for one in features:
        if base_model is None and public_name(adapter.base_model) not in (None, one.base_model):
            raise ValueError(
                f"the features of task {one.task!r} are of {one.base_model}, the adapter {adapter.source} is of "
                f"{adapter.base_model}: collect them on that model; if it is the same, say so with base_model=NAME"
            )
        check_pretrained(one)
        whose = f"the features of task {one.task!r}"
        check_measured(adapter.parameters, one.layers, whose, "OSRM projects adapters of linear layers alone")
        check_layers(one, widths, f"layers of {adapter.source}", "the adapter")
    check_one_base(features)


def _onto(factors: Factors, frame: Tensor) -> Factors:
    """ΔW ÃᵀÃ of (r, n) Ã with orthonormal rows."""
    B = factors.s * factors.B.double() @ (factors.A.double() @ frame.mT)
    return Factors(frame.to(factors.A.dtype), B.to(factors.B.dtype))


def _away_from(factors: Factors, V: Tensor) -> Factors:
    """ΔW (I − V Vᵀ) of (n, p) orthonormal V."""
    A = factors.A.double()
    return replace(factors, A=(A - (A @ V) @ V.mT).to(factors.A.dtype))


def _square_root(factors: Factors) -> Tensor:
    """(≤ r, n) L, float64, with LᵀL = ΔWᵀΔW, so ‖ΔW x‖ = ‖L x‖: L = T A where s·B = Q T."""
    return torch.linalg.qr(factors.s * factors.B.double()).R @ factors.A.double()


def _most_protected(L: Tensor, spectrum: Spectrum, own: PooledMoment, min_effect_kept: float) -> int:
    """The largest p with an own effect tr(L P_p S P_p Lᵀ) of at least min_effect_kept · tr(L S Lᵀ), P_p = I − V_p V_pᵀ.

    In the coordinates of V that is a sum over the pairs (i, j) with i, j ≥ p, so all p together cost O(n m²).
    """
    V = spectrum.vectors
    l = L @ V  # noqa: E741 (r, m)
    rest = L - l @ V.mT
    SV = own.times(V)  # (n, m)
    pairs = (l.mT @ l) * (V.mT @ SV)  # (m, m)
    single = 2 * (l * (rest @ SV)).sum(0)  # (m,)
    # suffix sums: over i, j ≥ p, for p = 0 … m
    square = pairs.flip(0, 1).cumsum(0).cumsum(1).diagonal()
    effect = own.energy(rest) + torch.cat([square.new_zeros(1), square + single.flip(0).cumsum(0)]).flip(0)
    good = effect >= min_effect_kept * effect[0] * (1 - 1e-12) - _rounding(own, L)
    return int(good.nonzero().max())


def _effect_kept(pool: PooledMoment, after: Tensor, before: Tensor) -> float:
    """E‖ΔŴ h‖² / E‖ΔW h‖², 1 where there is no effect but rounding."""
    effect = pool.energy(before)
    return float(pool.energy(after) / effect) if effect > _rounding(pool, before) else 1.0


def _rounding(pool: PooledMoment, L: Tensor) -> Tensor:
    """Bound on E‖L h‖² where it is 0 but for the rounding of S and of float64."""
    ours = L.shape[1] * torch.finfo(L.dtype).eps * L.square().sum() * pool.trace()
    return ours + L.square().sum(0) @ pool.rounding
