import pytest
import torch
from datasets import Dataset
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import matthews_corrcoef
from transformers import AutoTokenizer

from osrm_peft import Task, evaluate_task, load_task
from osrm_peft.evaluation.evaluate import predict, score
from osrm_peft.models.loading import load_base
from osrm_peft.models.packaged import resolve_model
from osrm_peft.tasks.task import tokenize


def task_of(labels, num_labels, metric):
    rows = Dataset.from_dict({"sentence1": ["x"] * len(labels), "sentence2": [None] * len(labels), "label": labels})
    return Task("t", num_labels, metric, rows, rows)


def one_hot(classes, num_labels):
    return torch.nn.functional.one_hot(torch.tensor(classes), num_labels).float()


def test_metrics_against_hand_and_scipy():
    labels, guessed = [0, 1, 2, 1, 0, 2], [0, 1, 1, 1, 2, 2]
    assert score(task_of(labels, 3, "accuracy"), one_hot(guessed, 3)) == pytest.approx(4 / 6)
    labels, guessed = [0, 1, 1, 1, 0, 1], [0, 1, 1, 0, 1, 1]
    assert score(task_of(labels, 2, "matthews"), one_hot(guessed, 2)) == pytest.approx(
        matthews_corrcoef(labels, guessed)
    )
    labels, guessed = [0.5, -1.0, 3.0, 2.0], [0.4, -2.0, 9.0, 1.0]
    expected = (pearsonr(labels, guessed).statistic + spearmanr(labels, guessed).statistic) / 2
    assert score(task_of(labels, 1, "pearson_spearman"), torch.tensor(guessed)[:, None]) == pytest.approx(expected)


def test_a_constant_prediction_scores_zero_not_nan():
    assert score(task_of([1.0, 2.0, 3.0], 1, "pearson_spearman"), torch.ones(3, 1)) == 0
    assert score(task_of([0, 1, 1], 2, "matthews"), one_hot([1, 1, 1], 2)) == 0


def test_the_head_must_be_the_task_s():
    with pytest.raises(
        ValueError, match="head has 2 outputs, task 't' needs 3: load the adapter with this task's head"
    ):
        score(task_of([0, 1, 2], 3, "accuracy"), torch.zeros(3, 2))


def test_predictions_are_in_the_order_of_the_rows_and_the_mode_is_restored():
    tokenizer, model = AutoTokenizer.from_pretrained(resolve_model("packaged")), load_base("packaged", 2)
    task = load_task("packaged", "sms_spam").sample(validation=24)
    rows = tokenize(task.validation, tokenizer, 48)
    model.train()
    together = predict(model, rows, tokenizer, batch_size=7)
    assert model.training
    model.eval()
    with torch.no_grad():
        single = [model(input_ids=torch.tensor(row["input_ids"])[None]).logits[0] for row in rows]
    torch.testing.assert_close(together, torch.stack(single), rtol=1e-3, atol=1e-4)
    assert evaluate_task(model, task, tokenizer, max_length=48, progress=False) == score(task, torch.stack(single))
