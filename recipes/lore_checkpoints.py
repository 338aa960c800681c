"""LoRE-Merging of full models, the shape of its paper's Table 1: task models, and checkpoints of one run.

    python recipes/lore_checkpoints.py --out results/lore_checkpoints      # 10 to 25 minutes on 2 cores; resumable

Fine-tunes all weights of the packaged MiniLM on three tasks, on the last with three checkpoints on the way; merges the
task models (each keeps its head) and the checkpoints by average, DARE, TIES and LoRE; sweeps LoRE's μ and rank ratio.
Writes into OUT/results: table.md, scores.csv, sweep.png, the task vectors' spectrum.png (Fig. 1), and scores.json of
the task models and of the run; into OUT spectrum.json. `osrm-peft report` shows them all.
"""

import argparse
import csv
import json
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from osrm_peft import evaluate_task, load_merged_checkpoint, load_task, merge_checkpoints
from osrm_peft.evaluation.spectra import plot_spectra, spectra, spectra_table
from osrm_peft.evaluation.tables import MultiTaskTable, Score
from osrm_peft.io.json import write_json
from osrm_peft.io.manifest import versions
from osrm_peft.io.places import check_file, check_folder, new_file
from osrm_peft.models.loading import load_base, load_tokenizer
from osrm_peft.tasks.task import Task, tokenize

# Three tasks: of two models θ₀ is the mean and δ₁ = −δ₂, so LoRE's direct sum is the average, whatever μ and λ are.
TASKS, LONG = ("questions", "product_reviews", "tweets"), "tweets"
ROWS, VALIDATION, LENGTH, SEED, STEPS = 1000, 300, 48, 42, 126
# The direct sum at λ = 1, as in the paper. (At λ = 1/T it is the average whatever μ is: θ₀ = mean(θ − δ).)
LORE = {"max_iterations": 30, "tolerance": 1e-4}
MERGES: dict[str, dict[str, Any]] = {
    "average": {"method": "average"},
    "DARE": {"method": "dare", "scale": 0.5},
    "TIES": {"method": "ties"},
    "LoRE": {"method": "lore", "mu_ratio": 0.1, **LORE},
}
NEEDS_BASE = ("dare", "ties")
SWEEPS: dict[str, list[float]] = {"mu_ratio": [0.02, 0.05, 0.1, 0.2, 0.5], "rank_ratio": [0.05, 0.1, 0.2, 0.4]}
console = Console()


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/lore_checkpoints"))
    reproduce(parser.parse_args().out)


def reproduce(out: Path) -> None:
    """Train, merge, score, sweep; what is there already is kept."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    check_folder(out)
    known = out / "measured.json"
    files = ("scores.csv", "table.md", "sweep.png", "spectrum.png", "tasks/scores.json", "run/scores.json")
    for path in (known, out / "spectrum.json", *(out / "results" / name for name in files)):
        check_file(path)
    made = {"settings": settings(), "command": shlex.join(["python", *sys.argv]), "versions": versions()}
    before = json.loads(known.read_text()) if known.is_file() else {"scores": {}, "settings": settings()}
    if before["settings"] != settings():
        raise ValueError(f"{known} was measured with other settings: name another --out")
    scores: dict[str, dict[str, float]] = before["scores"]

    def score(name: str, merge: Any) -> None:
        if name not in scores:
            scores[name] = merge()
            write_json(known, {"scores": scores, **made})
            console.print(f"{name}: {scores[name]}")

    tasks = {name: load_task("packaged", name).sample(train=ROWS, validation=VALIDATION) for name in TASKS}
    for name, task in tasks.items():
        fine_tune(task, out / "models" / name, checkpoints=3 if name == LONG else 1)
    experts = {name: last(out / "models" / name) for name in TASKS}
    steps = {path.name: path for path in checkpoints(out / "models" / LONG)}
    base, base_of_run = (out / "models" / name / "base" for name in (TASKS[0], LONG))

    for name, folder in experts.items():
        score(f"tasks/{name} alone", lambda name=name, folder=folder: {name: evaluate(folder, tasks[name])})
    for name, folder in steps.items():
        score(f"run/{name}", lambda folder=folder: {LONG: evaluate(folder, tasks[LONG])})
    swept = {f"{key}={value:g}": {"method": "lore", key: value, **LORE}
             for key, values in SWEEPS.items() for value in values}  # fmt: skip
    for label, options in {**MERGES, **swept}.items():
        under = options["method"] in NEEDS_BASE
        place = out / "merged" / label

        def merged(options: Any = options, under: bool = under, place: Path = place) -> dict[str, float]:
            found = merge_checkpoints(
                experts,
                place / "tasks",
                heads=["classifier*"],
                base=base if under else None,
                progress=True,
                overwrite=True,
                **options,
            )
            return {name: evaluate_task(load_merged_checkpoint(found, name), tasks[name], load_tokenizer("packaged"),
                                        max_length=LENGTH, progress=False) for name in TASKS}  # fmt: skip

        def merged_run(options: Any = options, under: bool = under, place: Path = place) -> dict[str, float]:
            found = merge_checkpoints(
                steps, place / "run", base=base_of_run if under else None, progress=True, overwrite=True, **options
            )
            return {LONG: evaluate(found, tasks[LONG])}

        score(f"tasks/{label}", merged)
        score(f"run/{label}", merged_run)
    report(scores, list(steps), made, out / "results")
    found = spectra({name: str(folder) for name, folder in experts.items()}, base=str(base), layer="*layer.*.weight")
    write_json(out / "spectrum.json", {"singular_values": found, **made})
    plot_spectra(found, out / "results/spectrum.png")
    console.print(spectra_table(found))


def settings() -> dict[str, Any]:
    """What decides the results."""
    found = {"tasks": TASKS, "rows": ROWS, "validation": VALIDATION, "max_length": LENGTH, "seed": SEED, "steps": STEPS}
    return json.loads(json.dumps(found | {"merges": MERGES, "sweeps": SWEEPS}))


def fine_tune(task: Task, out: Path, *, checkpoints: int) -> None:
    """All weights, from the pre-trained model in `out/base`; as many checkpoints, evenly spaced."""
    if any(out.glob(f"checkpoint-{STEPS}/model.safetensors")):
        return
    set_seed(SEED)
    tokenizer, model = load_tokenizer("packaged"), load_base("packaged", task.num_labels)
    model.save_pretrained(out / "base")
    args = TrainingArguments(
        str(out), max_steps=STEPS, learning_rate=1e-4, warmup_steps=0.1, per_device_train_batch_size=16, seed=SEED,
        save_strategy="steps", save_steps=STEPS // checkpoints, save_only_model=True, report_to="none",
        logging_steps=21, dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    rows = tokenize(task.train, tokenizer, LENGTH)
    Trainer(model, args, train_dataset=rows, data_collator=DataCollatorWithPadding(tokenizer)).train()


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, in their order."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))


def last(folder: Path) -> Path:
    """A run's last checkpoint."""
    return checkpoints(folder)[-1]


