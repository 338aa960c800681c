"""What every registered merge method keeps, over every kind of plain LoRA adapter."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osrm_peft import DiagonalFisher, LeastSquares, TaskFeatures, merge_adapters
from osrm_peft.features.moments import FeatureMoments
from osrm_peft.merging.lowrank import cross_energies
from osrm_peft.merging.request import MergeRequest
from osrm_peft.merging.rules import solve
from tests.helpers.lora import LAYERS, close, dense, lora
from tests.helpers.merging import features_of, gram_of, samples

STATISTICS = ["mean", "sample", "token"]


def three(layers=LAYERS):
    return {task: lora(seed, layers, s=0.5) for seed, task in enumerate("stu", start=1)}


def system(adapters, vectors, layer):
    """Every sample of every task as o equations: Σ_j w_j τ_j h = τ_t h, over √N_t so that each task weighs the same."""
    tau, left, right = dense(adapters, layer), [], []
    for t, task in enumerate(adapters):
        for h in vectors[task][layer]:
            size = len(vectors[task][layer]) ** 0.5
            left.append(torch.stack([one @ h for one in tau], 1) / size)  # (o, T)
            right.append(tau[t] @ h / size)
    return torch.cat(left).numpy(), torch.cat(right).numpy()


def solution(adapters, vectors, layers):
    """The weights of least norm among those that solve the layers' equations best."""
    systems = [system(adapters, vectors, layer) for layer in layers]
    left, right = (np.concatenate(parts) for parts in zip(*systems, strict=True))
    return np.linalg.lstsq(left, right, rcond=1e-6)[0]


# ---- cross energies


@settings(max_examples=25)
@given(
    st.integers(1, 5),
    st.integers(1, 5),
    st.lists(st.integers(0, 3), min_size=1, max_size=4),
    st.sampled_from(STATISTICS),
    st.sampled_from([2, 12]),  # fewer samples than the width: their vectors are kept, not their sums
    st.integers(0, 99),
)
def test_cross_energies_are_means_over_samples(o, n, ranks, statistic, count, seed):
    moments, h = samples(n, seed, statistic, count)
    generator = torch.Generator().manual_seed(seed)
    products = [(torch.randn(o, r, generator=generator), torch.randn(r, n, generator=generator)) for r in ranks]
    found = cross_energies(products, moments)
    outputs = [h @ (B.double() @ A.double()).mT for B, A in products]
    expected = torch.tensor([[(x * y).sum(1).mean() for y in outputs] for x in outputs], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12 * max(1.0, float(expected.abs().max())))


# ---- weights from features


@pytest.mark.parametrize("method", ["task_arithmetic", "concat"])
@pytest.mark.parametrize("count", [3, 12])
@pytest.mark.parametrize("statistic", STATISTICS)
def test_each_layer_s_weights_solve_its_least_squares_over_all_samples(method, count, statistic):
    adapters = three()
    files, vectors = features_of(adapters, statistic, count=count)
    merged = merge_adapters(adapters, method, weights=LeastSquares(files))
    for name in LAYERS:
        expected = solution(adapters, vectors, [name])
        chosen = merged.manifest["chosen_weights"][name]
        assert list(chosen) == list(adapters)
        np.testing.assert_allclose(list(chosen.values()), expected, rtol=1e-8, atol=1e-10)
        tau = dense(adapters, name)
        close(merged.deltas()[name], torch.einsum("t,ton->on", torch.from_numpy(expected), tau), 1e-6)  # at scale 1
    assert merged.manifest["weights"] == "features" and merged.scale == 1


def test_one_set_of_weights_for_all_layers_solves_them_together():
    adapters = three()
    adapters["u"].factors = {"b": adapters["u"].factors["b"]}  # and one adapter lacks a layer
    files, vectors = features_of(adapters)
    merged = merge_adapters(adapters, "task_arithmetic", weights=LeastSquares(files, shared=True), scale=0.5)
    expected = solution(adapters, vectors, LAYERS)
    for name in LAYERS:
        np.testing.assert_allclose(list(merged.manifest["chosen_weights"][name].values()), expected, rtol=1e-9)
        weighted = torch.einsum("t,ton->on", torch.from_numpy(expected), dense(adapters, name))
        close(merged.deltas()[name], 0.5 * weighted, 1e-6)


