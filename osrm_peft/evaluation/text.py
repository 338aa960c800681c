"""What a causal language model makes of a text task: how likely each answer is, or what it writes."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig

from osrm_peft.distributed import ALONE, Processes
from osrm_peft.tasks.task import WRITTEN, Task
from osrm_peft.tasks.text import TextTask

_MOST_NEW = 256  # tokens that a completion may have at most


def predict_text(
    model: nn.Module,
    task: TextTask,
    rows: Dataset,
    tokenizer: Any,
    processes: Processes = ALONE,
    *,
    batch_size: int = 64,
    progress: str | None = None,
) -> Tensor:
    """What `evaluate_task` scores, row by row.

    Args:
        rows: of `tokenize_text`, of some of the task's rows.

    Returns:
        (N, C) log-likelihoods of the C answers, natural logarithms summed over their tokens (the end token is none of
        them); or (N, 1) the metric of each row: between the written and the wanted completion, or of the wanted one.
    """
    if task.metric == "inverse_perplexity":
        return inverse_perplexities(model, rows, tokenizer, processes, batch_size=batch_size, progress=progress)
    prompts = [tokens[: mask.index(1)] for tokens, mask in zip(rows["input_ids"], rows["completion_mask"], strict=True)]
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    if task.answers is not None:
        answers = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in task.answers]
        return likelihoods(model, prompts, answers, tokenizer, processes, **options)
    written = generate(model, prompts, tokenizer, settings_of(task, tokenizer, model), processes, **options)
    values = [compare(task.metric, text, wanted) for text, wanted in zip(written, rows["completion"], strict=True)]
    return torch.tensor(values)[:, None]


def likelihoods(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    tokenizer: Any,
    processes: Processes = ALONE,
    *,
    batch_size: int = 64,
    progress: str | None = None,
) -> Tensor:
    """(N, C) log p(answer | prompt), natural logarithm summed over the answer's tokens, float32.

    A prompt runs once, and its answers go on from its cache. Batches hold prompts of like length, padded on the left.

    Raises:
        ValueError: a model without the usual cache of keys and values.
    """
    device = next(model.parameters()).device
    lengths, most = torch.tensor([len(answer) for answer in answers], device=device), max(map(len, answers))
    tokens = torch.tensor([[*answer, *[0] * (most - len(answer))] for answer in answers], device=device)  # (C, most)

    def one(batch: Sequence[int]) -> Tensor:
        inputs = _padded([prompts[row] for row in batch], tokenizer, model)
        output = model(**inputs, use_cache=True, **_last(model, 1))
        logits = [output.logits[:, -1].float().log_softmax(-1).repeat_interleave(len(answers), 0)[:, None]]
        ids = tokens.repeat(len(batch), 1)
        if most > 1:
            cache: Any = getattr(output, "past_key_values", None)
            if not hasattr(cache, "batch_repeat_interleave"):
                raise ValueError(f"{type(inner_model(model)).__name__} has no cache of keys and values to go on from")
            cache.batch_repeat_interleave(len(answers))
            mask = inputs["attention_mask"].repeat_interleave(len(answers), 0)
            more: dict[str, Tensor] = {"attention_mask": torch.cat([mask, torch.ones_like(ids[:, 1:])], 1)}
            if "position_ids" in inputs:
                more["position_ids"] = mask.sum(1, keepdim=True) + torch.arange(most - 1, device=device)
            logits.append(
                model(ids[:, :-1], past_key_values=cache, use_cache=True, **more).logits.float().log_softmax(-1)
            )
        found = torch.cat(logits, 1).gather(2, ids[..., None])[..., 0]  # (b·C, most)
        real = (torch.arange(most, device=device) < lengths[:, None]).repeat(len(batch), 1)
        return found.where(real, 0).sum(1).reshape(len(batch), len(answers)).cpu()

    found = _in_batches(model, one, [len(prompt) for prompt in prompts], processes, batch_size, progress)
    return torch.stack(found)


def inverse_perplexities(
    model: nn.Module,
    rows: Dataset,
    tokenizer: Any,
    processes: Processes = ALONE,
    *,
    batch_size: int = 64,
    progress: str | None = None,
) -> Tensor:
    """(N, 1) exp of the mean log p of a completion's tokens, its end token among them: exp(−loss) of the row, float32.

    Args:
        rows: of `tokenize_text`.
    """
    sequences = rows["input_ids"]
    lengths = [sum(mask) for mask in rows["completion_mask"]]

    def one(batch: Sequence[int]) -> list[float]:
        inputs = _padded([sequences[row] for row in batch], tokenizer, model)
        most = max(lengths[row] for row in batch)
        logits = model(**inputs, **_last(model, most + 1)).logits[:, -most - 1 : -1].float().log_softmax(-1)
        found = logits.gather(2, inputs["input_ids"][:, -most:, None])[..., 0]
        return [found[at, most - lengths[row] :].mean().exp().item() for at, row in enumerate(batch)]

    found = _in_batches(model, one, list(map(len, sequences)), processes, batch_size, progress)
    return torch.tensor(found)[:, None]


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    tokenizer: Any,
    settings: GenerationConfig,
    processes: Processes = ALONE,
    *,
    batch_size: int = 64,
    progress: str | None = None,
) -> list[str]:
    """What the model writes behind each prompt, greedily, up to the end token (left out)."""

    def one(batch: Sequence[int]) -> list[str]:
        inputs = _padded([prompts[row] for row in batch], tokenizer, model)
        inputs.pop("position_ids", None)  # generate() makes them
        written = model.generate(**inputs, generation_config=settings)[:, inputs["input_ids"].shape[1] :]  # type: ignore[operator]
        return tokenizer.batch_decode(written, skip_special_tokens=True)

    return _in_batches(model, one, [len(prompt) for prompt in prompts], processes, batch_size, progress)


def settings_of(task: TextTask, tokenizer: Any, model: Any = None) -> GenerationConfig:
    """How a completion of the task is written: greedily, with room for twice the longest of the training rows."""
    completions = sorted(set(task.train["completion"]))
    longest = max(map(len, tokenizer(completions, add_special_tokens=False)["input_ids"]))
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {one for one in [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])] if one is not None}
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=min(_MOST_NEW, 2 * longest + 1),
        eos_token_id=sorted(ends) or None,
        pad_token_id=tokenizer.pad_token_id,
    )


def written_by(task: Task, tokenizer: Any) -> dict[str, Any]:
    """{"generation": how its completions are written}, for the records of a score that compares them; else nothing."""
    if not isinstance(task, TextTask) or task.metric not in WRITTEN:
        return {}
    settings = settings_of(task, tokenizer)
    return {"generation": {name: getattr(settings, name) for name in ("do_sample", "max_new_tokens")}}


def compare(metric: str, written: str, wanted: str) -> float:
    """One row's metric, from 0 to 1."""
    if metric == "exact_match":
        return float(written.strip() == wanted.strip())
    return _rouge()(wanted, written)


