"""Setting A of a LoRA model to OSRM's directions; everything is checked before the first weight is touched."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from osrm_peft.config import OSRMLoraConfig
from osrm_peft.features import TaskFeatures
from osrm_peft.layers import linear_layer, lora_layers, unwrapped, weight_hash
from osrm_peft.subspace import choose_directions, energy_share

logger = logging.getLogger(__name__)


def initialize_osrm_weights(
    model: PeftModel,
    out_of_task: Sequence[TaskFeatures | str | Path] | None = None,
    *,
    in_task: TaskFeatures | str | Path | None = None,
    adapter_name: str = "default",
) -> dict[str, float]:
    """Set A of one LoRA adapter to the directions chosen by its `OSRMLoraConfig`. B must be 0: outputs do not change.

    Args:
        model: a PeftModel made by `get_peft_model(base, OSRMLoraConfig(…))`.
        out_of_task: features of the other tasks, loaded or as files; None: the config's `out_of_task`.
        in_task: the task's own features; None: the config's `in_task_features`.
        adapter_name: the adapter to set; no other is touched.

    Returns:
        {layer: tr(A S_¬t Aᵀ) / tr S_¬t}, the share of the other tasks' energy that A lets through.

    Raises:
        TypeError: not a PeftModel with an OSRMLoraConfig.
        ValueError: no features; features of another model, layer or width; B is not 0. Nothing was changed then.
    """
    model = unwrapped(model)
    config = _config_of(model, adapter_name)
    layers = lora_layers(model, adapter_name)
    if isinstance(out_of_task, (str, Path, TaskFeatures)):
        raise ValueError(f"out_of_task must be a list of features or files, got a {type(out_of_task).__name__}")
    others = [_load(features) for features in (config.out_of_task or [] if out_of_task is None else out_of_task)]
    own = config.in_task_features if in_task is None else in_task
    own_features = _load(own) if own is not None and config.needs_own_features else None
    _check_features(config, others, own_features)
    _check_layers(layers, adapter_name)
    for features in [*others, *([own_features] if own_features else [])]:
        features.check_fits(model, layers)

    directions, shares = {}, {}
    for name, layer in layers.items():
        moments = [features.layers[name] for features in others]
        directions[name] = choose_directions(
            moments,
            layer.r[adapter_name],
            generator=_generator(config.osrm_seed, name),
            own=own_features.layers[name] if own_features else None,
            null_space=config.null_space,
            in_task=config.in_task,
            in_task_weight=config.in_task_weight,
            ridge=config.ridge,
            reference=config.reference,
        )
        shares[name] = energy_share(directions[name], moments)

    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_A[adapter_name].weight.copy_(directions[name])
    if config.freeze_a:
        for layer in layers.values():
            layer.lora_A[adapter_name].weight.requires_grad_(False)
    config.provenance = {
        "out_of_task": [_describe(features) for features in others],
        "in_task": _describe(own_features) if own_features else None,
        "weight_hash": weight_hash(model, layers),
        "out_of_task_energy_share": shares,
    }
    logger.info(
        "OSRM set A of %d layers from the features of %s",
        len(layers),
        ", ".join(features.task for features in others),
    )
    return shares


def _config_of(model: PeftModel, adapter_name: str) -> OSRMLoraConfig:
    if not isinstance(model, PeftModel):
        raise TypeError(f"OSRM sets A of a PeftModel, got a {type(model).__name__}: call get_peft_model first")
    if adapter_name not in model.peft_config:
        raise ValueError(f"the model has no adapter {adapter_name!r}, only {', '.join(map(repr, model.peft_config))}")
    config = model.peft_config[adapter_name]
    if not isinstance(config, OSRMLoraConfig):
        raise TypeError(f"adapter {adapter_name!r} has a {type(config).__name__}: use an OSRMLoraConfig")
    return config


def _load(features: TaskFeatures | str | Path) -> TaskFeatures:
    return features if isinstance(features, TaskFeatures) else TaskFeatures.load(features)


def _check_features(config: OSRMLoraConfig, others: list[TaskFeatures], own: TaskFeatures | None) -> None:
    if not others:
        raise ValueError("no out-of-task features: give OSRMLoraConfig(out_of_task=[files of the other tasks])")
    if config.needs_own_features and own is None:
        raise ValueError(f"in_task={config.in_task!r}, null_space={config.null_space!r} need in_task features")
    tasks = [features.task for features in others]
    twice = sorted({task for task in tasks if tasks.count(task) > 1})
    if twice:
        raise ValueError(f"out_of_task names {', '.join(twice)} more than once: one features file a task")
    if own is not None and own.task in tasks:
        raise ValueError(f"task {own.task!r} is both in_task and out_of_task: leave it out of out_of_task")
    for features in [*others, *([own] if own else [])]:
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


def _check_layers(layers: dict[str, Any], adapter_name: str) -> None:
    if not layers:
        raise ValueError(f"adapter {adapter_name!r} adapts no layer")
    for name, layer in layers.items():
        linear_layer(name, layer)  # names a layer of another kind
        B = layer.lora_B[adapter_name].weight
        if B.is_meta:
            raise ValueError(f"lora_B of layer {name!r} has no data (meta device): make the model on a real device")
        if bool(B.detach().any()):
            raise ValueError(
                f"lora_B of layer {name!r} is not 0 (largest entry {B.detach().abs().max():.2e}), so a new A would "
                "change the model's outputs: OSRM sets A before training. To train a saved adapter on, leave OSRM out"
            )


def _generator(seed: int, layer: str) -> torch.Generator:
    """One stream a layer, whatever the order or number of the layers."""
    digest = hashlib.sha256(f"{seed}/{layer}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _describe(features: TaskFeatures) -> dict[str, object]:
    names = ("task", "base_model", "weight_hash", "statistic", "k", "seed", "reference")
    return {name: getattr(features, name) for name in names}
