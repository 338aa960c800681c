"""Work: a folder that is to be written file by file, from models on disk; what decides it, and what it will hold."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from osrm_peft.checkpoints.model_files import ModelFiles

STATE = "merge_state.json"  # in the folder of an unfinished result


class Work(ABC):
    """A result with every choice made and checked, before its first byte is written.

    Attributes:
        shapes: {tensor: its shape in the result}, in the order in which they are written.
        dtypes: {tensor: its dtype in the result}.
        shards: [(file name, its tensors)].
        settings: fields of the manifest; `read` has the identity of each input's files when they were checked.
        kind: of the result's manifest.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    shards: list[tuple[str, list[str]]]
    settings: dict[str, Any]
    kind: str = "checkpoint"

    @property
    @abstractmethod
    def inputs(self) -> dict[str, ModelFiles]:
        """The models that are read."""

    @property
    @abstractmethod
    def verb(self) -> str:
        """What is done, for the progress bar."""

    @abstractmethod
    def manifest(self) -> dict[str, Any]:
        """The manifest of the result's folder."""

    @property
    def folders(self) -> list[str]:
        """Folders of models in the result; `""` is the result itself."""
        return [""]

    def size_of(self, names: Sequence[str]) -> int:
        """Bytes of these tensors of the result."""
        return sum(torch.Size(self.shapes[name]).numel() * self.dtypes[name].itemsize for name in names)

    def fingerprint(self) -> str:
        """A hash of everything that decides the result; the device decides only how it is rounded."""
        left_out = ("command", "versions", "device")
        fields = {name: value for name, value in self.manifest().items() if name not in left_out}
        return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def check_unchanged(self) -> None:
        """Raise ValueError if an input was changed since the choices were made."""
        for name, entry in self.manifest()["inputs"].items():
            if entry["files"] != self.settings["read"][name]:
                raise ValueError(f"the files of {name!r} were changed while they were merged: merge again")


class Maker(Protocol):
    """What makes the tensors of a work."""

    summary: list[Any] | None  # what an unfinished work keeps in its state file

    def summarise(self, known: list[Any] | None) -> None:
        """Set the summary, which the tensors need: that of an interrupted work, or computed now."""

    def blocks(self, names: Sequence[str]) -> Iterator[list[Tensor]]:
        """Yield the rows of each tensor in turn, in the result's dtype, a list with one tensor for each folder.

        The next step may write into the memory of what was yielded.
        """

    def close(self) -> None:
        """Free what the maker holds."""


def shards_of(work: Work, most: int) -> list[tuple[str, list[str]]]:
    """[(file name, its tensors)]: the tensors in their order, as many as fit into each file."""
    groups: list[list[str]] = [[]]
    size = 0
    for tensor in work.shapes:
        bytes_of = work.size_of([tensor])
        if groups[-1] and size + bytes_of > most:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += bytes_of
    return named_shards(groups)


def named_shards(groups: Sequence[list[str]]) -> list[tuple[str, list[str]]]:
    """[(file name, its tensors)], the files named as transformers names them."""
    if len(groups) == 1:
        return [("model.safetensors", groups[0])]
    return [(f"model-{index:05d}-of-{len(groups):05d}.safetensors", group) for index, group in enumerate(groups, 1)]
