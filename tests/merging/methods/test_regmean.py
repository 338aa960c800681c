"""What every registered merge method keeps, over every kind of plain LoRA adapter."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model

from osrm_peft import (
    OSRMLoraConfig,
    TaskFeatures,
    collect_features,
    collect_gram,
    initialize_osrm_weights,
    merge_adapters,
)
from osrm_peft.adapters.factors import Factors
from osrm_peft.features.fit import check_model
from osrm_peft.features.moments import FeatureMoments
from osrm_peft.merging.methods.regmean import condition, regmean
from tests.helpers.adapters import make_adapter
from tests.helpers.lora import LAYERS, close, dense, lora, problems
from tests.helpers.lora import draw as draw_adapters
from tests.helpers.merging import gram_of, inputs, moments
from tests.helpers.models import make_base, make_batch

QUERY_1 = "bert.encoder.layer.1.attention.self.query"


def problem_with_inputs(problem):
    """Adapters, weights and as many inputs a task as make each Gram matrix well-conditioned."""
    adapters, weights = draw_adapters(problem)
    hs = [inputs(problem[1], 5 * problem[1] + 3 * t, problem[3] + t) for t in range(len(adapters))]
    return [a.factors["x"] for a in adapters.values()], dense(adapters), torch.tensor(weights, dtype=torch.float64), hs


def reduced(h, alpha, ridge=0.0):
    """G̃ entry by entry."""
    n = h.shape[1]
    G = torch.zeros(n, n, dtype=torch.float64)
    for row in h:
        G += torch.outer(row, row) / len(h)
    G_tilde = G.clone()
    for i in range(n):
        for j in range(n):
            if i != j:
                G_tilde[i, j] *= alpha
        G_tilde[i, i] += ridge * float(G.trace()) / n
    return G_tilde


@settings(max_examples=25)
@given(problems)
def test_it_minimises_the_distance_of_the_outputs(problem):
    """min_W Σ_t |w_t| E‖(W − sgn(w_t) τ_t) h_t‖² as one tall least-squares problem; tasks differ in rows."""
    factors, tau, weights, hs = problem_with_inputs(problem)
    rows = [(w.abs() / len(h)).sqrt() * h for w, h in zip(weights, hs, strict=True)]
    wanted = [row @ (w.sign() * t).mT for w, t, row in zip(weights, tau, rows, strict=True)]
    W = torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted)).solution.mT
    found = regmean(factors, weights, [moments(h) for h in hs], off_diagonal=1.0)
    close(found.delta(), W, 1e-7, float(tau.norm()))
    assert found.rank == sum(problem[2])


@settings(max_examples=25)
@given(problems, st.sampled_from([0.0, 0.1, 0.9]), st.sampled_from([0.0, 0.2]))
def test_with_the_off_diagonal_scaled_it_is_the_closed_form(problem, alpha, ridge):
    factors, tau, weights, hs = problem_with_inputs(problem)
    G = [reduced(h, alpha, ridge) for h in hs]
    total = sum(w.abs() * g for w, g in zip(weights, G, strict=True))
    right = sum(w * g @ t.mT for w, g, t in zip(weights, G, tau, strict=True))
    found = regmean(factors, weights, [moments(h) for h in hs], off_diagonal=alpha, ridge=ridge)
    close(found.delta(), (torch.linalg.inv(total) @ right).mT, 1e-9, float(tau.norm()))


def test_b_is_the_adapters_own_and_the_default_share_is_that_of_the_paper():
    factors, _, weights, hs = problem_with_inputs((5, 6, [2, 3], 1))
    gram = [moments(h) for h in hs]
    found = regmean(factors, weights, gram)
    assert torch.equal(found.B, torch.cat([f.B for f in factors], 1).double())
    assert torch.equal(found.A, regmean(factors, weights, gram, off_diagonal=0.9).A)


def test_a_task_without_the_layer_pulls_towards_0():
    factors, tau, _, hs = problem_with_inputs((5, 6, [2, 2], 2))
    gram, ones = [moments(h) for h in hs], torch.ones(2)
    found = regmean([factors[0], None], ones, gram, off_diagonal=1.0).delta()
    G, H = (reduced(h, 1.0) for h in hs)
    close(found, tau[0] @ G @ torch.linalg.inv(G + H), 1e-9)
    alone = regmean(factors[:1], ones[:1], gram[:1], off_diagonal=1.0).delta()
    close(alone, tau[0], 1e-9)
    assert float((found @ hs[1].mT).norm()) < 0.9 * float((alone @ hs[1].mT).norm())


def test_equal_gram_matrices_give_the_average_and_a_lone_task_itself():
    factors, tau, weights, hs = problem_with_inputs((4, 5, [2, 3, 1], 3))
    close(regmean(factors, torch.ones(3), [moments(hs[0])] * 3).delta(), tau.mean(0), 1e-9)
    close(regmean(factors[:1], weights[:1], [moments(hs[0])]).delta(), tau[0], 1e-9)


def test_only_the_ratio_of_weights_counts_and_the_number_of_rows_does_not():
    factors, _, weights, hs = problem_with_inputs((4, 5, [2, 3], 4))
    expected = regmean(factors, weights, [moments(h) for h in hs]).delta()
    close(regmean(factors, 1e4 * weights, [moments(h) for h in hs]).delta(), expected, 1e-9)
    close(regmean(factors, weights, [moments(hs[0]), moments(hs[1].repeat(3, 1))]).delta(), expected, 1e-9)
    assert float((regmean(factors, weights, [moments(hs[1]), moments(hs[0])]).delta() - expected).norm()) > 0.01


def test_two_copies_of_one_adapter_are_that_adapter_and_its_negative_is_0():
    factors, tau, _, hs = problem_with_inputs((4, 5, [2], 5))
    gram = [moments(hs[0]), moments(inputs(5, 40, 99))]
    close(regmean(factors * 2, torch.ones(2), gram).delta(), tau[0], 1e-9)
    close(regmean(factors * 2, torch.tensor([1.0, -1.0]), [gram[0]] * 2).delta(), 0 * tau[0], 1e-9, float(tau.norm()))


def test_a_1x1_layer_is_a_weighted_mean():
    factors, tau, _, _ = problem_with_inputs((1, 1, [1, 1], 6))
    h = [torch.tensor([[2.0], [4.0]]).double(), torch.tensor([[1.0]]).double()]  # E h² = 10 and 1
    found = regmean(factors, torch.tensor([1.0, -3.0]), [moments(x) for x in h])
    assert float(found.delta()) == pytest.approx(float((10 * tau[0] - 3 * tau[1]) / 13))


@pytest.mark.parametrize("rows", [1, 3])
def test_a_singular_gram_is_refused_and_each_way_out_works(rows):
    factors, tau, _, _ = problem_with_inputs((4, 6, [2], 7))
    gram = [moments(inputs(6, rows, 8))]
    with pytest.raises(ValueError, match=r"singular together \(width 6\): collect more rows, .* or give ridge=1e-2"):
        regmean(factors, torch.ones(1), gram, off_diagonal=1.0)
    close(regmean(factors, torch.ones(1), gram, off_diagonal=1.0, ridge=1e-2).delta(), tau[0], 1e-6)
    close(regmean(factors, torch.ones(1), gram).delta(), tau[0], 1e-9)


def test_inputs_that_are_always_0_are_singular_whatever_the_off_diagonal():
    factors, _, _, hs = problem_with_inputs((4, 6, [2, 2], 8))
    dead = [h * (torch.arange(6) > 0) for h in hs]
    with pytest.raises(ValueError, match="singular together"):
        regmean(factors, torch.ones(2), [moments(h) for h in dead])
    assert regmean(factors, torch.ones(2), [moments(dead[0]), moments(hs[1])]).delta().isfinite().all()
    with pytest.raises(ValueError, match="singular together"):
        regmean(factors, torch.zeros(2), [moments(h) for h in hs])


@pytest.mark.parametrize("n", [16, 64])
def test_one_direction_that_no_input_has_is_singular_too(n):
    """As where a LayerNorm without bias feeds the layer: the sums' float32 rounding is all there is in it."""
    for seed in range(20):
        gram = FeatureMoments("token", n)
        gram.add_(inputs(n, n - 1, seed).float()[None], None)
        factors = lora(seed, {"x": (3, n, 2)}).factors["x"]
        with pytest.raises(ValueError, match="singular together"):
            regmean([factors, None], torch.ones(2), [gram, gram], off_diagonal=1.0)


