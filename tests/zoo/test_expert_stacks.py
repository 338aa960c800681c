"""LoRA on stacks of experts and other bare parameters (`target_parameters`): each expert as stock PEFT has it."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from osrm_peft import (
    EMRAdapter,
    OSRMLoraConfig,
    TaskFeatures,
    initialize_osrm_weights,
    interference,
    load_adapter,
    merge_adapters,
    project_adapter,
)
from osrm_peft.adapters.experts import layers_of
from osrm_peft.adapters.layouts import names_in
from osrm_peft.features.moments import FeatureMoments
from osrm_peft.merging.engine import Engine
from osrm_peft.merging.methods import METHODS
from osrm_peft.models.layers import lora_layers
from tests.zoo.adapters import WEIGHTS, adapted, edit, stock, write
from tests.zoo.models import noisy, outputs
from tests.zoo.test_experts import written as one_by_one

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


QUICK = {"max_iterations": 4}  # enough to compare
OF_EXPERTS = {
    "average": {}, "task_arithmetic": {}, "concat": {}, "ties": {"density": 0.5}, "dare": {"drop_rate": 0.3},
    "ties:layer": {"trim": "layer"}, "dare_ties": {"density": 0.5}, "tsv": {}, "iso": {}, "lore": QUICK,
    "lore:ties": QUICK | {"combine": "ties", "density": 0.5},
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
@pytest.mark.parametrize(("kind", "method"), [
    *[("gpt_oss_transposed", method) for method in OF_EXPERTS], ("mixtral", "average"), ("mixtral", "tsv"),
])  # fmt: skip
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


@torch.no_grad()
def test_an_adapter_of_the_bare_model_has_its_place_in_the_tasks(tmp_path):
    bare = get_peft_model(noisy("mixtral", 0).model, LoraConfig(r=3, lora_alpha=6, **TWO))
    for name, parameter in bare.named_parameters():
        if "lora_B" in name:
            parameter += 0.1
    whole = adapted("mixtral", 2, **TWO)
    folders = {"a": write(bare.eval(), tmp_path / "a"), "b": write(whole, tmp_path / "b")}
    a, b = theirs(bare), theirs(whole)
    merge_adapters(folders, "task_arithmetic", scale=1).save_pretrained(tmp_path / "out")
    expected = by_hand("mixtral", {name: delta + a[name.removeprefix("model.")] for name, delta in b.items()})
    torch.testing.assert_close(outputs(stock("mixtral", tmp_path / "out")), expected, rtol=1e-4, atol=1e-5)


def test_factors_of_a_folder_are_the_callers_own(tmp_path):
    written("mixtral", tmp_path / "it")
    adapter = load_adapter(tmp_path / "it")
    for factors in adapter.factors.values():
        factors.A.zero_()
    assert all(factors.A.any() for factors in adapter.factors.values())


def test_experts_are_layers_of_a_model_at_any_depth():
    names = ["model.layers.40.mlp.experts.down_proj.3", "model.layers.0.mlp.gate.weight"]
    assert [*names_in(noisy("mixtral", 0), [*names, "model.layers.0.mlp.experts.w.3"])] == names


# what nothing tells, and what does not fit


def pair_of(tmp_path, one, other, model="mixtral", **edits):
    """Folders of two adapters."""
    folders = {}
    for seed, (name, config) in enumerate({"a": one, "b": other}.items(), 1):
        folders[name] = write(adapted(model, seed, **config), tmp_path / name)
    return folders


@torch.no_grad()
def test_the_base_models_config_tells_what_names_and_shapes_do_not(tmp_path):
    config = Q | {"target_parameters": ["experts.gate_up_proj", "experts.gate_up_proj_bias"]}
    live = adapted("gpt_oss", **config)
    folder = write(live, tmp_path / "a")
    with pytest.raises(
        ValueError,
        match=r"has LoRA on 2 of the parameters gate_up_proj, gate_up_proj_bias of 'model.layers.0.mlp.experts', "
        r"and nothing tells which: .*base_model_name_or_path",
    ):
        load_adapter(folder)
    noisy("gpt_oss", 0).config.save_pretrained(tmp_path / "base")
    edit(folder, base_model_name_or_path=str(tmp_path / "base"))
    adapter, deltas = load_adapter(folder), theirs(live)
    assert list(adapter.parameters.values()) == [2, 0]
    for name, factors in adapter.factors.items():
        torch.testing.assert_close(factors.delta(), deltas[name])


@torch.no_grad()
def test_the_order_of_parameters_that_no_adapter_has_together_is_asked_of_the_base(tmp_path):
    bias, router = (Q | {"target_parameters": [f"experts.{name}"]} for name in ("down_proj", "gate_up_proj_bias"))
    folders = pair_of(tmp_path, bias, router, "gpt_oss")
    with pytest.raises(ValueError, match=r"none on all of them, and nothing tells their order.*--base-model FOLDER"):
        merge_adapters(folders, "concat")
    model = noisy("gpt_oss", 0)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path / "base")
    found = merge_adapters(folders, "concat", base_model=str(tmp_path / "base"))
    found.save_pretrained(tmp_path / "out")
    torch.testing.assert_close(outputs(stock("gpt_oss", tmp_path / "out")), by_hand("gpt_oss", found.deltas()),
                               rtol=1e-4, atol=1e-5)  # fmt: skip


@torch.no_grad()
def test_experts_one_by_one_merge_with_stacks_once_peft_has_converted_them(tmp_path):
    folders = {"a": one_by_one("mixtral", 1, tmp_path / "a"), "b": write(adapted("mixtral", 2, **TWO), tmp_path / "b")}
    with pytest.raises(ValueError, match=r"'a' adapts 'model.*experts.0.w1' as a layer, 'b' 'model.*_proj' as a para"):
        merge_adapters(folders, "average")
    converted = stock("mixtral", folders["a"])
    both = {"a": write(converted, tmp_path / "converted"), "b": folders["b"]}
    found = merge_adapters(both, "average")
    found.save_pretrained(tmp_path / "out")
    a, b = theirs(converted), load_adapter(folders["b"]).factors
    expected = by_hand("mixtral", {name: (a[name] + b[name].delta()) / 2 for name in a})
    torch.testing.assert_close(outputs(stock("mixtral", tmp_path / "out")), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_emr_masks_each_expert_and_is_read_again(tmp_path):
    folders = pair_of(tmp_path, TWO, TWO, "gpt_oss")
    merge_adapters(folders, "emr").save_pretrained(tmp_path / "out")
    found = EMRAdapter.from_pretrained(tmp_path / "out")
    expected = by_hand("gpt_oss", found.deltas("b"))
    with found.applied_to(noisy("gpt_oss", 0), "b") as live:
        torch.testing.assert_close(outputs(live), expected, rtol=1e-4, atol=1e-5)
    found.adapter("b").save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(outputs(stock("gpt_oss", tmp_path / "adapter")), expected, rtol=1e-4, atol=1e-5)


def test_a_module_of_experts_that_was_trained_whole_is_one_tasks_and_loses_its_lora(tmp_path):
    whole = Q | {"target_parameters": None, "modules_to_save": ["experts"]}
    folders = pair_of(tmp_path, whole, TWO)
    with pytest.raises(ValueError, match=r"experts.down_proj' was trained by a and .*modules=TASK takes one task's"):
        merge_adapters(folders, "average")
    own = merge_adapters(folders, "average", modules="per_task")
    assert [bool(own.for_task(task).parameters) for task in ("a", "b")] == [False, True]
    assert own.for_task("a").peft_config().target_parameters is None
    merged = merge_adapters(folders, "average", modules="a")
    assert not [layer for layer in merged.deltas() if "experts" in layer]
    merged.save_pretrained(tmp_path / "out")
    found = load_adapter(tmp_path / "out")
    assert not found.parameters and len(found.modules) == 4
    experts = stock("mixtral", tmp_path / "out").base_model.model.model.layers[0].mlp.experts
    assert torch.equal(
        experts.modules_to_save["default"].down_proj, found.modules["model.layers.0.mlp.experts.down_proj"]
    )


def experts_of(number):
    return lambda tensors: {
        key: torch.cat([value, value], int("lora_B" in key)) if "experts" in key and number else value
        for key, value in tensors.items()
    }


REFUSED = {
    "experts": (TWO, TWO, experts_of(4), r"is of 4 experts in 'b' and of 2 in 'a': they are of different base models"),
    "layer": (Q, {"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight"]}, None,
              r"'a' adapts '.*q_proj' as a layer, 'b' '.*q_proj.weight' as a parameter"),
    "rows": (TWO, TWO, lambda t: {k: v[:-1] if "experts.lora_A" in k else v[:, :-1] if "experts.lora_B" in k else v
                                  for k, v in t.items()}, r"b is damaged: lora_A of '.*down_proj' has 5 rows, no"),
    "nested": (TWO, Q | {"target_parameters": BOTH}, "drop", r"b is damaged: it has LoRA at '.*experts.base_layer'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_named(name, tmp_path):
    one, other, change, message = REFUSED[name]
    folders = pair_of(tmp_path, one, other)
    if change == "drop":
        edit(folders["b"], target_parameters=None)
    elif change is not None:
        tensors = change(load_file(folders["b"] / WEIGHTS))
        save_file({key: one.contiguous() for key, one in tensors.items()}, folders["b"] / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        merge_adapters(folders, "average")


def test_another_model_is_named_by_the_parameters_shape(tmp_path):
    adapter = load_adapter(write(adapted("mixtral", **TWO), tmp_path / "a"))
    with pytest.raises(ValueError, match=r"parameter 'model.layers.0.mlp.experts.*' has shape \(2, \d+, \d+\) in the"):
        adapter.attach(noisy("qwen3_moe", 0))
    merged, other = merge_adapters({"a": adapter}, "average"), noisy("qwen3_moe", 0)
    with (
        pytest.raises(ValueError, match=r"Qwen3MoeForCausalLM has \(2, .*\) at 'model.*', the merge 2 × \("),
        merged.applied_to(other),
    ):
        pass


def features_of(task, layers):
    moments = {name: FeatureMoments("token", 16, 40, torch.zeros(16), torch.eye(16), None) for name in layers}
    return TaskFeatures(task, "tiny/base", "v2:1", "token", 4, layers=moments)


def test_features_and_osrm_are_of_linear_layers_and_say_so(tmp_path):
    folders = pair_of(tmp_path, TWO, TWO)
    layers = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    features = {task: features_of(task, layers) for task in folders}
    message = r"needs {} of every layer, .*none of 'model.*experts.*of linear layers, not of bare .*tsv, lore"
    with pytest.raises(ValueError, match="method 'regmean' " + message.format("statistics")):
        merge_adapters(folders, "regmean", statistics=features)
    with pytest.raises(ValueError, match="interference " + message.format("features")):
        interference(folders, features)
    assert len(interference(folders).overlap_a) == 10
    with pytest.raises(ValueError, match=r"the features of task 'b' have none of .*linear layers, not of bare"):
        project_adapter(folders["a"], [features["b"]])
    with pytest.raises(
        ValueError, match=r"target_parameters=\['down_proj'\]: OSRM chooses .*leave target_parameters out"
    ):
        OSRMLoraConfig(target_parameters=["down_proj"])
    model = get_peft_model(noisy("mixtral", 0), OSRMLoraConfig(target_modules="all-linear", out_of_task=["x"]))
    with pytest.raises(
        ValueError, match=r"has LoRA on its parameter '.*_proj|weight'; .*name linear layers in target_mod"
    ):
        initialize_osrm_weights(model, list(features.values()))


# the whole way


def trained(base, seed, folder):
    """An adapter that stock PEFT trained for a step."""
    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], target_parameters=BOTH,
                   task_type="CAUSAL_LM"),
    )  # fmt: skip
    ids = torch.randint(3, 38, (2, 6))
    optimizer = torch.optim.SGD((one for one in model.parameters() if one.requires_grad), lr=3.0)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.save_pretrained(folder)
    return model


def test_two_adapters_trained_by_peft_are_merged_by_the_command_and_loaded_by_peft(tmp_path, call):
    base = tmp_path / "base"
    noisy("mixtral", 0).save_pretrained(base)
    deltas = {name: theirs(trained(base, seed, tmp_path / name).eval()) for seed, name in enumerate("ab")}
    folders = [f"{name}={tmp_path / name}" for name in "ab"]
    assert "gate_up_proj 4 48×16 expert" in call("inspect", *folders)
    assert "share" in call("interference", *folders)
    assert "experts" in call("interference", *folders, "--json")
    assert "rank 4" in call("merge", *folders, "--out", tmp_path / "out", "-m", "task_arithmetic", "--scale", "0.5")
    with torch.no_grad():
        expected = {name: (deltas["a"][name] + deltas["b"][name]) / 2 for name in deltas["a"]}
        logits = by_hand("mixtral", expected)
        assert float((logits - outputs(noisy("mixtral", 0))).abs().max()) > 1e-2
        found = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out").eval()
        torch.testing.assert_close(outputs(found), logits, rtol=1e-4, atol=1e-5)
