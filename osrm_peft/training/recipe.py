"""A recipe: everything that makes one suite's adapters, as one YAML file."""

import dataclasses
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, TrainingArguments

from osrm_peft.adapters.load import load_adapter
from osrm_peft.checks import LARGEST, SEEDS, choice, integer, kind, number, shown, task_names
from osrm_peft.distributed import Processes, local_device, shard_model
from osrm_peft.features.collect import collect_features, collect_gram
from osrm_peft.features.fisher import DiagonalFisher, collect_fisher
from osrm_peft.features.task_features import TaskFeatures
from osrm_peft.io.yaml import check_fields, fields_from_yaml, named
from osrm_peft.models.loading import load_base, load_tokenizer
from osrm_peft.osrm.config import OSRMLoraConfig
from osrm_peft.tasks.suites import list_tasks, load_task
from osrm_peft.tasks.task import Task, tokenize
from osrm_peft.training.train import PAPER_LORA, train_task

STATISTIC_KINDS = ("gram", "fisher")


@dataclass(frozen=True)
class Recipe:
    """How to make the adapters of a suite.

    Attributes:
        model: Hub id, folder, or `"packaged"`.
        suite: `"packaged"`, `"glue"` or `"files:FOLDER"`.
        tasks: which tasks of the suite; None: all. The *other* tasks of this list are the out-of-task ones.
        lora: LoraConfig fields over the paper's (r = 8, alpha = 16); `target_modules` among them.
        osrm: OSRMLoraConfig fields, or None for plain LoRA. The features files default to those in `features`.
        features: folder of the features files, `<task>.features.safetensors`.
        num_samples: samples a task for its features.
        training: TrainingArguments fields over the paper's.
        max_length: tokens a row is cut to.
        train_rows, validation_rows: sample sizes; None: all rows.
        seed: draws the samples and the features' rows, seeds head and training.
    """

    model: str
    suite: str
    tasks: list[str] | None = None
    lora: dict[str, Any] = field(default_factory=dict)
    osrm: dict[str, Any] | None = None
    features: str = "results/features"
    num_samples: int = 100
    training: dict[str, Any] = field(default_factory=dict)
    max_length: int = 128
    train_rows: int | None = None
    validation_rows: int | None = None
    seed: int = 42

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Recipe":
        """Read a recipe.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a mapping, an unknown key or a missing one; lists the keys.
        """
        fields = fields_from_yaml(path, cls, "recipe", ("model", "suite"))
        with named(path):
            return cls(**fields)

    def __post_init__(self) -> None:
        for name, kinds in _KINDS.items():
            kind(name, getattr(self, name), kinds, " in the recipe")
        for name, least, most in (("num_samples", 1, LARGEST), ("max_length", 4, LARGEST), ("seed", 0, SEEDS)):
            integer(name, getattr(self, name), least, most)
        for name in ("train_rows", "validation_rows"):
            if getattr(self, name) is not None:
                integer(name, getattr(self, name), 1)
        if self.tasks is not None and len(set(task_names(self.tasks))) < len(self.tasks):
            raise ValueError(f"tasks={shown(self.tasks)} names a task twice")
        lora = PAPER_LORA | self.lora
        check_fields("lora in the recipe", self.lora, LoraConfig, ("lora_alpha", "init_lora_weights"))
        number("lora in the recipe: lora_alpha", lora["lora_alpha"])
        check_fields("osrm in the recipe", self.osrm or {}, OSRMLoraConfig, ("lora_alpha", "init_lora_weights"))
        known = {one.name for one in dataclasses.fields(TrainingArguments)}  # `train` refuses the others
        shared = {name: value for name, value in self.training.items() if name in known}
        check_fields("training in the recipe", shared, TrainingArguments)
        with named("lora and osrm in the recipe"):
            LoraConfig(**lora)
            OSRMLoraConfig(**(lora | (self.osrm or {})))

    def task_names(self) -> list[str]:
        """The tasks, checked against the suite."""
        known = list_tasks(self.suite)
        unknown = sorted(set(self.tasks or []) - set(known))
        if unknown:
            raise ValueError(
                f"unknown task {', '.join(unknown)} in suite {self.suite!r}: choose from {', '.join(known)}"
            )
        return list(self.tasks or known)

    def task(self, name: str) -> Task:
        """One task, sampled as the recipe says."""
        if name not in self.task_names():
            raise ValueError(f"unknown task {name!r}: the recipe has {', '.join(self.task_names())}")
        return load_task(self.suite, name).sample(
            train=self.train_rows, validation=self.validation_rows, seed=self.seed
        )

    def features_file(self, task: str) -> Path:
        """The path of a task's features file."""
        return Path(self.features) / f"{task}.features.safetensors"

    def lora_config(self, task: str) -> LoraConfig:
        """The task's LoRA configuration: OSRM against all other tasks of the recipe, or plain LoRA."""
        fields = PAPER_LORA | self.lora
        if self.osrm is None:
            return LoraConfig(**fields)
        files = {
            "out_of_task": [str(self.features_file(other)) for other in self.task_names() if other != task],
            "in_task": str(self.features_file(task)),
        }
        return OSRMLoraConfig(**(fields | files | self.osrm))

    def base(self, distributed: bool = False) -> nn.Module:
        """The pre-trained model to collect features on.

        One process puts it on all GPUs of the machine. Several processes split it by ZeRO-3 or FSDP if the launch's
        config says so; else each has the whole model on its GPU.
        """
        if not torch.cuda.is_available() or Processes.of(distributed).num_processes > 1:
            split = shard_model(lambda: load_base(self.model, 2)) if distributed else None
            return load_base(self.model, 2).to(local_device()) if split is None else split  # type: ignore[arg-type]
        return load_base(self.model, 2, device_map="auto")

    def collect(
        self,
        name: str,
        *,
        base: nn.Module | None = None,
        group_size: int | None = None,
        progress: bool = True,
        distributed: bool = False,
    ) -> TaskFeatures:
        """Collect one task's features on k training rows; `base` is the model, if the caller has loaded it.

        With `distributed`, all processes of torch.distributed share the work (see `collect_features`).
        """
        config = self.lora_config(name)
        options: dict[str, Any] = {}
        if isinstance(config, OSRMLoraConfig):
            options = {"statistic": config.statistic, "reference": config.reference}
        padding = "max_length" if options.get("reference") else "longest"  # the released code pads to a fixed length
        return collect_features(
            self.base(distributed) if base is None else base,
            self._loader(name, self.num_samples, padding, Processes.of(distributed).num_processes),
            tokenizer=load_tokenizer(self.model),
            task=name,
            target_modules=config,
            num_samples=self.num_samples,
            seed=self.seed,
            group_size=group_size,
            progress=progress,
            distributed=distributed,
            **options,
        )

    def collect_statistics(
        self,
        kind: str,
        name: str,
        adapter: str | Path,
        *,
        num_samples: int = 1000,
        progress: bool = True,
        distributed: bool = False,
    ) -> TaskFeatures | DiagonalFisher:
        """One adapter's statistics on up to k training rows, for RegMean (`"gram"`) or Fisher merging (`"fisher"`).

        The validation rows stay unseen. With `distributed`, all processes of torch.distributed must call this; they
        share the rows for `"gram"`, and each takes all rows for `"fisher"`.
        """
        choice("kind", kind, STATISTIC_KINDS)
        loaded = load_adapter(adapter)
        model: Any = loaded.attach(self.model).to(local_device())
        arguments: dict[str, Any] = {"task": name, "num_samples": num_samples, "seed": self.seed, "progress": progress}
        if kind == "gram":
            loader = self._loader(name, num_samples, processes=Processes.of(distributed).num_processes)
            statistics: Any = collect_gram(model, loader, distributed=distributed, **arguments)
        else:
            statistics = collect_fisher(model, self._loader(name, num_samples), **arguments)
        return replace(statistics, adapter_sha256=loaded.sha256)

    def _loader(self, name: str, k: int, padding: str = "longest", processes: int = 1) -> DataLoader:
        """Batches of k training rows of a task, with labels, as the model takes them; at least one for each process."""
        tokenizer = load_tokenizer(self.model)
        task = load_task(self.suite, name).sample(train=k, seed=self.seed)
        collator = DataCollatorWithPadding(tokenizer, padding=padding, max_length=self.max_length)
        size = min(16, -(-k // processes))
        return DataLoader(tokenize(task.train, tokenizer, self.max_length), batch_size=size, collate_fn=collator)

    def train(self, task: str, out: str | Path, *, overwrite: bool = False, progress: bool = True) -> Path:
        """Train one task's adapter (see `train_task`)."""
        check_fields("training in the recipe", self.training, TrainingArguments)
        return train_task(
            self.task(task),
            out,
            lora=self.lora_config(task),
            model=self.model,
            training=self.training,
            max_length=self.max_length,
            seed=self.seed,
            overwrite=overwrite,
            progress=progress,
        )


_KINDS = {
    "model": str,
    "suite": str,
    "tasks": list | None,
    "lora": dict,
    "osrm": dict | None,
    "features": str,
    "training": dict,
}
