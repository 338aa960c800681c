"""LoRE-Merging of full models, the shape of its paper's Table 1: task models, and checkpoints of one run.

    python recipes/lore_checkpoints.py --out results/lore_checkpoints      # 10 to 25 minutes on 2 cores; resumable
    python recipes/lore_checkpoints.py --causal results/models/smollm2-135m --out results/smollm2_checkpoints

Fine-tunes all weights of the packaged MiniLM on three tasks, on the last with three checkpoints on the way; merges the
task models (each keeps its head) and the checkpoints by average, DARE, TIES and LoRE; sweeps LoRE's μ and rank ratio.
With --causal a language model learns the same tasks in words, without heads; nothing is swept.
Writes into OUT/results: table.md, scores.csv, sweep.png, the task vectors' spectrum.png (Fig. 1), and scores.json of
the task models and of the run; into OUT spectrum.json. `osrm-peft report` shows them all.
"""

import argparse
import csv
import json
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorForTokenClassification,
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
from osrm_peft.models.loading import load_base, load_causal, load_tokenizer
from osrm_peft.tasks.task import Task, tokenize
from osrm_peft.tasks.text import tokenize_labelled

# The direct sum at λ = 1, as in the paper. (At λ = 1/T it is the average whatever μ is: θ₀ = mean(θ − δ).)
LORE = {"max_iterations": 30, "tolerance": 1e-4}
OTHERS: dict[str, dict[str, Any]] = {
    "average": {"method": "average"},
    "DARE": {"method": "dare", "scale": 0.5},
    "TIES": {"method": "ties"},
}
NEEDS_BASE = ("dare", "ties")


@dataclass(frozen=True)
class Setting:
    """What decides the results.

    Attributes:
        tasks: three: of two models θ₀ is the mean and δ₁ = −δ₂, so LoRE's direct sum is the average, whatever μ and λ.
        long: the task whose run keeps three checkpoints.
        heads: patterns of the weights that each task model keeps.
        layer: which matrices the spectrum is of.
    """

    model: str
    suite: str
    merges: dict[str, dict[str, Any]]
    sweeps: dict[str, list[float]]
    heads: tuple[str, ...]
    layer: str
    rows: int
    validation: int
    max_length: int
    steps: int
    batch: int
    rate: float
    tasks: tuple[str, ...] = ("questions", "product_reviews", "tweets")
    long: str = "tweets"
    seed: int = 42

    def about(self) -> dict[str, Any]:
        """The same as JSON has it."""
        return json.loads(json.dumps(asdict(self)))

    def swept(self) -> dict[str, dict[str, Any]]:
        """{label: a merge by LoRE} of the sweeps."""
        return {f"{key}={value:g}": {"method": "lore", key: value, **LORE}
                for key, values in self.sweeps.items() for value in values}  # fmt: skip

    def task(self, name: str) -> Task:
        """A task's rows."""
        return load_task(self.suite, name).sample(train=self.rows, validation=self.validation)

    def base(self, num_labels: int) -> Any:
        """The pre-trained model."""
        return load_base(self.model, num_labels) if self.heads else load_causal(self.model)

    def load(self, folder: Path) -> Any:
        """A fine-tuned or merged model."""
        kind = AutoModelForSequenceClassification if self.heads else AutoModelForCausalLM
        return kind.from_pretrained(folder)


CLASSIFIER = Setting(
    "packaged", "packaged",
    OTHERS | {"LoRE": {"method": "lore", "mu_ratio": 0.1, **LORE}},
    {"mu_ratio": [0.02, 0.05, 0.1, 0.2, 0.5], "rank_ratio": [0.05, 0.1, 0.2, 0.4]},
    ("classifier*",), "*layer.*.weight", rows=1000, validation=300, max_length=48, steps=126, batch=16, rate=1e-4,
)  # fmt: skip


def causal(model: str) -> Setting:
    """The same of a causal language model: the paper's rank ratio 0.2, its average combination and the direct sum."""
    lore = {
        f"LoRE, {combine}": {"method": "lore", "rank_ratio": 0.2, "combine": combine, **LORE}
        for combine in ("average", "sum")
    }
    return Setting(
        model, "packaged-text", OTHERS | lore, {}, (), "*layers.*_proj.weight",
        rows=320, validation=96, max_length=128, steps=42, batch=8, rate=5e-5,
    )  # fmt: skip


console = Console()


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/lore_checkpoints"))
    parser.add_argument("--causal", metavar="MODEL", help="a causal language model, in the place of MiniLM")
    arguments = parser.parse_args()
    reproduce(arguments.out, CLASSIFIER if arguments.causal is None else causal(arguments.causal))


