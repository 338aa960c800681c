import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osrm_peft.moments import FeatureMoments
from osrm_peft.spectrum import Pool, Spectrum
from osrm_peft.subspace import (
    choose_directions,
    procrustes_drift,
    quietest_directions,
    reference_directions,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def moments_of(h, statistic="token"):
    moments = FeatureMoments(statistic, h.shape[-1])
    moments.add_(h[:, None], None)  # samples of one token
    return moments


def tasks(T, k, n, statistic="token", seed=0):
    drawn = torch.randn(T, k, n, generator=generator(seed)) * torch.linspace(0.2, 3, n)
    return [moments_of(h, statistic) for h in drawn]


def pooled(others):
    return Pool.of(others).second_moment()


def spectrum_of(others):
    return Spectrum.of(Pool.of(others))


def energy(A, S):
    return float(torch.trace(A @ S @ A.T))


def random_frame(r, n, seed):
    return torch.linalg.qr(torch.randn(n, r, generator=generator(seed), dtype=torch.float64))[0].T


def assert_orthonormal(A):
    torch.testing.assert_close(A @ A.T, torch.eye(len(A), dtype=A.dtype), rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    T=st.integers(1, 3), k=st.integers(1, 30), n=st.integers(2, 12), share=st.floats(0, 1),
    statistic=st.sampled_from(["mean", "sample", "token"]),
)  # fmt: skip
def test_A_has_the_least_energy_of_all_frames(T, k, n, share, statistic):
    r = 1 + int(share * (n - 1))
    others = tasks(T, k, n, statistic)
    A = choose_directions(spectrum_of(others), r, generator=generator())
    S = pooled(others)
    assert_orthonormal(A)
    least = float(torch.linalg.eigvalsh(S)[:r].sum())
    # second moments are summed in float32: a null space is known to its rounding, relative to the largest eigenvalue
    slack = 1e-6 * float(torch.linalg.matrix_norm(S, 2))
    assert energy(A, S) <= least + slack
    assert all(energy(A, S) <= energy(random_frame(r, n, seed), S) + slack for seed in range(100))


def test_pooling_weighs_every_task_the_same():
    few, many = torch.randn(3, 5), torch.randn(300, 5)
    S = pooled([moments_of(few), moments_of(many)])
    torch.testing.assert_close(S, ((few.T @ few / 3 + many.T @ many / 300) / 2).double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("statistic", ["mean", "sample"])
def test_vectors_and_second_moments_choose_the_same_A(statistic):
    """The O(m²n) way without an n×n matrix, and eigh of S, must agree: the null space and the seed fix A."""
    others = tasks(3, 4, 24, statistic)
    from_vectors = quietest_directions(spectrum_of(others), 5, generator(7))
    S = pooled(others)
    count = sum(moments.rank_bound() for moments in others)  # 3 means, or 12 samples
    summed = FeatureMoments("token", 24, count=count, total=torch.zeros(24), second=(count * S).float())
    torch.testing.assert_close(
        quietest_directions(spectrum_of([summed]), 5, generator(7)), from_vectors, rtol=0, atol=1e-4
    )
    assert energy(from_vectors, S) < 1e-14 * float(S.trace())  # evaluated in float64


def test_the_choice_in_a_null_space_is_seeded_and_follows_no_basis():
    others = tasks(2, 1, 16, "mean")
    A, again, other = (quietest_directions(spectrum_of(others), 3, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(A, again)
    assert not torch.allclose(A, other, atol=0.1)


def test_null_space_in_task_takes_the_own_energy_that_is_free():
    others, own = tasks(3, 1, 12, "mean"), tasks(1, 40, 12, seed=5)[0]
    A = choose_directions(spectrum_of(others), 2, own=own, null_space="in_task", generator=generator())
    assert_orthonormal(A)
    S = pooled(others)
    assert energy(A, S) < 1e-14 * float(S.trace())  # still the paper's minimum
    null = torch.linalg.svd(S)[2][3:]  # (9, 12): the others' means span 3 directions
    best = torch.linalg.eigvalsh(null @ own.second_moment() @ null.T)[-2:].sum()
    torch.testing.assert_close(energy(A, own.second_moment()), float(best), rtol=1e-9, atol=0)


@pytest.mark.parametrize("in_task", ["none", "ratio"])
def test_own_features_of_low_rank_are_completed_by_quiet_directions(in_task):
    others, own = tasks(3, 1, 12, "mean"), tasks(1, 1, 12, "mean", seed=5)[0]
    A = choose_directions(spectrum_of(others), 4, own=own, null_space="in_task", in_task=in_task, generator=generator())
    assert_orthonormal(A)
    S, h = pooled(others), own.mean()
    free = torch.linalg.svd(S)[2][3:]
    if in_task == "none":
        assert energy(A, S) < 1e-14 * float(S.trace())
        torch.testing.assert_close(energy(A, torch.outer(h, h)), float((free @ h).square().sum()), rtol=1e-9, atol=0)
    else:
        a = torch.linalg.solve(S + 0.1 * S.trace() / 12 * torch.eye(12, dtype=S.dtype), h)  # the one with κ > 0
        a = a / a.norm()
        torch.testing.assert_close(A.T @ A @ a, a, rtol=0, atol=1e-9)
        # at most 4 of the 12 directions (a and the others' 3 means) carry energy: the other 3 rows find none
        torch.testing.assert_close(energy(A, S), float(a @ S @ a), rtol=1e-9, atol=1e-12)


def test_difference_is_the_top_of_the_weighed_difference_and_the_paper_at_zero():
    others, own = tasks(2, 50, 10), tasks(1, 50, 10, seed=5)[0]
    S, S_own = pooled(others), own.second_moment()
    for beta in (0.3, 1.0):
        A = choose_directions(
            spectrum_of(others), 3, own=own, in_task="difference", in_task_weight=beta, generator=generator()
        )
        M = beta * S_own / S_own.trace() - (1 - beta) * S / S.trace()
        assert_orthonormal(A)
        torch.testing.assert_close(energy(A, M), float(torch.linalg.eigvalsh(M)[-3:].sum()), rtol=1e-9, atol=0)
    paper = choose_directions(spectrum_of(others), 3, generator=generator())
    zero = choose_directions(
        spectrum_of(others), 3, own=own, in_task="difference", in_task_weight=0, generator=generator()
    )
    assert torch.equal(paper, zero)


def test_ratio_spans_the_top_generalised_eigenvectors():
    others, own = tasks(2, 50, 10), tasks(1, 50, 10, seed=5)[0]
    S, S_own = pooled(others), own.second_moment()
    A = choose_directions(spectrum_of(others), 3, own=own, in_task="ratio", ridge=0.1, generator=generator())
    assert_orthonormal(A)
    M = S + 0.1 * S.trace() / 10 * torch.eye(10, dtype=S.dtype)
    values, vectors = torch.linalg.eig(torch.linalg.solve(M, S_own))  # brute force: not symmetric, not whitened
    top = vectors.real[:, values.real.argsort()[-3:]]
    torch.testing.assert_close(top.T @ A.T @ A, top.T, rtol=0, atol=1e-9)  # span(top) lies in span(A)


def test_reference_is_the_last_right_singular_vectors_of_the_task_means():
    others = tasks(3, 5, 12, "mean")
    A = reference_directions(others, 4)
    means = torch.stack([moments.mean() for moments in others])
    torch.testing.assert_close(A, torch.linalg.svd(means)[2].T[:, -4:].T)
    assert (means @ A.T).abs().max() < 1e-12


def test_energy_share_is_one_for_everything_and_zero_for_a_null_space():
    others = tasks(2, 1, 6, "mean")
    assert Pool.of(others).share(torch.eye(6)) == pytest.approx(1)
    assert Pool.of(others).share(quietest_directions(spectrum_of(others), 2, generator())) < 1e-14


def test_drift_ignores_rotations_and_measures_the_rest():
    A = random_frame(3, 8, 0)
    Q = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    assert procrustes_drift(Q @ A, A) == pytest.approx(0, abs=1e-7)
    assert procrustes_drift(3 * A, A) == pytest.approx(2)
    B = A + 0.1 * torch.randn(3, 8, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(B @ A.T)  # the optimal Q, written out
    assert procrustes_drift(B, A) == pytest.approx(float((B - U @ Vh @ A).norm() / A.norm()))
    assert procrustes_drift(B, A) <= float((B - A).norm() / A.norm())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 11}, r"rank r=11 must lie in 1 … 10, the layer's input width"),
        ({"r": 0}, r"rank r=0 must be a whole number of at least 1"),
        ({"r": 8.0}, r"rank r=8.0 must be a whole number of at least 1"),  # the released code crashes at V[:, -8.0:]
        ({"others": []}, "no out-of-task moments"),
        ({"null_space": "lapack"}, r"unknown null_space 'lapack': choose from random, in_task"),
        ({"in_task": "all"}, r"unknown in_task 'all': choose from none, difference, ratio"),
        (
            {"in_task": "ratio"},
            r"in_task='ratio', null_space='random' look at the task's own features: give them",
        ),
        ({"own": "narrow"}, r"different widths \[9, 10\]"),
    ],
)
def test_bad_input(change, message):
    arguments = {"others": tasks(2, 5, 10), "r": 2, "generator": generator()} | change
    if arguments.get("own") == "narrow":
        arguments["own"] = tasks(1, 5, 9)[0]
    with pytest.raises(ValueError, match=message):
        choose_directions(spectrum_of(arguments.pop("others")), **arguments)
