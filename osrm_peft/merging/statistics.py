"""The tasks' statistics and features, read and checked against the adapters before any work."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from osrm_peft.adapters.experts import check_measured
from osrm_peft.adapters.lora_adapter import LoraAdapter
from osrm_peft.features.fisher import DiagonalFisher
from osrm_peft.features.fit import Statistic, check_layers, check_one_base, check_pretrained
from osrm_peft.features.task_features import TaskFeatures
from osrm_peft.hub.privacy import public_name
from osrm_peft.merging.inputs import Inputs
from osrm_peft.models.identity import comparable

logger = logging.getLogger(__name__)

Statistics = Mapping[str, str | Path | TaskFeatures | DiagonalFisher]
_COLLECT = {
    ("statistics", DiagonalFisher): "collect_fisher, or `osrm-peft statistics --kind fisher`",
    ("statistics", TaskFeatures): "collect_gram, or `osrm-peft statistics --kind gram`",
    ("features", TaskFeatures): "collect_features, or `osrm-peft features`",
}


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
    collect = _COLLECT[argument, kind]
    missing = sorted(set(inputs.adapters) - set(given or {}))
    if given is None or missing:
        raise ValueError(
            f"{reason} needs {argument}={{task: file}} of every task, missing {', '.join(missing)}: make them with "
            f"{collect}"
        )
    loaded: dict[str, Any] = {}
    for task, adapter in inputs.adapters.items():
        value = given[task]
        statistic = kind.load(value) if isinstance(value, (str, Path)) else value
        if not isinstance(statistic, kind):
            raise ValueError(
                f"{argument} of {task!r} is a {type(statistic).__name__}, {reason} needs a {kind.__name__}"
            )
        if argument == "statistics":
            _check_statistic(task, statistic, adapter, collect)
        elif isinstance(statistic, TaskFeatures):
            check_pretrained(statistic)
        _check_base(argument, task, statistic, inputs)
        if statistic.task != task and statistic.task in inputs.adapters:
            raise ValueError(
                f"{argument} of {task!r} are those of {statistic.task!r}, which is merged, too: give each task its own"
            )
        if statistic.task != task:
            logger.warning("%s of %r were collected as those of %r", argument, task, statistic.task)
        loaded[task] = _renamed(statistic, inputs, task)
        check_measured(
            inputs.parameters, loaded[task].layers, f"{reason} needs {argument} of every layer, and those of {task!r}",
            "task_arithmetic, ties, tsv, lore and others merge these without, and interference without features "
            "compares A and B",
        )  # fmt: skip
        check_layers(loaded[task], inputs.shapes, "merged layers", "the adapter")
    if argument == "features":
        check_one_base(list(loaded.values()))
    return lambda layer: [statistic.layers[layer] for statistic in loaded.values()]


def _renamed(statistic: Statistic, inputs: Inputs, task: str) -> Statistic:
    """With the merge's names of its layers, where it was collected on the bare model, like its adapter."""
    prefix = inputs.prefixes[task]
    if not prefix or set(inputs.shapes) & set(statistic.layers):
        return statistic
    renamed: Any = {prefix + layer: found for layer, found in statistic.layers.items()}
    return replace(statistic, layers=renamed)


def _check_base(argument: str, task: str, statistic: Statistic, inputs: Inputs) -> None:
    """Refuse statistics on a base model with other weights than the adapter's; warn where the names alone differ."""
    adapter = inputs.adapters[task]
    hashes = getattr(statistic, "weight_hash", None), adapter.weight_hash  # Fisher information has none
    if comparable(*hashes) and not inputs.renamed and set(statistic.layers) == set(adapter.shapes):
        if hashes[0] != hashes[1]:
            raise ValueError(
                f"{argument} of {task!r} are of {statistic.base_model} ({hashes[0]}), its adapter is of "
                f"{adapter.base_model} ({hashes[1]}): collect them on the adapter's base model"
            )
        return
    names = [(public_name(name) or "").rpartition("/")[2] for name in (statistic.base_model, inputs.base)]
    if all(names) and names[0] != names[1]:
        logger.warning(
            "%s of %r are of %s, the adapters of %s: if that is another model, collect them on the adapters' own",
            argument, task, statistic.base_model, public_name(inputs.base),
        )  # fmt: skip


def _check_statistic(task: str, statistic: Statistic, adapter: LoraAdapter, collect: str) -> None:
    if None not in (statistic.adapter_sha256, adapter.sha256) and statistic.adapter_sha256 != adapter.sha256:
        raise ValueError(f"the statistics of {task!r} are of another adapter, or of it before a training: {collect}")
    if isinstance(statistic, TaskFeatures) and not statistic.of_finetuned_model:
        logger.warning(
            "the statistics of %r are features of the pre-trained model, RegMean's are of the fine-tuned one: make "
            "them with %s",
            task,
            collect,
        )
    if isinstance(statistic, TaskFeatures) and (statistic.statistic == "mean" or statistic.reference):
        raise ValueError(f"the statistics of {task!r} hold one mean vector, no Gram matrix: make them with {collect}")