def reproduce(out: Path, setting: Setting = CLASSIFIER) -> None:
    """Train, merge, score, sweep; what is there already is kept."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    check_folder(out)
    known = out / "measured.json"
    files = ("scores.csv", "table.md", "sweep.png", "spectrum.png", "tasks/scores.json", "run/scores.json")
    for path in (known, out / "spectrum.json", *(out / "results" / name for name in files)):
        check_file(path)
    settings = setting.about()
    made = {"settings": settings, "command": shlex.join(["python", *sys.argv]), "versions": versions()}
    before = json.loads(known.read_text()) if known.is_file() else {"scores": {}, "settings": settings}
    if before["settings"] != settings:
        raise ValueError(f"{known} was measured with other settings: name another --out")
    scores: dict[str, dict[str, float]] = before["scores"]

    def score(name: str, merge: Any) -> None:
        if name not in scores:
            scores[name] = merge()
            write_json(known, {"scores": scores, **made})
            console.print(f"{name}: {scores[name]}")

    tasks = {name: setting.task(name) for name in setting.tasks}
    for name, task in tasks.items():
        fine_tune(setting, task, out / "models" / name, checkpoints=3 if name == setting.long else 1)
    experts = {name: checkpoints(out / "models" / name)[-1] for name in tasks}
    steps = {path.name: path for path in checkpoints(out / "models" / setting.long)}
    base, base_of_run = (out / "models" / name / "base" for name in (setting.tasks[0], setting.long))
    tokenizer = load_tokenizer(setting.model)

    def value(model: Any, name: str) -> float:
        return evaluate_task(model, tasks[name], tokenizer, max_length=setting.max_length, progress=False)

    for name, folder in experts.items():
        score(f"tasks/{name} alone", lambda name=name, folder=folder: {name: value(setting.load(folder), name)})
    for name, folder in steps.items():
        score(f"run/{name}", lambda folder=folder: {setting.long: value(setting.load(folder), setting.long)})
    for label, options in {**setting.merges, **setting.swept()}.items():
        under = options["method"] in NEEDS_BASE
        place = out / "merged" / label
        options = {**options, "progress": True, "overwrite": True}

        def merged(options: Any = options, under: bool = under, place: Path = place) -> dict[str, float]:
            found = merge_checkpoints(
                experts, place / "tasks", heads=setting.heads, base=base if under else None, **options
            )
            if not setting.heads:
                return {name: value(setting.load(found), name) for name in tasks}
            return {name: value(load_merged_checkpoint(found, name), name) for name in tasks}

        def merged_run(options: Any = options, under: bool = under, place: Path = place) -> dict[str, float]:
            found = merge_checkpoints(steps, place / "run", base=base_of_run if under else None, **options)
            return {setting.long: value(setting.load(found), setting.long)}

        score(f"tasks/{label}", merged)
        score(f"run/{label}", merged_run)
    report(setting, scores, list(steps), made, out / "results")
    found = spectra({name: str(folder) for name, folder in experts.items()}, base=str(base), layer=setting.layer)
    write_json(out / "spectrum.json", {"singular_values": found, **made})
    plot_spectra(found, out / "results/spectrum.png")
    console.print(spectra_table(found))


def fine_tune(setting: Setting, task: Task, out: Path, *, checkpoints: int) -> None:
    """All weights, from the pre-trained model in `out/base`; as many checkpoints, evenly spaced."""
    if any(out.glob(f"checkpoint-{setting.steps}/model.safetensors")):
        return
    set_seed(setting.seed)
    tokenizer, model = load_tokenizer(setting.model), setting.base(task.num_labels)
    model.save_pretrained(out / "base")
    args = TrainingArguments(
        str(out), max_steps=setting.steps, learning_rate=setting.rate, warmup_steps=0.1,
        per_device_train_batch_size=setting.batch, seed=setting.seed, save_strategy="steps",
        save_steps=setting.steps // checkpoints, save_only_model=True, report_to="none", logging_steps=21,
        dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    read, collate = (
        (tokenize, DataCollatorWithPadding)
        if setting.heads
        else (tokenize_labelled, DataCollatorForTokenClassification)
    )
    rows = read(task.train, tokenizer, setting.max_length)
    Trainer(model, args, train_dataset=rows, data_collator=collate(tokenizer)).train()


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, in their order."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))


def report(
    setting: Setting, scores: dict[str, dict[str, float]], steps: list[str], made: dict[str, Any], out: Path
) -> None:
    """Table 1's shape, and the sweeps."""
    out.mkdir(parents=True, exist_ok=True)
    seed, long, merges = setting.seed, setting.long, setting.merges

    def rows(kind: str, labels: Iterable[str]) -> list[Score]:
        title, names = ("task models", setting.tasks) if kind == "tasks" else ("one run", (long,))
        return [
            Score(title, one, merges.get(one, {}).get("scale", 1.0), seed, name, scores[f"{kind}/{one}"][name])
            for one in labels
            for name in names
        ]

    alone = [
        Score("one each", "individual", None, seed, name, scores[f"tasks/{name} alone"][name]) for name in setting.tasks
    ]
    at = [Score(name, "individual", None, seed, long, scores[f"run/{name}"][long]) for name in steps]
    tasks, run = alone + rows("tasks", merges), at + rows("run", merges)
    tables = {
        "Task models, in percent": MultiTaskTable.of(tasks),
        "Checkpoints of one run, in percent": MultiTaskTable.of(run),
    }
    if setting.sweeps:
        tables |= {
            "LoRE of the task models, in percent": MultiTaskTable.of(rows("tasks", setting.swept())),
            "LoRE of the checkpoints, in percent": MultiTaskTable.of(rows("run", setting.swept())),
        }
        plot_sweeps(setting, scores, out / "sweep.png")
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


def plot_sweeps(setting: Setting, scores: dict[str, dict[str, float]], path: Path) -> None:
    """Mean score over μ and over the rank ratio."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, (key, values) in zip(figure.subplots(1, 2, sharey=True), setting.sweeps.items(), strict=True):
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
