"""The tasks' statistics and features, read and checked against the adapters before any work."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from osrm_peft.adapters.lora_adapter import LoraAdapter
from osrm_peft.features.fisher import DiagonalFisher
from osrm_peft.features.task_features import TaskFeatures
from osrm_peft.merging.inputs import Inputs

logger = logging.getLogger(__name__)

Statistics = Mapping[str, str | Path | TaskFeatures | DiagonalFisher]


def statistics_of(
    argument: str,
    kind: type[TaskFeatures] | type[DiagonalFisher],
    given: Statistics | None,
    inputs: Inputs,
    reason: str,
) -> Callable[[str], list[Any]]:
    """A function from a layer to that layer's statistic of each task; of the kind TaskFeatures or DiagonalFisher.

    Raises:
        ValueError: a task without, a statistic of the wrong kind, or one that lacks a layer or has another width.
    """
    collect = {
        ("statistics", DiagonalFisher): "collect_fisher, or `osrm-peft statistics --kind fisher`",
        ("statistics", TaskFeatures): "collect_gram, or `osrm-peft statistics --kind gram`",
        ("features", TaskFeatures): "collect_features, or `osrm-peft features`",
    }[argument, kind]
    missing = sorted(set(inputs.adapters) - set(given or {}))
    if given is None or missing:
        raise ValueError(
            f"{reason} needs {argument}={{task: file}} of every task, missing {', '.join(missing)}: make them with "
            f"{collect}"
        )
    loaded: dict[str, TaskFeatures | DiagonalFisher] = {}
    for task in inputs.adapters:
        value = given[task]
        one = kind.load(value) if isinstance(value, (str, Path)) else value
        if not isinstance(one, kind):
            raise ValueError(f"{argument} of {task!r} is a {type(one).__name__}, {reason} needs a {kind.__name__}")
        if argument == "features" and getattr(one, "of_finetuned_model", False):
            raise ValueError(
                f"features of {task!r} are of its fine-tuned model (collect_gram): {reason} needs those of the "
                "pre-trained model (collect_features)"
            )
        if argument == "statistics":
            _check_statistic(task, one, inputs.adapters[task], collect)
        if one.task != task:
            logger.warning("%s of %r were collected as those of %r", argument, task, one.task)
        prefix = inputs.prefixes[task]
        if prefix and not set(inputs.shapes) & set(one.layers):  # collected on the bare model, like its adapter
            renamed: Any = {prefix + layer: found for layer, found in one.layers.items()}
            one = replace(one, layers=renamed)
        lacking = sorted(set(inputs.shapes) - set(one.layers))
        if lacking:
            raise ValueError(
                f"{argument} of {task!r} lacks {len(lacking)} of the {len(inputs.shapes)} merged layers: "
                f"{', '.join(lacking[:4])}; collect it on all of them (target_modules=…)"
            )
        widths = one.widths() if isinstance(one, TaskFeatures) else {}
        for layer, (o, n) in inputs.shapes.items():
            shape = tuple(one.layers[layer].shape) if isinstance(one, DiagonalFisher) else (o, widths[layer])
            if shape != (o, n):
                raise ValueError(
                    f"{argument} of {task!r} is {'×'.join(map(str, shape))} at {layer!r}, the layer is {o}×{n}: "
                    "it is of another base model"
                )
        loaded[task] = one
    # The hash is of a file's own layers: files of the same layers can be compared.
    hashes = {(frozenset(one.layers), getattr(one, "weight_hash", None)) for one in loaded.values()}
    if argument == "features" and len(hashes) > len({layers for layers, _ in hashes}):
        raise ValueError("the features are of different base models: collect them on the one that the adapters share")
    return lambda layer: [one.layers[layer] for one in loaded.values()]


def _check_statistic(task: str, one: TaskFeatures | DiagonalFisher, adapter: LoraAdapter, collect: str) -> None:
    if None not in (one.adapter_sha256, adapter.sha256) and one.adapter_sha256 != adapter.sha256:
        raise ValueError(f"the statistics of {task!r} are of another adapter, or of it before a training: {collect}")
    if isinstance(one, TaskFeatures) and (one.statistic == "mean" or one.reference):
        raise ValueError(f"the statistics of {task!r} hold one mean vector, no Gram matrix: make them with {collect}")
