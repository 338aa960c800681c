"""Adapters of live models: several, active or not, merged into the weights, wrapped, of half precision."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model

from osrm_peft import load_adapter, merge_adapters
from tests.zoo.adapters import adapted
from tests.zoo.models import noisy, outputs

SAVES = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
EMBEDS = {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}


def two_adapters(**config):
    """A model with the adapters default and b."""
    model = adapted("llama", 1, **config)
    model.add_adapter("b", LoraConfig(r=2, task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".b." in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("config", [SAVES, EMBEDS], ids=["saves", "embeds"])
def test_each_of_several_adapters_is_read_active_or_not(config):
    model = two_adapters(**config)
    for name in ("default", "b"):
        for active in ("default", "b"):
            model.set_adapter(active)
            found = load_adapter(model, adapter_name=name)
            with model.disable_adapter():
                disabled = load_adapter(model, adapter_name=name)
            model.set_adapter(name)
            for adapter in (found, disabled):
                close(outputs(adapter.attach(noisy("llama", 0))), outputs(model))


def test_several_active_adapters_are_refused_and_a_name_helps():
    model = two_adapters(target_modules=["q_proj"])
    model.base_model.set_adapter(["default", "b"])
    with pytest.raises(ValueError, match=r"several active adapters, default, b: say which .*adapter_name"):
        load_adapter(model)
    assert load_adapter(model, adapter_name="b").rank == 2


@torch.no_grad()
def test_an_adapter_merged_into_the_weights_is_read_unless_copies_hold_it():
    model = adapted("llama", 1, **SAVES)
    expected = outputs(model)
    model.merge_adapter()
    close(outputs(load_adapter(model).attach(noisy("llama", 0))), expected)
    model = adapted("llama", 1, **EMBEDS)
    expected = outputs(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"an adapter is merged into 'model.embed_tokens': call unmerge_adapter\(\)"):
        load_adapter(model)
    model.unmerge_adapter()
    close(outputs(load_adapter(model).attach(noisy("llama", 0))), expected, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel])
def test_a_wrapped_model_is_the_model_inside(wrap):
    model = adapted("llama", 1, **SAVES)
    close(outputs(load_adapter(wrap(model)).attach(noisy("llama", 0))), outputs(model))
    two = two_adapters(target_modules=["q_proj"])
    merged = merge_adapters({"default": wrap(two), "b": wrap(two)}, "average")
    for layer, delta in merged.deltas().items():
        both = [load_adapter(two, adapter_name=name).factors[layer].delta() for name in ("default", "b")]
        close(delta.float(), sum(both) / 2)
    with pytest.raises(ValueError, match=r"given for task 'x' has several adapters"):
        merge_adapters({"x": wrap(two)}, "average")


@torch.no_grad()
def test_compiled_layers_have_their_names():
    model = adapted("llama", 1, **SAVES)
    expected, names = outputs(model), set(load_adapter(model).factors)
    layers = model.get_base_model().model.layers
    layers[0], layers[1].self_attn = torch.compile(layers[0]), torch.compile(layers[1].self_attn)
    adapter = load_adapter(model)
    assert set(adapter.factors) == names
    close(outputs(adapter.attach(noisy("llama", 0))), expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept(dtype):
    model = adapted("llama", 1, **SAVES).to(dtype)
    adapter = load_adapter(model)
    assert adapter.dtype == dtype and {one.dtype for one in adapter.modules.values()} == {dtype}
    close(outputs(adapter.attach(noisy("llama", 0).to(dtype))).float(), outputs(model).float(), 5e-2)


def test_a_live_model_may_be_trained_on():
    model = adapted("llama", 1, **SAVES)
    adapter = load_adapter(model)
    before = copy.deepcopy([*adapter.modules.values()])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    assert all(torch.equal(one, other) for one, other in zip(before, adapter.modules.values(), strict=True))


def injected():
    return inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), noisy("llama", 0))


def added():
    model = noisy("llama", 0)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    return model


def mixed():
    return get_peft_model(noisy("llama", 0), LoraConfig(r=2, target_modules=["q_proj"]), mixed=True)


@pytest.mark.parametrize("make", [injected, added, mixed, lambda: noisy("llama", 0)])
def test_a_model_that_is_no_peft_model_is_told_so(make):
    with pytest.raises(TypeError, match=r"a (LlamaForCausalLM|PeftMixedModel) is no PeftModel: give .* the folder"):
        load_adapter(make())


@torch.no_grad()
def test_an_adapter_that_transformers_saved_is_read(tmp_path):
    model = added()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path)
    close(outputs(load_adapter(tmp_path).attach(noisy("llama", 0))), outputs(model.eval()))
