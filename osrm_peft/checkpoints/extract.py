"""extract_adapter: the difference between a fine-tuned model and its base as a LoRA adapter, from disk to disk."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from osrm_peft.adapters.config import CONFIG, defaults
from osrm_peft.adapters.experts import layers_of, owners, parameter_of, targets_of
from osrm_peft.adapters.factors import Factors, FactorsOnDemand, TensorsOnDemand
from osrm_peft.adapters.keys import PREFIX, is_head
from osrm_peft.adapters.lora_adapter import WEIGHTS, LoraAdapter
from osrm_peft.checkpoints.config_checks import shown
from osrm_peft.checkpoints.extracting import FACTORS, KINDS, ExtractPlan, Kind, plan_extract, rows_of
from osrm_peft.checkpoints.model_files import ModelFiles
from osrm_peft.checkpoints.resumable import carry_out
from osrm_peft.io.json import write_json
from osrm_peft.io.manifest import check_replaceable, read_manifest
from osrm_peft.io.tensors import file_head
from osrm_peft.merging.lowrank import SERVING, Compressed, compress, compress_matrix
from osrm_peft.merging.methods.svt import leading

_ROUNDING = 1e-6  # of a layer's energy: what a model's dtype may have added to a difference of low rank
_EXACT = 1024  # the width up to which a dense SVD in float64 is quick

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extraction:
    """What `extract_adapter` has written.

    Attributes:
        folder: the adapter's.
        rank: as written.
        energy_kept: {layer: share of ‖W_tuned − W_base‖² that its LoRA keeps}.
        energy: the same of the whole model: what LoRA and the modules that are kept whole hold of all that changed.
        kept: the parameters that are kept whole.
        lost: {parameter: share of all that changed} of parameters that changed and are not in the adapter.
        serving: with `rank="serving"`, {rank up to it: what the layer would keep that loses most by it}.
    """

    folder: Path
    rank: int
    energy_kept: dict[str, float]
    energy: float
    kept: list[str]
    lost: dict[str, float]
    serving: dict[int, float]


def extract_adapter(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    rank: int | Literal["serving"] = 16,
    keep: Sequence[Kind] = KINDS,
    dtype: FACTORS = "float32",
    resume: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    progress: bool = False,
) -> Extraction:
    """Write the difference between a fine-tuned model and its base as a LoRA adapter, which stock PEFT loads.

    Each linear layer's W_tuned − W_base, and that of each expert in a stack, is cut to its largest singular values: of
    all rank-r matrices that is the nearest. One layer is in memory at a time. Embeddings, norms and heads that changed
    are kept whole (`modules_to_save`). Biases of linear layers have no place in an adapter that can be merged: those
    that changed are lost, and named in the result, the manifest and a warning.

    Args:
        base: the model that `tuned` was trained from: a folder that `save_pretrained` wrote, or Hub id.
        tuned: the same of the fine-tuned model. Safetensors only.
        out: the adapter's folder.
        rank: the largest. `"serving"`: the least of vLLM's 8, 16, 32, 64, 128, 256, 320 and 512 that keeps all but
            10⁻⁶ of every layer's energy, else 512.
        keep: the kinds that are kept whole: `"embeddings"`, `"norms"`, `"heads"` and `"others"` (convolutions,
            routers). What changed and is not kept is lost, and named.
        dtype: of the factors. What is kept whole has its own.
        resume: go on with an interrupted work of the same inputs and options: finished layers are kept.
        overwrite: replace another result, or what an interrupted work has finished.
        verify: compare the weight files with the checksums in their manifests, if one of our merges wrote them.
        progress: show a bar.

    Raises:
        TypeError, ValueError, FileNotFoundError: bad options, models that are not alike, damaged or pickled files.
        FileExistsError, OSError: something else is in `out`, another process writes there, or the disk is full.
    """
    folder = check_replaceable(out, "adapter")
    plan = plan_extract(base, tuned, rank=rank, keep=keep, dtype=dtype)
    return execute(plan, folder, resume=resume, overwrite=overwrite, verify=verify, progress=progress)


def execute(
    plan: ExtractPlan,
    out: Path,
    **how: bool,
) -> Extraction:
    """Extract as planned; `how` has resume, overwrite, verify and progress, see `carry_out`."""
    carry_out(plan, lambda: Extractor(plan), partial(_finish, plan), out, **how)
    made = read_manifest(out)
    found = Extraction(
        out, made["written_rank"], made["energy_kept"], made["energy"], list(plan.kept), made["lost"],
        {int(one): kept for one, kept in made.get("serving", {}).items()},
    )  # fmt: skip
    if found.lost:
        names = ", ".join(map(shown, list(found.lost)[:4])) + (" and more" if len(found.lost) > 4 else "")
        logger.warning(
            "%d tensors changed that the adapter does not hold, %.2g of all that changed (‖Δ‖²): %s",
            len(found.lost), sum(found.lost.values()), names,
        )  # fmt: skip
    return found


class Extractor:
    """The factors of each layer; a layer's are made together, when the first is asked for."""

    summary: list[Any] | None = None

    def __init__(self, plan: ExtractPlan) -> None:
        self.plan = plan
        self._made: dict[str, Tensor] = {}

    def summarise(self, known: list[Any] | None) -> None:
        """Nothing: each layer stands for itself."""

    def close(self) -> None:
        """Nothing is held."""

    def blocks(self, names: Sequence[str]) -> Iterator[list[Tensor]]:
        """Yield factors and layers' energies (share kept, ‖Δ‖²), each alone in a list."""
        for name in names:
            if name not in self._made:
                layer = name.rpartition("|")[0]
                parts = [f"{layer}|A", f"{layer}|B", f"{layer}|energy"]
                self._made = dict(zip(parts, self._factors(layer), strict=True))
            yield [self._made.pop(name)]

    def _factors(self, layer: str) -> tuple[Tensor, Tensor, Tensor]:
        plan, tensor = self.plan, self.plan.weights[layer]
        delta = self._of(plan.tuned, layer) - self._of(plan.base, layer)
        if not delta.isfinite().all():
            raise ValueError(f"{shown(tensor)!r} holds NaN or Inf in the tuned model or the base: download it again")
        rank = plan.shapes[f"{layer}|A"][0]
        found = nearest(delta.mT if plan.layers[layer] else delta, rank)
        pad, dtype = rank - found.factors.rank, plan.dtypes[f"{layer}|A"]
        A = torch.nn.functional.pad(found.factors.A, (0, 0, 0, pad)).to(dtype)
        B = torch.nn.functional.pad(found.factors.B, (0, pad)).to(dtype)
        energy = torch.tensor([found.energy_kept, float(delta.square().sum())], dtype=torch.float64)
        return A, B, energy

    def _of(self, files: ModelFiles, layer: str) -> Tensor:
        """A layer's weight in a model's files, float64; of a stack one expert's."""
        tensor, parameter = self.plan.weights[layer], parameter_of(layer, self.plan.parameters)
        if parameter in (None, layer):
            return files.read(tensor).double()
        number = int(layer.rpartition(".")[2])
        return files.read(tensor, number, number + 1).view(files.tensors[tensor].shape[1:]).double()


