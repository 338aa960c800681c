"""Which A to train from: plain LoRA, the released OSRM code, the paper's statistics and our choices, side by side.

    python benchmarks/osrm_study.py                        # everything, hours on 2 cores; resumable
    python benchmarks/osrm_study.py --inits token ratio    # some of it, into the same folder
    python benchmarks/osrm_study.py --table                # the tables of what is there

Packaged MiniLM and its six tasks. For each init the learning rate is tuned over the same grid, on rows of three tasks'
training splits that were not trained on, by one seed that is not among those reported, for the mean of the scores alone
and merged; then each seed trains six adapters, and they are scored alone and merged. Fair play: A with orthonormal rows
is longer than PEFT's (√3 times), so plain LoRA also runs with its A scaled.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import TrainerCallback

from osrm_peft import TaskFeatures, evaluate_task, load_adapter, merge_adapters, project_adapter
from osrm_peft.demo.run import demo_recipe
from osrm_peft.evaluation.tables import markdown_table
from osrm_peft.io.json import write_json
from osrm_peft.io.manifest import versions
from osrm_peft.io.places import new_file
from osrm_peft.models.layers import lora_layers
from osrm_peft.models.loading import load_tokenizer
from osrm_peft.osrm.spectrum import PooledMoment
from osrm_peft.osrm.subspace import procrustes_drift
from osrm_peft.tasks.suites import load_task
from osrm_peft.tasks.task import Task
from osrm_peft.training.recipe import Recipe
from osrm_peft.training.train import train_task

PAPER: dict[str, Any] = {"statistic": "token", "null_space": "random", "protect_energy": None}
INITS: dict[str, dict[str, Any] | None] = {  # OSRMLoraConfig fields; None: PEFT's own A
    "plain": None,
    "plain_scaled": None,  # A × √3: as long as one with orthonormal rows
    "random": PAPER | {"protect_rank": 0},  # orthonormal, blind to every task
    "released": PAPER | {"statistic": "mean", "reference": True},
    "mean": PAPER | {"statistic": "mean"},
    "sample": PAPER | {"statistic": "sample"},
    "token": PAPER,
    "token_p90": PAPER | {"protect_energy": 0.9},
    "token_p90_own": PAPER | {"protect_energy": 0.9, "null_space": "in_task"},  # OSRMLoraConfig's defaults
    "own": PAPER | {"protect_rank": 0, "null_space": "in_task"},  # the task's own principal directions
    "difference": PAPER | {"objective": "difference"},
    "ratio": PAPER | {"objective": "ratio"},
    "token_frozen": PAPER | {"freeze_a": True},
    "token_p90_own_frozen": PAPER | {"protect_energy": 0.9, "null_space": "in_task", "freeze_a": True},
}
POST_HOC: dict[str, dict[str, Any]] = {  # the plain adapters, projected when they are trained (project_adapter)
    "plain_projected": {},
    "plain_keep90": {"min_effect_kept": 0.9},
    "plain_keep99": {"min_effect_kept": 0.99},
}
SEEDS, TUNING_SEED, RATES = (42, 43, 44), 41, (2e-3, 4e-3, 8e-3)
TUNING_TASKS = ("questions", "movie_reviews", "product_reviews")  # six classes, two classes, regression
HELD_OUT, GRAM_ROWS = 128, 100
DEMO = demo_recipe()
RECIPE = replace(
    DEMO,
    inits=None,
    validation_rows=120,
    # 96 steps a task. With the paper's warm-up of 6 % a rate of 4e-3 makes single adapters collapse.
    training=DEMO.training | {"per_device_train_batch_size": 8, "warmup_steps": 0.3},
    max_length=32,
    train_rows=256,
)
MERGES: dict[str, tuple[str, float]] = {  # column: (method, λ)
    "average": ("average", 1.0),
    "TA 0.3": ("task_arithmetic", 0.3),
    "TA 0.6": ("task_arithmetic", 0.6),
    "TIES": ("ties", 1.0),
    "RegMean": ("regmean", 1.0),
    "EMR": ("emr", 1.0),
    "LoRE 0.3": ("lore", 0.3),
}
KEPT = ["energy_kept", "out_of_task_kept", "in_task_kept", "protected"]
TABLES = [["rate", "alone", *MERGES, "merged"], ["drift", "before", "after"], KEPT]


class Watch(TrainerCallback):
    """Scales A where asked, and measures what training does to it: drift, and the others' energy before and after."""

    def __init__(self, scale: float, others: list[TaskFeatures]) -> None:
        self.scale, self.others, self.found = scale, others, {}

    def on_init_end(self, args, state, control, model=None, **kwargs) -> None:
        """After OSRMCallback has set A."""
        for layer in lora_layers(model, "default").values():
            layer.lora_A["default"].weight.data.mul_(self.scale)
        self.initial = self._current(model)
        self.found["before"] = self._energy(self.initial)

    def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
        """Drift of A, and the share of the others' energy that its row space lets through, means over layers."""
        A = self._current(model)
        self.found["drift"] = statistics.fmean(procrustes_drift(A[name], self.initial[name]) for name in A)
        self.found["after"] = self._energy(A)

    def _energy(self, A: dict[str, torch.Tensor]) -> float:
        shares = []
        for name, rows in A.items():
            pool = PooledMoment.of([features.layers[name] for features in self.others])
            shares.append(pool.share(torch.linalg.qr(rows.double().mT).Q.mT))
        return statistics.fmean(shares)

    def _current(self, model) -> dict[str, torch.Tensor]:
        return {name: x.lora_A["default"].weight.detach().clone() for name, x in lora_layers(model, "default").items()}


