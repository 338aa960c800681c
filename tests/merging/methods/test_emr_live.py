"""EMR in a live model: a task's weights inside of a block, or for good."""

from functools import partial

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from osrm_peft import load_adapter, merge_adapters
from osrm_peft.adapters.factors import Factors
from osrm_peft.models.layers import as_weight
from tests.helpers.adapters import kind_of, two_adapters
from tests.helpers.lora import lora
from tests.helpers.models import make_base, make_batch


@pytest.fixture
def folders(tmp_path):
    """folders(variant) → {task: folder}."""
    return partial(two_adapters, tmp_path)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(model, before):
    now = model.state_dict()
    return set(now) == set(before) and all(torch.equal(now[name], before[name]) for name in before)


def by_hand(merged, task, folder, kind="bert"):
    """Base weights + deltas + head, written out."""
    model = make_base(3, kind=kind)
    with torch.no_grad():
        for name, delta in merged.deltas(task).items():
            layer = model.get_submodule(name)
            layer.weight.add_(as_weight(layer, delta))
        for name, tensor in load_adapter(folder).heads.items():
            model.get_parameter(name).copy_(tensor)
    return model


@pytest.mark.parametrize("variant", ["plain", "embedding", "conv1d", "conv2d", "bfloat16", "one_layer"])
def test_the_model_is_the_task_s_in_the_block_and_afterwards_as_it_was(folders, variant):
    adapters, kind = folders(variant), kind_of(variant)
    merged = merge_adapters(adapters, "emr", scale=0.5)
    model, batch = make_base(3, kind=kind), make_batch(kind=kind)
    before, parameters = state(model), list(model.parameters())
    with torch.no_grad():
        plain = model(**batch).logits
        for task, folder in adapters.items():
            expected = by_hand(merged, task, folder, kind)(**batch).logits
            with merged.applied_to(model, task) as inside:
                assert inside is model
                torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-6, atol=1e-6)
            assert same_bits(model, before)
            assert not torch.allclose(expected, plain, atol=1e-3)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


def test_blocks_follow_each_other_and_nest(folders):
    adapters, model = folders(), make_base(3)
    merged, before = merge_adapters(adapters, "emr"), state(model)
    with merged.applied_to(model, "t1"):
        first = state(model)
        with merged.at_scale(2).applied_to(model, "t2"):
            assert not same_bits(model, first)
        assert same_bits(model, first)
    assert same_bits(model, before)


def test_a_block_that_raises_leaves_the_model_as_it_was(folders):
    model = make_base(3)
    before, merged = state(model), merge_adapters(folders(), "emr")
    with pytest.raises(RuntimeError, match="in the block"), merged.applied_to(model, "t1"):
        assert not same_bits(model, before)
        raise RuntimeError("in the block")
    assert same_bits(model, before)


def test_what_the_block_itself_trains_is_undone_in_its_layers_only(folders):
    """It restores what it wrote: the adapted weights and the head."""
    model, merged = make_base(3), merge_adapters(folders(), "emr")
    before = state(model)
    with merged.applied_to(model, "t1"), torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    written = {f"{name}.weight" for name in merged.layers} | {"classifier.weight", "classifier.bias"}
    assert changed == {name for name, _ in model.named_parameters()} - written


def test_a_bfloat16_model_takes_one_rounding_and_returns_to_its_bits(folders):
    adapters = folders()
    merged, model = merge_adapters(adapters, "emr"), make_base(3).bfloat16()
    before = state(model)
    with merged.applied_to(model, "t1"):
        for name, delta in merged.deltas("t1").items():
            weight = model.get_submodule(name).weight
            assert torch.equal(weight, (before[f"{name}.weight"].float() + delta).bfloat16())
    assert same_bits(model, before)


def tied_model():
    config = {"vocab_size": 12, "n_embd": 4, "n_layer": 1, "n_head": 1, "n_positions": 8}
    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**config, **special, name_or_path="tiny")).eval()


def tied_adapter(seed):
    """Of the embedding and the head, which share a weight; both with the same change of it."""
    one = lora(seed, {"transformer.wte": (4, 12, 2)})
    wte = one.factors["transformer.wte"]
    one.factors["lm_head"] = Factors(wte.B.mT.clone(), wte.A.mT.clone(), wte.s)
    return one


