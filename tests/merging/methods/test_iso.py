import pytest
import torch
from hypothesis import given, settings

from osrm_peft import merge_adapters
from osrm_peft.merging import lowrank
from osrm_peft.merging.methods.iso import iso
from tests.helpers.lora import close, dense, draw, lora, problems


def published(total):
    """The published code: every one of the min(o, n) singular values becomes their mean."""
    U, S, Vh = torch.linalg.svd(total, full_matrices=False)
    return U @ torch.diag(S.mean() * torch.ones_like(S)) @ Vh


def projector(rows):
    """(n, n) onto the span of the columns of `rows`, by least squares."""
    return rows @ torch.linalg.pinv(rows)


@settings(max_examples=25)
@given(problems)
def test_the_spectrum_is_flat_in_the_directions_of_the_sum(problem):
    adapters, weights = draw(problem)
    o, n, ranks, _ = problem
    tau = dense(adapters)
    total = sum(w * t for w, t in zip(weights, tau, strict=True))
    merged, k = iso(tau, torch.tensor(weights, dtype=torch.float64)), min(o, n, sum(ranks))
    own, found = torch.linalg.svdvals(total), torch.linalg.svdvals(merged)
    if float(own[k - 1]) < 1e-4 * float(own[0]):
        return  # nearly dependent: the cut of the rank decides
    torch.testing.assert_close(found[:k], own[:k].mean().expand(k), rtol=1e-9, atol=0)
    assert found[k:].numel() == 0 or float(found[k:].max()) < 1e-9 * float(found[0])
    torch.testing.assert_close(found.sum(), own.sum(), rtol=1e-9, atol=0)  # the nuclear norm
    # σ̄ (X Xᵀ)^(−½) X, by eigenvalues: the same singular vectors, not only the same subspaces
    values, vectors = torch.linalg.eigh(total @ total.mT)
    inverse = vectors[:, -k:] @ torch.diag(values[-k:].rsqrt()) @ vectors[:, -k:].mT
    close(merged, own.sum() / k * inverse @ total, 1e-6)


def test_the_singular_subspaces_are_those_of_the_sum():
    adapters = {f"t{seed}": lora(seed, {"x": (20, 16, 2)}) for seed in (1, 2, 3)}
    merged, total = merge_adapters(adapters, "iso").deltas()["x"], dense(adapters).sum(0)
    for X, Y in ((merged, total), (merged.mT, total.mT)):
        U = torch.linalg.svd(X).U[:, :6]
        close(projector(U), projector(torch.linalg.svd(Y).U[:, :6]), 1e-5)
    inner = torch.linalg.svd(total)  # uᵢᵀ · merged · vⱼ is σ̄ for i = j, else 0
    between = inner.U.mT @ merged @ inner.Vh.mT
    close(between[:6, :6], inner.S[:6].mean() * torch.eye(6), 1e-5)


def test_a_single_adapter_is_flattened_too():
    one = {"t": lora(1, {"x": (10, 8, 3)})}
    merged = merge_adapters(one, "iso").deltas()["x"]
    own = torch.linalg.svdvals(dense(one)[0])
    torch.testing.assert_close(torch.linalg.svdvals(merged)[:3], own[:3].mean().expand(3), rtol=1e-6, atol=0)
    assert float((merged - dense(one)[0]).norm()) > 0.05 * float(merged.norm())


def test_the_published_code_puts_most_energy_where_no_adapter_is():
    """σ̄ over all min(o, n) values: of two rank-2 adapters of a 40×32 layer 28 of 32 directions are noise."""
    adapters = {f"t{seed}": lora(seed, {"x": (40, 32, 2)}) for seed in (1, 2)}
    total = dense(adapters).sum(0)
    theirs, ours = published(total), merge_adapters(adapters, "iso").deltas()["x"]
    rows = torch.cat([adapter.factors["x"].A for adapter in adapters.values()]).double().mT  # (n, Σr)
    outside = torch.eye(32, dtype=torch.float64) - projector(rows)
    shares = [float((X @ outside).square().sum() / X.square().sum()) for X in (theirs, ours)]
    assert shares[0] == pytest.approx(28 / 32, rel=1e-6) and shares[1] < 1e-10
    torch.testing.assert_close(ours @ rows, 8 * theirs @ rows, rtol=1e-5, atol=1e-5)  # inside, only σ̄ differs


