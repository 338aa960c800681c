import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from osrm_peft.adapters.factors import Factors
from osrm_peft.merging import lowrank
from osrm_peft.merging.lowrank import balanced, column_basis, compress, compress_matrix
from osrm_peft.merging.spaces import enter

shapes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12))  # o, n, and a rank that may exceed both


def factors(o, n, r, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(r, n, generator=generator), torch.randn(o, r, generator=generator), 0.7)


@given(shapes)
def test_balancing_keeps_the_product_and_shares_its_size(shape):
    given_factors = factors(*shape)
    B, A = balanced(given_factors)
    torch.testing.assert_close(B @ A, given_factors.delta().double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(B.T @ B, A @ A.T, rtol=1e-9, atol=1e-9)
    assert len(A) == min(shape)  # random factors have full rank


@given(shapes, st.integers(1, 12))
def test_compression_is_the_truncated_svd_with_its_energy(shape, rank):
    product = factors(*shape)
    dense = product.delta().double()
    result = compress(product.s * product.B.double(), product.A.double(), rank)
    U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
    torch.testing.assert_close(result.factors.delta(), (U[:, :rank] * S[:rank]) @ Vh[:rank], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.energy_kept, float(S[:rank].square().sum() / S.square().sum()), rtol=1e-5, atol=0)
    assert result.factors.rank <= rank


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


@pytest.mark.parametrize("condition", [1, 1e2, 1e4, 1e7, 1e12])
def test_tall_bases_are_orthonormal_and_exact_whatever_the_condition(condition):
    """By the Gram matrix up to a condition of 10³, by a QR beyond."""
    generator = torch.Generator().manual_seed(0)
    o, r, tasks = 512, 8, 3

    def conditioned(rows):
        X = torch.linalg.qr(torch.randn(rows, tasks * r, generator=generator, dtype=torch.float64)).Q
        spread = torch.logspace(0, -math.log10(condition), tasks * r, dtype=torch.float64)
        mixed = torch.linalg.qr(torch.randn(tasks * r, tasks * r, generator=generator, dtype=torch.float64)).Q
        return X * spread @ mixed

    B, A = conditioned(o), conditioned(o + 1).mT
    adapters = [Factors(a, b, 1.0) for a, b in zip(A.split(r), B.split(r, dim=1), strict=True)]
    for space in ("core", "knots"):
        layer = enter(space, adapters)
        for basis in filter(lambda one: one is not None, (layer.left, layer.right)):
            eye = torch.eye(basis.shape[1], dtype=torch.float64)
            torch.testing.assert_close(basis.mT @ basis, eye, rtol=0, atol=1e-9)
        for one, found in zip(adapters, layer.stack, strict=True):
            there = layer.left @ found if layer.right is None else layer.left @ found @ layer.right.mT
            torch.testing.assert_close(there, one.B @ one.A, rtol=0, atol=1e-9 * float((one.B @ one.A).norm()))
    cut, S = compress(B, A, 5).factors, torch.linalg.svdvals(B @ A)
    lost = (B @ A - cut.B @ cut.A).norm()
    torch.testing.assert_close(lost, S[5:].norm(), rtol=1e-9, atol=1e-9 * float(S[0]))  # Eckart and Young


@pytest.mark.parametrize("shape", [(300, 20), (20, 300), (40, 30), (300, 0), (0, 300)])
@pytest.mark.parametrize("rank", [None, 4])
def test_a_long_matrix_is_cut_as_by_its_svd(shape, rank):
    X = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for matrix in (X, X * torch.logspace(0, -9, shape[1], dtype=torch.float64)):
        found, S = compress_matrix(matrix, rank), torch.linalg.svdvals(matrix)
        kept = S[:rank]
        torch.testing.assert_close(found.factors.B.mT @ found.factors.B, kept.diag(), rtol=1e-8, atol=1e-9)
        lost = (matrix - found.factors.B @ found.factors.A).norm()
        torch.testing.assert_close(lost, S[len(kept) :].norm(), rtol=1e-8, atol=1e-8)


def test_the_gram_matrix_is_what_is_used_where_it_can_be(monkeypatch):
    monkeypatch.setattr(torch.linalg, "qr", lambda X: pytest.fail("a QR"))
    monkeypatch.setattr(lowrank, "thin_svd", lambda X: torch.linalg.svd(X, full_matrices=False))
    assert enter("core", [factors(512, 300, 4, seed) for seed in range(3)]).stack.shape == (3, 12, 12)


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
