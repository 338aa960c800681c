import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertModel

from osrm_peft import LeastSquares, interference, load_adapter, merge_adapters
from osrm_peft.merging.plan import plan_merge
from osrm_peft.merging.request import MergeRequest
from tests.helpers.adapters import make_adapter
from tests.helpers.lora import LAYERS, close, dense, lora
from tests.helpers.merging import merge, statistic
from tests.helpers.models import TINY, make_base, make_batch
from tests.helpers.papers import paper

NAMES = ["h.0.attn.q", "h.0.attn.v", "h.1.attn.q", "h.1.attn.v"]
DEEP = dict.fromkeys(NAMES, (4, 5, 2))


def three():
    return {task: lora(seed, DEEP) for seed, task in enumerate("stu", start=1)}


def expected(name, *weights):
    return torch.einsum("t,ton->on", torch.tensor(weights, dtype=torch.float64), dense(three(), name))


@pytest.mark.parametrize("method", ["concat", "task_arithmetic"])
def test_the_first_pattern_that_matches_counts(method):
    weights = {
        "s": 2,
        "t": {"h.0.*": 0.5, "*.q": -3, "*": 1},
        "u": {"*.attn.v": 0, "h.[01].attn.q": 4, "*.q": 9},
    }
    merged = merge_adapters(three(), method, weights=weights, scale=1).deltas()
    for name, row in zip(NAMES, [(2, 0.5, 4), (2, 0.5, 0), (2, -3, 4), (2, 1, 0)], strict=True):
        close(merged[name], expected(name, *row), 1e-6)


def test_patterns_match_the_whole_name_and_its_case():
    weights = [1, {"attn": 7, "H.0*": 7, "h.0.attn": 7, "h.?.attn.?": 3}, 1]
    merged = merge_adapters(three(), "concat", weights=weights).deltas()
    for name in NAMES:
        close(merged[name], expected(name, 1, 3, 1), 1e-6)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"h.0.*": 1, "*.q": 2}, r"no pattern of task 't' \(h.0.\*, \*.q\) matches layer 'h.1.attn.v': add '\*'"),
        ({}, r"no pattern of task 't' \(\) matches layer 'h.0.attn.q'"),
        ({"h.0.*": "x", "*": 1}, r"weight of 't' at 'h.0.\*'='x' must be a finite number"),
        ({"*": float("nan")}, r"weight of 't' at '\*'=nan must be a finite number"),
        ({"*": True}, r"weight of 't' at '\*'=True must be a finite number"),
    ],
)
def test_a_layer_without_a_weight_or_with_no_number_is_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        merge_adapters(three(), "average", weights={"s": 1, "t": weights, "u": 1})


def test_the_manifest_has_a_number_a_task_or_one_a_layer():
    weights = {"u": 1, "s": {"h.0.*": 2, "*": 1}, "t": {"*": 5}}
    merged = merge_adapters(three(), "average", weights=weights)
    assert merged.manifest["weights"] == {
        "s": dict(zip(NAMES, [2, 2, 1, 1], strict=True)),
        "t": dict.fromkeys(NAMES, 5),
        "u": dict.fromkeys(NAMES, 1),
    }
    json.dumps(merged.manifest)
    same = merge_adapters(three(), "average", weights={"u": 1, "s": {"h.*": 2}, "t": 5})
    assert same.manifest["weights"] == {"s": 2, "t": 5, "u": 1}


def test_the_average_divides_by_each_layer_s_own_sum():
    weights = {"s": {"h.0.*": 3, "*": 1}, "t": 1, "u": {"*.v": -1, "*": 0}}
    merged = merge_adapters(three(), "average", weights=weights).deltas()
    for name, row in zip(NAMES, [(3, 1, 0), (3, 1, -1), (1, 1, 0), (1, 1, -1)], strict=True):
        close(merged[name], expected(name, *row) / sum(row), 1e-6)
    with pytest.raises(ValueError, match=r"layer 'h.1.attn.v': the weights \[1.0, 0.0, -1.0\] sum to 0"):
        merge_adapters(three(), "average", weights=weights | {"t": {"h.1.*.v": 0, "*": 1}})


def test_ties_votes_with_each_layer_s_weights_on_what_the_whole_model_kept():
    weights = {"s": {"h.0.*": 3, "*": 1}, "t": 1, "u": {"*.v": -2, "*": 1}}
    rows = dict(zip(NAMES, [(3, 1, 1), (3, 1, -2), (1, 1, 1), (1, 1, -2)], strict=True))
    merged = merge_adapters(three(), "ties", weights=weights, density=0.4).deltas()
    tau = {name: dense(three(), name).float() for name in NAMES}
    for t in range(3):
        flat = torch.cat([tau[name][t].flatten() for name in NAMES])
        threshold = flat.abs().sort(descending=True).values[round(0.4 * len(flat)) - 1]
        for name in NAMES:
            tau[name][t] *= tau[name][t].abs() >= threshold
    for name in NAMES:
        scaled = torch.tensor(rows[name])[:, None, None] * tau[name]
        close(merged[name].flatten(), torch.tensor(paper(scaled.flatten(1).tolist(), 1.0)), 1e-6)


