import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from osrm_peft.evaluation.bootstrap import interval, metric_on, resamples
from osrm_peft.evaluation.evaluate import score
from osrm_peft.tasks.task import Task


def brute_force(metric, predictions, references, counts):
    """The metric of `evaluate_task` on the rows, written out as often as they count."""
    rows = np.repeat(np.arange(len(counts)), counts.astype(int))
    labels = 1 if metric == "pearson_spearman" else 4
    column = [float(one) if labels == 1 else int(one) for one in references[rows]]
    task = Task("t", labels, metric, None, Dataset.from_dict({"label": column}))
    chosen = torch.tensor(predictions[rows], dtype=torch.float64)
    logits = chosen[:, None] if labels == 1 else torch.nn.functional.one_hot(chosen.long(), 4).double()
    return score(task, logits)


@pytest.mark.parametrize("metric", ["accuracy", "matthews", "pearson_spearman"])
@settings(max_examples=25)
@given(data=st.data())
def test_the_metric_of_resampled_rows_is_that_of_the_rows_written_out(metric, data):
    rows = data.draw(st.integers(2, 12))
    values = st.lists(st.integers(0, 3), min_size=rows, max_size=rows).map(lambda found: np.array(found, float))
    predictions, references = data.draw(values), data.draw(values)
    counts = resamples("t", rows, data.draw(st.integers(0, 9)), 5)
    found = metric_on(metric, predictions, references, counts)
    wanted = [brute_force(metric, predictions, references, one) for one in counts]
    # evaluate keeps predictions of pearson_spearman in float32, which these whole numbers fit
    np.testing.assert_allclose(found, wanted, atol=1e-9)


def test_resamples_are_those_of_task_rows_and_seed():
    first = resamples("a", 30, 0)
    assert first.shape == (1001, 30) and (first.sum(1) == 30).all() and (first[0] == 1).all()
    np.testing.assert_array_equal(first, resamples("a", 30, 0))
    assert not np.array_equal(first, resamples("b", 30, 0)) and not np.array_equal(first, resamples("a", 30, 1))


def test_the_interval_of_an_accuracy_is_as_wide_as_its_binomial():
    counts = resamples("a", 400, 0)
    predictions = np.zeros(400)
    references = (np.arange(400) < 100).astype(float)  # 300 of 400 are right
    low, high = interval(metric_on("accuracy", predictions, references, counts))
    half = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert low == pytest.approx(0.75 - half, abs=0.01) and high == pytest.approx(0.75 + half, abs=0.01)


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="unknown metric 'f1': choose from accuracy"):
        metric_on("f1", np.zeros(2), np.zeros(2), np.ones((1, 2)))