def test_at_full_rank_it_is_the_published_code():
    adapters = {f"t{seed}": lora(seed, {"x": (5, 6, 4)}) for seed in (1, 2)}
    close(merge_adapters(adapters, "iso").deltas()["x"], published(dense(adapters).sum(0)), 1e-5)


def test_copies_scale_it_and_negatives_cancel():
    tau = dense({"t": lora(1, {"x": (6, 5, 2)})})
    one = iso(tau, torch.ones(1))
    close(iso(tau.repeat(3, 1, 1), torch.ones(3)), 3 * one, 1e-9)
    close(iso(tau, torch.tensor([-2.0])), -2 * one, 1e-9)
    assert not iso(tau.repeat(2, 1, 1), torch.tensor([1.0, -1.0])).any()


def test_rounding_of_float32_is_no_direction():
    """A float32 product of rank 2 has 30 more singular values, all rounding."""
    one = lora(1, {"x": (40, 32, 2)})
    factors = one.factors["x"]
    close(iso(factors.delta()[None], torch.ones(1)).double(), iso(factors.delta().double()[None], torch.ones(1)), 1e-6)
    assert int(torch.linalg.matrix_rank(iso(factors.delta()[None], torch.ones(1)), rtol=1e-4)) == 2
    spaces = [merge_adapters({"t": one}, "iso", space=space).deltas()["x"] for space in ("core", "weight", "knots")]
    close(spaces[1], spaces[0], 1e-6)
    close(spaces[2], spaces[0], 1e-6)


def test_zeros_and_1x1_layers():
    assert not iso(torch.zeros(2, 3, 4), torch.ones(2)).any()
    assert iso(torch.tensor([[[2.0]], [[-5.0]]]), torch.ones(2)).item() == pytest.approx(-3)
    assert iso(torch.ones(1, 1, 1), torch.ones(1)).dtype == torch.float32


def test_it_has_no_options():
    with pytest.raises(TypeError, match=r"iso has no option rank_share; its options are none"):
        merge_adapters({"t": "no/such/folder"}, "iso", rank_share=0.5)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("weights", [[1, 1, 1], [1, -2, 0.5]])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_lower_rank_keeps_the_strongest_directions_of_the_sum(rank, weights, wide, monkeypatch):
    """All singular values of the result are equal: they do not say which to keep, the sum's do. In any order and
    space."""
    monkeypatch.setattr(lowrank, "_WIDE", 10 if wide else 1024)
    adapters = {f"t{seed}": lora(seed, {"x": (24, 18, 2)}) for seed in (1, 2, 3)}
    U, S, Vh = torch.linalg.svd(torch.einsum("t,ton->on", torch.tensor(weights).double(), dense(adapters)))
    assert float(S[rank - 1] - S[rank]) > 0.01 * float(S[0])
    expected = S[:6].mean() * U[:, :rank] @ Vh[:rank]
    turned = dict(reversed(list(zip(adapters, weights, strict=True))))
    for space in ("core", "weight", "knots"):
        for names in (dict(zip(adapters, weights, strict=True)), turned):
            given = {name: adapters[name] for name in names}
            merged = merge_adapters(given, "iso", rank=rank, space=space, weights=names)
            close(merged.deltas()["x"], expected, 1e-5)
            assert merged.energy_kept()["x"] == pytest.approx(rank / 6, rel=1e-6)
            assert merged.for_task(None).rank == rank


def test_a_rank_above_the_sum_s_own_changes_nothing():
    adapters = {f"t{seed}": lora(seed, {"x": (24, 18, 2)}) for seed in (1, 2)}
    for space in ("core", "weight"):
        whole, cut = (merge_adapters(adapters, "iso", space=space, rank=rank) for rank in (None, 7))
        close(cut.deltas()["x"], whole.deltas()["x"], 1e-6)
        assert cut.energy_kept()["x"] == pytest.approx(1)
    nothing = {task: lora(1, {"x": (24, 18, 2)}, s=0.0) for task in "st"}
    assert not merge_adapters(nothing, "iso", rank=3).deltas()["x"].any()
