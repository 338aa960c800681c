"""How sure a score is: the tasks' metrics on many resamples of their rows at once."""

import zlib

import numpy as np
from scipy.stats import rankdata

from osrm_peft.checks import choice
from osrm_peft.tasks.task import METRICS, ROW_METRICS

RESAMPLES = 1000


def resamples(task: str, rows: int, seed: int, number: int = RESAMPLES) -> np.ndarray:
    """(1 + number, rows) how often each row counts: once in the first line, as drawn with replacement in the others.

    The same task, number of rows and seed give the same draws, so scores on them can be compared pair by pair.
    """
    generator = np.random.default_rng([seed, zlib.crc32(task.encode()), rows])
    drawn = generator.multinomial(rows, np.full(rows, 1 / rows), size=number)
    return np.concatenate([np.ones((1, rows)), drawn]).astype(np.float64)


def metric_on(metric: str, predictions: np.ndarray, references: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(B,) the metric on rows that count `counts[b]` times.

    Args:
        metric: a task's, as in `evaluate_task`.
        predictions: (N,) classes, numbers for `pearson_spearman`, or a metric's own value of each row (ROW_METRICS).
        references: (N,) the same.
        counts: (B, N) numbers of at least 0.
    """
    choice("metric", metric, (*METRICS, *ROW_METRICS))
    total = counts.sum(1)
    if metric in ROW_METRICS:
        return counts @ predictions / total
    if metric == "accuracy":
        return counts @ (predictions == references) / total
    if metric == "matthews":
        classes = np.union1d(predictions, references)
        predicted, actual = (counts @ (one[:, None] == classes) for one in (predictions, references))
        correct = counts @ (predictions == references)
        square = (total**2 - (predicted**2).sum(1)) * (total**2 - (actual**2).sum(1))
        return _ratio(correct * total - (predicted * actual).sum(1), np.sqrt(square))
    pearson = _correlation(predictions[None], references[None], counts)
    spearman = _correlation(_ranks(predictions, counts), _ranks(references, counts), counts)
    return (pearson + spearman) / 2


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of a score: (1 + B,) values, of which the first is the score itself."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return float(low), float(high)


def _correlation(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Pearson's correlation of (1 or B, N) values; 0 where one of them is constant."""
    total = counts.sum(1, keepdims=True)
    x, y = (one - (counts * one).sum(1, keepdims=True) / total for one in (x, y))
    products = ((counts * one).sum(1) for one in (x * y, x * x, y * y))
    covariance, of_x, of_y = products
    scale = np.sqrt(of_x * of_y)
    return np.where(scale > 1e-12 * total[:, 0], _ratio(covariance, scale), 0.0)


def _ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(B, N) mean ranks of the rows, ties shared, where each row is there `counts` times."""
    dense = rankdata(values, method="dense").astype(int) - 1  # floats in newer versions of SciPy
    groups = np.zeros((len(counts), dense.max() + 1))
    for row, group in enumerate(dense):
        groups[:, group] += counts[:, row]
    middle = groups.cumsum(1) - groups / 2
    return middle[:, dense]


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)
