"""Safetensors files, read and written one tensor at a time: a file may be larger than memory."""

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from osrm_peft.io.json import parse_json

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_OTHERS = {
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPES = _DTYPES | _OTHERS  # {name in a file: dtype}
_TURN = threading.Lock()
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Header = tuple[tuple[int, ...], torch.dtype | str]  # shape and dtype of a tensor in a file


def tensor_headers(path: Path) -> dict[str, Header]:
    """{name: (shape, dtype)} without reading a tensor; for a dtype that is no float, the dtype's name in the file."""
    with safe_open(path, framework="pt") as file:
        parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        dtypes = {key: part.get_dtype() for key, part in parts.items()}
        return {key: (tuple(part.get_shape()), _DTYPES.get(dtypes[key], dtypes[key])) for key, part in parts.items()}


def tensor_reader(path: Path) -> Callable[[str], Tensor]:
    """A function that reads one tensor by its name and closes the file again, so that no pages stay in memory.

    The returned function raises ValueError once the file has changed.
    """
    path = path.resolve()
    with safe_open(path, framework="pt"):  # safetensors checks the whole header
        pass
    with path.open("rb") as file:
        identity, length = _identity(file), int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return partial(_read, path, identity, header, 8 + length)


def _identity(file: BinaryIO) -> tuple[int, int, int]:
    stat = os.fstat(file.fileno())
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _read(path: Path, first: tuple[int, int, int], header: Mapping[str, Any], start: int, key: str) -> Tensor:
    """The bytes of one tensor; opening a file as a map takes longer than reading a layer of LoRA."""
    about = header[key]
    with path.open("rb", buffering=0) as file:
        if _identity(file) != first:
            raise ValueError(f"{path} was changed after it was loaded: load it again")
        if about["dtype"] not in DTYPES:
            with safe_open(path, framework="pt") as mapped:
                return mapped.get_tensor(key).clone()
        begin, end = about["data_offsets"]
        data = torch.empty(end - begin, dtype=torch.uint8)
        read_at(file, start + begin, data.numpy().data, f"{path} ended within {key!r}")
    return data.view(DTYPES[about["dtype"]]).reshape(about["shape"])


def read_at(file: BinaryIO, place: int, memory: memoryview, ended: str) -> None:
    """Fill memory with the bytes of an open raw file from a place on, 1 GiB at a time: systems have limits.

    Threads may read one file.

    Raises:
        ValueError: the file ends before; the beginning of the message is `ended`.
    """
    while memory:
        if hasattr(os, "preadv"):
            got = os.preadv(file.fileno(), [memory[: 2**30]], place)
        else:  # as on Windows: a file has one place for all threads
            with _TURN:
                file.seek(place)
                got = file.readinto(memory)  # type: ignore[attr-defined]
        if not got:
            raise ValueError(f"{ended}: it was changed while it was read")
        memory, place = memory[got:], place + got


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or Inf."""
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())  # a sum is quick, and may overflow


def data_sha256(path: str | Path) -> str:
    """The hash of the tensors of a safetensors file: its header has the same content in more than one order."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_head(
    shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype], metadata: Mapping[str, str]
) -> bytes:
    """The beginning of a safetensors file, before the data of these tensors in this order."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + dtypes[name].itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _NAMES[dtypes[name]], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data are aligned to 8 bytes
    return len(text).to_bytes(8, "little") + text


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file from tensors that are made one after the other.

    Args:
        shapes: {name: shape} of all tensors, in their order.
        dtype: the dtype of all tensors in the file; they are converted.
        tensors: (name, tensor) pairs.
    """
    with path.open("wb") as file:
        file.write(file_head(shapes, dict.fromkeys(shapes, dtype), metadata))
        for (name, tensor), (expected, shape) in zip(tensors, shapes.items(), strict=True):
            assert (name, tuple(tensor.shape)) == (expected, shape)
            plain = torch.empty(shape, dtype=dtype, device="cpu").copy_(tensor)  # its strides too: (o, 1) of a mT
            file.write(plain.flatten().view(torch.uint8).numpy().data)


def features_header(path: Path) -> dict[str, Any]:
    """The header of a features file.

    Raises:
        SafetensorError, ValueError: the file is damaged, or no features file.
    """
    with safe_open(path, framework="pt") as file:
        header = parse_json((file.metadata() or {}).get("osrm_peft", "null"))
    if not isinstance(header, dict) or not isinstance(header.get("task"), str) or not header["task"]:
        raise ValueError("its header names no task")
    return header
