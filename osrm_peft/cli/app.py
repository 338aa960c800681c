"""What the commands of `osrm-peft` share: the app, the console, options, and NAME=VALUE texts."""

import gc
import io
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook
from rich.segment import Segment
from rich.text import Text
from typer.core import TyperGroup

from osrm_peft.checks import printable
from osrm_peft.cli.words import in_words

# The commands in the order in which a user needs them, as `osrm-peft --help` groups them.
PANELS = {
    "From data to a merge": ("init", "check", "run", "demo"),
    "Adapters": ("features", "train", "project", "inspect"),
    "Merge": ("interference", "methods", "statistics", "merge", "merge-checkpoints", "bake", "extract", "select"),
    "Results": ("evaluate", "report", "push"),
    "This installation": ("env",),
}


@dataclass
class Session:
    """What the options before the command ask for, and what the command has done.

    Attributes:
        quiet: no messages and no progress bars.
        json: the command prints one JSON document; messages go to stderr.
        written: what is finished.
    """

    quiet: bool = False
    json: bool = False
    written: list[str] = field(default_factory=list)


session = Session()


class Commands(TyperGroup):
    """The commands in panels; `--quiet` may stand anywhere, and an interrupt of any command is one line."""

    def __init__(self, **named: Any) -> None:
        super().__init__(**named)
        panels = {name: panel for panel, names in PANELS.items() for name in names}
        order = [*panels, *self.commands]
        self.commands = dict(sorted(self.commands.items(), key=lambda one: order.index(one[0])))
        for name, command in self.commands.items():
            command.rich_help_panel = panels.get(name, "Other")  # type: ignore[attr-defined]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `--quiet` before the command."""
        end = args.index("--") if "--" in args else len(args)
        quiet = ["--quiet"] if "--quiet" in args[:end] else []
        return super().parse_args(ctx, [*quiet, *(one for one in args[:end] if one != "--quiet"), *args[end:]])

    def invoke(self, ctx: Any) -> Any:
        """Run the command. An interrupt's own text says what is kept."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            done = [f"finished: {', '.join(session.written)}"] if session.written else []
            text = "; ".join(["interrupted", *done, *filter(None, map(str, interrupt.args))])
            messages.print(one_line(text), markup=False, highlight=False)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train LoRA adapters so that they can be merged (OSRM), and merge them (LoRE-Merging and the baselines).",
)
_SECOND = os.environ.get("RANK", "0") != "0"  # of several processes the first prints
console = Console(  # soft: a path is one word, to copy
    soft_wrap=True, width=None if sys.stdout and sys.stdout.isatty() else 120, quiet=_SECOND, emoji=False
)
messages = Console(stderr=True, soft_wrap=True, quiet=_SECOND, emoji=False)


def _print_versions(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        names = ("osrm_peft", "torch", "transformers", "peft")
        console.print(", ".join(f"{name} {version(name)}" for name in names), highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_versions, help="Versions on one line.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No messages and no progress bars; also after the command.")
    ] = False,
) -> None:
    session.quiet, session.json, session.written = quiet, False, []
    if quiet:  # the bars of libraries, which read this when they are imported
        os.environ |= dict.fromkeys(
            ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"), "1"
        )


def _begin_json(asked: bool) -> bool:
    session.json = asked
    return asked


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
messages.push_render_hook(_Printable())


_format_warning = warnings.formatwarning


class _Formatter(logging.Formatter):
    """Messages on one line each, with nothing that a terminal would obey."""

    def format(self, record: logging.LogRecord) -> str:
        return one_line(as_typed(super().format(record)))


def one_line(text: object) -> str:
    """`text` for a terminal, on one line."""
    return printable(" ".join(str(text).split()))


def escape_messages() -> None:
    """Let what a terminal lacks, and warnings and log messages that nobody else handles, go to it escaped."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # where a terminal or pipe has no λ
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Formatter())
    warnings.formatwarning = _one_warning


def _one_warning(message: Any, category: Any, filename: str, *arguments: Any, **named: Any) -> str:
    """Our warnings in one line, in the words of the command; those of others as they are."""
    if Path(filename).is_relative_to(Path(__file__).parents[1]):
        return f"warning: {one_line(as_typed(str(message)))}\n"
    return printable(_format_warning(message, category, filename, *arguments, **named))


def load_torch() -> None:
    """Import torch, whose objects stay to the end: left out of all collections, which took a sixth of a small merge."""
    if "torch" in sys.modules or not gc.isenabled():
        return
    gc.disable()
    try:
        import torch  # noqa: F401 (for what comes next)
    finally:
        gc.freeze()
        gc.enable()


def quiet_libraries() -> None:
    """What other libraries may print while a command runs: errors, and none of their bars; our own bars stay.

    transformers reports each head that is not in a checkpoint, which training or the adapter fills; and it warns of its
    own old names.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    for constant in (
        "A single label was found in",
        "An input array is constant",
    ):  # a score of 0, sklearn's and scipy's
        warnings.filterwarnings("ignore", message=constant)


def as_typed(text: str) -> str:
    """A message of the library in the words of the command that runs."""
    return in_words(text, typer.main.get_command(app), sys.argv[1:])


ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="A recipe, see recipes/configs/.")]
TaskOption = Annotated[list[str] | None, typer.Option("--task", "-t", help="A task; repeat it. Default: all.")]
JsonOption = Annotated[
    bool, typer.Option("--json", callback=_begin_json, help="One JSON document instead of tables, numbers unrounded.")
]
SuiteOption = Annotated[str, typer.Option(help="packaged, glue, or files:FOLDER, or a recipe's YAML.")]


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
    """Print a message as it is: on stderr beside a JSON document, and not at all with `--quiet`."""
    if not session.quiet:
        (messages if session.json else console).print(text, markup=False, highlight=False)  # a path may hold brackets


def wrote(path: Any, about: str = "") -> None:
    """Say that `path` is written, and remember it for an interrupt."""
    session.written.append(str(path))
    say(f"wrote {path}{about}")


def show(facts: Any, tables: Callable[[Any], Iterable[Any]]) -> None:
    """Print what a command has found: the tables that `tables` makes of it, or with `--json` the facts themselves."""
    if session.json:
        console.out(json.dumps(_finite(facts), indent=2), highlight=False)
    else:
        for table in tables(facts):
            console.print(Text(table) if isinstance(table, str) else table)


def _finite(value: Any) -> Any:
    """As JSON has it: None for numbers that are not finite, lists for tuples, text for what it does not know."""
    if isinstance(value, dict):
        return {str(name): _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def progress() -> bool:
    """Whether bars are to be shown."""
    return not session.quiet
