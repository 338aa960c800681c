"""merge_adapters: every check first, then layer by layer; the base model is never loaded."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm

from osrm_peft.adapter_reader import load_adapter
from osrm_peft.adapters import TARGETS, LoraAdapter
from osrm_peft.checks import choice, integer, number
from osrm_peft.files import versions
from osrm_peft.merging.lowrank import compress
from osrm_peft.merging.merged import MergedAdapter, MergedLayer
from osrm_peft.merging.registry import Merged, Method, get_method
from osrm_peft.merging.spaces import SPACES, Layer, enter

logger = logging.getLogger(__name__)

HEAD_POLICIES = ("per_task", "error")


def merge_adapters(
    adapters: Mapping[str, str | Path | PeftModel | LoraAdapter],
    method: str,
    *,
    weights: Mapping[str, float] | Sequence[float] | None = None,
    scale: float | None = None,
    space: str = "auto",
    rank: int | None = None,
    heads: str = "per_task",
    base_model: str | None = None,
    progress: bool = False,
    **options: Any,
) -> MergedAdapter:
    """Merge LoRA adapters of one base model into one, from their own files.

    Args:
        adapters: {task: folder, Hub id, live PeftModel or LoraAdapter}. Their order does not matter. Ranks, alphas and
            target layers may differ; a layer that an adapter lacks counts as 0.
        method: `"average"`, `"task_arithmetic"`, `"ties"` or `"lore"`.
        weights: one a task, by name or in the order of `adapters`; 1 each by default, negative ones too.
        scale: λ, what multiplies the merged direction; None: the paper's default of the method.
        space: `"weight"`, `"core"`, or `"auto"`: the core where that is exact, else the weights as in the papers.
        rank: largest rank of the result, at least 1; None keeps it exact. The lost energy is in the manifest.
        heads: what becomes of trained heads: `"per_task"` keeps each, `"error"` refuses them.
        base_model: the base model of all adapters, where their configs name it differently (a local copy, say).
        progress: show a bar over the layers.
        **options: the method's own, such as TIES' `density` or LoRE's `mu_ratio`.

    Returns:
        A MergedAdapter: `.load(base, task=…)`, `.save_pretrained(folder)`, `.at_scale(λ)`, `.for_task(task)`.

    Raises:
        TypeError: an option that the method does not have.
        ValueError: an unknown method or space, a number out of range, other weights than adapters, different base
            models, or an adapter that is not plain LoRA. Nothing was computed then.
    """
    chosen = get_method(method)
    options = chosen.bind(options)
    choice("space", space, ("auto", *SPACES))
    choice("heads policy", heads, HEAD_POLICIES)
    rank = None if rank is None else integer("rank", rank, 1)
    scale = number("scale", chosen.scale if scale is None else scale)
    if not isinstance(adapters, Mapping):
        raise TypeError(f"adapters must map task names to adapters, got a {type(adapters).__name__}")
    if not adapters:
        raise ValueError("no adapters to merge: give at least one")
    for name in adapters:
        if not isinstance(name, str) or not re.fullmatch(r"(?!\.)[^/\\\0]{1,200}", name):
            raise ValueError(f"the task name {name!r} cannot be a file name: its head is saved as heads/<task>")
    weight = _weights(weights, list(adapters))
    loaded = {
        name: adapter if isinstance(adapter, LoraAdapter) else load_adapter(adapter, whole=True)
        for name, adapter in adapters.items()
    }
    base = _common_base(loaded, base_model)
    _check_heads(loaded, heads)
    _check_shapes(loaded, rank)
    space = ("core" if chosen.commutes else "weight") if space == "auto" else space

    stacks = _Stacks(list(loaded.values()), space)
    summary = {}
    if chosen.summarise is not None:
        summary["summary"] = chosen.summarise(stacks, weight, **options)
    layers, reports = {}, {}
    for name, layer in tqdm(stacks.items(), total=len(stacks.names), desc=f"merge {method}", disable=not progress):
        layers[name], reports[name] = _merge_layer(chosen, layer, weight, summary | options, rank)

    manifest: dict[str, Any] = {
        "kind": "merged",
        "method": method,
        "paper": chosen.paper,
        "options": options,
        "scale": scale,
        "weights": dict(zip(loaded, weight.tolist(), strict=True)),
        "space": space,
        "rank": rank,
        "base_model": base,
        "inputs": {
            name: {"source": adapter.source, "sha256": adapter.sha256, "rank": adapter.rank}
            for name, adapter in loaded.items()
        },
        "report": {name: report for name, report in reports.items() if report},
        "versions": versions(),
    }
    stopped = [name for name, report in reports.items() if report.get("converged") is False]
    if stopped:
        logger.warning("%s had not converged on %d of %d layers when it stopped", method, len(stopped), len(layers))
    return MergedAdapter(
        layers,
        scale,
        rank,
        _templates(loaded, base, list(layers)),
        reduce(torch.promote_types, (adapter.dtype for adapter in loaded.values())),
        manifest,
    )


class _Stacks:
    """The layers of all adapters in a space, made one at a time; can be iterated again and again."""

    def __init__(self, adapters: list[LoraAdapter], space: str) -> None:
        self.adapters, self.space = adapters, space
        self.names = sorted({name for adapter in adapters for name in adapter.factors})

    def items(self) -> Iterator[tuple[str, Layer]]:
        for name in self.names:
            yield name, enter(self.space, [adapter.factors.get(name) for adapter in self.adapters])

    def __iter__(self) -> Iterator[Tensor]:
        return (layer.stack for _, layer in self.items())


def _merge_layer(
    method: Method, layer: Layer, weights: Tensor, arguments: dict[str, Any], rank: int | None
) -> tuple[MergedLayer, dict[str, Any]]:
    out = method.fn(layer.stack, weights.to(layer.stack.dtype), **arguments)
    merged = out if isinstance(out, Merged) else Merged(out)
    if merged.offset is None:
        return MergedLayer(compress(*layer.lift(merged.direction), rank), None), merged.report
    direction, offset = compress(*layer.lift(merged.direction)), compress(*layer.lift(merged.offset))
    return MergedLayer(direction, offset.factors), merged.report


def _weights(weights: Mapping[str, float] | Sequence[float] | None, tasks: list[str]) -> Tensor:
    if weights is None:
        return torch.ones(len(tasks), dtype=torch.float64)
    if isinstance(weights, Mapping):
        if set(weights) != set(tasks):
            raise ValueError(f"weights name {sorted(weights)}, the adapters are {sorted(tasks)}: give one for each")
        weights = [weights[task] for task in tasks]
    weights = weights.tolist() if hasattr(weights, "tolist") else weights
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        raise ValueError(
            f"weights={weights!r} must be a list in the order of the adapters, or map task names to numbers"
        )
    if len(weights) != len(tasks):
        raise ValueError(f"{len(weights)} weights for {len(tasks)} adapters: give one for each")
    named = [number(f"weight of {task!r}", weight) for task, weight in zip(tasks, weights, strict=True)]
    return torch.tensor(named, dtype=torch.float64)


def _common_base(adapters: Mapping[str, LoraAdapter], base_model: str | None) -> str | None:
    if base_model is not None:
        return base_model
    bases = {name: (adapter.base_model, adapter.config.get("revision")) for name, adapter in adapters.items()}
    if len(set(bases.values())) > 1:
        listed = ", ".join(f"{name}: {base}{f'@{rev}' if rev else ''}" for name, (base, rev) in bases.items())
        raise ValueError(
            f"the adapters have different base models ({listed}): they cannot be merged; "
            "if these are names of one and the same model, say so with base_model=NAME"
        )
    return next(iter(bases.values()))[0]


def _check_heads(adapters: Mapping[str, LoraAdapter], policy: str) -> None:
    with_heads = [name for name, adapter in adapters.items() if adapter.heads]
    if policy == "error" and with_heads:
        raise ValueError(f"{', '.join(with_heads)} have trained heads and heads='error': use heads='per_task'")


def _check_shapes(adapters: Mapping[str, LoraAdapter], rank: int | None) -> None:
    shapes: dict[str, tuple[int, int]] = {}
    for task, adapter in adapters.items():
        for name, factors in adapter.factors.items():
            shape = (len(factors.B), factors.A.shape[1])
            if shapes.setdefault(name, shape) != shape:
                raise ValueError(
                    f"layer {name!r} is {shape[0]}×{shape[1]} in {task!r} and {shapes[name][0]}×{shapes[name][1]} in "
                    "the adapters before it: they are of different base models and cannot be merged"
                )
    widest = min(min(shape) for shape in shapes.values())
    if rank is not None and rank > widest:
        raise ValueError(f"rank={rank} is above {widest}, the smallest layer's width: lower it, or None for exact")


def _templates(adapters: Mapping[str, LoraAdapter], base: str | None, layers: list[str]) -> dict[str, LoraAdapter]:
    """Each task's head and config; the targets by full layer names unless all adapters name the same ones."""
    targets = [[adapter.config.get(key) for key in TARGETS] for adapter in adapters.values()]
    same = all(target == targets[0] for target in targets)
    config: dict[str, Any] = {"base_model_name_or_path": base}
    if not same:
        config |= dict.fromkeys(TARGETS) | {"target_modules": layers}
    return {name: replace(adapter, factors={}, config=adapter.config | config) for name, adapter in adapters.items()}
