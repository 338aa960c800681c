"""Merges on a GPU are the CPU's to rounding: every method in every space. An imagined GPU stands in where none is."""

import pytest
import torch
from peft import PeftModel

from osrm_peft import LeastSquares, load_adapter, merge_adapters
from osrm_peft.adapters.factors import Factors
from osrm_peft.merging import METHODS
from osrm_peft.merging.lowrank import compress_matrix
from osrm_peft.merging.methods import lore
from osrm_peft.merging.methods.svt import above, top_value
from osrm_peft.seeding import task_generator
from tests.helpers.adapters import make_adapter, two_adapters
from tests.helpers.devices import CUDA, DEVICES, device_named
from tests.helpers.lora import LAYERS, lora
from tests.helpers.merging import deltas, features_of, merge
from tests.helpers.models import make_base, make_batch

# Both sum in float64, or in float32 over at most 40 terms in another order: 40^½ · 2⁻²⁴ = 4e-7 a product, some products
# one after the other. LoRE stops within 1e-6 of ‖θ‖.
TOLERANCE = 1e-5
SHAPES = {"a": (40, 30, 3), "b": (8, 12, 2)}
PLACES = [(name, space) for name in METHODS for space in METHODS[name].spaces]
MORE = [
    ("ties", {"trim": "layer", "density": 0.5}),
    ("dare", {"drop_rate": 0.9, "seed": 3}),
    ("dare_ties", {"drop_rate": 0.3, "density": 0.5, "trim": "layer"}),
    ("lore", {"mu_ratio": 0.5, "combine": "average"}),
    ("lore", {"combine": "ties", "density": 0.4}),
    ("lore", {"rank_ratio": 0.3, "rank": 2}),
    ("lore", {"mu": 0.1, "space": "knots", "scale": 2.0}),
    ("regmean", {"off_diagonal": 0.5, "ridge": 0.1}),
    ("tsv", {"rank_share": 0.4, "rank": "serving"}),
    ("iso", {"rank": 2}),
    ("concat", {"rank": 2}),
    ("emr", {"scale": 0.5}),
]


@pytest.fixture
def adapters():
    """The third lacks a layer."""
    return {"s": lora(1, SHAPES), "t": lora(2, SHAPES), "u": lora(3, {"a": SHAPES["a"]})}


@pytest.fixture(params=DEVICES)
def there(request, monkeypatch):
    with device_named(request.param, monkeypatch) as device:
        yield device


def same(found, expected, tolerance=TOLERANCE):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].device.type == "cpu" and found[name].dtype == value.dtype
        assert float((found[name] - value).norm()) <= tolerance * float(value.norm()), name


@pytest.mark.parametrize("weights", [{"s": 1.0, "t": -0.5, "u": 2.0}])
@pytest.mark.parametrize(("method", "space"), PLACES)
def test_every_method_in_every_space(there, adapters, method, space, weights):
    space = "auto" if space == "factors" else space
    cpu, gpu = (merge(adapters, method, space=space, weights=weights, device=one) for one in ("cpu", "cuda"))
    assert gpu.manifest["device"].startswith(str(there)) and cpu.manifest["device"] == "cpu"
    same(deltas(gpu), deltas(cpu))


@pytest.mark.parametrize(("method", "options"), MORE)
def test_options_ranks_and_seeds(there, adapters, method, options):
    same(*(deltas(merge(adapters, method, device=one, **options)) for one in ("cuda", "cpu")))


@pytest.mark.parametrize("statistic", ["mean", "sample", "token"])
@pytest.mark.parametrize("rules", ["weights", "shared", "scale"])
def test_rules_from_features(there, statistic, rules):
    three = {task: lora(seed, LAYERS, s=0.5) for seed, task in enumerate("stu", start=1)}
    features, _ = features_of(three, statistic)
    rule = LeastSquares(features, shared=rules == "shared")
    chosen = {"scale": rule} if rules == "scale" else {"weights": rule}
    method = "ties" if rules == "scale" else "task_arithmetic"
    cpu, gpu = (merge_adapters(three, method, device=one, **chosen) for one in ("cpu", "cuda"))
    same(gpu.deltas(), cpu.deltas())


def test_what_is_drawn_is_drawn_on_the_cpu(there):
    tau = torch.randn(2, 300, 400)
    draw = [[task_generator(0, task, "x") for task in "st"] for _ in range(2)]
    prepare = METHODS["dare"].prepare
    assert torch.equal(prepare(tau.to(there), draw[0], drop_rate=0.5).cpu(), prepare(tau, draw[1], drop_rate=0.5))


def spectrum(o, n, values):
    U, V = (torch.linalg.qr(torch.randn(size, len(values), dtype=torch.float64)).Q for size in (o, n))
    return (U * values) @ V.mT


def test_singular_values_above_a_threshold(there):
    """Wider than 256, where directions are found by iterations to 10⁻⁵ from a start that is drawn."""
    X = (
        spectrum(400, 300, 10 * 0.9 ** torch.arange(100.0, dtype=torch.float64)) + 1e-3 * torch.randn(400, 300)
    ).float()
    cpu, gpu = above(X, 1.0), above(X.to(there), 1.0)
    torch.testing.assert_close(gpu.S.cpu(), cpu.S, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        gpu.soft(X.to(there), 1.0).cpu(), cpu.soft(X, 1.0), rtol=0, atol=2e-5 * float(cpu.S.norm())
    )
    assert top_value(X.to(there)) == pytest.approx(top_value(X), rel=1e-6)


