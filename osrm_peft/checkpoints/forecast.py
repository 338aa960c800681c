"""Forecast: how long a merge of checkpoints will take on this machine, and the memory of its work."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from osrm_peft.checkpoints.blocks import BLOCK, Blocks
from osrm_peft.checkpoints.plan import CheckpointPlan
from osrm_peft.checkpoints.shapes import is_matrix
from osrm_peft.devices import computing

_SAMPLES = 64  # blocks that are merged to see how fast it goes
# The shorter side of a corner of a matrix, likewise (the longer one is twice that at most), and the power of its
# entries by which the time grows, as measured: LoRE iterates few directions, in large corners as in whole matrices.
_CORNERS, _SVD = {"lore": (1024, 1.0)}, (512, 1.5)
_STEPS = 40  # of LoRE in a corner at most: three models take fewer


@dataclass(frozen=True)
class Forecast:
    """What a merge will take.

    Attributes:
        seconds: of reading and arithmetic, or with LoRE, TSV-M and Iso-C of the matrices' arithmetic alone; a slow disk
            adds its own.
        memory: bytes of the work at most, beside what the process has.
    """

    seconds: float
    memory: int


def forecast(plan: CheckpointPlan) -> Forecast:
    """Merge a sample on this machine, in a few seconds and writing nothing, and extend it to the whole model.

    Element-wise methods: some blocks, spread over the model, in proportion to the entries. LoRE, TSV-M and Iso-C: a
    corner of two matrices of each kind, in proportion to a power of the entries, 3/2 for an SVD. LoRE's is 1, since it
    iterates few directions: task vectors that have many take longer. Where more than 40 steps are to be made, it makes
    40, and counts as many as it takes θ₀ to come to rest where a share 1 − 1/T of the way is left after each.

    Raises:
        ValueError: a block or a corner cannot be merged.
    """
    with computing(plan.device):
        if plan.method.spectral:
            matrices = _matrices(plan)
            return Forecast(sum(_seconds_of_matrices(plan, matrices)), _memory_of_matrices(plan, matrices))
        blocks = Blocks(plan, _spread(plan))
        try:
            return Forecast(_seconds_of_blocks(blocks), _memory_of_blocks(blocks))
        finally:
            blocks.close()


def _seconds_of_blocks(blocks: Blocks) -> float:
    sample = list(blocks.places())
    if not sample:
        return 0.0
    total = sum(blocks.entries(name) for name in blocks.floats)
    entries = sum(blocks.entries(name, start, stop) for name, start, stop in sample)
    list(blocks.in_order(lambda place: blocks.task_vectors(*place), sample[:4]))  # opens files, and gets memory
    start = time.perf_counter()
    blocks.summarise(None)
    for _ in blocks.made(sample):
        pass
    return (time.perf_counter() - start) * total / entries


def _spread(plan: CheckpointPlan) -> list[tuple[str, int, int]]:
    """(tensor, start, stop) of small blocks at equal distances over all entries; of a stack, experts."""
    shapes = {name: torch.Size(one) for name, one in plan.shapes.items() if plan.dtypes[name].is_floating_point}
    step = max(sum(one.numel() for one in shapes.values()) / _SAMPLES, BLOCK)
    found, seen, following = [], 0, 0.0
    for name, shape in shapes.items():
        entries, rows = shape.numel(), shape[0] if len(shape) > 1 else 1
        if not entries:
            continue
        width = entries // rows
        size = 1 if name in plan.stacks else max(1, BLOCK // width)
        while following < seen + entries:
            start = int((following - seen) // width) // size * size
            stop = min(start + size, rows)
            found.append((name, start, stop))
            following = max(following + step, seen + stop * width)  # no block twice
        seen += entries
    return found


def _memory_of_blocks(blocks: Blocks) -> int:
    """Each worker has the models' rows, in their dtype and in float32, and as many in work; finished blocks wait."""
    floats = [name for name in blocks.floats if blocks.entries(name)]
    largest = max((blocks.entries(name, *next(blocks.rows(name))) for name in floats), default=0)
    return 2**25 + blocks.workers * 5 * (len(blocks.plan.inputs) + 1) * largest * 4


