"""What can be scored: adapters, merges, sweeps and full models, each with its tasks, length and tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from osrm_peft.adapters.load import load_adapter
from osrm_peft.checkpoints.merge import load_merged_checkpoint
from osrm_peft.checks import kind
from osrm_peft.hub.card import model_card
from osrm_peft.hub.sources import local_folder
from osrm_peft.io.manifest import MANIFEST, read_manifest
from osrm_peft.io.yaml import check_fields, named
from osrm_peft.merging.emr_adapter import EMRAdapter
from osrm_peft.models.loading import load_tokenizer
from osrm_peft.tasks.files import SPLITS, TaskData
from osrm_peft.tasks.rows import FORMATS
from osrm_peft.tasks.suites import Suite

LENGTH = 128  # tokens a row is cut to where nothing says how long the rows of the training were


@dataclass(frozen=True)
class Subject:
    """One thing to score.

    Attributes:
        name: for tables.
        folder: where it lies on this machine.
        manifest: ours; empty for what others wrote.
        base_model: named by the user; None: what the files name.
    """

    name: str
    folder: Path
    manifest: Mapping[str, Any]
    base_model: str | None = None

    @property
    def kind(self) -> str:
        """`"adapter"`, `"merged"`, `"emr"` or `"checkpoint"`."""
        known = self.manifest.get("kind")
        if known in ("adapter", "merged", "emr", "checkpoint"):
            return str(known)
        return "adapter" if (self.folder / "adapter_config.json").is_file() else "checkpoint"

    @property
    def method(self) -> str:
        """For tables: the merge's method, or `"individual"`."""
        return str(self.manifest["method"]) if "method" in self.manifest else "individual"

    @property
    def tasks(self) -> list[str] | None:
        """The tasks that the manifest names; None for none."""
        if self.kind != "adapter" and isinstance(self.manifest.get("inputs"), dict):
            heads = {file.stem for file in (self.folder / "heads").glob("*.safetensors")}
            names = list(self.manifest["inputs"])
            return names if self.kind != "checkpoint" or heads >= set(names) else None
        return [self.manifest["task"]] if "task" in self.manifest else None

    @property
    def max_length(self) -> int | None:
        """Tokens a row was cut to in training, if the manifest says so."""
        length = self.manifest.get("max_length")
        return length if isinstance(length, int) else None

    @property
    def suite(self) -> Suite | None:
        """The tasks' own data, if the manifest has it.

        Raises:
            ValueError: it is in files that are not on this machine, as for what comes from the Hub.
        """
        data = self.manifest.get("data") or {}
        own = data if self.kind != "adapter" else {str(self.manifest.get("task")): data} if data else {}
        with named(self.folder / MANIFEST):
            for task, fields in own.items():
                kind(task, fields, dict)
                check_fields(f"data of {task}", fields, TaskData)
                for file in (fields[split] for split in SPLITS if isinstance(fields.get(split), str)):
                    if file.lower().endswith(FORMATS) and not (Path(file).is_absolute() and Path(file).is_file()):
                        raise ValueError(f"the data of {task!r}, {file}, are not here: name the rows with suite=")
            return {task: TaskData(**fields) for task, fields in own.items()} or None

    @cached_property
    def _masked(self) -> EMRAdapter:
        return EMRAdapter.from_pretrained(self.folder)

    def load(self, task: str, *, in_words: bool = False) -> tuple[PreTrainedModel, Any]:
        """(the model for this task in eval mode, its tokenizer).

        Args:
            in_words: the task is a TextTask, for causal language models alone.

        Raises:
            ValueError: no such task, a causal model for a task that needs a head or the reverse, or a base model
                without tokenizer.
        """
        if self.kind == "checkpoint":
            return self._full_model(task, in_words), self._tokenizer(str(self.folder))
        base = self.base_model or self.manifest.get("base_model")
        if self.kind == "emr":
            return self._masked.load(base or "", task), self._tokenizer(base or "")
        own = self.kind == "merged" and self.tasks and (not in_words or self.apart(task))
        adapter = load_adapter(self.folder, task=task if own else None)
        base = base or adapter.base_model or ""
        task_type = adapter.config.get("task_type")
        if task_type is not None and (task_type == "CAUSAL_LM") is not in_words:
            raise ValueError(_other_kind(self.name, task, in_words))
        tokenizer = self._tokenizer(base)
        return adapter.attach(base), tokenizer  # type: ignore[return-value]

    def apart(self, task: str) -> bool:
        """Whether the task has a model of its own: its head lies beside the merge, as for each task of an EMR merge."""
        return (self.folder / "heads" / f"{task}.safetensors").is_file()

    def _full_model(self, task: str, in_words: bool) -> PreTrainedModel:
        classes = AutoConfig.from_pretrained(self.folder).architectures or []
        if any("CausalLM" in name or "LMHead" in name for name in classes) is not in_words:
            raise ValueError(_other_kind(self.name, task, in_words))
        if in_words:
            return AutoModelForCausalLM.from_pretrained(self.folder).eval()
        if self.apart(task):
            return load_merged_checkpoint(self.folder, task)
        return AutoModelForSequenceClassification.from_pretrained(self.folder).eval()

    def _tokenizer(self, base: str) -> Any:
        try:
            return load_tokenizer(base)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"the model {base!r} has no tokenizer, so no row can be read: put its tokenizer files into the folder, "
                f"or name another with base_model=NAME ({str(error)[:150]})"
            ) from error


def subjects(source: str, base_model: str | None = None) -> list[Subject]:
    """What a folder or Hub id holds: one thing, or of a sweep one a scale, in the order of the scales.

    Raises:
        FileNotFoundError: no such folder or repository.
        ValueError: nothing in it can be scored, or its manifest is damaged.
    """
    scales = sorted(Path(source).glob("scale_*/"), key=_scale) if Path(source).is_dir() else []
    if scales and not read_manifest(source):
        return [_subject(f"{Path(source).name}/{folder.name}", folder, base_model) for folder in scales]
    folder = local_folder(source, ["*.json", "*.safetensors", "heads/*.safetensors", "tokenizer*", "vocab*", "*.txt"])
    return [_subject(Path(source).name, folder, base_model)]


def _subject(name: str, folder: Path, base_model: str | None) -> Subject:
    manifest = read_manifest(folder)
    model_card(manifest)  # a damaged manifest shows here
    known = ("adapter_config.json", "emr.safetensors", "config.json")
    if not any((folder / file).is_file() for file in known):
        raise ValueError(
            f"{folder} holds no adapter, merge or model (none of {', '.join(known)}): name the folder of one, or of a "
            "sweep's scale_* folders"
        )
    return Subject(name, folder, manifest, base_model)


def _scale(folder: Path) -> float:
    try:
        return float(folder.name.removeprefix("scale_"))
    except ValueError:
        return float("inf")


def _other_kind(name: str, task: str, in_words: bool) -> str:
    if in_words:
        return (
            f"{name} is no causal language model, and the rows of {task!r} are prompts and completions for one: give "
            "tasks of classes (suite packaged, or files with texts and labels), and no harness"
        )
    return (
        f"{name} is a causal language model, which has no head for the classes of {task!r}: give rows of prompt and "
        "completion (suite packaged-text, or files with these columns)"
    )
