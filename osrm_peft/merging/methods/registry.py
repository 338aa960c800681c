"""Merge methods by name. A method is a plain function of one layer's task vectors; this only describes it."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from osrm_peft.checks import choice

# what the engine passes; every other parameter is an option of the method
_GIVEN = ("tau", "factors", "weights", "summary", "stacks", "add_up", "generators", "gram", "fisher")


class Merged(NamedTuple):
    """What a method may return instead of a bare direction: the layer's task vector is offset + scale · direction.

    Attributes:
        direction: (o, n); or, with `finish`, still one matrix a task (T, o, n).
        offset: (o, n) what the scale does not touch.
        report: for the manifest.
        finish: of a method that commutes with rotations up to its last, element-wise step: that step. It is called
            with the (T, o, n) directions back in the layer.
    """

    direction: Tensor
    offset: Tensor | None = None
    report: dict[str, Any] = {}  # noqa: RUF012 (never written to)
    finish: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Method:
    """A registered merge method.

    Attributes:
        fn: fn(tau (T, o, n), weights (T,), **options) → (o, n) or Merged; with `summary=` if `summarise` is set, with
            `gram=` or `fisher=` (a list, one a task) if `needs` says so. In the space "factors" it is
            fn(factors, weights, …) → Factors, with None for an adapter that lacks the layer.
        paper: title and identifier, for manifests and cards.
        scale: the paper's default λ, by which the engine multiplies the direction.
        commutes: fn(U τ Vᵀ) = U fn(τ) Vᵀ for orthonormal U, V: runs in the core, exactly, by default.
        spaces: where it can run; the first is the default of a method that does not commute.
        check: called with the options before anything is read; raises ValueError for a value out of range.
        check_weights: the same for the (T,) weights of a layer.
        summarise: summarise(stacks, add_up=…, **options) → the `summary` that fn needs of the whole model. `stacks` can
            be iterated more than once and holds one layer in memory at a time. Several processes have a share of the
            layers each: `add_up` sums a tensor over them.
        prepare: prepare(tau, generators, **options) → tau, before all else; one generator a task.
        needs: the statistic of each task that fn takes: "gram" (FeatureMoments) or "fisher" ((o, n) tensors).
        baseless: full checkpoints need no base model: a matrix added to all θ_t is added to the result.
        spectral: fn looks at singular values, so it needs whole matrices.
        cut_by: cut_by(tau, weights) → (o, n) with the result's singular vectors: which of them a lower rank keeps, for
            a method whose result has equal singular values.
        per_task: fn returns (shared (o, n), masks (T, o, n)): a result that differs by task (EMR).
        options: {name: default} of fn, prepare and summarise.
    """

    fn: Callable[..., Any]
    paper: str
    scale: float = 1.0
    commutes: bool = False
    spaces: tuple[str, ...] = ("weight", "core", "knots")
    check: Callable[..., None] | None = None
    check_weights: Callable[[Tensor], None] = lambda weights: None
    summarise: Callable[..., Any] | None = None
    prepare: Callable[..., Tensor] | None = None
    needs: str | None = None
    baseless: bool = False
    spectral: bool = False
    cut_by: Callable[[Tensor, Tensor], Tensor] | None = None
    per_task: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def bind(self, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options with the defaults filled in.

        Raises:
            TypeError: an unknown option; lists those there are.
            ValueError: a value out of its range.
        """
        unknown = sorted(set(options) - set(self.options))
        if unknown:
            known = ", ".join(f"{option}={value!r}" for option, value in self.options.items()) or "none"
            raise TypeError(f"{name} has no option {', '.join(unknown)}; its options are {known}")
        # .item(): numbers of NumPy or torch become Python's, so the manifest can be written
        given = {option: value.item() if hasattr(value, "item") else value for option, value in options.items()}
        bound = self.options | given
        if self.check is not None:
            self.check(**bound)
        return bound

    def space(self, name: str, asked: str) -> str:
        """The space to run in when the user asked for this one.

        Raises:
            ValueError: the method cannot run there.
        """
        if asked == "auto":
            return "core" if self.commutes else self.spaces[0]
        if asked not in self.spaces:
            raise ValueError(f"{name} runs in space {self.spaces[0]!r} only, not {asked!r}: leave space='auto'")
        return asked


METHODS: dict[str, Method] = {}


def register(name: str, **description: Any) -> Callable[[Callable], Callable]:
    """Register the decorated function, which is returned as it is, as merge method `name` (see Method)."""

    def add(fn: Callable) -> Callable:
        if name in METHODS:
            raise ValueError(f"merge method {name!r} is already {METHODS[name].fn.__module__}")
        options = options_of(fn) | options_of(description.get("prepare"))
        METHODS[name] = Method(fn, options=options, **description)
        return fn

    return add


def options_of(fn: Callable | None) -> dict[str, Any]:
    """{name: default} of the parameters that are the user's to choose."""
    parameters = [] if fn is None else inspect.signature(fn).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.name not in _GIVEN}


def taken(fn: Callable, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `options` that `fn` has."""
    known = options_of(fn)
    return {name: value for name, value in options.items() if name in known}


def get_method(name: str) -> Method:
    """The registered method of this name.

    Raises:
        ValueError: unknown; lists those there are.
    """
    return METHODS[choice("merge method", name, tuple(sorted(METHODS)))]


Stacks = Iterable[Tensor]  # the (T, o, n) task vectors of every layer, one layer at a time
AddUp = Callable[[Tensor], Tensor]  # the sum of a tensor over processes


def alone(tensor: Tensor) -> Tensor:
    """The sum over the only process there is."""
    return tensor
