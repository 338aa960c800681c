"""Setting A of a LoRA model to OSRM's directions; everything is checked before the first weight is touched."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm

from osrm_peft.devices import CPU, device_of
from osrm_peft.distributed import Processes, check_writable, gather_parameter, write_parameter
from osrm_peft.features.fit import check_model, check_other_tasks
from osrm_peft.features.task_features import TaskFeatures
from osrm_peft.models.fingerprint import hash_of, sampled_weights
from osrm_peft.models.layers import base_of, linear_layer, lora_layers, unwrapped
from osrm_peft.osrm.config import OSRMLoraConfig
from osrm_peft.osrm.others import OtherTasks, load_features, provenance_of
from osrm_peft.osrm.subspace import choose_directions, reference_directions
from osrm_peft.seeding import task_generator

logger = logging.getLogger(__name__)


def initialize_osrm_weights(
    model: PeftModel,
    out_of_task: Sequence[TaskFeatures | str | Path] | None = None,
    *,
    in_task: TaskFeatures | str | Path | None = None,
    adapter_name: str = "default",
    tokenizer: Any = None,
    progress: bool = False,
    distributed: bool = False,
) -> dict[str, float]:
    """Set A of one LoRA adapter to the directions chosen by its `OSRMLoraConfig`. B must be 0: outputs do not change.

    A of a layer is computed on the GPU that the layer is on, else on the CPU.

    Args:
        model: a PeftModel made by `get_peft_model(base, OSRMLoraConfig(…))`.
        out_of_task: features of the other tasks, loaded or as files; None: the config's `out_of_task`.
        in_task: the task's own features; None: the config's `in_task`.
        adapter_name: the adapter to set; no other is touched.
        tokenizer: that with which the adapter will be trained, to be compared with that of the features.
        distributed: all processes of torch.distributed call this, before an optimizer is built. The main one, on which
            alone the features are read, checks and chooses; each writes the same A. A model that an engine has split
            needs it.

    Returns:
        {layer: tr(A S_¬t Aᵀ) / tr S_¬t}, the share of the other tasks' energy that A lets through.

    Raises:
        TypeError: not a PeftModel with an OSRMLoraConfig.
        ValueError: no features; features of another model, layer, width or tokenizer; B is not 0. Nothing was changed
            then. Or a DeepSpeed optimizer holds the weights already, and would undo it.
        RuntimeError: the processes ended with different A.
    """
    model, processes = unwrapped(model), Processes.of(distributed)
    config = _config_of(model, adapter_name)
    layers = lora_layers(model, adapter_name)
    _check_layers(layers, adapter_name, config)
    for layer in layers.values():
        check_writable(layer.lora_A[adapter_name].weight)
    features = _Features(config, model, adapter_name, layers)
    sampled = sampled_weights(model, *processes.broadcast_from_main(partial(features.load, out_of_task, in_task)))
    provenance = processes.broadcast_from_main(partial(features.check, tokenizer, sampled))
    # One broadcast a layer: of a large model all layers take longer than a process group waits.
    bar = tqdm(layers, desc="OSRM", unit="layer", disable=not progress)
    chosen = {name: processes.broadcast_from_main(partial(features.choose, name)) for name in bar}
    for name, layer in layers.items():
        write_parameter(layer.lora_A[adapter_name].weight, chosen[name][0])
        if config.freeze_a:
            layer.lora_A[adapter_name].weight.requires_grad_(False)
    _check_alike(layers, adapter_name, processes)
    provenance["out_of_task_energy_share"] = {name: share for name, (_, share) in chosen.items()}
    config.provenance = provenance
    tasks = ", ".join(one["task"] for one in provenance["out_of_task"])
    logger.info("OSRM set A of %d layers from the features of %s", len(layers), tasks)
    return provenance["out_of_task_energy_share"]


class _Features:
    """The features of one choice of A. The main process alone loads them, checks them and chooses."""

    def __init__(self, config: OSRMLoraConfig, model: PeftModel, adapter_name: str, layers: dict[str, Any]) -> None:
        self.config, self.model, self.adapter_name, self.layers = config, model, adapter_name, layers
        self.own: TaskFeatures | None = None
        self.others = OtherTasks([])

    def load(self, out_of_task: Any, in_task: Any) -> tuple[list[str], set[int]]:
        """Read them; the layers and numbers of embedding rows whose weights are to be sampled."""
        others, self.own = _load(self.model, self.adapter_name, self.config, out_of_task, in_task)
        self.others = OtherTasks(others)
        known = dict(base_of(self.model).named_modules())
        names = dict.fromkeys([*self.layers, *(name for one in self._all() for name in one.layers)])
        # an unknown name is an error of `check`
        return [name for name in names if name in known], {rows for one in self._all() for rows in one.rows()}

    def check(self, tokenizer: Any, sampled: Mapping[str | int, bytes]) -> dict[str, Any]:
        """Do they fit the model and the tokenizer? Returns the provenance."""
        for features in self._all():
            check_model(features, self.model, self.layers, tokenizer, sampled)
        return {
            "out_of_task": [provenance_of(features) for features in self.others.features],
            "in_task": provenance_of(self.own) if self.own else None,
            "weight_hash": hash_of(sampled, self.layers),
        }

    def choose(self, name: str) -> tuple[Tensor, float]:
        """(r, n) float32 A of a layer, and the share of the others' energy that it lets through."""
        layer = self.layers[name]
        device = device_of(layer.lora_A[self.adapter_name].weight)
        arguments = self.config, self.others, self.own, layer.r[self.adapter_name], name
        try:
            A, share = _choose(*arguments, device)
        except torch.OutOfMemoryError:
            logger.warning("%s has too little memory to choose A of layer %s: the CPU does", device, name)
            A, share = _choose(*arguments, CPU)
        return A.float().cpu(), share

    def _all(self) -> list[TaskFeatures]:
        return [*self.others.features, *([self.own] if self.own else [])]


