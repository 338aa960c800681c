"""A device that is not there: it computes on the CPU, and like a GPU refuses to compute with tensors of the CPU.

`torch.device("meta")` stands for it in torch's eyes. Whatever the library runs on it without an error, and with the
results of the CPU, also finds all its operands on one device where there is a GPU.
"""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

IMAGINED = torch.device("meta")
aten = torch.ops.aten
_CROSS = {aten._to_copy.default, aten.copy_.default}  # what moves tensors between devices
CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
DEVICES = ["imagined", pytest.param("cuda", marks=CUDA)]


class There(torch.Tensor):
    """A tensor on the imagined device."""

    @staticmethod
    def __new__(cls, inner):
        size = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        found = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=IMAGINED, **size)
        found.inner = inner
        return found

    def __repr__(self):
        return f"There({self.inner!r})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor)]
    there = [one for one in tensors if isinstance(one, There)]
    here = [one for one in tensors if not isinstance(one, There) and one.dim()]  # a GPU takes single numbers
    if there and here and func not in _CROSS:
        raise RuntimeError(f"{func} has operands on two devices: {[tuple(one.shape) for one in (*there, *here)]}")
    asked = kwargs.get("device")
    ours = bool(there) if asked is None else torch.device(asked) == IMAGINED
    if asked is not None:
        kwargs = kwargs | {"device": "cpu"}
    inner = func(*_unwrapped(args), **_unwrapped(kwargs))
    if func is aten._to_copy.default:
        inner = inner.clone() if inner is args[0] else inner
    if func._schema.is_mutable:
        return kwargs.get("out", args[0])
    return tree_map(lambda one: There(one) if ours and type(one) is torch.Tensor else one, inner)


def _unwrapped(value):
    return tree_map(lambda one: one.inner if isinstance(one, There) else one, value)


@contextmanager
def device_named(name, monkeypatch):
    """torch.device of this name; inside the block the library takes "cuda" for it, and tensors on it for a GPU's."""
    if name == "cuda":
        yield torch.device("cuda", 0)
        return
    import osrm_peft.checkpoints.plan
    import osrm_peft.features.moments
    import osrm_peft.merging.plan

    with monkeypatch.context() as patch, _Mode():
        for module in (osrm_peft.merging.plan, osrm_peft.checkpoints.plan):
            own = module.chosen_device
            patch.setattr(
                module, "chosen_device", lambda value, *d, own=own: IMAGINED if value == "cuda" else own(value, *d)
            )
        patch.setattr(osrm_peft.features.moments, "device_of", lambda tensor: tensor.device)
        yield IMAGINED
