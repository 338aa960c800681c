"""LoRA on bare parameters (`target_parameters`): a stack of experts is read as one layer an expert, and written back.

PEFT wraps the module of such parameters once for each of them, the first that the module has innermost. Its file names
the wrapper (`experts.base_layer.lora_A`), not the parameter. A stack of E matrices has one pair of factors, A (E·r, n)
and B (o, r·E), from which expert e takes rows e·r … e·r + r of A and every E-th column of B.
"""

from collections import Counter
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from osrm_peft.adapters.config import CONFIG, is_target, rank_of
from osrm_peft.adapters.keys import base_name, outermost, pair_name, shape_of_name
from osrm_peft.adapters.layouts import model_of
from osrm_peft.libraries import is_param_wrapper

WRAPPED = ".base_layer"
_GATED = ("gate_up_proj", "down_proj")  # the order in which transformers' experts have them, and PEFT converts them


class Bare(NamedTuple):
    """A parameter that one pair of factors adapts.

    Attributes:
        name: the parameter's name in the base model.
        experts: E of a stack of E matrices (E, o, n) or (E, n, o); 0 of a single matrix.
        rank: r of each matrix.
    """

    name: str
    experts: int
    rank: int

    @property
    def layers(self) -> list[str]:
        """The names of its layers."""
        return layers_of(self.name, self.experts)


def layers_of(parameter: str, experts: int) -> list[str]:
    """The layers of a parameter: `….experts.down_proj.0` … of a stack of experts, itself of a single matrix.

    No module has such a name, for `down_proj` is a parameter; and patterns of names match it as they match others.
    """
    return [f"{parameter}.{expert}" for expert in range(experts)] or [parameter]


def owners(parameters: Mapping[str, int]) -> dict[str, str]:
    """{layer: the module that has its parameter}."""
    return {
        layer: parameter.rpartition(".")[0]
        for parameter, experts in parameters.items()
        for layer in layers_of(parameter, experts)
    }


def parameter_of(layer: str, parameters: Mapping[str, int]) -> str | None:
    """The parameter that a layer is a matrix of; None for a layer of its own."""
    stack = layer.rpartition(".")[0]
    return layer if layer in parameters else stack if parameters.get(stack) else None


def check_measured(parameters: Mapping[str, int], held: Container[str], whose: str, remedy: str) -> None:
    """Raise ValueError if a statistic lacks a layer of bare parameters: it is collected of linear layers.

    Args:
        held: the statistic's layers.
        whose: the beginning of the error.
        remedy: its end.
    """
    lacking = next((layer for layer in owners(parameters) if layer not in held), None)
    if lacking is not None:
        raise ValueError(
            f"{whose} have none of {lacking!r}: they are collected of linear layers, not of bare parameters "
            f"(experts); {remedy}"
        )


def targets_of(layers: Collection[str], parameters: Mapping[str, int]) -> dict[str, Any]:
    """The fields of a config by which PEFT adapts these layers, those of the parameters among them, and no others."""
    bare = owners(parameters)
    modules = outermost(name for name in layers if name not in bare)
    return {"target_modules": modules, "target_parameters": sorted(parameters) or None}


def wrappers(parameters: Mapping[str, int]) -> dict[str, tuple[str, int]]:
    """{parameter: its module, and how many of PEFT's wrappers lie around its own}.

    Args:
        parameters: a module's in the order in which the module has them.
    """
    depth: Counter[str] = Counter()
    found: dict[str, tuple[str, int]] = {}
    for parameter in reversed(list(parameters)):
        module = parameter.rpartition(".")[0]
        found[parameter] = module, depth[module]
        depth[module] += 1
    return found


def expert(A: Tensor, B: Tensor, number: int, experts: int) -> tuple[Tensor, Tensor]:
    """(r, n), (o, r) of one expert, from PEFT's (E·r, n) and (o, r·E)."""
    return A.view(experts, -1, A.shape[1])[number], B.view(len(B), -1, experts)[:, :, number]


