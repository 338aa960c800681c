"""JSON files: any fault is a ValueError, and a file is written whole or not at all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from osrm_peft.io.places import check_file as check_file
from osrm_peft.io.places import check_folder as check_folder
from osrm_peft.io.places import new_file
from osrm_peft.io.places import put_in_place as put_in_place


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        ValueError: the file is damaged, or holds something else.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: expected a JSON object")
    return content


def parse_json(text: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a JSON text.

    Args:
        pairs: makes an object of its names and values (json's `object_pairs_hook`); None: a dict.

    Raises:
        ValueError: the text is no JSON, or too deeply nested.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError as error:
        raise ValueError("too deeply nested") from error


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented JSON, complete or not at all."""
    with new_file(path) as partial:
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")  # a path may have bytes that are no UTF-8
