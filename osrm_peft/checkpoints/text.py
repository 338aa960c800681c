"""Text: checks that the inputs number their tokens alike, and chooses tokenizer and generation settings."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from osrm_peft.checkpoints.config_checks import shown
from osrm_peft.checkpoints.model_files import GENERATION, PROCESSORS, TOKENIZERS
from osrm_peft.checkpoints.settings import (
    chosen_ids,
    differing,
    files_of,
    json_settings,
    refuse_other,
    same_files,
    tokenizer_settings,
    vocabulary_size,
)
from osrm_peft.checks import is_fault
from osrm_peft.models.vocabulary import tokens_in

logger = logging.getLogger(__name__)

_VOCABULARIES = ("tokenizer.json", "vocab*", "*.model", "spiece*", "merges.txt")  # a tokenizer has one of them
_MOST = 2**24  # tokens
KINDS = {"tokenizer": TOKENIZERS, "generation": GENERATION, "processor": PROCESSORS}  # {kind: its files}


class Beside(Protocol):
    """An input, as far as its tokenizer and settings go (`ModelFiles`)."""

    @property
    def source(self) -> str:
        """Folder or Hub id."""

    @property
    def folder(self) -> Path:
        """The folder on this machine."""

    @property
    def config(self) -> dict[str, Any]:
        """Its config.json."""


@dataclass(frozen=True)
class Text:
    """The inputs from which the result has its tokenizer, generation and processor files.

    Attributes:
        asked: the `tokenizer` argument.
        sources: {kind of files: the input that they are copied from}, without the kinds that no input has.
        ids: {field of config.json: value in the result}; the value None removes the field.
        compared: inputs whose tokens were compared.
        without: inputs without tokenizer files, whose rows were only counted.
        rows: with `vocab="intersect"`, the input whose tokens all others have.
    """

    asked: str | None
    sources: dict[str, str]
    ids: dict[str, Any]
    compared: list[str]
    without: list[str]
    rows: str | None

    def line(self) -> str:
        """A line for the terminal; empty if no input has tokenizer files."""
        if "tokenizer" not in self.sources:
            return ""
        compared = f"tokens compared of {', '.join(self.compared)}" if self.compared else "nothing to compare it with"
        lacking = f"; {', '.join(self.without)} without tokenizer files" if self.without else ""
        return f"tokenizer and settings of {self.sources['tokenizer']} ({compared}{lacking})"

    def manifest(self) -> dict[str, Any]:
        """The fields of the manifest."""
        return {"asked": self.asked, **self.sources, "tokens_compared": self.compared, "no_tokenizer": self.without}


def choose_text(every: Mapping[str, Beside], models: Sequence[str], asked: str | None, vocab: str, cut: bool) -> Text:
    """Compare tokens and settings of all inputs, and choose those of the result.

    Models must number their tokens alike; a base model may have more or fewer tokens. The settings are those of the
    input `asked` for. Without it they are the models', which must agree, or the base's if no model has any.

    Args:
        every: {name: files} of the models and their base.
        models: names of the models.
        vocab: `"error"` or `"intersect"`.
        cut: rows of the vocabulary are cut, so all inputs must have tokenizer files.

    Raises:
        ValueError: tokens with other numbers (the first is named), or settings that differ (and how to choose).
    """
    if asked is not None and not (isinstance(asked, str) and asked in every):
        names = ", ".join(map(repr, every))
        raise ValueError(f"tokenizer={asked!r} names no input: choose from {names}, or leave it out where they agree")
    have = [name for name, one in every.items() if files_of(one.folder, _VOCABULARIES)]
    without = [name for name in every if name not in have]
    if cut and without:
        raise ValueError(
            f"{without[0]!r} has no tokenizer files ({every[without[0]].folder}), and vocab='intersect' matches rows "
            "by token: save its tokenizer there"
        )
    marks = {name: _mark(every[name].folder) for name in have}
    tokenizers = _tokenizers(every, marks) if len(set(marks.values())) > 1 else {}
    tokens = {name: tokenizers[marks[name]].get_vocab() for name in have} if tokenizers else {}
    rows = None
    if vocab == "intersect":
        known = have if tokens else every  # where rows are cut, all have tokens
        rows = min(known, key=lambda name: (vocabulary_size(every[name].config) or 0, len(tokens.get(name, ()))))
    _check_tokens(tokens, every, models, rows)
    sources = _sources(every, models, asked, have)
    if rows is not None and tokens:
        sources["tokenizer"] = _of_rows(tokens, asked, rows)
    if tokenizers:
        settings = {name: tokenizer_settings(tokenizers[marks[name]]) for name in have}
        if asked is None:
            compared = [name for name in have if name in models or name == sources["tokenizer"]]
            refuse_other(settings, compared, "tokenizer", rows)
        other = [one for one in have if differing(settings[one], settings[sources["tokenizer"]])]
        if other:
            fields = differing(settings[other[0]], settings[sources["tokenizer"]])
            logger.warning(
                "the tokenizer is that of %r; %r has another %s", sources["tokenizer"], other[0], ", ".join(fields)
            )
    return Text(
        asked,
        sources,
        chosen_ids({name: one.config for name, one in every.items()}, models, asked),
        have if tokens or len(have) > 1 else [],
        without,
        rows,
    )


def _mark(folder: Path) -> str:
    """A hash of the tokenizer files' bytes."""
    found = [(path.name, path.read_bytes()) for path in files_of(folder, TOKENIZERS)]
    for name, data in found:
        if data.startswith(b"version https://git-lfs"):
            raise ValueError(f"{folder / name}: a Git LFS pointer, not the file: run `git lfs pull` in its folder")
    return hashlib.sha256(
        b"".join(name.encode() + b"\0" + hashlib.sha256(data).digest() for name, data in found)
    ).hexdigest()


