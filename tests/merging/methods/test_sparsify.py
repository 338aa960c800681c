import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from osrm_peft.merging.methods.sparsify import keep_above, magnitude_thresholds

EXTREMES = [0.0, -0.0, 1e-45, -1e-38, 3e38, -1.0, 1.0, 1 + 2**-23]


@given(
    values=arrays("float32", st.tuples(st.just(2), st.integers(1, 40)), elements=st.floats(width=32, allow_nan=False)),
    density=st.floats(1e-3, 1),
    cut=st.integers(0, 40),
)
def test_threshold_is_the_kth_largest_magnitude_of_a_sort(values, density, cut):
    tau = torch.from_numpy(values)[:, None]  # (2, 1, m), split into two layers
    layers = [part for part in tau.tensor_split([min(cut, tau.shape[2])], dim=2) if part.numel()]
    k = max(1, round(density * tau.shape[2]))
    brute = tau[:, 0].abs().sort(dim=1, descending=True).values[:, k - 1]
    assert torch.equal(magnitude_thresholds(layers, density), brute)


def test_extreme_floats_are_ordered():
    tau = torch.tensor(EXTREMES).view(1, 1, -1)
    for k, expected in enumerate(sorted((abs(x) for x in tau.flatten().tolist()), reverse=True), start=1):
        assert magnitude_thresholds([tau], k / len(EXTREMES)).item() == expected


def test_exactly_k_of_distinct_entries_are_kept():
    """The published TIES code keeps k + 1 and fails at 100 %."""
    tau = torch.randperm(50).float().add(1).view(1, 5, 10)
    for density in (0.02, 0.2, 0.5, 1.0):
        kept = keep_above(tau, magnitude_thresholds([tau], density))
        assert int((kept != 0).sum()) == round(50 * density)


@pytest.mark.parametrize("density", [0, -0.1, 1.01, float("nan")])
def test_density_out_of_range(density):
    with pytest.raises(ValueError, match=r"density=.* must lie in \(0, 1\]"):
        magnitude_thresholds([torch.ones(1, 2, 2)], density)


def test_a_count_above_float32_s_integers_is_exact():
    tau = torch.rand(1, 1, 2**24 + 1) + 0.5
    tau[0, 0, 77] = 0.01
    assert magnitude_thresholds([tau], 1.0).item() == tau[0, 0, 77].item()


@pytest.mark.parametrize("density", [1e-5, 0.2, 0.999])
def test_small_and_large_layers_are_counted_alike(density):
    """A large layer is counted in a table of its own, the entries of a small one are added to the sum."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 4), (2, 300, 200), (2, 1, 1), (2, 90, 91), (2, 130, 128)]
    layers = [torch.randn(shape, generator=generator) * 10.0 ** (place - 2) for place, shape in enumerate(shapes)]
    entries = torch.cat([layer.flatten(1) for layer in layers], 1).abs().sort(1, descending=True).values
    k = round(density * entries.shape[1])
    assert torch.equal(magnitude_thresholds(layers, density), entries[:, max(k, 1) - 1])


def test_thresholds_of_another_dtype_keep_what_is_equal_to_them():
    tau = torch.tensor([[[1.0, 2.0, 3.0, -3.0]]])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert keep_above(tau, torch.tensor([3.0], dtype=dtype)).tolist() == [[[0, 0, 3, -3]]]
