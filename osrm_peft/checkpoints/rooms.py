"""Rooms: memory for blocks that is used again; new memory would cost as much as the work in it."""

import math
import threading
from collections import deque
from typing import Any

import torch
from torch import Tensor

from osrm_peft.checkpoints.model_files import ModelFiles


class Rooms:
    """Memory for the blocks of models, each thread's own, and for results, which go from thread to thread.

    Few calls of torch matter as much as few bytes: at each call threads take turns at Python's lock.
    """

    def __init__(self, reused: bool) -> None:
        self._reused, self._local = reused, threading.local()
        self._free: deque[Tensor] = deque()  # memory of results that are written
        self._lent: dict[int, Tensor] = {}

    def stack(self, models: list[ModelFiles], name: str, start: int, stop: int, width: int) -> Tensor:
        """(models, rows, width) float32: rows start … stop of a tensor of each model, its first columns.

        The next call of this thread writes into the same memory, if it is reused.
        """
        entries = [one.tensors[name] for one in models]
        stack, into = self._room("stack", torch.float32, len(models), stop - start, width)
        kinds = {(entry.dtype, entry.width) for entry in entries}
        if kinds == {(torch.float32, width)}:
            for one, row in zip(models, into, strict=True):
                one.read_into(row, name, start)
        elif len(kinds) == 1 and self._reused:
            raw, into = self._room("raw", entries[0].dtype, len(models), stop - start, entries[0].width)
            for one, row in zip(models, into, strict=True):
                one.read_into(row, name, start)
            stack.copy_(raw if entries[0].width == width else raw[:, :, :width])
        else:
            for one, row in zip(models, stack, strict=True):
                row.copy_(one.read(name, start, stop)[:, :width])
        return stack

    def row(self, entries: int) -> Tensor:
        """(entries,) float32, not set; the next call of this thread gives the same memory, if it is reused."""
        return self._room("row", torch.float32, 1, entries)[0][0]

    def result(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor, not set, in memory of its own until it is given back."""
        size = math.prod(shape) * dtype.itemsize
        try:
            memory = self._free.pop()
        except IndexError:  # none is free
            memory = torch.empty(size, dtype=torch.uint8)
        if len(memory) < size:
            memory = torch.empty(size, dtype=torch.uint8)
        result = memory[:size].view(dtype).view(shape)
        self._lent[id(result)] = memory
        return result

    def give_back(self, results: list[Tensor]) -> None:
        """Let other results have the memory of these."""
        self._free.extend(self._lent.pop(id(result)) for result in results if id(result) in self._lent)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in memory that this thread uses again."""
        memory = tensor.untyped_storage().data_ptr()
        return any(room.data_ptr() == memory for room in self._local.__dict__.get("rooms", {}).values())

    def _room(self, use: str, dtype: torch.dtype, *shape: int) -> tuple[Tensor, list[Any]]:
        """A tensor, and the memory of each of its rows."""
        size = math.prod(shape) * dtype.itemsize
        if not self._reused:
            return _views(torch.empty(size, dtype=torch.uint8), dtype, shape)
        rooms, views = (self._local.__dict__.setdefault(name, {}) for name in ("rooms", "views"))
        if (use, dtype, shape) in views:
            return views[use, dtype, shape]
        if use not in rooms or rooms[use].numel() < size:
            rooms[use] = torch.empty(size, dtype=torch.uint8)
            views.clear()
        views[use, dtype, shape] = found = _views(rooms[use][:size], dtype, shape)
        return found


def _views(room: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Tensor, list[Any]]:
    return room.view(dtype).view(shape), [row.numpy().data for row in room.view(shape[0], len(room) // shape[0])]
