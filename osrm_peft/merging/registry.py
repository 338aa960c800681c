"""Merge methods by name. A method is a plain function of one layer's task vectors; this only describes it."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from osrm_peft.checks import choice

_GIVEN = (
    "tau",
    "weights",
    "summary",
)  # what the engine passes; every other parameter is an option of the method


class Merged(NamedTuple):
    """What a method may return instead of a bare direction: the layer's task vector is offset + scale · direction."""

    direction: Tensor
    offset: Tensor | None = None
    report: dict[str, Any] = {}  # noqa: RUF012 (never written to)


@dataclass(frozen=True)
class Method:
    """A registered merge method.

    Attributes:
        fn: fn(tau (T, o, n), weights (T,), **options) → (o, n) or Merged; with `summary=` if `summarise` is set.
        paper: title and identifier, for manifests and cards.
        scale: the paper's default λ, by which the engine multiplies the direction.
        commutes: fn(U τ Vᵀ) = U fn(τ) Vᵀ for orthonormal U, V: runs in the core, exactly, by default.
        check: called with the options before anything is read; raises ValueError for a value out of range.
        summarise: summarise(stacks, weights, **options) → the `summary` that fn needs of the whole model. `stacks` can
            be iterated more than once and holds one layer in memory at a time.
    """

    fn: Callable[..., Tensor | Merged]
    paper: str
    scale: float = 1.0
    commutes: bool = False
    check: Callable[..., None] | None = None
    summarise: Callable[..., Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def bind(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options with the defaults filled in.

        Raises:
            TypeError: an unknown option; lists those there are.
            ValueError: a value out of its range.
        """
        unknown = sorted(set(options) - set(self.options))
        if unknown:
            known = ", ".join(f"{name}={value!r}" for name, value in self.options.items()) or "none"
            raise TypeError(f"{self.fn.__name__} has no option {', '.join(unknown)}; its options are {known}")
        # .item(): numbers of NumPy or torch become Python's, so the manifest can be written
        given = {name: value.item() if hasattr(value, "item") else value for name, value in options.items()}
        bound = self.options | given
        if self.check is not None:
            self.check(**bound)
        return bound


METHODS: dict[str, Method] = {}


def register(name: str, **description: Any) -> Callable[[Callable], Callable]:
    """Register the decorated function, which is returned as it is, as merge method `name` (see Method)."""

    def add(fn: Callable) -> Callable:
        if name in METHODS:
            raise ValueError(f"merge method {name!r} is already {METHODS[name].fn.__module__}")
        parameters = inspect.signature(fn).parameters.values()
        options = {parameter.name: parameter.default for parameter in parameters if parameter.name not in _GIVEN}
        METHODS[name] = Method(fn, options=options, **description)
        return fn

    return add


def get_method(name: str) -> Method:
    """The registered method of this name.

    Raises:
        ValueError: unknown; lists those there are.
    """
    return METHODS[choice("merge method", name, tuple(sorted(METHODS)))]


Stacks = Iterable[Tensor]  # the (T, o, n) task vectors of every layer, one layer at a time
