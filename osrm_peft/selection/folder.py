"""The folder of a selection: ranked table, winning merges, and the predictions by which an interrupted run goes on."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from osrm_peft.checks import shown
from osrm_peft.hub.card import record_scores
from osrm_peft.hub.privacy import public_name
from osrm_peft.io.json import read_object, write_json
from osrm_peft.io.manifest import check_replaceable, read_manifest
from osrm_peft.io.places import check_folder, new_file
from osrm_peft.io.yaml import named
from osrm_peft.selection.selection import Line, Selection

TABLE, PAGE, WINNER, PER_TASK, CACHE = "selection.json", "selection.md", "winner", "best_per_task", "cache"
_SAME = ("settings", "candidates", "base_model", "inputs", "data")  # two selections that agree in these are one


class SelectionFolder:
    """Where a selection is written; checked before any work.

    Attributes:
        path: the folder.
        cache: of the predictions.

    Raises:
        FileExistsError: the folder holds files of others, or another selection (without `overwrite`).
    """

    def __init__(self, path: str | Path, made: Mapping[str, Any], overwrite: bool) -> None:
        self.path = check_folder(path)
        self.cache = check_folder(self.path / CACHE)
        entries = {entry.name for entry in self.path.iterdir()} if self.path.is_dir() else set()
        foreign = sorted(name for name in entries - {TABLE, PAGE, WINNER, PER_TASK, CACHE} if not name.startswith("."))
        if foreign or (entries and not entries & {TABLE, CACHE}):
            held = ", ".join(foreign or sorted(entries))[:200]
            raise FileExistsError(f"{path} holds {held} and is no selection's folder: name a new one")
        for name, kind in ((WINNER, "merged"), (PER_TASK, "emr")):
            check_replaceable(self.path / name, kind)
        with named(self.path / TABLE):
            lost = self._differs(made) if TABLE in entries and not overwrite else None
        if lost:
            raise FileExistsError(
                f"{path} holds another selection ({lost}), which would be lost: name a new folder, or replace it with "
                "overwrite=True (--overwrite)"
            )

    def _differs(self, made: Mapping[str, Any]) -> str | None:
        earlier, now = read_object(self.path / TABLE), json.loads(json.dumps(made))
        for one in (earlier, now):  # from another working directory the same files have other names
            one["base_model"] = public_name(one.get("base_model"))
            inputs = one.get("inputs") or {}
            one["inputs"] = {
                task: [about.get("sha256") or about.get("source"), about.get("config")]
                for task, about in inputs.items()
            }
        for name in _SAME:
            if earlier.get(name) != now.get(name):
                return f"{name} {shown(earlier.get(name))}, not {shown(now.get(name))}"
        return None

    def write(self, selection: Selection) -> None:
        """Write the winners with their scores in their cards, then the table, by which the folder is complete."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._write_merge(WINNER, selection.winner, selection.ranked, selection)
        self._write_merge(PER_TASK, selection.best_per_task, selection.apart, selection)
        with new_file(self.path / PAGE) as partial:
            partial.write_text(selection.markdown(), encoding="utf-8")
        write_json(self.path / TABLE, selection.to_dict())

    def _write_merge(self, name: str, merged: Any, lines: list[Line], selection: Selection) -> None:
        folder = self.path / name
        if merged is None:
            if read_manifest(folder):  # of an earlier selection, which had one
                shutil.rmtree(folder)
            return
        merged.save_pretrained(folder, overwrite=True)
        tested = [line for line in selection.test if line.name == lines[0].name]
        line, split = (tested[0], "test") if tested else (lines[0], "validation")
        rows = "test_rows" if tested else "rows"
        scores = [
            {
                "task": task,
                "metric": selection.tasks[task]["metric"],
                "value": estimate.value,
                "split": split,
                "rows": selection.tasks[task][rows],
                "dataset": None,
            }
            for task, estimate in line.scores.items()
        ]
        record_scores(folder, scores)
