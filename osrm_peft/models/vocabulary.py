"""Vocabularies: the tokens of a tokenizer's files, and the first token in which two vocabularies differ."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def tokens_in(folder: Path | None) -> dict[str, int]:
    """{token: its row} of the tokenizer in a folder, added tokens too; empty without a tokenizer.

    A tokenizer without `tokenizer.json` gives its added tokens alone.

    Raises:
        ValueError: a file is damaged.
    """
    for name, read in _READERS.items() if folder is not None else ():
        path = Path(folder or "", name)
        if path.is_file():
            try:
                tokens = read(json.loads(path.read_text(encoding="utf-8")))
                if tokens:
                    return {str(token): int(row) for token, row in tokens.items()}
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise ValueError(
                    f"{path} is damaged ({type(error).__name__}: {error}): save the tokenizer again"
                ) from error
    return {}


def _all_tokens(content: Any) -> dict[str, Any]:
    vocab = content["model"]["vocab"]
    if isinstance(vocab, list):  # a Unigram model's: [token, score] in the order of the rows
        vocab = {token: row for row, (token, _) in enumerate(vocab)}
    return {**vocab, **{one["content"]: one["id"] for one in content.get("added_tokens") or []}}


_READERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "tokenizer.json": _all_tokens,
    "added_tokens.json": dict,
    "tokenizer_config.json": lambda content: {
        one["content"]: row for row, one in (content.get("added_tokens_decoder") or {}).items()
    },
}


def first_difference(one: Mapping[str, int], other: Mapping[str, int]) -> tuple[str, int | None, int | None] | None:
    """(token, its row on either side) for the first token whose row differs; None if no row does.

    A token is no difference if the other side leaves its row free.
    """
    rows = {row: token for token, row in other.items()}
    for token, row in sorted(one.items(), key=lambda item: item[1]):
        if other.get(token, row) != row or rows.get(row, token) != token:
            return token, row, other.get(token)
    return None
