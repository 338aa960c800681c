"""What `accelerate launch` runs in each process of the engine tests: `worker.py FOLDER PHASE…`.

`features` is the command of that name; `killed` trains an adapter and kills itself with SIGKILL in the middle, after a
checkpoint; `resumed` goes on from there; `whole` trains another in one go, from the same seed; `late` has A written
too late, after the engine has taken its copy.
"""

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch
import transformers
from accelerate.state import DistributedType, PartialState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import TrainerCallback, TrainingArguments

import osrm_peft.training.train
from osrm_peft import initialize_osrm_weights
from osrm_peft.cli.main import main as command
from osrm_peft.distributed import gather_parameter, start
from osrm_peft.models.layers import lora_layers
from osrm_peft.models.loading import load_base
from osrm_peft.training.recipe import Recipe
from osrm_peft.training.train import train_task

STEPS, CHECKPOINT, KILLED = 4, 2, 3


class Arguments(TrainingArguments):
    """FSDP on a CPU: accelerate has it, but chooses it for GPUs only."""

    def __post_init__(self):
        super().__post_init__()
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            assert self.device.type == "cpu"  # reading it sets the state up
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def a_of(model):
    return {name: layer.lora_A["default"].weight for name, layer in lora_layers(model, "default").items()}


class Watch(TrainerCallback):
    """Writes what really runs, and A as the training finds it; kills the process in the middle."""

    def __init__(self, folder, phase):
        self.folder, self.phase, self.began = folder, phase, False

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self.began:
            return
        self.began = True
        engine = [type(thing).__name__ for thing in (model, optimizer, getattr(optimizer, "optimizer", None))]
        weights = a_of(model)
        first = next(iter(weights.values()))
        local = first.to_local() if hasattr(first, "to_local") else first
        about = {"step": state.global_step, "world_size": args.world_size, "engine": " ".join(engine)}
        about |= {"local": list(local.shape), "A": {name: gather_parameter(A).tolist() for name, A in weights.items()}}
        (self.folder / f"{self.phase}.{args.process_index}.json").write_text(json.dumps(about))

    def on_step_end(self, args, state, control, **kwargs):
        if self.phase == "killed" and state.global_step == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)


class Late(TrainerCallback):
    """The engine finds another A when it is built, and OSRM's is written after that."""

    def on_init_end(self, args, state, control, model=None, **kwargs):
        self.written = {name: gather_parameter(A) for name, A in a_of(model).items()}
        with torch.no_grad():
            for A in a_of(model).values():
                A.copy_(A.flip(0))

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        try:
            initialize_osrm_weights(model, distributed=True)
            self.refused = ""
        except ValueError as error:
            self.refused = str(error)
        with torch.no_grad():
            for name, A in a_of(model).items():
                A.copy_(self.written[name])


def collect_split(recipe, folder):
    """The features on a model that FSDP2 has split (the command chooses FSDP2 on GPUs only)."""
    processes, base = start(), load_base(recipe.model, 2)
    mesh = init_device_mesh("cpu", (processes.num_processes,))
    for block in base.bert.encoder.layer:
        fully_shard(block, mesh=mesh)
    base = fully_shard(base, mesh=mesh)
    assert base.bert.embeddings.word_embeddings.weight.to_local().shape[0] < base.config.vocab_size
    for name in recipe.task_names():
        found = recipe.collect(name, base=base, progress=False, distributed=True)
        path = folder / f"features/{name}.features.safetensors"
        processes.broadcast_from_main(partial(found.save, path))


def main():
    folder, phases = Path(sys.argv[1]), sys.argv[2:]
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    osrm_peft.training.train.TrainingArguments = Arguments
    recipe = Recipe.from_yaml(folder / "recipe.yaml")
    training = recipe.training | {"per_device_train_batch_size": 8 // int(os.environ.get("WORLD_SIZE", "1"))}
    training |= {"max_steps": STEPS, "save_strategy": "steps", "save_steps": CHECKPOINT, "logging_steps": 1}
    for phase in phases:
        if phase == "features" and os.environ.get("ACCELERATE_USE_FSDP") == "true":
            collect_split(recipe, folder)
            continue
        if phase == "features":
            sys.argv[1:] = ["features", "--config", str(folder / "recipe.yaml"), "--out", str(folder / "features")]
            try:
                command()
            except SystemExit as stopped:
                assert not stopped.code
            continue
        late = Late()
        callbacks = [Watch(folder, phase), *([late] if phase == "late" else [])]
        try:
            train_task(
                recipe.task("questions"),
                folder / ("cut" if phase in ("killed", "resumed") else phase),
                lora=recipe.lora_config("questions"),
                model=recipe.model,
                training=training,
                callbacks=callbacks,
                max_length=recipe.max_length,
            )
        except RuntimeError as error:
            if phase != "late":
                raise
            (folder / f"late.{os.environ['RANK']}.txt").write_text(f"{error}\n{late.refused}")


if __name__ == "__main__":
    main()
    if torch.distributed.is_initialized():  # else a thread of gloo may outlive its process, which then aborts
        torch.distributed.destroy_process_group()
