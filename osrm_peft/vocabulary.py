"""The tokens of a tokenizer that lies beside weights, and the first one in which two of them differ."""

import json
from collections.abc import Mapping
from pathlib import Path


def tokens_in(folder: Path | None) -> dict[str, int]:
    """{token: its row} of the `tokenizer.json` in a folder, added tokens too; empty where there is none.

    Raises:
        ValueError: the file is damaged.
    """
    path = None if folder is None else folder / "tokenizer.json"
    if path is None or not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        vocab = content["model"]["vocab"]
        if isinstance(vocab, list):  # of Unigram models: [token, score] in the order of the rows
            vocab = {token: row for row, (token, _) in enumerate(vocab)}
        added = {one["content"]: one["id"] for one in content.get("added_tokens") or []}
        return {str(token): int(row) for token, row in {**vocab, **added}.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): save the tokenizer again") from error


def first_difference(one: Mapping[str, int], other: Mapping[str, int]) -> tuple[str, int | None, int | None] | None:
    """(token, its row on either side) of the first row that means something else on the other side; None for none.

    A token that one side has in a row which the other leaves free is no difference.
    """
    rows = {row: token for token, row in other.items()}
    for token, row in sorted(one.items(), key=lambda item: item[1]):
        if other.get(token, row) != row or rows.get(row, token) != token:
            return token, row, other.get(token)
    return None
