"""An adapter in a live base model does what stock PEFT does, and leaves nothing behind."""

import pytest
import torch
from peft import PeftModel

from osrm_peft import load_adapter, merge_adapters
from osrm_peft.adapters.live import LiveBase, applied_to
from tests.helpers.adapters import VARIANTS, kind_of, make_adapter, two_adapters
from tests.helpers.models import make_base, make_batch


def logits(model, kind="bert"):
    with torch.no_grad():
        return model(**make_batch(kind=kind)).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_live_base_gives_the_logits_of_stock_peft_and_is_itself_again(variant, tmp_path):
    folder, kind = two_adapters(tmp_path, variant)["t1"], kind_of(variant)
    stock = PeftModel.from_pretrained(make_base(kind=kind), folder).eval()
    base = make_base(kind=kind).eval()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with applied_to(load_adapter(folder), base) as model:
        # two sums in another order, float32
        torch.testing.assert_close(logits(model, kind), logits(stock, kind), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert not [name for name, _ in base.named_parameters() if "lora" in name]


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "lore", "tsv"])
def test_a_merge_in_a_live_base_is_the_merge_that_is_loaded(method, tmp_path):
    merged, base = merge_adapters(two_adapters(tmp_path), method), make_base()
    for task in ("t1", "t2"):
        with merged.applied_to(base, task) as model:
            torch.testing.assert_close(logits(model), logits(merged.load(make_base(), task)), rtol=1e-4, atol=1e-5)


def test_an_error_in_the_block_takes_the_adapter_out_as_well(tmp_path):
    adapter, base = load_adapter(two_adapters(tmp_path)["t1"]), make_base()
    before = logits(base)
    with pytest.raises(RuntimeError, match="in the block"), applied_to(adapter, base):
        assert not torch.equal(logits(base), before)
        raise RuntimeError("in the block")
    assert torch.equal(logits(base), before)


def test_a_live_base_is_in_memory_once_with_a_head_for_each_width(tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    adapters = {}
    for task, labels in (("three", 3), ("two", 2), ("also_three", 3)):
        make_adapter(tmp_path / task, num_labels=labels, seed=labels)
        adapters[task] = load_adapter(tmp_path / task)
    live = LiveBase(str(tmp_path / "base"))
    three, two = live.of(adapters["three"]), live.of(adapters["two"])
    assert live.of(adapters["also_three"]) is three is not two
    own = {name for name, one in two.named_parameters() if all(one is not other for other in three.parameters())}
    assert own == {"classifier.weight", "classifier.bias"}
    with applied_to(adapters["two"], two) as model:
        assert logits(model).shape == (4, 2)
        assert logits(three).shape == (4, 3)