class Study:
    """The study in one folder: every adapter and every result is a file, and is not made again."""

    def __init__(self, out: Path, console: Console) -> None:
        self.out, self.console = out, console
        self.tokenizer = load_tokenizer(RECIPE.model)
        self.names = RECIPE.task_names()

    def run(self, init: str) -> None:
        """Tune, train, merge and score one init."""
        rate = self._tuned("plain" if init in POST_HOC else init)
        for seed in SEEDS:
            file = self.out / f"seed{seed}" / f"{init}.json"
            if not file.exists():
                recipe = self._recipe(init, seed)
                made = {name: self._adapter(recipe, init, name, rate, recipe.task(name)) for name in self.names}
                notes = {name: json.loads(made[name][1].read_text()) for name in self.names}
                scores = self._scores(recipe, {name: made[name][0] for name in self.names})
                write_json(file, {"init": init, "seed": seed, "rate": rate, "scores": scores, "notes": notes})
            self.console.print(f"{init}, seed {seed}: {file}")

    def _recipe(self, init: str, seed: int) -> Recipe:
        fields = INITS.get(init) or PAPER
        variant = "reference" if fields.get("reference") else str(fields["statistic"])
        recipe = replace(RECIPE, seed=seed, osrm=fields, features=str(self.out / f"seed{seed}/features/{variant}"))
        for name in self.names:
            if not recipe.features_file(name).exists():
                recipe.collect(name, progress=False).save(recipe.features_file(name))
        return recipe

    def _adapter(self, recipe: Recipe, init: str, name: str, rate: float, task: Task) -> tuple[Path, Path]:
        """One adapter and the notes of its training, or of its projection."""
        if init not in POST_HOC:
            return self._train(recipe, init, name, rate, task)
        folder = self.out / f"seed{recipe.seed}" / "adapters" / f"{init} {rate:g}"
        if not (folder / f"{name}.json").exists():
            source, _ = self._train(recipe, "plain", name, rate, task)
            files = {other: recipe.features_file(other) for other in self.names}
            own = files.pop(name)
            projection = project_adapter(source, list(files.values()), in_task=own, **POST_HOC[init])
            projection.save_pretrained(folder / name)
            write_json(folder / f"{name}.json", projection.mean())
        return folder / name, folder / f"{name}.json"

    def _train(self, recipe: Recipe, init: str, name: str, rate: float, task: Task) -> tuple[Path, Path]:
        """One adapter and the notes of its training."""
        folder = self.out / f"seed{recipe.seed}" / "adapters" / f"{init} {rate:g}"
        notes = folder / f"{name}.json"
        if not notes.exists():
            token = self._recipe("token", recipe.seed)
            others = [TaskFeatures.load(token.features_file(other)) for other in self.names if other != name]
            watch = Watch(3**0.5 if init == "plain_scaled" else 1.0, others)
            plain = INITS[init] is None
            lora = (replace(recipe, osrm=None) if plain else recipe).lora_config(name)
            training = RECIPE.training | {"learning_rate": rate}
            options: dict[str, Any] = {"max_length": RECIPE.max_length, "seed": recipe.seed, "overwrite": True}
            train_task(task, folder / name, lora=lora, training=training, callbacks=[watch], **options)
            write_json(notes, watch.found)
        return folder / name, notes

    def _tuned(self, init: str) -> float:
        """The learning rate with the best mean of the scores, alone and merged by TA 0.3, on rows not trained on."""
        file = self.out / "tuning" / f"{init}.json"
        if not file.exists():
            recipe, found = self._recipe(init, TUNING_SEED), {}
            tasks = {name: _held_out(name) for name in TUNING_TASKS}
            for rate in RATES:
                adapters = {name: self._train(recipe, init, name, rate, task)[0] for name, task in tasks.items()}
                merged = merge_adapters(adapters, "task_arithmetic", scale=0.3)  # type: ignore[arg-type]
                models = {
                    "alone": lambda n, a=adapters: _alone(a[n]),
                    "TA 0.3": lambda n, m=merged: m.load(RECIPE.model, n),
                }
                scores = {key: {n: self._score(of, tasks[n]) for n in tasks} for key, of in models.items()}
                found[f"{rate:g}"] = {
                    "mean": statistics.fmean(v for one in scores.values() for v in one.values())
                } | scores
            write_json(file, found)
        found = json.loads(file.read_text())
        return float(max(found, key=lambda rate: found[rate]["mean"]))

    def _scores(self, recipe: Recipe, adapters: dict[str, Path]) -> dict[str, dict[str, float]]:
        tasks = {name: recipe.task(name) for name in self.names}
        grams = {
            name: recipe.collect_statistics("gram", name, adapters[name], num_samples=GRAM_ROWS, progress=False)
            for name in self.names
        }
        scores = {"alone": {name: self._score(lambda n: _alone(adapters[n]), tasks[name]) for name in self.names}}
        for column, (method, scale) in MERGES.items():
            options = {"statistics": grams} if method == "regmean" else {}
            merged = merge_adapters(adapters, method, scale=scale, **options)  # type: ignore[arg-type]
            scores[column] = {
                name: self._score(lambda n, merged=merged: merged.load(RECIPE.model, n), tasks[name])  # type: ignore[misc]
                for name in self.names
            }
        return scores

    def _score(self, model_of: Callable[[str], torch.nn.Module], task: Task) -> float:
        return evaluate_task(model_of(task.name), task, self.tokenizer, max_length=RECIPE.max_length, progress=False)


