"""The demo: on the packaged model and tasks, plain-LoRA and OSRM adapters, four merges, one table. Resumable."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from tqdm.auto import tqdm

from osrm_peft.adapter_reader import load_adapter
from osrm_peft.adapters import LoraAdapter
from osrm_peft.evaluation import evaluate_task
from osrm_peft.files import new_file, versions, write_json
from osrm_peft.merging import merge_adapters
from osrm_peft.merging.registry import METHODS
from osrm_peft.recipe import Recipe
from osrm_peft.report import MultiTaskTable, Score, plot_scales
from osrm_peft.training import load_tokenizer

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
OSRM = {"statistic": "token"}  # the rest are OSRMLoraConfig's defaults
SCALES: dict[str, tuple[float, ...]] = {
    "average": (1.0,),
    "task_arithmetic": (0.3, 0.6, 1.0),
    "ties": (0.3, 0.6, 1.0),
    "lore": (0.3, 0.6, 1.0),
}


def run_demo(
    out: str | Path,
    *,
    seeds: Sequence[int] = (42,),
    recipe: Recipe = RECIPE,
    osrm: dict[str, Any] = OSRM,
    console: Console | None = None,
) -> MultiTaskTable:
    """Train, merge and evaluate; write `report.md`, `scores.json` and `scales.png` into `out` and print the table.

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
    steps = len(seeds) * len(recipe.task_names()) * 3 + len(seeds) * 2 * (1 + sum(map(len, SCALES.values())))
    with tqdm(total=steps, desc="demo", unit="step", dynamic_ncols=True) as bar:
        for seed in seeds:
            _run_seed(out, replace(recipe, seed=seed, features=str(out / f"seed{seed}/features")), osrm, bar)
    scores = [score for seed in seeds for score in _read_scores(out / f"seed{seed}/scores.json")]
    scores.sort(key=lambda score: (score.init != "plain LoRA", seeds.index(score.seed)))
    table = MultiTaskTable.of(scores)
    default = replace(table, rows=[row for row in table.rows if _is_default(row)])
    plot_scales(table, out / "scales.png")
    write_json(out / "scores.json", _provenance(recipe, osrm) | {"scores": [asdict(score) for score in scores]})
    with new_file(out / "report.md") as path:
        path.write_text(_report(table, default, recipe, osrm, seeds), encoding="utf-8")
    spread = "one seed" if len(seeds) == 1 else f"mean ± sample standard deviation over {len(seeds)} seeds"
    console.print(default.terminal(f"Scores in percent on the packaged suite, each merge at its paper's λ ({spread})"))
    console.print(f"All scales, the plot and the adapters: {out}/report.md", soft_wrap=True)
    return table


def _run_seed(out: Path, recipe: Recipe, osrm: dict[str, Any], bar: tqdm) -> None:
    folder = out / f"seed{recipe.seed}"
    names = recipe.task_names()
    with_osrm = replace(recipe, osrm=osrm)
    for name in names:
        if not with_osrm.features_file(name).exists():
            bar.set_postfix_str(f"features of {name}")
            with_osrm.collect(name, progress=False).save(with_osrm.features_file(name))
        bar.update()

    tasks, tokenizer = {name: recipe.task(name) for name in names}, load_tokenizer(recipe.model)

    def evaluate(adapters: dict[str, LoraAdapter]) -> dict[str, float]:
        scores = {}
        for name, adapter in adapters.items():
            model = adapter.attach(recipe.model).merge_and_unload()  # the same logits, without the adapter's cost
            scores[name] = evaluate_task(model, tasks[name], tokenizer, max_length=recipe.max_length, progress=False)
        return scores

    scores = Scores(folder / "scores.json")
    for init, one in (("plain LoRA", recipe), ("OSRM", with_osrm)):
        adapters = {name: folder / "adapters" / init.split()[0] / name for name in names}
        for name, adapter in adapters.items():
            if not adapter.exists():
                bar.set_postfix_str(f"train {init} on {name}")
                one.train(name, adapter)
            bar.update()
        if not scores.has(init, "individual", None):
            bar.set_postfix_str(f"evaluate {init} alone")
            alone = {name: load_adapter(adapter) for name, adapter in adapters.items()}
            scores.add(init, "individual", None, recipe.seed, evaluate(alone))
        bar.update()
        for method, scales in SCALES.items():
            missing = [scale for scale in scales if not scores.has(init, method, scale)]
            bar.update(len(scales) - len(missing))
            if not missing:
                continue
            merged, saved = merge_adapters(adapters, method), folder / "merged" / init.split()[0] / method
            if not saved.exists():
                merged.save_pretrained(saved)
            for scale in missing:
                bar.set_postfix_str(f"evaluate {init}, {method}, λ = {scale:g}")
                scaled = {name: merged.at_scale(scale).for_task(name) for name in names}
                scores.add(init, method, scale, recipe.seed, evaluate(scaled))
                bar.update()


