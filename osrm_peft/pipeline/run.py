"""run_recipe: features, adapters, statistics, interference, the choice of a merge, the report; and a push."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from osrm_peft.checks import LARGEST, integer
from osrm_peft.evaluation.interference import interference
from osrm_peft.evaluation.page import write_report
from osrm_peft.evaluation.plots import plot_interference
from osrm_peft.hub.push import push_to_hub
from osrm_peft.io.json import read_object, write_json
from osrm_peft.io.manifest import MANIFEST, read_manifest, versions
from osrm_peft.io.places import alone_in, check_file, check_folder
from osrm_peft.io.tensors import data_sha256
from osrm_peft.io.yaml import check_fields
from osrm_peft.merging.methods.registry import METHODS
from osrm_peft.osrm.config import OSRMLoraConfig
from osrm_peft.pipeline.steps import Steps
from osrm_peft.selection.candidates import DEFAULT, Candidate, expand, read_candidates
from osrm_peft.selection.folder import PER_TASK, TABLE, WINNER
from osrm_peft.selection.select import Rule, select_merge
from osrm_peft.tasks.task import fingerprint
from osrm_peft.training.recipe import Recipe


@dataclass(frozen=True)
class SelectFields:
    """What `select:` of a recipe may hold, see `select_merge`."""

    candidates: list[dict[str, Any]] | str | None = None
    rule: Rule = "mean"
    rows: int | None = 512
    rank: int | str | None = None
    halving: bool = True


@dataclass(frozen=True)
class PushFields:
    """What `push:` of a recipe may hold: the repository on the Hub, and whether all may see it."""

    repo: str
    public: bool = False


def check_steps(recipe: Recipe) -> None:
    """Check what the recipe says of the choice and the push.

    Raises:
        ValueError: names the key and its value.
    """
    check_fields("select in the recipe", recipe.select, SelectFields)
    fields = SelectFields(**recipe.select)
    if fields.rows is not None:
        integer("rows of select in the recipe", fields.rows, 2, LARGEST)
    if fields.rank not in (None, "serving"):
        integer("rank of select in the recipe", fields.rank, 1)
    names = set(recipe.task_names())
    for candidate in _candidates(fields.candidates):
        weights = candidate.fields.get("weights")
        if isinstance(weights, dict) and set(weights) != names:
            raise ValueError(
                f"the candidate {candidate.name!r} has weights for {', '.join(map(str, weights))}, the recipe's tasks "
                f"are {', '.join(sorted(names))}: give one for each"
            )
    folders: dict[str, str] = {}
    for label in recipe.inits or {}:
        folder = _folder_of(label) if isinstance(label, str) else ""
        if not folder:
            raise ValueError(f"inits in the recipe: {label!r} gives no name of a folder: use letters or digits")
        if folders.setdefault(folder.lower(), label) != label:
            raise ValueError(
                f"inits in the recipe: {folders[folder.lower()]!r} and {label!r} would share the folder {folder!r}: "
                "rename one"
            )
    if recipe.push is not None:
        check_fields("push in the recipe", recipe.push, PushFields)
        if not recipe.push.get("repo"):
            raise ValueError("push in the recipe needs repo: user/name")


def run_recipe(recipe: Recipe, *, say: Callable[[str], None] = print, progress: bool = True) -> dict[str, Any]:
    """Do all that a recipe asks for, into its `out`: each step once, and again when its recipe or inputs have changed.

    `features/`, `adapters/`, `statistics/`, `interference/`, `selection/` and `report.html`; then, with `push`, the
    chosen merge goes to the Hub. An interrupted run goes on where it stopped. With `inits`, adapters, statistics and
    selection have a folder for each.

    Args:
        recipe: see `Recipe`.
        say: prints a line for each step.
        progress: show bars.

    Returns:
        The content of `selection.json`, of the best of the `inits`: `verdict` is the answer; and `folder`, the merge's.

    Raises:
        ValueError: a mistake in the recipe or the data, before any work.
        FileExistsError: `out` holds a result that no run has made.
    """
    run = _Run(recipe, say, progress)
    with alone_in(run.out):
        return run.all()


def read_selections(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """{init, or "": the content of its `selection.json`} of a recipe that has run."""
    labels = recipe.inits or {"": recipe.osrm}
    return {label: read_object(Path(recipe.out, "selection", _folder_of(label), TABLE)) for label in labels}


@dataclass
class _Init:
    """One way to set A, with the folders of what is made of it.

    Attributes:
        label: "" where the recipe has one way.
        recipe: with its `osrm` fields.
        adapters: {task: folder}.
        statistics: {kind: {task: file}}.
        selection: folder.
    """

    label: str
    recipe: Recipe
    adapters: dict[str, Path]
    selection: Path
    statistics: dict[str, dict[str, Path]] = field(default_factory=dict)

    def name(self, kind: str, *more: str) -> str:
        """The name of a step."""
        return "/".join([kind, *([_folder_of(self.label)] if self.label else []), *more])


class _Run:
    def __init__(self, recipe: Recipe, say: Callable[[str], None], progress: bool) -> None:
        check_steps(recipe)
        self.recipe, self.say, self.progress, self.out = recipe, say, progress, check_folder(recipe.out)
        names = recipe.task_names()
        if len(names) < 2:
            raise ValueError(
                f"the recipe has {f'one task, {names[0]!r}' if names else 'no task'}: a merge needs at least two"
            )
        self.tasks = {name: recipe.task(name) for name in names}
        self.features = {name: recipe.features_file(name) for name in names}
        self.inits = list(self._inits())
        for path in (*self.features.values(), self.out / "report.html"):
            check_file(path)
        files = sum(len(files) for init in self.inits for files in (init.adapters, *init.statistics.values()))
        total = len(names) + files + 1 + len(self.inits) + 1 + (recipe.push is not None)
        self.steps = Steps(self.out, say, total)
        page = self.out / "report.html"
        if page.exists() and not self.steps.made:
            raise FileExistsError(f"{page} exists, and no run made it: name another folder with out, or move it")

    def _inits(self) -> Iterator[_Init]:
        inits = self.recipe.inits or {"": self.recipe.osrm}
        for label, osrm in inits.items():
            recipe = replace(self.recipe, osrm=osrm, inits=None)
            below = _folder_of(label) if label else ""
            adapters = {name: self.out / "adapters" / below / name for name in self.tasks}
            init = _Init(label, recipe, adapters, self.out / "selection" / below)
            for kind in _statistics(recipe):
                folder = self.out / "statistics" / below
                init.statistics[kind] = {name: folder / f"{name}.{kind}.safetensors" for name in self.tasks}
            for name in self.tasks:
                recipe.lora_config(name)
            yield init

    def all(self) -> dict[str, Any]:
        """All steps; see `run_recipe`."""
        self.collect_features()
        selections = {}
        for init in self.inits:
            self.train(init)
            self.collect_statistics(init)
        self.measure_interference()
        for init in self.inits:
            selections[init.label] = self.select(init)
        self.report()
        best = max(selections.values(), key=lambda one: _top(one)["value"]["value"])
        if len(selections) > 1:
            self.say(_compared(selections))
        if self.recipe.push is not None:
            self.push(Path(best["folder"]))
        return best

    def collect_features(self) -> None:
        """One features file a task, on the pre-trained model, which is loaded once."""
        configs = [init.recipe.lora_config(next(iter(self.tasks))) for init in self.inits]
        looks = {(config.statistic, config.reference) for config in configs if isinstance(config, OSRMLoraConfig)}
        if len(looks) > 1:
            raise ValueError(
                f"the inits look at different features, {sorted(looks)} (statistic, reference): give each a recipe"
            )
        base = None
        recipe = next((init.recipe for init in self.inits if init.recipe.osrm is not None), self.inits[0].recipe)
        for name, path in self.features.items():
            config = recipe.lora_config(name)
            made_from = {
                "model": recipe.model_identity(),
                "rows": fingerprint(self.tasks[name].train),
                "num_samples": recipe.num_samples,
                "max_length": recipe.max_length,
                "seed": recipe.seed,
                "statistic": getattr(config, "statistic", None),
                "reference": getattr(config, "reference", False),
                "target_modules": sorted(targets) if isinstance(targets := config.target_modules, set) else targets,
                **({} if recipe.tokens == "all" else {"tokens": recipe.tokens}),
            }
            if self.steps.needs(f"features/{name}", made_from, path.exists(), path):
                base = recipe.base() if base is None else base
                recipe.collect(name, base=base, progress=self.progress).save(path)
                self.steps.done(f"features/{name}", made_from)

    def train(self, init: _Init) -> None:
        """One adapter a task."""
        for name, folder in init.adapters.items():
            step, made_from = init.name("adapters", name), init.recipe.made_from(name)
            known = read_manifest(folder).get("made_from")
            if known is not None:  # also of an adapter that `osrm-peft train` made
                self.steps.made[step] = known
            begun = self.steps.begun(step)
            if self.steps.needs(step, made_from, (folder / MANIFEST).is_file()):
                if begun != self.steps.begun(step):  # checkpoints of another recipe, interrupted, are no beginning
                    shutil.rmtree(folder.with_name(f"{folder.name}.checkpoints"), ignore_errors=True)
                init.recipe.train(name, folder, overwrite=True, progress=self.progress)
                self.steps.done(step, made_from)

    def collect_statistics(self, init: _Init) -> None:
        """One file a task for RegMean and Fisher merging, on the fine-tuned model, as far as a candidate needs them."""
        rows = self.recipe.statistics_rows
        for kind, files in init.statistics.items():
            for name, path in files.items():
                adapter = init.adapters[name]
                step, made_from = init.name("statistics", f"{name}.{kind}"), {"adapter": _hash(adapter), "rows": rows}
                if self.steps.needs(step, made_from, path.exists(), path):
                    init.recipe.collect_statistics(kind, name, adapter, num_samples=rows, progress=self.progress).save(
                        path
                    )
                    self.steps.done(step, made_from)

    def measure_interference(self) -> None:
        """How strongly each adapter acts on the other tasks' features; a panel for each init."""
        folder = self.out / "interference"
        made_from = {init.label or "adapters": self._hashes(init) for init in self.inits}
        if self.steps.needs("interference", made_from, (folder / "interference.json").is_file()):
            base, panels = self.recipe.load_base(), {}
            for init in self.inits:
                label = init.label or "adapters"
                panels[label] = interference(init.adapters, self.features, base=base, progress=self.progress)
            content = {"interference": {"": {label: one.to_dict() for label, one in panels.items()}}}
            write_json(folder / "interference.json", content | {"versions": versions()})
            plot_interference(panels, folder / "interference.png")
            self.steps.done("interference", made_from)

    def select(self, init: _Init) -> dict[str, Any]:
        """The merge to ship; the content of its `selection.json`, and its folder."""
        step, fields = init.name("selection"), self.recipe.select
        rows = {name: [fingerprint(part) for part in (t.validation, t.test) if part] for name, t in self.tasks.items()}
        files = {f"{kind}/{name}": path for kind, paths in init.statistics.items() for name, path in paths.items()}
        statistics = {name: _hash(path) for name, path in files.items()}
        given = fields | {"candidates": [one.name for one in _candidates(fields.get("candidates"))]}
        made_from = {"select": given, "rows": rows, "max_length": self.recipe.max_length, **self._hashes(init)}
        made_from["statistics"] = statistics
        made_from["metrics"] = {name: task.metric for name, task in self.tasks.items()}
        if self.steps.needs(step, made_from, (init.selection / TABLE).is_file()):
            arguments: Any = {**fields, **init.statistics}
            selection = select_merge(
                init.adapters, arguments.pop("candidates", None), tasks=self.tasks, base_model=self.recipe.model,
                features=self.features, max_length=self.recipe.max_length, seed=self.recipe.seed, out=init.selection,
                overwrite=True, progress=self.progress, **arguments,
            )  # fmt: skip
            self.steps.done(step, made_from)
            if init.label:
                self.say(f"{init.label}: {selection.verdict()}")
        found = [init.selection / name for name in (WINNER, PER_TASK)]
        folder = next(one for one in found if one.is_dir())
        return read_object(init.selection / TABLE) | {"folder": str(folder)}

    def report(self) -> None:
        """One page of everything, made anew each time."""
        self.steps.needs("report.html", {}, False)
        write_report([self.out], self.out / "report.html")

    def push(self, folder: Path) -> None:
        """The chosen merge, on the Hub."""
        fields = PushFields(**(self.recipe.push or {}))
        made_from = {"repo": fields.repo, "public": fields.public, "merge": _hash(folder)}
        if self.steps.needs("push", made_from, self.steps.made.get("push") == made_from):
            address = push_to_hub(folder, fields.repo, private=not fields.public)
            self.steps.done("push", made_from)
            self.say(f"pushed {folder} to {address}")

    def _hashes(self, init: _Init) -> dict[str, Any]:
        return {
            "adapters": {name: _hash(folder) for name, folder in init.adapters.items()},
            "features": {name: _hash(path) for name, path in self.features.items()},
        }


