"""Merge methods by name. A method is a plain function of one layer's task vectors; this only describes it."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from inspect import Parameter
from typing import Any, Literal, NamedTuple

from torch import Tensor

from osrm_peft.checks import choice

# PEFT's names (`add_weighted_adapter`) for what has another name, or is another thing, here
_OF_PEFT = {
    "linear": "'task_arithmetic' is the sum of the task vectors (PEFT sums A and B apart, which is not that)",
    "cat": "'concat', which is the same",
    "svd": "'task_arithmetic' with rank=, which is the same",
    "ties_svd": "'ties' with rank=",
    "dare_linear": "'dare'",
    "dare_linear_svd": "'dare' with rank=",
    "dare_ties_svd": "'dare_ties' with rank=",
    "magnitude_prune": "'ties', which prunes by magnitude, too, and elects signs",
    "magnitude_prune_svd": "'ties' with rank=, which prunes by magnitude, too, and elects signs",
}


class Merged(NamedTuple):
    """A method's result where a bare direction is not enough: the layer's task vector is offset + scale · direction.

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
        name: its name in `METHODS`.
        fn: fn(tau (T, o, n), weights (T,), **options) → (o, n) or Merged; with `summary=` if `summarise` is set, with
            `gram=` or `fisher=` (a list, one a task) if `needs` says so. In the space "factors" it is
            fn(factors, weights, …) → Factors, with None for an adapter that lacks the layer. Its keyword-only
            parameters are the user's options.
        paper: title and identifier, for manifests and cards.
        scale: the paper's default λ, by which the engine multiplies the direction.
        linear: how the result is linear in the τ_t: `"sum"`, Σ w_t τ_t (whose weights can be chosen by least squares),
            or `"mean"`, Σ w_t τ_t / Σ w_t; None: it is not.
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
        weights_need_base: full checkpoints without a base model take no weights, which multiply task vectors.
        spectral: fn looks at singular values, so it needs whole matrices.
        whole_tensor: whole_tensor(options): fn needs a whole tensor at once, though it is element-wise.
        full_rank: full_rank(options): the result may have full rank in any space.
        cut_by: cut_by(tau, weights) → (o, n) with the result's singular vectors: which of them a lower rank keeps, for
            a method whose result has equal singular values.
        offsets: the result has an offset, which the scale does not touch, see Merged.
        per_task: fn returns (shared (o, n), masks (T, o, n)): a result that differs by task (EMR).
        note: note(inputs): what to know of a merge of so many inputs, with a remedy; None: nothing.
        options: {name: default} of fn and prepare.
    """

    name: str
    fn: Callable[..., Any]
    paper: str
    scale: float = 1.0
    linear: Literal["sum", "mean"] | None = None
    commutes: bool = False
    spaces: tuple[str, ...] = ("weight", "core", "knots")
    check: Callable[..., None] | None = None
    check_weights: Callable[[Tensor], None] = lambda weights: None
    summarise: Callable[..., Any] | None = None
    prepare: Callable[..., Tensor] | None = None
    needs: str | None = None
    baseless: bool = False
    weights_need_base: bool = False
    spectral: bool = False
    whole_tensor: Callable[[Mapping[str, Any]], bool] = lambda options: False
    full_rank: Callable[[Mapping[str, Any]], bool] = lambda options: False
    cut_by: Callable[[Tensor, Tensor], Tensor] | None = None
    offsets: bool = False
    per_task: bool = False
    note: Callable[[int], str | None] = lambda inputs: None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The kind of its result in a manifest."""
        return "emr" if self.per_task else "merged"

    def bind(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options with the defaults filled in.

        Raises:
            TypeError: an unknown option; lists those there are.
            ValueError: a value out of its range.
        """
        unknown = sorted(set(options) - set(self.options))
        if unknown:
            known = ", ".join(f"{option}={value!r}" for option, value in self.options.items()) or "none"
            raise TypeError(f"{self.name} has no option {', '.join(unknown)}; its options are {known}")
        # .item(): numbers of NumPy or torch become Python's, so the manifest can be written
        given = {option: value.item() if hasattr(value, "item") else value for option, value in options.items()}
        bound = self.options | given
        if self.check is not None:
            self.check(**bound)
        return bound

    def space(self, asked: str) -> str:
        """The space to run in when the user asked for this one.

        Raises:
            ValueError: the method cannot run there.
        """
        if asked == "auto":
            return "core" if self.commutes else self.spaces[0]
        if asked not in self.spaces:
            raise ValueError(f"{self.name} runs in space {self.spaces[0]!r} only, not {asked!r}: leave space='auto'")
        return asked


METHODS: dict[str, Method] = {}


def register(name: str, **description: Any) -> Callable[[Callable], Callable]:
    """Register the decorated function, which is returned as it is, as merge method `name`.

    Args:
        name: by which users call it.
        **description: the fields of Method, without `name`, `fn` and `options`.

    Raises:
        ValueError: there is such a method already, or the function has an option that is not keyword-only.
    """

    def add(fn: Callable) -> Callable:
        if name in METHODS:
            raise ValueError(f"merge method {name!r} is already {METHODS[name].fn.__module__}")
        parameters = inspect.signature(fn).parameters.values()
        positional = [one.name for one in parameters if one.kind is not Parameter.KEYWORD_ONLY]
        given = 2 + sum(description.get(key) is not None for key in ("summarise", "needs"))
        if len(positional) > given:
            raise ValueError(f"{positional[given]} of merge method {name!r} must be keyword-only: put it after a *")
        options = options_of(fn) | options_of(description.get("prepare"))
        METHODS[name] = Method(name, fn, options=options, **description)
        return fn

    return add


def options_of(fn: Callable | None) -> dict[str, Any]:
    """{name: default} of the parameters that are the user's to choose: the keyword-only ones."""
    parameters = [] if fn is None else inspect.signature(fn).parameters.values()
    return {one.name: one.default for one in parameters if one.kind is Parameter.KEYWORD_ONLY}


def taken(fn: Callable, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that `fn` has."""
    known = options_of(fn)
    return {name: value for name, value in options.items() if name in known}


def get_method(name: str) -> Method:
    """The registered method of this name.

    Raises:
        ValueError: unknown; lists those there are, and for a name of PEFT's says ours.
    """
    if isinstance(name, str) and name in _OF_PEFT and name not in METHODS:
        raise ValueError(f"merge method {name!r} is PEFT's name; here it is {_OF_PEFT[name]}")
    return METHODS[choice("merge method", name, tuple(sorted(METHODS)))]


Stacks = Iterable[Tensor]  # the (T, o, n) task vectors of every layer, one layer at a time; it may have `each`
AddUp = Callable[[Tensor], Tensor]  # the sum of a tensor over processes


def on_each(work: Callable[[Tensor], Any], stacks: Stacks) -> Iterable[Any]:
    """work(stack) of all stacks, in their order; stacks with a method `each(work)` do it in threads."""
    each = getattr(stacks, "each", None)
    return map(work, stacks) if each is None else each(work)


def alone(tensor: Tensor) -> Tensor:
    """The sum over the only process there is."""
    return tensor
