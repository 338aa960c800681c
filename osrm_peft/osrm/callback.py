"""OSRMCallback: sets A when a Trainer is built, checks that no engine undid it, and logs what training does to it."""

import inspect
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import get_last_checkpoint

from osrm_peft.distributed import gather_parameter
from osrm_peft.hub.card import write_manifest
from osrm_peft.io.manifest import read_manifest
from osrm_peft.models.layers import lora_layers, unwrapped
from osrm_peft.osrm.config import OSRMLoraConfig
from osrm_peft.osrm.initialize import initialize_osrm_weights, load_out_of_task
from osrm_peft.osrm.others import OtherTasks
from osrm_peft.osrm.spectrum import PooledMoment
from osrm_peft.osrm.subspace import procrustes_drift

logger = logging.getLogger(__name__)

ROUNDING = 0.01  # of A's length: what an engine that computes in bfloat16 may round


class OSRMCallback(TrainerCallback):
    """Initialises a LoRA model made with `OSRMLoraConfig` for `Trainer(model, …, callbacks=[OSRMCallback()])`.

    * `on_init_end` sets A: before the optimizer exists and before any engine wraps or shards the model. Of several
      processes the main one chooses, and all write the same. With `Trainer(model_init=…)` it sets A of each model that
      a `train()`, or a trial of `hyperparameter_search`, begins with.
    * Before the first step it checks that the A in the model is the A that it wrote, and after it that A has not moved:
      while B = 0 it has no gradient, so an A that moved was restored from a copy that an engine took earlier.
    * To every training log (console, history, TensorBoard, W&B, …) it adds means over layers: `osrm/drift`, the
      Procrustes distance D/‖Ã‖ between A and its initial Ã (OSRM paper, Fig. 3), and `osrm/out_of_task_energy`,
      tr(A S_¬t Aᵀ) / tr S_¬t. The log history (`trainer_state.json`) has `osrm/drift/<layer>` besides.
    * When the Trainer pushes to the Hub, the card and `osrm_peft.json` are ours, with the last evaluation's scores.
    * On resume it checks nothing: the checkpoint's A has replaced the initial one, from which drift still counts.
      Where the features are gone by then, it does nothing at all.

    Args:
        adapter_name: the adapter to initialise.
        log_energy: log the out-of-task energy. Keeps for each distinct input the vectors (statistics `"mean"` and
            `"sample"`) or n×n float32 of S_¬t (`"token"`: 2.1 GB for q and v of 32 layers of width 4096).

    Raises:
        TypeError, ValueError: see `initialize_osrm_weights`.
        RuntimeError: at the first step, A is not the one that was written; or the processes have different A.
    """

    def __init__(self, adapter_name: str = "default", log_energy: bool = True) -> None:
        self.adapter_name, self.log_energy = adapter_name, log_energy
        self.missing: FileNotFoundError | None = None  # no features: an error, unless a run goes on from a checkpoint
        self.checked = False  # a second train() goes on from the trained A, unless it begins with a new model
        self.first_step = False  # in the first step of a fresh run
        self.initial: dict[str, Tensor] = {}  # {layer: (r, n) copy of Ã, float32 on the CPU}
        self.repo_id: Callable[[], str | None] = lambda: None
        self.pools: dict[str, PooledMoment] = {}  # {layer: the other tasks' pooled moments}

    def on_init_end(self, args, state, control, model=None, processing_class=None, **kwargs) -> None:
        """Set A."""
        handler = _caller(CallbackHandler)
        if handler is not None and self in handler.callbacks:
            # Before the callbacks that report to TensorBoard, W&B, …: these write what is in `logs` when they run. The
            # Trainer puts a user's callbacks last, and its list is out of reach otherwise.
            handler.callbacks.remove(self)
            handler.callbacks.insert(0, self)
        trainer = _caller(Trainer)
        if trainer is not None:  # its push would replace our card by its own, with the base model's local path
            self.repo_id = lambda: trainer.hub_model_id
            trainer.create_model_card = lambda *_, **__: self.on_push_begin(
                trainer.args, trainer.state, trainer.control, trainer.model
            )
            if trainer.model_init is not None:
                self._follow_model_init(trainer, processing_class)
        self._set_a(model, processing_class, args, state)

    def _follow_model_init(self, trainer: Trainer, processing_class: Any) -> None:
        """Each model that the Trainer makes later gets its A at once, before anything wraps it."""
        make = trainer.call_model_init

        def call_model_init(trial: Any = None) -> Any:
            model = make(trial)
            self._set_a(model, processing_class, trainer.args, trainer.state)
            return model

        trainer.call_model_init = call_model_init  # type: ignore[method-assign]

    def _set_a(self, model: Any, processing_class: Any, args: Any, state: Any) -> None:
        config = getattr(unwrapped(model), "peft_config", {}).get(self.adapter_name)
        if isinstance(config, OSRMLoraConfig):
            config.pushed = bool(args.push_to_hub)
        self.missing, self.checked, self.first_step, self.initial, self.pools = None, False, False, {}, {}
        progress = not args.disable_tqdm and state.is_local_process_zero
        try:
            initialize_osrm_weights(
                model, adapter_name=self.adapter_name, tokenizer=processing_class, progress=progress, distributed=True
            )
        except FileNotFoundError as error:
            if model.peft_config[self.adapter_name].freeze_a:  # a checkpoint of ZeRO-3 lacks a frozen A
                raise
            logger.warning("%s; without it only a run from a checkpoint can go on", error)
            self.missing = error
            return
        self.initial = self._current(model)
        if self.log_energy and state.is_world_process_zero:
            out, kept = OtherTasks(load_out_of_task(model, self.adapter_name)), {}
            for name in self.initial:
                if out.input_of(name) not in kept:
                    kept[out.input_of(name)] = out.pool(name).float()
                self.pools[name] = kept[out.input_of(name)]

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        """Going on from a checkpoint without the features: how A was chosen is in the checkpoint's manifest."""
        config = getattr(unwrapped(model), "peft_config", {}).get(self.adapter_name)
        last = get_last_checkpoint(args.output_dir) if self.missing is not None and state.global_step > 0 else None
        if last is not None and isinstance(config, OSRMLoraConfig) and not config.provenance:
            config.provenance = dict((read_manifest(last).get("osrm") or {}).get("provenance") or {})

    def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
        """Before the first step of a fresh run: is A still ours?"""
        if self.missing is not None:
            if state.global_step == 0:
                raise self.missing
            return
        if not self.initial:
            raise RuntimeError("OSRMCallback came too late to set A: pass it to Trainer(…, callbacks=[OSRMCallback()])")
        if state.global_step > 0 or self.checked:
            return
        self.checked = self.first_step = True
        for name, weight in self._weights(model).items():
            A, written = (
                gather_parameter(weight).float(),
                self.initial[name].to(weight.dtype).float(),
            )  # an engine may round it
            if not torch.equal(A, written):
                raise RuntimeError(
                    f"A of layer {name!r} is not the one that OSRM wrote (largest difference "
                    f"{(A - written).abs().max():.2e}): something re-initialised or overwrote the adapter between "
                    "Trainer(…) and train(). Build the Trainer last, and let nothing else write lora_A"
                )

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        """After the first step of a fresh run: weight decay apart, A may not have moved."""
        if not self.first_step:
            return
        self.first_step = False
        groups = [
            (group.get("initial_lr", group["lr"]), group.get("weight_decay", 0)) for group in optimizer.param_groups
        ]
        allowed = max(float(rate) * decay for rate, decay in groups) + ROUNDING
        for name, A in self._current(model).items():
            moved = float((A - self.initial[name]).norm() / self.initial[name].norm())
            if not moved <= allowed:
                raise RuntimeError(
                    f"A of layer {name!r} moved by {moved:.2g} of its length in the first step, {allowed:.2g} at most "
                    "was possible (while B = 0, A has no gradient): the engine restored another A, from a copy that it "
                    "took before OSRM's was written, or the optimizer adds noise. Build the model and the Trainer, "
                    "with OSRMCallback among its callbacks, before anything prepares the model "
                    "(accelerator.prepare, deepspeed.initialize)"
                )

    def on_log(self, args, state, control, logs=None, model=None, **kwargs) -> None:
        """Add drift and out-of-task energy to training logs."""
        if not logs or "loss" not in logs or not self.initial:
            return
        current = self._current(model)
        drift = {name: procrustes_drift(A, self.initial[name]) for name, A in current.items()}
        found = {"osrm/drift": sum(drift.values()) / len(drift)}
        if self.pools:
            energy = [self.pools[name].share(A) for name, A in current.items()]
            found["osrm/out_of_task_energy"] = sum(energy) / len(energy)
        logs.update(found)
        # The Trainer has copied `logs` into its history already. The layers go there only: a console line of them all
        # would drown the loss.
        state.log_history[-1].update(found | {f"osrm/drift/{name}": value for name, value in drift.items()})

    def on_push_begin(self, args, state, control, model=None, **kwargs) -> None:
        """Before a checkpoint is pushed: its card."""
        if state.is_world_process_zero:
            self._write_card(args, state, model)

    def _write_card(self, args, state, model) -> None:
        """Manifest and card into the output folder, with the scores of the last evaluation."""
        logs = ({name: one for name, one in log.items() if _is_score(name, one)} for log in reversed(state.log_history))
        found = next(filter(None, logs), {})
        scores = [
            {"task": "evaluation set", "metric": name.removeprefix("eval_"), "value": value}
            for name, value in found.items()
        ]
        model = unwrapped(model)
        config = model.peft_config[self.adapter_name]
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        more = {"scores": scores, "repo_id": self.repo_id(), "seed": args.seed}
        more["num_labels"] = getattr(model.config, "num_labels", None)
        kept = {name: value for name, value in more.items() if value not in (None, [])}
        write_manifest(args.output_dir, config.manifest() | kept)

    def _weights(self, model) -> dict[str, Tensor]:
        layers = lora_layers(model, self.adapter_name)
        return {name: layer.lora_A[self.adapter_name].weight for name, layer in layers.items()}

    def _current(self, model) -> dict[str, Tensor]:
        return {name: gather_parameter(weight).float() for name, weight in self._weights(model).items()}


def _is_score(name: str, value: Any) -> bool:
    measured = name.startswith("eval_") and not name.endswith(("_runtime", "_per_second", "_compilation_time"))
    return measured and isinstance(value, (int, float)) and math.isfinite(value)


def _caller(kind: type) -> Any:
    """The object of this class from whose method we were called; None where there is none."""
    frame = inspect.currentframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), kind):
        frame = frame.f_back
    return None if frame is None else frame.f_locals["self"]