@settings(max_examples=25)
@given(st.integers(1, 12), st.floats(0, 1), st.sampled_from([0.0, 1e-3, 0.5]), st.integers(0, 99))
def test_the_condition_is_that_of_the_matrix_that_is_solved_scaled_to_a_diagonal_of_ones(n, alpha, ridge, seed):
    h = inputs(n, 3 * n + 2, seed)
    M = reduced(h, alpha, ridge)
    size = M.diagonal().sqrt()
    expected = float(torch.linalg.cond(M / torch.outer(size, size)))
    found = condition(moments(h).second_moment(), off_diagonal=alpha, ridge=ridge)
    assert expected / 1.1 <= found <= expected * 1.001  # power iteration comes from below
    assert alpha == 1 or found <= ((n - 1) * alpha + 1) / (1 - alpha) * 1.001


def test_a_singular_solve_has_no_condition_until_a_ridge_gives_it_one():
    few = moments(inputs(6, 3, 8)).second_moment()
    dead = few.clone()
    dead[0] = dead[:, 0] = 0
    assert condition(few, off_diagonal=1.0) > 1e12 and condition(few) <= 46
    assert condition(dead) == math.inf and condition(dead, ridge=1e-6) <= 50
    assert condition(torch.zeros(3, 3, dtype=torch.float64), ridge=1.0) == math.inf


