from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osrm_peft.selection.race import FACTOR, FEWEST, rounds, survivors


@settings(max_examples=50)
@given(st.integers(1, 200), st.integers(2, 5000))
def test_rounds_grow_to_all_rows_and_never_begin_with_few(candidates, rows):
    shares = rounds(candidates, rows)
    assert shares[-1] == 1 and shares == sorted(shares)
    assert all(later == pytest.approx(FACTOR * before) for before, later in pairwise(shares))
    assert len(shares) == 1 or shares[0] * rows >= FEWEST - 1e-6
    assert FACTOR ** (len(shares) - 1) <= candidates  # no round without anybody to leave


def test_halving_costs_less_than_everything():
    shares, left, cost, before = rounds(24, 256), 24, 0.0, 0.0
    for share in shares:
        cost, before, left = cost + left * (share - before), share, -(-left // FACTOR)
    assert len(shares) == 3 and cost < 0.35 * 24


def values(*means, spread=0.0, seed=0):
    noise = np.random.default_rng(seed).normal(scale=spread, size=(len(means), 200)) if spread else np.zeros((1, 200))
    return [np.concatenate([[mean], mean + noise[place % len(noise)]]) for place, mean in enumerate(means)]


def test_the_best_third_goes_on_and_what_may_be_as_good():
    assert survivors(values(0.1, 0.5, 0.3, 0.2, 0.4, 0.0)) == [1, 4]
    assert survivors(values(0.1, 0.5, 0.3, 0.2, 0.4, 0.0, spread=0.5)) == [1, 4, 2]  # at most half
    assert survivors([np.array([0.1]), np.array([0.5])]) == [1]  # a score of the user's has no resamples
    assert survivors(values(0.5, 0.5, 0.5)) == [0, 1]  # equal: in the order given, all may be the best
    assert survivors(values(0.3)) == [0]


@settings(max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0, 0.3))
def test_the_best_always_survives(means, spread):
    found = survivors(values(*means, spread=spread))
    assert means[found[0]] == max(means) and len(found) == len(set(found)) <= max(1, -(-len(means) // 2))
