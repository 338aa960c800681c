"""A recipe: everything that makes one suite's adapters, as one YAML file."""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    TrainingArguments,
)

from osrm_peft.adapters.load import load_adapter
from osrm_peft.checks import LARGEST, SEEDS, choice, integer, kind, number, shown, task_names
from osrm_peft.devices import local_device
from osrm_peft.distributed import Processes, shard_model
from osrm_peft.features.batches import TOKENS
from osrm_peft.features.collect import collect_features, collect_gram
from osrm_peft.features.fisher import DiagonalFisher, collect_fisher
from osrm_peft.features.task_features import TaskFeatures
from osrm_peft.hub.privacy import public_name
from osrm_peft.io.tensors import data_sha256
from osrm_peft.io.yaml import check_fields, fields_from_yaml, named
from osrm_peft.models.identity import weight_files
from osrm_peft.models.loading import load_base, load_causal, load_tokenizer
from osrm_peft.osrm.config import OSRMLoraConfig
from osrm_peft.tasks.files import SPLITS, TaskData
from osrm_peft.tasks.rows import FORMATS
from osrm_peft.tasks.suites import Suite, list_tasks, load_task
from osrm_peft.tasks.task import Task, fingerprint, tokenize
from osrm_peft.tasks.text import TextTask, tokenize_labelled
from osrm_peft.training.train import PAPER_LORA, train_task

STATISTIC_KINDS = ("gram", "fisher")


