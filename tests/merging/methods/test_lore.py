"""A tiny BERT made in memory, adapters of it, and no network."""

from itertools import pairwise

import pytest
import torch

from osrm_peft import merge_adapters
from osrm_peft.merging.methods.lore import lore
from tests.helpers.adapters import make_adapter
from tests.helpers.papers import algorithm_1, svt


def objective(theta, base, delta, mu):
    """Σ_t ½‖θ_t − θ₀ − δ_t‖_F² + μ‖δ_t‖_*."""
    return float((theta - base - delta).square().sum() / 2 + mu * torch.linalg.svdvals(delta).sum())


def draw(T=4, o=9, n=12, r=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    B, A = torch.randn(T, o, r, generator=generator), torch.randn(T, r, n, generator=generator)
    return (B @ A).double()


@pytest.mark.parametrize("combine", ["sum", "average"])
def test_it_is_algorithm_1_and_the_base_model_cancels(combine):
    tau = draw()
    W0 = torch.randn(9, 12, dtype=torch.float64)
    base, direction = algorithm_1([W0 + t for t in tau], 0.8, 7, combine)
    merged = lore(tau, torch.ones(4), mu=0.8, max_iterations=7, tolerance=0, combine=combine)
    torch.testing.assert_close(merged.direction, direction, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(W0 + merged.offset, base, rtol=1e-10, atol=1e-10)


def test_svt_is_the_exact_minimiser():
    """argmin_δ ½‖X − δ‖² + μ‖δ‖_*: no perturbation does better."""
    X, mu = draw(1)[0], 1.5
    best = svt(X, mu)

    def cost(delta):
        return float((X - delta).square().sum() / 2 + mu * torch.linalg.svdvals(delta).sum())

    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-1, 1.0):
        for _ in range(50):
            step = torch.randn(X.shape, generator=generator, dtype=X.dtype)
            assert cost(best) <= cost(best + size * step / step.norm())


@pytest.mark.parametrize("mu_ratio", [0.02, 0.1, 0.5])
def test_the_objective_never_rises(mu_ratio):
    tau = draw(seed=3)
    values = []
    for iterations in range(1, 25):
        report = lore(tau, torch.ones(4), mu_ratio=mu_ratio, max_iterations=iterations, tolerance=0).report
        assert report["iterations"] == iterations and not report["converged"]
        values.append(report["objective"])
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(values))
    mu = report["mu"]
    spread = torch.linalg.svdvals(tau - tau.mean(0))[:, 0].mean()
    assert mu == pytest.approx(mu_ratio * float(spread))
    nothing = objective(tau, tau.mean(0), torch.zeros_like(tau), mu)
    assert values[0] <= nothing
    delta = torch.stack([svt(one - tau.mean(0), mu) for one in tau])  # the first step
    assert values[0] == pytest.approx(objective(tau, tau.mean(0), delta, mu), rel=1e-12)


def test_it_converges_and_says_so():
    merged = lore(draw(), torch.ones(4), mu_ratio=0.5, max_iterations=5000, tolerance=1e-9)
    assert merged.report["converged"] and merged.report["iterations"] < 5000
    assert not lore(draw(), torch.ones(4), mu_ratio=0.01, max_iterations=3).report["converged"]


def test_the_core_equals_dense_matrices(tmp_path):
    """float32 in, float64 solve: one and the same to 1e-5."""
    adapters = {}
    for seed in (1, 2, 3):
        make_adapter(tmp_path / f"t{seed}", seed=seed, r=seed)
        adapters[f"t{seed}"] = tmp_path / f"t{seed}"
    for options in ({}, {"mu": 0.2}, {"mu_ratio": 0.4, "combine": "average"}):
        core = merge_adapters(adapters, "lore", space="core", **options).deltas()
        dense = merge_adapters(adapters, "lore", space="weight", **options).deltas()
        for name in dense:
            assert float((core[name] - dense[name]).norm() / dense[name].norm()) < 1e-5