def _statistics(recipe: Recipe) -> list[str]:
    """The kinds of statistics that the candidates need; of the default candidates RegMean's."""
    if not recipe.statistics_rows:
        return []
    needs = {METHODS[one.fields["method"]].needs for one in _candidates(recipe.select.get("candidates"))}
    return sorted(kind for kind in needs if kind is not None)


def _candidates(given: Any) -> list[Candidate]:
    """The candidates of a recipe's `select`."""
    return read_candidates(given) if isinstance(given, str) else expand(DEFAULT if given is None else given)


def _hash(path: Path) -> str:
    """Of the tensors in a file; of a folder its weights, its heads, and the config that scales them."""
    if not path.is_dir():
        return data_sha256(path)[:16]
    config = path / "adapter_config.json"
    fields = read_object(config) if config.is_file() else {}
    fields.pop("base_model_name_or_path", None)  # a path of this machine
    content = [data_sha256(file) for file in sorted(path.rglob("*.safetensors"))]
    return hashlib.sha256(json.dumps([content, fields], sort_keys=True).encode()).hexdigest()[:16]


def _folder_of(label: str) -> str:
    """The folder's name of an init: `"OSRM, the paper's"` → `"OSRM_the_paper_s"`."""
    return re.sub(r"\W+", "_", label).strip("_")


def _top(selection: dict[str, Any]) -> dict[str, Any]:
    return (selection["ranked"] or selection["apart"])[0]


def _compared(selections: dict[str, dict[str, Any]]) -> str:
    """One sentence on the best merge of each init."""
    best = sorted(selections.items(), key=lambda one: -_top(one[1])["value"]["value"])
    parts = [f"{label}: {_top(one)['name']} {100 * _top(one)['mean']['value']:.1f}" for label, one in best]
    return f"the best merge of each init, mean over tasks: {'; '.join(parts)}"
