"""What every registered merge method keeps, over every kind of plain LoRA adapter."""

import hashlib
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

from osrm_peft import load_adapter, merge_adapters
from osrm_peft.merging import METHODS
from tests.conftest import make_adapter, make_base, make_batch
from tests.test_adapters import VARIANTS

# name: options under which one adapter of weight 1 is returned as it is (nothing trimmed)
CASES = {"average": {}, "task_arithmetic": {}, "ties": {"density": 1.0}, "lore": {}}
LINEAR = {"average", "task_arithmetic"}


def test_every_method_has_a_case():
    assert set(CASES) == set(METHODS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for variant, config in VARIANTS.items():
        for seed in (1, 2, 3):
            make_adapter(root / f"{variant}{seed}", seed=seed, num_labels=1 + seed, **config)
    return root


def three(folders, variant):
    return {f"task{seed}": folders / f"{variant}{seed}" for seed in (1, 2, 3)}


def close(a, b, tolerance=1e-5):
    assert set(a) == set(b)
    for name in a:
        size = max(float(a[name].norm()), float(b[name].norm()), 1e-9)
        assert float((a[name] - b[name]).norm()) <= tolerance * size, name


@pytest.mark.parametrize("space", ["core", "weight"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_one_adapter_with_weight_1_returns_itself(folders, method, variant, space):
    folder = folders / f"{variant}1"
    merged = merge_adapters({"task1": folder}, method, scale=1.0, space=space, **CASES[method])
    close(
        merged.deltas(),
        {name: factors.delta().double() for name, factors in load_adapter(folder).factors.items()},
    )
    assert min(merged.energy_kept().values()) == pytest.approx(1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_adapters_does_not_matter(folders, method, variant):
    adapters = three(folders, variant)
    weights = {"task1": 1.0, "task2": -0.5, "task3": 2.0}
    turned = dict(reversed(adapters.items()))
    close(
        merge_adapters(adapters, method, weights=weights).deltas(),
        merge_adapters(turned, method, weights=weights).deltas(),
    )


@pytest.mark.parametrize("space", ["core", "weight"])
@pytest.mark.parametrize("method", METHODS)
def test_the_split_into_b_and_a_does_not_matter(folders, method, space):
    """Gauge invariance under (A, B) → (R A, B R⁻¹): the adapters' task vectors are the same."""
    adapters = {name: load_adapter(folder) for name, folder in three(folders, "plain").items()}
    turned = {}
    for name, adapter in adapters.items():
        R = torch.randn(4, 4) + 3 * torch.eye(4)
        turned[name] = replace(
            adapter,
            factors={
                layer: replace(factors, A=100 * R @ factors.A, B=factors.B @ torch.linalg.inv(R) / 100)
                for layer, factors in adapter.factors.items()
            },
        )
    close(
        merge_adapters(adapters, method, space=space).deltas(),
        merge_adapters(turned, method, space=space).deltas(),
        tolerance=1e-4,  # the gauged factors carry float32 rounding of their own
    )


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].commutes])
def test_the_core_is_exact_where_it_is_the_default(folders, method):
    adapters = three(folders, "rslora")
    core = merge_adapters(adapters, method)
    assert core.manifest["space"] == "core"
    close(core.deltas(), merge_adapters(adapters, method, space="weight").deltas())


@pytest.mark.parametrize("method", sorted(LINEAR))
def test_linearity(folders, method):
    adapters = three(folders, "plain")
    single = [
        merge_adapters({name: folder}, "task_arithmetic", scale=1.0).deltas() for name, folder in adapters.items()
    ]
    weights = [2.0, -1.0, 0.5]
    merged = merge_adapters(adapters, method, weights=weights, scale=0.7).deltas()
    total = sum(weights) if method == "average" else 1
    close(
        merged,
        {name: 0.7 / total * sum(w * task[name] for w, task in zip(weights, single, strict=True)) for name in merged},
    )


@pytest.mark.parametrize("space", ["core", "weight"])
@pytest.mark.parametrize("method", METHODS)
def test_untrained_adapters_merge_to_nothing(folders, method, space):
    zero = load_adapter(folders / "plain1")
    zero = replace(
        zero,
        factors={name: replace(factors, B=torch.zeros_like(factors.B)) for name, factors in zero.factors.items()},
    )
    merged = merge_adapters({"a": zero, "b": zero}, method, space=space)
    assert all(float(delta.abs().max()) == 0 for delta in merged.deltas().values())
    assert merged.for_task(None).rank == 1  # PEFT knows no rank 0


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_an_adapter_lacks_counts_as_zero(folders, method):
    mixed = {"all": folders / "plain1", "one": folders / "one_layer2"}
    merged = merge_adapters(mixed, method, **CASES[method])
    padded = load_adapter(folders / "one_layer2")
    zeros = {
        name: replace(factors, B=torch.zeros_like(factors.B))
        for name, factors in load_adapter(folders / "plain1").factors.items()
    }
    explicit = replace(padded, factors=zeros | padded.factors)
    close(
        merged.deltas(),
        merge_adapters({"all": mixed["all"], "one": explicit}, method, **CASES[method]).deltas(),
    )
    assert len(merged.deltas()) == 4


@pytest.mark.parametrize("method", METHODS)
def test_mixed_ranks(folders, method):
    mixed = {"r4": folders / "plain1", "r2": folders / "rank_pattern2"}
    merged = merge_adapters(mixed, method, scale=1.0)
    assert merged.for_task(None).rank <= (8 if METHODS[method].commutes else 16)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_inputs_are_untouched_the_dtype_is_kept_and_stock_peft_reloads(folders, method, variant, tmp_path):
    adapters = three(folders, variant)
    before = {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in adapters.values()
        for path in folder.iterdir()
        if path.is_file()
    }
    loaded = {name: load_adapter(folder) for name, folder in adapters.items()}
    copies = {name: {k: f.B.clone() for k, f in adapter.factors.items()} for name, adapter in loaded.items()}
    merged = merge_adapters(loaded, method)
    merged.save_pretrained(tmp_path / "merged")
    assert all(torch.equal(loaded[n].factors[k].B, B) for n, by_layer in copies.items() for k, B in by_layer.items())
    assert before == {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in before}

    dtype = VARIANTS[variant].get("dtype", torch.float32)
    tensors = load_adapter(tmp_path / "merged")
    assert tensors.dtype == dtype
    stock = PeftModel.from_pretrained(make_base(2), str(tmp_path / "merged")).eval()
    ours = make_base(2)
    with torch.no_grad():
        for name, delta in merged.deltas().items():
            ours.get_submodule(name).weight += delta.float()
        tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(
            stock(**make_batch()).logits, ours(**make_batch()).logits, rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("method", METHODS)
def test_a_lower_rank_is_the_best_approximation_and_says_what_it_loses(folders, method):
    exact = merge_adapters(three(folders, "plain"), method)
    cut = merge_adapters(three(folders, "plain"), method, rank=3)
    assert cut.for_task(None).rank == 3
    kept = cut.energy_kept()
    for name, delta in exact.deltas().items():
        U, S, Vh = torch.linalg.svd(delta)
        torch.testing.assert_close(cut.deltas()[name], (U[:, :3] * S[:3]) @ Vh[:3], rtol=1e-4, atol=1e-5)
        assert kept[name] == pytest.approx(float(S[:3].square().sum() / S.square().sum()), rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_scale_sweep_is_the_merge_at_that_scale(folders, method):
    adapters = three(folders, "plain")
    merged = merge_adapters(adapters, method)
    for scale in (-0.5, 0.0, 0.3, 1.0):
        close(merged.at_scale(scale).deltas(), merge_adapters(adapters, method, scale=scale).deltas(), 1e-9)
    assert merged.at_scale(0.4).manifest["scale"] == 0.4 and merged.manifest["scale"] == METHODS[method].scale