def test_lore_of_wide_matrices(there):
    tau = torch.stack(
        [spectrum(320, 280, 5 * 0.8 ** torch.arange(20.0, dtype=torch.float64)).float() for _ in range(3)]
    )
    cpu, gpu = (lore.lore(one, torch.ones(3, device=one.device), max_iterations=5) for one in (tau, tau.to(there)))
    for found, expected in zip(gpu[:2], cpu[:2], strict=True):
        assert float((found.cpu() - expected).norm()) <= 1e-4 * float(tau.norm())


@pytest.mark.parametrize("rank", [None, 4])
def test_matrices_too_wide_for_a_decomposition(there, rank, monkeypatch):
    """At a small rank by ARPACK, which runs on the CPU and asks the device for products."""
    monkeypatch.setattr("osrm_peft.merging.lowrank._WIDE", 40)
    X = spectrum(60, 50, 2.0 ** -torch.arange(50.0, dtype=torch.float64))
    cpu, gpu = compress_matrix(X, rank), compress_matrix(X.to(there), rank)
    assert gpu.factors.A.device == gpu.factors.B.device == there
    torch.testing.assert_close(gpu.factors.delta().cpu(), cpu.factors.delta(), rtol=0, atol=1e-12)
    assert gpu.energy_kept == pytest.approx(cpu.energy_kept, rel=1e-12)


def test_another_scale_of_a_merge(there, adapters):
    """LoRE's offset and direction are added up and compressed again, on the device that merged them."""
    cpu, gpu = (merge(adapters, "lore", device=one, rank=2).at_scale(0.5) for one in ("cpu", "cuda"))
    same(gpu.deltas(), cpu.deltas())
    assert gpu.energy_kept() == pytest.approx(cpu.energy_kept())


def test_the_offset_and_the_direction_go_on_sharing_a(there, adapters):
    layers = merge(adapters, "lore", device="cuda").layers
    assert all(layer.offset.A is layer.direction.factors.A for layer in layers.values())


def test_factors_move_whole(there):
    factors = Factors(torch.randn(2, 4), torch.randn(3, 2), 0.5)
    moved = factors.to(there)
    assert moved.A.device == moved.B.device == there and moved.s == 0.5
    assert torch.equal(moved.to(torch.device("cpu")).delta(), factors.delta())


# ---- files, and models


@pytest.mark.parametrize("marked", [pytest.param(None, marks=CUDA)])
class TestModelsOnAGPU:
    def test_live_models_are_merged_where_they_are_and_left_as_they_were(self, marked, tmp_path):
        live = {f"t{seed}": make_adapter(tmp_path / f"t{seed}", seed=seed) for seed in (1, 2)}
        files = merge_adapters({task: tmp_path / task for task in live}, "ties")
        assert files.manifest["device"] == "cpu"
        assert merge_adapters(live, "ties").manifest["device"] == "cpu"
        live = {task: model.cuda() for task, model in live.items()}
        before = {task: {k: v.clone() for k, v in model.state_dict().items()} for task, model in live.items()}
        merged = merge_adapters(live, "ties")
        assert merged.manifest["device"].startswith("cuda:0 (")
        same(merged.deltas(), files.deltas())
        mixed = {"t1": live["t1"], "t2": tmp_path / "t2"}
        assert merge_adapters(mixed, "ties").manifest["device"] == "cpu"
        assert merge_adapters(live, "ties", device="cpu").manifest["device"] == "cpu"
        for task, model in live.items():
            assert all(torch.equal(value, before[task][name]) for name, value in model.state_dict().items())
            assert not [
                one for module in model.modules() for one in (module._forward_hooks, module._forward_pre_hooks) if one
            ]

    @pytest.mark.parametrize("method", ["task_arithmetic", "lore", "emr"])
    def test_a_merge_in_a_live_base_on_a_gpu(self, marked, method, tmp_path):
        adapters, base = two_adapters(tmp_path), make_base().cuda()
        cpu, gpu = (merge_adapters(adapters, method, device=one) for one in ("cpu", "cuda"))
        before = {name: value.clone() for name, value in base.state_dict().items()}
        batch = make_batch()
        for task in adapters:
            with torch.no_grad(), cpu.applied_to(make_base(), task) as model:
                expected = model(**batch).logits
            with torch.no_grad(), gpu.applied_to(base, task) as model:
                found = model(**{key: value.cuda() for key, value in batch.items()}).logits
            torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
        assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())

    def test_what_is_written_is_on_no_device(self, marked, tmp_path):
        adapters = two_adapters(tmp_path)
        merge_adapters(adapters, "lore", device="cuda").save_pretrained(tmp_path / "gpu")
        merge_adapters(adapters, "lore").save_pretrained(tmp_path / "cpu")
        found, expected = (load_adapter(tmp_path / name, task="t1") for name in ("gpu", "cpu"))
        same(*({k: v.delta() for k, v in one.factors.items()} for one in (found, expected)))
        assert PeftModel.from_pretrained(make_base(), tmp_path / "gpu")

    def test_memory_comes_back(self, marked, adapters):
        merge(adapters, "lore", device="cuda")
        before = torch.cuda.memory_allocated()
        kept = [merge(adapters, method, device="cuda") for method in ("average", "lore", "emr", "ties")]
        assert torch.cuda.memory_allocated() == before and len(kept) == 4
