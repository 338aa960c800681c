"""Scores: a model's predictions on a task, measured by the task's metric through `evaluate`."""

from functools import cache
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding

from osrm_peft.checks import printable
from osrm_peft.distributed import ALONE, Processes
from osrm_peft.evaluation.text import predict_text
from osrm_peft.tasks.task import METRICS, ROW_METRICS, Task, tokenize
from osrm_peft.tasks.text import TextTask, tokenize_text


def evaluate_task(
    model: nn.Module,
    task: Task,
    tokenizer,
    *,
    batch_size: int = 64,
    max_length: int = 128,
    progress: bool = True,
    distributed: bool = False,
) -> float:
    """Score of `model` on the task's validation rows.

    Args:
        model: takes the tokenizer's columns and returns `.logits` of shape (b, task.num_labels), or of a TextTask those
            of a causal language model. Its train or eval mode is restored.
        distributed: all processes of torch.distributed call this, each with its copy of the model, and share the rows.

    Returns:
        The task's metric: accuracy, exact match or ROUGE-L in [0, 1]; Matthews, or the mean of Pearson and Spearman, in
        [−1, 1].

    Raises:
        ValueError: the head's width is not the task's.
    """
    bar = f"evaluate {printable(task.name)}" if progress else None
    rows = tokens_of(task, tokenizer, max_length)
    outputs = outputs_of(model, task, rows, tokenizer, Processes.of(distributed), batch_size=batch_size, progress=bar)
    return score(task, outputs)


def tokens_of(task: Task, tokenizer: Any, max_length: int) -> Dataset:
    """The tokens of a task's validation rows, for `outputs_of`."""
    read = tokenize_text if isinstance(task, TextTask) else tokenize
    return read(task.validation, tokenizer, max_length)


def outputs_of(
    model: nn.Module, task: Task, rows: Dataset, tokenizer: Any, processes: Processes = ALONE, **options: Any
) -> Tensor:
    """(N, C) what `predicted` takes, of rows that are tokens: logits, or what `predict_text` returns.

    Args:
        **options: batch_size, progress.
    """
    if isinstance(task, TextTask):
        return predict_text(model, task, rows, tokenizer, processes, **options)
    return predict(model, rows, tokenizer, processes, **options)


def predict(
    model: nn.Module,
    rows: Dataset,
    tokenizer,
    processes: Processes = ALONE,
    *,
    batch_size: int = 64,
    progress: str | None = None,
) -> Tensor:
    """(N, C) logits in the order of `rows`; batches hold rows of like length, so little padding is computed."""
    by_length = np.argsort([-len(tokens) for tokens in rows["input_ids"]], kind="stable")
    order = np.array(processes.share(by_length.tolist()), dtype=np.int64)
    columns = [name for name in rows.column_names if name != "labels"]
    loader = DataLoader(
        rows.select_columns(columns).select(order),
        batch_size=batch_size,
        collate_fn=DataCollatorWithPadding(tokenizer),
    )
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    logits = []
    try:
        with torch.no_grad():
            for batch in tqdm(
                loader, desc=progress, disable=progress is None or not processes.is_main_process, leave=False
            ):
                logits.append(model(**batch.to(device)).logits.float().cpu())
    finally:
        model.train(training)
    parts = processes.gather((order, torch.cat(logits) if logits else None))
    orders, pieces = zip(*[part for part in parts if part[1] is not None], strict=True)
    return torch.cat(pieces)[torch.from_numpy(np.argsort(np.concatenate(orders)))]


def score(task: Task, logits: Tensor) -> float:
    """The task's metric of (N, C) logits against its validation labels."""
    predictions, references = predicted(task, logits), task.validation["label"]
    if task.metric in ROW_METRICS:
        return float(predictions.double().mean())
    return float(_metric(task.metric).compute(predictions=predictions.tolist(), references=list(references))["score"])


def predicted(task: Task, logits: Tensor) -> Tensor:
    """(N,) the classes, or numbers for a regression, that (N, C) logits say.

    Raises:
        ValueError: the head's width is not the task's, or a logit is NaN.
    """
    if logits.shape[1] != task.num_labels:
        raise ValueError(
            f"the model's head has {logits.shape[1]} outputs, task {task.name!r} needs {task.num_labels}: "
            "load the adapter with this task's head"
        )
    if logits.isnan().any():
        raise ValueError(f"the model's predictions on task {task.name!r} are NaN: is the adapter or its scale sound?")
    return logits[:, 0] if task.num_labels == 1 else logits.argmax(1)


@cache
def _metric(name: str) -> evaluate.EvaluationModule:
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}: choose from {', '.join(METRICS)}")
    return evaluate.load(str(Path(__file__).parent.parent / "tasks/metric"), name)