@dataclass(frozen=True)
class Recipe:
    """How to make adapters of several tasks, and what to make of them. Paths in its file are relative to the file.

    Attributes:
        model: Hub id, folder, or `"packaged"`.
        suite: `"packaged"`, `"packaged-text"`, `"glue"` or `"files:FOLDER"`; None with tasks of your own.
        tasks: which tasks of the suite; None: all. Or your own, {task: fields of `TaskData`}. The *other* tasks are the
            out-of-task ones.
        lora: LoraConfig fields over the paper's (r = 8, alpha = 16); `target_modules` among them. With `task_type:
            CAUSAL_LM`, the default of the suite packaged-text, tasks are in words (rows of prompt and completion).
        osrm: OSRMLoraConfig fields, or None for plain LoRA. The features files default to those in `features`.
        inits: {name: OSRMLoraConfig fields, or None for plain LoRA}, in the place of `osrm`: several ways to set A,
            which `run` compares.
        features: folder of the features files, `<task>.features.safetensors`; the default is `features` in `out`.
        num_samples: samples a task for its features.
        tokens: of tasks in words, the tokens that features look at: `"all"`, `"prompt"` or `"completion"`.
        packing: of tasks in words, see `train_task`.
        training: TrainingArguments fields over the paper's.
        max_length: tokens a row is cut to.
        train_rows, validation_rows: sample sizes; None: all rows.
        seed: draws the samples and the features' rows, seeds head and training.
        out: folder of what `osrm-peft run` makes: features, adapters, statistics, selection, report.
        statistics_rows: training rows a task for the statistics of RegMean, with which `run` tries it; 0: without it.
        select: arguments of `select_merge` (candidates, rule, rows, rank, halving), for `run`.
        push: {"repo": "user/name", "public": False}: where `run` pushes the merge that it has chosen; None: nowhere.
    """

    model: str
    suite: str | None = None
    tasks: list[str] | dict[str, dict[str, Any]] | None = None
    lora: dict[str, Any] = field(default_factory=dict)
    osrm: dict[str, Any] | None = None
    inits: dict[str, dict[str, Any] | None] | None = None
    features: str = ""
    num_samples: int = 100
    tokens: str = "all"
    packing: bool = False
    training: dict[str, Any] = field(default_factory=dict)
    max_length: int = 128
    train_rows: int | None = None
    validation_rows: int | None = None
    seed: int = 42
    out: str = "results"
    statistics_rows: int = 200
    select: dict[str, Any] = field(default_factory=dict)
    push: dict[str, Any] | None = None

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Recipe":
        """Read a recipe.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a mapping, an unknown key or a missing one; lists the keys.
        """
        fields = fields_from_yaml(path, cls, "recipe", ("model",))
        with named(path):
            return cls(**fields).below(Path(path).parent)

    def below(self, folder: Path) -> "Recipe":
        """The same recipe with its paths relative to `folder`."""

        def place(name: str) -> str:
            return os.path.normpath(folder / Path(name).expanduser())

        changes: dict[str, Any] = {"features": place(self.features), "out": place(self.out)}
        if (folder / self.model).is_dir():
            changes["model"] = place(self.model)
        kind_of_suite, separator, files = (self.suite or "").partition(":")
        if separator:
            changes["suite"] = f"{kind_of_suite}:{place(files)}"
        if isinstance(self.tasks, dict):
            changes["tasks"] = {name: _placed(data, SPLITS, place) for name, data in self.tasks.items()}
        if self.osrm:
            changes["osrm"] = _placed(self.osrm, ("out_of_task", "in_task"), place)
        changes["select"] = _placed(self.select, ("candidates",), place)
        return replace(self, **changes)

    def __post_init__(self) -> None:
        for name, kinds in _KINDS.items():
            kind(name, getattr(self, name), kinds, " in the recipe")
        object.__setattr__(self, "features", self.features or f"{self.out}/features")
        for name, least, most in (
            ("num_samples", 1, LARGEST),
            ("max_length", 4, LARGEST),
            ("seed", 0, SEEDS),
            ("statistics_rows", 0, LARGEST),
        ):
            integer(name, getattr(self, name), least, most)
        for name in ("train_rows", "validation_rows"):
            if getattr(self, name) is not None:
                integer(name, getattr(self, name), 1)
        if self.tasks is not None and len(set(task_names(self.tasks))) < len(self.tasks):
            raise ValueError(f"tasks={shown(self.tasks)} names a task twice")
        if (self.suite is None) is not isinstance(self.tasks, dict):
            raise ValueError(
                "give a suite (packaged, glue or files:FOLDER), whose tasks may be listed in tasks; or no suite and "
                "your own tasks: tasks: {reviews: {train: reviews.csv}}"
            )
        self.source  # noqa: B018 (checks the fields of each task)
        lora = self.lora_fields
        check_fields("lora in the recipe", self.lora, LoraConfig, ("lora_alpha", "init_lora_weights"))
        integer("lora in the recipe: r", lora["r"], 1)
        number("lora in the recipe: lora_alpha", lora["lora_alpha"])
        check_fields("osrm in the recipe", self.osrm or {}, OSRMLoraConfig, ("lora_alpha", "init_lora_weights"))
        choice("task_type in lora of the recipe", lora["task_type"], ("SEQ_CLS", "CAUSAL_LM"))
        choice("tokens", self.tokens, TOKENS)
        if not self.in_words and (self.packing or self.tokens != "all"):
            name = "packing" if self.packing else "tokens"
            raise ValueError(
                f"{name} in the recipe is of tasks in words (lora: {{task_type: CAUSAL_LM}}): leave it out"
            )
        for name, instead in _OURS.items():
            if name in self.training:
                raise ValueError(f"{name} is given by {instead}: leave it out of training in the recipe")
        known = {one.name for one in dataclasses.fields(TrainingArguments)}  # `train` refuses the others
        shared = {name: value for name, value in self.training.items() if name in known}
        check_fields("training in the recipe", shared, TrainingArguments)
        if "learning_rate" in shared:
            number("training in the recipe: learning_rate", shared["learning_rate"], 0, open_low=True)
        with named("lora and osrm in the recipe"):
            LoraConfig(**lora)
            _check_mergeable(lora, self.osrm)
        if self.inits is not None and (self.osrm is not None or not self.inits):
            raise ValueError("inits in the recipe stand in the place of osrm: name at least one, and leave osrm out")
        for label, osrm in (self.inits or {}).items():
            with named(f"inits in the recipe: {label}"):
                kind("its fields", osrm, dict | None)
                check_fields(str(label), osrm or {}, OSRMLoraConfig, ("lora_alpha", "init_lora_weights"))
                _check_mergeable(lora, osrm)

    @property
    def lora_fields(self) -> dict[str, Any]:
        """The fields of `lora` over the paper's."""
        task_type = "CAUSAL_LM" if self.suite == "packaged-text" else PAPER_LORA["task_type"]
        return PAPER_LORA | {"task_type": task_type} | self.lora

    @property
    def in_words(self) -> bool:
        """Whether the tasks are prompts and completions for a causal language model."""
        return self.lora_fields["task_type"] == "CAUSAL_LM"

    @property
    def source(self) -> Suite:
        """The suite for `load_task`: its name, or the tasks' own data."""
        if not isinstance(self.tasks, dict):
            return str(self.suite)
        found = {}
        for name, fields in self.tasks.items():
            with named(f"tasks in the recipe: {name}"):
                if not isinstance(fields, dict) or "train" not in fields:
                    raise ValueError(f"{shown(fields)} must map train, and more, to values: {{train: {name}.csv}}")
                check_fields(name, fields, TaskData)
                found[name] = TaskData(**fields)
        return found

    def task_names(self) -> list[str]:
        """The tasks, checked against the suite."""
        known = list_tasks(self.source)
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
        return self._load(name).sample(train=self.train_rows, validation=self.validation_rows, seed=self.seed)

    def _load(self, name: str) -> Task:
        task = load_task(self.source, name)
        if isinstance(task, TextTask) is not self.in_words:
            rows, wanted = ("prompts", "CAUSAL_LM") if isinstance(task, TextTask) else ("classes", "SEQ_CLS")
            raise ValueError(f"the rows of {name!r} are of {rows}: give lora: {{task_type: {wanted}}} in the recipe")
        return task

    def features_file(self, task: str) -> Path:
        """The path of a task's features file."""
        return Path(self.features) / f"{task}.features.safetensors"

    def lora_config(self, task: str) -> LoraConfig:
        """The task's LoRA configuration: OSRM against all other tasks of the recipe, or plain LoRA."""
        fields = self.lora_fields
        if self.osrm is None:
            return LoraConfig(**fields)
        files = {
            "out_of_task": [str(self.features_file(other)) for other in self.task_names() if other != task],
            "in_task": str(self.features_file(task)),
        }
        return OSRMLoraConfig(**(fields | files | self.osrm))

    def made_from(self, task: str) -> dict[str, Any]:
        """What the task's adapter is made from: two adapters that agree in it are one."""
        config, rows = self.lora_config(task), self.task(task)
        settings = config.osrm_settings() if isinstance(config, OSRMLoraConfig) else {}
        files = [*(settings.pop("out_of_task", None) or []), settings.pop("in_task", None)]
        made = {
            "model": self.model_identity(),
            "rows": fingerprint(rows.train),
            **({"label_names": list(rows.label_names)} if rows.label_names else {}),
            "lora": {name: value for name, value in config.to_dict().items() if value not in (None, {}, False)},
            "osrm": settings or None,
            "features": {Path(file).name: data_sha256(file)[:16] for file in files if file and Path(file).is_file()},
            "training": self.training,
            "max_length": self.max_length,
            "seed": self.seed,
            **({"packing": True} if self.packing else {}),
        }
        return json.loads(
            json.dumps(made, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
        )

    def model_identity(self) -> list[Any]:
        """The base model as results remember it: its name without folders, and what tells a local one from others."""
        return [public_name(self.model), *weight_files(self.model)]

    def missing_features(self, tasks: Sequence[str]) -> list[str]:
        """The tasks of the recipe whose features files training these needs, and that are not there."""
        wanted: list[str] = []
        for task in tasks:
            config = self.lora_config(task)
            if isinstance(config, OSRMLoraConfig):
                own = [config.in_task] if config.needs_own_features else []
                wanted += [file for file in (*(config.out_of_task or []), *own) if file]
        files = {str(self.features_file(name)): name for name in self.task_names()}
        return [name for file, name in files.items() if file in wanted and not Path(file).exists()]

    def base(self, distributed: bool = False) -> nn.Module:
        """The pre-trained model to collect features on.

        One process puts it on all GPUs of the machine. Several processes split it by ZeRO-3 or FSDP if the launch's
        config says so; else each has the whole model on its GPU.
        """
        if not torch.cuda.is_available() or Processes.of(distributed).num_processes > 1:
            split = shard_model(self.load_base) if distributed else None
            return self.load_base().to(local_device()) if split is None else split  # type: ignore[arg-type]
        return self.load_base(device_map="auto")

    def load_base(self, device_map: str | None = None) -> PreTrainedModel:
        """The pre-trained model, as it was loaded: a causal language model, or one with a head for two classes."""
        return load_causal(self.model, device_map) if self.in_words else load_base(self.model, 2, device_map)

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
            tokens=self.tokens,  # type: ignore[arg-type]
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
        task = self._load(name).sample(train=k, seed=self.seed)
        options: dict[str, Any] = {"padding": padding, "max_length": self.max_length}
        collator: Any = DataCollatorWithPadding(tokenizer, **options)
        read = tokenize
        if isinstance(task, TextTask):  # whose labels are padded, too
            collator, read = DataCollatorForTokenClassification(tokenizer, **options), tokenize_labelled
        size = min(16, -(-k // processes))
        return DataLoader(read(task.train, tokenizer, self.max_length), batch_size=size, collate_fn=collator)

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
            packing=self.packing,
            seed=self.seed,
            made_from=self.made_from(task),
            overwrite=overwrite,
            progress=progress,
        )


def suite_of(name: str) -> Suite:
    """The suite of this name; of a recipe's YAML file its tasks."""
    if name.lower().endswith((".yaml", ".yml")):
        return Recipe.from_yaml(name).source
    return name


def _placed(fields: dict[str, Any], names: Sequence[str], place: Callable[[str], str]) -> dict[str, Any]:
    """The fields, with the paths among these as `place` puts them; a Hub dataset or the name of a split stays."""

    def one(value: Any) -> Any:
        if isinstance(value, list):
            return [one(each) for each in value]
        is_path = isinstance(value, str) and ":" not in value and Path(value).suffix.lower() in _PATHS
        return place(value) if is_path else value

    return {name: one(value) if name in names else value for name, value in fields.items()}


_OURS = {"output_dir": "the adapter's folder", "seed": "the recipe's own seed"}  # of TrainingArguments
_PATHS = (*FORMATS, ".safetensors", ".yaml", ".yml")
_KINDS = {
    "model": str,
    "suite": str | None,
    "tasks": list | dict | None,
    "lora": dict,
    "osrm": dict | None,
    "inits": dict | None,
    "features": str,
    "tokens": str,
    "packing": bool,
    "training": dict,
    "out": str,
    "select": dict,
    "push": dict | None,
}


def _check_mergeable(lora: dict[str, Any], osrm: dict[str, Any] | None) -> None:
    """Raise ValueError if the adapter could not be merged; plain LoRA, without `osrm`, may be on bare parameters."""
    bare = () if osrm is not None else ("target_parameters",)
    OSRMLoraConfig(**({name: value for name, value in lora.items() if name not in bare} | (osrm or {})))
