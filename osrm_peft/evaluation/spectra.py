"""Singular values of task vectors: how few directions they have (LoRE paper, Fig. 1)."""

import statistics
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.box import HORIZONTALS
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

from osrm_peft.adapters.load import load_adapter
from osrm_peft.checkpoints.model_files import ModelFiles
from osrm_peft.checkpoints.names import align, as_spelled
from osrm_peft.hub.sources import local_folder
from osrm_peft.io.places import new_file
from osrm_peft.merging.lowrank import compress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARES = (0.5, 0.1, 0.01)

Spectra = dict[str, dict[str, list[float]]]


def spectra(models: Mapping[str, str], *, base: str | None = None, layer: str = "*", progress: bool = False) -> Spectra:
    """{model: {matrix: its task vector's singular values, largest first}}, without the exact zeros of adapters.

    Args:
        models: {name: folder or Hub id} of full models, or of LoRA adapters.
        base: the full models' base model; None: their mean, from which LoRE begins.
        layer: a pattern of the matrices' names.

    Raises:
        ValueError: no matrix matches; or models and adapters are mixed.
    """
    folders = {name: local_folder(source, ["adapter_config.json"], "model folder") for name, source in models.items()}
    adapters = [name for name, folder in folders.items() if (folder / "adapter_config.json").is_file()]
    if adapters and len(adapters) < len(models):
        raise ValueError(f"{', '.join(adapters)} are adapters, the others full models: give either")
    values = _of_adapters(models, layer) if adapters else _of_models(models, base, layer, progress)
    if not any(values.values()):
        raise ValueError(f"layer={layer!r} matches no matrix that all models have")
    return values


def _of_adapters(models: Mapping[str, str], layer: str) -> Spectra:
    found: Spectra = {}
    for name, source in models.items():
        factors = load_adapter(source).factors
        names = [one for one in factors if fnmatchcase(one, layer)]
        # balanced factors: BᵀB is diagonal and holds the singular values
        found[name] = {
            one: compress(factors[one].s * factors[one].B, factors[one].A).factors.B.square().sum(0).tolist()
            for one in names
        }
    return found


def _of_models(models: Mapping[str, str], base: str | None, layer: str, progress: bool) -> Spectra:
    opened = {name: ModelFiles(source) for name, source in models.items()}
    under = None if base is None else ModelFiles(base)
    every = [*opened.values(), *([under] if under else [])]
    named = opened | ({"base model": under} if under else {})
    if as_spelled(named) is None:
        align(named, opened)
    shared = [
        name for name, entry in every[0].tensors.items()
        if fnmatchcase(name, layer) and len(entry.shape) == 2 and min(entry.shape) > 1 and entry.dtype.is_floating_point
        and all(name in one.tensors and one.tensors[name].shape == entry.shape for one in every)
    ]  # fmt: skip
    found: Spectra = {name: {} for name in models}
    for name in tqdm(shared, desc="singular values", disable=not progress):
        matrices = {model: files.read(name).float() for model, files in opened.items()}
        start = torch.stack(list(matrices.values())).mean(0) if under is None else under.read(name).float()
        for model, matrix in matrices.items():
            found[model][name] = _singular_values(matrix - start)
    for one in every:
        one.close()
    return found


def _singular_values(X: Tensor) -> list[float]:
    """Singular values from the smaller Gram matrix, in float64: quick, and exact to 10⁻⁸ of the largest."""
    narrow = X.double() if len(X) <= X.shape[1] else X.double().mT
    return torch.linalg.eigvalsh(narrow @ narrow.mT).clamp_min(0).sqrt().flip(0).tolist()


def spectra_table(found: Spectra) -> Table:
    """A table of how many singular values are above a share of the largest: each model's median over its matrices."""
    table = Table(
        "model", "matrices", "width", "largest", *(f"above {share:g} of it" for share in SHARES), "energy in top 10 %",
        title="Singular values of task vectors (medians over matrices)", box=HORIZONTALS,
    )  # fmt: skip
    for model, matrices in found.items():
        every = [torch.tensor(values) for values in matrices.values()]
        counts = [[int((values > share * values.max()).sum()) for values in every] for share in SHARES]
        energy = [float(values[: max(1, len(values) // 10)].square().sum() / values.square().sum()) for values in every]
        largest, width = (statistics.median(column) for column in ([float(v.max()) for v in every], map(len, every)))
        shares = [f"{statistics.median(column):g}" for column in counts]
        row = [f"{len(every)}", f"{width:g}", f"{largest:.3g}", *shares, f"{statistics.median(energy):.2f}"]
        table.add_row(escape(model), *row)
    return table


def plot_spectra(found: Spectra, path: str | Path) -> None:
    """Singular values over their index, as shares of the largest: the median matrix of each model, and the range."""
    figure = draw_spectra(found)
    with new_file(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def draw_spectra(found: Spectra) -> "Figure":
    """Singular values over their index, as shares of the largest: the median matrix of each model, and the range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for model, matrices in found.items():
        rows = [torch.tensor(values) / max(values[0], 1e-300) for values in matrices.values() if values]
        if not rows:  # an adapter that does nothing has no singular values
            continue
        longest = max(map(len, rows))
        padded = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in rows])
        index = range(1, longest + 1)
        axes.plot(index, padded.median(0).values, label=model)
        axes.fill_between(index, padded.amin(0), padded.amax(0), alpha=0.15)
    axes.set(xlabel="index", ylabel="singular value / largest", yscale="log", ylim=(1e-4, 1.2))
    axes.legend()
    return figure