def test_an_adapter_without_the_layer_has_the_weight_0_there():
    adapters = three()
    adapters["u"].factors = {"b": adapters["u"].factors["b"]}
    files, vectors = features_of(adapters)
    chosen = merge_adapters(adapters, "concat", weights=LeastSquares(files)).manifest["chosen_weights"]
    assert chosen["a"]["u"] == 0 and chosen["b"]["u"] != 0
    np.testing.assert_allclose(list(chosen["a"].values()), solution(adapters, vectors, ["a"]), rtol=1e-9, atol=1e-12)


def test_identical_adapters_share_one_weight():
    one = lora(1)
    adapters = {"s": one, "t": one, "u": lora(2)}
    files, vectors = features_of(adapters)
    chosen = merge_adapters(adapters, "task_arithmetic", weights=LeastSquares(files)).manifest["chosen_weights"]
    for name in LAYERS:
        assert chosen[name]["s"] == pytest.approx(chosen[name]["t"], rel=1e-9)
        np.testing.assert_allclose(list(chosen[name].values()), solution(adapters, vectors, [name]), rtol=1e-6)
    pair = {"s": one, "t": one}
    files, _ = features_of(pair)
    chosen = merge_adapters(pair, "concat", weights=LeastSquares(files)).manifest["chosen_weights"]
    assert [w for layer in chosen.values() for w in layer.values()] == pytest.approx([0.5] * 4)


def test_a_lone_adapter_has_the_weight_1_and_one_of_zeros_0():
    files, _ = features_of("s")
    for adapter, expected in ((lora(1), 1), (lora(1, s=0.0), 0)):
        merged = merge_adapters({"s": adapter}, "task_arithmetic", weights=LeastSquares(files))
        assert [layer["s"] for layer in merged.manifest["chosen_weights"].values()] == pytest.approx([expected] * 2)


def test_adapters_blind_to_each_other_s_features_keep_their_weight():
    """OSRM's aim: τ_j h_t = 0 for j ≠ t, so the sum with weights 1 is exact on all features."""
    adapters = {task: lora(seed, {"x": (3, 6, 2)}, s=0.5) for seed, task in enumerate("st", start=1)}
    halves = torch.arange(6) < 3
    adapters["s"].factors["x"].A.mul_(halves)
    adapters["t"].factors["x"].A.mul_(~halves)
    files, _ = features_of("st", layers={"x": (3, 6, 2)})
    for task, half in (("s", halves), ("t", ~halves)):
        files[task].layers["x"].second.mul_(half).mul_(half[:, None])
    chosen = merge_adapters(adapters, "concat", weights=LeastSquares(files)).manifest["chosen_weights"]
    assert list(chosen["x"].values()) == pytest.approx([1, 1])


# ---- scale from features


def best(direction, offset, adapters, vectors, layer):
    """argmin_c over all samples' equations (offset + c · direction) h = τ_t h."""
    left, right = [], []
    for t, task in enumerate(adapters):
        h = vectors[task][layer]
        left.append((h @ direction.mT).flatten() / len(h) ** 0.5)
        right.append((h @ (dense(adapters, layer)[t] - offset).mT).flatten() / len(h) ** 0.5)
    return np.linalg.lstsq(torch.cat(left)[:, None].numpy(), torch.cat(right).numpy(), rcond=None)[0][0]


CASES = {
    "average": {},
    "concat": {"weights": [1, -2, 0.5]},
    "dare": {"seed": 3},
    "fisher": {},
    "iso": {},
    "lore": {},  # with an offset that the scale does not touch
    "regmean": {},
    "ties": {"density": 0.5},
    "tsv": {"space": "weight"},
}


