"""Which columns of a table are texts and label, and what its labels mean: the same in every format."""

import difflib
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from statistics import fmean
from typing import Any

from osrm_peft.checks import shown
from osrm_peft.tasks.rows import Rows

logger = logging.getLogger(__name__)

REGRESSION = "pearson_spearman"
MOST_CLASSES = 1000
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?", re.ASCII)  # 007 and 1,5 are none
_PAIRS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"),
    ("text1", "text2"), ("text_a", "text_b"), ("sentence_a", "sentence_b"),
)  # fmt: skip
_TEXTS = (
    "sentence1", "text", "sentence", "review", "content", "comment", "message", "tweet", "body", "document", "question",
    "query", "utterance", "description", "headline",
)  # fmt: skip
_LABELS = ("label", "labels", "target")  # the first is taken; of those below, the only one
_PERHAPS = ("class", "category", "sentiment", "score", "rating", "stars", "intent", "topic", "emotion", "y")
_HEADER = "is its first row the header? Name them with text: and label:"


@dataclass(frozen=True)
class Example:
    """One row: text, second text of a pair, its label as text, and where it is."""

    first: str
    second: str | None
    label: str
    place: str

    @property
    def text(self) -> str:
        """What makes two rows equal: the texts, white space as single spaces."""
        return "\n".join(" ".join(part.split()) for part in (self.first, self.second or ""))