def _held_out(name: str) -> Task:
    """The training rows of the tuning seed, and others to score on."""
    assert RECIPE.train_rows is not None
    drawn = load_task("packaged", name).sample(train=RECIPE.train_rows + HELD_OUT, seed=TUNING_SEED)
    train, held = range(RECIPE.train_rows), range(RECIPE.train_rows, RECIPE.train_rows + HELD_OUT)
    return replace(drawn, train=drawn.train.select(train), validation=drawn.train.select(held))


def _alone(adapter: Path) -> torch.nn.Module:
    return load_adapter(adapter).attach(RECIPE.model)


def tables(out: Path) -> str:
    """Scores in percent; what training did to A (energies in percent); what projecting kept: mean ± std over seeds."""
    rendered = []
    for wanted in TABLES:
        lines = [["init", *(column.replace("_", " ") for column in wanted)]]
        for init in [*INITS, *POST_HOC]:
            found = [_columns(json.loads(file.read_text())) for file in sorted(out.glob(f"seed*/{init}.json"))]
            if len(found) == len(SEEDS) and set(wanted) & set(found[0]) - {"rate"}:
                lines.append([init, *(_cell([one[column] for one in found if column in one]) for column in wanted)])
        rendered.append(markdown_table(lines[0], lines[1:]))
    return "\n\n".join(rendered) + "\n"


def _columns(found: dict[str, Any]) -> dict[str, float]:
    """{column: value} of one init and seed."""
    scores = {column: 100 * statistics.fmean(by_task.values()) for column, by_task in found["scores"].items()}
    notes = list(found["notes"].values())
    means = {key: statistics.fmean(one[key] for one in notes) for key in notes[0]}
    means |= {key: 100 * means[key] for key in ("before", "after") if key in means}
    merged = statistics.fmean(value for column, value in scores.items() if column != "alone")
    return {"rate": found["rate"], "merged": merged} | scores | means


def _cell(values: list[float]) -> str:
    """Mean ± sample standard deviation, to three or four digits."""
    if not values or min(values) == max(values):
        return f"{values[0]:g}" if values else ""
    digits = 1 if max(values) >= 10 else 3
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def main() -> None:
    """Run what is asked for, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/osrm_study"))
    parser.add_argument("--inits", nargs="+", choices=[*INITS, *POST_HOC], default=[*INITS, *POST_HOC])
    parser.add_argument("--table", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console = Console(soft_wrap=True)
    if not arguments.table:
        study = Study(arguments.out, console)
        for init in arguments.inits:
            study.run(init)
    report = tables(arguments.out)
    settings = {
        "inits": INITS,
        "post_hoc": POST_HOC,
        "seeds": SEEDS,
        "rates": RATES,
        "tuning_seed": TUNING_SEED,
        "merges": MERGES,
    }
    write_json(arguments.out / "how.json", settings | {"recipe": vars(RECIPE), "versions": versions()})
    with new_file(arguments.out / "tables.md") as partial:
        partial.write_text(report, encoding="utf-8")
    console.print(report, markup=False)


if __name__ == "__main__":
    main()
