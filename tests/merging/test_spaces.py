import pytest
import torch
from hypothesis import given, settings

from osrm_peft import merge_adapters
from osrm_peft.adapters.factors import Factors
from osrm_peft.merging.spaces import SPACES, enter
from tests.helpers.lora import LAYERS, close, dense, draw, lora, problems
from tests.helpers.papers import paper


def knots(tau):
    """The published algorithm on dense float64 matrices: SVD of [τ_1 … τ_T], then S·Vᵀ cut up by task."""
    U, S, Vh = torch.linalg.svd(torch.cat(list(tau), 1), full_matrices=False)
    k = int((1e-10 * S[0] < S).sum())
    return U[:, :k], torch.stack((S[:k, None] * Vh[:k]).split(tau.shape[2], 1)), S[:k]


def rebuilt(layer):
    """left · stack · rightᵀ, None as the identity."""
    stack = layer.stack.double()
    stack = stack if layer.left is None else layer.left @ stack
    return stack if layer.right is None else stack @ layer.right.mT


@settings(max_examples=25)
@given(problems)
def test_knots_is_the_svd_of_the_concatenated_task_vectors(problem):
    adapters, _ = draw(problem)
    layer = enter("knots", [adapter.factors["x"] for adapter in adapters.values()])
    U, stack, S = knots(dense(adapters))
    assert layer.stack.shape == stack.shape and layer.left.shape == U.shape and layer.right is None
    gaps = torch.cat([S, torch.zeros(1)]).double()
    gaps = (gaps[:-1] - gaps[1:]) / gaps[0]
    for i in range(len(S)):  # one sign a basis vector, the same for all tasks
        if min(gaps[max(i - 1, 0) : i + 1]) < 1e-3:
            continue  # nearly equal singular values: any rotation between them is as good
        sign = torch.sign(layer.left[:, i] @ U[:, i])
        close(sign * layer.left[:, i], U[:, i], 1e-7)
        close(sign * layer.stack[:, i], stack[:, i], 1e-7, float(S[0]))


@settings(max_examples=25)
@given(problems)
def test_every_space_holds_the_task_vectors_exactly_in_orthonormal_bases(problem):
    adapters, _ = draw(problem)
    o, n, ranks, _ = problem
    tau = dense(adapters)
    for space in SPACES:
        layer = enter(space, [adapter.factors["x"] for adapter in adapters.values()])
        close(rebuilt(layer), tau, 1e-6 if space == "weight" else 1e-12)
        close(layer.dense(layer.stack), tau, 1e-6)
        p, q = layer.stack.shape[1:]
        assert p == (o if space == "weight" else min(o, sum(min(r, n) for r in ranks)))
        assert q == (min(n, sum(min(r, o) for r in ranks)) if space == "core" else n)
        for basis in (layer.left, layer.right):
            if basis is not None:
                eye = torch.eye(basis.shape[1], dtype=torch.float64)
                torch.testing.assert_close(basis.mT @ basis, eye, rtol=0, atol=1e-12)
        found = layer.compress(layer.stack[0]).factors
        close(found.delta(), tau[0], 1e-6)


@pytest.mark.parametrize("space", ["core", "knots"])
def test_a_missing_adapter_is_0_and_a_shared_direction_counts_once(space):
    one = lora(1, {"x": (8, 9, 3)}).factors["x"]
    layer = enter(space, [one, None, Factors(one.A, -2 * one.B, one.s)])
    assert layer.left.shape == (8, 3) and not layer.stack[1].any()
    close(layer.stack[2], -2 * layer.stack[0], 1e-12)
    assert layer.stack.shape == ((3, 3, 3) if space == "core" else (3, 3, 9))


