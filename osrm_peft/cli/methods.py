"""The command `methods`: the merge methods with their options; and the same in short for the help of others."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import HORIZONTALS
from rich.markup import escape
from rich.table import Table

from osrm_peft.cli.app import JsonOption, app, show

if TYPE_CHECKING:
    from osrm_peft.merging.methods.registry import Method

# {method: its options} in the order of the tables. It equals the registry's, which a test compares: importing that
# takes seconds, for which no help shall wait.
OPTIONS = {
    "average": "",
    "task_arithmetic": "",
    "concat": "",
    "ties": "density=0.2, trim=model",
    "dare": "drop_rate=0.5",
    "dare_ties": "density=0.2, trim=model, drop_rate=0.5",
    "tsv": "rank_share=1.0",
    "iso": "",
    "lore": "mu=None, mu_ratio=None, rank_ratio=None, combine=sum, density=0.2, max_iterations=200, tolerance=1e-06",
    "regmean": "off_diagonal=0.9, ridge=0.0",
    "fisher": "",
    "emr": "",
}
FULL_MODELS = ("average", "task_arithmetic", "ties", "dare", "dare_ties", "tsv", "iso", "lore", "emr")


def listed(names: Iterable[str]) -> str:
    """Methods and their options for the end of a command's help."""
    each = ", ".join(f"{name} ({OPTIONS[name]})" if OPTIONS[name] else name for name in names)
    return f"Methods, with the options that --option NAME=VALUE sets: {each}. `osrm-peft methods` says more."


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="A method, to see all about it.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the merge methods: default λ, options, what they need, where they run, and their papers."""
    from osrm_peft.merging.methods import METHODS
    from osrm_peft.merging.methods.registry import get_method

    if name is None:
        names = [*OPTIONS, *(one for one in METHODS if one not in OPTIONS)]  # others may have registered some
        show([method_facts(METHODS[one]) for one in names], lambda facts: [_table(facts)])
    else:
        show(method_facts(get_method(name)), _lines)


def method_facts(method: "Method") -> dict[str, Any]:
    """What a user chooses a method by."""
    import inspect

    documented = [inspect.getdoc(fn) or "" for fn in (method.prepare, method.fn) if fn is not None]
    full = "no" if method.needs or method.spaces == ("factors",) else "without base" if method.baseless else "yes"
    return {
        "name": method.name,
        "paper": method.paper,
        "scale": method.scale,
        "options": method.options,
        "spaces": list(dict.fromkeys((("core",) if method.commutes else ()) + method.spaces)),
        "needs": method.needs,
        "full_models": full,
        "documentation": documented,
    }


def _table(facts: list[dict[str, Any]]) -> Table:
    columns = ("method", "λ", "options", "spaces", "needs", "full models", "paper")
    table = Table(*columns, box=HORIZONTALS, show_edge=False, show_lines=True)
    for one in facts:
        options = "\n".join(f"{option}={value}" for option, value in one["options"].items())
        paper, _, address = one["paper"].rpartition(", ")
        cells = [one["name"], f"{one['scale']:g}", options, "\n".join(one["spaces"]), one["needs"] or "",
                 one["full_models"], f"{paper}\n{address}"]  # fmt: skip
        table.add_row(*map(escape, cells))
    return table


def _lines(one: dict[str, Any]) -> list[str]:
    base = {"no": "none", "yes": "merged, with --base-model", "without base": "merged, without a base model, too"}
    needs = f"--statistics TASK=FILE of every task (osrm-peft statistics --kind {one['needs']})"
    return [
        f"{one['name']}: {one['paper']}",
        f"default λ: {one['scale']:g}",
        f"spaces: {', '.join(one['spaces'])} ({one['spaces'][0]} by default)",
        f"needs: {needs if one['needs'] else 'the adapters alone'}",
        f"full models: {base[one['full_models']]}",
        *(f"option: {option}={value}" for option, value in one["options"].items()),
        *(f"\n{text}" for text in one["documentation"]),
    ]
