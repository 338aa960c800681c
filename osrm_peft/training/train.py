"""One task, one adapter: thin over `transformers.Trainer`."""

import copy
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import CONFIG_NAME
from torch import Tensor
from transformers import (
    DataCollatorWithPadding,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from osrm_peft.checks import printable
from osrm_peft.distributed import gather_parameter
from osrm_peft.hub.card import write_manifest
from osrm_peft.io.json import read_object, write_json
from osrm_peft.io.manifest import check_replaceable, command, new_folder, read_manifest, versions
from osrm_peft.io.places import check_folder
from osrm_peft.models.identity import located
from osrm_peft.models.loading import load_base, load_causal, load_tokenizer
from osrm_peft.osrm.callback import OSRMCallback
from osrm_peft.osrm.config import OSRMLoraConfig
from osrm_peft.seeding import task_seed
from osrm_peft.tasks.task import Task, tokenize
from osrm_peft.tasks.text import TextTask, tokenize_labelled

# The OSRM paper's settings (§5.1 and Table 10), except the learning rate, which depends on model, task and init.
PAPER_LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "task_type": "SEQ_CLS"}
PAPER_TRAINING: dict[str, Any] = {
    "optim": "adamw_torch",
    "learning_rate": 4e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.06,  # below 1: a share of all steps
    "weight_decay": 0.0,
    "per_device_train_batch_size": 64,
    "num_train_epochs": 10,
}


