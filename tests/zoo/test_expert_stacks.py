"""LoRA on stacks of experts and other bare parameters (`target_parameters`): merged as an expert each, as stock PEFT."""

import re

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file

from osrm_peft import load_adapter, merge_adapters
from osrm_peft.adapters.experts import layers_of
from osrm_peft.merging.engine import Engine
from osrm_peft.merging.methods import METHODS
from osrm_peft.models.layers import lora_layers
from tests.zoo.adapters import WEIGHTS, adapted, edit, stock, write
from tests.zoo.models import noisy, outputs

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
Q = {"target_modules": ["q_proj"]}
KINDS = {
    "mixtral": ("mixtral", Q | {"target_parameters": BOTH}),
    "qwen2_moe": ("qwen2_moe", Q | {"target_parameters": BOTH}),
    "qwen3_moe": ("qwen3_moe", Q | {"target_parameters": ["gate_up_proj", "down_proj"]}),
    "gpt_oss_transposed": ("gpt_oss", Q | {"target_parameters": BOTH}),
    "one_parameter": ("mixtral", Q | {"target_parameters": ["experts.down_proj"]}),
    "no_modules": ("mixtral", {"target_modules": None, "target_parameters": BOTH}),
    "no_modules_listed": ("gpt_oss", {"target_modules": [], "target_parameters": BOTH}),
    "one_layer": ("mixtral", Q | {"target_parameters": [f"model.layers.1.mlp.{one}" for one in BOTH]}),
    "rslora": ("mixtral", Q | {"target_parameters": BOTH, "use_rslora": True}),
    "patterns": ("mixtral", Q | {"target_parameters": BOTH, "rank_pattern": {"gate_up_proj": 2, r"layers\.1\..*": 1},
                                 "alpha_pattern": {"experts.down_proj": 5, "q_proj": 1}}),
    "patterns_rslora": ("gpt_oss", Q | {"target_parameters": BOTH, "rank_pattern": {"down_proj": 5},
                                        "use_rslora": True}),
    "all_linear_mixtral": ("mixtral", {"target_modules": "all-linear"}),  # PEFT targets the experts' parameters
    "all_linear_qwen3_moe": ("qwen3_moe", {"target_modules": "all-linear"}),
    "router": ("gpt_oss", Q | {"target_parameters": ["router.weight", "experts.down_proj"]}),
    "matrix": ("gpt_oss", Q | {"target_parameters": ["experts.gate_up_proj_bias"]}),
    "weight_of_a_layer": ("mixtral", Q | {"target_parameters": ["v_proj.weight"]}),
}  # fmt: skip


def written(kind, folder, seed=1, **config):
    model, fields = KINDS[kind]
    live = adapted(model, seed, **fields | config)
    return write(live, folder), live


def theirs(live):
    """{layer: (o, n) ΔW} by PEFT's own layers, each expert's apart."""
    found = {}
    for name, layer in lora_layers(live, "default").items():
        delta = layer.get_delta_weight("default")
        if not isinstance(layer, ParamWrapper):
            found[name] = delta
            continue
        parameter = f"{name.replace('.base_layer', '')}.{layer.parameter_name}"
        matrices = [delta] if delta.dim() == 2 else list(delta)
        turned = delta.dim() == 3 and getattr(layer.get_base_layer(), "is_transposed", False)
        names = layers_of(parameter, 0 if delta.dim() == 2 else len(delta))
        found |= {one: matrix.mT if turned else matrix for one, matrix in zip(names, matrices, strict=True)}
    return found