@pytest.mark.parametrize("statistic", ["sample", "token"])
@pytest.mark.parametrize("method", CASES)
def test_each_layer_s_scale_solves_its_least_squares_over_all_samples(method, statistic):
    adapters, options = three(), CASES[method]
    files, vectors = features_of(adapters, statistic)
    if method == "regmean":
        options = {"statistics": {task: gram_of(task, seed) for seed, task in enumerate(adapters)}}
    if method == "fisher":
        shapes = {name: torch.rand(o, n) for name, (o, n, _) in LAYERS.items()}
        options = {"statistics": {task: DiagonalFisher(task, "tiny", 1, "true", layers=shapes) for task in adapters}}
    unscaled = merge_adapters(adapters, method, scale=1, **options)
    fixed = unscaled.at_scale(0).deltas()
    merged = merge_adapters(adapters, method, scale=LeastSquares(files), **options)
    for name in LAYERS:
        direction = unscaled.deltas()[name] - fixed[name]
        expected = best(direction, fixed[name], adapters, vectors, name)
        assert merged.manifest["report"][name]["scale"] == pytest.approx(expected, rel=1e-6)
        close(merged.deltas()[name], fixed[name] + expected * direction, 1e-6)
        assert (method == "lore") == bool(fixed[name].any())
    doubled = merged.at_scale(2).deltas()["a"]
    close(doubled - fixed["a"], 2 * (merged.deltas()["a"] - fixed["a"]), 1e-6)


def test_of_a_lone_adapter_the_scale_undoes_the_weight():
    files, _ = features_of("s")
    merged = merge_adapters({"s": lora(1)}, "task_arithmetic", weights=[-4], scale=LeastSquares(files))
    assert merged.manifest["report"]["a"]["scale"] == pytest.approx(-0.25)
    close(merged.deltas()["a"], dense({"s": lora(1)}, "a")[0], 1e-6)


def test_a_direction_that_does_nothing_on_any_features_gets_the_scale_0():
    files, _ = features_of("st")
    merged = merge_adapters({"s": lora(1), "t": lora(1, s=-0.7)}, "concat", scale=LeastSquares(files))
    assert merged.manifest["report"]["a"]["scale"] == 0 and not merged.deltas()["a"].any()


def test_a_lower_rank_gets_the_scale_that_suits_it():
    adapters = three()
    files, vectors = features_of(adapters)
    cut = merge_adapters(adapters, "average", rank=2)
    merged = merge_adapters(adapters, "average", rank=2, scale=LeastSquares(files))
    for name in LAYERS:
        expected = best(cut.deltas()[name], 0 * cut.deltas()[name], adapters, vectors, name)
        assert merged.manifest["report"][name]["scale"] == pytest.approx(expected, rel=1e-6)
    assert merged.energy_kept() == pytest.approx(cut.energy_kept())


# ---- what a rank keeps


def output_loss(X, M, vectors, layer):
    """Σ_t E‖(M − X) h_t‖²."""
    left = (M - X).double()
    return sum(float((vectors[task][layer] @ left.mT).square().sum(1).mean()) for task in vectors)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize(
    ("method", "about"),
    [
        *[(method, {}) for method in ("task_arithmetic", "concat", "ties", "tsv", "iso")],
        ("task_arithmetic", {"space": "weight"}),
        ("ties", {"space": "knots"}),
    ],
)
def test_features_cut_a_merge_where_its_outputs_lose_least(method, about, rank):
    """Of all matrices of the rank it loses least of E‖ΔW h‖²: the squared singular values of ΔW S^½ after the first."""
    adapters = three()
    files, vectors = features_of(adapters, count=40)
    whole = merge_adapters(adapters, method, **about).deltas()
    merged = merge_adapters(adapters, method, rank=rank, cut=LeastSquares(files), **about)
    by_values = merge_adapters(adapters, method, rank=rank, **about).deltas()
    for name, cut in merged.deltas().items():
        M, S = whole[name].double(), sum(files[task].layers[name].second_moment() for task in files)
        L, V = torch.linalg.eigh(S)
        least = torch.linalg.svdvals(M @ (V * L.clamp_min(0).sqrt()))[rank:].square().sum()
        assert torch.linalg.matrix_rank(cut.double(), rtol=1e-5) <= rank
        found, rounding = output_loss(cut, M, vectors, name), 1e-9 * float((M @ S * M).sum())
        assert found == pytest.approx(float(least), rel=1e-4, abs=rounding)
        assert found <= output_loss(by_values[name], M, vectors, name) * (1 + 1e-5) + rounding
        kept = float(cut.double().square().sum() / M.square().sum())
        assert merged.energy_kept()[name] == pytest.approx(kept, rel=1e-4)


