"""Messages of the library in the words of a command: `--base-model NAME`, not `base_model=NAME`."""

import re
from collections.abc import Sequence
from typing import Any

_VALUE = r"'[^'\s]*'|\{task: file\}|LeastSquares\(features(?:, shared=True)?\)|[^\s,;:()]*"
_SAID = {"{task: file}": "TASK=FILE", "LeastSquares(features)": "features"}
_SAID["LeastSquares(features, shared=True)"] = "features_global"


def in_words(text: str, program: Any, arguments: Sequence[str]) -> str:
    """`text` with the keywords of Python as the flags of the command that runs.

    Only keywords that the command has as options change, and none inside of a call such as `f(x, dtype=…)`. With a
    recipe those alone that were typed: the others are keys of the recipe.

    Args:
        program: the whole program, as click has it.
        arguments: what was typed after its name.
    """
    command = _command(program, arguments)
    flags = {one.name: one for one in command.params if one.param_type_name == "option"}
    typed = {word.partition("=")[0] for word in arguments}
    if {"-c", "--config"} & typed or any(one.name == "recipe" for one in command.params):
        flags = {name: one for name, one in flags.items() if typed & {*one.opts}}
    calls = [one.span() for one in re.finditer(r"(?<!LeastSquares)(?<=\w)\([^()]*\)", text)]

    def flag(found: re.Match) -> str:
        name, value = found[1], found[2]
        option = flags.get(name)
        inside = any(start < found.start() < end for start, end in calls)
        if option is None or inside or value == "False" or ("/" in value and not value.startswith("'")):
            return found[0]
        word = max(option.opts, key=len)
        if value == "True":
            return word
        value = _SAID.get(value, value[1:-1] if re.fullmatch(r"'[\w.-]+'", value) else value)
        return f"{word} {value}" if value else word

    text = re.sub(rf"(?<![\w./\\'\"=*-])([a-z_]+)=({_VALUE})", flag, text)
    return re.sub(r"(--[a-z-]+)(?: \w+)? \((\1(?: \w+)?)\)", r"\2", text)  # a message that names the flag, too


def _command(program: Any, arguments: Sequence[str]) -> Any:
    """The command that these arguments run."""
    for word in arguments:
        if word.startswith("-"):
            continue
        inner = getattr(program, "commands", {}).get(word)
        if inner is None:
            break
        program = inner
    return program
