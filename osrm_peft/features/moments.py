"""FeatureMoments: the streaming statistic of one layer's inputs for one task; nothing else crosses tasks."""

from collections.abc import Callable
from dataclasses import InitVar, dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from osrm_peft.checks import choice
from osrm_peft.devices import CPU, device_of, full_float32

FeatureStatistic = Literal["mean", "sample", "token"]
STATISTICS = get_args(FeatureStatistic)
_UNIT = torch.finfo(torch.float32).eps / 2  # the relative rounding of h
_WIDE = 1024  # from this width on the CPU sums no blocks below the diagonal
_TERMS = 2048  # of a sum in a GPU's matrix units
# whether a GPU multiplies numbers of 16 bits and returns the sums in float32 (CUDA, torch 2.8)
_SUMS_WIDER = torch.version.cuda is not None and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)


@dataclass
class FeatureMoments:
    """Sums over the inputs h of one linear layer; divided once, at the end, so any split gives the same numbers.

    `statistic` says what one h is, and how much of the sum is kept:

    * `"mean"`: h is a sample's mean over its tokens; kept is Σh, so S = h̄ h̄ᵀ (OSRM Eq. 4: one vector a task).
    * `"sample"`: the same h; kept are the k vectors themselves, or Σhhᵀ once k reaches the width (OSRM Eq. 2–3).
    * `"token"`: h is every non-padding token; kept is Σhhᵀ (OSRM Eq. 2–3 on tokens).

    Attributes:
        width: n, the layer's input width.
        count: N, how many h were added.
        total: (n,) Σh, float32.
        second: (n, n) Σhhᵀ, float32, or None.
        rows: (k, n) the h themselves, float32, or None; only `"sample"` with k < n.
        half: while vectors are added, `second` may lack blocks below its diagonal; see `complete_`.
        made_on: where empty sums are made.
    """

    statistic: str
    width: int
    count: int = 0
    total: Tensor = field(default=None)  # type: ignore[assignment]  # set below when not given
    second: Tensor | None = None
    rows: Tensor | None = None
    half: bool = False
    made_on: InitVar[torch.device] = CPU

    def __post_init__(self, made_on: torch.device) -> None:
        choice("statistic", self.statistic, STATISTICS)
        if self.total is None:
            self.total = torch.zeros(self.width, device=made_on)
            if self.statistic == "token":
                self.second = torch.zeros(self.width, self.width, device=made_on)
            elif self.statistic == "sample":
                self.rows = torch.zeros(0, self.width, device=made_on)

    def add_(self, x: Tensor, keep: Tensor | None = None, samples: Tensor | None = None) -> None:
        """Add a batch of layer inputs.

        Args:
            x: (b, s, n) inputs, or (b, n) where each sample has one vector.
            keep: (b, s) bool, False at padding; None keeps everything.
            samples: (b, s) which sample a position belongs to, in packed rows; None: each row is one sample.
        """
        if x.dim() == 2:
            x, keep = x[:, None], None
        kept = x.flatten(0, 1) if keep is None else x[keep]  # (N', n): padding never reaches a sum
        if self.statistic == "token":
            h = kept
        elif keep is None and samples is None:
            h = x.float().mean(1)
        else:
            rows = torch.arange(len(x), device=x.device)[:, None].expand(x.shape[:2]) if samples is None else samples
            _, owner, tokens = (
                rows[keep if keep is not None else ...].flatten().unique(return_inverse=True, return_counts=True)
            )
            sums = torch.zeros(len(tokens), self.width, device=x.device).index_add_(0, owner, kept.float())
            h = sums / tokens[:, None]
        self._add_vectors(h)

    def to(self, device: torch.device) -> "FeatureMoments":
        """The same on this device."""
        if self.total.device == device:
            return self
        second, rows = (None if tensor is None else tensor.to(device) for tensor in (self.second, self.rows))
        return replace(self, total=self.total.to(device), second=second, rows=rows)

    def merge_(self, other: "FeatureMoments") -> None:
        """Add the sums of `other`, which saw other rows of the same task."""
        if (other.statistic, other.width) != (self.statistic, self.width):
            raise ValueError(
                f"cannot add moments {other.statistic!r} of width {other.width} "
                f"to {self.statistic!r} of width {self.width}"
            )
        if other.rows is not None:
            self._add_vectors(other.rows)
            return
        other = other.complete_().to(self.total.device)
        self.count += other.count
        self.total += other.total
        if other.second is not None:
            self._sum_up_rows()
            assert self.second is not None
            self.second += other.second

    def sum_over_(self, counts: list[int], rank: int, sum_: Callable[[Tensor], Tensor]) -> None:
        """Become the sum over processes, each of which calls this on its own moments of the same layer.

        Args:
            counts: N of each process.
            rank: the number of this process.
            sum_: sums a tensor over the processes, in place.
        """
        if self.statistic == "sample" and sum(counts) < self.width:
            assert self.rows is not None
            rows = self.rows.new_zeros(sum(counts), self.width)
            start = sum(counts[:rank])
            rows[start : start + self.count] = self.rows
            self.rows = sum_(rows)
        elif self.statistic != "mean":
            self._sum_up_rows()
            assert self.second is not None
            sum_(self.complete_().second)  # type: ignore[arg-type]
        sum_(self.total)
        self.count = sum(counts)

    def settle_(self) -> None:
        """Round the sums as a features file rounds them, so that memory and file hold the same numbers; on the CPU.

        The file holds float32 quotients by N. The float32 nearest to quotient · N has the same quotient, so a second
        file is equal to the first.
        """
        self._require_rows()
        self.total = sum_of(self.total.double() / self.count, self.count).cpu()
        if self.second is not None:
            second = self.second if self.half else symmetric(self.second)
            self.complete_()
            for rows in second.split(64):  # in a processor's cache
                rows.copy_(sum_of(rows.double() / self.count, self.count))
            self.second = second.cpu()
        self.rows = None if self.rows is None else self.rows.cpu()

    def complete_(self) -> "FeatureMoments":
        """Copy the blocks above the diagonal of `second` to those below, if they are not there yet: symmetric then."""
        if self.half and self.second is not None:
            for start, stop in self._panels():
                self.second[stop:, start:stop] = self.second[start:stop, stop:].mT
                self.second[start:stop, start:stop] = symmetric(self.second[start:stop, start:stop])
        self.half = False
        return self

    def mean(self) -> Tensor:
        """(n,) Σh / N, float64."""
        self._require_rows()
        return self.total.double() / self.count

    def second_moment(self) -> Tensor:
        """(n, n) S = Σhhᵀ / N, float64, symmetric to the bit; for `"mean"` the rank-1 h̄ h̄ᵀ."""
        root = self.root()
        if root is not None:
            return symmetric(root.mT @ root)
        self.complete_()
        assert self.second is not None
        return symmetric(self.second).double() / self.count

    def root(self) -> Tensor | None:
        """(m, n) R with RᵀR = S, float64, where the vectors themselves are known; else None."""
        self._require_rows()
        if self.statistic == "mean":
            return self.mean()[None]
        return None if self.rows is None else self.rows.double() / self.count**0.5

    def rounding(self) -> Tensor:
        """(n,) ε, float64: up to Σ_i v_i² ε_i of the energy vᵀSv of a unit vector v may be rounding.

        Each entry of S is a sum of N products, rounded in the dtype of the sums (unit u): an error of about √N u/3 of
        √(S_ii S_jj), so up to √n times that over n directions; 4 √(n + N) u bounds both where either is large. The h
        themselves are float32, which adds an error of its square.
        """
        root, n = self.root(), self.width
        if root is not None:
            return (4 * _UNIT) ** 2 * (1 + n / len(root)) * root.square().sum(0)
        assert self.second is not None
        size = self.second.diagonal().double() / self.count
        sums = 4 * (n + self.count) ** 0.5 * torch.finfo(self.second.dtype).eps / 2
        return (sums + (4 * _UNIT) ** 2 * (1 + n / self.count)) * size

    def rank_bound(self) -> int:
        """No S of these moments has a larger rank."""
        return min(1 if self.statistic == "mean" else self.count, self.width)

    def _add_vectors(self, h: Tensor) -> None:
        if self.count == 0:  # the sums are where the layer's inputs are
            moved = self.to(device_of(h))
            self.total, self.second, self.rows = moved.total, moved.second, moved.rows
        h = h.to(self.total.device)
        self.count += len(h)
        self.total += h.sum(0, dtype=torch.float32) if h.is_cuda else h.float().sum(0)
        if self.rows is not None:
            self.rows = torch.cat([self.rows, h.float()])
            if len(self.rows) >= self.width:
                self._sum_up_rows()
        elif self.second is not None:
            self._add_squares(h)

    def _add_squares(self, h: Tensor) -> None:
        """Add Σhhᵀ, as float32 multiplies and adds: a product of two numbers of 16 bits is exact in it.

        A GPU's matrix units cut off what they add up, 2⁻²⁴ for each 16 of the terms, so they get a few at a time.
        """
        assert self.second is not None
        if h.is_cuda and h.dtype in (torch.bfloat16, torch.float16) and _SUMS_WIDER:
            for some in h.split(_TERMS):
                self.second += torch.mm(some.mT, some, out_dtype=torch.float32)
        else:
            with full_float32(h.device):
                h = h.float()
                if h.is_cuda or self.width < _WIDE:
                    self.second.addmm_(h.mT, h)
                    return
                self.half = True
                for start, stop in self._panels():  # 9/16 of the products
                    self.second[:stop, start:stop].addmm_(h[:, :stop].mT, h[:, start:stop])

    def _panels(self) -> list[tuple[int, int]]:
        """(start, stop) of eight groups of columns."""
        size = -(-self.width // 8)
        return [(start, min(start + size, self.width)) for start in range(0, self.width, size)]

    def _sum_up_rows(self) -> None:
        if self.rows is not None:
            with full_float32(self.rows.device):
                self.second, self.rows = self.rows.mT @ self.rows, None

    def _require_rows(self) -> None:
        if self.count == 0:
            raise ValueError("no rows were seen: is the loader empty, or is every position padding?")


def symmetric(S: Tensor) -> Tensor:
    """(S + Sᵀ) / 2: on some CPUs XᵀX is symmetric to rounding only, and `eigh` and files look at one triangle."""
    return (S + S.mT) / 2


def sum_of(quotient: Tensor, count: int) -> Tensor:
    """The float32 sum of `count` terms with this mean (rounded to float32)."""
    return (quotient.float().double() * count).float()
