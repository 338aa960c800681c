"""YAML: texts with YAML 1.2's numbers, and the fields of a dataclass from a file."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: 1e-3 is one (PyYAML, of YAML 1.1, reads a string)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, with YAML 1.2's numbers."""
    return yaml.load(text, Loader=_Loader)


def fields_from_yaml(path: str | Path, cls: type, kind: str, required: tuple[str, ...] = ()) -> dict[str, Any]:
    """The content of a YAML file that has the fields of dataclass `cls` as keys.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a mapping, an unknown key or a missing one; lists the keys.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no {kind} {path}: see recipes/configs/ for examples")
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    known = {field.name for field in dataclasses.fields(cls)}
    if not isinstance(content, Mapping) or set(content) - known or not set(required) <= set(content):
        found = sorted(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        needs = f"needs {' and '.join(required)} and knows" if required else "knows"
        raise ValueError(f"{path}: a {kind} {needs} {sorted(known)}, found {found}")
    return dict(content)
