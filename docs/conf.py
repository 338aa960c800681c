"""Sphinx: Markdown pages by MyST, the API from docstrings; commands and methods from the program itself."""

import os
import re
from importlib import metadata

os.environ.setdefault("HF_HUB_OFFLINE", "1")

project = "osrm_peft"
release = metadata.version("osrm_peft")
copyright = "the osrm_peft authors, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"osrm_peft {release}"
exclude_patterns = ["_build", "results/*/*/*.md"]  # the tables of one experiment: its suite's README has them all
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
myst_links_external_new_tab = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
default_role = "code"
smartquotes = False


def commands() -> str:
    """Markdown of every command: its help, arguments and options with their defaults."""
    import typer.main

    from osrm_peft.cli import main as cli

    return "\n".join(_command(name, group) for name, group in typer.main.get_command(cli.app).commands.items())


def _command(name: str, command, level: int = 2) -> str:
    lines = [f"{'#' * level} {name}\n", _text(command.help), "", f"```text\n{_usage(name, command)}\n```\n"]
    options = [parameter for parameter in command.params if parameter.name != "help"]
    if options:
        lines += ["| argument or option | default | meaning |", "|---|---|---|"]
        lines += [_row(parameter) for parameter in options]
    inner = getattr(command, "commands", {})
    return "\n".join([*lines, "", *(_command(f"{name} {other}", inner[other], level + 1) for other in inner)])


def _usage(name: str, command) -> str:
    arguments = [
        f"{'' if parameter.required else '['}{parameter.name.upper()}{' …' if parameter.nargs == -1 else ''}"
        f"{'' if parameter.required else ']'}"
        for parameter in command.params
        if parameter.param_type_name == "argument"
    ]
    return " ".join(["osrm-peft", name, *arguments, "[OPTIONS]"])


def _row(parameter) -> str:
    named = parameter.name.upper() if parameter.param_type_name == "argument" else ", ".join(parameter.opts)
    default = parameter.default() if callable(parameter.default) else parameter.default
    shown = "required" if parameter.required else "" if default in (None, False, [], ()) else f"`{default}`"
    return f"| `{named}` | {shown} | {_text(getattr(parameter, 'help', '') or '').replace('|', chr(92) + '|')} |"


def _text(help_text: str | None) -> str:
    return " ".join((help_text or "").split()).replace("<", "&lt;")


def methods() -> str:
    """Markdown table of the registered methods: λ, options, spaces, needs, paper, what they compute."""
    from osrm_peft.cli.methods import method_facts
    from osrm_peft.merging import METHODS

    lines = ["| method | λ | options | spaces | needs | full models | what it computes, and its paper |"]
    lines.append("|---|--:|---|---|---|---|---|")
    for one in map(method_facts, METHODS.values()):
        options = ", ".join(f"`{option}` ({value})" for option, value in one["options"].items())
        spaces = ", ".join(f"`{space}`" for space in one["spaces"])
        needs = f"`collect_{one['needs']}`" if one["needs"] else ""
        first = [text.split("\n\n")[0].replace("\n", " ").replace("|", "\\|") for text in one["documentation"]]
        lines.append(
            f"| `{one['name']}` | {one['scale']:g} | {options} | {spaces} | {needs} | {one['full_models']} | "
            f"{' Then: '.join(first)} {one['paper']} |"
        )
    return "\n".join(lines)


def _generated(app, docname: str, source: list[str]) -> None:
    for name, make in (("commands", commands), ("methods", methods)):
        if docname == f"reference/{'cli' if name == 'commands' else name}":
            source[0] = re.sub(rf"<!-- {name}:.*?-->", lambda _, make=make: make(), source[0])


def setup(app) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _generated)