def _tokenizers(every: Mapping[str, Beside], marks: Mapping[str, str]) -> dict[str, Any]:
    from transformers import AutoTokenizer

    found: dict[str, Any] = {}
    for name, mark in marks.items():
        if mark not in found:
            folder = every[name].folder
            try:
                _check_numbers(folder)
                found[mark] = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            except BaseException as error:  # any kind, from transformers, tokenizers, sentencepiece
                if not is_fault(error):
                    raise
                reason = shown(" ".join(str(error).split()))[:200] or type(error).__name__
                raise ValueError(
                    f"the tokenizer of {name!r} in {folder} cannot be read, so its tokens cannot be compared "
                    f"({reason}): save it anew, or remove its files to merge without comparing"
                ) from error
    return found


def _check_numbers(folder: Path) -> None:
    """Raise ValueError for a token number that no model has a row for: `tokenizers` would count up to it."""
    tokens: dict[str, int] = {}
    with suppress(ValueError):  # transformers finds any other fault of the file
        tokens = tokens_in(folder)
    token = max(tokens, key=tokens.__getitem__, default="")
    if tokens and tokens[token] >= _MOST:
        raise ValueError(f"token {token!r} is {tokens[token]}, and no model has so many rows")


def _check_tokens(
    tokens: Mapping[str, dict[str, int]], every: Mapping[str, Beside], models: Sequence[str], rows: str | None
) -> None:
    """Raise ValueError for the first token whose number differs, or that only one of two models has."""
    if rows is not None and tokens:
        for name, theirs in tokens.items():
            for token, place in sorted(tokens[rows].items(), key=lambda item: item[1]):
                if theirs.get(token) != place:
                    raise ValueError(
                        f"token {token!r} is {place} in {every[rows].source} and {theirs.get(token)} in {name!r}: "
                        "their vocabularies are not parts of one another, so no rows can be matched"
                    )
        return
    names = [name for name in (*models, *tokens) if name in tokens]
    for name in dict.fromkeys(names):
        mine, theirs = tokens[names[0]], tokens[name]
        strict = name in models and names[0] in models
        numbers = set(mine.values()) & set(theirs.values())
        for token, place in sorted((mine | theirs).items(), key=lambda item: item[1]):
            places = mine.get(token), theirs.get(token)
            lacks = None in places and place not in numbers
            if places[0] == places[1] or (lacks and not strict):
                continue
            first, second = ("no token" if one is None else one for one in places)
            raise ValueError(
                f"token {token!r} is {first} in {names[0]!r} and {second} in {name!r}: rows of the embeddings would be "
                "mixed that mean different tokens. "
                + ("vocab='intersect' keeps the tokens that all have" if lacks else "Merge models with one vocabulary")
                + f"; if {name!r} means the same, put the tokenizer files of {names[0]!r} into its folder"
            )


def _sources(
    every: Mapping[str, Beside], models: Sequence[str], asked: str | None, have: Sequence[str]
) -> dict[str, str]:
    """{kind of files: its input}; refuses generation and processor settings that differ between models."""
    sources = {}
    for kind, patterns in KINDS.items():
        holders = [
            name for name in every if (name in have if kind == "tokenizer" else files_of(every[name].folder, patterns))
        ]
        if asked is not None:
            if kind == "tokenizer" and have and asked not in have:
                raise ValueError(f"tokenizer={asked!r}: {every[asked].folder} has no tokenizer files; {have[0]!r} has")
            if asked in holders:
                sources[kind] = asked
                continue
        of_models = [name for name in holders if name in models]
        folders = [every[name].folder for name in of_models]
        if kind != "tokenizer" and asked is None and not same_files(folders, patterns):
            settings = {
                name: json_settings(every[name].folder, patterns, strict=kind == "generation") for name in of_models
            }
            refuse_other(settings, of_models, kind, None)
        if holders and not (asked is not None and kind == "generation"):
            sources[kind] = holders[0]  # models come before the base
    return sources


def _of_rows(tokens: Mapping[str, dict[str, int]], asked: str | None, rows: str) -> str:
    """The input whose tokenizer fits the rows that all inputs have."""
    if asked is None:
        return next(name for name in (rows, *tokens) if tokens[name] == tokens[rows])
    more = sorted(set(tokens[asked]) - set(tokens[rows]))
    if more:
        raise ValueError(
            f"tokenizer={asked!r} has the token {more[0]!r}, which {rows!r} has not and vocab='intersect' cuts"
        )
    return asked
