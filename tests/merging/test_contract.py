"""What every registered merge method keeps, over every kind of plain LoRA adapter."""

import hashlib
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

from osrm_peft import load_adapter, merge_adapters
from osrm_peft.merging import METHODS
from osrm_peft.models.layers import as_weight
from tests.helpers.adapters import VARIANTS, kind_of, make_adapter
from tests.helpers.merging import deltas, merge
from tests.helpers.models import make_base, make_batch

# name: options under which one adapter of weight 1 is returned as it is (nothing trimmed, nothing dropped)
CASES = {
    "average": {},
    "concat": {},
    "dare": {"drop_rate": 0.0},
    "dare_ties": {"drop_rate": 0.0, "density": 1.0},
    "emr": {},
    "fisher": {},
    "iso": {},
    "lore": {},
    "regmean": {},
    "task_arithmetic": {},
    "ties": {"density": 1.0},
    "tsv": {},
}
LINEAR = {"average", "concat", "task_arithmetic"}
FLATTENS = {"iso"}  # flattens the spectrum of a single adapter too: see its own test
ONE_LORA = [name for name in METHODS if not METHODS[name].per_task]
PLACES = [(name, space) for name in METHODS for space in METHODS[name].spaces]


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


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("method", "space"), [place for place in PLACES if place[0] not in FLATTENS])
def test_one_adapter_with_weight_1_returns_itself(folders, method, variant, space):
    folder = folders / f"{variant}1"
    merged = merge({"task1": folder}, method, scale=1.0, space="auto" if space == "factors" else space, **CASES[method])
    expected = {name: factors.delta() for name, factors in load_adapter(folder).factors.items()}
    if METHODS[method].per_task:
        # in a bfloat16 file the shared vector has one rounding, 2⁻⁹, of its own
        close(merged.deltas("task1"), expected, 4e-3 if variant == "bfloat16" else 1e-5)
    else:
        close(merged.deltas(), expected)
        assert min(merged.energy_kept().values()) == pytest.approx(1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_adapters_does_not_matter(folders, method, variant):
    adapters = three(folders, variant)
    weights = {"task1": 1.0, "task2": -0.5, "task3": 2.0}
    turned = dict(reversed(adapters.items()))
    close(deltas(merge(adapters, method, weights=weights)), deltas(merge(turned, method, weights=weights)))


@pytest.mark.parametrize(("method", "space"), PLACES)
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
    space = "auto" if space == "factors" else space
    close(
        deltas(merge(adapters, method, space=space)),
        deltas(merge(turned, method, space=space)),
        tolerance=1e-4,  # the gauged factors carry float32 rounding of their own
    )


@pytest.mark.parametrize("space", ["weight", "knots"])
@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].commutes])
def test_the_core_is_exact_where_it_is_the_default(folders, method, space):
    adapters = three(folders, "rslora")
    core = merge_adapters(adapters, method)
    assert core.manifest["space"] == "core"
    close(core.deltas(), merge_adapters(adapters, method, space=space).deltas())


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


@pytest.mark.parametrize(("method", "space"), PLACES)
def test_untrained_adapters_merge_to_nothing(folders, method, space):
    zero = load_adapter(folders / "plain1")
    zero = replace(
        zero,
        factors={name: replace(factors, B=torch.zeros_like(factors.B)) for name, factors in zero.factors.items()},
    )
    merged = merge({"a": zero, "b": zero}, method, space="auto" if space == "factors" else space)
    assert all(float(delta.abs().max()) == 0 for delta in deltas(merged).values())
    if method in ONE_LORA:
        assert merged.for_task(None).rank == (8 if space == "factors" else 1)  # PEFT knows no rank 0


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_an_adapter_lacks_counts_as_zero(folders, method):
    mixed = {"all": folders / "plain1", "one": folders / "one_layer2"}
    merged = merge(mixed, method, **CASES[method])
    padded = load_adapter(folders / "one_layer2")
    zeros = {
        name: replace(factors, B=torch.zeros_like(factors.B))
        for name, factors in load_adapter(folders / "plain1").factors.items()
    }
    explicit = replace(padded, factors={**zeros, **padded.factors})
    close(deltas(merged), deltas(merge({"all": mixed["all"], "one": explicit}, method, **CASES[method])))
    assert len(deltas(merged)) == (8 if METHODS[method].per_task else 4)


