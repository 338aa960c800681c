"""Rows of the user's own table, a file or a Hub dataset, each with its place for errors."""

import codecs
import csv
import io
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from datasets.exceptions import DatasetsError
from datasets.utils.logging import get_verbosity, set_verbosity
from datasets.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from pyarrow import ArrowException

from osrm_peft.checks import shown
from osrm_peft.io.json import parse_json

FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[^/\\:]+)?")


@dataclass(frozen=True)
class Rows:
    """A table.

    Attributes:
        source: the file, or the Hub dataset with its split.
        columns: names of the columns, in order.
        values: column → its values: text of CSV and TSV, Python's values of the other formats; None where missing.
        count: number of rows.
        lines: each row's line in the file; None where the source has no lines.
        classes: {column: names of its classes, in order}, of a Hub dataset that has them.
    """

    source: str
    columns: list[str]
    values: Callable[[str], list[Any]]
    count: int
    lines: list[int] | None = None
    classes: dict[str, list[str]] = field(default_factory=dict)

    def place(self, row: int) -> str:
        """Where a row is, for errors: file and line, or the row's number from 1."""
        return f"{self.source}, " + (f"row {row + 1}" if self.lines is None else f"line {self.lines[row]}")


def is_hub(source: str) -> bool:
    """Whether a source is the name of a Hub dataset (`user/name` or `user/name:config`), and no file."""
    return not source.lower().endswith(FORMATS) and not Path(source).exists() and bool(_HUB.fullmatch(source))


def read_file(source: str) -> Rows:
    """The rows of a CSV, TSV, JSON-lines or Parquet file.

    Raises:
        ValueError: no such file, another format, or a fault in it (file, line and the way out).
    """
    path = Path(source)
    if not path.is_file():
        what = "is no file" if path.exists() else "is missing"
        raise ValueError(f"{path} {what}: name a file ({', '.join(FORMATS)}) or a Hub dataset (user/name)")
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"{path} has the ending {path.suffix!r}: save it as CSV, TSV, JSON lines or Parquet")
    if suffix == ".parquet":
        return _read_parquet(path)
    text = _decoded(path)
    if not text.strip():
        raise ValueError(f"{path} is empty: give it at least one row")
    rows = _read_csv(path, text) if suffix in (".csv", ".tsv") else _read_json(path, text)
    if not rows.count:
        raise ValueError(f"{path} has a header and no rows: give it at least one row")
    return rows


def read_hub(source: str) -> dict[str, Rows]:
    """{split: rows} of a Hub dataset.

    Raises:
        ValueError: no such dataset, configuration or network; the message is the Hub's.
    """
    name, _, config = source.partition(":")
    try:
        with _quiet():
            found = load_dataset(name, config or None)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{source} is neither a file nor a Hub dataset that can be read: {reason}") from error
    return {str(split): _of_dataset(rows, f"{source}, split {split}") for split, rows in found.items()}


def _of_dataset(rows: Dataset, source: str) -> Rows:
    classes = {name: one.names for name, one in rows.features.items() if isinstance(one, ClassLabel)}

    def values(column: str) -> list[Any]:
        try:
            found = rows[column][:]
        except UnicodeDecodeError as error:
            raise ValueError(f"{source}: column {column!r} holds text that is no UTF-8 ({error})") from error
        names = classes.get(column)
        return found if names is None else [names[one] if one is not None and one >= 0 else None for one in found]

    return Rows(source, rows.column_names, values, len(rows), classes=classes)


# --- text: CSV, TSV and JSON lines --------------------------------------------------------------------------------


def _decoded(path: Path) -> str:
    """The text of a file in UTF-8, without a byte-order mark."""
    content = path.read_bytes()
    again = f"iconv -f {{}} -t utf-8 {path.name} > utf8_{path.name}"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{path}, line 1: the file is in UTF-16; re-encode it: {again.format('utf-16')}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8; re-encode the file, if it is in "
            f"Latin-1 (Western European): {again.format('latin1')}"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(
            f"{path}, line {line}: a NUL byte, which no text holds; remove it, or re-encode a file in UTF-16: "
            f"{again.format('utf-16')}"
        )
    return text


