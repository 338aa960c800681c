"""The adapters of a merge, read, aligned and checked before any work."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from osrm_peft.adapters.config import TARGETS
from osrm_peft.adapters.experts import nested, targets_of
from osrm_peft.adapters.factors import Factors
from osrm_peft.adapters.layouts import model_of
from osrm_peft.adapters.load import load_adapter
from osrm_peft.adapters.lora_adapter import LoraAdapter
from osrm_peft.checks import choice, task_names
from osrm_peft.libraries import is_peft_model
from osrm_peft.merging.alignment import align
from osrm_peft.models.identity import Base, common_base
from osrm_peft.models.layers import unwrapped

Adapters = Mapping[str, str | Path | nn.Module | LoraAdapter]

_ONE_BY_ONE = re.compile(r"(^|\.)experts\.\d+\.")  # experts that are layers of their own

HeadPolicy = Literal["per_task", "error"]


@dataclass(frozen=True)
class Inputs:
    """Adapters that can be merged.

    Attributes:
        adapters: {task: adapter}, layers named alike.
        base: the base model's name.
        shapes: {layer: (o, n)} of all layers that any adapter has, sorted by name.
        prefixes: {task: what was put before its layers' names}, of adapters of the bare model.
        renamed: whether an adapter's layers have other names here than in its own file.
        parameters: {bare parameter: E}, of all adapters, see `LoraAdapter`.
    """

    adapters: dict[str, LoraAdapter]
    base: str | None
    shapes: dict[str, tuple[int, int]]
    prefixes: dict[str, str]
    renamed: bool = False
    parameters: dict[str, int] = field(default_factory=dict)

    def factors(self, layer: str) -> list[Factors | None]:
        """One layer of each adapter, read now; None where it has none."""
        return [adapter.factors.get(layer) for adapter in self.adapters.values()]

    def products(self, layer: str) -> list[tuple[Tensor, Tensor]]:
        """(s·B, A) of each adapter, of rank 0 where it has none of the layer."""
        o, n = self.shapes[layer]
        nothing = torch.zeros(o, 0), torch.zeros(0, n)
        return [nothing if f is None else (f.s * f.B, f.A) for f in self.factors(layer)]

    def rank_sum(self, layer: str) -> int:
        """Σ r of the adapters that have the layer."""
        return sum(adapter.shapes[layer][1] for adapter in self.adapters.values() if layer in adapter.shapes)

    def templates(self) -> dict[str, LoraAdapter]:
        """Each task's head and config, for results; full layer names as targets unless all adapters name the same.

        Trained modules and copies of base weights are left out.
        """
        targets = [[adapter.config.get(key) for key in TARGETS] for adapter in self.adapters.values()]
        config: dict[str, Any] = {"base_model_name_or_path": self.base}
        if self.renamed or any(target != targets[0] for target in targets):
            config |= dict.fromkeys(TARGETS) | targets_of(self.shapes, self.parameters)
        classes = [one.config.get("auto_mapping") for task, one in self.adapters.items() if not self.prefixes[task]]
        known = [one for one in classes if one]
        config["auto_mapping"] = known[0] if known and all(one == known[0] for one in known) else None
        layouts = {name: layout for adapter in self.adapters.values() for name, layout in adapter.layouts.items()}
        return {
            name: replace(
                adapter, factors={}, config=adapter.config | config, layouts=layouts, parameters=self.parameters,
                modules={}, copies={},
            )
            for name, adapter in self.adapters.items()
        }  # fmt: skip


def check_names(adapters: Any) -> list[str]:
    """The tasks' names, checked.

    Raises:
        TypeError, ValueError: see `merge_adapters`.
    """
    if not isinstance(adapters, Mapping):
        raise TypeError(f"adapters must map task names to adapters, got a {type(adapters).__name__}")
    if not adapters:
        raise ValueError("no adapters to merge: give at least one")
    return task_names(adapters)


def gather(adapters: Adapters, *, base_model: str | None, heads: str) -> Inputs:
    """Load the adapters and check that their layers can be merged.

    Raises:
        TypeError, ValueError: see `merge_adapters`.
    """
    choice("heads policy", heads, get_args(HeadPolicy))
    check_names(adapters)
    loaded = {name: _load(name, adapter) for name, adapter in adapters.items()}
    bases = {
        name: Base(one.base_model, one.config.get("revision"), one.weight_hash, frozenset(one.shapes))
        for name, one in loaded.items()
    }
    base = common_base(bases, base_model)
    with_heads = [name for name, adapter in loaded.items() if adapter.heads]
    if heads == "error" and with_heads:
        raise ValueError(f"{', '.join(with_heads)} have trained heads and heads='error': use heads='per_task'")
    original = {task: set(adapter.shapes) for task, adapter in loaded.items()}
    loaded, prefixes = align(loaded, base)
    shapes = _common_shapes(loaded)
    renamed = any(set(adapter.shapes) != original[task] for task, adapter in loaded.items())
    _check_experts(loaded)
    first = next(iter(loaded.values()))
    parameters = nested(
        [adapter.parameters for adapter in loaded.values()], shapes, lambda: model_of(first.config, base)
    )
    return Inputs(loaded, base, dict(sorted(shapes.items())), prefixes, renamed, parameters)


def _load(task: str, adapter: str | Path | nn.Module | LoraAdapter) -> LoraAdapter:
    """The adapter; of a live model with several, the one that is called like the task."""
    if isinstance(adapter, LoraAdapter):
        return adapter
    model = unwrapped(adapter)
    if is_peft_model(model) and len(model.peft_config) > 1:
        if task not in model.peft_config:
            raise ValueError(
                f"the live model given for task {task!r} has several adapters ({', '.join(model.peft_config)}): call "
                f"the task like its adapter, or give load_adapter(model, adapter_name=…)"
            )
        return load_adapter(model, adapter_name=task)
    return load_adapter(adapter, require_single_task=True)


def _common_shapes(adapters: Mapping[str, LoraAdapter]) -> dict[str, tuple[int, int]]:
    shapes: dict[str, tuple[int, int]] = {}
    layouts: dict[str, Any] = {}
    for task, adapter in adapters.items():
        for name, (o, _, n) in adapter.shapes.items():
            layout, before = adapter.layouts.get(name), layouts.get(name)
            if shapes.setdefault(name, (o, n)) != (o, n) or layouts.setdefault(name, layout) != layout:
                here, there = (_kind(one, layout) for one, layout in (((o, n), layout), (shapes[name], before)))
                raise ValueError(
                    f"layer {name!r} is {here} in {task!r} and {there} in the adapters before it: they are of "
                    "different base models and cannot be merged"
                )
    return shapes


def _check_experts(adapters: Mapping[str, LoraAdapter]) -> None:
    """Refuse stacks of other numbers of experts, and one parameter that is adapted as a layer, too."""
    known: dict[str, tuple[str, int]] = {}
    for task, adapter in adapters.items():
        for name, experts in adapter.parameters.items():
            other, number = known.setdefault(name, (task, experts))
            if number != experts:
                raise ValueError(
                    f"{name!r} is of {experts or 1} experts in {task!r} and of {number or 1} in {other!r}: they are of "
                    "different base models and cannot be merged"
                )
    modules = {name.split(".")[-2]: name for name, (_, experts) in known.items() if not experts and "." in name}
    stacks = [name for name, (_, experts) in known.items() if experts]
    for task, adapter in adapters.items():
        for layer in adapter.shapes if known and not adapter.parameters else ():
            one = stacks[0] if stacks and _ONE_BY_ONE.search(layer) else modules.get(layer.rpartition(".")[2])
            if one is not None:
                raise ValueError(
                    f"{task!r} adapts {layer!r} as a layer, {known[one][0]!r} {one!r} as a parameter: an "
                    f"older version of transformers wrote it. Load {task!r} with PEFT on its base model and save it "
                    "again, PeftModel.from_pretrained(model, folder).save_pretrained(folder): PEFT converts it"
                )


def _kind(shape: tuple[int, int], layout: tuple[int, ...] | None) -> str:
    size = "×".join(map(str, shape))
    return size if layout is None else f"{size} ({f'a kernel {layout}' if layout else 'an embedding'})"