@pytest.mark.parametrize("kind", ["shared", "nearly shared", "apart"])
@pytest.mark.parametrize("alpha", [0.9, 1.0])
def test_no_ridge_is_needed_whatever_a_is_where_the_condition_is_small(kind, alpha):
    """Sums in float32 against float64: the error on outputs stays under condition · 2⁻²⁴, for every A alike."""
    n, generator = 64, torch.Generator().manual_seed(1)
    one = torch.randn(4, n, generator=generator)
    apart = {"shared": 0.0, "nearly shared": 1e-4, "apart": 1.0}[kind]
    factors = [Factors(one + apart * torch.randn(4, n, generator=generator), torch.randn(9, 4, generator=generator))
               for _ in range(3)]  # fmt: skip
    size = torch.arange(1, n + 1).double() ** -1.5  # as features fall off
    hs = [(inputs(n, 400, seed) * size).float() for seed in range(3)]
    S = sum(moments(h.double()).second_moment() for h in hs)

    def merged(dtype, ridge):
        gram = [FeatureMoments("token", n, len(h), h.to(dtype).sum(0), h.to(dtype).mT @ h.to(dtype)) for h in hs]
        return regmean(factors, torch.ones(3), gram, off_diagonal=alpha, ridge=ridge).delta()

    root = torch.linalg.cholesky(S)
    for ridge in (0.0, 1e-3):
        exact, kappa = merged(torch.float64, ridge), condition(S, off_diagonal=alpha, ridge=ridge)
        error = float(((merged(torch.float32, ridge) - exact) @ root).norm() / (exact @ root).norm())
        assert error <= kappa * 2**-24 < (1e-4 if alpha < 1 else 1e-2)
    bias = float(((merged(torch.float64, 1e-3) - merged(torch.float64, 0.0)) @ root).norm() / (exact @ root).norm())
    assert bias > 100 * error  # so a ridge costs more than it mends