def _read_csv(path: Path, text: str) -> Rows:
    """Cells as text, so that 007 stays 007; read by `datasets`, after the lines of the records are known."""
    delimiter = _delimiter(text, "\t" if path.suffix.lower() == ".tsv" else ",")
    (line, header), *records = _records(path, text, delimiter)
    columns = [name.strip() or f"column {number}" for number, name in enumerate(header, 1)]
    twice = [name for name, times in Counter(columns).items() if times > 1]
    if twice:
        raise ValueError(f"{path}, line {line}: the column {twice[0]!r} is there twice: rename one")
    lines = []
    for line, record in records:
        if len(record) != len(columns):
            raise ValueError(
                f"{path}, line {line}: {len(record)} cells, but the header has {len(columns)} "
                f"({', '.join(map(repr, columns[:8]))}); put a cell that holds {delimiter!r} or a line end into quotes"
            )
        lines.append(line)
    if not lines:
        return Rows(str(path), columns, lambda column: [], 0)
    features = Features({name: Value("string") for name in columns})
    options = {"features": features, "names": columns, "header": 0, "sep": delimiter, "na_filter": False}
    table = _through_datasets(Dataset.from_csv, text, **options)
    if len(table) != len(lines):
        raise ValueError(f"{path} has {len(lines)} records and is read as {len(table)}: remove lines without cells")
    return Rows(str(path), columns, lambda column: table[column][:], len(lines), lines)


def _records(path: Path, text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """(first line, cells) of each record of a CSV file that is not blank."""
    found = []  # not one by one: Python's limit on cells is everybody's, and is itself again when this returns
    reader, line = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), 1
    limit = csv.field_size_limit()
    csv.field_size_limit(max(limit, len(text) + 1))  # a cell may be longer than Python's default
    try:
        for record in reader:
            if record and not (len(record) == 1 and not record[0].strip(" \t")):
                found.append((line, record))
            line = reader.line_num + 1
    except csv.Error as error:
        reason = "a quote is opened and never closed" if "end of data" in str(error) else str(error)
        raise ValueError(f'{path}, line {line}: {reason}; write " inside of a quoted cell as ""') from error
    finally:
        csv.field_size_limit(limit)
    return found


def _delimiter(text: str, usual: str) -> str:
    """The usual delimiter, or another that alone splits the header."""
    header = text.lstrip().partition("\n")[0]
    counts = {one: len(next(csv.reader([header], delimiter=one), [])) for one in (usual, ",", ";", "\t", "|")}
    return usual if counts[usual] > 1 else max(counts, key=lambda one: counts[one])


def _read_json(path: Path, text: str) -> Rows:
    """One JSON object a line. `datasets` reads the lines; its JSON reader would make timestamps of texts like dates."""
    if text.lstrip().startswith("["):
        raise ValueError(
            f"{path}, line 1: a JSON list; write one object a line (JSON lines), as pandas does with "
            "to_json(orient='records', lines=True)"
        )
    found, lines = [], []
    for number, line in enumerate(_through_datasets(Dataset.from_text, text)["text"][:], 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, pairs=_unique)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: no JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {shown(row)}")
        found.append(row)
        lines.append(number)
    columns = list(dict.fromkeys(name for row in found for name in row))
    return Rows(str(path), columns, lambda column: [row.get(column) for row in found], len(found), lines)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise ValueError(f"the column {twice!r} is there twice")
    return row


def _through_datasets(read: Callable[..., Dataset], text: str, **options: Any) -> Dataset:
    """A table that `datasets` reads from this text, in memory: a cache would outlive the file."""
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder, "rows.txt")
        path.write_text(text, encoding="utf-8", newline="")
        return read(str(path), keep_in_memory=True, cache_dir=folder, **options)


# --- Parquet ------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path) -> Rows:
    try:
        with path.open("rb") as file:
            about = pyarrow.parquet.ParquetFile(file)
            names, count = about.schema_arrow.names, about.metadata.num_rows
        twice = [name for name, times in Counter(names).items() if times > 1]
        if twice:
            raise ValueError(f"{path}: the column {twice[0]!r} is there twice: rename one")
        if not count:
            raise ValueError(f"{path} has columns and no rows: give it at least one row")
        with tempfile.TemporaryDirectory() as folder, _quiet():
            copy = Path(folder, "rows.parquet")  # under this name, as `datasets` takes names for patterns
            copy.write_bytes(path.read_bytes())
            table = Dataset.from_parquet(str(copy), keep_in_memory=True, cache_dir=folder)
    except (ArrowException, DatasetsError, OSError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{path} is no Parquet file, or damaged: {reason}") from error
    return _of_dataset(table, str(path))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and messages of `datasets`: what went wrong is in the error."""
    verbosity, hidden = get_verbosity(), are_progress_bars_disabled()
    set_verbosity(logging.CRITICAL)
    disable_progress_bars()
    try:
        yield
    finally:
        set_verbosity(verbosity)
        if not hidden:
            enable_progress_bars()
