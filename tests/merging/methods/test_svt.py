"""The thresholded SVD against full ones in float64, at widths where it takes the quick ways."""

import os
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from osrm_peft.merging.methods import svt
from osrm_peft.merging.methods.lore import lore
from osrm_peft.merging.methods.svt import SMALL, Directions, above, strongest, top_value
from tests.helpers.papers import algorithm_1

SHAPES = [(300, 300), (300, 700), (700, 300)]
SPECTRA = ["decaying", "steep", "flat", "low_rank", "noisy", "gaussian"]
STARTS = ["cold", "near", "missing"]


@cache
def draw(o, n, spectrum, seed=0):
    """A float32 matrix with this spectrum, and its SVD in float64."""
    generator = torch.Generator().manual_seed(seed)
    k = min(o, n)
    if spectrum == "gaussian":
        X = torch.randn(o, n, generator=generator)
    else:
        place = torch.arange(k, dtype=torch.float64)
        signal = torch.where(place < 20, 1 - 0.02 * place, 0)
        S = {
            "decaying": 0.97**place,
            "steep": 1 / (1 + place),
            "flat": 1 - 0.1 * place / k,
            "low_rank": signal,
            "noisy": signal + 1e-3 * (1 - place / k),
        }[spectrum]
        U = torch.linalg.qr(torch.randn(o, k, generator=generator, dtype=torch.float64)).Q
        V = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q
        X = ((U * S) @ V.mT).float()
    _, S, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    return X, Directions(Vh.mT, S)


def first(directions, k):
    return Directions(directions.V[:, :k], directions.S[:k])


def dense(directions, X):
    """The part of X in these directions."""
    return directions.soft(X, 0)


def between(S, k):
    """A threshold that k singular values exceed."""
    return float(S[0]) * 1.1 if k == 0 else float(S[k - 1] + (S[k] if k < len(S) else 0)) / 2


def rank_of(S):
    return int((1e-5 * S[0] < S).sum())


def assert_near(found, plain, X, mu, tolerance=1e-4):
    """As many directions as a full SVD has, alike after the threshold: their own signs and rotations are free."""
    assert len(found.S) == len(plain.S)
    expected = plain.soft(X.double(), mu)
    assert float((found.soft(X, mu) - expected).norm()) <= tolerance * float(expected.norm())
    torch.testing.assert_close(found.S.double(), plain.S, rtol=1e-4, atol=1e-6 * float(plain.S[:1].sum()))
    eye = torch.eye(len(plain.S), dtype=torch.float64)
    for basis in (found.V.double(), X.double() @ found.V.double() / found.S.double()):
        assert basis.isfinite().all()
        torch.testing.assert_close(basis.mT @ basis, eye, rtol=0, atol=1e-3)


