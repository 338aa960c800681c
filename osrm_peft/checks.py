"""Checks of single values: one error that names the option, the value and the bound."""

import math
import re
from numbers import Integral, Real
from typing import Any


def integer(name: str, value: Any, least: int) -> int:
    """`value` as an int of at least `least`.

    Raises:
        ValueError: it is not a whole number, or below the bound.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
    return int(value)


def number(name: str, value: Any, least: float = -math.inf, most: float = math.inf, *, open_low: bool = False) -> float:
    """`value` as a finite float in [least, most], or in (least, most] with `open_low`.

    Raises:
        ValueError: it is not a finite number, or out of range.
    """
    good = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value > most or value < least or (open_low and value == least):
        if math.isinf(least) and math.isinf(most):
            bounds = "be a finite number"
        elif math.isinf(most):
            bounds = f"be a finite number {'above' if open_low else 'of at least'} {least:g}"
        else:
            bounds = f"lie in {'(' if open_low else '['}{least:g}, {most:g}]"
        raise ValueError(f"{name}={value!r} must {bounds}")
    return float(value)


def choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """`value` if it is one of `choices`.

    Raises:
        ValueError: it is not; lists them.
    """
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}: choose from {', '.join(choices)}")
    return value


def task_name(value: Any) -> str:
    """`value` if it can be the name of a task: files are called so.

    Raises:
        ValueError: it is no text, has more than 200 characters, begins with a dot, or has one that names of files lack.
    """
    if not isinstance(value, str) or not re.fullmatch(r"(?!\.)[^/\\:\x00-\x1f]{1,200}", value):
        raise ValueError(f"the task name {value!r} cannot be a file name, and files are called so: give it another")
    return value
