"""The demo: plain-LoRA and OSRM adapters of the packaged tasks, merged by every method, in one table. Resumable."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from torch import nn
from tqdm.auto import tqdm

from osrm_peft.adapters.load import load_adapter
from osrm_peft.demo.results import Scores, read_scores, report
from osrm_peft.evaluation.evaluate import evaluate_task
from osrm_peft.evaluation.interference import Interference, interference
from osrm_peft.evaluation.page import write_report
from osrm_peft.evaluation.plots import plot_interference, plot_scales
from osrm_peft.evaluation.tables import MultiTaskTable
from osrm_peft.io.json import read_object, write_json
from osrm_peft.io.manifest import versions
from osrm_peft.io.places import check_file, check_folder, new_file
from osrm_peft.merging.merge import merge as run_merge
from osrm_peft.merging.methods.registry import METHODS
from osrm_peft.merging.request import MergeRequest
from osrm_peft.models.loading import load_base, load_tokenizer
from osrm_peft.training.recipe import STATISTIC_KINDS, Recipe

RECIPE = Recipe(
    model="packaged",
    suite="packaged",
    lora={"target_modules": ["query", "value"]},
    training={
        "learning_rate": 2e-3,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 16,
        "train_sampling_strategy": "group_by_length",
        "disable_tqdm": True,
    },
    max_length=48,
    train_rows=384,
    validation_rows=120,
)
OSRM = {"statistic": "token", "null_space": "random", "protect_energy": None}  # the paper's choice, on tokens


class Merge(NamedTuple):
    """One merge of the demo.

    Attributes:
        method: of `merge_adapters`.
        scales: λ, a row of the table each.
        arguments: the other fields of a merge recipe; features and statistics are filled in.
    """

    method: str
    scales: tuple[float, ...] = (1.0,)
    arguments: Mapping[str, Any] = {}

    def default_scale(self) -> float:
        """The method's λ in its paper; 1 where features choose."""
        return 1.0 if self.guided() else METHODS[self.method].scale

    def guided(self) -> bool:
        """Whether features choose its weights or its scale."""
        return "features" in self.arguments.values()

    def request(self, adapters: Mapping[str, Path], **files: Mapping[str, Path]) -> MergeRequest:
        """The request that merges these adapters, with `features` and `statistics` files where it needs them."""
        options = {name: value for name, value in self.arguments.items() if name in METHODS[self.method].options}
        fields = {name: value for name, value in self.arguments.items() if name not in options}
        return MergeRequest.from_fields(adapters=adapters, method=self.method, options=options, **fields, **files)


MERGES: dict[str, Merge] = {
    "average": Merge("average"),
    "task_arithmetic": Merge("task_arithmetic", (0.3, 0.6)),
    "TA features": Merge("task_arithmetic", (1.0,), {"weights": "features"}),
    "ties": Merge("ties", (0.6, 1.0)),
    "knots ties": Merge("ties", (1.0,), {"space": "knots"}),
    "dare": Merge("dare", (0.3,)),
    "dare_ties": Merge("dare_ties"),
    "fisher": Merge("fisher"),
    "regmean": Merge("regmean"),
    "emr": Merge("emr"),
    "tsv": Merge("tsv"),
    "iso": Merge("iso"),
    "lore": Merge("lore", (0.3, 1.0)),
    "lore features": Merge("lore", (1.0,), {"scale": "features"}),
}
STATISTICS_ROWS = 100  # training rows a task for Fisher and RegMean