def test_the_ridge_that_the_error_names_keeps_the_result_as_small_as_the_adapters():
    n, generator = 64, torch.Generator().manual_seed(0)
    factors = [Factors(torch.randn(4, n, generator=generator), torch.randn(9, 4, generator=generator)) for _ in "stu"]
    size = torch.arange(1, n + 1).double() ** -1.5
    gram = [moments(inputs(n, 20, seed) * size) for seed in range(3)]
    with pytest.raises(ValueError, match="or give ridge=1e-2"):
        regmean(factors, torch.ones(3), gram, off_diagonal=1.0)
    largest = max(float(f.delta().norm()) for f in factors)
    norms = {r: float(regmean(factors, torch.ones(3), gram, off_diagonal=1.0, ridge=r).delta().norm()) / largest
             for r in (1e-6, 1e-2)}  # fmt: skip
    assert norms[1e-2] < 2 and norms[1e-6] > 10


def test_a_merge_takes_each_task_s_file_and_names_the_layer_of_an_error(tmp_path):
    adapters, grams = {"s": lora(1), "t": lora(2)}, {"t": gram_of("t", 2), "s": gram_of("s", 1)}
    grams["t"].save(tmp_path / "t.safetensors")
    merged = merge_adapters(adapters, "regmean", statistics=grams | {"t": tmp_path / "t.safetensors"}, scale=0.5)
    for name in LAYERS:
        gram = [grams[task].layers[name] for task in adapters]
        expected = regmean([a.factors[name] for a in adapters.values()], torch.ones(2), gram)
        close(merged.deltas()[name], 0.5 * expected.delta(), 1e-5)  # the file has float32 sums
        assert merged.layers[name].direction.factors.rank == 2 * LAYERS[name][2]
    few = {"s": gram_of("s", 1, count=1), "t": gram_of("t", 1, count=1)}
    with pytest.raises(ValueError, match=r"layer 'a': the tasks' Gram matrices are singular together \(width 5\)"):
        merge_adapters(adapters, "regmean", statistics=few, off_diagonal=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"off_diagonal": 1.5}, r"off_diagonal=1.5 must lie in \[0, 1\]"),
        ({"ridge": -1}, r"ridge=-1 must be a finite number of at least 0"),
        ({"space": "core"}, r"regmean runs in space 'factors' only"),
        ({"statistics": None}, r"needs statistics=\{task: file\} of every task, missing t: .*collect_gram"),
        ({"statistics": {"t": gram_of("t", 1, {"a": LAYERS["a"]})}}, r"lack 1 of the 2 merged layers: b"),
        ({"statistics": {"t": gram_of("t", 1, LAYERS | {"b": (4, 6, 1)})}}, r"have width 6 at 'b', the adapter has 7"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        merge_adapters({"t": lora(1)}, "regmean", **({"statistics": {"t": gram_of("t", 1)}} | arguments))


# ---- collect_gram: the inputs of the adapted model


def batches():
    return [make_batch(seed=seed) for seed in range(3)]


def collect(collector, model, **options):
    return collector(model, batches(), task="t", **({"progress": False} | options))


def inputs_of_single_samples(model, name):
    """What the layer receives with the adapter on, one sample at a time, cut to its real length."""
    seen, layer = [], model.get_base_model().get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].detach().double()))
    with torch.no_grad():
        for batch in batches():
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                model(input_ids=ids[: int(mask.sum())][None])
    handle.remove()
    return torch.cat(seen)


def test_the_gram_is_the_second_moment_of_the_adapted_model_s_inputs(tmp_path):
    model = make_adapter(tmp_path)
    found, off = collect(collect_gram, model), collect(collect_features, model)
    assert (
        found.of_finetuned_model
        and not off.of_finetuned_model
        and found.statistic == "token"
        and found.num_samples == 12
    )
    for name, gram in found.layers.items():
        h = inputs_of_single_samples(model, name)
        assert gram.count == len(h) == sum(int(batch["attention_mask"].sum()) for batch in batches())
        close(gram.second_moment(), h.mT @ h / len(h), 1e-6)
        apart = float((gram.second_moment() - off.layers[name].second_moment()).norm() / gram.second_moment().norm())
        assert apart > 1e-3 if "layer.1" in name else apart == 0  # no adapter lies before layer 0


