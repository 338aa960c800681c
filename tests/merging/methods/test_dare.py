import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osrm_peft import merge_adapters
from osrm_peft.merging.methods.dare import drop_and_rescale
from tests.helpers.lora import LAYERS, close, dense, lora
from tests.helpers.papers import paper


def generators(T, seed=0):
    return [torch.Generator().manual_seed(1000 * seed + t) for t in range(T)]


def dropped(adapters, task, seed=0, drop_rate=0.5):
    """{layer: (o, n) float32} what DARE leaves of one task; recompression's rounding back to exact zeros."""
    weights = {name: float(name == task) for name in adapters}
    found = merge_adapters(adapters, "dare", weights=weights, scale=1, seed=seed, drop_rate=drop_rate).deltas()
    return {name: torch.where(d.abs() > 1e-6 * d.abs().max(), d, 0).float() for name, d in found.items()}


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.floats(0, 0.95), st.integers(0, 99))
def test_an_entry_is_dropped_or_divided_by_1_minus_p(T, o, n, p, seed):
    tau = torch.randn(T, o, n, generator=torch.Generator().manual_seed(seed))
    out = drop_and_rescale(tau, generators(T, seed), drop_rate=p)
    for t in range(T):
        for i in range(o):
            for j in range(n):
                x, y = float(tau[t, i, j]), float(out[t, i, j])
                assert y == 0 or y == pytest.approx(x / (1 - p), rel=1e-6)
    assert p > 0 or torch.equal(out, tau)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_dropped_is_p(p):
    out = drop_and_rescale(torch.ones(2, 200, 200), generators(2), drop_rate=p)
    for one in out:
        assert abs(float((one == 0).double().mean()) - p) < 4 * math.sqrt(p * (1 - p) / 40_000)


def test_it_is_unbiased_entry_by_entry():
    """Var(m τ / (1 − p)) = τ² p / (1 − p), so a mean of S draws has the standard error |τ| √(p / (1 − p) / S)."""
    adapters, seeds, p = {"t": lora(1)}, 200, 0.5
    draws = [merge_adapters(adapters, "dare", scale=1, drop_rate=p, seed=seed).deltas() for seed in range(seeds)]
    for name in LAYERS:
        tau = dense(adapters, name)[0]
        off = torch.stack([deltas[name] for deltas in draws]).mean(0) - tau
        error = tau.abs() * math.sqrt(p / (1 - p) / seeds)
        assert bool((off.abs() < 4.5 * error).all())  # 58 entries: one in 2,500 fair coins would fail
        assert 0.6 < float(off.norm() / error.norm()) < 1.4  # and it is as random as it should be


def test_the_same_seed_gives_the_same_result_and_another_seed_another():
    adapters = {"s": lora(1), "t": lora(2)}
    first, again, other = (merge_adapters(adapters, "dare", seed=seed) for seed in (3, 3, 4))
    for name in LAYERS:
        assert torch.equal(first.deltas()[name], again.deltas()[name])
        assert not torch.allclose(first.deltas()[name], other.deltas()[name], atol=1e-3)
    assert first.manifest["seed"] == 3


def test_a_task_s_draw_does_not_depend_on_other_adapters_or_the_order():
    one, two, three = lora(1), lora(2), lora(3)
    alone = dropped({"t": one}, "t")
    for adapters in ({"t": one, "a": two}, {"a": two, "t": one}, {"b": three, "a": two, "t": one}):
        for name, delta in dropped(adapters, "t").items():
            torch.testing.assert_close(delta, alone[name], rtol=1e-6, atol=0)


def test_a_layer_s_draw_does_not_depend_on_the_other_layers():
    both = lora(1)
    single = lora(1)
    single.factors = {"b": both.factors["b"]}
    torch.testing.assert_close(dropped({"t": single}, "t")["b"], dropped({"t": both}, "t")["b"], rtol=1e-6, atol=0)


def test_tasks_and_layers_have_draws_of_their_own():
    one = lora(1, {"a": (8, 8, 2), "b": (8, 8, 2)})
    twins = {"s": one, "t": one}
    supports = [dropped(twins, task)[name] != 0 for task in "st" for name in "ab"]
    for i, first in enumerate(supports):
        assert all(float((first != other).double().mean()) > 0.3 for other in supports[:i])


def test_dare_is_task_arithmetic_of_the_dropped_vectors_times_03():
    adapters = {"s": lora(1), "t": lora(2)}
    merged = merge_adapters(adapters, "dare", weights=[2, -1]).deltas()
    parts = [dropped(adapters, task) for task in "st"]
    for name in LAYERS:
        close(merged[name], 0.3 * (2 * parts[0][name].double() - parts[1][name].double()), 1e-6)


@pytest.mark.parametrize("density", [0.1, 0.3, 0.9])
@pytest.mark.parametrize("trim", ["model", "layer"])
def test_dare_ties_is_ties_of_the_dropped_vectors(density, trim):
    adapters = {task: lora(seed) for seed, task in enumerate("stu", start=1)}
    for adapter in adapters.values():
        adapter.factors["a"].B.mul_(3)  # so that a trim over the model differs from one over the layer
    merged = merge_adapters(adapters, "dare_ties", density=density, trim=trim, seed=5, drop_rate=0.4).deltas()
    parts = {task: dropped(adapters, task, seed=5, drop_rate=0.4) for task in adapters}
    groups = [["a", "b"]] if trim == "model" else [["a"], ["b"]]
    for group in groups:
        flat = [[x for name in group for x in parts[task][name].flatten().tolist()] for task in adapters]
        expected = torch.tensor(paper(flat, density), dtype=torch.float64)
        close(torch.cat([merged[name].flatten() for name in group]), expected, 1e-6)


def test_zeros_stay_zeros_and_a_1x1_layer_is_all_or_nothing():
    assert not drop_and_rescale(torch.zeros(2, 3, 4), generators(2)).any()
    seen = {float(dropped({"t": lora(1, {"x": (1, 1, 1)}, s=1)}, "t", seed)["x"]) for seed in range(20)}
    tau = float(dense({"t": lora(1, {"x": (1, 1, 1)}, s=1)}))
    assert sorted(seen, key=abs) == [0, pytest.approx(2 * tau, rel=1e-6)]


@pytest.mark.parametrize("method", ["dare", "dare_ties"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_rate": 1}, r"drop_rate=1 drops every entry: it must lie in \[0, 1\)"),
        ({"drop_rate": 1.0}, r"drop_rate=1 drops every entry"),
        ({"drop_rate": -0.1}, r"drop_rate=-0.1 must lie in \[0, 1\]"),
        ({"seed": -1}, r"seed=-1 must be a whole number of at least 0"),
        ({"seed": 0.5}, r"seed=0.5 must be a whole number"),
    ],
)
def test_options_are_checked_before_anything_is_read(method, options, message):
    with pytest.raises(ValueError, match=message):
        merge_adapters({"t": "no/such/folder"}, method, **options)


def test_dare_ties_checks_the_options_of_ties_and_dare_has_none_of_them():
    with pytest.raises(ValueError, match=r"density=0 must lie in \(0, 1\]"):
        merge_adapters({"t": "no/such/folder"}, "dare_ties", density=0)
    with pytest.raises(TypeError, match=r"dare has no option density; its options are drop_rate=0.5"):
        merge_adapters({"t": "no/such/folder"}, "dare", density=0.5)