def nearest(X: Tensor, rank: int) -> Compressed:
    """The nearest (o, n) matrix to X of this rank: to rounding up to a width of 1,024, above to 10⁻⁶ of its energy."""
    square = float(X.square().sum())
    if min(X.shape) <= _EXACT or square == 0:
        return compress_matrix(X, rank)
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    V = torch.linalg.qr(leading(X.to(place, torch.float32), rank).V.to(X)).Q
    kept = X @ V
    return Compressed(compress(kept, V.mT).factors, float(kept.square().sum()) / square)


def _finish(plan: ExtractPlan, folder: Path, sums: Mapping[str, list[str]]) -> dict[str, Any]:
    """Join the layers' files to an adapter; further fields of the manifest."""
    files = {names[0].rpartition("|")[0]: folder / file for file, names in plan.shards}

    def part(layer: str, name: str) -> Tensor:
        with safe_open(files[layer], framework="pt") as file:
            return file.get_tensor(f"{layer}|{name}")

    read = {layer: part(layer, "energy").tolist() for layer in files}
    parameters, energies = _changed(plan, read)
    if not energies and not plan.kept:
        raise ValueError("the tuned model is the base: none of its tensors differs")
    if not energies:
        raise ValueError(f"no linear layer differs, only {', '.join(plan.saved[:4])}: LoRA has nothing to hold")
    squares = {layer: part(layer, "A").double().square().sum(1).square() for layer in energies}  # σ², balanced factors

    def kept_at(rank: int, layer: str) -> float:
        whole = float(squares[layer].sum())
        return energies[layer][0] * (float(squares[layer][:rank].sum()) / whole if whole else 1.0)

    least = {rank: min(kept_at(rank, layer) for layer in energies) for rank in SERVING}
    serving = next((rank for rank in SERVING if least[rank] >= 1 - _ROUNDING), SERVING[-1])
    most = serving if plan.rank is None else plan.rank
    shapes = {}
    for layer, (_, square) in energies.items():
        rank = max(1, min(most, int((squares[layer] > 0).sum())))
        energies[layer] = kept_at(rank, layer), square
        shapes[layer] = plan.shapes[f"{layer}|B"][0], rank, plan.shapes[f"{layer}|A"][1]
    factors = FactorsOnDemand(
        shapes, lambda layer: Factors(part(layer, "A")[: shapes[layer][1]], part(layer, "B")[:, : shapes[layer][1]])
    )
    adapter = LoraAdapter(
        factors, {}, defaults() | plan.fields | {"modules_to_save": plan.saved or None}
        | _targets(list(energies), parameters, plan.names), plan.dtypes[next(iter(plan.shapes))],
        parameters=parameters, padded=serving if plan.rank is None else 1,
    )  # fmt: skip
    heads = {name for name in plan.kept if is_head(name, adapter.config, factors)}
    whole = TensorsOnDemand(
        {name: plan.tuned.tensors[tensor].shape for name, tensor in plan.kept.items()},
        lambda name: plan.tuned.read(plan.kept[name]).view(plan.tuned.tensors[plan.kept[name]].shape),
    )
    adapter.heads = {name: whole[name] for name in heads}
    adapter.modules = TensorsOnDemand({n: s for n, s in whole.shapes.items() if n not in heads}, whole.__getitem__)
    _write(plan, adapter, folder)
    total = sum(square for _, square in energies.values()) + plan.squares + sum(plan.lost.values())
    held = sum(kept * square for kept, square in energies.values()) + plan.squares
    more = {} if plan.rank else {"serving": {rank: kept for rank, kept in least.items() if rank <= serving}}
    for file in files.values():
        file.unlink()
    return more | {
        "written_rank": adapter.rank,
        "energy_kept": {layer: kept for layer, (kept, _) in energies.items()},
        "energy": held / total,
        "lost": {name: square / total for name, square in plan.lost.items()},
        "unchanged": sorted(set(plan.layers) - set(energies)),
    }