def test_among_directions_that_no_feature_uses_the_largest_are_kept():
    """Features of one vector a task say nothing of the other directions; the singular values do."""
    one = {"x": (6, 24, 3)}
    files, vectors = features_of("s", "sample", one, 1)
    adapter, h = lora(1, one), vectors["s"]["x"][0].double()
    M = dense({"s": adapter}, "x")[0].double()
    merged = merge_adapters({"s": adapter}, "concat", rank=2, cut=LeastSquares(files)).deltas()["x"].double()
    first = M @ h / (M @ h).norm()
    rest = M - first[:, None] * (first @ M)
    U = torch.linalg.svd(rest).U[:, :1]
    close(merged, M - rest + U @ U.mT @ rest, 1e-6)


def test_a_cut_by_features_takes_weights_by_features_too():
    adapters = three()
    files, _ = features_of(adapters)
    rule = LeastSquares(files)
    whole = merge_adapters(adapters, "task_arithmetic", weights=rule)
    cut = merge_adapters(adapters, "task_arithmetic", weights=rule, rank=2, cut=rule)
    assert cut.manifest["chosen_weights"] == whole.manifest["chosen_weights"] and cut.manifest["cut"] == "features"
    full = merge_adapters(adapters, "task_arithmetic", weights=rule, rank=99, cut=rule)
    for name in LAYERS:
        close(full.deltas()[name], whole.deltas()[name], 1e-5)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"method": "ties"}, "without rank nothing is cut: give rank"),
        ({"method": "emr", "rank": 2}, "emr is of no one product that features can cut: leave cut out"),
        ({"method": "lore", "rank": 2}, "lore is of no one product that features can cut: leave cut out"),
        ({"method": "ties", "rank": 2, "cut": "features"}, r"in Python give cut=LeastSquares\(features\)"),
        ({"method": "ties", "rank": 2, "cut": 3}, r"cut=3 must be LeastSquares\(features\)"),
        ({"method": "ties", "rank": 2, "cut": LeastSquares({}, shared=True)}, "without shared=True"),
        ({"method": "ties", "rank": 2, "cut": LeastSquares({})}, "features"),
        ({"method": "ties", "rank": 2, "scale": LeastSquares({})}, "scale and cut have different features"),
    ],
)
def test_cuts_that_cannot_be_made(about, message):
    files, _ = features_of("stu")
    about = {"cut": LeastSquares(files)} | about
    with pytest.raises(ValueError, match=message):
        merge_adapters(three(), **about)


# ---- rounding is 0, not a direction


@pytest.mark.parametrize("combine", ["sum", "average", "ties"])
@pytest.mark.parametrize("space", ["core", "weight", "knots"])
def test_lore_of_two_adapters_is_their_mean_whatever_the_features(space, combine):
    """Its direction is δ_1 + δ_2 = 0, which no scale makes anything of."""
    adapters = {task: lora(seed) for seed, task in enumerate("st", start=1)}
    files, _ = features_of("st")
    for tasks in ("st", "ts"):
        given_ = {task: adapters[task] for task in tasks}
        merged = merge_adapters(given_, "lore", scale=LeastSquares(files), combine=combine, space=space)
        for name in LAYERS:
            assert merged.manifest["report"][name]["scale"] == 0
            close(merged.deltas()[name], dense(adapters, name).mean(0), 1e-6)


