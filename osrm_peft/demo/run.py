"""The demo: on the packaged model and tasks, plain-LoRA and OSRM adapters, every merge, one table. Resumable."""

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
        scales: λ; the first row of the table is the method's default.
        arguments: the others, as a merge recipe has them; features and statistics are filled in.
    """

    method: str
    scales: tuple[float, ...] = (1.0,)
    arguments: Mapping[str, Any] = {}

    def default_scale(self) -> float:
        """The λ that the method has where none is given."""
        return 1.0 if self.guided() else METHODS[self.method].scale

    def guided(self) -> bool:
        """Whether features choose its weights or its scale."""
        return "features" in self.arguments.values()

    def request(self, adapters: Mapping[str, Path], **files: Mapping[str, Path]) -> MergeRequest:
        """Of these adapters, with their `features` and `statistics`, where it needs them."""
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

    Every adapter, merge and row of scores is written as it is made and not made again, so an interrupted run goes on
    where it stopped.

    Args:
        out: results folder.
        seeds: one set of adapters each; more than one shows mean ± sample standard deviation.
        recipe: model, suite and training; its `seed` and `features` are replaced.
        osrm: OSRMLoraConfig fields of the OSRM adapters.

    Raises:
        FileExistsError: `out` is not ours, or was made with another recipe.
    """
    out, console = Path(out), console or Console()
    replace(recipe, osrm=osrm).lora_config(recipe.task_names()[0])  # an unknown option stops here
    _claim(out, recipe, osrm)
    tasks, merges = len(recipe.task_names()), sum(len(merge.scales) for merge in MERGES.values())
    with tqdm(total=len(seeds) * (tasks + 2 * (3 * tasks + 1 + merges)), desc="demo", unit="step") as bar:
        measured = [
            _run_seed(out, replace(recipe, seed=seed, features=str(out / f"seed{seed}/features")), osrm, bar)
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


def _run_seed(out: Path, recipe: Recipe, osrm: dict[str, Any], bar: tqdm) -> dict[str, Interference]:
    """Everything of one seed; returns the interference of each kind of adapter."""
    folder = out / f"seed{recipe.seed}"
    names = recipe.task_names()
    with_osrm = replace(recipe, osrm=osrm)
    for name in names:
        if not with_osrm.features_file(name).exists():
            bar.set_postfix_str(f"features of {name}")
            with_osrm.collect(name, progress=False).save(with_osrm.features_file(name))
        bar.update()
    features = {name: recipe.features_file(name) for name in names}

    tasks, tokenizer = {name: recipe.task(name) for name in names}, load_tokenizer(recipe.model)

    def evaluate(model_of: Callable[[str], nn.Module]) -> dict[str, float]:
        options: dict[str, Any] = {"max_length": recipe.max_length, "progress": False}
        return {name: evaluate_task(model_of(name), tasks[name], tokenizer, **options) for name in names}

    scores, measured = Scores(folder / "scores.json"), {}
    for init, one in (("plain LoRA", recipe), ("OSRM", with_osrm)):
        short = init.split()[0]
        adapters = {name: folder / "adapters" / short / name for name in names}
        for name, adapter in adapters.items():
            if not adapter.exists():
                bar.set_postfix_str(f"train {init} on {name}")
                one.train(name, adapter)
            bar.update()
        files = {
            kind: {n: folder / "statistics" / short / f"{n}.{kind}.safetensors" for n in names}
            for kind in STATISTIC_KINDS
        }
        for kind, paths in files.items():
            for name, path in paths.items():
                if not path.exists():
                    bar.set_postfix_str(f"{kind} of {init} on {name}")
                    recipe.collect_statistics(
                        kind, name, adapters[name], num_samples=STATISTICS_ROWS, progress=False
                    ).save(path)
                bar.update()
        measured[init] = interference(adapters, features, base=load_base(recipe.model, 2))
        if not scores.has(init, "individual", None):
            bar.set_postfix_str(f"evaluate {init} alone")
            found = evaluate(lambda name, adapters=adapters: load_adapter(adapters[name]).attach(recipe.model))  # type: ignore[misc]
            scores.add(init, "individual", None, recipe.seed, found)
        bar.update()
        for label, merge in MERGES.items():
            missing = [scale for scale in merge.scales if not scores.has(init, label, scale)]
            bar.update(len(merge.scales) - len(missing))
            if not missing:
                continue
            saved, needs = folder / "merged" / short / label.replace(" ", "_"), METHODS[merge.method].needs
            given = {} if needs is None else {"statistics": files[needs]}
            merged = run_merge(merge.request(adapters, **given, **({"features": features} if merge.guided() else {})))
            if not saved.exists():
                merged.save_pretrained(saved)
            for scale in missing:
                bar.set_postfix_str(f"evaluate {init}, {label}, λ = {scale:g}")
                scaled = merged.at_scale(scale)
                found = evaluate(lambda name, scaled=scaled: scaled.load(recipe.model, name))  # type: ignore[misc]
                scores.add(init, label, scale, recipe.seed, found)
                bar.update()
    return measured


def _claim(out: Path, recipe: Recipe, osrm: dict[str, Any]) -> None:
    """Make `out` ours, or make sure that it is, and of this recipe."""
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
