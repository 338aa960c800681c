"""Devices: where arithmetic happens. A name is checked before any work; results are those of the CPU to rounding."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor

from osrm_peft.checks import shown

CPU = torch.device("cpu")
Item = TypeVar("Item")
Result = TypeVar("Result")


def local_device() -> torch.device:
    """This process' GPU; the CPU where there is none."""
    if not torch.cuda.is_available():
        return CPU
    rank = os.environ.get("LOCAL_RANK")
    return torch.device("cuda", torch.cuda.current_device() if rank is None else int(rank) % torch.cuda.device_count())


def chosen_device(value: Any, default: torch.device = CPU) -> torch.device:
    """The device of this name: `"cpu"`, `"cuda"` (this process' GPU) or `"cuda:1"`; None is `default`.

    Raises:
        ValueError: another name, or a GPU that this machine lacks.
    """
    if value is None:
        return default
    device: torch.device | None = None
    if isinstance(value, (str, torch.device)):
        with suppress(RuntimeError):  # no name of a device
            device = torch.device(value)
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={shown(value)} must be 'cpu', 'cuda' or the name of one GPU, such as 'cuda:1'")
    if device.type == "cpu":
        return CPU
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count <= (device.index or 0):
        has = f"has {count} GPU{'s' * (count > 1)}" if count else "has no GPU that torch can use"
        raise ValueError(f"device={shown(value)} and this machine {has}: give device='cpu', or leave it out")
    return local_device() if device.index is None else device


def device_of(tensor: Tensor) -> torch.device:
    """The GPU that the tensor is on; the CPU for one elsewhere (main memory, meta, an accelerator without float64)."""
    return tensor.device if tensor.is_cuda else CPU


def described(device: torch.device) -> str:
    """The device as a manifest names it: `cpu`, or a GPU with its model."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def in_threads(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """work(item) of all items, in their order: as many at a time as torch has threads, each with one thread.

    For items of small matrices, whose products and decompositions do not fill several threads. torch has one thread
    for each operation until the last result is taken.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(items) < 2:
        yield from map(work, items)
        return

    def alone(item: Item) -> Result:
        with torch.no_grad():  # gradients' modes are a thread's own
            return work(item)

    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(alone, items)
    finally:
        torch.set_num_threads(threads)


@contextmanager
def computing(device: torch.device) -> Iterator[None]:
    """Inside the block float32 products on the device have float32's 24 bits, whatever the program allows elsewhere.

    Raises:
        ValueError: the GPU's memory was too small.
    """
    try:
        with full_float32(device):
            yield
    except torch.OutOfMemoryError as error:
        raise ValueError(f"{device} has too little memory ({_first_line(error)}): device='cpu' has more") from error


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Inside the block no product on the GPU is in TF32, which has 11 bits of float32's 24."""
    matmul = torch.backends.cuda.matmul
    if device.type != "cuda" or getattr(matmul, "fp32_precision", "tf32") != "tf32":
        yield
        return
    settings: tuple[str, Any, Any]
    try:
        settings = "allow_tf32", False, matmul.allow_tf32
    except RuntimeError:  # the program speaks the words of torch 2.9, which do not go with the older ones
        settings = "fp32_precision", "ieee", matmul.fp32_precision
    name, exact, before = settings
    setattr(matmul, name, exact)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def _first_line(error: Exception) -> str:
    return str(error).partition(". ")[0].partition("\n")[0][:200]
