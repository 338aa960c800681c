import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from osrm_peft import merge_adapters
from osrm_peft.merging.methods.tsv import tsv
from tests.helpers.lora import close, dense, lora, problems
from tests.helpers.lora import draw as draw_adapters


def polar(X):
    """The nearest matrix with orthonormal columns (or rows) to X, X (XᵀX)^(−½), by eigenvalues; not by an SVD of X."""
    values, vectors = np.linalg.eigh(X.T @ X)
    good = values > 1e-11 * max(values.max(), 1e-300)  # the square of a singular value
    return X @ (vectors[:, good] / np.sqrt(values[good])) @ vectors[:, good].T


def reference(thetas, ranks):
    """The paper's Algorithm 1 in NumPy: SVDs, concatenation, whitening, and the product."""
    lefts, values, rights = [], [], []
    for theta, k in zip(thetas, ranks, strict=True):
        U, S, Vh = np.linalg.svd(theta)
        lefts.append(U[:, :k])
        values.append(S[:k])
        rights.append(Vh[:k].T)
    U, V = polar(np.concatenate(lefts, 1)), polar(np.concatenate(rights, 1))
    return torch.from_numpy(U @ np.diag(np.concatenate(values)) @ V.T), U, V


def low_rank(T, o, n, r, seed=0):
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(T, o, r, generator=generator, dtype=torch.float64)
    return B @ torch.randn(T, r, n, generator=generator, dtype=torch.float64)


@settings(max_examples=25)
@given(problems)
def test_it_is_the_paper_s_algorithm(problem):
    adapters, weights = draw_adapters(problem)
    o, n, ranks, _ = problem
    tau = dense(adapters)
    thetas = [w * t.numpy() for w, t in zip(weights, tau, strict=True)]
    expected, U, V = reference(thetas, [min(o, n, r) for r in ranks])
    if any(np.linalg.matrix_rank(X, 1e-3) < min(X.shape) for X in (U, V)):
        return  # nearly the same directions: the cut of the rank decides
    total = sum(t.norm() * abs(w) for w, t in zip(weights, tau, strict=True))
    close(tsv(tau, torch.tensor(weights, dtype=torch.float64)), expected, 1e-7, float(total))


@pytest.mark.parametrize(("T", "o", "n", "r"), [(2, 9, 7, 3), (3, 12, 10, 2), (4, 3, 30, 2), (4, 30, 3, 1)])
def test_more_directions_than_the_layer_has_are_whitened_too(T, o, n, r):
    tau = low_rank(T, o, n, r)
    expected, U, V = reference(list(tau.numpy()), [r] * T)
    close(tsv(tau, torch.ones(T)), expected, 1e-9)
    for X in (U, V):  # the reference's own: orthonormal columns, or rows where there are more columns than rows
        gram = X.T @ X if X.shape[0] >= X.shape[1] else X @ X.T
        np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-9)


def test_orthogonal_tasks_are_summed_up_with_their_own_spectra():
    tau = torch.zeros(3, 6, 6, dtype=torch.float64)
    for t in range(3):
        tau[t, 2 * t : 2 * t + 2, 2 * t : 2 * t + 2] = torch.tensor([[3.0, 1.0], [0.0, 2.0]])
    close(tsv(tau, torch.ones(3)), tau.sum(0), 1e-12)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    close(tsv(tau, weights), torch.einsum("t,ton->on", weights, tau), 1e-12)


def test_overlapping_tasks_keep_all_their_singular_values():
    """The point of the method: U⊥ and V⊥ are orthonormal, so the spectrum is all tasks' together."""
    tau = low_rank(3, 12, 10, 2, seed=4)
    tau[1] += 0.5 * tau[0]  # of rank 4, and it shares two directions with the first
    own = torch.linalg.svdvals(tau[[0, 2]])[:, :2].flatten().sort(descending=True).values
    values = torch.linalg.svdvals(tsv(tau[[0, 2]], torch.ones(2)))
    torch.testing.assert_close(values[:4], own, rtol=1e-10, atol=0)
    assert float(values[4:].max()) < 1e-10
    shared = torch.linalg.svdvals(tsv(tau, torch.ones(3)))  # 8 directions of which 6 differ
    assert int((shared > 1e-9).sum()) == 6


