import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osrm_peft import DiagonalFisher, TaskFeatures, merge_adapters
from osrm_peft.merging.methods.fisher import fisher
from tests.helpers.lora import LAYERS, close, dense, lora


def draw(T, o, n, seed):
    generator = torch.Generator().manual_seed(seed)
    tau = torch.randn(T, o, n, generator=generator, dtype=torch.float64)
    F = torch.rand(T, o, n, generator=generator, dtype=torch.float64)
    return tau, torch.where(F < 0.3, 0, F)  # with entries of no information, in one task or in all


def entry(weights, F, tau):
    """One entry of the merge, Eq. 5 with λ_t = w_t."""
    bottom = sum(abs(w) * f for w, f in zip(weights, F, strict=True))
    if bottom == 0:
        F, bottom = [1.0] * len(F), sum(abs(w) for w in weights)
    return sum(w * f * x for w, f, x in zip(weights, F, tau, strict=True)) / bottom


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(0, 999))
def test_each_entry_is_the_paper_s_mean(T, o, n, seed):
    tau, F = draw(T, o, n, seed)
    weights = [1.0, -0.5, 2.0, 0.25][:T]
    merged = fisher(tau, torch.tensor(weights), list(F))
    for i in range(o):
        for j in range(n):
            expected = entry(weights, F[:, i, j].tolist(), tau[:, i, j].tolist())
            assert float(merged[i, j]) == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_the_base_model_cancels():
    tau, F = draw(3, 4, 5, 1)
    F = F + 0.1
    W0 = torch.randn(4, 5, dtype=torch.float64)
    whole = (F * (W0 + tau)).sum(0) / F.sum(0)  # Eq. 5 on full weights
    torch.testing.assert_close(W0 + fisher(tau, torch.ones(3), list(F)), whole, rtol=1e-12, atol=1e-12)


def test_where_no_task_has_information_it_is_the_plain_mean():
    tau = torch.randn(3, 2, 2, dtype=torch.float64)
    F = torch.zeros(3, 2, 2)
    F[1, 0, 0] = 1e-40  # the least information outweighs none
    merged = fisher(tau, torch.ones(3), list(F))
    expected = tau.mean(0)
    expected[0, 0] = tau[1, 0, 0]
    torch.testing.assert_close(merged, expected)


def test_only_the_ratio_of_weights_and_of_information_counts():
    tau, F = draw(3, 4, 5, 2)
    weights = torch.tensor([1.0, 2.0, -3.0])
    expected = fisher(tau, weights, list(F))
    torch.testing.assert_close(fisher(tau, 1e3 * weights, list(F)), expected)
    torch.testing.assert_close(fisher(tau, weights, list(1e-20 * F)), expected)
    assert not torch.allclose(fisher(tau, weights, [F[0], 9 * F[1], F[2]]), expected)


def test_equal_information_gives_the_average():
    tau, _ = draw(3, 4, 5, 3)
    torch.testing.assert_close(fisher(tau, torch.ones(3), [torch.full((4, 5), 0.2)] * 3), tau.mean(0))


def test_a_negative_weight_negates_the_task_vector():
    tau, F = draw(2, 4, 5, 4)
    negated = torch.stack([tau[0], -tau[1]])
    torch.testing.assert_close(
        fisher(tau, torch.tensor([1.0, -2.0]), list(F)), fisher(negated, torch.tensor([1.0, 2.0]), list(F))
    )


def test_one_task_is_itself_whatever_its_information_and_zeros_are_zeros():
    tau, F = draw(1, 1, 1, 5)
    for information in (F, torch.zeros(1, 1, 1)):
        torch.testing.assert_close(fisher(tau, torch.tensor([3.0]), list(information)), tau[0])
    assert not fisher(torch.zeros(2, 3, 3), torch.ones(2), [torch.zeros(3, 3)] * 2).any()


