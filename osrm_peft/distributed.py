"""Processes, and the engines that split a model over them (FSDP2, DeepSpeed ZeRO-3). No other file knows them."""

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from osrm_peft.devices import local_device
from osrm_peft.libraries import is_dtensor

T = TypeVar("T")
_WRAPPERS = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"}


@dataclass(frozen=True)
class Processes:
    """The processes that share a piece of work; each calls the same methods in the same order.

    Attributes:
        rank: the number of this process.
        num_processes: how many processes share the work.
    """

    rank: int = 0
    num_processes: int = 1

    @classmethod
    def of(cls, distributed: bool) -> "Processes":
        """All processes of torch.distributed, or this process alone."""
        together = distributed and dist.is_available() and dist.is_initialized()
        return cls(dist.get_rank(), dist.get_world_size()) if together else cls()

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes the results."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process' part of items that all processes have."""
        return list(items[self.rank :: self.num_processes])

    def gather(self, mine: T) -> list[T]:
        """The values of all processes, in the order of ranks."""
        values: list[Any] = [mine] * self.num_processes
        if self.num_processes > 1:
            dist.all_gather_object(values, mine)
        return values

    def gather_results(self, function: Callable[[], T]) -> list[T]:
        """Run `function` in every process and gather the results in rank order; one process' error is raised in all."""
        result: Any = None
        failed: Exception | None = None
        try:
            result = function()
        except Exception as error:
            if self.num_processes == 1:
                raise
            failed = _sendable(error)
        outcomes = self.gather((result, failed))
        failures = [error for _, error in outcomes if error is not None]
        if failures:
            raise failures[0]
        return [result for result, _ in outcomes]

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in place."""
        if self.num_processes > 1:
            moved = tensor.to(_collective_device()).contiguous()
            dist.all_reduce(moved)
            tensor.copy_(moved)
        return tensor

    def broadcast_from_main(self, function: Callable[[], T]) -> T:
        """Run `function` in the main process and give its result, or raise its error, in all."""
        if self.num_processes == 1:
            return function()
        outcome: list[Any] = [None, None]  # the result, the error
        if self.is_main_process:
            try:
                outcome[0] = function()
            except Exception as error:
                outcome[1] = _sendable(error)
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


ALONE = Processes()


def start() -> Processes:
    """Join the other processes of `accelerate launch` or torchrun, if there are any."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return Processes.of(True)


def shard_model(load: Callable[[], nn.Module]) -> nn.Module | None:
    """The model, split over the processes by the engine of the launch's config (ZeRO-3 or FSDP); None without one."""
    zero3 = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    zero3 = zero3 and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true" and torch.cuda.is_available()
    if not (zero3 or fsdp) or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[InitProcessGroupKwargs(backend=backend)])
    if zero3:  # the engine asks for a batch size, which nothing uses: no data loader goes through it
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
    model = load()
    if zero3:
        return accelerator.prepare(model)
    return accelerator.prepare(model, torch.optim.SGD(model.parameters()))[0]  # FSDP2 wants an optimizer beside it


def inner_module(model: Any) -> Any:
    """The model inside an engine's wrapper; None if `model` is no wrapper."""
    wraps = any(kind.__name__ in _WRAPPERS for kind in type(model).__mro__)
    return model.module if wraps else None


def execution_device(model: nn.Module) -> torch.device:
    """The device on which the model takes its inputs."""
    hook = getattr(model, "_hf_hook", None)  # with a device_map parameters may lie elsewhere
    device = getattr(hook, "execution_device", None)
    if device is not None:
        return torch.device(device)
    if any(_partitioned(parameter) for parameter in model.parameters()):
        return local_device()
    return next(model.parameters()).device


@contextmanager
def gathered_weight(module: nn.Module) -> Iterator[Tensor]:
    """A module's whole weight, to read, wherever a device_map or an engine has put its parts.

    Every process must ask for a weight that an engine has split.
    """
    from accelerate.utils import align_module_device

    with ExitStack() as stack:
        stack.enter_context(align_module_device(module))
        weight: Any = module.weight
        yield stack.enter_context(_whole(weight))


def gather_parameter(parameter: Tensor) -> Tensor:
    """A copy of a whole parameter on the CPU. Every process must ask for a parameter that an engine has split."""
    with _whole(parameter) as tensor:
        return tensor.detach().to("cpu", copy=True)


def check_writable(parameter: Tensor) -> None:
    """Raise ValueError if a DeepSpeed optimizer holds the parameter."""
    # ZeRO-1 and -2 set _hp_mapping in every process, to None where another has the copy
    if hasattr(parameter, "_hp_mapping") or getattr(parameter, "_z3_optimizer", None) is not None:
        raise ValueError(
            "a DeepSpeed optimizer has its own copy of the adapter's weights already, which would undo the "
            "initialisation at the first step: initialise before accelerator.prepare, or deepspeed.initialize"
        )


def write_parameter(parameter: Tensor, value: Tensor) -> None:
    """Write a whole parameter, wherever its parts are. Every process must call this with the same value.

    Raises:
        ValueError: a DeepSpeed optimizer holds the parameter, and would write its own copy over the value.
    """
    check_writable(parameter)
    with torch.no_grad():
        if is_dtensor(parameter):
            from torch.distributed.tensor import distribute_tensor

            given = value.to(parameter.device, parameter.dtype)
            parameter.copy_(distribute_tensor(given, parameter.device_mesh, parameter.placements))
        elif _partitioned(parameter):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(value)
        else:
            parameter.copy_(value)


@contextmanager
def _whole(parameter: Tensor) -> Iterator[Tensor]:
    if is_dtensor(parameter):
        yield parameter.full_tensor()
    elif _partitioned(parameter):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter
    else:
        yield parameter


def _partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has split the parameter."""
    return hasattr(parameter, "ds_id")


def _collective_device() -> torch.device:
    """The device on which the processes' backend takes tensors."""
    return torch.device("cpu") if "cpu:" in dist.get_backend_config() else local_device()


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
