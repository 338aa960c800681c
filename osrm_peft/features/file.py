"""FeatureMoments in safetensors files, here or on the Hub; tensors are read when they are used."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from osrm_peft.checks import integer
from osrm_peft.features.moments import FeatureMoments, sum_of, symmetric
from osrm_peft.hub.sources import local_file
from osrm_peft.io.tensors import Header, tensor_headers, tensor_reader

SUFFIX = ".features.safetensors"
_PARTS = ("mean", "samples", "second_moment", "second_moment_tril")


class FileMoments(Mapping[str, FeatureMoments]):
    """{layer: FeatureMoments} whose tensors are in files.

    Attributes:
        same_input: {layer: the layer whose name the tensors of its input have in a file}.
        widths: {name in a file: n}.
    """

    same_input: dict[str, str]
    widths: dict[str, int]

    def __iter__(self) -> Iterator[str]:
        return iter(self.same_input)

    def __len__(self) -> int:
        return len(self.same_input)


class MomentsOnDemand(FileMoments):
    """The moments of one features file, each read and checked when asked for.

    Raises:
        KeyError, ValueError: tensors are missing, or have other shapes than the header says.
    """

    def __init__(self, path: Path, statistic: str, counts: dict[str, int], same_input: dict[str, str]) -> None:
        headers = tensor_headers(path)
        if not same_input or set(same_input.values()) != set(counts):
            raise ValueError(f"its header names {len(same_input)} layers and {len(counts)} inputs")
        for leader, count in counts.items():
            _check_parts(headers, leader, statistic, integer(f"count of {leader!r}", count, 1))
        self.widths = {leader: headers[f"{leader}.mean"][0][0] for leader in counts}
        self.same_input = same_input
        self._path, self._statistic, self._counts, self._parts = path, statistic, counts, set(headers)
        self._read = tensor_reader(path)
        self._known: WeakValueDictionary[str, FeatureMoments] = WeakValueDictionary()  # shared while they are in use

    def __getitem__(self, name: str) -> FeatureMoments:
        leader = self.same_input[name]
        moments = self._known.get(leader)
        if moments is None:
            moments = self._known[leader] = self._moments(leader)
        return moments

    def _moments(self, leader: str) -> FeatureMoments:
        n, count = self.widths[leader], self._counts[leader]
        parts = {part: self._part(f"{leader}.{part}") for part in _PARTS if f"{leader}.{part}" in self._parts}
        second = parts.get("second_moment")
        if second is None and "second_moment_tril" in parts:
            second = torch.zeros(n, n)
            second[_triangle(n)] = parts["second_moment_tril"]
            second.mT[_triangle(n)] = parts["second_moment_tril"]
        if second is not None:
            if bool((second.diagonal() < 0).any()):
                raise ValueError(f"{self._path} is damaged: the second moment of {leader!r} has a negative diagonal")
            second = sum_of(second, count)
        return FeatureMoments(self._statistic, n, count, sum_of(parts["mean"], count), second, parts.get("samples"))

    def _part(self, key: str) -> Tensor:
        tensor = self._read(key).float()
        if not tensor.isfinite().all():
            raise ValueError(f"{self._path} is damaged: {key} holds NaN or Inf")
        return tensor


class JoinedMoments(FileMoments):
    """The moments of several files, in the order of `names`; keeps the files' temporary folder alive."""

    def __init__(self, parts: Iterable[MomentsOnDemand], names: Iterable[str], folder: Any) -> None:
        self._part_of = {name: part for part in parts for name in part}
        self.same_input = {name: self._part_of[name].same_input[name] for name in names}
        self.widths = {leader: self._part_of[leader].widths[leader] for leader in self.same_input.values()}
        self._folder = folder

    def __getitem__(self, name: str) -> FeatureMoments:
        return self._part_of[name][name]


def features_file(source: str | Path) -> Path:
    """The features file `source` on this machine: a path, or a Hub id as `TaskFeatures.load` takes it.

    Raises:
        FileNotFoundError: neither a file nor a Hub repository with one; or a repository with several, which it lists.
    """
    return local_file(str(source), SUFFIX, "features file", "write it with `osrm-peft features`")


def _triangle(n: int) -> Tensor:
    """(n, n) bool, the lower triangle; a mask with it lists the triangle row by row."""
    return torch.ones(n, n, dtype=torch.bool).tril()


def part_shapes(moments: FeatureMoments) -> dict[str, tuple[int, ...]]:
    """{part: shape} of the tensors in which a file holds one input's moments."""
    n = moments.width
    shapes: dict[str, tuple[int, ...]] = {"mean": (n,)}
    if moments.rows is not None:
        shapes["samples"] = tuple(moments.rows.shape)
    if moments.second is not None:
        shapes["second_moment_tril"] = (n * (n + 1) // 2,)
    return shapes


def parts_of(moments: FeatureMoments) -> dict[str, Tensor]:
    """{part: tensor}: the tensors in which a file holds one input's moments."""
    parts = {"mean": moments.mean()}
    if moments.rows is not None:
        parts["samples"] = moments.rows
    second = moments.complete_().second
    if second is not None:
        parts["second_moment_tril"] = symmetric(second)[_triangle(moments.width)].double() / moments.count
    return parts


def _check_parts(headers: Mapping[str, Header], layer: str, statistic: str, count: int) -> None:
    """Raise ValueError unless the file holds what `statistic` needs of this layer, in the right shapes."""
    (n,) = headers[f"{layer}.mean"][0]
    shapes = {"samples": (count, n), "second_moment": (n, n), "second_moment_tril": (n * (n + 1) // 2,)}
    held = [part for part in shapes if f"{layer}.{part}" in headers]
    for part in ["mean", *held]:
        shape, dtype = headers[f"{layer}.{part}"]
        if shape != shapes.get(part, (n,)) or isinstance(dtype, str):
            raise ValueError(f"{layer}.{part} must be {shapes.get(part, (n,))} floats, got {shape} of {dtype}")
    allowed = {"mean": set(), "token": set(shapes) - {"samples"}, "sample": set(shapes)}[statistic]
    if n < 1 or len(held) != (0 if statistic == "mean" else 1) or not set(held) <= allowed:
        raise ValueError(f"{layer} (width {n}) holds {held or 'a mean only'}, which is not the statistic {statistic!r}")
