"""Keeping the largest entries of task vectors, exactly, over one layer or the whole model."""

import torch
from torch import Tensor

from osrm_peft.checks import number
from osrm_peft.merging.methods.registry import AddUp, Stacks, alone

_ROUNDS = ((20, 2048), (10, 1024), (0, 1024))  # (shift, bins): the 31 bits of |float32|, from the top


def check_density(density: float) -> None:
    """Raise ValueError unless 0 < density ≤ 1."""
    number("density", density, 0, 1, open_low=True)


def magnitude_thresholds(stacks: Stacks, density: float, add_up: AddUp = alone) -> Tensor:
    """Per task, the k-th largest |entry| over all layers, k = round(density · entries), at least 1.

    A radix selection on the bits of |float32|, whose order is that of the numbers: exact like a sort of everything,
    in three passes over the layers and with one layer in memory.

    Args:
        stacks: (T, o, n) task vectors, layer by layer; iterated three times.
        density: share of the entries kept, in (0, 1].
        add_up: sums the counts over processes, which have a share of the layers each.

    Returns:
        (T,) float32 on the CPU: keep the entries with |τ| ≥ threshold. Entries equal to it are all kept.
    """
    check_density(density)
    prefix: Tensor | None = None  # (T,) the bits found so far
    rank = torch.empty(0)  # (T,) which largest entry it is, among those that share these bits
    for shift, bins in _ROUNDS:
        counts = None
        for tau in stacks:
            if counts is None:
                counts = torch.zeros(len(tau), bins, dtype=torch.int64, device=tau.device)
            for t, entries in enumerate(tau):
                bits = _bits(entries)
                if prefix is not None:
                    bits = bits[(bits >> (shift + 10)) == int(prefix[t])]
                counts[t] += torch.bincount((bits >> shift) & (bins - 1), minlength=bins)
        if counts is None:
            raise ValueError("there is no layer to take a threshold of")
        counts = add_up(counts.cpu())
        if prefix is None:
            rank = (counts.sum(1).double() * density).round().long().clamp_min(1)  # (T,)
            prefix = torch.zeros_like(rank)
        at_least = counts.flip(1).cumsum(1).flip(1)  # (T, bins): how many lie in this bin or above
        found = ((at_least >= rank[:, None]).sum(1) - 1).clamp_min(0)  # −1 where there are no entries at all
        rank = rank - (at_least.gather(1, found[:, None])[:, 0] - counts.gather(1, found[:, None])[:, 0])
        prefix = (prefix << 10) + found
    assert prefix is not None
    return prefix.to(torch.int32).view(torch.float32)


def keep_above(tau: Tensor, thresholds: Tensor) -> Tensor:
    """(T, o, n) with the entries of |τ_t| < thresholds[t] set to 0."""
    return torch.where(tau.float().abs() >= thresholds.to(tau.device)[:, None, None], tau, 0)


def _bits(entries: Tensor) -> Tensor:
    """(o·n,) int32 bit patterns of |float32|: ordered as the numbers are."""
    return entries.detach().float().abs().flatten().view(torch.int32)