def check_columns(rows: Rows, names: Sequence[str]) -> None:
    """Raise ValueError unless the table has these columns; lists its own, with the nearest."""
    for name in names:
        if name not in rows.columns:
            near = difflib.get_close_matches(name, rows.columns, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{rows.source} has no column {shown(name)}, only {_listed(rows)}{hint}")


def find_columns(rows: Rows, text: Sequence[str] | None, label: str | None) -> tuple[list[str], str]:
    """The columns of the texts (one or two) and of the label; those that are not named are guessed.

    Raises:
        ValueError: no such column, or several that could be meant; lists them.
    """
    check_columns(rows, [*(text or ()), *(() if label is None else (label,))])
    found = label or _label_column(rows, text)
    texts = list(text) if text else _text_columns(rows, found)
    if label is None and found in map(str, rows.values(found)):
        raise ValueError(
            f"{rows.source}: the label {found!r} stands in the first line, as if it were a row: begin the file with a "
            "line of names, such as text,label"
        )
    if found in texts:
        raise ValueError(f"{rows.source}: column {found!r} is text and label; it has {_listed(rows)}")
    if not (text and label):
        logger.info("%s: text %s, label %s (guessed)", rows.source, " and ".join(texts), found)
    return texts, found


def _listed(rows: Rows) -> str:
    return ", ".join(map(repr, rows.columns[:20])) or "none"


def _named(rows: Rows, names: Sequence[str], without: Sequence[str] = ()) -> list[str]:
    """The columns with one of these names, whatever their case, in the order of the names."""
    lower = {column.lower(): column for column in rows.columns if column not in without}
    return [lower[name] for name in names if name in lower]


def _label_column(rows: Rows, text: Sequence[str] | None) -> str:
    found = _named(rows, _LABELS, text or ())[:1] or _named(rows, _PERHAPS, text or ())
    if not found:
        texts = text or _pair(rows) or _named(rows, _TEXTS)[:1]
        if not texts and len(rows.columns) == 2:
            texts = _text_columns(rows, "")
        found = [column for column in rows.columns if column not in texts] if texts else []
    if len(found) != 1:
        which = f"several columns could be the label ({', '.join(map(repr, found[:8]))})" if found else "no label found"
        raise ValueError(f"{rows.source}: {which}; the columns are {_listed(rows)}; {_HEADER}")
    return found[0]


def _pair(rows: Rows) -> list[str]:
    """The columns of a pair of texts, of which the second is not empty throughout."""
    for names in _PAIRS:
        found = _named(rows, names)
        if len(found) == 2 and any(rows.values(found[1])):
            return found
    return []


def _text_columns(rows: Rows, label: str) -> list[str]:
    """The columns with names of texts, or the one of text that is by far the longest."""
    named = _pair(rows) or _named(rows, _TEXTS, [label])[:1]
    if named and label not in named:
        return named
    lengths = {}
    for column in rows.columns:
        values = [value for value in rows.values(column) if value not in (None, "")] if column != label else []
        if values and all(isinstance(value, str) for value in values) and not all(map(_NUMBER.fullmatch, values)):
            lengths[column] = fmean(map(len, values))
    order = sorted(lengths, key=lambda column: -lengths[column])
    if not order or (len(order) > 1 and lengths[order[0]] < 2 * lengths[order[1]]):
        which = f"several columns could be the text ({', '.join(map(repr, order[:8]))})" if order else "no text found"
        raise ValueError(f"{rows.source}: {which}; the columns are {_listed(rows)}; {_HEADER}")
    return order[:1]


def examples(rows: Rows, texts: Sequence[str], label: str) -> list[Example]:
    """The rows of a table, each checked.

    Raises:
        ValueError: no such column, a text or a label that is missing or is none (names the row).
    """
    check_columns(rows, [*texts, label])
    columns = [rows.values(column) for column in texts]
    found = []
    for row, value in enumerate(rows.values(label)):
        place = rows.place(row)
        parts = [_text(column[row], name, place) for name, column in zip(texts, columns, strict=True)]
        key = label_key(value, place)
        if key is None:
            raise ValueError(f"{place}: the label is missing (column {label!r}): fill it in, or remove the row")
        found.append(Example(parts[0], parts[1] if len(parts) > 1 else None, key, place))
    return found


def _text(value: Any, column: str, place: str) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError(f"{place}: the text is missing (column {column!r}): fill it in, or remove the row")
    if not isinstance(value, str):
        raise ValueError(
            f"{place}: {shown(value)} in column {column!r} is no text but {type(value).__name__}: write it as text"
        )
    _check_unicode(value, place)
    return value


def _check_unicode(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: half of a surrogate pair (\\u{ord(text[error.start]):04x}) is no text") from error


def label_key(value: Any, place: str) -> str | None:
    """A label as text, the same of every format: 1, 1.0 and "1" are "1". None where it is missing.

    Raises:
        ValueError: several labels, or another kind of value.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float, Decimal)):
        return _number(value, place)
    if isinstance(value, (list, tuple)):
        raise ValueError(
            f"{place}: the label is a list, {shown(value)}; multi-label tasks are not supported: one label a row"
        )
    if not isinstance(value, str):
        raise ValueError(f"{place}: the label {shown(value)} is {type(value).__name__}: text or a number can be one")
    _check_unicode(value, place)
    text = value.strip()
    if len(text) < 300 and _NUMBER.fullmatch(text):
        return _number(int(text) if is_whole(text) else float(text), place)
    return text.lower() if text in ("True", "False", "TRUE", "FALSE") else text


def is_whole(label: str) -> bool:
    """Whether a label's text is a whole number."""
    return bool(re.fullmatch(r"-?(0|[1-9]\d*)", label, re.ASCII))


def _number(value: Any, place: str) -> str | None:
    """A number as a label's text; None for NaN."""
    try:
        if math.isnan(value):
            return None
        return str(int(value)) if value == int(value) else repr(float(value))
    except (OverflowError, ValueError) as error:
        raise ValueError(f"{place}: the label {shown(value)} is not finite, or too large") from error


def is_regression(found: Sequence[Example], metric: str | None, labels: Sequence[str] | None) -> bool:
    """Whether the labels are numbers to predict, not classes.

    Raises:
        ValueError: some are numbers and others not, where all must be; or lists in text.
    """
    if all(one.label.startswith("[") and one.label.endswith("]") for one in found):
        raise ValueError(
            f"{found[0].place}: the label {shown(found[0].label)} is a list; multi-label tasks are not supported: one "
            "label a row"
        )
    fractional = next((one for one in found if _is_fraction(one.label)), None)
    others = next((one for one in found if not _NUMBER.fullmatch(one.label)), None)
    if labels is not None or (fractional is None and metric != REGRESSION):
        return False
    if others is not None and metric != REGRESSION and not _mostly_numbers(found):
        return False  # a name among others that looks like a number
    if fractional is not None and metric not in (None, REGRESSION):
        raise ValueError(
            f"{fractional.place}: the label {fractional.label} is fractional, and metric {metric} wants classes: write "
            f"metric: {REGRESSION}, or name the classes with labels:"
        )
    if others is not None:
        raise ValueError(f"{others.place}: the label {shown(others.label)} is no number, and a regression has numbers")
    return True


def _is_fraction(label: str) -> bool:
    return bool(_NUMBER.fullmatch(label)) and float(label) != int(float(label))


def _mostly_numbers(found: Sequence[Example]) -> bool:
    distinct = {one.label for one in found}
    return 2 * sum(bool(_NUMBER.fullmatch(label)) for label in distinct) > len(distinct)


def classes_of(found: Sequence[Example], labels: Sequence[str] | None, source: str) -> list[str]:
    """The classes of training rows in order: `labels`, or the sorted values.

    Raises:
        ValueError: one class only, or so many that the column looks like texts or numbers.
    """
    if labels is not None:
        return list(labels)
    values = {one.label for one in found}
    if len(values) == 1:
        raise ValueError(f"{source} has one class only, {shown(found[0].label)}: there is nothing to learn")
    if len(values) > MOST_CLASSES or (len(values) == len(found) > 10):
        raise ValueError(
            f"{source} has {len(values)} different labels in {len(found)} rows, such as {shown(found[0].label)}: the "
            f"label looks like text or an id; name the column with label:, or for numbers write metric: {REGRESSION}"
        )
    if all(map(is_whole, values)):
        return sorted(values, key=int)
    return sorted(values)
