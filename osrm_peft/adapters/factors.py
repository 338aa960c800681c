"""Factors: LoRA on one layer; and mappings that read their tensors when they are used."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """LoRA on one layer: the task vector is τ = s·B·A of shape (o, n).

    A convolution counts as the linear layer of its flattened kernel, n = channels · height · width. An embedding counts
    as the linear layer of one-hot tokens, n = vocabulary.

    Attributes:
        A: (r, n). B: (o, r). Both float32 or float64.
        s: the scale: alpha/r, or alpha/√r for rsLoRA, after rank_pattern and alpha_pattern.
    """

    A: Tensor
    B: Tensor
    s: float = 1.0

    @property
    def rank(self) -> int:
        """r, the number of rows of A."""
        return len(self.A)

    def delta(self) -> Tensor:
        """(o, n) the task vector τ."""
        return self.s * self.B @ self.A

    def to(self, device: torch.device) -> "Factors":
        """The same on this device."""
        return Factors(self.A.to(device), self.B.to(device), self.s)


_Value = TypeVar("_Value")
_Shape = TypeVar("_Shape", bound=tuple[int, ...])


class _OnDemand(Mapping[str, _Value], Generic[_Value, _Shape]):
    """{name: value} that are read from their file when asked for, and not kept."""

    def __init__(self, shapes: dict[str, _Shape], read: Callable[[str], _Value]) -> None:
        self.shapes, self._read = shapes, read

    def __getitem__(self, name: str) -> _Value:
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class FactorsOnDemand(_OnDemand[Factors, tuple[int, int, int]]):
    """{layer: Factors} that are read from their file when asked for, and not kept.

    Attributes:
        shapes: {layer: (o, r, n)}, known without reading.
    """


class TensorsOnDemand(_OnDemand[Tensor, tuple[int, ...]]):
    """{parameter name: tensor} that are read from their file when asked for, and not kept.

    Attributes:
        shapes: {parameter name: shape}, known without reading.
    """
