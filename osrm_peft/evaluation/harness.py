"""Scores by EleutherAI's harness (lm-eval), on text tasks of ours and on the tasks that it knows."""

import copy
import difflib
import logging
import math
import random
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from osrm_peft.checks import integer, shown
from osrm_peft.evaluation.text import compare, inner_model, settings_of
from osrm_peft.tasks.harness import write_harness_tasks
from osrm_peft.tasks.text import TextTask, prompt_text

BATCH = 8  # the harness computes the logits of all positions
_SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}  # lm-eval's own


@dataclass(frozen=True)
class HarnessScore:
    """One metric of one task, or of a group of tasks.

    Attributes:
        task: the harness' name.
        metric: its name, behind a comma that of lm-eval's filter if there is one.
        value: as lm-eval has it: a share, or for some metrics (perplexity) any number.
        stderr: the standard error of a mean over rows; None for other metrics.
        higher_is_better: what lm-eval says of the metric.
        rows: how many were scored.
        split: of the rows; None for a group.
        dataset: its Hub id, if it is from the Hub.
        settings: versions of lm-eval and of the task, few-shot examples, limit, batch size, length, seeds, dtype of the
            softmax, whether the chat template was applied, and how text is generated.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool
    rows: int
    split: str | None
    dataset: str | None
    settings: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """What a manifest says of it."""
        about = asdict(self)
        return about | {"harness": about.pop("settings")}


def evaluate_with_harness(
    model: nn.Module,
    tasks: Sequence[TextTask | str],
    tokenizer: Any,
    *,
    rows: int | None = None,
    shots: int | None = None,
    batch_size: int = BATCH,
    max_length: int | None = None,
    chat_template: bool = False,
) -> list[HarnessScore]:
    """Scores of a causal language model by lm-eval, in this process.

    On a TextTask `acc`, `mcc` and `exact_match` are what `evaluate_task` has as accuracy, matthews and exact_match, as
    long as no row is cut (there to 128 tokens, here to the model's positions) and the tokens of a prompt with its
    completion are those of both one after the other.

    Args:
        model: with or without an adapter, on its device. It is left as it was.
        tasks: text tasks, or names that lm-eval knows, whose rows it may load from the Hub.
        rows: at most so many a task: a seeded sample of a TextTask (`Task.sample`), the first of lm-eval's tasks.
        shots: few-shot examples, of the training rows. None: as many as the task's file says, of a TextTask none.
        batch_size: sequences a batch.
        max_length: tokens. None: the model's positions.
        chat_template: apply the tokenizer's to every prompt.

    Returns:
        All metrics, in the order of the tasks, each task's own score first.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: a task that lm-eval does not know, a model with a classifier head, or NaN logits.
    """
    for name, value, least in (("rows", rows, 1), ("shots", shots, 0), ("max_length", max_length, 2)):
        if value is not None:
            integer(name, value, least)
    integer("batch_size", batch_size, 1)
    manager = _manager(check_harness_tasks(tasks))
    _check(model, tasks, tokenizer, shots, chat_template)
    own: dict[str, Any] = {one.name: one.sample(validation=rows) for one in tasks if isinstance(one, TextTask)}
    for one in own.values():
        _check_ends(one, tokenizer, chat_template)
    with tempfile.TemporaryDirectory() as folder, _quiet(), _left_as_it_was(model):
        files = write_harness_tasks(own.values(), Path(folder, "tasks"), tokenizer)
        places = dict(zip(own, map(str, files), strict=True))
        lm = _harness_model(model, tokenizer, batch_size, max_length)
        parts = [manager.load(one if isinstance(one, str) else places[one.name]) for one in tasks]
        loaded = {kind: _joined(part.get(kind, {}) for part in parts) for kind in ("tasks", "groups", "group_map")}
        for name, task in loaded["tasks"].items():
            _set(task, shots, own.get(name), lm, model)
        results = _run(lm, loaded, rows, chat_template)
    common: dict[str, Any] = {"lm_eval": version("lm_eval"), "limit": rows, "shots": shots, "max_length": max_length}
    common |= {"batch_size": batch_size, "chat_template": chat_template, "seeds": _SEEDS, "softmax": "float32"}
    names = [name for part in parts for name in _reported(part, results)]
    return [one for name in names for one in _scores(name, results, loaded["tasks"].get(name), common)]


def check_harness_tasks(tasks: Iterable[TextTask | str]) -> bool:
    """Check names against lm-eval's, before any work.

    Returns:
        Whether any task is one of lm-eval's own.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: a name that it does not know, with those that are near; or two tasks of one name.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ImportError("the harness is lm-eval: pip install 'osrm_peft[harness]'") from error
    for one in tasks:
        if not isinstance(one, str | TextTask):
            raise ValueError(
                f"the rows of {one.name!r} are texts with labels, and lm-eval asks in words: give rows of prompt and "
                "completion (the suite packaged-text has some)"
            )
    every = [one if isinstance(one, str) else one.name for one in tasks]
    if not every:
        raise ValueError("name at least one task of lm-eval's, or give a text task")
    twice = sorted({name for name in every if every.count(name) > 1})
    if twice:
        raise ValueError(f"the task {shown(twice[0])} is there twice: name each once")
    foreign = [one for one in tasks if isinstance(one, str)]
    known = _manager(True).all_tasks if foreign else []
    for name in foreign:
        if name not in known:
            near = (
                difflib.get_close_matches(name, known, 5) or [one for one in known if name.lower() in one.lower()][:5]
            )
            more = f": did you mean {', '.join(near)}?" if near else ""
            raise ValueError(
                f"lm-eval {version('lm_eval')} knows no task {shown(name)}{more} (`lm_eval ls tasks` lists all)"
            )
    return bool(foreign)


def rouge_l(references: Sequence[str], predictions: Sequence[str]) -> float:
    """ROUGE-L of one row, as lm-eval calls a metric."""
    return compare("rouge_l", predictions[0], references[0])


@cache
def _manager(all_tasks: bool) -> Any:
    """lm-eval's index of tasks: of its own ones, which takes seconds to read, or of none."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=all_tasks)


def _check(model: Any, tasks: Iterable[Any], tokenizer: Any, shots: int | None, chat_template: bool) -> None:
    inner = inner_model(model)
    if not getattr(inner, "can_generate", lambda: False)():
        raise ValueError(
            f"{type(inner).__name__} is no causal language model, which the harness needs: score tasks of classes with "
            "evaluate_task, or osrm-peft evaluate without --harness"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token, at which the harness stops: set its eos_token")
    if chat_template and tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template: leave chat_template=True out")
    for task in (one for one in tasks if isinstance(one, TextTask)):
        if (shots or chat_template) and not isinstance(task.train[0]["prompt"], str):
            raise ValueError(
                f"the rows of {task.name!r} are messages, which the chat template has put into words already: leave "
                "shots and chat_template out"
            )
        if shots and shots > len(task.train):
            raise ValueError(f"shots={shots}: {task.name!r} has {len(task.train)} training rows")


def _check_ends(task: TextTask, tokenizer: Any, chat_template: bool) -> None:
    """Refuse answers that share a token with the prompt: lm-eval scores what follows the prompt's own tokens."""
    rows = task.validation["prompt"] if task.answers else []
    asked = [[{"role": "user", "content": one}] if chat_template else one for one in rows]
    prompts = [prompt_text(one, tokenizer) for one in asked]
    before = tokenizer([one.rstrip() for one in prompts])["input_ids"] if prompts else []
    for answer in task.answers or ():
        for start, whole in zip(before, tokenizer([one + answer for one in prompts])["input_ids"], strict=True):
            if whole[: len(start)] != start or len(whole) == len(start):
                raise ValueError(
                    f"behind a prompt of {task.name!r} the completion {shown(answer)} has no tokens of its own, which "
                    "lm-eval needs: begin completions with a space"
                )


def _set(task: Any, shots: int | None, own: TextTask | None, lm: Any, model: Any) -> None:
    """What lm-eval's command sets in a loaded task; and how much `evaluate_task` lets a model write."""
    usual = task.get_config("num_fewshot")
    if shots and usual == 0:
        raise ValueError(f"the task {task.task_name!r} takes no few-shot examples: leave shots={shots} out")
    task.set_config("num_fewshot", (usual or 0) if shots is None else shots)
    task.set_fewshot_seed(seed=_SEEDS["fewshot"])
    if own is not None and own.answers is None:
        most = settings_of(own, lm.tokenizer, model).max_new_tokens
        task.set_config("generation_kwargs", {"max_gen_toks": most}, update=True)
    if task.get_config("output_type") == "generate_until":
        most = (task.get_config("generation_kwargs") or {}).get("max_gen_toks", lm.max_gen_toks)
        if most >= lm.max_length:
            raise ValueError(
                f"{task.task_name!r} writes up to {most} tokens, and max_length={lm.max_length} leaves none for the "
                "prompt: raise it, or leave the task out"
            )


class _Untouched:
    """A model as lm-eval calls it: of a module it would tie the weights anew, the adapter's among them."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self.config = model, inner_model(model).config
        self.device = next(model.parameters()).device
        self.generate: Any = model.generate

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        output = self._model(*arguments, **named)
        if output.logits.isnan().any():
            raise ValueError("the model's logits are NaN: is the adapter or its scale sound?")
        return output


def _harness_model(model: nn.Module, tokenizer: Any, batch_size: int, max_length: int | None) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        _Untouched(model),
        backend="causal",
        tokenizer=copy.deepcopy(tokenizer),
        batch_size=batch_size,
        max_length=max_length,
        softmax_dtype=torch.float32,
    )


def _run(lm: Any, loaded: dict[str, Any], rows: int | None, chat_template: bool) -> Any:
    from lm_eval.evaluator import evaluate

    return evaluate(
        lm, loaded, limit=rows, bootstrap_iters=0, apply_chat_template=chat_template, fewshot_as_multiturn=True
    )


def _reported(part: Mapping[str, Any], results: Mapping[str, Any]) -> list[str]:
    """The group that was asked for, if it has a score of its own; else its tasks."""
    group = next(iter(part.get("groups") or ()), "")
    return [group] if group in (results.get("groups") or {}) else list(part["tasks"])


def _scores(name: str, results: Mapping[str, Any], task: Any, common: Mapping[str, Any]) -> Iterator[HarnessScore]:
    from lm_eval.api.metrics import mean

    found, config = results["results"][name], results["configs"].get(name, {})
    averages = {} if task is None else task.aggregation()
    places = {metric: place for place, metric in enumerate(averages)}
    keys = [key for key, value in found.items() if "," in key and "_stderr," not in key and not isinstance(value, str)]
    settings = {"task_version": results["versions"].get(name), "num_fewshot": results["n-shot"].get(name)}
    settings |= {"generation": config.get("generation_kwargs"), "config": config.get("dataset_name"), **common}
    dataset = config.get("dataset_path")
    for key in sorted(keys, key=lambda key: places.get(key.rpartition(",")[0], len(places))):
        metric, _, through = key.rpartition(",")
        if not math.isfinite(found[key]):
            raise ValueError(f"{metric} of {name!r} is {found[key]}: is the adapter or its scale sound?")
        values = [one[metric] for one in results["samples"].get(name, ()) if one["filter"] == through]
        averaged = averages.get(metric) is mean and len(values) > 1
        yield HarnessScore(
            name,
            metric if through == "none" else f"{metric},{through}",
            float(found[key]),
            statistics.stdev(map(float, values)) / math.sqrt(len(values)) if averaged else None,
            results["higher_is_better"].get(name, {}).get(metric) is not False,
            int(found["sample_len"]),
            config.get("test_split") or config.get("validation_split"),
            dataset if dataset and "/" in dataset and not Path(dataset).exists() else None,
            settings,
        )


def _joined(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for part in parts for name, value in part.items()}


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """In eval mode, and with lm-eval's seeds; afterwards mode and random streams are as they were."""
    training, device = model.training, next(model.parameters()).device
    before, numpy_before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        random.seed(_SEEDS["random"])
        np.random.seed(_SEEDS["numpy"])
        torch.manual_seed(_SEEDS["torch"])
        model.eval()
        try:
            yield
        finally:
            model.train(training)
            random.setstate(before)
            np.random.set_state(numpy_before)


@contextmanager
def _quiet() -> Iterator[None]:
    """What lm-eval prints on stderr; of its log the errors, and one warning if it cut prompts."""
    log, cut = logging.getLogger("lm_eval"), set[bool]()

    def keep(record: logging.LogRecord) -> bool:
        cut.add("truncat" in record.getMessage().lower())
        return record.levelno >= logging.ERROR

    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(keep)
    handlers, propagate = log.handlers, log.propagate
    log.handlers, log.propagate = [handler], False
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        log.handlers, log.propagate = handlers, propagate
    if True in cut:
        warnings.warn("lm-eval cut prompts at their beginning: raise max_length, or ask for fewer shots", stacklevel=4)