@pytest.mark.parametrize("method", ["dare", "emr", "iso", "lore", "tsv", "regmean"])
def test_any_method_on_a_layer_is_that_of_the_layer_s_weights(method):
    """Methods without statistics over the model: a merge with weights by layer is one merge a layer."""
    rows = {"a": (2.0, -1.0), "b": (0.5, 3.0)}
    weights = [{"a": 2, "*": 0.5}, {"b": 3, "?": -1}]
    adapters = {"s": lora(1), "t": lora(2)}
    together = merge(adapters, method, weights=weights)
    for name, row in rows.items():
        alone = merge(adapters, method, weights=list(row))
        if method == "emr":  # its scales are over the model: compare what is elected
            assert torch.equal(together.layers[name].unified, alone.layers[name].unified)
            assert torch.equal(together.layers[name].masks, alone.layers[name].masks)
        else:
            close(together.deltas()[name], alone.deltas()[name], 1e-9)


def test_emr_s_scales_take_each_layer_s_weight():
    adapters = {"s": lora(1)}
    merged = merge_adapters(adapters, "emr", weights=[{"a": -2, "b": 0.5}])
    for name, weight in (("a", -2), ("b", 0.5)):
        close(merged.deltas("s")[name], weight * dense(adapters, name)[0], 1e-6)


# ---- layers of the bare model


def make_bare(folder, seed=5, targets=("query", "value")):
    """An adapter trained on BertModel: its layers are named without `bert.`."""
    torch.manual_seed(0)
    base = BertModel(BertConfig(**TINY, name_or_path="tiny"))
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, target_modules=list(targets)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return model


def test_adapters_of_the_bare_model_are_aligned_with_a_task_model_s(tmp_path):
    bare = make_bare(tmp_path / "bare")
    make_adapter(tmp_path / "whole", seed=1)
    assert all(name.startswith("encoder.") for name in load_adapter(tmp_path / "bare").factors)
    own, other = (load_adapter(tmp_path / name).factors for name in ("bare", "whole"))
    for order in (("bare", "whole"), ("whole", "bare")):
        weights = {"bare": {"bert.encoder.layer.0.*": 2, "*": 1}, "whole": 1}
        merged = merge_adapters({task: tmp_path / task for task in order}, "concat", weights=weights)
        assert list(merged.layers) == sorted(other)
        for name, delta in merged.deltas().items():
            by_hand = own[name.removeprefix("bert.")].delta() * (2 if "layer.0" in name else 1)
            close(delta, by_hand + other[name].delta(), 1e-6)
    from_live = merge_adapters({"bare": bare, "whole": tmp_path / "whole"}, "concat", weights=weights).deltas()
    for name, delta in merged.deltas().items():
        close(from_live[name], delta, 1e-6)
    model = merged.load(make_base(3), task="whole")
    plain = make_base(3)
    with torch.no_grad():
        for name, delta in merged.deltas().items():
            plain.get_submodule(name).weight.add_(delta.float())
        for name, tensor in load_adapter(tmp_path / "whole").heads.items():
            plain.get_parameter(name).copy_(tensor)
        torch.testing.assert_close(model(**make_batch()).logits, plain(**make_batch()).logits, rtol=1e-5, atol=1e-5)


def test_an_adapter_of_some_of_the_layers_of_the_bare_model_is_aligned(tmp_path):
    make_bare(tmp_path / "bare", targets=["value"])
    make_adapter(tmp_path / "whole", seed=1)
    merged = merge_adapters({name: tmp_path / name for name in ("bare", "whole")}, "task_arithmetic", scale=1)
    other = load_adapter(tmp_path / "whole").factors
    assert set(merged.layers) == set(other)
    for name, delta in merged.deltas().items():
        assert (float((delta - other[name].delta()).norm()) < 1e-5) == ("query" in name)


def test_an_adapter_of_more_layers_of_the_bare_model_is_aligned(tmp_path):
    make_bare(tmp_path / "bare", targets=["query", "value", "key"])
    make_adapter(tmp_path / "whole", seed=1)
    merged = merge_adapters({name: tmp_path / name for name in ("bare", "whole")}, "task_arithmetic")
    merged.load(make_base(3), task="whole")


