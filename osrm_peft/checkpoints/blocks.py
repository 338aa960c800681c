"""Blocks: the tensors of a merge of checkpoints, made some rows at a time."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from osrm_peft.checkpoints.config_checks import shown
from osrm_peft.checkpoints.plan import CheckpointPlan
from osrm_peft.checkpoints.rooms import Rooms
from osrm_peft.checkpoints.shapes import is_matrix
from osrm_peft.devices import CPU
from osrm_peft.io.tensors import all_finite
from osrm_peft.merging.engine import Engine, rescalers
from osrm_peft.merging.methods.average import average

BLOCK = 2**19  # entries of a tensor that a method sees at once: few, for the cache, but threads meet at Python's lock

Place = TypeVar("Place")
Result = TypeVar("Result")


class Blocks:
    """The tensors of the result, made some rows at a time.

    Blocks are small: each is one thread's work, with a thread for each core. They run one after the other where a
    method draws numbers in order (DARE), or decomposes whole matrices with all threads.

    Args:
        sample: (tensor, start, stop) of the blocks that a summary of the model is made from; None: all.
    """

    def __init__(self, plan: CheckpointPlan, sample: Sequence[tuple[str, int, int]] | None = None) -> None:
        self.plan, self.floats = plan, [name for name in plan.shapes if plan.dtypes[name].is_floating_point]
        self._sample = sample
        self.summary: list[Any] | None = None  # what an unfinished merge keeps in its state file
        self.engine = Engine(plan.method, plan.options, list(plan.models), plan.seed)
        alone = plan.method.spectral or plan.method.prepare is not None
        self.workers, self._threads = 1 if alone else os.cpu_count() or 1, torch.get_num_threads()
        self._pool = None if alone else ThreadPoolExecutor(self.workers)
        self._rooms = Rooms(reused=not alone)
        self._known_factors: dict[tuple[str, bool], Tensor] = {}
        if self._pool is not None:
            torch.set_num_threads(1)

    def summarise(self, known: list[Any] | None) -> None:
        """Set the method's summary of the whole model: the one of an interrupted merge, or computed now."""
        method = self.plan.method
        if method.per_task:
            self.summary = self._rescalers() if known is None else known
        elif method.summarise is not None:
            if known is None:
                self.engine.summarise(_Stacks(self))
                summary = self.engine.summary
                known = [None if summary is None else summary.tolist()]
            self.summary = known
            self.engine.summary = None if known[0] is None else torch.tensor(known[0], dtype=torch.float32)

    def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self._threads)

    def blocks(self, names: Sequence[str]) -> Iterator[list[Tensor]]:
        """Yield (rows, width) blocks of the result in its dtype, a list with one tensor for each folder.

        The memory of a block is used again when the next one is asked for.
        """
        whole = self.plan.method.whole_tensor(self.plan.options)  # of which threads would hold several at once
        for together in [[name] for name in names] if whole else [names]:
            yield from self.made((name, *rows) for name in together for rows in self.rows(name))

    def made(self, places: Iterable[tuple[str, int, int]]) -> Iterator[list[Tensor]]:
        """The blocks of these (tensor, start, stop), as `blocks` yields them."""
        for results in self.in_order(lambda place: self.block(*place), places):
            yield results
            self._rooms.give_back(results)

    def in_order(self, work: Callable[[Place], Result], places: Iterable[Place]) -> Iterator[Result]:
        """work(place) of all places, in their order, in threads if the method allows it."""
        if self._pool is None:
            yield from map(work, places)
            return
        waiting: deque[Future[Result]] = deque()  # each worker has one in hand and one to come
        for place in places:
            waiting.append(self._pool.submit(work, place))
            if len(waiting) > 2 * self.workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def places(self) -> Iterator[tuple[str, int, int]]:
        """(tensor, start, stop) of all blocks, or of the sample."""
        if self._sample is not None:
            return iter(self._sample)
        return ((name, *rows) for name in self.floats for rows in self.rows(name))

    def block(self, name: str, start: int, stop: int) -> list[Tensor]:
        """These rows of a tensor of the result in its dtype, one tensor for each folder."""
        dtype = self.plan.dtypes[name]
        if not dtype.is_floating_point:
            return [self._same(name)] * len(self.plan.folders)
        if self.plan.method.linear is not None:
            return [self._linear(name, start, stop)]
        with self.naming(name):
            merged = self._merge(name, *self.task_vectors(name, start, stop))
        results = [result.to(dtype).cpu() for result in merged]
        results = [result.clone() if self._rooms.holds(result) else result for result in results]
        if not all(map(all_finite, results)):
            raise self._too_large(name)
        return results

    def _linear(self, name: str, start: int, stop: int) -> Tensor:
        """The same of a linear method.

        Rounding to 16 bits hides that of float32 sums, so that models which are equal give themselves without a
        subtraction first; but where weights are near bfloat16's largest, those sums overflow.
        """
        short = self.plan.dtypes[name].itemsize < torch.float32.itemsize
        for less_base in (False, True) if short else (True,):
            with self.naming(name):
                result = self._combined(name, start, stop, less_base)
            if all_finite(result):
                return result
        self._check_inputs(name, self.task_vectors(name, start, stop)[0])  # NaN of a model shows in the result
        raise self._too_large(name)

    def _too_large(self, name: str) -> ValueError:
        kind = str(self.plan.dtypes[name]).removeprefix("torch.")
        return ValueError(f"{name!r} of the result is too large for {kind}: lower the scale, or give another dtype")

    @contextmanager
    def naming(self, name: str) -> Iterator[None]:
        """Errors of the arithmetic name the tensor and the way out."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            shape = "×".join(map(str, self.plan.shapes[name]))
            reason = shown(" ".join(str(error).split()))[:200] or "no memory"
            elsewhere = "" if self.plan.device == CPU else "device='cpu', which has more memory, or "
            raise ValueError(
                f"{name!r} ({shape}) cannot be merged by {self.plan.method.name} ({reason}): take {elsewhere}an "
                "element-wise method (average, ties, …), which needs little memory and no decomposition, or name "
                "it in heads="
            ) from error

    def entries(self, name: str, start: int = 0, stop: int | None = None) -> int:
        """How many entries these rows of a tensor have."""
        rows, width = self._shape(name)
        return ((rows if stop is None else stop) - start) * width

    def _combined(self, name: str, start: int, stop: int, less_base: bool) -> Tensor:
        """θ₀ + Σ f_t τ_t with f_t = λ c_t; or, not `less_base`, the same as Σ f_t θ_t + (1 − Σ f_t) θ₀."""
        dtype, stack = self.plan.dtypes[name], self._with_base(name, start, stop, less_base)
        factors, result = self._factors(name, less_base), self._rooms.result(*stack.shape[1:], dtype=dtype)
        inputs, flat = stack.view(len(stack), -1).mT, result.view(-1)
        if dtype == torch.float32:
            torch.mv(inputs, factors, out=flat)
        else:
            flat.copy_(torch.mv(inputs, factors, out=self._rooms.row(len(flat))))
        return result

    def _factors(self, name: str, less_base: bool) -> Tensor:
        """(T,) f_t, float32, and the base's factor if there is one."""
        if (name, less_base) not in self._known_factors:
            weights = self.plan.weights[name]
            factors = self.plan.scale * (weights / weights.sum() if self.plan.method.linear == "mean" else weights)
            of_base = [] if self.plan.base is None else [1.0 if less_base else 1.0 - float(factors.sum())]
            self._known_factors[name, less_base] = torch.tensor([*factors.tolist(), *of_base], dtype=torch.float32)
        return self._known_factors[name, less_base]

    def _merge(self, name: str, stack: Tensor, under: Tensor | None) -> list[Tensor]:
        """The results of one block: one tensor, or with EMR one for each model."""
        plan, weights = self.plan, self.plan.weights[name].to(stack)
        if name in plan.stacks:  # (T, 1, o·n) of one expert
            o, n = plan.shapes[name][1:]
            stack, under = stack.view(-1, o, n), None if under is None else under.view(o, n)
        elif plan.method.spectral and not is_matrix(plan.shapes[name]):
            # θ* = θ₀ + λ τ with τ the mean task vector; LoRE's θ₀ is the mean itself, its δ_t sum to 0
            return [_sum(under, average(stack, weights).mul_(1.0 if plan.method.baseless else plan.scale))]
        if plan.method.per_task:
            unified, masks = self.engine(stack, weights)
            scales = [plan.scale * one for one in self.summary or []]
            return [_sum(under, scale * mask * unified) for scale, mask in zip(scales, masks, strict=True)]
        merged = self.engine.merged(stack, weights)
        direction = merged.direction if merged.finish is None else merged.finish(merged.direction)
        direction = direction.mul_(plan.scale)
        result = _sum(under, direction if merged.offset is None else direction.add_(merged.offset))
        return [result.reshape(1, -1) if name in plan.stacks else result]

    def rows(self, name: str) -> Iterator[tuple[int, int]]:
        """(start, stop) of a tensor's blocks."""
        rows, width = self._shape(name)
        if not self.plan.dtypes[name].is_floating_point:
            return iter([(0, rows)])
        if name in self.plan.stacks:
            return ((expert, expert + 1) for expert in range(rows))
        whole = self.plan.method.spectral and is_matrix(self.plan.shapes[name])
        whole = whole or self.plan.method.whole_tensor(self.plan.options)
        size = max(1, rows if whole else BLOCK // max(width, 1))
        return ((start, min(start + size, rows)) for start in range(0, rows, size))

    def task_vectors(self, name: str, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """On the device, float32: (T, rows, width) task vectors, or weights without a base; and the base's rows.

        The next call of this thread may write into the same memory.
        """
        plan, both = self.plan, self._with_base(name, start, stop)
        stack = both[: len(plan.models)]
        self._check_inputs(name, stack)
        stack, under = stack.to(plan.device), None if self.plan.base is None else both[-1].to(plan.device)
        if plan.method.prepare is not None:
            key = (name, start)
            if start == 0 or key != self._drawing:
                self._generators = self.engine.generators(name)
            stack = self.engine.prepare(stack, name, self._generators)
            self._drawing = (name, stop)
        return stack, under

    _drawing: tuple[str, int] = ("", 0)

    def _with_base(self, name: str, start: int, stop: int, less_base: bool = True) -> Tensor:
        """The same in main memory, unchecked, in one tensor: the task vectors, and the base's rows if there is one.

        Args:
            less_base: False: the models' weights in place of the task vectors.
        """
        models = [*self.plan.models.values(), *([] if self.plan.base is None else [self.plan.base])]
        stack = self._rooms.stack(models, name, start, stop, self._shape(name)[1])
        if self.plan.base is not None and less_base:
            stack[:-1].sub_(stack[-1])
        return stack

    def _check_inputs(self, name: str, stack: Tensor) -> None:
        """Raise ValueError for a model's NaN or Inf."""
        for model, place in zip(self.plan.models, stack, strict=True):
            if not all_finite(place):
                where = f"{model!r}" if self.plan.base is None else f"{model!r} or the base model"
                raise ValueError(f"{name!r} holds NaN or Inf in {where}: download it again")

    def _shape(self, name: str) -> tuple[int, int]:
        """(rows, width) of a tensor as it is read."""
        shape = self.plan.shapes[name]
        rows = shape[0] if len(shape) > 1 else 1
        return rows, torch.Size(shape).numel() // max(rows, 1)

    def _same(self, name: str) -> Tensor:
        """A tensor of whole numbers, which must be equal in all models."""
        first, *others = self.plan.models
        one = self.plan.models[first].read(name)
        for model in others:
            if not torch.equal(one, self.plan.models[model].read(name)):
                raise ValueError(f"{name!r} holds whole numbers, and other ones in {model!r} than in {first!r}")
        return one

    def _rescalers(self) -> list[float]:
        """EMR's λ_t = Σ|w_t τ_t| / Σ|M_t ⊙ τ_uni| over the whole model."""
        full = torch.zeros(len(self.plan.models), dtype=torch.float64)
        kept = torch.zeros_like(full)

        def sums(place: tuple[str, int, int]) -> tuple[Tensor, Tensor]:
            stack, _ = self.task_vectors(*place)
            _, _, of_tasks, of_masks = self.engine.masked(stack, self.plan.weights[place[0]].to(stack.device))
            return of_tasks.cpu(), of_masks.cpu()

        for of_tasks, of_masks in self.in_order(sums, self.places()):
            full += of_tasks
            kept += of_masks
        return rescalers(full, kept)


class _Stacks:
    """All task vectors, block by block; can be iterated more than once."""

    def __init__(self, merge: Blocks) -> None:
        self.merge = merge

    def __iter__(self) -> Iterator[Tensor]:
        return (self.merge.task_vectors(*place)[0] for place in self.merge.places())

    def each(self, work: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        return self.merge.in_order(lambda place: work(self.merge.task_vectors(*place)[0]), self.merge.places())


def _sum(under: Tensor | None, direction: Tensor) -> Tensor:
    return direction if under is None else direction.add_(under)
