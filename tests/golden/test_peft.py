"""Live against PEFT's `add_weighted_adapter`: where it is right we agree; where it is not, the difference is asserted.

A trap that no longer springs means that PEFT has changed: then the test, and docs/papers.md, must too.
"""

import warnings

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from osrm_peft import load_adapter, merge_adapters
from osrm_peft.merging.methods.ties import ties
from tests.helpers.adapters import make_adapter
from tests.helpers.models import make_base

ROUNDING = 16 * 2**-23  # relative: what a float32 SVD of a 16×16 matrix, or sums of up to 16 products, may lose


def make_adapters(tmp_path, seeds=(1, 2), **config):
    """Rank 4, alpha 8, on four layers of 16×16; without a classifier, as PEFT merges none that has one."""
    folders = {f"t{seed}": tmp_path / f"t{seed}" for seed in seeds}
    for seed in seeds:
        make_adapter(folders[f"t{seed}"], seed=seed, **({"task_type": None} | config))
    return folders


def altered(folder, name, change):
    """A copy of the adapter in `folder`, its tensors mapped by change(key, tensor)."""
    copy = folder.with_name(name)
    copy.mkdir()
    (copy / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({key: change(key, tensor) for key, tensor in tensors.items()}, copy / "adapter_model.safetensors")
    return copy


def merge_with_peft(folders, weights, combination_type, **options):
    """A PeftModel that holds the adapters, and "merged"."""
    (first, folder), *others = folders.items()
    model = PeftModel.from_pretrained(make_base(), folder, adapter_name=first)
    for name, folder in others:
        model.load_adapter(folder, adapter_name=name)
    model.add_weighted_adapter(list(folders), weights, "merged", combination_type=combination_type, **options)
    return model


def lora_layers(model):
    found = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert len(found) == 4
    return found


def peft_deltas(folders, weights, combination_type, **options):
    layers = lora_layers(merge_with_peft(folders, weights, combination_type, **options))
    return {name: layer.get_delta_weight("merged").detach().double() for name, layer in layers.items()}


def our_deltas(folders, method="task_arithmetic", **options):
    return merge_adapters(folders, method, scale=1, **options).deltas()


def distance(found, expected):
    """‖found − expected‖ / ‖expected‖ over all layers."""
    assert set(found) == set(expected) and len(found) == 4
    lost = sum((found[name] - expected[name]).square().sum() for name in expected)
    return float((lost / sum(delta.square().sum() for delta in expected.values())).sqrt())


def times(factor, deltas):
    return {name: factor * delta for name, delta in deltas.items()}


def above(size, delta):
    """How many entries are larger."""
    return int((delta.abs() > size).sum())


# Where PEFT is right


@pytest.mark.parametrize("alpha", [4, 8])  # alpha = 2r was counted twice up to PEFT 0.20
@pytest.mark.parametrize("rank", [8, 3])  # Σ r: exact; 3: truncated
def test_svd_is_our_task_arithmetic_at_that_rank(tmp_path, alpha, rank):
    folders = make_adapters(tmp_path, lora_alpha=alpha)
    theirs = peft_deltas(folders, [0.7, -0.4], "svd", svd_rank=rank)
    assert distance(theirs, our_deltas(folders, weights=[0.7, -0.4], rank=rank)) < ROUNDING


def test_cat_is_our_concat(tmp_path):
    folders = make_adapters(tmp_path)
    theirs = peft_deltas(folders, [0.7, -0.4], "cat")
    assert distance(theirs, our_deltas(folders, "concat", weights=[0.7, -0.4])) < ROUNDING


@pytest.mark.parametrize("density", [0.2, 0.25])  # 51 and 64 of 256 entries, for both of us
def test_ties_svd_is_our_ties_with_layers_trimmed_on_their_own(tmp_path, density):
    folders = make_adapters(tmp_path)
    theirs = peft_deltas(folders, [1.0, 1.0], "ties_svd", density=density, svd_rank=16)
    assert distance(theirs, our_deltas(folders, "ties", density=density, trim="layer")) < ROUNDING
    assert distance(theirs, our_deltas(folders, "ties", density=density)) > 0.2  # the paper trims the whole vector


# Where PEFT's TIES is another one than ours


@pytest.mark.parametrize(("density", "kept_by_peft", "kept_by_us"), [(0.2, 51, 51), (0.3, 76, 77), (0.001, 0, 1)])
def test_peft_rounds_the_number_of_kept_entries_down_and_may_keep_none(tmp_path, density, kept_by_peft, kept_by_us):
    (folder,) = make_adapters(tmp_path, seeds=[1]).values()
    twice = {"t1": folder, "copy": folder}  # so the result is one of them, trimmed
    theirs = peft_deltas(twice, [1.0, 1.0], "ties_svd", density=density, svd_rank=16)
    ours = our_deltas(twice, "ties", density=density, trim="layer")
    assert {above(1e-3, delta) for delta in theirs.values()} == {kept_by_peft}  # 0 became 1e-7 in the SVD, the least
    assert {above(1e-3, delta) for delta in ours.values()} == {kept_by_us}  # of the kept entries is above 0.1


def test_of_equal_entries_peft_keeps_any_k_and_we_keep_all(tmp_path):
    (folder,) = make_adapters(tmp_path, seeds=[1], r=1, lora_alpha=1).values()
    signs = altered(folder, "signs", lambda key, tensor: tensor.sign())  # every entry of the delta is ±1
    twice = {"signs": signs, "copy": signs}
    theirs = peft_deltas(twice, [1.0, 1.0], "ties_svd", density=0.25, svd_rank=16)
    ours = our_deltas(twice, "ties", density=0.25, trim="layer")
    assert {above(0.5, delta) for delta in theirs.values()} == {64}
    assert {above(0.5, delta) for delta in ours.values()} == {256}


def test_where_the_votes_cancel_peft_elects_plus_and_we_nothing(tmp_path):
    (folder,) = make_adapters(tmp_path, seeds=[1]).values()
    opposite = altered(folder, "opposite", lambda key, tensor: -tensor if "lora_B" in key else tensor)
    folders = {"t1": folder, "opposite": opposite}
    theirs = peft_deltas(folders, [1.0, 1.0], "ties_svd", density=0.25, svd_rank=16)
    trimmed = our_deltas({"t1": folder}, "ties", density=0.25, trim="layer")
    assert distance(theirs, {name: delta.abs() for name, delta in trimmed.items()}) < ROUNDING
    ours = our_deltas(folders, "ties", density=0.25, trim="layer")
    assert {above(0, delta) for delta in ours.values()} == {0}


def test_peft_elects_signs_before_the_weights_and_we_after(tmp_path):
    folders = make_adapters(tmp_path)
    with pytest.warns(UserWarning, match="no pruning"):  # density 1: the election alone
        theirs = peft_deltas(folders, [1.0, 3.0], "ties_svd", density=1.0, svd_rank=16)
    ours = our_deltas(folders, "ties", density=1.0, weights=[1.0, 3.0])
    one, two = (load_adapter(folder).factors for folder in folders.values())
    outvoted = 0
    for name in ours:
        before, after = (one[name].delta() + weight * two[name].delta() for weight in (1, 3))
        agree = before.sign() == after.sign()
        # 1e-5 against differences of the size of the entries, 0.1: the entry by entry rounding of a float32 SVD
        assert torch.equal((theirs[name] - ours[name]).abs() < 1e-5, agree)
        outvoted += int((~agree).sum())
    assert outvoted > 100  # of 1024


def test_ties_without_svd_trims_and_elects_in_a_and_b(tmp_path):
    folders = make_adapters(tmp_path)
    merged = merge_with_peft(folders, [1.0, 1.0], "ties", density=0.25)
    for layer in lora_layers(merged).values():
        for factors in (layer.lora_A, layer.lora_B):  # 16 of 64 entries each; every adapter's scale 2 is split as √2 √2
            stack = torch.stack([factors[name].weight.detach() for name in folders])
            expected = ties(stack, torch.full((2,), 2**0.5), density=0.25)
            torch.testing.assert_close(factors["merged"].weight.detach(), expected)
    theirs = {name: layer.get_delta_weight("merged").detach().double() for name, layer in lora_layers(merged).items()}
    assert distance(theirs, our_deltas(folders, "ties", density=0.25, trim="layer")) > 1


# Where PEFT is wrong


@pytest.mark.parametrize(
    ("combination_type", "options", "new_rank"), [("svd", {"svd_rank": 8}, 8), ("cat", {}, 8), ("linear", {}, 4)]
)
def test_peft_scales_rslora_merges_up_by_the_root_of_the_new_rank(tmp_path, combination_type, options, new_rank):
    plain = make_adapters(tmp_path / "plain", lora_alpha=16)
    stable = make_adapters(tmp_path / "stable", lora_alpha=8, use_rslora=True)  # 8/√4 = 16/4: the same task vectors
    theirs, wrong = (peft_deltas(folders, [0.7, -0.4], combination_type, **options) for folders in (plain, stable))
    assert distance(wrong, times(new_rank**0.5, theirs)) < ROUNDING
    ours, right = (our_deltas(folders, weights=[0.7, -0.4]) for folders in (plain, stable))
    assert distance(right, ours) < ROUNDING


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.5, 0.5], [0.7, -0.4]])
def test_linear_is_far_from_the_weighted_sum_and_ours_is_it(tmp_path, weights):
    folders = make_adapters(tmp_path)
    one, two = (load_adapter(folder).factors for folder in folders.values())
    total = {name: weights[0] * one[name].delta() + weights[1] * two[name].delta() for name in one}
    assert distance(peft_deltas(folders, weights, "linear"), total) > 0.5
    assert distance(our_deltas(folders, weights=weights), total) < ROUNDING
    assert distance(our_deltas(folders, "concat", weights=weights), total) < ROUNDING