def stacked(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """PEFT's (E·r, n) and (o, r·E) from each expert's (r, n) and (o, r)."""
    return torch.cat([A for A, _ in pairs]), torch.stack([B for _, B in pairs], dim=2).flatten(1)


def taken_for_experts(model: nn.Module, layers: Collection[str]) -> list[str]:
    """The linear layers of a mixture that PEFT does not adapt by their names, which it takes for those of old experts.

    Such are `down_proj` of a dense layer and of a shared expert in Qwen3-MoE. PEFT adapts them by `target_parameters`.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=list(layers))
    convert_peft_config_for_transformers(config, model, None)
    return [layer for layer in layers if layer not in (config.target_modules or ())]


def bare_parameters(
    config: Mapping[str, Any],
    pairs: Mapping[str, tuple[int, int, int]],
    source: str,
    model: nn.Module | None,
) -> dict[str, Bare]:
    """{pair: its parameter} of the pairs of factors that are of bare parameters.

    A live model says which they are. For a folder the config's `target_parameters` do, where only so many of them can
    lie in a module as it has pairs; of `gate_up_proj` and `down_proj` their shapes say which is the inner one; else
    transformers' class does, if the base model's config.json can be read.

    Args:
        pairs: {name as `keys.part_of` has it: (o, rows of A, n)}.
        model: the base model inside a live PeftModel, whose layers are wrapped.

    Raises:
        ValueError: nothing tells the parameters apart; or their factors have another rank than the config says.
    """
    if model is not None:
        wrapped = {pair_name(base_name(name)): one for name, one in model.named_modules() if is_param_wrapper(one)}
        names = {pair: f"{_bare(pair)}.{wrapped[pair].parameter_name}" for pair in pairs if pair in wrapped}
    else:
        names = dict(_named(config, pairs, source)) if config.get("target_parameters") else {}
    lone = [pair for pair in pairs if pair.endswith(WRAPPED) and pair not in names]
    if lone:
        raise ValueError(
            f"{source} is damaged: it has LoRA at {lone[0]!r}, inside of another LoRA, and target_parameters="
            f"{config.get('target_parameters')!r} in its {CONFIG} name no parameter there"
        )
    found = {}
    for pair, name in names.items():
        rows, rank = pairs[pair][1], rank_of(config, name, source)
        if rows % rank:
            raise ValueError(
                f"{source} is damaged: lora_A of {name!r} has {rows} rows, no multiple of its rank {rank} in {CONFIG}"
            )
        found[pair] = Bare(name, 0 if rows == rank else rows // rank, rank)
    return found


def _bare(pair: str) -> str:
    """The module of a pair."""
    while pair.endswith(WRAPPED):
        pair = pair.removesuffix(WRAPPED)
    return pair


def _named(
    config: Mapping[str, Any], pairs: Mapping[str, tuple[int, int, int]], source: str
) -> Iterator[tuple[str, str]]:
    """(pair, the name of its parameter) of a folder's pairs."""
    targets = config["target_parameters"]
    ask = cache(lambda: model_of(config, config.get("base_model_name_or_path")))
    modules: dict[str, list[str]] = {}
    for pair in sorted(pairs, key=len, reverse=True):  # the innermost first
        modules.setdefault(_bare(pair), []).append(pair)
    for module, wrapped in modules.items():
        possible = _possible(module, targets)
        if not possible or (len(wrapped) == 1 and is_target(config, module)):
            continue
        if len(possible) > len(wrapped):  # `gate.weight` names its module, `down_proj` may be in any
            possible = _possible(module, [one for one in targets if "." in one])
        leaves = sorted(possible)
        if len(leaves) != len(wrapped) or len(leaves) > 1:
            shapes = [(pairs[pair][0], pairs[pair][2]) for pair in wrapped]
            known = list(_GATED) if {*leaves} == {*_GATED} and len(shapes) == 2 and _is_gated(*shapes) else None
            leaves = known or in_model(ask(), module, _possible(module, targets)) or []
            if not leaves and ask() is not None and len(wrapped) == 1:
                continue  # the module has no such parameter: a layer of its own
        if len(leaves) != len(wrapped):
            raise ValueError(
                f"{source} has LoRA on {len(wrapped)} of the parameters {', '.join(sorted(_possible(module, targets)))}"
                f" of {module!r}, and nothing tells which: in its {CONFIG} give base_model_name_or_path the folder or "
                "Hub repository of its base model, whose config.json says it"
            )
        yield from zip(wrapped, (f"{module}.{leaf}" for leaf in leaves), strict=True)


def _possible(module: str, targets: Collection[str]) -> set[str]:
    """The parameters that the module may have, by their names, and PEFT then adapts."""
    leaves = {one: one.rpartition(".")[2] for one in targets}
    return {leaf for one, leaf in leaves.items() if f".{module}.{leaf}".endswith(f".{one}")}


def _is_gated(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    """Whether (o, n) are (2i, h) of `gate_up_proj` and (h, i) of `down_proj`; never so the other way round, too."""
    return inner[0] == 2 * outer[1] and inner[1] == outer[0]


def in_model(model: nn.Module | None, module: str, leaves: Collection[str]) -> list[str] | None:
    """These parameters of a module, as many as it has, in its order; None for an unknown model or module.

    Depth does not count: `layers.40` is like a layer of a model of 2 layers.
    """
    for name, one in [] if model is None else model.named_modules():
        if shape_of_name(base_name(name)) == shape_of_name(module):
            return [leaf for leaf, _ in one.named_parameters(recurse=False) if leaf in leaves]
    return None


def nested(
    adapters: Sequence[Mapping[str, int]],
    shapes: Mapping[str, tuple[int, int]],
    model: Callable[[], nn.Module | None],
) -> dict[str, int]:
    """The parameters of several adapters, a module's in the order in which the module has them.

    Args:
        adapters: the parameters of each, in that order.
        shapes: {layer: (o, n)}.
        model: gives the base model on the meta device, or None; asked where nothing else tells the order.

    Raises:
        ValueError: nothing tells the order.
    """
    every = {name: experts for one in adapters for name, experts in one.items()}
    modules: dict[str, set[str]] = {}
    for name in every:
        modules.setdefault(name.rpartition(".")[0], set()).add(name)
    found: list[str] = []
    ask = cache(model)
    for module, names in modules.items():
        known = next(([name for name in one if name in names] for one in adapters if names <= set(one)), None)
        gated = [f"{module}.{leaf}" for leaf in _GATED]
        if known is None and names == {*gated} and _is_gated(*(shapes[layers_of(n, every[n])[0]] for n in gated)):
            known = gated
        if known is None:
            leaves = in_model(ask(), module, [name.rpartition(".")[2] for name in names]) or []
            known = [f"{module}.{leaf}" for leaf in leaves]
        if len(known) != len(names):
            raise ValueError(
                f"the adapters have LoRA on {', '.join(sorted(names))}, none on all of them, and nothing tells their "
                "order, by which PEFT finds them in a file: give base_model=FOLDER (--base-model FOLDER) of the base "
                "model's config.json"
            )
        found += known
    return {name: every[name] for name in found}