def test_layers_that_share_a_weight_change_it_once():
    model, merged = tied_model(), merge_adapters({"s": tied_adapter(1), "t": tied_adapter(2)}, "emr")
    before = state(model)
    with merged.applied_to(model, "s"):
        assert model.lm_head.weight is model.transformer.wte.weight
        expected = before["lm_head.weight"] + merged.deltas("s")["lm_head"]
        torch.testing.assert_close(model.lm_head.weight.detach(), expected)
    assert same_bits(model, before)


def test_layers_that_share_a_weight_and_differ_are_refused_and_unchanged():
    model = tied_model()
    before, adapters = state(model), {"s": tied_adapter(1), "t": tied_adapter(2)}
    adapters["s"].factors["lm_head"].B.mul_(1.5)
    merged = merge_adapters(adapters, "emr")
    for use in (lambda: merged.applied_to(model, "s").__enter__(), lambda: merged.load(model, "s")):
        with pytest.raises(ValueError, match=r"shares its weight with .*, .* one weight cannot hold"):
            use()
        assert same_bits(model, before)


@pytest.mark.parametrize("layer", ["transformer.wte", "lm_head"])
def test_a_weight_shared_with_a_layer_without_adapter_is_refused_or_right(layer):
    model, apart, ids = tied_model(), tied_model(), torch.arange(8)[None]
    one = tied_adapter(1)
    one.factors = {layer: one.factors[layer]}
    merged = merge_adapters({"s": one}, "emr")
    apart.lm_head.weight = torch.nn.Parameter(apart.lm_head.weight.detach().clone())
    with torch.no_grad():
        target = apart.get_submodule(layer)
        target.weight.add_(as_weight(target, merged.deltas("s")[layer]))
        try:
            with merged.applied_to(model, "s"):
                torch.testing.assert_close(model(ids).logits, apart(ids).logits, rtol=1e-4, atol=1e-4)
        except ValueError as error:
            assert "shares its weight" in str(error)


def test_load_writes_a_task_for_good(folders):
    adapters, model = folders(), make_base(3)
    merged = merge_adapters(adapters, "emr")
    assert merged.load(model, "t2") is model
    expected = by_hand(merged, "t2", adapters["t2"])
    assert same_bits(model, state(expected))


def test_load_takes_the_base_model_by_name(folders, base_folder):
    merged = merge_adapters(folders(), "emr")
    model = merged.load(base_folder, "t1")
    assert not model.training and same_bits(model, state(merged.load(make_base(3), "t1")))
    with pytest.raises(ValueError, match="no task 'x' was merged, only t1, t2"):
        merged.load("nowhere", "x")


def narrower(adapters):
    merged = merge_adapters(adapters, "emr")
    return merged, make_base(3, hidden_size=8), "t1", r"has \(8, 8\) at '.*query', the merge \(16, 16\): pass the base"


def shallower(adapters):
    merged = merge_adapters(adapters, "emr")
    return merged, make_base(3, num_hidden_layers=1), "t1", r"has no such layer at 'bert.encoder.layer.1"


def other_head(adapters):
    return merge_adapters(adapters, "emr"), make_base(2), "t1", r"the model's is \(2.*: load .* with num_labels=3"


def wrapped(adapters):
    merged = merge_adapters(adapters, "emr")
    return merged, load_adapter(adapters["t1"]).attach(make_base(3)).get_base_model(), "t1", r"without adapter"


def unknown_task(adapters):
    return merge_adapters(adapters, "emr"), make_base(3), "t9", r"no task 't9' was merged, only t1, t2"


@pytest.mark.parametrize("case", [narrower, shallower, other_head, wrapped, unknown_task])
def test_another_model_or_task_is_refused_with_nothing_changed(folders, case):
    merged, model, task, message = case(folders())
    before = state(model)
    for use in (lambda: merged.applied_to(model, task).__enter__(), lambda: merged.load(model, task)):
        with pytest.raises(ValueError, match=message):
            use()
        assert same_bits(model, before)
    if case is unknown_task:
        for use in (merged.deltas, merged.adapter):
            with pytest.raises(ValueError, match=message):
                use(task)