@pytest.mark.parametrize("count", [1, 3])
def test_lore_of_copies_is_the_adapter(count):
    adapters = {task: lora(1) for task in "stu"[:count]}
    files, _ = features_of(adapters)
    merged = merge_adapters(adapters, "lore", scale=LeastSquares(files))
    close(merged.deltas()["a"], dense({"s": lora(1)}, "a")[0], 1e-6)


def blind(seed, free, n=24):
    """Features in the directions that `free` (n, n) leaves, summed in float32, and adapters that read the others."""
    generator = torch.Generator().manual_seed(seed)
    moments = FeatureMoments("token", n)
    moments.add_((torch.randn(200, n, generator=generator).double() @ (torch.eye(n) - free).double()).float())
    return moments


@pytest.mark.parametrize("seed", range(4))
def test_what_an_adapter_does_to_rounding_counts_as_nothing(seed):
    """Its A reads the directions that no task's features have: E‖τh‖² = 0, which float32 sums give as ±10⁻⁷."""
    basis = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(seed)))[0]
    free = basis[:, :6] @ basis[:, :6].mT
    files = {}
    for t, task in enumerate("st"):
        files[task] = TaskFeatures(task, "tiny", "", "token", layers={"x": blind(10 * seed + t, free)})
    adapters = {task: lora(i, {"x": (5, 24, 2)}) for i, task in enumerate("st")}
    quiet = {task: replace(one, factors={"x": replace(one.factors["x"], A=one.factors["x"].A @ free)})
             for task, one in adapters.items()}  # fmt: skip
    merged = merge_adapters(quiet, "average", scale=LeastSquares(files))
    assert merged.manifest["report"]["x"]["scale"] == 0
    both, tau = {"s": adapters["s"], "t": quiet["t"]}, dense(adapters)[0]
    energies = torch.stack([(tau @ files[task].layers["x"].second_moment() * tau).sum() for task in "st"])
    for rule in (LeastSquares(files), LeastSquares(files, shared=True)):
        chosen = merge_adapters(both, "concat", weights=rule).manifest["chosen_weights"]["x"]
        assert chosen["t"] == 0 and chosen["s"] == pytest.approx(float(energies[0] / energies.sum()), rel=1e-4)


def test_factors_that_cancel_do_nothing():
    files, _ = features_of("stu")
    one = lora(1)
    adapters = {"s": one, "t": one, "u": one}
    merged = merge_adapters(adapters, "concat", weights=[0.3, -0.1, -0.2], scale=LeastSquares(files))
    assert [layer["scale"] for layer in merged.manifest["report"].values()] == [0, 0]


