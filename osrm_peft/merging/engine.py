"""Engine: one method with its options, on stacks of task vectors, whether adapters or full models give them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from osrm_peft.merging.methods.registry import AddUp, Merged, Method, alone, taken
from osrm_peft.seeding import task_generator


class Engine:
    """A merge method, ready to run.

    Attributes:
        method: the method.
        options: its options, all of them.
        tasks: the tasks' names, in the order of the stacks.
        seed: of the methods that draw.
        summary: what the method needs of the whole model, see `summarise`.
    """

    def __init__(self, method: Method, options: Mapping[str, Any], tasks: Sequence[str], seed: int) -> None:
        self.method, self.options, self.tasks, self.seed = method, options, list(tasks), seed
        self.summary: Any = None
        self._options = taken(method.fn, options)

    def generators(self, layer: str) -> list[torch.Generator]:
        """One stream of draws a task, named by seed, task and layer."""
        return [task_generator(self.seed, task, layer) for task in self.tasks]

    def prepare(self, stack: Tensor, layer: str, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """(T, o, n) task vectors as the method takes them; drawn from the layer's streams, or on from `generators`."""
        if self.method.prepare is None:
            return stack
        generators = self.generators(layer) if generators is None else generators
        return self.method.prepare(stack, generators, **taken(self.method.prepare, self.options))

    def summarise(self, stacks: Iterable[Tensor], add_up: AddUp = alone) -> None:
        """Pass over all (T, o, n) stacks of the model, as often as the method needs."""
        if self.method.summarise is not None:
            options = taken(self.method.summarise, self.options)
            self.summary = self.method.summarise(stacks, add_up=add_up, **options)

    def __call__(self, tau: Any, weights: Tensor, statistics: Sequence[Any] | None = None) -> Any:
        """What the method returns for one layer.

        Args:
            tau: (T, o, n) task vectors, or a list of factors for a method of the space "factors".
            weights: (T,) one a task, on the device of `tau`.
            statistics: one a task, for a method that needs them.
        """
        arguments = self._options
        if self.method.summarise is not None:
            arguments = arguments | {"summary": self.summary}
        if self.method.needs is not None:
            arguments = arguments | {self.method.needs: statistics}
        return self.method.fn(tau, weights, **arguments)

    def merged(self, stack: Tensor, weights: Tensor, statistics: Sequence[Any] | None = None) -> Merged:
        """The same as a Merged, whose direction the scale is yet to multiply."""
        out = self(stack, weights, statistics)
        return out if isinstance(out, Merged) else Merged(out)

    def masked(self, stack: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Shared vector and masks of a method whose result differs by task; and what `rescalers` needs of the layer.

        Returns:
            (o, n) τ_uni; (T, o, n) masks M_t; (T,) Σ|w_t τ_t| and (T,) Σ|M_t ⊙ τ_uni|, float64.
        """
        unified, masks = self(stack, weights.to(stack))
        full = weights.abs() * stack.abs().sum((1, 2), dtype=torch.float64)
        kept = (masks * unified.abs()).sum((1, 2), dtype=torch.float64)
        return unified, masks, full, kept


def rescalers(full: Tensor, kept: Tensor) -> list[float]:
    """EMR's λ_t = Σ|w_t τ_t| / Σ|M_t ⊙ τ_uni| from (T,) sums over the whole model; 0 where a mask is empty."""
    return torch.where(kept > 0, full / kept.clamp_min(1e-300), 0).tolist()