def _changed(
    plan: ExtractPlan, read: Mapping[str, list[float]]
) -> tuple[dict[str, int], dict[str, tuple[float, float]]]:
    """The bare parameters that changed; {layer: (share kept, ‖Δ‖²)} of layers that did, and all experts of a stack."""
    changed = {layer for layer, (_, square) in read.items() if square > 0}
    parameters = {name: E for name, E in plan.parameters.items() if changed & {*layers_of(name, E)}}
    needed = changed | {*owners(parameters)}
    return parameters, {layer: (one[0], one[1]) for layer, one in read.items() if layer in needed}


def _targets(layers: list[str], parameters: dict[str, int], names: list[str]) -> dict[str, Any]:
    """The fields by which PEFT finds these layers and no other module: ends of their names, else whole names."""
    fields = targets_of(layers, parameters)
    ends = sorted({layer.rpartition(".")[2] for layer in fields["target_modules"]})
    hit = {name for name in names if name.rpartition(".")[2] in ends}
    return fields | ({"target_modules": ends} if hit == set(fields["target_modules"]) else {})


def _write(plan: ExtractPlan, adapter: LoraAdapter, folder: Path) -> None:
    """Write the adapter as PEFT does, a tensor at a time."""
    rank, places, sizes = adapter.rank, adapter.places(), adapter.shapes
    shapes: dict[str, tuple[int, ...]] = {}
    for place, layers in places.items():
        o, _, n = sizes[layers[0]]
        shapes[f"{PREFIX}{place}.lora_A.weight"] = len(layers) * rank, n
        shapes[f"{PREFIX}{place}.lora_B.weight"] = o, len(layers) * rank
    dtypes = dict.fromkeys(shapes, adapter.dtype)
    for name, tensor in plan.kept.items():
        shapes[f"{PREFIX}{name}"] = plan.tuned.tensors[tensor].shape
        dtypes[f"{PREFIX}{name}"] = plan.tuned.tensors[tensor].dtype
    with (folder / WEIGHTS).open("wb") as file:
        file.write(file_head(shapes, dtypes, {"format": "pt"}))
        for layers in places.values():
            for half in adapter.pair(layers, rank):
                file.write(half.contiguous().view(-1).view(torch.uint8).numpy().data)
        for tensor in plan.kept.values():
            entry = plan.tuned.tensors[tensor]
            for start, stop in rows_of(entry.rows, entry.width):
                block = plan.tuned.read(tensor, start, stop)
                file.write(block.view(-1).view(torch.uint8).numpy().data)
    write_json(folder / CONFIG, adapter.config_content())
