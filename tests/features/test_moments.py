import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from osrm_peft.features import moments as moments_module
from osrm_peft.features.file import parts_of
from osrm_peft.features.moments import STATISTICS, FeatureMoments


def inputs(b=6, s=5, n=4, seed=0):
    x = torch.randn(b, s, n, generator=torch.Generator().manual_seed(seed))
    keep = torch.arange(s) < torch.tensor([5, 1, 3, 0, 4, 2])[:b, None]  # sample 3 is all padding
    return torch.where(keep[..., None], x, torch.nan), keep  # poison: one leaked padding entry makes the result NaN


def vectors(statistic, x, keep):
    """The h of each statistic, written out."""
    if statistic == "token":
        return torch.cat([row[k] for row, k in zip(x, keep, strict=True)])
    return torch.stack([row[k].mean(0) for row, k in zip(x, keep, strict=True) if k.any()])


def brute_second_moment(statistic, h):
    h = h.double()
    return torch.outer(h.mean(0), h.mean(0)) if statistic == "mean" else h.T @ h / len(h)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_moments_are_the_defining_sums(statistic):
    x, keep = inputs()
    moments = FeatureMoments(statistic, 4)
    moments.add_(x, keep)
    h = vectors(statistic, x, keep)
    assert moments.count == len(h) == (15 if statistic == "token" else 5)
    torch.testing.assert_close(moments.mean(), h.double().mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moments.second_moment(), brute_second_moment(statistic, h), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("statistic", STATISTICS)
@given(cuts=st.lists(st.integers(0, 6), max_size=4), merge=st.booleans())
def test_any_split_gives_the_same_moments(statistic, cuts, merge):
    x, keep = inputs()
    whole = FeatureMoments(statistic, 4)
    whole.add_(x, keep)
    parts = FeatureMoments(statistic, 4)
    for part, k in zip(x.tensor_split(sorted(cuts)), keep.tensor_split(sorted(cuts)), strict=True):
        if merge:  # as ranks do: each sums its own, then the sums are added
            other = FeatureMoments(statistic, 4)
            other.add_(part, k)
            parts.merge_(other)
        else:
            parts.add_(part, k)
    assert parts.count == whole.count
    torch.testing.assert_close(parts.second_moment(), whole.second_moment(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(parts.mean(), whole.mean(), rtol=1e-6, atol=1e-6)


READERS = {
    "second_moment": lambda moments: moments.second_moment(),
    "settle_": lambda moments: (moments.settle_(), moments.second.double() / moments.count)[1],
    "merge_ into": lambda moments: (moments.merge_(FeatureMoments("token", moments.width)), moments.second_moment())[1],
    "merge_ from": lambda moments: (
        fresh := FeatureMoments("token", moments.width),
        fresh.merge_(moments),
        fresh.second.double() / fresh.count,
    )[2],
    "sum_over_": lambda moments: (
        moments.sum_over_([moments.count], 0, lambda tensor: tensor),
        moments.second.double() / moments.count,
    )[1],
    "copy": lambda moments: copy.deepcopy(moments).second_moment(),
    "file": lambda moments: whole(parts_of(moments)["second_moment_tril"], moments.width),
}


def whole(triangle, n):
    lower = torch.zeros(n, n, dtype=triangle.dtype)
    lower[torch.ones(n, n, dtype=torch.bool).tril()] = triangle
    return lower + lower.tril(-1).mT


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("n", [1, 7, 8, 20, 33])
def test_wide_layers_sum_one_half_and_no_reader_sees_it(monkeypatch, n, read):
    monkeypatch.setattr(moments_module, "_WIDE", 1)
    x = torch.randn(3, 6, n, generator=torch.Generator().manual_seed(n))
    moments = FeatureMoments("token", n)
    moments.add_(x[:1])
    moments.second_moment()  # whole now, and a half again by the next
    moments.add_(x[1:])
    h = x.flatten(0, 1)
    assert moments.half
    torch.testing.assert_close(READERS[read](moments), brute_second_moment("token", h), rtol=1e-5, atol=1e-6)


def test_of_a_half_that_is_symmetric_to_rounding_the_whole_is_symmetric_to_the_bit(monkeypatch):
    """As some processors leave the blocks on the diagonal."""
    monkeypatch.setattr(moments_module, "_WIDE", 1)
    moments = FeatureMoments("token", 20)
    moments.add_(torch.randn(1, 40, 20, generator=torch.Generator().manual_seed(0)))
    moments.second[0, 1] = moments.second[0, 1].nextafter(torch.tensor(torch.inf))
    moments.settle_()
    assert torch.equal(moments.second, moments.second.mT)
    assert torch.equal(moments.second_moment(), whole(parts_of(moments)["second_moment_tril"], 20))


def test_sample_keeps_the_vectors_only_while_they_are_fewer_than_the_width():
    few, many = FeatureMoments("sample", 8), FeatureMoments("sample", 3)
    x = torch.randn(5, 2, 8)
    few.add_(x, None)
    many.add_(x[..., :3], None)
    assert few.rows is not None and few.rows.shape == (5, 8) and few.second is None
    assert many.rows is None and many.second is not None and many.second.shape == (3, 3)
    root = few.root()
    h = x.mean(1).double()
    torch.testing.assert_close(few.second_moment(), h.T @ h / 5, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(root.T @ root, few.second_moment())
    assert many.root() is None and (few.rank_bound(), many.rank_bound()) == (5, 3)


def test_two_dimensional_inputs_are_one_vector_a_sample():
    pooled = FeatureMoments("token", 4)
    x = torch.randn(3, 4)
    pooled.add_(x, torch.zeros(3, 9, dtype=torch.bool))  # a mask over tokens says nothing about pooled vectors
    torch.testing.assert_close(pooled.second_moment(), (x.T @ x / 3).double())


def test_half_precision_inputs_are_summed_in_float32():
    x = torch.full((1, 4096, 2), 0.1).bfloat16()
    moments = FeatureMoments("token", 2)
    moments.add_(x, None)
    assert moments.total.dtype == torch.float32
    torch.testing.assert_close(moments.mean(), x[0, 0].double(), rtol=1e-5, atol=0)


def test_nothing_seen_and_nonsense_are_errors():
    with pytest.raises(ValueError, match="no rows were seen"):
        FeatureMoments("token", 4).second_moment()
    with pytest.raises(ValueError, match=r"unknown statistic 'median': choose from mean, sample, token"):
        FeatureMoments("median", 4)
    with pytest.raises(ValueError, match="cannot add moments 'mean' of width 4 to 'token' of width 4"):
        FeatureMoments("token", 4).merge_(FeatureMoments("mean", 4))


def asymmetric(n=6, count=11, seed=0):
    """Sums as they are on a CPU whose kernels give XᵀX symmetric to rounding only: one entry is a unit off."""
    moments = FeatureMoments("token", n)
    moments.add_(torch.randn(count, 1, n, generator=torch.Generator().manual_seed(seed)))
    moments.second = (moments.second + moments.second.mT) / 2
    moments.second[0, 1] = moments.second[0, 1].nextafter(torch.tensor(torch.inf))
    return moments


def test_an_asymmetry_of_one_unit_in_the_last_place_is_not_read():
    """`eigh` and files look at one triangle: a sum and its transpose are one second moment, to the bit."""
    moments = asymmetric()
    turned = FeatureMoments("token", 6, moments.count, moments.total, moments.second.mT.contiguous())
    S = moments.second_moment()
    assert torch.equal(S, S.mT) and torch.equal(S, turned.second_moment())
    both = (moments.second[0, 1].double() + moments.second[1, 0].double()) / 2 / moments.count
    assert float((S[0, 1] - both).abs()) <= 2**-24 * float(both.abs())
    few = FeatureMoments("sample", 6)
    few.add_(torch.randn(3, 2, 6))
    assert torch.equal(few.second_moment(), few.second_moment().mT)


@given(st.integers(1, 2**24), st.integers(0, 10**6))
def test_settled_sums_are_what_a_file_gives_back(count, seed):
    """Float32 quotients times the count are the sums again, and settling once more changes nothing."""
    moments = asymmetric(seed=seed)
    moments.count = count
    before = moments.second_moment(), moments.mean()
    moments.settle_()
    torch.testing.assert_close((moments.second_moment(), moments.mean()), before, rtol=3 * 2**-24, atol=0)
    assert torch.equal(moments.second, moments.second.mT)
    for total in (moments.second.clone(), moments.total.clone()):
        written = (total.double() / count).float()
        assert torch.equal((written.double() * count).float(), total)
    second, total = moments.second, moments.total
    moments.settle_()
    assert torch.equal(moments.second, second) and torch.equal(moments.total, total)


@pytest.mark.parametrize("batch", [1, 7, 100])
@pytest.mark.parametrize("kind", ["drawn", "repeated", "of unequal sizes"])
def test_the_rounding_of_sums_is_within_its_estimate(kind, batch):
    """Entry by entry, √n times of which is the most that a direction can have."""
    n, generator = 24, torch.Generator().manual_seed(0)
    x = torch.randn(400, n, generator=generator)
    x = x[:5].repeat(80, 1) if kind == "repeated" else x * torch.logspace(0, -3, n) if "unequal" in kind else x
    moments = FeatureMoments("token", n)
    for part in x.split(batch):
        moments.add_(part)
    off = (moments.second_moment() - x.double().mT @ x.double() / len(x)).abs()
    allowed = moments.rounding().sqrt()
    assert (off <= allowed * allowed[:, None]).all()
    exact = FeatureMoments("token", n, len(x), x.sum(0), x.double().mT @ x.double())  # sums in float64
    assert (exact.rounding() < 1e-6 * moments.rounding()).all()