@pytest.mark.parametrize("method", ONE_LORA)
def test_mixed_ranks(folders, method):
    mixed = {"r4": folders / "plain1", "r2": folders / "rank_pattern2"}
    merged = merge(mixed, method, scale=1.0)
    assert merged.for_task(None).rank <= (16 if "weight" in METHODS[method].spaces[:1] else 8)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_inputs_are_untouched_the_dtype_is_kept_and_stock_peft_reloads(folders, method, variant, tmp_path):
    adapters, kind = three(folders, variant), kind_of(variant)
    before = {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in adapters.values()
        for path in folder.iterdir()
        if path.is_file()
    }
    loaded = {name: load_adapter(folder) for name, folder in adapters.items()}
    loaded["task1"].factors = dict(loaded["task1"].factors)  # in memory, where they could be written to
    copies = {k: (f.A.clone(), f.B.clone()) for k, f in loaded["task1"].factors.items()}
    merged = merge(loaded, method)
    one = merged.adapter("task1") if METHODS[method].per_task else merged.for_task(None)
    one.save_pretrained(tmp_path / "merged")
    if not METHODS[method].per_task:
        merged.save_pretrained(tmp_path / "whole")
        assert load_adapter(tmp_path / "whole").shapes == load_adapter(tmp_path / "merged").shapes
    for name, (A, B) in copies.items():
        assert torch.equal(loaded["task1"].factors[name].A, A) and torch.equal(loaded["task1"].factors[name].B, B)
    assert before == {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in before}

    dtype = VARIANTS[variant].get("dtype", torch.float32)
    assert load_adapter(tmp_path / "merged").dtype == dtype
    stock = PeftModel.from_pretrained(make_base(2, kind=kind), str(tmp_path / "merged")).eval()
    ours = make_base(2, kind=kind)
    expected = merged.deltas("task1") if METHODS[method].per_task else merged.deltas()
    with torch.no_grad():
        for name, delta in expected.items():
            layer = ours.get_submodule(name)
            layer.weight += as_weight(layer, delta.float())
        ours.load_state_dict(one.heads, strict=False)
        tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-4
        batch = make_batch(kind=kind)
        torch.testing.assert_close(stock(**batch).logits, ours(**batch).logits, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", ONE_LORA)
def test_a_lower_rank_is_the_best_approximation_and_says_what_it_loses(folders, method):
    exact = merge(three(folders, "plain"), method)
    cut = merge(three(folders, "plain"), method, rank=3)
    assert cut.for_task(None).rank == 3
    kept = cut.energy_kept()
    for name, delta in exact.deltas().items():
        U, S, Vh = torch.linalg.svd(delta)
        best, rest = (U[:, :3] * S[:3]) @ Vh[:3], S[3:].square().sum()
        assert float((cut.deltas()[name] - delta).square().sum()) == pytest.approx(float(rest), rel=1e-4)
        if float(S[2] - S[3]) > 1e-3 * float(S[0]):  # else the best approximation is not unique (Iso's flat spectrum)
            torch.testing.assert_close(cut.deltas()[name], best, rtol=1e-4, atol=1e-5)
        assert kept[name] == pytest.approx(float(S[:3].square().sum() / S.square().sum()), rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_scale_sweep_is_the_merge_at_that_scale(folders, method):
    adapters = three(folders, "plain")
    merged = merge(adapters, method)
    for scale in (-0.5, 0.0, 0.3, 1.0):
        close(deltas(merged.at_scale(scale)), deltas(merge(adapters, method, scale=scale)), 1e-6)
    assert merged.at_scale(0.4).manifest["scale"] == 0.4 and merged.manifest["scale"] == METHODS[method].scale
