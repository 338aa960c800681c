"""What `accelerate launch` runs in each process of the engine tests: `worker.py FOLDER PHASE…`.

`features` collects the features of two tasks; `killed` trains an adapter and kills itself with SIGKILL in the middle,
after a checkpoint; `resumed` goes on from there; `whole` trains another in one go, from the same seed.
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from accelerate.state import DistributedType, PartialState
from transformers import TrainerCallback, TrainingArguments

import osrm_peft.training
from osrm_peft.distributed import start, whole
from osrm_peft.layers import lora_layers
from osrm_peft.recipe import Recipe
from osrm_peft.training import train_task

STEPS, CHECKPOINT, KILLED = 4, 2, 3
SAMPLES = {"questions": 5, "tweets": 1}  # in 2 processes: a short batch, and a process without a sample


class Arguments(TrainingArguments):
    """FSDP on a CPU: accelerate has it, but chooses it for GPUs only."""

    def __post_init__(self):
        super().__post_init__()
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            assert self.device.type == "cpu"  # reading it sets the state up
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


class Watch(TrainerCallback):
    """Writes what is being run and A as the training finds it; kills the process in the middle."""

    def __init__(self, folder, phase):
        self.folder, self.phase = folder, phase

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step in (0, CHECKPOINT) and not hasattr(self, "began"):
            self.began = state.global_step
            weights = {name: layer.lora_A["default"].weight for name, layer in lora_layers(model, "default").items()}
            shapes = [list(getattr(weight, "to_local", lambda w=weight: w)().shape) for weight in weights.values()]
            found = {name: whole(weight).float().tolist() for name, weight in weights.items()}
            about = {"began": state.global_step, "world_size": args.world_size, "engine": engine_of(model, optimizer)}
            about |= {"local_shape": shapes[0], "shape": list(whole(next(iter(weights.values()))).shape), "A": found}
            write(self.folder / f"{self.phase}.{args.process_index}.json", about)

    def on_step_end(self, args, state, control, **kwargs):
        if self.phase == "killed" and state.global_step == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)


def engine_of(model, optimizer):
    """The name of the engine that really runs, from what it made of the model and the optimizer."""
    names = [type(thing).__name__ for thing in (model, optimizer, getattr(optimizer, "optimizer", None))]
    return " ".join(names)


def write(path, content):
    path.write_text(json.dumps(content))


def main():
    folder, phases = Path(sys.argv[1]), sys.argv[2:]
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    processes = start()
    osrm_peft.training.TrainingArguments = Arguments
    batch = 8 // processes.count
    training = {"max_steps": STEPS, "per_device_train_batch_size": batch, "save_strategy": "steps"}
    training |= {
        "save_steps": CHECKPOINT,
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "learning_rate": 1e-3,
    }
    training |= json.loads(os.environ.get("TRAINING", "{}"))
    recipe = Recipe(
        model=os.environ["MODEL"],
        suite="packaged",
        tasks=list(SAMPLES),
        lora={"target_modules": ["query", "value"]},
        osrm={"null_space": "random", "protect": None} | json.loads(os.environ.get("OSRM", "{}")),
        features=str(folder / "features"),
        training=training,
        max_length=32,
        train_rows=64,
        validation_rows=16,
    )
    for phase in phases:
        if phase == "features":
            base = recipe.base()
            for name, k in SAMPLES.items():
                found = replace(recipe, k=k).collect(name, base=base, progress=False, distributed=True)
                processes.from_main(lambda found=found: found.save(recipe.features_file(found.task)))
            write(folder / f"features.{processes.rank}.json", {"base": type(base).__name__})
            continue
        out = folder / ("cut" if phase in ("killed", "resumed") else phase)
        train_task(
            recipe.task("questions"),
            out,
            lora=recipe.lora_config("questions"),
            model=recipe.model,
            training=training,
            callbacks=[Watch(folder, phase)],
            max_length=32,
        )


if __name__ == "__main__":
    main()
