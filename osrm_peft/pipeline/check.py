"""check_recipe: every mistake of a recipe at once, with its line, before anything is loaded."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import LoraConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainingArguments,
)

from osrm_peft.checks import integer, number, shown
from osrm_peft.io.yaml import compose_yaml, fits, hints, value_of
from osrm_peft.merging.methods.registry import METHODS
from osrm_peft.models.layers import target_layers
from osrm_peft.models.packaged import resolve_model
from osrm_peft.osrm.config import OSRMLoraConfig
from osrm_peft.pipeline.run import check_steps
from osrm_peft.pipeline.schema import NESTED
from osrm_peft.selection.split import Split
from osrm_peft.tasks.files import TaskData
from osrm_peft.tasks.suites import list_tasks
from osrm_peft.tasks.task import Task
from osrm_peft.training.recipe import Recipe
from osrm_peft.training.train import PAPER_LORA

_FREE = {"lora": ("lora_alpha", "init_lora_weights"), "osrm": ("lora_alpha", "init_lora_weights")}


@dataclass(frozen=True)
class Mistake:
    """One mistake.

    Attributes:
        file: the recipe.
        line: in it, from 1.
        key: such as `lora.r`; "" for the file as a whole.
        text: what is wrong, the value, and the way out.
    """

    file: Path
    line: int
    key: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {f'{self.key}: ' if self.key else ''}{self.text}"


def check_recipe(path: str | Path) -> tuple[list[Mistake], dict[str, Task]]:
    """Find the mistakes of a recipe: keys, values, files, columns, labels, model, layers, places.

    No weights are loaded and nothing is written.

    Returns:
        (mistakes in the order of their lines, {task: its rows}); the rows are complete where there is no mistake.

    Raises:
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no recipe {path}: `osrm-peft init FOLDER` writes one")
    checker = _Checker(path)
    try:
        node = compose_yaml(path.read_text(encoding="utf-8"))
        content = None if node is None else value_of(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        checker.add("", f"no YAML: {' '.join(str(getattr(error, 'problem', None) or error).split())}", mark)
        return checker.found, {}
    if not isinstance(content, Mapping):
        checker.add("", f"a recipe maps keys to values, such as model: packaged; found {shown(content)}")
        return checker.found, {}
    checker.lines = dict(_lines(node))
    tasks = checker.check(dict(content))
    return sorted(checker.found, key=lambda mistake: mistake.line), tasks


class _Checker:
    """The mistakes of one recipe.

    Attributes:
        lines: {key, dotted: its line}.
        dropped: whether a task was left out of later checks, for a mistake that is told already.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.found, self.lines = path, list[Mistake](), dict[str, int]()
        self.dropped = False

    def add(self, key: str, text: str, mark: Any = None) -> None:
        """Note a mistake at a key's line; of keys that are not in the file, at that of the nearest above."""
        line, place = (1 if mark is None else mark.line + 1), key
        while mark is None and place:
            if place in self.lines:
                line = self.lines[place]
                break
            place = place.rpartition(".")[0]
        self.found.append(Mistake(self.path, line, key, " ".join(text.split())))

    def check(self, content: dict[str, Any]) -> dict[str, Task]:
        """All checks; each part goes on without what an earlier one has found wrong."""
        self._fields("", content, Recipe)
        if "model" not in content:
            self.add("", "model is missing: give the base model, such as model: packaged")
        good = {name: value for name, value in content.items() if name in hints(Recipe)}
        good = {name: value for name, value in good.items() if fits(value, hints(Recipe)[name])}
        for name in NESTED:
            if isinstance(content.get(name), Mapping):
                before = len(self.found)
                good[name] = self._nested(name, dict(content[name]))
                if name == "push" and len(self.found) > before:
                    del good[name]
        for label, fields in (good["inits"] if isinstance(good.get("inits"), Mapping) else {}).items():
            if isinstance(fields, Mapping):
                good["inits"] = good["inits"] | {label: self._nested(f"inits.{label}", dict(fields), "osrm")}
        if isinstance(content.get("tasks"), Mapping):
            good["tasks"] = self._own_tasks(dict(content["tasks"]))
        recipe = self._recipe(good)
        if recipe is None:
            return {}
        tasks = self._tasks(recipe)
        self._model(recipe)
        self._places(recipe)
        return tasks

    def _fields(self, key: str, given: Mapping[str, Any], cls: type, free: tuple[str, ...] = ()) -> dict[str, Any]:
        """The fields that the class knows, with values that fit; the others are mistakes."""
        known, good = hints(cls), {}
        for name, value in given.items():
            place = f"{key}.{name}" if key else str(name)
            if name not in known:
                self.add(place, f"unknown key {shown(name)}: {_nearest(name, known)}")
            elif name not in free and not fits(value, known[name]):
                self.add(place, _unfit(value, known[name]))
            else:
                good[name] = value
        return good

    def _nested(self, key: str, given: dict[str, Any], part: str = "") -> dict[str, Any]:
        """The fields of a part that can be, each tried on its own."""
        part = part or key
        good = self._fields(key, given, NESTED[part], _FREE.get(part, ()))
        for name, value in list(good.items()):
            try:
                if key == "lora" and name == "r":
                    integer("r", value, 1)
                elif key == "lora":
                    LoraConfig(**(PAPER_LORA | {name: value}))
                elif part == "osrm":
                    OSRMLoraConfig(**(PAPER_LORA | {name: value}))
                elif key == "push" and name == "repo":
                    validate_repo_id(value)
            except (ValueError, TypeError, HFValidationError) as error:
                self.add(f"{key}.{name}", f"{shown(value)}: {error}")
                del good[name]
        if key == "training":
            self._training(good)
        if key == "push" and "repo" not in given:
            self.add(key, "repo is missing: give push: {repo: user/name}")
        if key == "select" and isinstance(good.get("candidates"), list):
            for place, entry in enumerate(good["candidates"]):
                if isinstance(entry, Mapping) and entry.get("method") not in METHODS:
                    self.add(f"select.candidates.{place}", f"unknown method: {_nearest(entry.get('method'), METHODS)}")
                    good.pop("candidates", None)
        return good

    def _training(self, good: dict[str, Any]) -> None:
        """What transformers says of the arguments: each alone, or, if each may be, all together."""
        fixed = {"output_dir": "unused", "report_to": "none"}
        for name, value in list(good.items()):
            try:
                if name == "learning_rate":
                    number(name, value, 0, open_low=True)
                TrainingArguments(**(fixed | {name: value}))
            except (ValueError, TypeError, ImportError) as error:
                self.add(f"training.{name}", f"{shown(value)}: {str(error)[:300]}")
                del good[name]
        try:
            TrainingArguments(**(fixed | good))
        except (ValueError, TypeError, ImportError) as error:
            self.add("training", str(error)[:300])
            good.clear()

    def _own_tasks(self, given: dict[str, Any]) -> dict[str, Any]:
        good = {}
        for name, fields in given.items():
            key = f"tasks.{name}"
            if not isinstance(fields, Mapping) or not isinstance(fields.get("train"), str):
                self.add(key, f"{shown(fields)} must map train, and more, to values: {{train: {name}.csv}}")
                continue
            before = len(self.found)
            fitting = self._fields(key, fields, TaskData)
            try:
                TaskData(**fitting)
            except ValueError as error:
                self.add(self._named_in(str(error), key), str(error))
            if len(self.found) == before:
                good[name] = fitting
        self.dropped = len(good) < len(given)
        return good

    def _recipe(self, good: dict[str, Any]) -> Recipe | None:
        """The recipe of what is good so far; a mistake that shows only here goes to the key that the error names."""
        none = isinstance(good.get("tasks"), dict) and not good["tasks"]
        if none and not self.dropped:
            self.add("tasks", "no task: a merge needs at least two, {reviews: {train: reviews.csv}, …}")
        if "model" not in good or none:
            return None
        try:
            recipe = Recipe(**good).below(self.path.parent)
        except (ValueError, TypeError) as error:
            self.add(self._named_in(str(error)), str(error))
            return None
        try:
            check_steps(recipe)
        except (ValueError, TypeError, FileNotFoundError) as error:
            self.add("select" if "select" in good else "push", str(error))
        return recipe

    def _named_in(self, text: str, below: str = "") -> str:
        """The key of the recipe, or of a part of it, that an error mentions first; else the part."""
        for word in re.findall(r"[^\W\d]\w*", text):
            keys = [key for key in self.lines if key.startswith(below) and key.rpartition(".")[2] == word]
            if keys:
                return min(keys, key=len)
        return below

    def _tasks(self, recipe: Recipe) -> dict[str, Task]:
        """The tasks that can be read."""
        found: dict[str, Task] = {}
        try:
            known = list_tasks(recipe.source)
        except (ValueError, FileNotFoundError) as error:
            self.add("suite", str(error))
            return {}
        names = list(recipe.tasks or known)
        for name in names:
            key = f"tasks.{name}" if f"tasks.{name}" in self.lines else "tasks"
            if name not in known:
                self.add(key, f"unknown task {shown(name)} in suite {recipe.suite!r}: {_nearest(name, known)}")
                continue
            try:
                found[name] = recipe.task(name) if set(names) <= set(known) else _one(recipe, name)
                Split.of(found[name], None, 0)
            except (ValueError, OSError) as error:
                self.add(key, str(error))
        if len(names) < 2 and not self.dropped:
            self.add("tasks", f"one task, {shown(names[0])}: a merge needs at least two")
        return found

    def _model(self, recipe: Recipe) -> None:
        """The base model's config, tokenizer, length and layers, as far as they are on this machine or the Hub."""
        try:
            name = resolve_model(recipe.model)
            config = AutoConfig.from_pretrained(name)
            AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, KeyError) as error:
            self.add("model", f"{shown(recipe.model)} cannot be read, config or tokenizer: {str(error)[:300]}")
            return
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        told = any(mistake.key == "max_length" for mistake in self.found)
        if isinstance(longest, int) and recipe.max_length > longest and not told:
            self.add("max_length", f"{recipe.max_length} tokens, and {recipe.model} takes at most {longest}")
        try:
            with torch.device("meta"):
                auto = AutoModelForCausalLM if recipe.in_words else AutoModelForSequenceClassification
                model = auto.from_config(config)
            target_layers(model, recipe.lora_config(recipe.task_names()[0]))
        except ValueError as error:
            key = "lora.target_modules" if "lora.target_modules" in self.lines else "lora"
            self.add(key, str(error))

    def _places(self, recipe: Recipe) -> None:
        """Whether features of others are there, and results can be written; none is, so the mode bits have to do."""
        for key in ("out_of_task", "in_task"):
            named = (recipe.osrm or {}).get(key) or []
            for file in [named] if isinstance(named, str) else named:
                if Path(file).suffix == ".safetensors" and ":" not in file and not Path(file).is_file():
                    self.add(f"osrm.{key}", f"no features file {file}: write it with `osrm-peft features`")
        for key in ("out", "features") if "features" in self.lines else ("out",):
            place = Path(getattr(recipe, key)).absolute()
            try:
                above = next(one for one in (place, *place.parents) if one.exists())
            except (OSError, ValueError) as error:  # a name that is too long, or that no file can have
                self.add(key, f"{shown(str(place))} cannot be a folder ({error}): name another")
                continue
            if not above.is_dir() or not os.access(above, os.W_OK):
                self.add(key, f"{above} is no folder that can be written to: name another")