def test_weights_of_0_give_0():
    adapters, weights = {"s": lora(1), "t": lora(2)}, [{"a": 0, "b": 1}] * 2
    statistics = {"s": information("s", 1), "t": information("t", 2)}
    merged = merge_adapters(adapters, "fisher", weights=weights, statistics=statistics).deltas()
    assert not merged["a"].any() and merged["b"].any()


def test_shared_information_means_that_tasks_without_it_do_not_count():
    tau, _ = draw(2, 4, 5, 6)
    F = [torch.zeros(4, 5), torch.ones(4, 5)]
    torch.testing.assert_close(fisher(tau, torch.ones(2), F), tau[1])


ONES = torch.ones(5)


def information(task, seed, layers=LAYERS):
    generator = torch.Generator().manual_seed(seed)
    return DiagonalFisher(
        task, "tiny", 1, "true", layers={k: torch.rand(o, n, generator=generator) for k, (o, n, _) in layers.items()}
    )


def test_a_merge_takes_each_task_s_own_file(tmp_path):
    adapters = {"s": lora(1), "t": lora(2)}
    statistics = {"t": information("t", 2), "s": information("s", 1)}  # in another order
    statistics["s"].save(tmp_path / "s.safetensors")
    given = {"t": statistics["t"], "s": tmp_path / "s.safetensors"}
    merged = merge_adapters(adapters, "fisher", weights={"s": 1, "t": 3}, scale=0.5, statistics=given).deltas()
    for name in LAYERS:
        tau = dense(adapters, name)
        F, G = (statistics[task].layers[name].double() for task in "st")
        close(merged[name], 0.5 * (F * tau[0] + 3 * G * tau[1]) / (F + 3 * G), 1e-6)


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        (None, r"method 'fisher' needs statistics=\{task: file\} of every task, missing s, t: .* collect_fisher"),
        ({"s": information("s", 1)}, r"missing t"),
        (
            {"s": information("s", 1), "t": TaskFeatures("t", "tiny", "", "token")},
            r"statistics of 't' is a TaskFeatures, method 'fisher' needs a DiagonalFisher",
        ),
        (
            {"s": information("s", 1), "t": information("t", 2, {"a": (6, 5, 1)})},
            r"statistics of task 't' \(of tiny\) lack 1 of the 2 merged layers: b",
        ),
        (
            {"s": information("s", 1), "t": DiagonalFisher("t", "tiny", 1, "true", layers=dict.fromkeys("ab", ONES))},
            r"statistics of task 't' have shape 5 at 'a', the adapter has 6×5",
        ),
        (
            {"s": information("s", 1), "t": information("t", 2, LAYERS | {"b": (7, 4, 1)})},
            r"statistics of task 't' have shape 7×4 at 'b', the adapter has 4×7: they are of another base model",
        ),
    ],
)
def test_statistics_that_do_not_fit_are_refused(statistics, message):
    with pytest.raises(ValueError, match=message):
        merge_adapters({"s": lora(1), "t": lora(2)}, "fisher", statistics=statistics)


def test_methods_that_take_no_statistics_say_so():
    with pytest.raises(ValueError, match=r"ties takes no statistics: leave them out"):
        merge_adapters({"s": lora(1)}, "ties", statistics={"s": information("s", 1)})


@pytest.mark.parametrize("order", ["mzb", "zbm", "bmz"])
def test_each_task_has_its_own_information_in_whatever_order_it_is_given(order):
    """By name: neither sorted, nor in the order of the mapping."""
    adapters = {task: lora(seed) for seed, task in enumerate("zbm", start=1)}
    statistics = {task: information(task, seed) for seed, task in enumerate("zbm", start=1)}
    merged = merge_adapters(adapters, "fisher", statistics={task: statistics[task] for task in order}).deltas()
    for name in LAYERS:
        F = torch.stack([statistics[task].layers[name].double() for task in "zbm"])
        close(merged[name], (F * dense(adapters, name)).sum(0) / F.sum(0), 1e-6)
