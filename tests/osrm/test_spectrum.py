"""PooledMoment and Spectrum against brute force: dense float64 sums written out here."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osrm_peft.features.moments import STATISTICS, FeatureMoments
from osrm_peft.osrm.spectrum import PooledMoment, Spectrum, check_protect

UNIT = torch.finfo(torch.float32).eps / 2  # the relative error of one float32 rounding


def moments_of(x, statistic):
    moments = FeatureMoments(statistic, x.shape[-1])
    moments.add_(x)
    return moments


def dense(x, statistic):
    """(n, n) the second moment of one task's inputs x (k, s, n) as FeatureMoments defines it, in float64."""
    x = x.double()
    h = x.flatten(0, 1) if statistic == "token" else x.mean(1)
    return torch.outer(h.mean(0), h.mean(0)) if statistic == "mean" else h.T @ h / len(h)


def drawn(counts, s, n, seed):
    """One (k, s, n) batch a task; all rows together have singular values in [1, 2], so their rank is no matter of
    rounding."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(counts) * s
    m = min(total, n)
    U, V = (torch.linalg.qr(torch.randn(size, m, generator=generator))[0] for size in (total, n))
    rows = (U * torch.linspace(2, 1, m)) @ V.T
    return [x.unflatten(0, (-1, s)) for x in rows.split([count * s for count in counts])]


@settings(max_examples=60)
@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=3), s=st.integers(1, 3), n=st.integers(1, 12),
    statistic=st.sampled_from(STATISTICS), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_a_pool_is_the_mean_of_the_tasks_second_moments(counts, s, n, statistic, seed):
    tasks = drawn(counts, s, n, seed)
    pool = PooledMoment.of([moments_of(x, statistic) for x in tasks])
    S = sum(dense(x, statistic) for x in tasks) / len(tasks)
    largest = max(float(x.abs().max()) for x in tasks)
    rounding = (max(counts) * s + 4) * UNIT * largest**2  # of float32 sums of that many products
    torch.testing.assert_close(pool.second_moment(), S, rtol=0, atol=rounding)
    vectors = {"mean": len(counts), "sample": sum(counts), "token": sum(counts) * s}[statistic]
    kept = statistic == "mean" or (statistic == "sample" and max(counts) < n)
    assert (pool.root is not None) == (kept and vectors < n)
    assert pool.rank_bound == min(n, vectors)
    for same, tolerance in ((pool, 1e-13), (pool.float(), 64 * UNIT)):
        assert_a_pool_computes_with(same, pool.second_moment(), n, seed, tolerance)


def assert_a_pool_computes_with(pool, S, n, seed, tolerance):
    """energy, share, trace and times against the dense S; the tolerance is relative to ‖A‖² tr S."""
    A = torch.randn(2, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scale = float(A.square().sum() * S.trace())
    energy = float(torch.trace(A @ S @ A.T))
    assert float(pool.energy(A)) == pytest.approx(energy, abs=tolerance * scale)
    assert float(pool.trace()) == pytest.approx(float(S.trace()), rel=n * tolerance)
    assert pool.share(A) == pytest.approx(energy / float(S.trace()), abs=tolerance * float(A.square().sum()))
    parts = [part for part in (pool.root, pool.second) if part is not None]
    times = pool.times(A.T.to(parts[0].dtype)).double()
    torch.testing.assert_close(times, S @ A.T, rtol=0, atol=tolerance * scale)


@settings(max_examples=60)
@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=3), n=st.integers(1, 24),
    statistic=st.sampled_from(STATISTICS), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_a_spectrum_is_the_eigendecomposition_with_the_true_rank(counts, n, statistic, seed):
    """Token sums are float32, so 12 tokens in 24 dimensions leave tiny eigenvalues that are no directions."""
    tasks = drawn(counts, 1, n, seed)
    pool = PooledMoment.of([moments_of(x, statistic) for x in tasks])
    spectrum, S = Spectrum.of(pool), pool.second_moment()
    vectors = len(counts) if statistic == "mean" else sum(counts)
    assert (spectrum.rank, spectrum.width) == (min(n, vectors), n)
    assert (spectrum.energy > 0).all() and (spectrum.energy.diff() <= 0).all()
    V = spectrum.vectors
    torch.testing.assert_close(V.T @ V, torch.eye(spectrum.rank, dtype=V.dtype), rtol=0, atol=1e-12)
    largest = max(float(x.abs().max()) for x in tasks)
    exact = pool.root is not None or pool.rank_bound == n  # else the directions of rounding errors are left out
    rounding = 1e-13 * float(S.trace()) if exact else n * (max(counts) + 4) * UNIT * largest**2
    torch.testing.assert_close((V * spectrum.energy) @ V.T, S, rtol=0, atol=rounding)
    torch.testing.assert_close(spectrum.root().T @ spectrum.root(), (V * spectrum.energy) @ V.T, rtol=0, atol=1e-13)
    torch.testing.assert_close(spectrum.energy, torch.linalg.eigvalsh(S).flip(0)[: spectrum.rank], rtol=0,
                               atol=1e-13 * float(S.trace()))  # fmt: skip


@pytest.mark.parametrize("statistic", STATISTICS)
def test_a_layer_that_receives_zeros_has_rank_zero(statistic):
    for count in (2, 9):
        pool = PooledMoment.of([moments_of(torch.zeros(count, 1, 5), statistic)])
        assert Spectrum.of(pool).rank == Spectrum.of(pool).strongest(energy=1.0).rank == 0
        assert pool.share(torch.eye(5)) == 0


@pytest.mark.parametrize(
    ("protected", "rank"),
    [(None, 4), (0, 0), (1, 1), (3, 3), (4, 4), (9, 4), (0.0, 0), (1e-9, 1), (0.4, 1), (0.41, 2), (0.5, 2), (0.7, 2),
     (0.9, 3), (0.95, 4), (1.0, 4)],
)  # fmt: skip
def test_strongest(protected, rank):
    """A rank counts directions, an energy is the least number of them with that share of the energy."""
    energy = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    V = torch.linalg.qr(torch.randn(6, 4, dtype=torch.float64))[0]
    strongest = Spectrum(energy, V).strongest(**{"energy" if isinstance(protected, float) else "rank": protected})
    assert torch.equal(strongest.energy, energy[:rank]) and torch.equal(strongest.vectors, V[:, :rank])


@given(energy=st.lists(st.floats(1e-3, 1), min_size=1, max_size=40), p=st.integers(1, 40))
def test_the_share_of_p_directions_is_p_however_sums_are_rounded(energy, p):
    energy, p = torch.tensor(sorted(energy, reverse=True), dtype=torch.float64), min(p, len(energy))
    spectrum = Spectrum(energy, torch.eye(len(energy), dtype=torch.float64))
    assert spectrum.strongest(energy=float(energy[:p].flip(0).sum() / energy.flip(0).sum())).rank == p
    assert spectrum.strongest(energy=1.0).rank == len(energy)


@pytest.mark.parametrize("scale", [0.1, 1 / 3, 7e-5])
def test_a_share_that_directions_hold_to_rounding_needs_no_other(scale):
    for n in range(1, 40):
        spectrum = Spectrum(torch.full((n,), scale, dtype=torch.float64), torch.eye(n, dtype=torch.float64))
        assert [spectrum.strongest(energy=k / n).rank for k in range(n + 1)] == list(range(n + 1))


@pytest.mark.parametrize("given", [(None, None), (0, None), (7, None), (None, 0.0), (None, 0.25), (None, 1.0)])
def test_what_is_protected_is_kept_as_it_is(given):
    assert check_protect(*given) == given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((True, None), "protect_rank=True must be a whole number of at least 0"),
        ((-1, None), "protect_rank=-1 must be a whole number of at least 0"),
        (("x", None), "protect_rank='x' must be a whole number of at least 0"),
        ((0.9, None), "protect_rank=0.9 must be a whole number of at least 0"),
        ((None, 1.5), "protect_energy=1.5 must lie in [0, 1]"),
        ((None, -0.1), "protect_energy=-0.1 must lie in [0, 1]"),
        ((None, float("nan")), "protect_energy=nan must lie in [0, 1]"),
        ((1, 1.0), "protect_rank=1 and protect_energy=1.0 both say how much to protect: give one"),
    ],
)
def test_what_cannot_be_protected(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_protect(*given)


def test_tasks_that_cannot_be_pooled():
    with pytest.raises(ValueError, match="no out-of-task moments"):
        PooledMoment.of([])
    with pytest.raises(ValueError, match=r"different widths \[2, 3\]"):
        PooledMoment.of([moments_of(torch.ones(1, 1, n), "token") for n in (3, 2)])


def of_rank(rank, n, count, kind, seed=0):
    """(count, n) float32 vectors that span `rank` directions, up to their own rounding."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, rank, generator=generator))[0].mT
    if kind == "repeated":  # few tokens, again and again: what rounds up once rounds up always
        return (3 * basis).repeat(-(-count // rank), 1)[:count]
    x = torch.randn(count, rank, generator=generator) @ basis
    if kind == "of unequal sizes":
        x = x * torch.logspace(0, -3, n)
        x[:, 0] *= 100
    return x + 3 * basis[0] if kind == "with a mean" else x


@pytest.mark.parametrize("statistic", ["token", "sample"])
@pytest.mark.parametrize("kind", ["drawn", "repeated", "of unequal sizes", "with a mean"])
@pytest.mark.parametrize(("rank", "n", "count"), [(1, 5, 9), (6, 40, 100), (6, 40, 20), (30, 40, 1000), (6, 96, 3000)])
def test_the_rounding_of_float32_sums_is_no_direction(rank, n, count, kind, statistic):
    """Whatever the batches: the sums' errors differ, the rank and the directions do not."""
    x = of_rank(rank, n, count, kind)
    found = []
    for batch in (7, 13, count):
        moments = FeatureMoments(statistic, n)
        for part in x.split(batch):
            moments.add_(part if statistic == "token" else part[:, None])
        found.append(Spectrum.of(PooledMoment.of([moments])))
        assert found[-1].rank == rank
    for other in found[1:]:
        V, W = found[0].vectors, other.vectors
        assert float(torch.linalg.matrix_norm(V @ V.mT - W @ W.mT, 2)) < 2e-3


def test_weak_directions_are_kept_down_to_the_rounding_of_the_sums():
    """10⁻⁵ of the strongest energy is a direction in float32 sums, 10⁻⁹ in float64 ones only."""
    x = torch.linalg.qr(torch.randn(64, 3, dtype=torch.float64))[0] * torch.tensor([1, 10**-2.5, 10**-4.5]).double()
    basis = torch.linalg.qr(torch.randn(16, 3, dtype=torch.float64))[0]
    S = basis @ (x.mT @ x) @ basis.mT
    for dtype, rank in ((torch.float64, 3), (torch.float32, 2)):
        moments = FeatureMoments("token", 16, 64, torch.zeros(16), S.to(dtype))
        assert Spectrum.of(PooledMoment.of([moments])).rank == rank


def test_negative_energies_tell_of_sums_rounded_more_than_their_dtype():
    """As those of a bfloat16 file: 8 bits a number."""
    x = of_rank(6, 40, 1000, "drawn")
    moments = moments_of(x, "token")
    moments.second = moments.second.bfloat16().float()
    assert Spectrum.of(PooledMoment.of([moments])).rank == 6
