"""What the commands of `osrm-peft` share: the app, the console, options, and NAME=VALUE texts."""

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook
from rich.segment import Segment

from osrm_peft.checks import printable

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train LoRA adapters so that they can be merged (OSRM), and merge them (LoRE-Merging and the baselines).",
)
console = Console(  # soft: a path is one word, to copy; of several processes the first prints
    soft_wrap=True, width=None if sys.stdout and sys.stdout.isatty() else 120, quiet=os.environ.get("RANK", "0") != "0"
)


class _Printable(RenderHook):
    """All that a console prints, with what a terminal would obey escaped: names come from files of others."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Wrap each."""
        return [_Escaped(one) for one in renderables]


class _Escaped:
    def __init__(self, inner: ConsoleRenderable) -> None:
        self.inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for text, style, control in console.render(self.inner, options):
            yield Segment(text if control else printable(text), style, control)


console.push_render_hook(_Printable())


_format_warning = warnings.formatwarning


class _Formatter(logging.Formatter):
    """Messages on one line each, with nothing that a terminal would obey."""

    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record))


def one_line(text: object) -> str:
    """`text` for a terminal, on one line."""
    return printable(" ".join(str(text).split()))


def escape_messages() -> None:
    """Let what a terminal lacks, and warnings and log messages that nobody else handles, go to it escaped."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # where a terminal or pipe has no λ
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Formatter())
    warnings.formatwarning = lambda *arguments, **named: printable(_format_warning(*arguments, **named))


ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="A recipe, see recipes/configs/.")]
TaskOption = Annotated[list[str] | None, typer.Option("--task", "-t", help="A task; repeat it. Default: all.")]
SuiteOption = Annotated[str, typer.Option(help="packaged, glue, or files:FOLDER.")]


def chosen(tasks: list[str] | None, known: list[str]) -> list[str]:
    """The tasks asked for, checked against those there are; all by default."""
    unknown = sorted(set(tasks or []) - set(known))
    if unknown:
        raise ValueError(f"unknown task {', '.join(unknown)}: the recipe has {', '.join(known)}")
    return tasks or known


def pair(text: str) -> tuple[str, str]:
    """(NAME, VALUE) of a NAME=VALUE text."""
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise ValueError(f"{text!r}: expected NAME=VALUE")
    return name, value


def pairs(texts: list[str] | None) -> dict[str, str]:
    """{NAME: VALUE} of NAME=VALUE texts, each name once."""
    found = [pair(text) for text in texts or []]
    if len(dict(found)) < len(found):
        raise ValueError(f"{', '.join(texts or [])}: a name is given twice")
    return dict(found)


def values(texts: list[str] | None) -> dict[str, Any]:
    """{NAME: value} of NAME=VALUE texts."""
    from osrm_peft.io.yaml import named, parse_yaml

    found = {}
    for name, value in pairs(texts).items():
        with named(name):
            found[name] = parse_yaml(value)
    return found


def sources(adapters: list[str] | None) -> dict[str, str]:
    """{task: source}; a folder's name is its task's where none is given."""
    named = []
    for text in adapters or []:
        task, separator, _ = text.partition("=")
        alone = Path(text).is_dir() or not separator or "/" in task  # a task's name has no /, a folder's may have =
        named.append((Path(text).name, text) if alone else pair(text))
    if len(dict(named)) < len(named):
        raise ValueError(f"two adapters have the same name among {[name for name, _ in named]}: write TASK=FOLDER")
    return dict(named)


def say(text: str) -> None:
    """Print a line as it is."""
    console.print(text, markup=False, highlight=False)  # a path may hold brackets