def train_task(
    task: Task,
    output_dir: str | Path,
    *,
    lora: LoraConfig,
    model: str = "packaged",
    training: dict[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    max_length: int = 128,
    packing: bool = False,
    seed: int = 42,
    made_from: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Train one adapter on one task and save it with its head as a stock PEFT adapter folder.

    A TextTask trains a causal language model by TRL's `SFTTrainer`, on the loss of the completions.

    Args:
        task: the rows; its validation split is scored at the end of each epoch where `training` asks for it.
        output_dir: the adapter folder. Checkpoints, if `save_strategy` asks for them, lie beside it until the end
            (`<output_dir>.checkpoints`); an interrupted run goes on from the last.
        lora: the adapter's LoraConfig; with an `OSRMLoraConfig`, `OSRMCallback` sets A. It is not changed.
        model: Hub id, folder, or `"packaged"`.
        training: `transformers.TrainingArguments`, over the paper's settings (`PAPER_TRAINING`).
        callbacks: more callbacks for the Trainer.
        max_length, packing: tokens a row is cut to; of a TextTask, rows share batches without padding, as TRL packs.
        seed: of the order of rows and the dropout and, mixed with the task's name, of head and A.
        made_from: goes into the manifest, so that a recipe knows its adapter again.
        overwrite: replace an earlier adapter in `output_dir`.
        progress: show a bar, with the task's name and the loss.

    Returns:
        The adapter folder, with `osrm_peft.json` (how it was made, and the training log) in it.

    Raises:
        FileExistsError: `output_dir` holds something that we did not write, or an adapter without `overwrite`.
        ValueError, TypeError: from the config's checks, before training starts.
    """
    output_dir = Path(output_dir)
    check_replaceable(output_dir, "adapter")
    if output_dir.is_dir() and any(output_dir.iterdir()) and not overwrite:
        raise FileExistsError(f"{output_dir} holds a trained adapter: pass overwrite=True to train it anew")
    checkpoints = check_folder(output_dir.with_name(output_dir.name + ".checkpoints"))
    fields = _training_fields(training or {}, isinstance(task, TextTask))
    given = {"disable_tqdm": not progress} | fields | {"output_dir": str(checkpoints), "seed": seed}
    args = _arguments(given, max_length if isinstance(task, TextTask) else None, packing)
    trainer = _trainer(task, args, lora, model, callbacks, max_length)
    peft_model: Any = trainer.model  # before an engine wraps it
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None)
    weights = whole_adapter(peft_model)
    if trainer.is_world_process_zero():
        made = {"base_model": model, "max_length": max_length, "seed": seed, "training": fields}
        made |= ({"packing": True} if packing else {}) | ({"made_from": dict(made_from)} if made_from else {})
        _save(peft_model, weights, task, output_dir, made | {"log": trainer.state.log_history})
        shutil.rmtree(checkpoints, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return output_dir


def _arguments(fields: dict[str, Any], max_length: int | None, packing: bool) -> TrainingArguments:
    """The Trainer's arguments; with a length those of TRL's SFTTrainer."""
    if max_length is None:
        if packing:
            raise ValueError("packing is of rows of prompt and completion: leave it out")
        return TrainingArguments(**fields)
    try:
        from trl import SFTConfig
    except ImportError as error:
        raise ImportError("causal language models are trained by TRL: pip install 'osrm_peft[text]'") from error
    return SFTConfig(max_length=max_length, packing=packing, **fields)


def _training_fields(training: dict[str, Any], in_words: bool) -> dict[str, Any]:
    """The fields of TrainingArguments: these over the paper's, and what this machine and launch need."""
    fields = PAPER_TRAINING | {"report_to": "none", "save_strategy": "no", "logging_steps": 10} | training
    fields.setdefault("dataloader_pin_memory", torch.cuda.is_available())  # without a GPU torch warns of it
    if in_words:  # SFTConfig's own defaults of both are True
        fields = {"bf16": False} | fields
        new = "activation_checkpointing"  # its name in newer versions of transformers
        names = [name for name in (new, "gradient_checkpointing") if name in TrainingArguments.__dataclass_fields__]
        fields = ({} if set(names) & set(fields) else {names[0]: False}) | fields
    else:  # under several processes the default multiplies the loss by their number
        fields.setdefault("average_tokens_across_devices", False)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        fields.setdefault("use_cpu", True)  # else DeepSpeed wants a GPU
    return fields


def _trainer(
    task: Task,
    args: TrainingArguments,
    lora: LoraConfig,
    model: str,
    callbacks: Sequence[TrainerCallback],
    max_length: int,
) -> Trainer:
    """The Trainer of one adapter on its base model."""
    set_seed(task_seed(args.seed, task.name))
    tokenizer = load_tokenizer(model)
    # ZeRO-3 wants one dtype: PEFT then leaves the adapter in the base's, and DeepSpeed trains its own float32 copy.
    zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    in_words = isinstance(task, TextTask)
    base = load_causal(model) if in_words else load_base(model, task.num_labels, label_names=task.label_names)
    peft_model = get_peft_model(base, copy.deepcopy(lora), autocast_adapter_dtype=not zero3)
    more: dict[str, Any] = {"data_collator": DataCollatorWithPadding(tokenizer)}
    trainer_class: type[Trainer] = Trainer
    read = tokenize
    if in_words:
        from trl import SFTTrainer

        trainer_class, read, more = SFTTrainer, tokenize_labelled, {}  # whose collator pads labels
    trainer = trainer_class(
        peft_model,
        args,
        train_dataset=read(task.train, tokenizer, max_length),
        eval_dataset=read(task.validation, tokenizer, max_length),
        processing_class=tokenizer,
        callbacks=[*([OSRMCallback()] if isinstance(lora, OSRMLoraConfig) else []), *callbacks],
        **more,
    )
    trainer.remove_callback(PrinterCallback)  # with disable_tqdm the Trainer prints every log; ours go to the manifest
    if any(type(one) is ProgressCallback for one in trainer.callback_handler.callbacks):  # a notebook has another
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_TaskBar(task.name))
    return trainer


class _TaskBar(ProgressCallback):
    """The Trainer's bar with the task's name before it and the last loss behind it, in the place of printed logs."""

    def __init__(self, task: str) -> None:
        super().__init__()
        self.task = printable(task)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(f"train {self.task}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        shown = {name: float(logs[name]) for name in ("loss", "eval_loss") if name in (logs or {})}
        if self.training_bar is not None and shown:
            self.training_bar.set_postfix({name: f"{value:.4f}" for name, value in shown.items()})


def _save(model: PeftModel, weights: dict[str, Tensor], task: Task, output_dir: Path, made: dict[str, Any]) -> None:
    """Write the adapter's folder; its manifest has the fields of `made`."""
    with new_folder(output_dir, "adapter") as folder:
        model.save_pretrained(str(folder), state_dict=weights)
        config = read_object(folder / CONFIG_NAME)
        write_json(folder / CONFIG_NAME, config | {"base_model_name_or_path": located(model.name_or_path)})
        manifest = read_manifest(folder) | {  # which holds an OSRMLoraConfig's provenance
            "kind": "adapter",
            "base_model": made["base_model"],
            "task_type": config["task_type"],
            "task": task.name,
            "num_labels": task.num_labels,
            "metric": task.metric,
            "train_rows": len(task.train),
            **({"label_names": list(task.label_names)} if task.label_names else {}),
            **({"data": task.data} if task.data else {}),
            **made,
            "command": command(),
            "versions": versions(),
        }
        write_manifest(folder, manifest)


def whole_adapter(model: PeftModel) -> dict[str, Tensor]:
    """The `state_dict` that `model.save_pretrained` needs, of a model that an engine may have split.

    Every process must call it. (The Trainer's own save leaves a frozen A out under ZeRO-3.)
    """
    tensors = model.state_dict(keep_vars=True)  # the parameters themselves know how they are split
    return {
        name: gather_parameter(tensor)
        for name, tensor in tensors.items()
        if tensor.requires_grad or "lora_" in name or "modules_to_save" in name
    }
