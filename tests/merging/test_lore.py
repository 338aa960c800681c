from itertools import pairwise

import pytest
import torch

from osrm_peft import merge_adapters
from osrm_peft.merging.lore import lore
from osrm_peft.merging.thresholding import above
from tests.conftest import make_adapter


def svt(X, mu):
    return above(X, mu).soft(X, mu)


def objective(theta, base, delta, mu):
    """Σ_t ½‖θ_t − θ₀ − δ_t‖_F² + μ‖δ_t‖_*."""
    return float((theta - base - delta).square().sum() / 2 + mu * torch.linalg.svdvals(delta).sum())


def draw(T=4, o=9, n=12, r=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    B, A = torch.randn(T, o, r, generator=generator), torch.randn(T, r, n, generator=generator)
    return (B @ A).double()


def algorithm_1(thetas, mu, iterations, combine):
    """The paper's Algorithm 1 on full parameters θ_t = W₀ + τ_t, one matrix at a time; returns θ₀ and τ."""
    deltas = [torch.zeros_like(theta) for theta in thetas]
    for _ in range(iterations):
        base = sum(theta - delta for theta, delta in zip(thetas, deltas, strict=True)) / len(thetas)
        deltas = []
        for theta in thetas:
            U, S, Vh = torch.linalg.svd(theta - base, full_matrices=False)
            deltas.append(U @ torch.diag((S - mu).clamp_min(0)) @ Vh)
    return base, sum(deltas) / (len(deltas) if combine == "average" else 1)


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
