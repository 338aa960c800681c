"""Steps of a run: each is made once, and again when what it is made from has changed."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from osrm_peft.checks import shown
from osrm_peft.io.json import read_object, write_json
from osrm_peft.io.places import check_file

FILE = "steps.json"
_BEGUN = "begun"


class Steps:
    """What a folder's results are made from.

    Args:
        out: the folder of the run.
        say: prints a line.
        total: how many steps there are, for the lines.
    """

    def __init__(self, out: Path, say: Callable[[str], None], total: int) -> None:
        self.path, self.say, self.total, self.place = check_file(out / FILE), say, total, 0
        self.made: dict[str, Any] = read_object(self.path) if self.path.is_file() else {}
        if not all(isinstance(made, dict) for made in self.made.values()):
            raise ValueError(f"{self.path} is no file of a run: name another folder with out=, or remove it")

    def needs(self, name: str, made_from: Mapping[str, Any], exists: bool, path: Path | None = None) -> bool:
        """Whether to make a result, and the line that says so.

        Args:
            name: the result's path in the folder of the run.
            made_from: what it is to be made from.
            exists: whether there is one.
            path: of the result, if its name is another.

        Raises:
            FileExistsError: there is one that no run has made.
        """
        self.place += 1
        before, now = self.made.get(name), json.loads(json.dumps(made_from))
        counted = f"[{self.place}/{self.total}] {name}"
        if not exists:
            self.say(f"{counted}: making it")
        elif before == now:
            self.say(f"{counted}: is there already")
            return False
        elif before is None and self.begun(name) is not None:  # it was to be made anew, or was not noted yet
            self.say(f"{counted}: making it anew (an earlier run was interrupted)")
        elif before is None:
            raise FileExistsError(
                f"{path or self.path.parent / name} exists, and no run into {self.path.parent} made it: name another "
                f"folder, or remove it"
            )
        else:
            self.say(f"{counted}: making it anew ({difference(before, now)})")
        self.made.pop(name, None)
        self.made.setdefault(_BEGUN, {})[name] = now
        write_json(self.path, self.made)
        return True

    def begun(self, name: str) -> Any:
        """What a step was to be made from that was begun and is not done; None without one."""
        return self.made.get(_BEGUN, {}).get(name)

    def done(self, name: str, made_from: Mapping[str, Any]) -> None:
        """Remember what a finished result is made from."""
        self.made[name] = json.loads(json.dumps(made_from))
        self.made.get(_BEGUN, {}).pop(name, None)
        write_json(self.path, self.made)


def difference(before: Any, now: Any, name: str = "") -> str:
    """The first difference of two nested mappings: `"lora r was 8, is 16"`."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            if before.get(key) != now.get(key):
                return difference(before.get(key), now.get(key), f"{name} {key}".strip())
    return f"{name} was {shown(before)}, is {shown(now)}"
