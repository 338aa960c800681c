"""Tasks in words, for causal language models without heads: a prompt, and its completion."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from osrm_peft.checks import choice, shown
from osrm_peft.tasks.columns import REGRESSION
from osrm_peft.tasks.files import SPLITS, TaskData, shares, without_overlap
from osrm_peft.tasks.rows import Rows
from osrm_peft.tasks.task import ROW_METRICS, Task

_SENTIMENT = ("negative", "neutral", "positive")
# task → (what is asked, the answers in the order of the classes)
_VIEWS = {
    "questions": ("What does the question ask for?",
                  ("abbreviation", "description", "thing", "person", "place", "number")),
    "sms_spam": ("Is the text message spam?", ("no", "yes")),
    "movie_reviews": ("Is the movie review negative or positive?", ("negative", "positive")),
    "tweets": ("Is the tweet negative, neutral or positive?", _SENTIMENT),
    "product_reviews": ("Is the product review negative, neutral or positive?", _SENTIMENT),
    "editorials": ("Is the sentence of an editorial negative, neutral or positive?", _SENTIMENT),
}  # fmt: skip
_NEUTRAL = 0.5  # mean human sentiment, −4 … 4, up to which a text is neutral


@dataclass(frozen=True)
class TextTask(Task):
    """A task in words: rows with the columns `prompt`, `completion` (str) and `label` (int).

    A prompt is a str, or a list of messages, {"role", "content"}, which the tokenizer's chat template puts into words.
    The tokens of the completion follow those of the prompt, so behind words it begins with a space.

    Attributes:
        answers: the completions to choose among, in the order of the labels: the metric is accuracy or matthews of the
            likeliest (rank classification). None: the metric is `"exact_match"` or `"rouge_l"` of what the model
            writes, or `"inverse_perplexity"` of the completion; every label is 0 then.
    """

    answers: tuple[str, ...] | None = None

    def measured_by(self, metric: str) -> "TextTask":
        """The same rows by another metric: `"exact_match"`, `"rouge_l"` or `"inverse_perplexity"`.

        Raises:
            ValueError: no such metric, or one that needs classes.
        """
        choice("metric", metric, ROW_METRICS)
        splits = {split: getattr(self, split) for split in SPLITS}
        rows: dict[str, Any] = {
            split: None if one is None else _dataset(one["prompt"], one["completion"], [0] * len(one))
            for split, one in splits.items()
        }
        data = None if self.data is None else self.data | {"metric": metric}
        return replace(self, num_labels=1, metric=metric, label_names=None, answers=None, data=data, **rows)


def in_words(task: Task) -> TextTask:
    """The text view of a packaged task: a question, the options, the text, and the answer in words.

    Sentiment from −4 to 4 becomes negative, neutral (within ±0.5) or positive.

    Raises:
        ValueError: a task without a view in words.
    """
    if task.name not in _VIEWS:
        raise ValueError(f"no view in words of the task {task.name!r}: there are views of {', '.join(_VIEWS)}")
    question, answers = _VIEWS[task.name]
    prefix = f"{question}\nOptions: {', '.join(answers)}\n\nText: "

    def rows(given: Dataset) -> Dataset:
        labels = list(given["label"])
        if task.num_labels == 1:
            labels = [1 + (value > _NEUTRAL) - (value < -_NEUTRAL) for value in labels]
        prompts = [f"{prefix}{text}\nAnswer:" for text in given["sentence1"]]
        return _dataset(prompts, [completions[label] for label in labels], labels)

    completions = tuple(f" {answer}" for answer in answers)
    metric = task.metric if task.metric == "matthews" else "accuracy"
    train, validation = rows(task.train), rows(task.validation)
    return TextTask(task.name, len(answers), metric, train, validation, label_names=answers, answers=completions)


def in_prompts(data: TaskData, tables: Mapping[str, Rows]) -> bool:
    """Whether a task's own rows have the columns `prompt` and `completion`, or `messages`, and no others are named."""
    named = data.text is not None or data.label is not None or data.labels is not None
    return not named and _columns_of_text(tables["train"].columns)


def load_text(data: TaskData, tables: Mapping[str, Rows], name: str) -> TextTask:
    """A task whose rows have the columns `prompt` and `completion`, or `messages` that end with the completion.

    The metric is `"exact_match"` (the default), `"rouge_l"` or `"inverse_perplexity"`; with `"accuracy"` or
    `"matthews"` the completions of the training rows are the classes. A row whose prompt is in a later split, too, is
    left out of the earlier one.

    Raises:
        ValueError: a fault in a file or a row, with file, line and the way out.
    """
    metric, source = data.metric or "exact_match", tables["train"].source
    if metric == REGRESSION:
        raise ValueError(f"{source}: metric {metric} is of numbers, the rows have completions: choose another")
    pairs = without_overlap({split: _pairs(table) for split, table in tables.items()}, source)
    if "validation" not in pairs:
        wanted = [split for split in SPLITS[1:] if split not in pairs]
        pairs |= shares(pairs["train"], wanted, source, metric in ROW_METRICS)
    answers = None if metric in ROW_METRICS else tuple(sorted({one.label for one in pairs["train"]}))
    if answers is not None and len(answers) < 2:
        raise ValueError(f"{data.train}: {metric} needs two or more different completions to choose among")
    index = {answer: label for label, answer in enumerate(answers or ())}
    rows = {}
    for split, found in pairs.items():
        for one in found if answers is not None else ():
            if one.label not in index:
                raise ValueError(f"{one.place}: the completion {shown(one.label)} is in no training row, so no class")
        completions = [one.label for one in found]
        rows[split] = _dataset([one.prompt for one in found], completions, [index.get(one, 0) for one in completions])
    known: dict[str, Any] = {"metric": metric}
    for split in SPLITS:
        file = getattr(data, split)
        known |= {} if file is None else {split: str(Path(file).resolve()) if Path(file).is_file() else file}
    names = None if answers is None else tuple(answer.strip() for answer in answers)
    train, validation, test = (rows.get(split) for split in SPLITS)
    return TextTask(name, len(index) or 1, metric, train, validation, test, names, known, answers)


