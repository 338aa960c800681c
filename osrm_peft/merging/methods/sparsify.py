"""Keeping the largest entries of task vectors, exactly, over one layer or the whole model."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from osrm_peft.checks import number
from osrm_peft.merging.methods.registry import AddUp, Stacks, alone, on_each

_HALF = 16  # bits of |float32| that the second pass tells; the first tells the 15 above


def check_density(density: float) -> None:
    """Raise ValueError unless 0 < density ≤ 1."""
    number("density", density, 0, 1, open_low=True)


def magnitude_thresholds(stacks: Stacks, density: float, add_up: AddUp = alone) -> Tensor:
    """Per task, the k-th largest |entry| over all layers, k = round(density · entries), at least 1.

    A radix selection on the bits of |float32|, whose order is that of the numbers: exact like a sort of everything,
    in two passes over the layers and with one layer in memory (a few, where the stacks are made in threads).

    Args:
        stacks: (T, o, n) task vectors, layer by layer; iterated twice.
        density: share of the entries kept, in (0, 1].
        add_up: sums the counts over processes, which have a share of the layers each.

    Returns:
        (T,) float32 on the CPU: keep the entries with |τ| ≥ threshold. Entries equal to it are all kept.
    """
    check_density(density)
    counts = add_up(_total(stacks, _counts_of_tops))
    rank = (counts.sum(1).double() * density).round().long().clamp_min(1)  # (T,) which largest entry it is
    tops, above = _bin_of(counts, rank)
    counts = add_up(_total(stacks, partial(_counts_below, tops=tops.tolist())))
    rests, _ = _bin_of(counts, rank - above)
    return ((tops << _HALF) + rests).to(torch.int32).view(torch.float32)


def _total(stacks: Stacks, count: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum of (T, bins) counts over layers, on the CPU."""
    total = None
    for counts in on_each(count, stacks):
        total = counts if total is None else total.add_(counts)
    if total is None:
        raise ValueError("there is no layer to take a threshold of")
    return total.cpu()


def _counts_of_tops(tau: Tensor) -> Tensor:
    """(T, 2¹⁵) how many entries of each τ_t have these leading bits."""
    return torch.stack([torch.bincount(_bits(one) >> _HALF, minlength=2 ** (31 - _HALF)) for one in tau])


def _counts_below(tau: Tensor, tops: list[int]) -> Tensor:
    """(T, 2¹⁶) how many entries with the leading bits `tops` have these further bits."""
    counts = []
    for one, top in zip(map(_bits, tau), tops, strict=True):
        bits = one[(one >> _HALF) == top]
        counts.append(torch.bincount(bits & (2**_HALF - 1), minlength=2**_HALF))
    return torch.stack(counts)


def _bin_of(counts: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """(T,) the bin of the rank-th largest entry, and how many lie above that bin."""
    at_least = counts.flip(1).cumsum(1).flip(1)  # (T, bins): how many lie in this bin or above
    found = ((at_least >= rank[:, None]).sum(1) - 1).clamp_min(0)  # −1 where there are no entries at all
    return found, (at_least.gather(1, found[:, None]) - counts.gather(1, found[:, None]))[:, 0]


def keep_above(tau: Tensor, thresholds: Tensor) -> Tensor:
    """(T, o, n) with the entries of |τ_t| < thresholds[t] set to 0."""
    if tau.dtype != torch.float32:
        return torch.where(tau.float().abs() >= thresholds.to(tau.device)[:, None, None], tau, 0)
    kept = torch.empty_like(tau)  # torch.where takes ten times as long as this
    for out, one, below in zip(kept, tau, torch.nextafter(thresholds, torch.zeros(1)).tolist(), strict=True):
        torch.hardshrink(one, below, out=out)  # keeps |τ| > below
    return kept


def _bits(entries: Tensor) -> Tensor:
    """(o·n,) int32 bit patterns of |float32|: ordered as the numbers are."""
    return entries.detach().float().abs().flatten().view(torch.int32)
