"""A tiny BERT made in memory, adapters of it, and no network."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from osrm_peft import load_adapter, merge_adapters
from osrm_peft.merging.methods.emr import emr
from osrm_peft.merging.methods.ties import ties
from tests.helpers.adapters import make_adapter
from tests.helpers.papers import paper


def draw(T, o, n, seed):
    return torch.randn(T, o, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float().double()


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.floats(0.01, 1), st.integers(0, 99))
def test_one_layer_against_the_paper_written_out(T, o, n, density, seed):
    tau = draw(T, o, n, seed)
    merged = ties(tau, torch.ones(T, dtype=tau.dtype), density=density)
    expected = torch.tensor(paper(tau.flatten(1).tolist(), density), dtype=tau.dtype).view(o, n)
    torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)


@pytest.fixture
def folders(tmp_path):
    for seed, rank in ((1, 4), (2, 2)):
        make_adapter(tmp_path / f"t{seed}", seed=seed, r=rank)
    return {f"t{seed}": tmp_path / f"t{seed}" for seed in (1, 2)}


@pytest.mark.parametrize("trim", ["model", "layer"])
def test_trim_over_the_model_or_per_layer(folders, trim):
    adapters = {name: load_adapter(folder) for name, folder in folders.items()}
    names = sorted(adapters["t1"].factors)
    for adapter in adapters.values():
        adapter.factors = dict(adapter.factors)
        adapter.factors[names[0]].B.mul_(20)  # the first layer dwarfs the others
    merged = merge_adapters(adapters, "ties", density=0.2, trim=trim).deltas()
    flat = {name: [a.factors[name].delta().flatten().tolist() for a in adapters.values()] for name in names}
    if trim == "layer":
        expected = {name: paper(vectors, 0.2) for name, vectors in flat.items()}
    else:
        whole = paper([[x for name in names for x in flat[name][t]] for t in range(2)], 0.2)
        size = len(flat[names[0]][0])
        expected = {name: whole[i * size : (i + 1) * size] for i, name in enumerate(names)}
    for name in names:
        wanted = torch.tensor(expected[name], dtype=torch.float64).view_as(merged[name])
        torch.testing.assert_close(merged[name], wanted, rtol=1e-4, atol=1e-5)
    emptied = [name for name in names if not any(expected[name])]
    assert bool(emptied) == (trim == "model")  # over the model, the small layers lose everything


def test_opposite_task_vectors_cancel_and_weights_decide_the_election():
    tau = torch.tensor([[[2.0]], [[-2.0]]])
    assert ties(tau, torch.tensor([1.0, 1.0]), density=1.0).item() == 0
    assert ties(tau, torch.tensor([1.0, 0.5]), density=1.0).item() == 2
    assert ties(tau, torch.tensor([1.0, -1.0]), density=1.0).item() == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, r"density=0 must lie in \(0, 1\]"),
        ({"density": 1.5}, r"density=1.5 must lie in \(0, 1\]"),
        ({"trim": "tensor"}, r"unknown trim 'tensor': choose from model, layer"),
    ],
)
def test_options_are_checked_before_anything_is_read(options, message):
    with pytest.raises(ValueError, match=message):
        merge_adapters({"t": "no/such/folder"}, "ties", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["ties", "emr"])
def test_entries_that_cancel_to_rounding_elect_no_sign(method, dtype):
    """A task vector, two parts of its negative and a unit of rounding: γ = 0 there, as where the sum is exactly 0."""
    x = torch.rand(40, 30, dtype=dtype) + 0.5
    tau = torch.stack([x, -0.3 * x, -(x - 0.3 * x)])
    tau[1] = tau[1].nextafter(torch.tensor(torch.inf, dtype=dtype))
    tau[:, 0, 0] = torch.tensor([1.0, -0.5, -0.4999], dtype=dtype)  # this one is a vote
    assert tau.sum(0).count_nonzero() > 100
    merged = ties(tau, torch.ones(3, dtype=dtype), density=1.0) if method == "ties" else emr(tau, torch.ones(3))[0]
    assert merged[0, 0] == 1 and merged.count_nonzero() == 1


def test_ties_is_differentiable_where_signs_stay():
    tau = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ties(tau, torch.tensor([1.0, 2.0, -0.5]), density=0.5).square().sum().backward()
    assert tau.grad is not None and tau.grad.isfinite().all() and (tau.grad != 0).any()