def test_a_hard_rank_is_a_share_of_the_space(tmp_path):
    tau = draw()
    merged = lore(tau, torch.ones(4), rank_ratio=0.2, max_iterations=1)
    expected = []
    for residual in tau - tau.mean(0):
        U, S, Vh = torch.linalg.svd(residual)
        expected.append((U[:, :2] * S[:2]) @ Vh[:2])  # ⌈0.2 · min(9, 12)⌉ = 2
    torch.testing.assert_close(merged.direction, sum(expected), rtol=1e-10, atol=1e-10)
    assert merged.report["rank"] == 2 and "mu" not in merged.report


def test_a_huge_threshold_gives_the_average():
    tau = draw()
    merged = lore(tau, torch.ones(4), mu=1e6)
    torch.testing.assert_close(merged.offset, tau.mean(0))
    assert not merged.direction.any() and merged.report["converged"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mu": 1, "mu_ratio": 0.1}, r"give one of mu, mu_ratio and rank_ratio, not mu=1 and mu_ratio=0.1"),
        ({"mu": -1}, r"mu=-1 must be a finite number of at least 0"),
        ({"rank_ratio": 0}, r"rank_ratio=0 must lie in \(0, 1\]"),
        ({"combine": "max"}, r"unknown combine 'max': choose from sum, average"),
        ({"max_iterations": 0}, r"max_iterations=0"),
    ],
)
def test_options_are_checked_before_anything_is_read(options, message):
    with pytest.raises(ValueError, match=message):
        merge_adapters({"t": "no/such/folder"}, "lore", **options)


def pair(wide=False):
    generator = torch.Generator().manual_seed(1)
    o, n = (300, 280) if wide else (9, 12)
    return torch.randn(2, o, 4, generator=generator) @ torch.randn(2, 4, n, generator=generator)


@pytest.mark.parametrize("combine", ["sum", "average", "ties"])
@pytest.mark.parametrize(
    "tau",
    [pair(), pair().double(), pair(wide=True), pair()[:1].repeat(3, 1, 1), torch.cat([pair(), -pair()]), pair()[:1]],
    ids=["two", "two in float64", "two wide", "three copies", "two and their negatives", "one"],
)
def test_directions_that_cancel_are_exactly_0(tau, combine):
    """δ_1 = −δ_2 of two adapters, and so of whatever is symmetric about its mean: the sum is rounding."""
    tau = tau / 3  # a mean with a rounding
    options = {"density": 1.0} if combine == "ties" else {}
    merged = lore(tau, torch.ones(len(tau)), combine=combine, max_iterations=50, **options)
    direction = merged.direction if merged.finish is None else merged.finish(merged.direction.float())
    assert not direction.any()
    torch.testing.assert_close(merged.offset, tau.mean(0), rtol=0, atol=2e-5 * float(tau.abs().max()))


@pytest.mark.parametrize("ratio", [0.001, 0.02, 0.0501])
def test_flat_directions_that_cancel_are_exactly_0(ratio):
    """All values but one lie close above μ: there the rounding of what is found weighs most."""
    S = torch.full((40,), 1.01 * ratio).double()
    S[0] = 1
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        U, V = (torch.linalg.qr(torch.randn(o, 40, generator=generator).double()).Q for o in (80, 40))
        X, mean = (U * S) @ V.mT, 0.01 * torch.randn(80, 40, generator=generator).double()
        tau = torch.stack([mean + X, mean - X]) / 3
        assert not lore(tau, torch.ones(2), mu_ratio=ratio, max_iterations=10).direction.any()


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_directions_that_do_not_cancel_are_kept_however_small(size):
    """Three adapters of which two are nearly alike: Σδ_t is small beside the δ_t, and no rounding."""
    tau = size * torch.cat([pair().double(), pair()[:1].double() * (1 + 1e-6)])
    assert lore(tau, torch.ones(3), mu_ratio=0.1).direction.any()
    tau = size * draw()
    mu = 0.999 * max(float(torch.linalg.svdvals(one - tau.mean(0))[0]) for one in tau)
    assert lore(tau, torch.ones(4), mu=mu, max_iterations=1).direction.any()  # just below the largest value