class Scores:
    """The rows of scores of one seed, in a file that is complete after every row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.scores = _read_scores(path)

    def has(self, init: str, method: str, scale: float | None) -> bool:
        """Whether this row is there."""
        return any((score.init, score.method, score.scale) == (init, method, scale) for score in self.scores)

    def add(self, init: str, method: str, scale: float | None, seed: int, found: dict[str, float]) -> None:
        """Append a row, {task: score}, and write."""
        self.scores += [Score(init, method, scale, seed, task, value) for task, value in found.items()]
        write_json(self.path, [asdict(score) for score in self.scores])


def _read_scores(path: Path) -> list[Score]:
    return [Score(**row) for row in json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else []


def _claim(out: Path, recipe: Recipe, osrm: dict[str, Any]) -> None:
    """Make `out` ours, or make sure that it is, and of this recipe."""
    settings = out / "settings.json"
    content = json.loads(json.dumps(_settings(recipe, osrm)))
    if settings.is_file():
        if json.loads(settings.read_text(encoding="utf-8")) != content:
            raise FileExistsError(f"{out} was made with other settings ({settings}): name another folder or remove it")
    elif out.exists() and (out.is_file() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not a demo's results (no settings.json): name another folder")
    else:
        write_json(settings, content)


def _settings(recipe: Recipe, osrm: dict[str, Any]) -> dict[str, Any]:
    made = {key: value for key, value in asdict(recipe).items() if key not in ("seed", "features", "osrm")}
    return {"recipe": made, "osrm": osrm, "scales": SCALES}


def _provenance(recipe: Recipe, osrm: dict[str, Any]) -> dict[str, Any]:
    return {"command": "osrm-peft demo", "settings": _settings(recipe, osrm), "versions": versions()}


def _is_default(row: dict[str, Any]) -> bool:
    return row["method"] == "individual" or row["scale"] == METHODS[row["method"]].scale


def _report(
    table: MultiTaskTable, default: MultiTaskTable, recipe: Recipe, osrm: dict[str, Any], seeds: Sequence[int]
) -> str:
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    settings = json.dumps(_settings(recipe, osrm), ensure_ascii=False)
    listed = ", ".join(map(str, seeds))
    return f"""# Demo: plain-LoRA and OSRM adapters, merged

Scores in percent on {recipe.validation_rows or "all"} validation rows a task; seed {listed}{
        "" if len(seeds) > 1 else " (one seed: differences of a few points are noise)"
    }. Metrics: accuracy (questions, movie_reviews),
Matthews correlation (sms_spam), mean of Pearson and Spearman correlation (tweets, product_reviews, editorials).

## Each merge at its paper's scale

{default.markdown()}

## Every scale

{table.markdown()}

![average score against the scale](scales.png)

## How it was made

`osrm-peft demo --seeds {len(seeds)}` on {platform.system()} {platform.machine()}, {made}

```json
{settings}
```
"""