def start_of(kind, shape, spectrum, k):
    """Nothing; directions of a matrix near by; or exact ones, of which the second strongest is lacking."""
    if kind == "cold":
        return None
    V = draw(*shape, spectrum)[1].V[:, : k + 16].float()
    if kind == "near":
        noise = torch.randn(V.shape, generator=torch.Generator().manual_seed(3))
        V = torch.linalg.qr(V + 1e-3 * noise).Q
    kept = [place for place in range(k) if kind == "near" or place != 1]
    plain = draw(*shape, spectrum)[1]
    return Directions(V[:, kept], plain.S[kept].float(), V[:, k:])


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_above_is_a_cut_full_svd(shape, spectrum, start):
    X, plain = draw(*shape, spectrum)
    most = rank_of(plain.S)
    for k in (0, most // 2, most):
        mu = between(plain.S, k)
        assert_near(above(X, mu, start_of(start, shape, spectrum, k)), first(plain, k), X, mu)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", ["decaying", "steep", "low_rank", "noisy"])
def test_a_few_strong_directions_are_found(shape, spectrum, start):
    X, plain = draw(*shape, spectrum)
    for k in (1, 2, 8, 15):
        mu = between(plain.S, k)
        assert_near(above(X, mu, start_of(start, shape, spectrum, k)), first(plain, k), X, mu)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("spectrum", ["flat", "gaussian"])
def test_a_few_directions_are_found_where_the_next_are_almost_as_strong(spectrum, start):
    shape = 300, 700
    X, plain = draw(*shape, spectrum)
    for k in (8, 31):
        mu = between(plain.S, k)
        expected = first(plain, k).soft(X.double(), mu)
        found = above(X, mu, start_of(start, shape, spectrum, k)).soft(X, mu)
        assert float((found - expected).norm()) <= 1e-4 * float(X.norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_where_an_eighth_lies_above_the_gram_matrix_is_taken(shape, monkeypatch):
    taken = []
    by_gram = svt._by_gram
    monkeypatch.setattr(svt, "_by_gram", lambda X: taken.append(X.shape) or by_gram(X))
    X, plain = draw(*shape, "steep")
    above(X, between(plain.S, 8))
    assert not taken
    above(X, between(plain.S, 100))
    assert taken


def test_a_start_does_not_grow_from_step_to_step(monkeypatch):
    X, exact = draw(700, 300, "noisy")  # 20 directions, far above the rest
    mu = float(exact.S[9] + exact.S[10]) / 2
    found = above(X, mu)
    monkeypatch.setattr(svt, "_by_gram", lambda X: pytest.fail("20 directions are below an eighth"))
    for _ in range(12):
        found = above(X, mu, found, sure=False)
        assert len(found.S) == 10 and found.more is not None and found.more.shape[1] <= 10 + svt._SPARE


def test_a_step_that_needed_many_directions_leaves_few_to_start_from(monkeypatch):
    X, exact = draw(700, 300, "noisy")
    many = above(X, 1e-4)
    assert len(many.S) == 300 - int((exact.S <= 1e-4).sum())
    few = svt._cut(svt._by_gram(X), 0.7)
    assert few.more is not None and len(few.S) + few.more.shape[1] <= 20 + svt._SPARE
    assert few.V.untyped_storage().nbytes() == few.V.nbytes  # and not all of them behind a view


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1.2), st.integers(0, 2**16))
@example(2, 1, 1.0, 2160)  # μ is the singular value
def test_narrow_matrices_are_cut_exactly(o, n, share, seed):
    X = torch.randn(o, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    mu = share * float(S[0])
    k = int((mu < S).sum())
    found = above(X, mu)
    torch.testing.assert_close(found.S, S[:k])
    torch.testing.assert_close(found.soft(X, mu), (U[:, :k] * (S[:k] - mu)) @ Vh[:k], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mu", [0.5, 0.03, 1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_narrow_matrices_are_cut_to_rounding_whatever_the_threshold(shape, mu):
    """Squares have half the digits, so they must not be asked for small values."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(one, 40, generator=generator, dtype=torch.float64)).Q for one in shape)
    S = 10 ** -torch.linspace(0, 11, 40, dtype=torch.float64)
    expected = (U * (S - mu).clamp_min(0)) @ V.mT
    X = (U * S) @ V.mT
    assert float((above(X, mu).soft(X, mu) - expected).norm()) <= 2 * max(shape) * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("n", [1, 3, 8, 25, 60])
def test_narrow_matrices_whose_squares_overflow_are_cut_by_an_svd(n):
    X = 1e155 * torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    S = torch.linalg.svdvals(X)
    mu = 0.3 * float(S[0])
    torch.testing.assert_close(above(X, mu).S, S[mu < S])


@pytest.mark.parametrize("shape", [(257, 257), *SHAPES])
@pytest.mark.parametrize("mu", [0.0, 1.0])
def test_of_nothing_there_is_nothing(shape, mu):
    X = torch.zeros(shape)
    found = above(X, mu)
    assert found.S.shape == (0,) and found.V.shape == (shape[1], 0)
    assert not found.soft(X, mu).any() and found.soft(X, mu).shape == shape
    assert top_value(X) == 0
    kept = dense(strongest(X, 5), X)
    assert kept.isfinite().all() and not kept.any()
    eye = torch.eye(shape[1])
    for k in (3, 200):  # the latter takes the Gram matrix
        start = Directions(eye[:, :k], torch.ones(k), eye[:, k : k + 6])
        for _ in range(2):
            start = above(X, mu, start)
            assert len(start.S) == 0


def test_a_threshold_of_0_keeps_the_matrix():
    X, _ = draw(300, 700, "gaussian")
    torch.testing.assert_close(dense(above(X, 0.0), X), X, rtol=0, atol=1e-4)
    low, _ = draw(700, 300, "low_rank")
    torch.testing.assert_close(dense(above(low, 0.0), low), low, rtol=0, atol=1e-6)


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_the_scale_of_the_entries_does_not_matter(factor):
    X, plain = draw(300, 700, "noisy")
    for k in (8, 150):
        mu = between(plain.S, k)
        scaled = above(X * factor, mu * factor)
        assert_near(scaled._replace(S=scaled.S / factor), first(plain, k), X, mu)


@pytest.mark.parametrize("k", [8, 150])
def test_a_second_run_gives_the_same_bits(k):
    X, plain = draw(300, 700, "noisy")
    mu = between(plain.S, k)
    before = torch.get_rng_state()
    one, two = above(X, mu), above(X.clone(), mu)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert top_value(X) == top_value(X.clone())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("k", [8, 150])
def test_nothing_given_is_written_to(k):
    X, plain = draw(300, 700, "noisy")
    start = start_of("near", (300, 700), "noisy", k)
    copies = X.clone(), *(part.clone() for part in start)
    above(X, between(plain.S, k), start)
    strongest(X, 3), top_value(X), start.soft(X, 0.1)
    assert all(torch.equal(a, b) for a, b in zip((X, *start), copies, strict=True))


@pytest.mark.parametrize("shape", [(40, 60), *SHAPES])
def test_the_strongest_are_the_first_of_a_full_svd(shape):
    for spectrum in ("decaying", "steep"):
        X, plain = draw(*shape, spectrum)
        for rank in (1, 7, min(shape)):
            found = strongest(X, rank)
            expected = dense(first(plain, rank), X.double())
            assert len(found.S) == rank
            assert float((dense(found, X) - expected).norm()) <= 1e-4 * float(expected.norm())


def test_a_low_rank_matrix_has_no_more_directions_than_its_rank():
    X, plain = draw(300, 700, "low_rank")
    found = strongest(X, 100)
    assert float((dense(found, X) - X).norm()) <= 1e-5 * float(X.norm())
    torch.testing.assert_close(found.S[:20].double(), plain.S[:20], rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(40, 60), *SHAPES])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_top_value_is_the_spectral_norm(shape, spectrum):
    X, plain = draw(*shape, spectrum)
    assert top_value(X) == pytest.approx(float(plain.S[0]), rel=1e-3 if spectrum == "flat" else 1e-5)
    assert top_value(1e-3 * X) == pytest.approx(1e-3 * top_value(X), rel=1e-3)


# LoRE on matrices wider than a full SVD is used for


@cache
def task_vectors(o, n, kind):
    generator = torch.Generator().manual_seed(5)
    shared = torch.randn(o, n, generator=generator) / 50
    if kind == "noise":
        return torch.stack([shared + torch.randn(o, n, generator=generator) / 30 for _ in range(3)])
    parts = [torch.randn(o, 12, generator=generator) @ torch.randn(12, n, generator=generator) for _ in range(3)]
    return torch.stack([shared + one / 20 for one in parts])


def near(found, expected, tolerance=1e-4):
    assert found.isfinite().all()
    assert float((found - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize(
    ("shape", "kind", "mu_ratio"),
    [
        ((260, 300), "low_rank", 0.1),
        ((300, 260), "low_rank", 0.6),
        ((260, 300), "noise", 0.1),
        ((260, 300), "noise", 0.8),
    ],
)
def test_wide_lore_is_the_plain_algorithm(shape, kind, mu_ratio):
    assert min(shape) > SMALL
    tau = task_vectors(*shape, kind)
    spread = torch.linalg.matrix_norm((tau - tau.mean(0)).double(), ord=2)
    mu = mu_ratio * float(spread.mean())
    base, direction = algorithm_1(list(tau.double()), mu, 3, "sum")
    given = lore(tau, torch.ones(3), mu=mu, max_iterations=3, tolerance=0)
    near(given.direction, direction)
    near(given.offset, base)
    shared = lore(tau, torch.ones(3), mu_ratio=mu_ratio, max_iterations=3, tolerance=0)
    assert shared.report["mu"] == pytest.approx(mu, rel=1e-4)
    near(shared.direction, direction, 3e-4)


@pytest.mark.parametrize(("tolerance", "steps"), [(0.0, 5), (1e9, 2)])
def test_the_first_and_the_last_step_of_lore_look_for_what_was_missed(monkeypatch, tolerance, steps):
    module, looks = sys.modules[lore.__module__], []

    def watched(X, mu, start, sure):
        looks.append(sure)
        return above(X, mu, start, sure)

    monkeypatch.setattr(module, "above", watched)
    tau = torch.stack([draw(300, 300, "noisy", seed)[0] for seed in range(3)])
    found = lore(tau, torch.ones(3), max_iterations=5, tolerance=tolerance)
    assert found.report["iterations"] == steps
    assert looks == [True] * 3 + [False] * 3 * (steps - 2) + [True] * 3


def test_wide_lore_takes_weights_and_a_base():
    tau, weights = task_vectors(260, 300, "low_rank"), torch.tensor([1.0, -0.5, 2.0])
    base, direction = algorithm_1(list(weights[:, None, None] * tau.double()), 2.0, 4, "average")
    merged = lore(tau, weights, mu=2.0, max_iterations=4, tolerance=0, combine="average")
    near(merged.direction, direction)
    near(merged.offset, base)


def test_wide_lore_keeps_a_rank():
    tau = task_vectors(260, 300, "low_rank").double()
    base, delta = tau.mean(0), []
    for one in tau:
        U, S, Vh = torch.linalg.svd(one - base, full_matrices=False)
        delta.append((U[:, :26] * S[:26]) @ Vh[:26])
    merged = lore(tau.float(), torch.ones(3), rank_ratio=0.1, max_iterations=1)
    assert merged.report["rank"] == 26
    near(merged.direction, sum(delta))


MEMORY = """
import sys
from pathlib import Path
import torch
from osrm_peft.merging.methods.lore import lore

def peak():
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024

torch.set_num_threads(1)
lore(torch.randn(3, 600, 300), torch.ones(3), max_iterations=1)  # what a first call loads
before = peak()
tau = torch.empty(3, *map(int, sys.argv[1:]))
for one in tau:
    one.normal_()
lore(tau, torch.ones(3), mu=1.0, max_iterations=2)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells a process' peak memory there")
@pytest.mark.parametrize("shape", [(32768, 512), (512, 32768)])
def test_of_task_vectors_of_full_rank_no_copies_are_kept(shape):
    """3 matrices, θ₀ and what is in work, each of 64 MiB; left factors of full rank would be 3 more."""
    command = [sys.executable, "-c", MEMORY, *map(str, shape)]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # what is freed goes back at once
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert 4 * 64 < float(done.stdout) < 6 * 64, done.stdout


@pytest.mark.parametrize("kind", ["low_rank", "noise"])
def test_the_wide_objective_is_that_of_the_result_and_never_rises(kind):
    tau = task_vectors(260, 300, kind)
    values = [
        lore(tau, torch.ones(3), mu_ratio=0.5, max_iterations=k, tolerance=0).report["objective"] for k in range(1, 5)
    ]
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(values))


def test_wide_task_vectors_that_are_alike_are_the_result():
    tau = task_vectors(260, 300, "noise")[:1].expand(3, -1, -1)
    merged = lore(tau, torch.ones(3))
    near(merged.offset + merged.direction, tau[0], 1e-6)
    zero = lore(torch.zeros(2, 260, 300), torch.ones(2))
    assert not zero.direction.any() and not zero.offset.any() and zero.report["converged"]


def test_wide_lore_gives_the_same_bits_again():
    tau = task_vectors(260, 300, "low_rank")
    one, two = (lore(tau.clone(), torch.ones(3), max_iterations=3) for _ in range(2))
    assert torch.equal(one.direction, two.direction) and torch.equal(one.offset, two.offset)
    assert one.report == two.report