def _load(
    model: PeftModel,
    adapter_name: str,
    config: OSRMLoraConfig,
    out_of_task: Sequence[TaskFeatures | str | Path] | None,
    in_task: TaskFeatures | str | Path | None,
) -> tuple[list[TaskFeatures], TaskFeatures | None]:
    """The other tasks' features and the task's own, where the config looks at them; checked against the config."""
    if isinstance(out_of_task, (str, Path, TaskFeatures)):
        raise ValueError(f"out_of_task must be a list of features or files, got a {type(out_of_task).__name__}")
    others = (
        load_out_of_task(model, adapter_name) if out_of_task is None else [load_features(one) for one in out_of_task]
    )
    if in_task is not None and not config.needs_own_features:
        raise ValueError(
            f"objective={config.objective!r}, null_space={config.null_space!r} do not look at the task's own features: "
            "leave in_task out, or choose another of these in the config"
        )
    own = config.in_task if in_task is None else in_task
    own_features = load_features(own) if own is not None and config.needs_own_features else None
    _check_features(config, others, own_features)
    return others, own_features


def load_out_of_task(model: PeftModel, adapter_name: str = "default") -> list[TaskFeatures]:
    """The features that the adapter's `OSRMLoraConfig` names; raises as `initialize_osrm_weights` does."""
    return [load_features(source) for source in _config_of(unwrapped(model), adapter_name).out_of_task or []]


def _choose(
    config: OSRMLoraConfig, out: OtherTasks, own: TaskFeatures | None, r: int, name: str, device: torch.device
) -> tuple[Tensor, float]:
    """(r, n) float64, one layer's A as the config says, and the share of the others' energy that it lets through.

    It is computed on the device; the released code's choice on the CPU, for it is LAPACK's where directions are free.
    """
    moments, pool, spectrum = out.at(name, CPU if config.reference else device)
    if config.reference:
        A = reference_directions(moments, r)
        return A, pool.share(A)
    A = choose_directions(
        spectrum,
        r,
        generator=task_generator(config.osrm_seed, out.task if own is None else own.task, name),
        own=None if own is None else own.layers[name].to(device),
        null_space=config.null_space,
        objective=config.objective,
        in_task_weight=config.in_task_weight,
        ridge=config.ridge,
        protect_rank=config.protect_rank,
        protect_energy=config.protect_energy,
    )
    return A, pool.share(A)


def _config_of(model: PeftModel, adapter_name: str) -> OSRMLoraConfig:
    if not isinstance(model, PeftModel):
        raise TypeError(f"OSRM sets A of a PeftModel, got a {type(model).__name__}: call get_peft_model first")
    if adapter_name not in model.peft_config:
        raise ValueError(f"the model has no adapter {adapter_name!r}, only {', '.join(map(repr, model.peft_config))}")
    config = model.peft_config[adapter_name]
    if not isinstance(config, OSRMLoraConfig):
        raise TypeError(f"adapter {adapter_name!r} has a {type(config).__name__}: use an OSRMLoraConfig")
    return config


def _check_features(config: OSRMLoraConfig, others: list[TaskFeatures], own: TaskFeatures | None) -> None:
    check_other_tasks(others, own)
    if config.needs_own_features and own is None:
        raise ValueError(
            f"null_space={config.null_space!r}, objective={config.objective!r} look at the task's own features: give "
            "OSRMLoraConfig(in_task=FILE), or objective='least_energy', null_space='random' for the paper's choice"
        )
    features = others[0]  # the others and the own ones are alike
    if features.statistic != config.statistic:
        raise ValueError(
            f"the features of task {features.task!r} hold the statistic {features.statistic!r}, the config asks "
            f"for {config.statistic!r}: collect them again, or set statistic={features.statistic!r}"
        )
    if features.reference != config.reference:
        raise ValueError(
            f"the features of task {features.task!r} were collected with reference={features.reference}, "
            f"the config has reference={config.reference}: the two must agree"
        )


def _check_layers(layers: dict[str, Any], adapter_name: str, config: OSRMLoraConfig) -> None:
    if not layers:
        raise ValueError(f"adapter {adapter_name!r} adapts no layer")
    for name, layer in layers.items():
        linear_layer(name, layer)  # names a layer of another kind
        if layer.lora_B[adapter_name].weight.is_meta:
            raise ValueError(f"lora_B of layer {name!r} has no data (meta device): make the model on a real device")
        B = gather_parameter(layer.lora_B[adapter_name].weight)
        if bool(B.any()):
            if config.init_lora_weights not in (True, "gaussian"):
                raise ValueError(
                    f"init_lora_weights={config.init_lora_weights!r} sets B: leave it at its default, OSRM sets A and "
                    "needs B = 0"
                )
            raise ValueError(
                f"lora_B of layer {name!r} is not 0 (largest entry {B.abs().max():.2e}), so a new A would "
                "change the model's outputs: OSRM sets A before training. To train a saved adapter on, leave OSRM out"
            )


def _check_alike(layers: dict[str, Any], adapter_name: str, processes: Processes) -> None:
    digest = hashlib.sha256()
    for layer in layers.values():
        digest.update(gather_parameter(layer.lora_A[adapter_name].weight).float().numpy().tobytes())
    found = processes.gather(digest.hexdigest()[:16])
    if len(set(found)) > 1:
        raise RuntimeError(f"the processes ended with different A ({', '.join(found)}): do they have the same adapter?")
