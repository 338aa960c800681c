"""A tiny BERT made in memory, adapters of it, and no network."""

import pytest
import torch
from hypothesis import given, settings

from osrm_peft import merge_adapters
from osrm_peft.adapters.factors import Factors
from osrm_peft.merging.methods.concat import concat
from tests.helpers.adapters import make_adapter, tensors_of
from tests.helpers.lora import close, dense, draw, lora, problems


@settings(max_examples=25)
@given(problems)
def test_the_factors_are_exactly_the_adapters_own(problem):
    adapters, weights = draw(problem)
    factors = merge_adapters(adapters, "concat", weights=weights).layers["x"].direction.factors
    assert factors.rank == sum(problem[2]) and factors.s == 1
    assert torch.equal(factors.A, torch.cat([adapter.factors["x"].A for adapter in adapters.values()]))
    scaled = [w * f.s * f.B.double() for w, f in zip(weights, (a.factors["x"] for a in adapters.values()), strict=True)]
    torch.testing.assert_close(factors.B.double(), torch.cat(scaled, 1), rtol=2**-23, atol=0)  # one rounding


@settings(max_examples=25)
@given(problems)
def test_the_task_vector_is_the_weighted_sum_and_that_of_task_arithmetic(problem):
    adapters, weights = draw(problem)
    expected = sum(w * tau for w, tau in zip(weights, dense(adapters), strict=True))
    size = float(dense(adapters).norm()) * 2  # the sum itself may cancel
    merged = merge_adapters(adapters, "concat", weights=weights).deltas()["x"]
    close(merged, expected, 1e-6, size)
    for space in ("core", "weight"):
        same = merge_adapters(adapters, "task_arithmetic", weights=weights, scale=1, space=space).deltas()["x"]
        close(same, merged, 1e-6, size)


def test_an_adapter_without_the_layer_adds_no_row():
    adapters = {"both": lora(1), "one": lora(2, {"b": (4, 7, 1)})}
    merged = merge_adapters(adapters, "concat", weights=[2, -3])
    assert {name: layer.direction.factors.rank for name, layer in merged.layers.items()} == {"a": 2, "b": 4}
    for name in "ab":
        close(merged.deltas()[name], torch.einsum("t,ton->on", torch.tensor([2.0, -3]).double(), dense(adapters, name)),
              1e-6)  # fmt: skip


def test_one_task_is_itself_and_a_1x1_layer_is_a_number():
    one = Factors(torch.tensor([[3.0]]), torch.tensor([[2.0]]), 0.5)
    alone = concat([one], torch.tensor([1.0]))
    assert torch.equal(alone.A, one.A) and alone.delta().item() == 3
    assert concat([one, None, one], torch.tensor([1.0, 5.0, -2.0])).delta().item() == -3


def test_a_weight_of_0_and_an_adapter_of_zeros_keep_their_rows():
    zero = Factors(torch.ones(2, 3), torch.zeros(4, 2))
    merged = concat([zero, zero], torch.tensor([1.0, 0.0]))
    assert merged.rank == 4 and not merged.delta().any()


def test_an_adapter_minus_itself_is_nothing_but_rows():
    one = lora(1).factors["a"]
    merged = concat([one, one], torch.tensor([1.0, -1.0]))
    assert merged.rank == 4 and torch.equal(merged.A[:2], merged.A[2:])
    close(merged.delta(), torch.zeros(6, 5), 1e-6, float(one.delta().norm()))


def test_the_saved_file_holds_the_adapters_own_rows(tmp_path):
    for seed in (1, 2):
        make_adapter(tmp_path / f"t{seed}", seed=seed)
    merged = merge_adapters({f"t{seed}": tmp_path / f"t{seed}" for seed in (1, 2)}, "concat")
    merged.save_pretrained(tmp_path / "out")
    for key, tensor in tensors_of(tmp_path / "out").items():
        if "lora_A" in key:
            assert torch.equal(tensor, torch.cat([tensors_of(tmp_path / f"t{seed}")[key] for seed in (1, 2)]))


def test_it_is_peft_s_cat(tmp_path):
    model = make_adapter(tmp_path / "t1", seed=1, task_type=None)  # without heads: PEFT does not combine those
    make_adapter(tmp_path / "t2", seed=2, r=2, task_type=None)
    model.load_adapter(str(tmp_path / "t2"), "second")
    model.add_weighted_adapter(["default", "second"], [0.5, 2.0], "cat", combination_type="cat")
    folders = {f"t{seed}": tmp_path / f"t{seed}" for seed in (1, 2)}
    for name, delta in merge_adapters(folders, "concat", weights=[0.5, 2]).deltas().items():
        theirs = model.get_base_model().get_submodule(name).get_delta_weight("cat").detach()
        close(delta, theirs, 1e-6)


def test_it_runs_on_factors_only():
    with pytest.raises(ValueError, match=r"concat runs in space 'factors' only, not 'core'"):
        merge_adapters({"t": lora(1)}, "concat", space="core")
