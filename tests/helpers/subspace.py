"""Second moments of tasks, and what is known of their subspaces."""

import pytest
import torch

from osrm_peft.features.moments import FeatureMoments


def tasks(T, k, n, statistic="token", seed=0):
    drawn = torch.randn(T, k, n, generator=generator(seed)) * torch.linspace(0.2, 3, n)
    return [moments_of(h, statistic) for h in drawn]


def top(S, r):
    """(r, n) the r strongest eigenvectors of a dense S."""
    return torch.linalg.eigh(S)[1].flip(1)[:, :r].T


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def moments_of(h, statistic="token"):
    moments = FeatureMoments(statistic, h.shape[-1])
    moments.add_(h[:, None], None)  # samples of one token
    return moments


def as_second_moment(moments):
    """The same task, of which only the second moment is known (exactly: in float64)."""
    S, n, count = moments.second_moment(), moments.width, moments.rank_bound()
    return FeatureMoments("token", n, count=count, total=torch.zeros(n), second=count * S)


def protected(amount):
    """The option of `choose_directions` for so many directions (an int) or that share of the energy (a float)."""
    return {} if amount is None else {"protect_energy" if isinstance(amount, float) else "protect_rank": amount}


FORMS = {"vectors": lambda moments: moments, "second moments": as_second_moment}
form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
