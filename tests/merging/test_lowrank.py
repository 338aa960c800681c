import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osrm_peft.adapters.factors import Factors
from osrm_peft.merging import lowrank
from osrm_peft.merging.lowrank import balanced, column_basis, compress, compress_matrix
from osrm_peft.merging.spaces import enter

shapes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12))  # o, n, and a rank that may exceed both


def factors(o, n, r, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(r, n, generator=generator), torch.randn(o, r, generator=generator), 0.7)


@settings(deadline=None)
@given(shapes)
def test_balancing_keeps_the_product_and_shares_its_size(shape):
    given_factors = factors(*shape)
    B, A = balanced(given_factors)
    torch.testing.assert_close(B @ A, given_factors.delta().double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(B.T @ B, A @ A.T, rtol=1e-9, atol=1e-9)
    assert len(A) == min(shape)  # random factors have full rank


@settings(deadline=None)
@given(shapes, st.integers(1, 12))
def test_compression_is_the_truncated_svd_with_its_energy(shape, rank):
    product = factors(*shape)
    dense = product.delta().double()
    result = compress(product.s * product.B.double(), product.A.double(), rank)
    U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
    torch.testing.assert_close(result.factors.delta(), (U[:, :rank] * S[:rank]) @ Vh[:rank], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.energy_kept, float(S[:rank].square().sum() / S.square().sum()), rtol=1e-5, atol=0)
    assert result.factors.rank <= rank


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(2, 8), st.integers(2, 8))
def test_the_core_is_an_exact_change_of_basis(ranks, o, n):
    """Tr may exceed o and n, tasks may be missing, ranks differ: left · M_t · rightᵀ = τ_t, bases orthonormal."""
    adapters = [factors(o, n, r, seed) if r else None for seed, r in enumerate(ranks)]
    if not any(ranks):
        return
    layer = enter("core", adapters)
    p, q = layer.stack.shape[1:]
    assert p <= min(o, sum(ranks)) and q <= min(n, sum(ranks))
    torch.testing.assert_close(layer.left.T @ layer.left, torch.eye(p, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.right.T @ layer.right, torch.eye(q, dtype=torch.float64), rtol=0, atol=1e-12)
    for M, adapter in zip(layer.stack, adapters, strict=True):
        dense = torch.zeros(o, n) if adapter is None else adapter.delta()
        torch.testing.assert_close(layer.left @ M @ layer.right.T, dense.double(), rtol=1e-5, atol=1e-5)
        found = layer.compress(M).factors
        torch.testing.assert_close(found.delta(), dense.double(), rtol=1e-5, atol=1e-5)


def test_shared_directions_make_the_core_smaller():
    one = factors(8, 9, 3)
    twice = enter("core", [one, Factors(2 * one.A, one.B, -1.0)])
    assert twice.stack.shape == (2, 3, 3)
    assert column_basis([torch.ones(4, 2, dtype=torch.float64)])[0].shape == (4, 1)


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
def test_a_wide_matrix_is_cut_as_by_its_svd_without_one(shape, monkeypatch):
    X = torch.randn(*shape, dtype=torch.float64)  # a flat spectrum: the hardest for iterations
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    monkeypatch.setattr(lowrank, "_WIDE", 10)
    for rank in (1, 5, 30):  # by Lanczos, by Lanczos, by the SVD
        factors, energy = compress_matrix(X, rank)
        torch.testing.assert_close(factors.delta(), (U[:, :rank] * S[:rank]) @ Vh[:rank], rtol=0, atol=1e-10)
        assert energy == pytest.approx(float(S[:rank].square().sum() / S.square().sum()), rel=1e-10)
        torch.testing.assert_close(factors.B.mT @ factors.B, S[:rank].diag(), rtol=0, atol=1e-10)  # balanced
    exact = compress_matrix(X)
    assert torch.equal(exact.factors.delta(), X) and exact == (exact.factors, 1.0) and exact.factors.rank == 60
    assert not compress_matrix(0 * X, 5).factors.delta().any()
    assert compress_matrix(0 * X, 5).factors.rank == compress_matrix(0 * X).factors.rank == 0
    assert torch.equal(compress_matrix(X, 5).factors.B, compress_matrix(X, 5).factors.B)  # no random start
