import pytest
import torch

from osrm_peft import load_adapter, merge_adapters
from osrm_peft.merging.methods.lore import lore
from tests.helpers.adapters import make_adapter
from tests.helpers.lora import close, dense, lora
from tests.helpers.papers import paper, svt

LAYERS = {"a": (9, 7, 2), "b": (6, 12, 3)}


def three(layers=LAYERS):
    return {task: lora(seed, layers) for seed, task in enumerate("stu", start=1)}


def deltas(tau, mu_ratio, iterations):
    """The paper's Algorithm 1 on dense task vectors: θ₀ − W₀ and δ_1 … δ_T."""
    spread = [torch.linalg.svdvals(one - tau.mean(0))[0] for one in tau]
    mu = float(mu_ratio * sum(spread) / len(tau))
    delta = torch.zeros_like(tau)
    for _ in range(iterations):
        base = (tau - delta).mean(0)
        delta = torch.stack([svt(one - base, mu) for one in tau])
    return base, delta


def selected(delta, density):
    merged = paper(delta.flatten(1).tolist(), density)
    return torch.tensor(merged, dtype=torch.float64).view_as(delta[0])


@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
@pytest.mark.parametrize("space", ["core", "weight", "knots"])
def test_it_is_ties_of_the_deltas_on_the_layer_s_own_entries_in_any_space(space, density):
    """Trimmed over each layer; the offset is θ₀, which the scale does not touch."""
    adapters = three()
    options = {"mu_ratio": 0.3, "max_iterations": 5, "tolerance": 0, "density": density, "space": space}
    merged = merge_adapters(adapters, "lore", combine="ties", scale=0.5, **options)
    for name in LAYERS:
        base, delta = deltas(dense(adapters, name), 0.3, 5)
        close(merged.deltas()[name], base + 0.5 * selected(delta, density), 1e-5)
        close(merged.at_scale(0).deltas()[name], base, 1e-5)
        assert not torch.allclose(delta.sum(0), selected(delta, density), atol=1e-3)


def test_auto_is_the_core_and_equals_the_weight_space(tmp_path):
    for seed in (1, 2, 3):
        make_adapter(tmp_path / f"t{seed}", seed=seed, r=seed)
    adapters = {f"t{seed}": load_adapter(tmp_path / f"t{seed}") for seed in (1, 2, 3)}
    for options in ({}, {"mu": 0.2}, {"mu_ratio": 0.4, "density": 0.6}):
        auto = merge_adapters(adapters, "lore", combine="ties", **options)
        weight = merge_adapters(adapters, "lore", combine="ties", space="weight", **options)
        assert auto.manifest["space"] == "core" and weight.manifest["space"] == "weight"
        assert auto.manifest["options"]["combine"] == "ties"
        for name, delta in weight.deltas().items():
            close(auto.deltas()[name], delta, 1e-5)


def test_weights_scale_the_task_vectors_and_vote_once():
    adapters, weights = three({"x": (8, 7, 2)}), [2.0, -1.0, 0.5]
    tau = torch.tensor(weights)[:, None, None] * dense(adapters)
    base, delta = deltas(tau, 0.1, 7)
    options = {"max_iterations": 7, "tolerance": 0, "density": 0.5}
    merged = merge_adapters(adapters, "lore", combine="ties", weights=weights, **options)
    close(merged.deltas()["x"], base + selected(delta, 0.5), 1e-5)


def test_the_trimmed_result_has_full_rank_and_a_lower_one_can_be_asked_for():
    adapters = three({"x": (16, 14, 2)})
    exact = merge_adapters(adapters, "lore", combine="ties")
    assert exact.for_task(None).rank > 6  # Σr: TIES is no linear map
    cut = merge_adapters(adapters, "lore", combine="ties", rank=4)
    U, S, Vh = torch.linalg.svd(exact.deltas()["x"])
    close(cut.deltas()["x"], (U[:, :4] * S[:4]) @ Vh[:4], 1e-5)
    assert cut.energy_kept()["x"] == pytest.approx(float(S[:4].square().sum() / S.square().sum()), rel=1e-5)


def test_a_hard_rank_is_a_share_of_the_space_s_own_width():
    """rank_ratio of the core (Σr = 6) and of the layer (14) name other ranks: the one result that space changes."""
    adapters = three({"x": (16, 14, 2)})
    options = {"combine": "ties", "rank_ratio": 0.25, "max_iterations": 1}
    for space, width in (("core", 6), ("weight", 14)):
        report = merge_adapters(adapters, "lore", space=space, **options).manifest["report"]["x"]
        assert report["rank"] == -(-width // 4) and "mu" not in report
    tau = dense(adapters)
    truncated = []
    for residual in tau - tau.mean(0):
        U, S, Vh = torch.linalg.svd(residual)
        truncated.append((U[:, :2] * S[:2]) @ Vh[:2])
    found = merge_adapters(adapters, "lore", density=0.4, **options).deltas()["x"]
    close(found, tau.mean(0) + selected(torch.stack(truncated), 0.4), 1e-5)


def test_a_lone_task_and_copies_have_no_deltas():
    one = lora(1, LAYERS)
    for adapters in ({"s": one}, {"s": one, "t": one}):
        merged = merge_adapters(adapters, "lore", combine="ties")
        for name in LAYERS:
            close(merged.deltas()[name], dense({"s": one}, name)[0], 1e-6)


def test_zeros_and_1x1_layers():
    zero = lora(1, LAYERS, s=0.0)
    assert not any(
        delta.any() for delta in merge_adapters({"s": zero, "t": zero}, "lore", combine="ties").deltas().values()
    )
    adapters = three({"x": (1, 1, 1)})
    base, delta = deltas(dense(adapters), 0.1, 3)
    merged = merge_adapters(adapters, "lore", combine="ties", max_iterations=3, tolerance=0)
    assert merged.deltas()["x"].item() == pytest.approx(float(base + selected(delta, 0.2)), rel=1e-5)


def test_the_function_leaves_the_last_step_to_the_layer():
    tau = dense(three({"x": (8, 7, 2)}))
    merged = lore(tau, torch.ones(3), combine="ties", density=0.5)
    assert merged.direction.shape == tau.shape and merged.offset.shape == (8, 7)
    close(merged.finish(merged.direction.float()), selected(merged.direction.float(), 0.5), 1e-6)
    assert lore(tau, torch.ones(3), density=0.5).finish is None


@pytest.mark.parametrize("density", [0, -0.5, 1.01, float("nan"), "x"])
def test_density_is_checked_before_anything_is_read(density):
    with pytest.raises(ValueError, match=r"density=.* must lie in \(0, 1\]"):
        merge_adapters({"t": "no/such/folder"}, "lore", combine="ties", density=density)