def test_a_baked_adapter_gives_the_same_gram(tmp_path):
    model = make_adapter(tmp_path)
    plain = copy.deepcopy(model).merge_and_unload()
    live = collect(collect_gram, model).layers
    baked = collect(collect_gram, plain, target_modules=["query", "value"]).layers
    model.merge_adapter()  # PEFT's merge in place is the adapted model, too
    in_place = collect(collect_gram, model).layers
    assert list(live) == list(in_place) == list(baked)
    for name in live:
        close(in_place[name].second_moment(), live[name].second_moment(), 1e-5)
        close(baked[name].second_moment(), live[name].second_moment(), 1e-5)


def test_the_model_is_left_as_it_was(tmp_path):
    model = make_adapter(tmp_path).train()

    def state():
        modules = [(m.training, len(m._forward_pre_hooks), set(vars(m))) for m in model.modules()]
        return modules, [(p.requires_grad, p.grad) for p in model.parameters()], model.active_adapters

    before = state()
    collect(collect_gram, model)
    assert state() == before


def test_osrm_refuses_the_features_of_an_adapted_model(tmp_path):
    collect(collect_gram, make_base(), target_modules=["query", "value"]).save(tmp_path / "gram.safetensors")
    gram = TaskFeatures.load(tmp_path / "gram.safetensors")
    assert gram.of_finetuned_model
    message = r"the statistics of task 't' are of its fine-tuned model \(collect_gram, for RegMean\): collect them on"
    with pytest.raises(ValueError, match=message):
        check_model(gram, make_base(), [QUERY_1])
    config = OSRMLoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS", objective="least_energy")
    with pytest.raises(ValueError, match=message):
        initialize_osrm_weights(get_peft_model(make_base(), config), [tmp_path / "gram.safetensors"])


def test_collected_grams_merge(tmp_path):
    models = {f"t{seed}": make_adapter(tmp_path / f"t{seed}", seed=seed) for seed in (1, 2)}
    grams = {task: collect(collect_gram, model) for task, model in models.items()}
    merged = merge_adapters(models, "regmean", statistics=grams).deltas()
    apart, average = 0.0, merge_adapters(models, "average").deltas()
    for name in merged:
        G = [0.9 * S + 0.1 * S.diag().diag() for S in (grams[task].layers[name].second_moment() for task in models)]
        tau = [model.get_base_model().get_submodule(name).get_delta_weight("default").detach().double()
               for model in models.values()]  # fmt: skip
        close(merged[name], sum(t @ g for t, g in zip(tau, G, strict=True)) @ torch.linalg.inv(sum(G)), 1e-5)
        apart += float((merged[name] - average[name]).norm())
    assert apart > 0.01


def test_bad_loaders_are_refused():
    with pytest.raises(ValueError, match=r"num_samples=0 must be a whole number of at least 1"):
        collect(collect_gram, make_base(), num_samples=0)
    with pytest.raises(ValueError, match=r"the loader of task 't' gave no sample"):
        collect_gram(make_base(), [], task="t", progress=False)


@pytest.mark.parametrize("order", ["mzb", "zbm", "bmz"])
def test_each_task_has_its_own_gram_in_whatever_order_they_are_given(order):
    """By name: neither sorted, nor in the order of the mapping."""
    adapters = {task: lora(seed) for seed, task in enumerate("zbm", start=1)}
    grams = {task: gram_of(task, seed) for seed, task in enumerate("zbm", start=1)}
    merged = merge_adapters(adapters, "regmean", statistics={task: grams[task] for task in order})
    for name in LAYERS:
        own = [grams[task].layers[name] for task in "zbm"]
        close(
            merged.deltas()[name],
            regmean([a.factors[name] for a in adapters.values()], torch.ones(3), own).delta(),
            1e-6,
        )