@pytest.mark.parametrize(
    ("values", "cut"),
    [([1, 1e-8], False), ([1, 1e-9], False), ([1, 1e-11], True), ([1e6, 1e-5], True), ([1e-9, 1e-12], False)],
)
def test_the_pseudo_inverse_cuts_at_1e_10_of_the_largest(values, cut):
    """Weights of task vectors that are alike to 10⁻⁵ are shared; those that differ more are told apart."""
    Q = torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64))[0]
    normal, weights = Q @ torch.diag(torch.tensor(values).double()) @ Q.mT, torch.tensor([2.0, -1.0]).double()
    expected = Q[:, :1] @ Q[:, :1].mT @ weights if cut else weights
    torch.testing.assert_close(solve((normal + normal.mT) / 2, normal @ weights), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", ["mzb", "zbm", "bmz"])
def test_each_task_has_its_own_features_in_whatever_order_they_are_given(order):
    """By name: neither sorted, nor in the order of the mapping."""
    adapters = {task: lora(seed, s=0.5) for seed, task in enumerate("zbm", start=1)}
    files, vectors = features_of(adapters)
    given_ = {task: files[task] for task in order}
    merged = merge_adapters(adapters, "task_arithmetic", weights=LeastSquares(given_))
    for name in LAYERS:
        chosen = merged.manifest["chosen_weights"][name]
        assert list(chosen) == list("zbm")
        np.testing.assert_allclose(list(chosen.values()), solution(adapters, vectors, [name]), rtol=1e-8, atol=1e-10)
    scaled = merge_adapters(adapters, "average", scale=LeastSquares(given_))
    for name in LAYERS:
        mean = dense(adapters, name).mean(0)
        expected = best(mean, 0 * mean, adapters, vectors, name)
        assert scaled.manifest["report"][name]["scale"] == pytest.approx(expected, rel=1e-6)


# ---- errors

FILES, _ = features_of("stu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": LeastSquares({})}, r"least squares needs features=\{task: file\} of every task, missing s, t, u"),
        ({"weights": LeastSquares({"s": FILES["s"]})}, r"missing t, u: make them with .*collect_features"),
        ({"scale": LeastSquares({"s": FILES["s"], "u": FILES["u"]})}, r"missing t"),
        (
            {"method": "ties", "weights": LeastSquares(FILES)},
            r"features choose the weights of a sum \(concat, task_arithmetic\), not of ties",
        ),
        ({"method": "average", "weights": LeastSquares(FILES, shared=True)}, r"not of average"),
        (
            {"weights": LeastSquares(FILES), "scale": LeastSquares(FILES)},
            r"features that choose the weights leave no scale to choose",
        ),
        ({"scale": LeastSquares(FILES, shared=True)}, r"a scale is chosen for each layer: .* without shared=True"),
        ({"weights": "feature"}, r"weights='feature' must be a list"),
        ({"scale": "feature"}, r"scale='feature' must be a finite number"),
        ({"weights": "features_global"}, r"is a word of recipes: in Python give weights=LeastSquares\(features\)"),
        ({"scale": "features"}, r"is a word of recipes: in Python give scale=LeastSquares\(features\)"),
        ({"statistics": FILES}, r"task_arithmetic takes no statistics: .*LeastSquares"),
        (
            {"scale": LeastSquares(FILES | {"t": DiagonalFisher("t", "tiny", 1, "true")})},
            r"features of 't' is a DiagonalFisher, least squares needs a TaskFeatures",
        ),
        (
            {"scale": LeastSquares(FILES | features_of("t", layers={"a": LAYERS["a"]})[0])},
            r"features of task 't' \(of tiny\) lack 1 of the 2 merged layers: b",
        ),
        (
            {"scale": LeastSquares(FILES | features_of("t", layers=LAYERS | {"b": (4, 6, 1)})[0])},
            r"features of task 't' have width 6 at 'b', the adapter has 7",
        ),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        merge_adapters(three(), **({"method": "task_arithmetic"} | arguments))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"features": {"s": "x"}},
            r"features are for weights='features', scale='features' and cut='features': give one",
        ),
        ({"weights": "feature", "features": {"s": "x"}}, r"features are for weights='features'"),
        ({"features": "x"}, r"features='x' in the merge recipe must map tasks to files"),
    ],
)
def test_words_of_a_recipe_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        MergeRequest.from_fields(**fields)


def test_the_words_of_a_recipe_are_the_rules():
    files = {"s": "file"}
    for word, shared in (("features", False), ("features_global", True)):
        request = MergeRequest.from_fields(weights=word, features=files)
        assert request.weights == LeastSquares(files, shared) and request.weights.word == word
    for name in ("scale", "cut"):
        assert getattr(MergeRequest.from_fields(**{name: "features"}, features=files), name) == LeastSquares(files)


def test_features_files_are_read(tmp_path):
    adapters = three()
    files, _ = features_of(adapters)
    for task, features in files.items():
        features.save(tmp_path / task)
    paths = {task: str(tmp_path / task) for task in reversed(list(adapters))}
    read = merge_adapters(adapters, "concat", weights=LeastSquares(paths)).manifest["chosen_weights"]
    given_ = merge_adapters(adapters, "concat", weights=LeastSquares(files)).manifest["chosen_weights"]
    for name in LAYERS:
        assert read[name] == pytest.approx(given_[name], rel=1e-4)  # the file has float32 means
