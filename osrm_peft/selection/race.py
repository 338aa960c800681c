"""Successive halving: all candidates on few rows, the best of them on more, the last on all. Pure and deterministic."""

import math
from collections.abc import Sequence

import numpy as np

FACTOR = 3  # a round has this many times the rows of the one before it, and a third of the candidates
FEWEST = 24  # rows of a task in the first round: with fewer, luck decides


def rounds(candidates: int, rows: int) -> list[float]:
    """The share of all rows that each round uses; the last is 1.

    Args:
        candidates: how many there are.
        rows: rows of the largest task.
    """
    useful = int(math.log(max(candidates, 1), FACTOR) + 1e-9)
    allowed = int(math.log(max(rows / FEWEST, 1), FACTOR) + 1e-9)
    return [float(FACTOR) ** -place for place in range(min(useful, allowed), -1, -1)]


def survivors(values: Sequence[np.ndarray]) -> list[int]:
    """The candidates that go on: the best third, and others that may be as good as the best of all; at most half.

    Args:
        values: (1 + B,) each: the value on the rows, then on B resamples of them, the same for all.

    Returns:
        Their places, best first; equal ones in the order given.
    """
    order = sorted(range(len(values)), key=lambda place: -values[place][0])
    third, half = -(-len(values) // FACTOR), -(-len(values) // 2)
    best = values[order[0]]

    def may_be_best(place: int) -> bool:
        difference = best - values[place]
        return len(difference) > 1 and bool(difference[0] <= difference[1:].std())

    close = [place for place in order[third:half] if may_be_best(place)]
    return order[:third] + close