@pytest.mark.parametrize("power", [-20, 20])
def test_the_tolerance_is_relative_to_the_task_vectors(power):
    """Task vectors of another size, by a power of two, take the same steps to the same result, to the bit."""
    tau = draw()
    one, other = lore(tau, torch.ones(4), tolerance=1e-3), lore(2.0**power * tau, torch.ones(4), tolerance=1e-3)
    assert one.report["converged"] and 1 < one.report["iterations"] == other.report["iterations"] < 200
    torch.testing.assert_close(other.direction / 2.0**power, one.direction, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(other.offset / 2.0**power, one.offset, rtol=1e-12, atol=1e-12)
    assert lore(tau, torch.ones(4), tolerance=1e-6).report["iterations"] > one.report["iterations"]


def test_wide_task_vectors_may_be_smaller_than_float32_has_squares_for():
    tau = torch.randn(3, 300, 280, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 0, 280) ** 4
    one, other = lore(tau, torch.ones(3), tolerance=1e-4), lore(2.0**-70 * tau, torch.ones(3), tolerance=1e-4)
    assert one.report["converged"] and 3 < one.report["iterations"] == other.report["iterations"]
    torch.testing.assert_close(other.offset * 2.0**70, one.offset, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("space", ["core", "weight", "knots"])
@pytest.mark.parametrize("scale", [0.0, 0.5, -2.0])
def test_a_rank_is_of_offset_and_direction_together(tmp_path, space, scale):
    """In the core both have the same A; the best approximation is that of their sum, in any space."""
    adapters = {}
    for seed in (1, 2, 3):
        make_adapter(tmp_path / f"t{seed}", seed=seed, r=2)
        adapters[f"t{seed}"] = tmp_path / f"t{seed}"
    whole = merge_adapters(adapters, "lore", space=space, scale=scale)
    cut = merge_adapters(adapters, "lore", space=space, rank=3).at_scale(scale)
    layer = next(iter(cut.layers.values()))
    assert (layer.offset.A is layer.direction.factors.A) == (space == "core")
    for name, X in whole.deltas().items():
        U, S, Vh = torch.linalg.svd(X)
        best, size = (U[:, :3] * S[:3]) @ Vh[:3], float(S[0])
        assert cut.layers[name].at(scale, 3).factors.rank == 3 and float(S[3]) > 1e-3 * size
        torch.testing.assert_close(cut.deltas()[name], best, rtol=0, atol=1e-5 * size)
        kept = float(S[:3].square().sum() / S.square().sum())
        assert cut.energy_kept()[name] == pytest.approx(kept, rel=1e-5) and kept < 0.999


@pytest.mark.parametrize("options", [{"mu": 1e308}, {"mu_ratio": 1e308}, {"mu_ratio": 1.7e308}])
@pytest.mark.parametrize("width", [8, 300])
def test_a_threshold_above_all_numbers_cuts_everything(options, width):
    tau = 100 * torch.randn(2, 9, width)
    found = lore(tau, torch.ones(2), **options)
    assert not found.direction.any() and found.report["iterations"] == 2
    torch.testing.assert_close(found.offset, tau.mean(0))
    wanted = sum(float((one.double() - tau.double().mean(0)).square().sum()) for one in tau) / 2
    assert found.report["objective"] == pytest.approx(wanted, rel=1e-5)


def test_a_tolerance_above_all_numbers_ends_after_one_step():
    tau = 1e30 * torch.randn(2, 5, 4)
    found = lore(tau, torch.ones(2), tolerance=1e308)
    assert found.report["iterations"] == 1
    torch.testing.assert_close(found.offset, tau.mean(0))