_Matrices = dict[tuple[int, int], list[str]]


def _matrices(plan: CheckpointPlan) -> _Matrices:
    """{shape: the tensors that are decomposed}; a stack of experts stands once for each."""
    found: _Matrices = {}
    for name, shape in plan.shapes.items():
        if name in plan.stacks:
            found.setdefault(shape[1:], []).extend([name] * shape[0])  # type: ignore[arg-type]
        elif plan.dtypes[name].is_floating_point and is_matrix(shape):
            found.setdefault(shape, []).append(name)  # type: ignore[arg-type]
    return found


def _seconds_of_matrices(plan: CheckpointPlan, matrices: _Matrices) -> Iterator[float]:
    side, power = _CORNERS.get(plan.method.name, _SVD)
    few = {"max_iterations": min(plan.options["max_iterations"], _STEPS)} if plan.method.name == "lore" else {}
    blocks = Blocks(replace(plan, options=plan.options | few))
    corners: dict[tuple[int, int], _Matrices] = {}
    for shape, names in matrices.items():
        short, long = sorted(shape)
        corners.setdefault((min(short, side), min(long, 2 * side)), {})[shape] = names
    for corner, alike in corners.items():
        every = [(name, shape) for shape, names in alike.items() for name in names]
        some = {every[len(every) // 4], every[3 * len(every) // 4]}  # the first may be embeddings, hardly trained
        taken = max(_seconds_of_corner(blocks, name, shape, corner, plan) for name, shape in sorted(some))
        for shape, names in alike.items():
            short, long = sorted(shape)
            wide = min(long, 2 * short)
            yield len(names) * taken * (short * wide / math.prod(corner)) ** power * long / wide


def _seconds_of_corner(
    blocks: Blocks, name: str, shape: tuple[int, int], corner: tuple[int, int], plan: CheckpointPlan
) -> float:
    o, n = corner if shape[0] < shape[1] else corner[::-1]
    rows = blocks.plan.shapes[name][0]
    start = rows // 2 if name in blocks.plan.stacks else (rows - o) // 2
    stack, _ = blocks.task_vectors(name, start, start + (1 if name in blocks.plan.stacks else o))
    stack = stack.reshape(len(stack), -1, shape[1])[:, :o, :n].contiguous()
    weights = blocks.plan.weights[name].to(stack)
    with blocks.naming(name):
        if stack.is_cuda:  # whose first call loads libraries
            blocks.engine.merged(stack[:, :32, :32].contiguous(), weights)
        begun = time.perf_counter()
        merged = blocks.engine.merged(stack, weights)
        float(merged.direction.sum())  # a GPU has done its work now
        seconds = time.perf_counter() - begun
    unfinished = merged.report.get("iterations") == _STEPS and not merged.report["converged"]
    return seconds * max(_steps(plan) / _STEPS, 1.0) if unfinished else seconds


def _steps(plan: CheckpointPlan) -> int:
    """How many steps LoRE will make."""
    most, tolerance, T = plan.options["max_iterations"], plan.options["tolerance"], len(plan.models)
    if tolerance == 0 or T == 1:
        return most
    return min(most, math.ceil(math.log(min(tolerance, 0.5)) / math.log(1 - 1 / T)))


def _memory_of_matrices(plan: CheckpointPlan, matrices: _Matrices) -> int:
    """So many float32 matrices of the largest shape, as measured, and squares of a side with LoRE."""
    T, most = len(plan.models), 0
    beside = {"lore": T + 2, "iso": 10}.get(plan.method.name, 16 * T)
    for o, n in matrices:
        squares = 5 * min(o, n) ** 2 * 8 if plan.method.name == "lore" else 0
        most = max(most, (T + beside) * o * n * 4 + squares)
    return 2**25 + most