def test_adapters_of_the_bare_model_alone_keep_their_names(tmp_path):
    for seed in (5, 6):
        make_bare(tmp_path / f"t{seed}", seed=seed)
    merged = merge_adapters({f"t{seed}": tmp_path / f"t{seed}" for seed in (5, 6)}, "average")
    assert list(merged.layers) == sorted(load_adapter(tmp_path / "t5").factors)
    assert merged.load(BertModel(BertConfig(**TINY))) is not None


def test_other_layers_are_no_prefix():
    """`a` is the last part of neither `b` nor `ba`."""
    adapters = {"s": lora(1), "t": lora(2, {"ba": LAYERS["a"]})}
    assert list(merge_adapters(adapters, "concat").layers) == ["a", "b", "ba"]


def test_an_adapter_with_a_layer_whose_name_ends_another_s_keeps_both():
    own = lora(1, {"proj": (4, 5, 2), "vision.proj": (4, 5, 2)})
    assert list(merge_adapters({"s": own}, "concat").layers) == ["proj", "vision.proj"]
    other = lora(2, {"vision.proj": (4, 5, 1)})
    assert list(merge_adapters({"s": own, "t": other}, "concat").layers) == ["proj", "vision.proj"]


def test_statistics_of_the_bare_model_are_renamed_with_its_adapter(tmp_path):
    make_bare(tmp_path / "bare")
    make_adapter(tmp_path / "whole", seed=1)
    adapters = {name: tmp_path / name for name in ("bare", "whole")}
    statistics = {name: statistic("gram", name, load_adapter(folder).shapes) for name, folder in adapters.items()}
    merged = merge_adapters(adapters, "regmean", statistics=statistics)
    assert list(merged.layers) == sorted(load_adapter(tmp_path / "whole").factors)


def test_average_refuses_weights_that_sum_to_0_on_any_layer_at_once():
    adapters = {"s": lora(1), "t": lora(2)}
    with pytest.raises(ValueError, match=r"the weights \[1.0, -1.0\] sum to 0, so they have no average"):
        plan_merge(MergeRequest(adapters, "average", weights={"s": 1, "t": {"b": -1, "*": 1}}))


def test_features_of_a_fine_tuned_model_are_no_features():
    adapters = {"s": lora(1)}
    gram = {"s": statistic("gram", "s", adapters["s"].shapes)}
    for call in (
        lambda: merge_adapters(adapters, "ties", scale=LeastSquares(gram)),
        lambda: interference(adapters, gram),
    ):
        with pytest.raises(ValueError, match=r"the statistics of task '.' are of its fine-tuned model \(collect_gram"):
            call()


def test_statistics_of_another_adapter_or_without_a_gram_are_refused(tmp_path, caplog):
    for seed in (1, 2):
        make_adapter(tmp_path / f"t{seed}", seed=seed)
    adapters = {f"t{seed}": tmp_path / f"t{seed}" for seed in (1, 2)}
    loaded = {task: load_adapter(folder) for task, folder in adapters.items()}
    made = {task: statistic("gram", task, adapter.shapes) for task, adapter in loaded.items()}
    own = {task: replace(one, adapter_sha256=loaded[task].sha256) for task, one in made.items()}
    assert merge_adapters(adapters, "regmean", statistics=own).manifest["statistics"] == dict.fromkeys(own, "in memory")
    with pytest.raises(ValueError, match=r"statistics of 't1' are of another adapter, or of it before a training"):
        merge_adapters(adapters, "regmean", statistics={"t1": own["t2"], "t2": own["t1"]})
    with pytest.raises(ValueError, match=r"statistics of 't2' hold one mean vector, no Gram matrix"):
        merge_adapters(adapters, "regmean", statistics=own | {"t2": replace(own["t2"], statistic="mean")})
    features = {task: replace(one, of_finetuned_model=False, weight_hash=task) for task, one in made.items()}
    with pytest.raises(ValueError, match="features are of different base models"):
        merge_adapters(adapters, "concat", weights=LeastSquares(features))
    with pytest.raises(ValueError, match="statistics of 't1' are those of 't2', which is merged, too: give each"):
        merge_adapters(adapters, "regmean", statistics={"t1": made["t2"], "t2": made["t1"]})
    merge_adapters(adapters, "regmean", statistics=made | {"t2": replace(made["t2"], task="other")})
    assert "statistics of 't2' were collected as those of 'other'" in caplog.text


def test_a_float16_merge_keeps_entries_below_float16_s_smallest():
    small = lora(1, {"a": (6, 5, 2)}, s=1e-9)
    half = replace(small, dtype=torch.float16)
    emr = merge_adapters({"s": half}, "emr")
    close(emr.deltas("s")["a"], dense({"s": small}, "a")[0], 1e-6)
    assert emr.layers["a"].unified.dtype == torch.float32