def _one(recipe: Recipe, name: str) -> Task:
    """One task of a recipe of which another is unknown."""
    tasks: Any = {name: recipe.tasks[name]} if isinstance(recipe.tasks, dict) else [name]
    return replace(recipe, tasks=tasks).task(name)


def _unfit(value: Any, hint: Any) -> str:
    """That a value is of another type; of a choice which there are."""
    choices = [one for part in (hint, *get_args(hint)) if get_origin(part) is Literal for one in get_args(part)]
    if choices and isinstance(value, str):
        return f"{shown(value)}: {_nearest(value, choices)}"
    wanted = getattr(hint, "__name__", str(hint).replace("typing.", ""))
    return f"{shown(value)} must be {wanted}, not {type(value).__name__}"


def _nearest(name: Any, known: Any) -> str:
    """`did you mean X?`, and the choices where nothing is near or they are few."""
    close = get_close_matches(str(name), [str(one) for one in known], n=1, cutoff=0.6)
    mean = f"did you mean {close[0]!r}?" if close else ""
    listed = f"choose from {', '.join(map(str, known))}" if not close or len(known) <= 20 else ""
    return " ".join(filter(None, (mean, listed[:1500])))


def _lines(node: Any, above: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, int]]:
    """(dotted key, line) of all keys and items; an item of a list of texts has its text as its last part, too.

    What an anchor names is listed where it is first met: it may hold itself, or more than there is time for.
    """
    seen = set() if seen is None else seen
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            place = f"{above}.{key.value}" if above else str(key.value)
            yield place, key.start_mark.line + 1
            yield from _lines(value, place, seen)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield f"{above}.{number}", value.start_mark.line + 1
            if isinstance(value, yaml.ScalarNode):
                yield f"{above}.{value.value}", value.start_mark.line + 1
            yield from _lines(value, f"{above}.{number}", seen)
