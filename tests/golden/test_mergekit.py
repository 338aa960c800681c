"""Against what mergekit made of the same adapters (`record_mergekit.py`): where we agree, and where we differ."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from osrm_peft import merge_adapters
from osrm_peft.adapters.factors import Factors
from osrm_peft.adapters.lora_adapter import LoraAdapter

RECORD = Path(__file__).with_name("mergekit.safetensors")


@pytest.fixture(scope="module")
def about():
    with safe_open(RECORD, framework="pt") as file:
        return json.loads(file.metadata()["about"])


@pytest.fixture(scope="module")
def adapters(about):
    """{name: LoraAdapter} of the recorded A and B."""
    factors = {}
    with safe_open(RECORD, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (no mapping)
            if key.endswith(":A"):
                name, layer, _ = key.split(":")
                A, B = file.get_tensor(key), file.get_tensor(key[:-1] + "B")
                factors.setdefault(name, {})[layer] = Factors(A, B, about["scale"])
    config = {"base_model_name_or_path": "tiny", "target_modules": ["q_proj", "v_proj"], "peft_type": "LORA"}
    return {name: LoraAdapter(layers, {}, config) for name, layers in factors.items()}


@pytest.fixture(scope="module")
def rounding(about):
    """The largest error of a recorded delta: that of float32 sums with the base weights W in them.

    In units of |W| 2⁻²⁴: 1 from the baked weights W + τ_t, up to 3 from adding 3 of them up ("linear" does), 1 from
    the merged W + τ. The rounding of τ itself is smaller, as τ is; ours never sees W.
    """
    return 5 * about["largest_weight"] * 2**-24


def mergekit(case):
    with safe_open(RECORD, framework="pt") as file:
        keys = [key for key in file.keys() if key.startswith(f"{case}:") and key.count(":") == 1]  # noqa: SIM118
        deltas = {key.split(":")[1]: file.get_tensor(key).double() for key in keys}
    assert len(deltas) == 4
    return deltas


def ours(adapters, about, case, **options):
    """The same adapters and weights as in mergekit's configuration of this case."""
    config = about["configs"][case]
    weights = {model["model"]: model["parameters"]["weight"] for model in config["models"]}
    scale = config["parameters"].get("lambda", 1.0)
    method = {"linear": "average"}.get(config["merge_method"], config["merge_method"])
    chosen = {name: adapters[name] for name in weights}
    return merge_adapters(chosen, method, weights=weights, scale=scale, **options).deltas()


def largest_difference(found, expected):
    assert set(found) == set(expected)
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def kept(delta, rounding):
    return int((delta.abs() > rounding).sum())


def test_the_record_is_of_the_merges_that_are_tested_here(about, adapters):
    assert about["mergekit"] == "0.1.5" and about["dtype"] == "float32"
    assert {name: config["merge_method"] for name, config in about["configs"].items()} == {
        "task_arithmetic": "task_arithmetic",
        "linear": "linear",
        **dict.fromkeys(("ties", "ties_alone", "ties_weighted", "ties_equal_entries", "ties_opposite"), "ties"),
    }
    assert {tuple(adapter.shapes.values()) for adapter in adapters.values()} == {((16, 4, 16), (8, 4, 16)) * 2}


@pytest.mark.parametrize("case", ["task_arithmetic", "linear"])
@pytest.mark.parametrize("space", ["core", "weight"])
def test_task_arithmetic_is_ours_and_linear_is_our_average(adapters, about, rounding, case, space):
    assert largest_difference(ours(adapters, about, case, space=space), mergekit(case)) < rounding


def test_ties_at_equal_weights_is_ours_with_layers_trimmed_on_their_own(adapters, about, rounding):
    theirs = mergekit("ties")  # density 0.25: 64 and 32 entries of each adapter, for both of us
    assert largest_difference(ours(adapters, about, "ties", density=0.25, trim="layer"), theirs) < rounding
    over_the_model = ours(adapters, about, "ties", density=0.25)
    assert largest_difference(over_the_model, theirs) > 1000 * rounding


def test_mergekit_rounds_the_kept_entries_down_and_we_to_the_nearest(adapters, about, rounding):
    theirs = mergekit("ties_alone")  # one adapter at density 0.2: 51.2 of 256 entries, 25.6 of 128
    per_layer = ours(adapters, about, "ties_alone", density=0.2, trim="layer")
    over_the_model = ours(adapters, about, "ties_alone", density=0.2)
    assert [kept(theirs[name], rounding) for name in sorted(theirs)] == [51, 25, 51, 25]
    assert [kept(per_layer[name], rounding) for name in sorted(theirs)] == [51, 26, 51, 26]
    assert [kept(per_layer[name] - theirs[name], rounding) for name in sorted(theirs)] == [0, 1, 0, 1]
    counts = [kept(over_the_model[name], rounding) for name in sorted(theirs)]
    assert sum(counts) == 154 and min(counts[2:]) > max(counts[:2])  # of 768; the second block's B are twice as large


def test_mergekit_divides_ties_by_agreeing_weights_and_we_by_their_number(adapters, about, rounding):
    theirs = mergekit("ties_weighted")  # density 1; both of us elect signs after the weights
    found = ours(adapters, about, "ties_weighted", density=1)
    weights = torch.tensor([1.0, 3.0, 0.5]).view(3, 1, 1)
    for name in theirs:
        weighted = weights * torch.stack([adapters[task].factors[name].delta() for task in "abc"])
        agrees = weighted.sign() == weighted.sum(0).sign()
        by_weight = found[name] * agrees.sum(0) / (weights * agrees).sum(0)
        assert (by_weight - theirs[name]).abs().max() < rounding
        assert (found[name] - theirs[name]).abs().max() > 1000 * rounding


def test_of_equal_entries_mergekit_keeps_any_k_and_we_keep_all(adapters, about):
    theirs = mergekit("ties_equal_entries")  # all are ±2; density 0.25
    found = ours(adapters, about, "ties_equal_entries", density=0.25, trim="layer")
    for name, delta in theirs.items():
        assert int((delta.abs() == 2).sum()) == delta.numel() // 4 and int((delta == 0).sum()) == delta.numel() * 3 // 4
        torch.testing.assert_close(found[name].abs(), torch.full_like(delta, 2))


def test_where_the_votes_cancel_mergekit_elects_plus_and_we_nothing(adapters, about):
    found = ours(adapters, about, "ties_opposite", density=1)  # ±2 and ∓2
    for name, delta in mergekit("ties_opposite").items():
        assert torch.equal(delta, torch.full_like(delta, 2))
        assert not found[name].any()
