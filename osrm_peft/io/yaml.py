"""YAML: texts with YAML 1.2's numbers, and the fields of a dataclass from a file."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from osrm_peft.checks import LARGEST, shown

_MOST = 100_000  # keys of a mapping


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: 1e-3 is one (PyYAML reads a string, as YAML 1.1). A repeated key is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = [key for key, times in Counter(keys).items() if times > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: Any) -> None:
        super().flatten_mapping(node)
        if len(node.value) > _MOST:  # nine times the keys of nine times the keys of …
            raise yaml.constructor.ConstructorError(None, None, "'<<' gives too many keys", node.start_mark)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, with YAML 1.2's numbers.

    Raises:
        ValueError: the text is no YAML, too deeply nested, or has a key twice.
    """
    return _parsed(text, shown(text))


def _parsed(text: str, name: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise ValueError(f"{name} is not YAML: too deeply nested") from error
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:  # also of a date, or a number's digits
        raise ValueError(f"{name} is not YAML: {' '.join(str(error).split())}") from error


def compose_yaml(text: str) -> Any:
    """The nodes of a YAML text, which know their lines.

    Raises:
        yaml.YAMLError: the text is no YAML.
    """
    return yaml.compose(text, Loader=_Loader)


def value_of(node: Any) -> Any:
    """The value of a node of `compose_yaml`.

    Raises:
        yaml.YAMLError, ValueError: a value that cannot be, such as a date of 13 months, or a key that is there twice.
    """
    loader = _Loader("")
    try:
        return loader.construct_document(node)
    finally:
        loader.dispose()


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
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    content = _parsed(text, str(path))
    known = {field.name for field in dataclasses.fields(cls) if field.init}
    if not isinstance(content, Mapping) or set(content) - known or not set(required) <= set(content):
        found = shown(sorted(map(str, content))) if isinstance(content, Mapping) else type(content).__name__
        needs = f"needs {' and '.join(required)} and knows" if required else "knows"
        raise ValueError(f"{path}: a {kind} {needs} {sorted(known)}, found {found}")
    return dict(content)


def check_fields(name: str, given: Mapping[str, Any], cls: type, free: Iterable[str] = ()) -> None:
    """Check that these are fields of dataclass `cls`, with values of its types.

    Args:
        name: the mapping's name, for the error.
        free: fields that may have any value.

    Raises:
        ValueError: names the field and its value.
    """
    known = hints(cls)
    for field, value in given.items():
        if field not in known:
            raise ValueError(f"{name} has {shown(field)}, which {cls.__name__} does not know")
        if field not in free and not fits(value, known[field]):
            wanted = getattr(known[field], "__name__", str(known[field]).replace("typing.", ""))
            raise ValueError(f"{name}: {field}={shown(value)} must be {wanted}, not {type(value).__name__}")


@cache
def hints(cls: type) -> dict[str, Any]:
    """{field: its type} of a dataclass, without those that its constructor does not take."""
    known = get_type_hints(cls)
    return {field.name: known[field.name] for field in dataclasses.fields(cls) if field.init}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value from YAML is of this type; numbers are finite, and whole numbers have at most 64 bits."""
    origin, of = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in of)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in of)
    if origin is dict or hint is dict:
        pairs = value.items() if isinstance(value, Mapping) else [(None, None)]
        return isinstance(value, Mapping) and (not of or all(fits(a, of[0]) and fits(b, of[1]) for a, b in pairs))
    if origin in (list, tuple) or hint in (list, tuple):
        inner = of[0] if of else Any
        return isinstance(value, (list, tuple)) and all(fits(one, inner) for one in value)
    if hint in (int, float):
        whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST
        return whole or (hint is float and isinstance(value, float) and math.isfinite(value))
    if isinstance(hint, type):
        if issubclass(hint, Enum):
            return isinstance(value, str)
        return isinstance(value, hint) or (dataclasses.is_dataclass(hint) and isinstance(value, Mapping))
    return True


@contextmanager
def named(file: str | Path) -> Iterator[None]:
    """Errors about the content of a file, or of a field of it, become ValueErrors that begin with its name."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{file}: no {error}") from error
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{file}: {error}") from error
