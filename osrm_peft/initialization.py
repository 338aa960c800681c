"""Setting A of a LoRA model to OSRM's directions; everything is checked before the first weight is touched."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm

from osrm_peft.config import OSRMLoraConfig
from osrm_peft.features import TaskFeatures
from osrm_peft.layers import linear_layer, lora_layers, unwrapped, weight_hash
from osrm_peft.moments import FeatureMoments
from osrm_peft.spectrum import Pool, Spectrum
from osrm_peft.subspace import choose_directions, reference_directions

logger = logging.getLogger(__name__)


def initialize_osrm_weights(
    model: PeftModel,
    out_of_task: Sequence[TaskFeatures | str | Path] | None = None,
    *,
    in_task: TaskFeatures | str | Path | None = None,
    adapter_name: str = "default",
    tokenizer: Any = None,
    progress: bool = False,
) -> dict[str, float]:
    """Set A of one LoRA adapter to the directions chosen by its `OSRMLoraConfig`. B must be 0: outputs do not change.

    Args:
        model: a PeftModel made by `get_peft_model(base, OSRMLoraConfig(…))`.
        out_of_task: features of the other tasks, loaded or as files; None: the config's `out_of_task`.
        in_task: the task's own features; None: the config's `in_task_features`.
        adapter_name: the adapter to set; no other is touched.
        tokenizer: that with which the adapter will be trained, to be compared with that of the features.

    Returns:
        {layer: tr(A S_¬t Aᵀ) / tr S_¬t}, the share of the other tasks' energy that A lets through.

    Raises:
        TypeError: not a PeftModel with an OSRMLoraConfig.
        ValueError: no features; features of another model, layer, width or tokenizer; B is not 0. Nothing was changed
            then.
    """
    model = unwrapped(model)
    config = _config_of(model, adapter_name)
    layers = lora_layers(model, adapter_name)
    if isinstance(out_of_task, (str, Path, TaskFeatures)):
        raise ValueError(f"out_of_task must be a list of features or files, got a {type(out_of_task).__name__}")
    others = (
        load_out_of_task(model, adapter_name) if out_of_task is None else [load_features(one) for one in out_of_task]
    )
    if in_task is not None and not config.needs_own_features:
        raise ValueError(
            f"in_task={config.in_task!r}, null_space={config.null_space!r} do not look at the task's own features: "
            "leave in_task out, or choose another of these in the config"
        )
    own = config.in_task_features if in_task is None else in_task
    own_features = load_features(own) if own is not None and config.needs_own_features else None
    _check_features(config, others, own_features)
    _check_layers(layers, adapter_name, config)
    for features in [*others, *([own_features] if own_features else [])]:
        features.check_fits(model, layers, tokenizer)

    directions, shares = {}, {}
    out = OutOfTask(others)
    for name, layer in tqdm(layers.items(), desc="OSRM", unit="layer", disable=not progress):
        directions[name], shares[name] = _choose(config, out, own_features, layer.r[adapter_name], name)

    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_A[adapter_name].weight.copy_(directions[name])
    if config.freeze_a:
        for layer in layers.values():
            layer.lora_A[adapter_name].weight.requires_grad_(False)
    config.provenance = {
        "out_of_task": [describe(features) for features in others],
        "in_task": describe(own_features) if own_features else None,
        "weight_hash": weight_hash(model, layers),
        "out_of_task_energy_share": shares,
    }
    logger.info(
        "OSRM set A of %d layers from the features of %s",
        len(layers),
        ", ".join(features.task for features in others),
    )
    return shares


def load_out_of_task(model: PeftModel, adapter_name: str = "default") -> list[TaskFeatures]:
    """The features that the adapter's `OSRMLoraConfig` names; raises as `initialize_osrm_weights` does."""
    return [load_features(source) for source in _config_of(unwrapped(model), adapter_name).out_of_task or []]


class OutOfTask:
    """The other tasks' moments, layer by layer; layers with the same input, one after another, share what is made."""

    def __init__(self, features: Sequence[TaskFeatures]) -> None:
        self.features, self._inputs = features, [one.same_input() for one in features]
        self._last: tuple[tuple[str, ...], list[FeatureMoments], Pool, Spectrum] | None = None

    def input_of(self, name: str) -> tuple[str, ...]:
        """What tells the layer's input from others."""
        return tuple(same_input[name] for same_input in self._inputs)

    def pool(self, name: str) -> Pool:
        """The tasks' moments of one layer, pooled."""
        return Pool.of([one.layers[name] for one in self.features])

    def at(self, name: str) -> tuple[list[FeatureMoments], Pool, Spectrum]:
        """The tasks' moments of one layer, pooled, and their spectrum."""
        leaders = self.input_of(name)
        if self._last is None or self._last[0] != leaders:
            self._last = None  # before the next is read: memory holds one
            moments = [one.layers[name] for one in self.features]
            pool = Pool.of(moments)
            self._last = (leaders, moments, pool, Spectrum.of(pool))
        return self._last[1:]


