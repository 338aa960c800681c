"""Forecast: how long a merge of checkpoints will take on this machine, and the memory of its work."""

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from osrm_peft.checkpoints.blocks import BLOCK, Blocks
from osrm_peft.checkpoints.plan import CheckpointPlan
from osrm_peft.checkpoints.shapes import is_matrix
from osrm_peft.devices import computing

_SAMPLES = 64  # blocks that are merged to see how fast it goes
# The shorter side of a corner of a matrix, likewise (the longer one is twice that at most), and the power of its
# entries by which the time grows, as measured: LoRE iterates few directions, in large corners as in whole matrices.
_CORNERS, _SVD = {"lore": (1024, 1.0)}, (512, 1.5)


@dataclass(frozen=True)
class Forecast:
    """What a merge will take.

    Attributes:
        seconds: of reading and arithmetic, as long as it took for a sample; a slow disk adds the writing.
        memory: bytes of the work at most, beside what the process has.
    """

    seconds: float
    memory: int


def forecast(plan: CheckpointPlan) -> Forecast:
    """Merge a sample on this machine, in a few seconds and writing nothing, and extend it to the whole model.

    Element-wise methods: some blocks, spread over the model, in proportion to the entries. LoRE, TSV-M and Iso-C: a
    corner of a matrix, in proportion to a power of the entries, 3/2 for an SVD. LoRE's is 1, since it iterates few
    directions: task vectors that have many take longer.
    """
    with computing(plan.device):
        if plan.method.spectral:
            return Forecast(sum(_seconds_of_matrices(plan)), _memory_of_matrices(plan))
        return Forecast(_seconds_of_blocks(plan), _memory_of_blocks(plan))


def _seconds_of_blocks(plan: CheckpointPlan) -> float:
    sample = _spread(plan)
    total = sum(_entries(plan, name) for name in _floats(plan))
    entries = sum((stop - start) * _width(plan, name) for name, start, stop in sample)
    blocks = Blocks(plan, sample)
    try:
        list(blocks.in_order(lambda place: blocks.task_vectors(*place), sample[:4]))  # opens files, and gets memory
        start = time.perf_counter()
        blocks.summarise(None)
        list(blocks.in_order(lambda place: blocks.block(*place), sample))
        return (time.perf_counter() - start) * total / max(entries, 1)
    finally:
        blocks.close()


def _spread(plan: CheckpointPlan) -> list[tuple[str, int, int]]:
    """(tensor, start, stop) of blocks at equal distances over all entries."""
    step = max(sum(_entries(plan, name) for name in _floats(plan)) / _SAMPLES, BLOCK)
    found, seen, following = [], 0, 0.0
    for name in _floats(plan):
        entries, width = _entries(plan, name), _width(plan, name)
        rows, size = entries // width, max(1, BLOCK // width)
        while following < seen + entries:
            start = int((following - seen) // width) // size * size
            stop = min(start + size, rows)
            found.append((name, start, stop))
            following = max(following + step, seen + stop * width)  # no block twice
        seen += entries
    return found


def _floats(plan: CheckpointPlan) -> list[str]:
    return [name for name in plan.shapes if plan.dtypes[name].is_floating_point and _entries(plan, name)]


def _entries(plan: CheckpointPlan, name: str) -> int:
    return torch.Size(plan.shapes[name]).numel()


def _width(plan: CheckpointPlan, name: str) -> int:
    """Entries a row; a vector is one row."""
    shape = plan.shapes[name]
    return _entries(plan, name) // shape[0] if len(shape) > 1 else _entries(plan, name)


def _memory_of_blocks(plan: CheckpointPlan) -> int:
    """Each worker has the models' rows, in their dtype and in float32, and as many in work; finished blocks wait."""
    return 2**25 + (os.cpu_count() or 1) * 5 * (len(plan.inputs) + 1) * BLOCK * 4


def _matrices(plan: CheckpointPlan) -> dict[tuple[int, int], list[str]]:
    """{shape: the tensors that are decomposed}; a stack of experts stands once for each."""
    found: dict[tuple[int, int], list[str]] = {}
    for name, shape in plan.shapes.items():
        if name in plan.stacks:
            found.setdefault(shape[1:], []).extend([name] * shape[0])  # type: ignore[arg-type]
        elif plan.dtypes[name].is_floating_point and is_matrix(shape):
            found.setdefault(shape, []).append(name)  # type: ignore[arg-type]
    return found


def _seconds_of_matrices(plan: CheckpointPlan) -> Iterator[float]:
    side, power = _CORNERS.get(plan.method.name, _SVD)
    blocks, known = Blocks(plan), dict[tuple[int, int], float]()
    try:
        for shape, names in _matrices(plan).items():
            short, long = sorted(shape)
            corner = min(short, side), min(long, 2 * side)
            if corner not in known:
                known[corner] = _seconds_of_corner(blocks, names[0], shape, corner)
            wide = min(long, 2 * short)
            grown = short * wide / math.prod(corner)
            yield len(names) * known[corner] * grown**power * long / wide
    finally:
        blocks.close()


def _seconds_of_corner(blocks: Blocks, name: str, shape: tuple[int, int], corner: tuple[int, int]) -> float:
    o, n = corner if shape[0] < shape[1] else corner[::-1]
    stack, _ = blocks.task_vectors(name, 0, 1 if name in blocks.plan.stacks else o)
    stack = stack.reshape(len(stack), -1, shape[1])[:, :o, :n].contiguous()
    start = time.perf_counter()
    result = blocks.engine.merged(stack, blocks.plan.weights[name].to(stack))
    float(result.direction.sum())  # a GPU has done its work now
    return time.perf_counter() - start


def _memory_of_matrices(plan: CheckpointPlan) -> int:
    """So many float32 matrices of the largest shape, as measured, and squares of a side with LoRE."""
    T, most = len(plan.models), 0
    beside = {"lore": T + 2, "iso": 10}.get(plan.method.name, 16 * T)
    for o, n in _matrices(plan):
        squares = 5 * min(o, n) ** 2 * 8 if plan.method.name == "lore" else 0
        most = max(most, (T + beside) * o * n * 4 + squares)
    return 2**25 + most