def run_demo(
    out: str | Path,
    *,
    seeds: Sequence[int] = (42,),
    recipe: Recipe = RECIPE,
    osrm: dict[str, Any] = OSRM,
    console: Console | None = None,
) -> MultiTaskTable:
    """Train, merge and evaluate; write reports, `scores.json` and plots into `out` and print the table.

    Every adapter, merge and row of scores is written as soon as it is made, and made once: an interrupted run goes on
    where it stopped.

    Args:
        out: results folder.
        seeds: one set of adapters each; more than one shows mean ± sample standard deviation.
        recipe: model, suite and training; its `seed` and `features` are replaced.
        osrm: OSRMLoraConfig fields of the OSRM adapters.

    Raises:
        FileExistsError: `out` is no demo's folder, or was made with another recipe.
    """
    out, console = Path(out), console or Console()
    replace(recipe, osrm=osrm).lora_config(recipe.task_names()[0])  # an unknown option stops here
    _claim(out, recipe, osrm)
    tasks, merges = len(recipe.task_names()), sum(len(merge.scales) for merge in MERGES.values())
    with tqdm(total=len(seeds) * (tasks + 2 * (3 * tasks + 1 + merges)), desc="demo", unit="step") as bar:
        measured = [
            _SeedRun(out, replace(recipe, seed=seed, features=str(out / f"seed{seed}/features")), osrm, bar).run()
            for seed in seeds
        ]
    scores = [score for seed in seeds for score in read_scores(out / f"seed{seed}/scores.json")]
    order = ["individual", *MERGES]
    scores.sort(key=lambda score: (score.init != "plain LoRA", order.index(score.method), seeds.index(score.seed)))
    table = MultiTaskTable.of(scores)
    default = replace(table, rows=[row for row in table.rows if _is_default(row)])
    plot_scales(table, out / "scales.png")
    plot_interference(measured[0], out / "interference.png")
    shares = {
        f"seed{seed}": {init: one.to_dict() for init, one in by.items()}
        for seed, by in zip(seeds, measured, strict=True)
    }
    write_json(out / "interference.json", _provenance(recipe, osrm) | {"interference": shares})
    write_json(out / "scores.json", _provenance(recipe, osrm) | {"scores": [asdict(score) for score in scores]})
    with new_file(out / "report.md") as path:
        path.write_text(report(table, default, measured, _settings(recipe, osrm), seeds), encoding="utf-8")
    write_report([out], out / "report.html")
    spread = "one seed" if len(seeds) == 1 else f"mean ± sample standard deviation over {len(seeds)} seeds"
    console.print(default.terminal(f"Scores in percent on the packaged suite, each merge at its paper's λ ({spread})"))
    console.print(f"All scales, the plots and the adapters: {out}/report.md and {out}/report.html", soft_wrap=True)
    return table