def by_hand(model, deltas):
    """What the base gives with (o, n) task vectors added to its parameters by hand."""
    base = noisy(model, 0)
    for name, parameter in base.named_parameters():
        owner, _, leaf = name.rpartition(".")
        stack = [deltas[one] for one in layers_of(name, len(parameter)) if one in deltas]
        if parameter.dim() == 3 and stack:
            turned = getattr(base.get_submodule(owner), "is_transposed", False)
            parameter += torch.stack([one.mT if turned else one for one in stack]).float()
        elif name in deltas or (leaf == "weight" and owner in deltas):
            parameter += deltas[name if name in deltas else owner].float()
    return outputs(base)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_what_stock_peft_loads(kind, tmp_path):
    model, folder = KINDS[kind][0], tmp_path / "theirs"
    live = written(kind, folder)[1]
    expected, deltas = outputs(live), theirs(live)
    assert not torch.allclose(expected, outputs(noisy(model, 0)), atol=1e-2)
    for adapter in (load_adapter(folder), load_adapter(live)):
        assert set(adapter.factors) == set(deltas)
        for name, factors in adapter.factors.items():
            torch.testing.assert_close(factors.delta(), deltas[name], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(outputs(adapter.attach(noisy(model, 0))), expected, rtol=1e-4, atol=1e-5)
        adapter.save_pretrained(tmp_path / "ours")
        torch.testing.assert_close(outputs(stock(model, tmp_path / "ours")), expected, rtol=1e-4, atol=1e-5)


OF_EXPERTS = {
    "average": {}, "task_arithmetic": {}, "concat": {}, "ties": {"density": 0.5}, "dare": {"drop_rate": 0.3},
    "ties:layer": {"trim": "layer"}, "dare_ties": {"density": 0.5}, "tsv": {}, "iso": {}, "lore": {},
    "lore:ties": {"combine": "ties", "density": 0.5},
}  # fmt: skip


def reference(method, options, weights, deltas):
    """{layer: ΔW}: the method on dense (T, o, n) stacks of PEFT's own ΔW, each expert's for itself."""
    method = METHODS[method]
    engine = Engine(method, method.bind(options), list(deltas), 0)
    stacks = {name: torch.stack([one[name] for one in deltas.values()]) for name in sorted(deltas["a"])}
    stacks = {name: engine.prepare(stack, name) for name, stack in stacks.items()}
    engine.summarise(list(stacks.values()))
    merged = {name: engine.merged(stack, torch.tensor(weights)) for name, stack in stacks.items()}
    found = {}
    for name, one in merged.items():
        direction = one.direction if one.finish is None else one.finish(one.direction)
        found[name] = method.scale * direction + (0 if one.offset is None else one.offset)
    return found


def sums(method, weights, deltas):
    """The same of sums, by their formula."""
    scale = METHODS[method].scale / (sum(weights) if method == "average" else 1.0)
    stacks = {name: torch.stack([one[name] for one in deltas.values()]) for name in deltas["a"]}
    return {name: scale * torch.einsum("t,ton->on", torch.tensor(weights), stack) for name, stack in stacks.items()}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss_transposed"])
@pytest.mark.parametrize("method", OF_EXPERTS)
def test_each_expert_is_merged_for_itself_and_stock_peft_computes_it(kind, method, tmp_path):
    lives = {name: written(kind, tmp_path / name, seed)[1] for seed, name in enumerate("abc", 1)}
    deltas, weights, options = {name: theirs(live) for name, live in lives.items()}, [1.0, 0.5, 2.0], OF_EXPERTS[method]
    name = method.partition(":")[0]
    found = merge_adapters({name: tmp_path / name for name in "abc"}, name, weights=weights, **options)
    merged, linear = found.deltas(), name in ("average", "task_arithmetic", "concat")
    expected = sums(name, weights, deltas) if linear else reference(name, options, weights, deltas)
    assert set(merged) == set(expected) and "model.layers.0.mlp.experts.down_proj.1" in merged
    for layer, delta in expected.items():
        torch.testing.assert_close(merged[layer].float(), delta, rtol=1e-3, atol=2e-4)
    found.save_pretrained(tmp_path / "out")
    logits = by_hand(KINDS[kind][0], merged)
    torch.testing.assert_close(outputs(stock(KINDS[kind][0], tmp_path / "out")), logits, rtol=1e-3, atol=1e-4)
    with found.applied_to(noisy(KINDS[kind][0], 0)) as live:
        torch.testing.assert_close(outputs(live), logits, rtol=1e-3, atol=1e-4)


# adapters that target other things

TWO = {"target_modules": ["q_proj"], "target_parameters": BOTH}
UNLIKE = {
    "one_without_experts": ("mixtral", TWO, {"target_modules": ["q_proj", "v_proj"]}),
    "one_without_modules": ("mixtral", TWO, {"target_modules": [], "target_parameters": BOTH}),
    "one_parameter_each": ("mixtral", Q | {"target_parameters": BOTH[:1]}, Q | {"target_parameters": BOTH[1:]}),
    "one_and_two_parameters": ("gpt_oss", Q | {"target_parameters": BOTH[1:]}, TWO),
    "other_layers": ("mixtral", Q | {"target_parameters": [f"layers.0.mlp.{one}" for one in BOTH]},
                     Q | {"target_parameters": ["layers.1.mlp.experts.down_proj"]}),
    "ranks": ("mixtral", TWO | {"r": 2}, TWO | {"rank_pattern": {"down_proj": 4}}),
    "scales": ("gpt_oss", TWO | {"use_rslora": True}, TWO | {"alpha_pattern": {"experts.down_proj": 1}}),
    "spellings": ("mixtral", TWO, Q | {"target_parameters": ["down_proj", "mlp.experts.gate_up_proj"]}),
    "all_linear": ("mixtral", TWO, {"target_modules": "all-linear"}),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", UNLIKE)
def test_adapters_of_unlike_targets_add_up(name, tmp_path):
    model, *configs = UNLIKE[name]
    lives = [adapted(model, seed, **config) for seed, config in enumerate(configs, 1)]
    folders = {name: write(live, tmp_path / name) for name, live in zip("ab", lives, strict=True)}
    a, b = map(theirs, lives)
    expected = {name: sum(one[name] for one in (a, b) if name in one) for name in {*a, *b}}
    found = merge_adapters(folders, "task_arithmetic", scale=1)
    assert set(found.deltas()) == set(expected)
    found.save_pretrained(tmp_path / "out")
    logits = by_hand(model, expected)
    torch.testing.assert_close(outputs(stock(model, tmp_path / "out")), logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs(found.load(noisy(model, 0))), logits, rtol=1e-4, atol=1e-5)
    again = load_adapter(tmp_path / "out")
    for layer, delta in expected.items():
        torch.testing.assert_close(again.factors[layer].delta(), delta, rtol=1e-4, atol=1e-5)