def evaluate(folder: Path, task: Task) -> float:
    """A whole model's score on a task."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    return evaluate_task(model, task, load_tokenizer("packaged"), max_length=LENGTH, progress=False)


def report(scores: dict[str, dict[str, float]], steps: list[str], made: dict[str, Any], out: Path) -> None:
    """Table 1's shape, and the sweeps."""
    out.mkdir(parents=True, exist_ok=True)
    swept = [f"{key}={value:g}" for key, values in SWEEPS.items() for value in values]

    def rows(kind: str, labels: Iterable[str]) -> list[Score]:
        title, names = ("task models", TASKS) if kind == "tasks" else ("one run", (LONG,))
        return [
            Score(title, one, MERGES.get(one, {}).get("scale", 1.0), SEED, name, scores[f"{kind}/{one}"][name])
            for one in labels
            for name in names
        ]

    alone = [Score("one each", "individual", None, SEED, name, scores[f"tasks/{name} alone"][name]) for name in TASKS]
    at = [Score(name, "individual", None, SEED, LONG, scores[f"run/{name}"][LONG]) for name in steps]
    tasks, run = alone + rows("tasks", MERGES), at + rows("run", MERGES)
    tables = {
        "Task models, in percent": MultiTaskTable.of(tasks),
        "Checkpoints of one run, in percent": MultiTaskTable.of(run),
        "LoRE of the task models, in percent": MultiTaskTable.of(rows("tasks", swept)),
        "LoRE of the checkpoints, in percent": MultiTaskTable.of(rows("run", swept)),
    }
    for title, table in tables.items():
        console.print(table.terminal(title))
    for kind, found in (("tasks", tasks), ("run", run)):
        write_json(out / kind / "scores.json", {"scores": [asdict(one) for one in found], **made})
    with new_file(out / "scores.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["models", "merge", "task", "score"])
        writer.writerows([*name.split("/"), task, one] for name, of in scores.items() for task, one in of.items())
    with new_file(out / "table.md") as partial:
        texts = [f"{title}:\n\n{table.markdown()}" for title, table in tables.items()]
        partial.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    plot_sweeps(scores, out / "sweep.png")


def plot_sweeps(scores: dict[str, dict[str, float]], path: Path) -> None:
    """Mean score over μ and over the rank ratio."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, (key, values) in zip(figure.subplots(1, 2, sharey=True), SWEEPS.items(), strict=True):
        for kind in ("tasks", "run"):
            found = [scores[f"{kind}/{key}={value:g}"].values() for value in values]
            axes.plot(values, [100 * sum(one) / len(one) for one in found], marker="o", label=kind)
        axes.set(xlabel=key, xscale="log", ylabel="mean score, percent")
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.minorticks_off()
        axes.legend()
    with new_file(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


if __name__ == "__main__":
    main()