class _SeedRun:
    """One seed of the demo: each step makes what is missing in the seed's folder.

    Attributes:
        folder: the seed's results.
        recipe: of the plain adapters, with this seed.
        with_osrm: the same, of the OSRM adapters.
        features: {task: features file}.
        tasks: {task: its rows}.
        scores: the seed's table, as far as it is finished.
    """

    def __init__(self, out: Path, recipe: Recipe, osrm: dict[str, Any], bar: tqdm) -> None:
        self.folder, self.recipe, self.with_osrm = out / f"seed{recipe.seed}", recipe, replace(recipe, osrm=osrm)
        self.features = {name: recipe.features_file(name) for name in recipe.task_names()}
        self.bar = bar

    def run(self) -> dict[str, Interference]:
        """All steps, for both kinds of adapters; the interference of each kind."""
        self._collect_features()
        self.tasks = {name: self.recipe.task(name) for name in self.features}
        self.tokenizer = load_tokenizer(self.recipe.model)
        self.scores, measured = Scores(self.folder / "scores.json"), {}
        for init, recipe in (("plain LoRA", self.recipe), ("OSRM", self.with_osrm)):
            adapters = self._train(init, recipe)
            statistics = self._collect_statistics(init, adapters)
            measured[init] = interference(adapters, self.features, base=load_base(recipe.model, 2))
            self._evaluate_alone(init, adapters)
            for label in MERGES:
                self._merge(init, label, adapters, statistics)
        return measured

    def _collect_features(self) -> None:
        for name, file in self.features.items():
            if not file.exists():
                self.bar.set_postfix_str(f"features of {name}")
                self.with_osrm.collect(name, progress=False).save(file)
            self.bar.update()

    def _train(self, init: str, recipe: Recipe) -> dict[str, Path]:
        """{task: adapter}."""
        adapters = {name: self.folder / "adapters" / _short(init) / name for name in self.features}
        for name, adapter in adapters.items():
            if not adapter.exists():
                self.bar.set_postfix_str(f"train {init} on {name}")
                recipe.train(name, adapter)
            self.bar.update()
        return adapters

    def _collect_statistics(self, init: str, adapters: Mapping[str, Path]) -> dict[str, dict[str, Path]]:
        """{kind: {task: statistics file}}."""
        folder = self.folder / "statistics" / _short(init)
        files = {kind: {name: folder / f"{name}.{kind}.safetensors" for name in adapters} for kind in STATISTIC_KINDS}
        for kind, paths in files.items():
            for name, path in paths.items():
                if not path.exists():
                    self.bar.set_postfix_str(f"{kind} of {init} on {name}")
                    self.recipe.collect_statistics(
                        kind, name, adapters[name], num_samples=STATISTICS_ROWS, progress=False
                    ).save(path)
                self.bar.update()
        return files

    def _evaluate_alone(self, init: str, adapters: Mapping[str, Path]) -> None:
        if not self.scores.has(init, "individual", None):
            self.bar.set_postfix_str(f"evaluate {init} alone")
            self._score(init, "individual", None, lambda name: load_adapter(adapters[name]).attach(self.recipe.model))
        self.bar.update()

    def _merge(self, init: str, label: str, adapters: Mapping[str, Path], statistics: dict[str, Any]) -> None:
        """Merge the adapters, save the merge, and score it at each λ."""
        merge = MERGES[label]
        missing = [scale for scale in merge.scales if not self.scores.has(init, label, scale)]
        self.bar.update(len(merge.scales) - len(missing))
        if not missing:
            return
        saved, needs = self.folder / "merged" / _short(init) / label.replace(" ", "_"), METHODS[merge.method].needs
        files = {} if needs is None else {"statistics": statistics[needs]}
        merged = run_merge(merge.request(adapters, **files, **({"features": self.features} if merge.guided() else {})))
        if not saved.exists():
            merged.save_pretrained(saved)
        for scale in missing:
            self.bar.set_postfix_str(f"evaluate {init}, {label}, λ = {scale:g}")
            scaled = merged.at_scale(scale)
            self._score(init, label, scale, lambda name, scaled=scaled: scaled.load(self.recipe.model, name))  # type: ignore[misc]
            self.bar.update()

    def _score(self, init: str, label: str, scale: float | None, model_of: Callable[[str], nn.Module]) -> None:
        """Evaluate each task's model and add a row of the table."""
        options: dict[str, Any] = {"max_length": self.recipe.max_length, "progress": False}
        values = {
            name: evaluate_task(model_of(name), task, self.tokenizer, **options) for name, task in self.tasks.items()
        }
        self.scores.add(init, label, scale, self.recipe.seed, values)


def _short(init: str) -> str:
    """The name of an initialisation's folders."""
    return init.split()[0]


def _claim(out: Path, recipe: Recipe, osrm: dict[str, Any]) -> None:
    """Make `out` a demo's folder, or check that it is one, with these settings."""
    check_folder(out)
    settings = out / "settings.json"
    for name in (settings.name, "scales.png", "interference.png", "interference.json", "scores.json", "report.md"):
        check_file(out / name)
    check_file(out / "report.html")
    content = json.loads(json.dumps(_settings(recipe, osrm)))
    if settings.is_file():
        if read_object(settings) != content:
            raise FileExistsError(f"{out} was made with other settings ({settings}): name another folder or remove it")
    elif out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} exists and is not a demo's results (no settings.json): name another folder")
    else:
        write_json(settings, content)


def _settings(recipe: Recipe, osrm: dict[str, Any]) -> dict[str, Any]:
    made = {key: value for key, value in asdict(recipe).items() if key not in ("seed", "features", "osrm")}
    return {
        "recipe": made,
        "osrm": osrm,
        "statistics_rows": STATISTICS_ROWS,
        "merges": {label: list(merge) for label, merge in MERGES.items()},
    }


def _provenance(recipe: Recipe, osrm: dict[str, Any]) -> dict[str, Any]:
    return {"command": "osrm-peft demo", "settings": _settings(recipe, osrm), "versions": versions()}


def _is_default(row: dict[str, Any]) -> bool:
    return row["method"] == "individual" or row["scale"] == MERGES[row["method"]].default_scale()
