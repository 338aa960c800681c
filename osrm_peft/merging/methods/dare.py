"""DARE: drop entries at random and rescale the rest, then task arithmetic or TIES."""

from collections.abc import Sequence

import torch
from torch import Tensor

from osrm_peft.checks import number
from osrm_peft.merging.methods import ties
from osrm_peft.merging.methods.registry import register
from osrm_peft.merging.methods.task_arithmetic import task_arithmetic

_PAPER = "DARE (Yu et al., ICML 2024), arXiv:2311.03099"


def check(drop_rate: float, **of_ties) -> None:
    """Raise ValueError for options out of range."""
    number("drop_rate", drop_rate, 0, 1)
    if drop_rate == 1:
        raise ValueError("drop_rate=1 drops every entry: it must lie in [0, 1)")
    if of_ties:
        ties.check(**of_ties)


def drop_and_rescale(tau: Tensor, generators: Sequence[torch.Generator], *, drop_rate: float = 0.5) -> Tensor:
    """m ⊙ τ_t / (1 − p), m ~ Bernoulli(1 − p) for each entry: unbiased, E = τ_t (DARE, Eq. 1–3).

    Args:
        tau: (T, o, n) task vectors of one layer.
        generators: T, on the CPU whatever the device of `tau`; the engine seeds each from the seed, the task's and the
            layer's name, so that neither the order of adapters nor that of layers matters.
        drop_rate: p in [0, 1).

    Returns:
        (T, o, n) in the dtype of `tau`.
    """
    kept = [
        torch.rand(tau.shape[1:], generator=generator, dtype=torch.float32).ge_(drop_rate) for generator in generators
    ]
    return tau / (1 - drop_rate) * torch.stack(kept).to(tau)


register("dare", paper=_PAPER, scale=0.3, check=check, prepare=drop_and_rescale)(task_arithmetic)
register(
    "dare_ties",
    paper=_PAPER,
    check=check,
    summarise=ties.summarise,
    prepare=drop_and_rescale,
    whole_tensor=ties.trims_layers,
)(ties.ties)
