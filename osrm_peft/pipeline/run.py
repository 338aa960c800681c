"""run_recipe: features, adapters, statistics, interference, the choice of a merge, the report; and a push."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from osrm_peft.checks import LARGEST, integer
from osrm_peft.evaluation.interference import interference
from osrm_peft.evaluation.page import write_report
from osrm_peft.evaluation.plots import plot_interference
from osrm_peft.hub.push import push_to_hub
from osrm_peft.io.json import read_object, write_json
from osrm_peft.io.manifest import MANIFEST, read_manifest, versions
from osrm_peft.io.places import check_file, check_folder
from osrm_peft.io.tensors import data_sha256
from osrm_peft.io.yaml import check_fields
from osrm_peft.models.loading import load_base
from osrm_peft.pipeline.steps import Steps
from osrm_peft.selection.candidates import expand, read_candidates
from osrm_peft.selection.folder import TABLE, WINNER
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
    if isinstance(fields.candidates, str):
        read_candidates(fields.candidates)
    elif fields.candidates is not None:
        expand(fields.candidates)
    if recipe.push is not None:
        check_fields("push in the recipe", recipe.push, PushFields)
        if not recipe.push.get("repo"):
            raise ValueError("push in the recipe needs repo: user/name")


def run_recipe(recipe: Recipe, *, say: Callable[[str], None] = print, progress: bool = True) -> dict[str, Any]:
    """Do all that a recipe asks for, into its `out`: each step once, and again when its recipe or inputs have changed.

    `features/`, `adapters/`, `statistics/`, `interference/`, `selection/` and `report.html`; then, with `push`, the
    chosen merge goes to the Hub. An interrupted run goes on where it stopped.

    Args:
        recipe: see `Recipe`.
        say: prints a line for each step.
        progress: show bars.

    Returns:
        The content of `selection.json`; its `verdict` is the answer.

    Raises:
        ValueError: a mistake in the recipe or the data, before any work.
        FileExistsError: `out` holds a result that no run has made.
    """
    run = _Run(recipe, say, progress)
    run.collect_features()
    run.train()
    run.collect_statistics()
    run.measure_interference()
    selection = run.select()
    run.report()
    if recipe.push is not None:
        run.push()
    return selection


class _Run:
    def __init__(self, recipe: Recipe, say: Callable[[str], None], progress: bool) -> None:
        check_steps(recipe)
        self.recipe, self.say, self.progress, self.out = recipe, say, progress, check_folder(recipe.out)
        self.names = recipe.task_names()
        if len(self.names) < 2:
            raise ValueError(f"the recipe has one task, {self.names[0]!r}: a merge needs at least two")
        self.tasks = {name: recipe.task(name) for name in self.names}
        for name in self.names:
            recipe.lora_config(name)
            check_file(recipe.features_file(name))
        check_file(self.out / "report.html")
        grams = len(self.names) if recipe.statistics_rows else 0
        self.steps = Steps(self.out, say, 2 * len(self.names) + grams + 3 + (recipe.push is not None))
        self.adapters = {name: self.out / "adapters" / name for name in self.names}
        self.features = {name: recipe.features_file(name) for name in self.names}
        self.grams = {name: self.out / "statistics" / f"{name}.gram.safetensors" for name in self.names if grams}

    def collect_features(self) -> None:
        """One features file a task, on the pre-trained model, which is loaded once."""
        base, recipe = None, self.recipe
        for name, path in self.features.items():
            config = recipe.lora_config(name)
            made_from = {
                "model": recipe.model,
                "rows": fingerprint(self.tasks[name].train),
                "num_samples": recipe.num_samples,
                "max_length": recipe.max_length,
                "seed": recipe.seed,
                "statistic": getattr(config, "statistic", None),
                "reference": getattr(config, "reference", False),
                "target_modules": sorted(targets) if isinstance(targets := config.target_modules, set) else targets,
            }
            if self.steps.needs(f"features/{name}", made_from, path.exists()):
                base = recipe.base() if base is None else base
                recipe.collect(name, base=base, progress=self.progress).save(path)
                self.steps.done(f"features/{name}", made_from)

    def train(self) -> None:
        """One adapter a task."""
        for name, folder in self.adapters.items():
            made_from = self.recipe.made_from(name)
            known = read_manifest(folder).get("made_from")
            if known is not None:  # also of an adapter that `osrm-peft train` made
                self.steps.made[f"adapters/{name}"] = known
            if self.steps.needs(f"adapters/{name}", made_from, (folder / MANIFEST).is_file()):
                self.recipe.train(name, folder, overwrite=True, progress=self.progress)
                self.steps.done(f"adapters/{name}", made_from)

    def collect_statistics(self) -> None:
        """One file a task for RegMean, on the fine-tuned model."""
        for name, path in self.grams.items():
            made_from = {"adapter": self._adapter_hash(name), "rows": self.recipe.statistics_rows}
            if self.steps.needs(f"statistics/{name}", made_from, path.exists()):
                self.recipe.collect_statistics(
                    "gram", name, self.adapters[name], num_samples=self.recipe.statistics_rows, progress=self.progress
                ).save(path)
                self.steps.done(f"statistics/{name}", made_from)

    def measure_interference(self) -> None:
        """How strongly each adapter acts on the other tasks' features."""
        folder, made_from = self.out / "interference", self._hashes()
        if self.steps.needs("interference", made_from, (folder / "interference.json").is_file()):
            base = load_base(self.recipe.model, 2)
            found = interference(self.adapters, self.features, base=base, progress=self.progress)
            write_json(folder / "interference.json", found.to_dict() | {"versions": versions()})
            plot_interference({"adapters": found}, folder / "interference.png")
            self.steps.done("interference", made_from)

    def select(self) -> dict[str, Any]:
        """The merge to ship; the content of its `selection.json`."""
        folder, fields = self.out / "selection", self.recipe.select
        rows = {name: [fingerprint(part) for part in (t.validation, t.test) if part] for name, t in self.tasks.items()}
        made_from = self._hashes() | {"select": fields, "rows": rows, "max_length": self.recipe.max_length}
        if self.steps.needs("selection", made_from, (folder / TABLE).is_file()):
            arguments: Any = dict(fields)
            selection = select_merge(
                self.adapters, arguments.pop("candidates", None), tasks=self.tasks, base_model=self.recipe.model,
                features=self.features, gram=self.grams or None, max_length=self.recipe.max_length,
                seed=self.recipe.seed, out=folder, overwrite=True, progress=self.progress, **arguments,
            )  # fmt: skip
            self.steps.done("selection", made_from)
            self.say(selection.verdict())
        return read_object(folder / TABLE)

    def report(self) -> None:
        """One page of everything, made anew each time."""
        self.steps.needs("report.html", {}, False)
        write_report([self.out], self.out / "report.html")

    def push(self) -> None:
        """The chosen merge, on the Hub."""
        fields = PushFields(**(self.recipe.push or {}))
        folder = self.out / "selection" / WINNER
        made_from = {
            "repo": fields.repo,
            "public": fields.public,
            "merge": data_sha256(next(folder.glob("*.safetensors"))),
        }
        if self.steps.needs("push", made_from, self.steps.made.get("push") == made_from):
            address = push_to_hub(folder, fields.repo, private=not fields.public)
            self.steps.done("push", made_from)
            self.say(f"pushed {folder} to {address}")

    def _hashes(self) -> dict[str, Any]:
        features = {name: data_sha256(path)[:16] for name, path in self.features.items()}
        grams = {name: data_sha256(path)[:16] for name, path in self.grams.items()}
        adapters = {name: self._adapter_hash(name) for name in self.adapters}
        return {"adapters": adapters, "features": features, "statistics": grams}

    def _adapter_hash(self, name: str) -> str:
        return data_sha256(self.adapters[name] / "adapter_model.safetensors")[:16]
