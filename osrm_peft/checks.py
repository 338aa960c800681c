"""Checks of single values: one error that names the option, the value and the bound."""

import math
import re
import unicodedata
from collections.abc import Iterable
from numbers import Integral, Real
from reprlib import Repr
from types import UnionType
from typing import Any

LARGEST = 2**63 - 1  # of a count: what 64 bits hold
SEEDS = 2**32 - 1  # the largest seed: numpy takes no larger ones
_SHORT = Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, 200, 200, 60
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = _SHORT.maxset = 10
# Names of devices, which Windows does not take for files, whatever comes after a dot.
_DEVICES = r"(?i:con|prn|aux|nul|conin\$|conout\$|(?:com|lpt)[0-9¹²³])[ ]*(?:\..*)?"


def is_fault(error: BaseException) -> bool:
    """Whether it is an error: a library in Rust that panics raises what is no Exception, as an interrupt is none."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def shown(value: Any) -> str:
    """`value` as an error shows it: its repr, cut where it is long or deep."""
    try:
        return _SHORT.repr(value)
    except (ValueError, RecursionError):  # a number of more digits than Python writes
        return f"<a {type(value).__name__}>"


def printable(text: object) -> str:
    """Text that a terminal shows and does not obey: what cannot be printed is escaped, but for line ends and tabs."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode() for char in str(text)
    )


def integer(name: str, value: Any, least: int, most: int = LARGEST) -> int:
    """`value` as an int in [least, most].

    Raises:
        ValueError: it is not a whole number, or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name}={shown(value)} must be a whole number of at least {least}")
    value = int(value)
    if value > most:
        raise ValueError(f"{name}={shown(value)} must be a whole number of at most {most}")
    return value


def size_in_bytes(name: str, value: Any) -> int:
    """`value`, a number of bytes or a text such as `"5GB"` (5·10⁹) or `"2GiB"` (2·2³⁰), as a number of bytes.

    Raises:
        ValueError: it is neither.
    """
    found = (
        re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?(?:([kKMGT])(i?)B|B)?", value)
        if isinstance(value, str)
        else None
    )
    if found is None and (not isinstance(value, Integral) or isinstance(value, bool)):
        raise ValueError(f"{name}={shown(value)} must be a size: 5GB, 500MB, 2GiB, or a number of bytes")
    if found is None:
        return int(value)
    power = " KMGT".index((found[2] or " ").upper())
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power) if power else int(float(found[1]))


def number(name: str, value: Any, least: float = -math.inf, most: float = math.inf, *, open_low: bool = False) -> float:
    """`value` as a finite float in [least, most], or in (least, most] with `open_low`.

    Raises:
        ValueError: it is not a finite number, or out of range.
    """
    try:
        good = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # of an int
        good = False
    if not good or value > most or value < least or (open_low and value == least):
        if math.isinf(least) and math.isinf(most):
            bounds = "be a finite number"
        elif math.isinf(most):
            bounds = f"be a finite number {'above' if open_low else 'of at least'} {least:g}"
        else:
            bounds = f"lie in {'(' if open_low else '['}{least:g}, {most:g}]"
        raise ValueError(f"{name}={shown(value)} must {bounds}")
    return float(value)


def choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """`value` if it is one of `choices`.

    Raises:
        ValueError: it is not; lists them.
    """
    if value not in choices:
        raise ValueError(f"unknown {name} {shown(value)}: choose from {', '.join(choices)}")
    return value


def kind(name: str, value: Any, kinds: type | UnionType, where: str = "") -> Any:
    """`value` if it is of one of `kinds`.

    Raises:
        ValueError: it is not; names them.
    """
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        expected = getattr(kinds, "__name__", str(kinds))
        raise ValueError(f"{name}={shown(value)}{where} must be {expected}, not {type(value).__name__}")
    return value


def task_name(value: Any) -> str:
    """`value` if it can be the name of a task: files are called so, here and on machines that others have.

    Raises:
        ValueError: it is no text, has more than 200 bytes, begins with a dot, ends with a dot or a space, is the name
            of a device of Windows, or has a character that names of files lack or that cannot be printed.
    """
    good = isinstance(value, str) and value.isprintable() and re.fullmatch(r"(?!\.)[^/\\:*?\"<>|]+(?<![. ])", value)
    if not good or len(value.encode()) > 200 or re.fullmatch(_DEVICES, value):
        raise ValueError(
            f"the task name {shown(value)} cannot be a file name, and files are called so: give it another"
        )
    return value


def task_names(values: Iterable[Any]) -> list[str]:
    """`values` if they can be the names of tasks side by side.

    Raises:
        ValueError: see `task_name`; or two differ in case only, and many file systems take them for one.
    """
    names: dict[str, str] = {}
    for name in map(task_name, values):
        other = names.setdefault(unicodedata.normalize("NFC", name.casefold()), name)
        if other != name:
            raise ValueError(
                f"the tasks {other!r} and {name!r} would share files where case does not count: rename one"
            )
    return list(names.values())