def tokenize_text(rows: Dataset, tokenizer: Any, max_length: int) -> Dataset:
    """Token columns of prompt and completion, with the end token: `input_ids`, `attention_mask`, `completion_mask`.

    A prompt that is too long loses its first tokens, the completion none; `completion` (str) stays beside the tokens.

    Raises:
        ValueError: a prompt without tokens, a completion that `max_length` has no room for, or messages without a chat
            template.
    """
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    columns: dict[str, list] = {name: [] for name in ("input_ids", "attention_mask", "completion_mask")}
    for prompt, completion in zip(rows["prompt"], rows["completion"], strict=True):
        before = _tokens_of(prompt, tokenizer)
        after = tokenizer(completion, add_special_tokens=False)["input_ids"] + ends
        if len(after) >= max_length:
            raise ValueError(
                f"the completion {shown(completion)} has {len(after)} tokens, max_length={max_length} leaves room for "
                f"{max_length - 1}: raise it"
            )
        if not before:
            raise ValueError(
                f"the prompt {shown(prompt)} has no tokens, and nothing follows from nothing: leave it out"
            )
        before = before[-(max_length - len(after)) :]
        columns["input_ids"].append(before + after)
        columns["attention_mask"].append([1] * (len(before) + len(after)))
        columns["completion_mask"].append([0] * len(before) + [1] * len(after))
    return Dataset.from_dict(columns | {"completion": list(rows["completion"])})


def with_labels(tokens: Dataset) -> Dataset:
    """`input_ids` and `attention_mask` with `labels`, −100 in the prompts, of the columns of `tokenize_text`."""
    labels = [
        [token if of_completion else -100 for token, of_completion in zip(ids, mask, strict=True)]
        for ids, mask in zip(tokens["input_ids"], tokens["completion_mask"], strict=True)
    ]
    return tokens.select_columns(["input_ids", "attention_mask"]).add_column("labels", labels)


def tokenize_labelled(rows: Dataset, tokenizer: Any, max_length: int) -> Dataset:
    """Token columns as a causal language model is trained on: `with_labels` of `tokenize_text`."""
    return with_labels(tokenize_text(rows, tokenizer, max_length))


def prompt_text(prompt: Any, tokenizer: Any) -> str:
    """A prompt as text: messages go through the tokenizer's chat template.

    Raises:
        ValueError: messages, and a tokenizer without chat template.
    """
    if isinstance(prompt, str):
        return prompt
    if tokenizer.chat_template is None:
        raise ValueError("the rows are messages and the tokenizer has no chat template: give prompt and completion")
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)


def _tokens_of(prompt: Any, tokenizer: Any) -> list[int]:
    text = prompt_text(prompt, tokenizer)  # a template has the special tokens
    return tokenizer(text, add_special_tokens=isinstance(prompt, str))["input_ids"]


def _dataset(prompts: Sequence[Any], completions: Sequence[str], labels: Sequence[int]) -> Dataset:
    return Dataset.from_dict({"prompt": list(prompts), "completion": list(completions), "label": list(labels)})


def _columns_of_text(columns: Sequence[str]) -> bool:
    return "messages" in columns or {"prompt", "completion"} <= set(columns)


@dataclass(frozen=True)
class _Pair:
    """One row: prompt, completion (its label), and where it is."""

    prompt: str | list[dict[str, str]]
    label: str
    place: str

    @property
    def text(self) -> str:
        """What makes two rows equal: the prompt, white space as single spaces."""
        messages = [self.prompt] if isinstance(self.prompt, str) else [one["content"] for one in self.prompt]
        return "\n".join(" ".join(one.split()) for one in messages)


def _pairs(rows: Rows) -> list[_Pair]:
    if not _columns_of_text(rows.columns):
        columns = ", ".join(map(repr, rows.columns))
        raise ValueError(f"{rows.source} has the columns {columns}: expected prompt and completion, or messages")
    if "messages" in rows.columns:
        found = [_of_messages(one, rows.place(row)) for row, one in enumerate(rows.values("messages"))]
    else:
        found = list(zip(rows.values("prompt"), rows.values("completion"), strict=True))
    for row, (prompt, completion) in enumerate(found):
        if (
            not isinstance(prompt, str | list)
            or not prompt
            or not isinstance(completion, str)
            or not completion.strip()
        ):
            raise ValueError(f"{rows.place(row)}: prompt and completion must be texts that are not empty")
    kinds = {type(prompt) for prompt, _ in found}
    if len(kinds) > 1:
        raise ValueError(f"{rows.source}: some prompts are texts, others messages: give one kind")
    return [_Pair(prompt, completion, rows.place(row)) for row, (prompt, completion) in enumerate(found)]


def _of_messages(messages: Any, place: str) -> tuple[list[dict[str, str]], str]:
    known = isinstance(messages, list) and all(
        isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
        for one in messages
    )
    if not known or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError(
            f"{place}: messages={shown(messages)} must be a list of {{role, content}} that ends with the assistant's"
        )
    before = [{name: one[name] for name in ("role", "content")} for one in messages[:-1]]
    return before, messages[-1]["content"]