@pytest.mark.parametrize("copies", [2, 5])
def test_copies_of_one_adapter_are_that_adapter_once(copies):
    tau = low_rank(1, 8, 6, 2)
    close(tsv(tau.repeat(copies, 1, 1), torch.ones(copies)), tau[0], 1e-9)
    close(tsv(tau.repeat(2, 1, 1), torch.tensor([1.0, -1.0])), 0 * tau[0], 1e-9, float(tau.norm()))


def test_tasks_of_the_same_directions_share_them_by_their_mean_value():
    tau = low_rank(1, 8, 6, 2)
    close(tsv(torch.cat([tau, 3 * tau]), torch.ones(2)), 2 * tau[0], 1e-9)


@pytest.mark.parametrize(("rank_share", "kept"), [(0.5, 2), (0.51, 3), (0.25, 1), (0.01, 1), (1.0, 4)])
def test_keep_is_a_share_of_each_task_s_rank_rounded_up(rank_share, kept):
    tau = low_rank(3, 15, 14, 4)
    expected, _, _ = reference(list(tau.numpy()), [kept] * 3)
    close(tsv(tau, torch.ones(3), rank_share=rank_share), expected, 1e-9)
    assert int(torch.linalg.matrix_rank(tsv(tau, torch.ones(3), rank_share=rank_share))) == 3 * kept
    lone = torch.linalg.svdvals(tsv(tau[:1], torch.ones(1), rank_share=rank_share))
    torch.testing.assert_close(lone[:kept], torch.linalg.svdvals(tau[0])[:kept])


def test_adapters_of_other_ranks_keep_their_own_share():
    adapters = {f"r{r}": lora(r, {"x": (14, 13, r)}) for r in (1, 3, 4)}
    tau = dense(adapters)
    expected, _, _ = reference(list(tau.numpy()), [math.ceil(0.5 * r) for r in (1, 3, 4)])
    for space in ("core", "weight", "knots"):
        close(merge_adapters(adapters, "tsv", rank_share=0.5, space=space).deltas()["x"], expected, 1e-5)


def test_a_weight_scales_its_task_and_0_takes_it_out():
    tau = low_rank(2, 9, 8, 2)
    close(tsv(tau, torch.tensor([2.0, 2.0])), 2 * tsv(tau, torch.ones(2)), 1e-10)
    close(tsv(tau, torch.tensor([1.0, 0.0])), tau[0], 1e-10)
    close(tsv(tau, torch.tensor([-1.0, 0.0])), -tau[0], 1e-10)
    scaled = torch.stack([3 * tau[0], -tau[1]])
    close(tsv(tau, torch.tensor([3.0, -1.0])), tsv(scaled, torch.ones(2)), 1e-10)


def test_zeros_and_1x1_layers():
    assert not tsv(torch.zeros(2, 3, 4), torch.ones(2)).any()
    tau = torch.tensor([[[2.0]], [[-5.0]]])
    assert tsv(tau[:1], torch.ones(1)).item() == pytest.approx(2)
    # one direction for both: u = (1, ∓1)/√2 and v = (1, ±1)/√2 leave the mean
    assert tsv(tau, torch.ones(2)).item() == pytest.approx(-1.5)
    close(tsv(torch.cat([torch.zeros(1, 3, 4), torch.ones(1, 3, 4)]), torch.ones(2)), torch.ones(3, 4), 1e-6)


def test_the_dtype_is_kept_and_options_are_checked_before_anything_is_read():
    assert tsv(low_rank(2, 4, 4, 1).float(), torch.ones(2)).dtype == torch.float32
    for rank_share in (0, -1, 1.1, "x"):
        with pytest.raises(ValueError, match=r"rank_share=.* must lie in \(0, 1\]"):
            merge_adapters({"t": "no/such/folder"}, "tsv", rank_share=rank_share)