def _choose(
    config: OSRMLoraConfig, out: OutOfTask, own: TaskFeatures | None, r: int, name: str
) -> tuple[Tensor, float]:
    """(r, n) float64, one layer's A as the config says, and the share of the others' energy that it lets through."""
    moments, pool, spectrum = out.at(name)
    if config.reference:
        A = reference_directions(moments, r)
        return A, pool.share(A)
    A = choose_directions(
        spectrum,
        r,
        generator=layer_generator(config.osrm_seed, name),
        own=None if own is None else own.layers[name],
        null_space=config.null_space,
        in_task=config.in_task,
        in_task_weight=config.in_task_weight,
        ridge=config.ridge,
        protect=config.protect,
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


def load_features(features: TaskFeatures | str | Path) -> TaskFeatures:
    """Features as they are, or of a file."""
    return features if isinstance(features, TaskFeatures) else TaskFeatures.load(features)


def check_tasks(others: Sequence[TaskFeatures], own: TaskFeatures | None) -> None:
    """Are these features of different tasks, and made alike?

    Raises:
        ValueError: there are none, a task comes twice, or two tasks' statistics or tokenizers differ; names them.
    """
    if not others:
        raise ValueError("no out-of-task features: give OSRMLoraConfig(out_of_task=[files of the other tasks])")
    tasks = [features.task for features in others]
    twice = sorted({task for task in tasks if tasks.count(task) > 1})
    if twice:
        raise ValueError(f"out_of_task names {', '.join(twice)} more than once: one features file a task")
    if own is not None and own.task in tasks:
        raise ValueError(f"task {own.task!r} is both in_task and out_of_task: leave it out of out_of_task")
    every = [*others, *([own] if own else [])]
    known = [one for one in every if one.tokenizer_hash is not None]
    for one in every[1:]:
        if one.reference != every[0].reference:
            raise ValueError(
                f"the features of {every[0].task!r} were collected with reference={every[0].reference}, those of "
                f"{one.task!r} with reference={one.reference}: collect them alike"
            )
        if one.statistic != every[0].statistic:
            raise ValueError(
                f"the features of {every[0].task!r} hold the statistic {every[0].statistic!r}, those of {one.task!r} "
                f"{one.statistic!r}: collect them alike"
            )
    for one in known[1:]:
        if one.tokenizer_hash != known[0].tokenizer_hash:
            raise ValueError(
                f"the features of {known[0].task!r} were collected with the tokenizer {known[0].tokenizer} "
                f"({known[0].tokenizer_hash}), those of {one.task!r} with {one.tokenizer} ({one.tokenizer_hash}): "
                "collect them with one tokenizer"
            )


def _check_features(config: OSRMLoraConfig, others: list[TaskFeatures], own: TaskFeatures | None) -> None:
    check_tasks(others, own)
    if config.needs_own_features and own is None:
        raise ValueError(
            f"null_space={config.null_space!r}, in_task={config.in_task!r} look at the task's own features: give "
            "OSRMLoraConfig(in_task_features=FILE), or null_space='random', protect=None, in_task='none' for the "
            "paper's choice"
        )
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


def _check_layers(layers: dict[str, Any], adapter_name: str, config: OSRMLoraConfig) -> None:
    if not layers:
        raise ValueError(f"adapter {adapter_name!r} adapts no layer")
    for name, layer in layers.items():
        linear_layer(name, layer)  # names a layer of another kind
        B = layer.lora_B[adapter_name].weight
        if B.is_meta:
            raise ValueError(f"lora_B of layer {name!r} has no data (meta device): make the model on a real device")
        if bool(B.detach().any()):
            if config.init_lora_weights not in (True, "gaussian"):
                raise ValueError(
                    f"init_lora_weights={config.init_lora_weights!r} sets B: leave it at its default, OSRM sets A and "
                    "needs B = 0"
                )
            raise ValueError(
                f"lora_B of layer {name!r} is not 0 (largest entry {B.detach().abs().max():.2e}), so a new A would "
                "change the model's outputs: OSRM sets A before training. To train a saved adapter on, leave OSRM out"
            )


def layer_generator(seed: int, layer: str) -> torch.Generator:
    """One stream a layer, whatever the order or number of the layers."""
    digest = hashlib.sha256(f"{seed}/{layer}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def describe(features: TaskFeatures) -> dict[str, object]:
    """What the provenance records of features."""
    names = ("task", "base_model", "weight_hash", "tokenizer_hash", "statistic", "k", "seed", "reference")
    return {name: getattr(features, name) for name in names}