@pytest.mark.parametrize("space", ["core", "knots"])
def test_the_split_into_b_and_a_changes_a_space_by_signs_only(space):
    """Gauge (A, B) → (R A, B R⁻¹): a badly conditioned R, too."""
    adapters = [lora(seed, {"x": (9, 7, 3)}).factors["x"] for seed in (1, 2)]
    R = torch.tensor([[100.0, 3, 0], [0, 1, 0], [0, 5, 0.01]])
    turned = [Factors((R.double() @ f.A.double()), f.B.double() @ torch.linalg.inv(R.double()), f.s) for f in adapters]
    first, second = enter(space, adapters), enter(space, turned)
    close(rebuilt(second), rebuilt(first), 1e-9)
    close((first.left.mT @ second.left).abs(), torch.eye(first.left.shape[1]), 1e-6)
    close(second.stack.abs(), first.stack.abs(), 1e-6)


def test_one_task_s_knots_are_its_own_svd():
    one = lora(1, {"x": (6, 8, 2)})
    layer = enter("knots", [one.factors["x"]])
    gram = layer.stack[0] @ layer.stack[0].mT  # S Vᵀ V S
    close(gram, torch.linalg.svdvals(dense({"t": one})[0])[:2].square().diag(), 1e-10)


def test_zeros_have_an_empty_basis_and_return_as_zeros():
    zero = Factors(torch.ones(2, 5), torch.zeros(4, 2))
    for space in ("core", "knots"):
        layer = enter(space, [zero, None])
        assert layer.left.shape == (4, 0)
        found = layer.compress(layer.stack[0]).factors
        assert found.delta().shape == (4, 5) and not found.delta().any() and not layer.dense(layer.stack).any()


def test_a_1x1_layer_is_its_number_in_every_space():
    one = Factors(torch.tensor([[3.0]]), torch.tensor([[-2.0]]), 0.5)
    for space in SPACES:
        layer = enter(space, [one, None])
        assert rebuilt(layer).flatten().tolist() == pytest.approx([-3, 0])


@pytest.mark.parametrize("density", [0.1, 0.2, 0.5, 1.0])
def test_knots_ties_is_ties_on_the_right_singular_vectors(density):
    """Trimmed over that layer; U carries the result back. Signs of basis vectors flip entries and votes alike."""
    adapters = {f"t{seed}": lora(seed, {"x": (9, 11, 2)}) for seed in (1, 2, 3)}
    U, stack, _ = knots(dense(adapters))
    merged = torch.tensor(paper(stack.flatten(1).tolist(), density), dtype=torch.float64).view_as(stack[0])
    found = merge_adapters(adapters, "ties", space="knots", trim="layer", density=density).deltas()["x"]
    close(found, U @ merged, 1e-6)
    weight = merge_adapters(adapters, "ties", space="weight", trim="layer", density=density).deltas()["x"]
    assert float((found - weight).norm()) > 0.1 * float(found.norm())


def test_knots_ties_trimmed_over_the_model_ranks_the_entries_of_all_layers():
    adapters = {f"t{seed}": lora(seed) for seed in (1, 2, 3)}
    for adapter in adapters.values():
        adapter.factors["a"].B.mul_(4)
    parts = {name: knots(dense(adapters, name)) for name in LAYERS}
    flat = [[x for _, stack, _ in parts.values() for x in stack[t].flatten().tolist()] for t in range(3)]
    merged = torch.tensor(paper(flat, 0.3), dtype=torch.float64)
    found = merge_adapters(adapters, "ties", space="knots", density=0.3).deltas()
    for name, (U, stack, _) in parts.items():
        close(found[name], U @ merged[: stack[0].numel()].view_as(stack[0]), 1e-6, float(merged.norm()))
        merged = merged[stack[0].numel() :]


def test_weights_enter_after_the_space():
    """The basis is of the unweighted task vectors, in KnOTS as published."""
    adapters = {f"t{seed}": lora(seed, {"x": (9, 11, 2)}) for seed in (1, 2)}
    U, stack, _ = knots(dense(adapters))
    stack = stack * torch.tensor([1.0, -3.0])[:, None, None]
    merged = torch.tensor(paper(stack.flatten(1).tolist(), 1.0), dtype=torch.float64).view_as(stack[0])
    arguments = {"space": "knots", "density": 1.0, "weights": [1, -3]}
    close(merge_adapters(adapters, "ties", **arguments).deltas()["x"], U @ merged, 1e-6)
