"""OSRMCallback: sets A when a Trainer is built, checks that no engine undid it, and logs how far A drifts."""

import logging

import torch
from torch import Tensor
from transformers import TrainerCallback

from osrm_peft.initialization import initialize_osrm_weights
from osrm_peft.layers import lora_layers
from osrm_peft.subspace import procrustes_drift

logger = logging.getLogger(__name__)


class OSRMCallback(TrainerCallback):
    """Initialises a LoRA model made with `OSRMLoraConfig` for `Trainer(model, …, callbacks=[OSRMCallback()])`.

    * `on_init_end` sets A: before the optimizer exists and before any engine wraps or shards the model.
    * At the first step it checks that the A in the model is the A that it wrote.
    * To every training log it adds `osrm/drift`, the Procrustes distance D/‖Ã‖ between A and its initial Ã, mean
      over layers (OSRM paper, Fig. 3), and to the log history (`trainer_state.json`) `osrm/drift/<layer>` besides.
    * On resume it checks nothing: the checkpoint's A has replaced the initial one, from which drift still counts.

    Args:
        adapter_name: the adapter to initialise.

    Raises:
        TypeError, ValueError: see `initialize_osrm_weights`.
        RuntimeError: at the first step, A is not the one that was written.
    """

    def __init__(self, adapter_name: str = "default") -> None:
        self.adapter_name = adapter_name
        self.checked = False  # a second train() goes on from the trained A
        self.initial: dict[str, Tensor] = {}  # {layer: (r, n)} copy of Ã, float32 on the CPU

    def on_init_end(self, args, state, control, model=None, **kwargs) -> None:
        """Set A."""
        initialize_osrm_weights(model, adapter_name=self.adapter_name)
        self.initial = self._current(model)

    def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
        """Before the first step of a fresh run: is A still ours?"""
        if not self.initial:
            raise RuntimeError("OSRMCallback came too late to set A: pass it to Trainer(…, callbacks=[OSRMCallback()])")
        if state.global_step > 0 or self.checked:
            return
        self.checked = True
        for name, A in self._current(model).items():
            if not torch.equal(A, self.initial[name]):
                raise RuntimeError(
                    f"A of layer {name!r} is not the one that OSRM wrote (largest difference "
                    f"{(A - self.initial[name]).abs().max():.2e}): something re-initialised or overwrote the adapter "
                    "between Trainer(…) and train(). Build the Trainer last, and let nothing else write lora_A"
                )

    def on_log(self, args, state, control, logs=None, model=None, **kwargs) -> None:
        """Add the drift to training logs."""
        if not logs or "loss" not in logs:
            return
        drift = {name: procrustes_drift(A, self.initial[name]) for name, A in self._current(model).items()}
        logs["osrm/drift"] = sum(drift.values()) / len(drift)
        # The Trainer has copied `logs` into its history already. The layers go there only: a console line of them all
        # would drown the loss.
        state.log_history[-1]["osrm/drift"] = logs["osrm/drift"]
        state.log_history[-1].update({f"osrm/drift/{name}": value for name, value in drift.items()})

    def _current(self, model) -> dict[str, Tensor]:
        layers = lora_layers(model, self.adapter_name)
        return {
            name: layer.lora_A[self.adapter_name].weight.detach().to("cpu", torch.float32, copy=True)
            for name, layer in layers.items()
        }
