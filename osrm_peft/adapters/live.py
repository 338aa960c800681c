"""An adapter in a live base model: written into its weights, and taken out again exactly."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from osrm_peft.adapters.experts import layers_of, owners
from osrm_peft.adapters.factors import TensorsOnDemand
from osrm_peft.adapters.lora_adapter import LoraAdapter, tensors_of
from osrm_peft.devices import local_device
from osrm_peft.models.layers import as_experts, as_weight, experts_in, weight_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def applied_to(adapter: LoraAdapter, model: "PreTrainedModel") -> Iterator["PreTrainedModel"]:
    """Inside the block the live base `model` has the adapter in its weights, head included; then it is as before.

    Raises:
        ValueError: `model` lacks a layer, has another shape, or ties a weight that the adapter changes. Nothing was
            changed then.
    """
    adapter = adapter.named_as_in(model)
    shapes: dict[str, tuple[int, ...]] = {name: (o, n) for name, (o, _, n) in adapter.shapes.items()}
    deltas = TensorsOnDemand(shapes, lambda name: adapter.factors[name].delta())
    with written(weights_in(model, deltas, adapter, "attach(model) puts the adapter beside the weights")):
        yield model


class LiveBase:
    """A base model in memory once, in float32, in which adapters take turns; each width of head has its own head.

    Attributes:
        name: Hub id, folder, or `"packaged"`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._models: dict[Any, PreTrainedModel] = {}

    def of(self, adapter: LoraAdapter) -> "PreTrainedModel":
        """The base model that this adapter fits, in eval mode; see `LoraAdapter.load_base_model` for errors."""
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in sorted(adapter.heads.items()))
        key = (adapter.config.get("task_type"), shapes)
        if key not in self._models:
            model: Any = adapter.load_base_model(self.name).float().to(local_device()).eval()
            for other in self._models.values():
                _share(model, other)
            self._models[key] = model
        return self._models[key]


def _share(model: nn.Module, other: nn.Module) -> None:
    """Let `model` use the parameters of `other` that have the same name and shape."""
    known = dict(other.named_parameters(remove_duplicate=False))
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if name in known and known[name].shape == parameter.shape:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, known[name])


@contextmanager
def written(values: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Inside the block the parameters have these values; then they have their own again, to the bit."""
    before = {parameter: parameter.detach().clone() for parameter in values}
    try:
        write(values)
        yield
    finally:
        write(before)


@torch.no_grad()
def write(values: Mapping[Tensor, Tensor]) -> None:
    """Write {parameter: value}."""
    for parameter, value in values.items():
        parameter.copy_(value)


def weights_in(
    model: "PreTrainedModel", deltas: Mapping[str, Tensor], adapter: LoraAdapter, otherwise: str
) -> dict[Tensor, Tensor]:
    """{parameter: its value under an adapter}, checked against the model.

    Args:
        model: the base model, without adapter.
        deltas: {layer: (o, n) task vector}.
        adapter: its head, modules and copies are written, too; its factors are not looked at.
        otherwise: the way out where one weight cannot hold what two names of it should, for the error.

    Raises:
        ValueError: the model lacks a layer, has another shape, or ties weights that the adapter does not change alike.
    """
    modules, parameters = dict(model.named_modules()), tensors_of(model)
    values: dict[Any, Tensor] = _stacks_in(model, deltas, adapter, otherwise)
    changes: dict[Any, Tensor] = {}
    bare = owners(adapter.parameters)
    for name in deltas:
        if name in bare:
            continue
        tau = deltas[name]
        found = weight_shape(modules[name]) if name in modules else None
        if found != tuple(tau.shape):
            raise ValueError(
                f"{type(model).__name__} has {found or 'no such layer'} at {name!r}, the merge {tuple(tau.shape)}: "
                f"pass the base model {adapter.base_model}, without adapter"
            )
        weight: Any = modules[name].weight
        delta = as_weight(modules[name], tau)
        sharing = {other for other, module in modules.items() if getattr(module, "weight", None) is weight}
        first = changes.setdefault(weight, delta)
        if sharing - set(deltas) or float((first - delta).norm()) > 1e-4 * float(delta.norm()):
            raise ValueError(
                f"layer {name!r} shares its weight with {', '.join(sorted(sharing - {name}))}, which this task "
                f"does not change alike: one weight cannot hold both; {otherwise}"
            )
        values[weight] = weight.detach().float() + delta.to(weight.device)
    for name, tensor in {**adapter.copies, **adapter.heads, **adapter.modules}.items():
        actual = tuple(parameters[name].shape) if name in parameters else None
        if actual != tuple(tensor.shape):
            remedy = f"load the base model with num_labels={len(tensor)}"
            if name not in adapter.heads:
                remedy = f"call model.resize_token_embeddings({len(tensor)}) if it has new tokens"
            what = "head" if name in adapter.heads else "module"
            raise ValueError(f"the {what} {name!r} has shape {tuple(tensor.shape)}, the model's is {actual}: {remedy}")
        sharing = {other for other, shared in parameters.items() if shared is parameters[name]} - {name}
        alike = {other for other in sharing & {*adapter.modules} if torch.equal(adapter.modules[other], tensor)}
        if name in adapter.modules and sharing - alike:
            raise ValueError(
                f"the module {name!r} shares its weight with {', '.join(sorted(sharing - alike))}, which this task "
                f"has not trained alike: one weight cannot hold both; {otherwise}"
            )
        under = changes.get(parameters[name]) if name in adapter.copies else None  # a base weight that is adapted, too
        values[parameters[name]] = tensor if under is None else tensor.float() + under.to(tensor.device)
    return values


def _stacks_in(
    model: "PreTrainedModel", deltas: Mapping[str, Tensor], adapter: LoraAdapter, otherwise: str
) -> dict[Any, Tensor]:
    """{parameter: its value} of the bare parameters that an adapter adapts; see `weights_in`."""
    tensors, values = tensors_of(model), {}
    for name, experts in adapter.parameters.items():
        taus = [deltas[layer] for layer in layers_of(name, experts)]
        found = experts_in(model, name) if name in tensors else None
        if found != (experts, *taus[0].shape):
            raise ValueError(
                f"{type(model).__name__} has {tuple(tensors[name].shape) if name in tensors else 'no such parameter'} "
                f"at {name!r}, the merge {experts or 1} × {tuple(taus[0].shape)}: pass the base model "
                f"{adapter.base_model}, without adapter"
            )
        parameter = tensors[name]
        sharing = {other for other, one in tensors.items() if one is parameter} - {name}
        if sharing:
            raise ValueError(
                f"the parameter {name!r} is that of {', '.join(sorted(sharing))}, too, which this task does not "
                f"change: one parameter cannot hold both; {otherwise}"
            )
        delta = as_experts(model.get_submodule(name.rpartition(".")[0]), taus).reshape(parameter.shape)
        values[parameter] = parameter.detach().float() + delta.to(parameter.device)
    return values