def test_half_and_half_of_an_adapter_is_itself_and_under_linear_twice_it(tmp_path):
    (folder,) = make_adapters(tmp_path, seeds=[1]).values()
    alone = our_deltas({"t1": folder})
    twice = {"t1": folder, "copy": folder}
    assert distance(peft_deltas(twice, [0.5, 0.5], "linear"), times(2, alone)) < ROUNDING
    assert distance(our_deltas(twice, weights=[0.5, 0.5]), alone) < ROUNDING


def test_two_forms_of_a_task_vector_add_up_and_vanish_under_linear(tmp_path):
    (folder,) = make_adapters(tmp_path, seeds=[1]).values()
    folders = {"t1": folder, "flipped": altered(folder, "flipped", lambda key, tensor: -tensor)}
    assert {above(0, delta) for delta in peft_deltas(folders, [1.0, 1.0], "linear").values()} == {0}
    assert distance(our_deltas(folders), times(2, our_deltas({"t1": folder}))) < ROUNDING


def test_peft_drops_dora_s_magnitudes_silently_and_we_refuse_dora(tmp_path):
    model = make_adapter(tmp_path / "dora", task_type=None, use_dora=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(2)
    model.save_pretrained(tmp_path / "dora")
    folders = {"t1": tmp_path / "dora", "copy": tmp_path / "dora"}
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        merged = merge_with_peft(folders, [0.5, 0.5], "cat")
    assert not any("dora" in str(warning.message).lower() for warning in heard)
    for layer in lora_layers(merged).values():
        untrained = layer.base_layer.weight.norm(dim=1)
        magnitudes = layer.lora_magnitude_vector
        torch.testing.assert_close(magnitudes["t1"].weight, 2 * untrained)
        torch.testing.assert_close(magnitudes["merged"].weight, untrained)
    with pytest.raises(ValueError, match=r"has use_dora=True; DoRA rescales whole weight columns"):
        merge_adapters(folders, "concat")


def test_peft_ignores_an_adapter_without_a_weight_and_we_refuse(tmp_path):
    folders = make_adapters(tmp_path)
    theirs = peft_deltas(folders, [1.0], "svd", svd_rank=8)
    assert distance(theirs, our_deltas({"t1": folders["t1"]})) < ROUNDING  # t2 is nowhere
    with pytest.raises(ValueError, match="1 weights for 2 adapters: give one for each"):
        merge_adapters(folders, "task_arithmetic", weights=[1.0])


@pytest.mark.parametrize("combination_type", ["svd", "cat", "linear"])
def test_peft_refuses_adapters_with_classifiers_and_ours_merges_them(tmp_path, combination_type):
    folders = make_adapters(tmp_path, task_type="SEQ_CLS")
    with pytest.raises(ValueError, match="they target the same module with modules_to_save"):
        merge_with_peft(folders, [1.0, 1.0], combination_type)
    merged = merge_adapters(folders, "concat")
    headless = make_adapters(tmp_path / "headless")  # the same seeds, so the same factors
    assert distance(merged.deltas(), peft_deltas(headless, [1.0, 1.0], "cat")) < ROUNDING
    assert all(merged.for_task(task).heads for task in folders)
