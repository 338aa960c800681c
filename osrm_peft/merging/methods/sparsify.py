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
    counts = add_up(_total(stacks, _tops, 2 ** (31 - _HALF)))
    rank = (counts.sum(1).double() * density).round().long().clamp_min(1)  # (T,) which largest entry it is
    tops, above = _bin_of(counts, rank)
    counts = add_up(_total(stacks, partial(_rests, tops=tops.tolist()), 2**_HALF))
    rests, _ = _bin_of(counts, rank - above)
    return ((tops << _HALF) + rests).to(torch.int32).view(torch.float32)


def _total(stacks: Stacks, bins_of: Callable[[Tensor], list[Tensor]], number: int) -> Tensor:
    """(T, number) how many entries of each τ_t are in each bin, over all layers, on the CPU."""

    def count(tau: Tensor) -> tuple[bool, list[Tensor]]:
        few = tau[0].numel() < number // 4  # then a table for each layer would be most of the work
        bins = bins_of(tau)
        return few, bins if few else [torch.bincount(one, minlength=number) for one in bins]

    total = None
    for few, found in on_each(count, stacks):
        if total is None:
            total = torch.zeros(len(found), number, dtype=torch.int64, device=found[0].device)
        for counts, one in zip(total, found, strict=True):
            if few:
                counts.index_add_(0, one, torch.ones_like(one, dtype=torch.int64))
            else:
                counts += one
    if total is None:
        raise ValueError("there is no layer to take a threshold of")
    return total.cpu()


def _tops(tau: Tensor) -> list[Tensor]:
    """The 15 leading bits of the entries of each τ_t."""
    return [_bits(one) >> _HALF for one in tau]


def _rests(tau: Tensor, tops: list[int]) -> list[Tensor]:
    """The other 16 bits of those entries whose leading bits are `tops`."""
    return [bits[(bits >> _HALF) == top] & (2**_HALF - 1) for bits, top in zip(map(_bits, tau), tops, strict=True)]


def _bin_of(counts: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """(T,) the bin of the rank-th largest entry, and how many lie above that bin."""
    at_least = counts.flip(1).cumsum(1).flip(1)  # (T, bins): how many lie in this bin or above
    found = ((at_least >= rank[:, None]).sum(1) - 1).clamp_min(0)  # −1 where there are no entries at all
    return found, (at_least.gather(1, found[:, None]) - counts.gather(1, found[:, None]))[:, 0]


def keep_above(tau: Tensor, thresholds: Tensor) -> Tensor:
    """(T, o, n) with the entries of |τ_t| < thresholds[t] set to 0."""
    if tau.dtype != torch.float32 or tau.requires_grad:
        return torch.where(tau.float().abs() >= thresholds.to(tau.device)[:, None, None], tau, 0)
    kept = torch.empty_like(tau)  # torch.where takes ten times as long as this
    thresholds = thresholds.float().cpu()
    below_them = torch.nextafter(thresholds, torch.zeros_like(thresholds))
    for out, one, below in zip(kept, tau, below_them.tolist(), strict=True):
        torch.hardshrink(one, below, out=out)  # keeps |τ| > below
    return kept


def _bits(entries: Tensor) -> Tensor:
    """(o·n,) int32 bit patterns of |float32|: ordered as the numbers are."""
    return entries.detach().float().abs().flatten().view(torch.int32)
