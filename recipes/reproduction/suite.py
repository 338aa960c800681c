"""Suite: the settings of a reproduction, and the artefacts that its experiments are made of."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig

from osrm_peft import (
    OSRMLoraConfig,
    evaluate_task,
    load_adapter,
    load_task,
    project_adapter,
)
from osrm_peft.devices import local_device
from osrm_peft.distributed import Processes
from osrm_peft.features.task_features import TaskFeatures
from osrm_peft.io.json import write_json
from osrm_peft.io.yaml import check_fields, fields_from_yaml, named
from osrm_peft.merging.merge import merge as run_merge
from osrm_peft.merging.methods.registry import METHODS, get_method
from osrm_peft.models.loading import load_tokenizer
from osrm_peft.osrm.others import OtherTasks
from osrm_peft.tasks.task import Task
from osrm_peft.training.recipe import Recipe
from osrm_peft.training.train import PAPER_LORA, train_task
from reproduction.graph import Node
from reproduction.merges import STATISTICS_ROWS, Merge

PLAIN, OSRM = "LoRA", "OSRM"


@dataclass(frozen=True)
class Suite:
    """A model, its tasks, and how adapters of it are trained.

    Attributes:
        model, suite, lora, osrm, num_samples, training, max_length, train_rows, validation_rows: as in `Recipe`;
            `training` without the learning rate.
        tasks: in the order in which Fig. 5 adds them.
        rates: the learning rates to choose from, for each task and init.
        held_out: training rows that no adapter is trained on while rates are compared.
        tuning_seed: of these; not among the seeds.
        seeds: of what is reported; the main table has all, other experiments the first.
        experiments: {name: its options}, see `experiments.py`.
        tuned: the suite whose learning rates are taken, where an experiment varies something else; None: its own.
        paper: the paper's model that this is, in `papers.yaml`; None: another, to compare with all of them.
        statistics_rows: training rows a task for Fisher and RegMean.
        merge_options: {method: its options}, over those of the experiments' merges.
    """

    model: str
    suite: str
    tasks: list[str]
    lora: dict[str, Any]
    training: dict[str, Any]
    osrm: dict[str, Any] = field(default_factory=lambda: {"statistic": "token", "objective": "least_energy"})
    rates: list[float] = field(default_factory=lambda: [4e-4])
    max_length: int = 128
    train_rows: int | None = None
    validation_rows: int | None = None
    held_out: int = 128
    num_samples: int = 100
    seeds: list[int] = field(default_factory=lambda: [42])
    tuning_seed: int = 41
    experiments: dict[str, Any] = field(default_factory=dict)
    paper: str | None = None
    statistics_rows: int = STATISTICS_ROWS
    merge_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    tuned: "Suite | None" = None

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Suite":
        """Read a configuration.

        Raises:
            ValueError: an unknown key or a missing one; lists the keys. Or the tuning seed is among the seeds, or
                merge_options have a method or an option that there is not.
        """
        fields = fields_from_yaml(path, cls, "reproduction", ("model", "suite", "tasks", "lora", "training"))
        with named(path):
            check_fields("the reproduction", fields, cls)
            found = cls(**fields)
            found.recipe(found.tuning_seed)
            for method, options in found.merge_options.items():
                with named("merge_options"):
                    get_method(method).bind(options)
        if found.tuning_seed in found.seeds:
            raise ValueError(
                f"tuning_seed={found.tuning_seed} is among seeds={found.seeds}: rates are not chosen there"
            )
        if "learning_rate" in found.training:
            raise ValueError("learning_rate among training: give rates=[…], one or more")
        return found

    def recipe(self, seed: int) -> Recipe:
        """As a recipe, of plain LoRA."""
        return Recipe(
            model=self.model, suite=self.suite, tasks=self.tasks, lora=self.lora, training=self.training,
            num_samples=self.num_samples, max_length=self.max_length, train_rows=self.train_rows,
            validation_rows=self.validation_rows, seed=seed,
        )  # fmt: skip

    def _about(self, **more: Any) -> dict[str, Any]:
        return {"model": self.model, "suite": self.suite, "max_length": self.max_length, **more}

    def features(self, task: str, seed: int, statistic: str | None = None) -> Node:
        """A task's features on the pre-trained model."""
        recipe = replace(self.recipe(seed), osrm=self.osrm | ({"statistic": statistic} if statistic else {}))
        about = self._about(task=task, seed=seed, num_samples=self.num_samples, lora=self.lora, osrm=recipe.osrm)

        def make(path: Path, inputs: Mapping[str, Path], processes: Processes) -> None:
            found = recipe.collect(task, progress=False, distributed=processes.num_processes > 1)
            processes.broadcast_from_main(lambda: found.save(path))

        return Node("features", about, make, suffix=".features.safetensors", cost=self.num_samples, unit="rows")

    def _features(self, init: str, task: str, tasks: Sequence[str], seed: int) -> dict[str, Node]:
        """What OSRM looks at for one task among `tasks`."""
        if init == PLAIN:
            return {}
        own = [task] if self._config({}, task).needs_own_features else []
        return {one: self.features(one, seed) for one in tasks if one != task or one in own}

    def _config(self, files: Mapping[str, Path], task: str) -> OSRMLoraConfig:
        given = {name: str(path) for name, path in files.items()}
        own = {"in_task": given.pop(task, None)}
        return OSRMLoraConfig(**(PAPER_LORA | self.lora | self.osrm | own | {"out_of_task": list(given.values())}))

    def _lora(self, init: str, inputs: Mapping[str, Path], task: str) -> LoraConfig:
        files = {name.removeprefix("features/"): path for name, path in inputs.items() if name.startswith("features/")}
        return LoraConfig(**(PAPER_LORA | self.lora)) if init == PLAIN else self._config(files, task)

    def rate(self, init: str, task: str) -> Node:
        """The learning rate with the best score on held-out training rows, of the grid: {"rate", "scores"}."""
        features = {f"features/{n}": one for n, one in self._features(init, task, self.tasks, self.tuning_seed).items()}
        about = self._about(task=task, init=init, rates=self.rates, held_out=self.held_out, seed=self.tuning_seed)
        about |= {"lora": self.lora, "training": self.training, "train_rows": self.train_rows}

        def make(path: Path, inputs: Mapping[str, Path], processes: Processes) -> None:
            rows, scores = self._held_out(task), {}
            trials = path.with_name(f".{path.stem}.trials")
            for rate in self.rates:
                trial = trials / f"{rate:g}"
                self._train(trial, self._lora(init, inputs, task), rows, rate, self.tuning_seed)
                scores[f"{rate:g}"] = self._score(rows, load_adapter(trial).attach(self.model), processes)
            best = max(self.rates, key=lambda rate: scores[f"{rate:g}"])
            processes.broadcast_from_main(lambda: write_json(path, {"rate": best, "scores": scores}))
            if processes.is_main_process:
                shutil.rmtree(trials)

        return Node("rate", about, make, features, ".json", len(self.rates) * self._steps(), "steps")

    def adapter(self, init: str, task: str, seed: int, tasks: Sequence[str] | None = None) -> Node:
        """A task's adapter among `tasks`, at its learning rate."""
        tasks = self.tasks if tasks is None else tasks
        inputs = {f"features/{name}": one for name, one in self._features(init, task, tasks, seed).items()}
        if len(self.rates) > 1:
            inputs["rate"] = (self.tuned or self).rate(init, task)
        about = self._about(task=task, init=init, seed=seed, lora=self.lora, training=self.training)
        about |= {"train_rows": self.train_rows, "osrm": self.osrm if init == OSRM else None}
        about |= {} if "rate" in inputs else {"rate": self.rates[0]}

        def make(path: Path, inputs: Mapping[str, Path], processes: Processes) -> None:
            rate = json.loads(inputs["rate"].read_text())["rate"] if "rate" in inputs else self.rates[0]
            self._train(path, self._lora(init, inputs, task), self.recipe(seed).task(task), rate, seed)

        return Node("adapter", about, make, inputs, cost=self._steps(), unit="steps")

    def projected(self, task: str, seed: int, options: Mapping[str, Any]) -> Node:
        """A plain adapter, projected after training (paper §5.4)."""
        inputs = {name: self.features(name, seed) for name in self.tasks}

        def make(path: Path, inputs: Mapping[str, Path], processes: Processes) -> None:
            others = [inputs[name] for name in self.tasks if name != task]
            found = project_adapter(inputs["adapter"], others, in_task=inputs[task], **options)
            processes.broadcast_from_main(lambda: found.save_pretrained(path))

        about = self._about(task=task, seed=seed, options=dict(options))
        return Node("projected", about, make, inputs | {"adapter": self.adapter(PLAIN, task, seed)})

    def statistic(self, kind: str, task: str, adapter: Node, seed: int) -> Node:
        """What RegMean or Fisher merging needs of an adapter."""

        def make(path: Path, inputs: Mapping[str, Path], processes: Processes) -> None:
            found = self.recipe(seed).collect_statistics(
                kind,
                task,
                inputs["adapter"],
                num_samples=self.statistics_rows,
                progress=False,
                distributed=processes.num_processes > 1,
            )
            processes.broadcast_from_main(lambda: found.save(path))

        about = self._about(task=task, statistic=kind, rows=self.statistics_rows, seed=seed)
        suffix, cost = f".{kind}.safetensors", self.statistics_rows
        return Node("statistic", about, make, {"adapter": adapter}, suffix, cost, "rows")

    def alone(self, task: str, adapter: Node, seed: int) -> Node:
        """An adapter's own score: {"scores": [{"scale": None, "task", "score"}]}."""

        def make(path: Path, inputs: Mapping[str, Path], processes: Processes) -> None:
            rows = self.recipe(seed).task(task)
            score = self._score(rows, load_adapter(inputs["adapter"]).attach(self.model), processes)
            rows_of_scores = [{"scale": None, "task": task, "score": score}]
            processes.broadcast_from_main(lambda: write_json(path, {"scores": rows_of_scores}))

        about = self._about(task=task, seed=seed, validation_rows=self.validation_rows)
        return Node("alone", about, make, {"adapter": adapter}, ".json", self.validation_rows or 1000, "rows")

    def merged(self, merge: Merge, adapters: Mapping[str, Node], seed: int) -> Node:
        """The scores of one merge at its scales: {"scores": [{"scale", "task", "score"}]}."""
        merge = merge._replace(arguments={**merge.arguments, **self.merge_options.get(merge.method, {})})
        inputs = {f"adapter/{task}": one for task, one in adapters.items()}
        needs = METHODS[merge.method].needs
        if needs is not None:
            inputs |= {f"statistics/{t}": self.statistic(needs, t, one, seed) for t, one in adapters.items()}
        if merge.guided():
            inputs |= {f"features/{task}": self.features(task, seed) for task in adapters}

        def make(path: Path, inputs: Mapping[str, Path], processes: Processes) -> None:
            given: dict[str, dict[str, Path]] = {}
            for name, one in inputs.items():
                part, _, task = name.partition("/")
                given.setdefault(part, {})[task] = one
            merged = run_merge(merge.request(given.pop("adapter"), **given), processes)
            found = []
            for scale in merge.scales:
                for task in adapters:
                    model = merged.at_scale(scale).load(self.model, task)
                    score = self._score(self.recipe(seed).task(task), model, processes)
                    found.append({"scale": scale, "task": task, "score": score})
            processes.broadcast_from_main(lambda: write_json(path, {"scores": found}))

        about = self._about(merge=list(merge), seed=seed, tasks=list(adapters), validation_rows=self.validation_rows)
        rows = len(merge.scales) * len(adapters) * (self.validation_rows or 1000)
        return Node("merged", about, make, inputs, ".json", rows, "rows")

    def ranks(self, task: str, seed: int) -> Node:
        """The rank of H, the stacked sample means of the other tasks, in each layer: {layer: rank}."""
        inputs = {name: self.features(name, seed, "sample") for name in self.tasks if name != task}

        def make(path: Path, inputs: Mapping[str, Path], processes: Processes) -> None:
            out = OtherTasks([TaskFeatures.load(one) for one in inputs.values()])
            ranks = {name: out.at(name)[2].rank for name in out.features[0].layers}
            processes.broadcast_from_main(lambda: write_json(path, ranks))

        return Node("ranks", self._about(task=task, seed=seed, num_samples=self.num_samples), make, inputs, ".json")

    def _train(self, path: Path, lora: LoraConfig, rows: Task, rate: float, seed: int) -> None:
        training = {"disable_tqdm": True} | self.training | {"learning_rate": rate}
        options: dict[str, Any] = {"max_length": self.max_length, "seed": seed, "overwrite": True}
        train_task(rows, path, lora=lora, model=self.model, training=training, **options)

    def _score(self, rows: Task, model: Any, processes: Processes) -> float:
        tokenizer, shared = load_tokenizer(self.model), processes.num_processes > 1
        options: dict[str, Any] = {"max_length": self.max_length, "progress": False, "distributed": shared}
        return evaluate_task(model.to(local_device()), rows, tokenizer, **options)

    def _held_out(self, name: str) -> Task:
        """Rows to train on while rates are compared, and others of the training split to compare them on."""
        count = None if self.train_rows is None else self.train_rows + self.held_out
        drawn = load_task(self.suite, name).sample(train=count, seed=self.tuning_seed).train
        parts = drawn.train_test_split(self.held_out, seed=self.tuning_seed)
        return replace(load_task(self.suite, name), train=parts["train"], validation=parts["test"])

    def _steps(self) -> float:
        rows = self.train_rows or 10_000
        return rows * self.training.get("num_train_epochs", 10) / self.training.get("per_device_train_batch_size", 64)
