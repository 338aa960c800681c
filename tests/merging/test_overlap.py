"""Which directions adapters share: against bases of the dense products, with planted sharing; and what it does."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles

from osrm_peft import merge_adapters
from osrm_peft.adapters.factors import Factors
from osrm_peft.merging.methods.tsv import _nearest_orthonormal
from osrm_peft.merging.overlap import mean_overlap, overlaps, sharing
from tests.helpers.lora import close, lora

pytestmark = pytest.mark.filterwarnings("ignore:.* share A:UserWarning")

# (o, n), and (columns of B, rank of the product) of each adapter; 0: zeros
shapes = st.tuples(
    st.integers(2, 9),
    st.integers(2, 9),
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=4),
    st.integers(0, 999),
)


def product(o, n, r, rank, generator):
    """(B, A) of this rank at most: A's rows lie in `rank` dimensions, up to float32's rounding."""
    kept = torch.linalg.qr(torch.randn(r, rank, generator=generator)).Q
    return torch.randn(o, r, generator=generator), kept @ kept.mT @ torch.randn(r, n, generator=generator)


def bases(B, A):
    """(of the rows, of the columns) of the dense product, at the rank that `numerical_rank` means."""
    X = B.double() @ A.double()
    U, S, Vh = torch.linalg.svd(X)
    k = int((1e-6 * S[0] < S).sum()) if S[0] > 0 else 0
    return Vh[:k].mT, U[:, :k]


def same(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual, torch.as_tensor(expected).double(), rtol=0, atol=tolerance, equal_nan=True)


@settings(max_examples=60)
@given(shapes)
def test_cosines_are_those_of_dense_bases_whatever_the_ranks(problem):
    o, n, ranks, seed = problem
    generator = torch.Generator().manual_seed(seed)
    products = [product(o, n, r, min(r, rank), generator) for r, rank in ranks]
    dense = [bases(B, A) for B, A in products]
    for side, found in enumerate(overlaps(products)):
        spaces, width = [one[side].numpy() for one in dense], (n, o)[side]
        for i, P in enumerate(spaces):
            for j, Q in enumerate(spaces):
                k = min(P.shape[1], Q.shape[1])
                cosines = [math.cos(angle) for angle in subspace_angles(P, Q)] if k else [math.nan]
                entries = found.shared[i, j], found.largest[i, j], found.random[i, j]
                wanted = sum(c * c for c in cosines) / len(cosines), max(cosines), max(P.shape[1], Q.shape[1]) / width
                same(torch.stack(entries), wanted if k else [math.nan] * 3)
        rank, stacked = sum(P.shape[1] for P in spaces), torch.cat([one[side] for one in dense], 1)
        assert (math.isnan(found.tsv) if rank == 0
                else abs(found.tsv - float(torch.linalg.svdvals(stacked).sum()) / rank) < 1e-6)  # fmt: skip


def test_planted_sharing_is_found_on_its_own_side():
    generator = torch.Generator().manual_seed(0)
    B, A = product(40, 50, 3, 3, generator)
    other = product(40, 50, 3, 3, generator)
    mixed = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0], [3.0, 0.0, 1.0]])
    a, b = overlaps([(B, A), (other[0], mixed @ A), (B @ mixed, other[1]), (other[0], A[:2].repeat(2, 1)[:3])])
    same(a.shared[0], [1, 1, a.shared[0, 2], 1])  # equal up to an invertible matrix; a part of the space
    same(b.shared[0], [1, b.shared[0, 1], 1, b.shared[0, 3]])
    assert a.shared[0, 2] < 0.3 and b.shared[0, 1] < 0.3 and b.shared[0, 3] < 0.3
    assert a.largest[0, 1] == pytest.approx(1) and a.random[0, 1] == pytest.approx(3 / 50)
    assert a.random[3, 3] == pytest.approx(2 / 50) and b.random[0, 3] == pytest.approx(3 / 40)
    orthogonal = torch.linalg.qr(torch.randn(50, 6, generator=generator)).Q.mT
    apart, _ = overlaps([(B, orthogonal[:3]), (B, orthogonal[3:])])
    same(apart.shared, torch.eye(2))
    assert apart.tsv == pytest.approx(1)


def test_the_expectation_for_random_spaces_is_that_of_many():
    generator = torch.Generator().manual_seed(0)
    drawn = [overlaps([product(12, 20, 2, 2, generator), product(12, 20, 5, 5, generator)]) for _ in range(400)]
    for side, expected in ((0, 5 / 20), (1, 5 / 12)):
        mean = mean_overlap(one[side] for one in drawn)
        assert float(mean.random[0, 1]) == pytest.approx(expected)
        assert float(mean.shared[0, 1]) == pytest.approx(expected, rel=0.05)


def test_a_mean_counts_the_layers_where_both_have_a_space():
    generator = torch.Generator().manual_seed(0)
    one, other = product(8, 9, 2, 2, generator), product(8, 9, 2, 2, generator)
    nothing = torch.zeros(8, 0), torch.zeros(0, 9)
    layers = [overlaps([one, other])[0], overlaps([one, one])[0], overlaps([one, nothing])[0]]
    assert float(mean_overlap(layers).shared[0, 1]) == pytest.approx((float(layers[0].shared[0, 1]) + 1) / 2)
    assert math.isnan(float(layers[2].shared[0, 1])) and math.isnan(float(layers[2].shared[1, 1]))


def test_tasks_share_where_most_of_their_common_layers_do():
    generator = torch.Generator().manual_seed(0)
    one, other, third = (product(30, 30, 3, 3, generator) for _ in range(3))
    nothing = torch.zeros(30, 0), torch.zeros(0, 30)
    same_a, apart = overlaps([one, (other[0], one[1]), third])[0], overlaps([one, other, third])[0]
    missing = overlaps([one, nothing, third])[0]
    assert sharing("xyz", [same_a, same_a, apart]) == ["x", "y"]
    assert sharing("xyz", [same_a, apart]) == [] and sharing("xyz", [same_a, missing, missing]) == ["x", "y"]
    wide = product(4, 5, 5, 5, generator), product(4, 5, 5, 5, generator)
    assert sharing("xy", [overlaps(wide)[0]]) == []  # they must overlap


# --- what sharing does, as the verdict and the guide say it


def with_a(As, o=40):
    """{task: adapter} of one layer, each with its own B."""
    found = {}
    for seed, A in enumerate(As):
        adapter = lora(seed, {"x": (o, A.shape[1], len(A))})
        found[f"t{seed}"] = type(adapter)({"x": Factors(A, adapter.factors["x"].B)}, {}, adapter.config)
    return found


def test_a_sum_of_adapters_that_share_a_has_their_rank_and_averaging_b_is_exact():
    A = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    adapters = with_a([A, A, A])
    total, average = (merge_adapters(adapters, method, scale=1.0).deltas()["x"] for method in ("concat", "average"))
    assert int(torch.linalg.matrix_rank(total.double(), rtol=1e-5)) == 3
    close(average, torch.stack([one.factors["x"].B for one in adapters.values()]).mean(0) @ A, 1e-5)


def test_tsv_leaves_of_each_direction_what_the_overlap_says():
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(3, 50, generator=generator)
    for mixed in (0.0, 0.1, 1.0, 10.0):
        products = [(torch.randn(40, 3, generator=generator), one + mixed * torch.randn(3, 50, generator=generator))
                    for _ in range(3)]  # fmt: skip
        V = torch.cat([bases(B, A)[0] for B, A in products], 1)
        assert float((V * _nearest_orthonormal(V)).sum(0).mean()) == pytest.approx(overlaps(products)[0].tsv, abs=1e-6)


def test_tsv_of_the_same_a_is_the_shrunk_sum_and_of_nearly_the_same_hangs_on_the_difference():
    generator = torch.Generator().manual_seed(0)
    A = torch.linalg.qr(torch.randn(200, 3, generator=generator)).Q.mT
    adapters = with_a([A, A], o=400)
    for place, adapter in enumerate(adapters.values()):  # B apart, so that A alone is turned
        f = adapter.factors["x"]
        B = torch.zeros(400, 3)
        B[200 * place : 200 * (place + 1)] = f.B[:200]
        adapter.factors = {"x": Factors(A, B)}
    total = sum(adapter.factors["x"].delta() for adapter in adapters.values())
    close(merge_adapters(adapters, "tsv").deltas()["x"], total / math.sqrt(2), 1e-5)

    def moved(method, seed):
        """How far the merge lies from that of the same A, where one A is off by 10⁻³."""
        off = 1e-3 * torch.randn(3, 200, generator=torch.Generator().manual_seed(seed)) / math.sqrt(200)
        near = dict(adapters)
        near["t1"] = type(near["t1"])({"x": Factors(A + off, near["t1"].factors["x"].B)}, {}, near["t1"].config)
        same_a = merge_adapters(adapters, method).deltas()["x"]
        return (merge_adapters(near, method).deltas()["x"] - same_a) / same_a.norm()

    assert float(moved("average", 1).norm()) < 2e-3
    assert float(moved("tsv", 1).norm()) > 0.5 and float((moved("tsv", 1) - moved("tsv", 2)).norm()) > 0.5
