"""Watching the inputs of layers, and leaving a model as it was."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn


@contextmanager
def watch_inputs(layers: Mapping[str, nn.Module], on_input) -> Iterator[None]:
    """Call on_input(name, x) before each forward of `layers`; the hooks are gone when the block ends."""

    def hook_for(name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            on_input(name, (args[0] if args else next(iter(kwargs.values()))))

        return hook

    handles = [module.register_forward_pre_hook(hook_for(name), with_kwargs=True) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; then each submodule gets its mode back, and each parameter its requires_grad.

    (PEFT's disable_adapter switches requires_grad of an adapter's parameters back on when it ends.)
    """
    modes = {module: module.training for module in model.modules()}
    grads = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, grad in grads.items():
            if parameter.requires_grad != grad:  # PEFT's tensors only: those of inference mode take no setting
                parameter.requires_grad_(grad)