def _rouge() -> Callable[[str, str], float]:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("the metric rouge_l needs rouge-score: pip install 'osrm_peft[text]'") from error
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return lambda wanted, written: scorer.score(wanted, written)["rougeL"].fmeasure


def _padded(sequences: Sequence[Sequence[int]], tokenizer: Any, model: nn.Module) -> dict[str, Tensor]:
    """One batch, padded on the left, on the model's device; positions count from each sequence's first token."""
    most, device = max(map(len, sequences)), next(model.parameters()).device
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (most - len(one)) + list(one) for one in sequences], device=device)
    mask = torch.tensor([[0] * (most - len(one)) + [1] * len(one) for one in sequences], device=device)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(inner_model(model).forward).parameters:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    return inputs


def _last(model: nn.Module, positions: int) -> dict[str, int]:
    """The argument by which the model computes the logits of its last positions alone, if it has one."""
    known = "logits_to_keep" in inspect.signature(inner_model(model).forward).parameters
    return {"logits_to_keep": positions} if known else {}


def inner_model(model: Any) -> Any:
    """The model of transformers, out of PEFT's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _in_batches(
    model: nn.Module,
    one: Callable[[Sequence[int]], Any],
    lengths: Sequence[int],
    processes: Processes,
    size: int,
    progress: str | None,
) -> list[Any]:
    """`one` of each batch of rows, the longest first, in eval mode; its results in the order of the rows."""
    order = processes.share(np.argsort(-np.asarray(lengths), kind="stable").tolist())
    found: list[tuple[int, Any]] = []
    training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),
            tqdm(
                total=len(order), desc=progress, leave=False, disable=progress is None or not processes.is_main_process
            ) as bar,
        ):
            for batch in _batches(order, size):
                found += zip(batch, one(batch), strict=True)
                bar.update(len(batch))
    finally:
        model.train(training)
    everything = dict(pair for part in processes.gather(found) for pair in part)
    return [everything[row] for row in range(len(lengths))]


def _batches(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (order[start : start + size] for start in range(0, len(order), size))
