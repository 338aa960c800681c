import json
import math
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from osrm_peft import Interference, LoraAdapter, TaskFeatures, collect_features, interference, load_adapter
from osrm_peft.adapters.factors import Factors
from osrm_peft.evaluation.interference import RIDGES, Solve
from osrm_peft.evaluation.plots import draw_interference, plot_interference
from osrm_peft.merging.methods.regmean import condition
from osrm_peft.merging.overlap import overlaps
from osrm_peft.models.layers import lora_layers
from tests.helpers.adapters import make_adapter
from tests.helpers.lora import LAYERS, close, dense, lora
from tests.helpers.merging import features_of
from tests.helpers.models import make_base, make_batch


def three():
    return {task: lora(seed, s=0.5) for seed, task in enumerate("stu", start=1)}


def energy(X, h):
    """E‖X h‖², one sample at a time."""
    return sum(float((X @ row).square().sum()) for row in h) / len(h)


class Base(nn.Module):
    """Linear layers of the adapters' shapes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        for name, (o, n, _) in LAYERS.items():
            setattr(self, name, nn.Linear(n, o))


@pytest.mark.parametrize("statistic", ["mean", "sample", "token"])
@pytest.mark.parametrize("with_base", [False, True])
def test_an_entry_is_the_energy_of_an_adapter_on_a_task_s_samples(with_base, statistic):
    adapters, base = three(), Base() if with_base else None
    files, vectors = features_of(adapters, statistic)
    found = interference(adapters, files, base=base)
    assert found.tasks == ["s", "t", "u"] and found.relative_to == ("base" if with_base else "own")
    for name in LAYERS:
        tau = dense(adapters, name)
        for t, task in enumerate("stu"):
            h = vectors[task][name]
            below = energy(base.get_submodule(name).weight.detach().double() if with_base else tau[t], h)
            for j in range(3):
                assert float(found.layers[name][j, t]) == pytest.approx(energy(tau[j], h) / below, rel=1e-9)
        assert with_base or found.layers[name].diagonal().tolist() == pytest.approx([1] * 3)


def test_on_a_live_model_it_is_what_the_layer_and_its_adapter_put_out(tmp_path):
    models = {f"t{seed}": make_adapter(tmp_path / f"t{seed}", seed=seed) for seed in (1, 2)}
    batches = {task: make_batch(seed=seed) for seed, task in enumerate(models)}
    files = {
        task: collect_features(
            make_base(), [batch], task=task, target_modules=["query", "value"], progress=False, statistic="token"
        )
        for task, batch in batches.items()
    }
    base = make_base()
    found = interference({task: tmp_path / task for task in models}, files, base=base)
    for t, batch in enumerate(batches.values()):
        seen = {}
        handles = [
            base.get_submodule(name).register_forward_hook(
                lambda layer, args, output, name=name, seen=seen: seen.update({name: (args[0], output - layer.bias)})
            )
            for name in found.layers
        ]
        with torch.no_grad():
            base(**batch)
        for handle in handles:
            handle.remove()
        keep = batch["attention_mask"].bool()
        for name, (x, output) in seen.items():
            for j, model in enumerate(models.values()):
                layer = lora_layers(model, "default")[name]
                with torch.no_grad():
                    acts = layer(x) - layer.get_base_layer()(x)
                share = acts[keep].square().sum() / output[keep].square().sum()
                assert float(found.layers[name][j, t]) == pytest.approx(float(share), rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "target", "weight"),
    [
        ("gpt2", "c_attn", lambda layer: layer.weight.mT),
        ("resnet", "convolution", lambda layer: layer.weight.flatten(1)),
        ("bert", "word_embeddings", lambda layer: layer.weight.mT),
    ],
)
def test_conv1d_convolutions_and_embeddings_of_the_base_are_matrices(tmp_path, kind, target, weight):
    fields = {"kind": kind, "target_modules": [target], "fan_in_fan_out": kind == "gpt2", "task_type": None}
    make_adapter(tmp_path, **fields)
    adapter, base = load_adapter(tmp_path), make_base(kind=kind)
    layers = {name: (o, n, r) for name, (o, r, n) in adapter.shapes.items()}
    files, vectors = features_of(["t"], layers=layers)
    found = interference({"t": tmp_path}, files, base=base)
    for name, shares in found.layers.items():
        h, W = vectors["t"][name], weight(base.get_submodule(name)).detach().double()
        tau = adapter.factors[name].delta().double()
        assert W.shape == tau.shape
        assert float(shares) == pytest.approx(energy(tau, h) / energy(W, h), rel=1e-5)


def test_a_peft_model_as_base_counts_without_its_adapter(tmp_path):
    model = make_adapter(tmp_path)
    layers = {name: (o, n, r) for name, (o, r, n) in load_adapter(tmp_path).shapes.items()}
    files, _ = features_of(["t"], layers=layers)
    plain = interference({"t": tmp_path}, files, base=make_base()).layers
    wrapped = interference({"t": tmp_path}, files, base=model).layers
    assert all(torch.equal(wrapped[name], plain[name]) for name in plain)


def test_an_adapter_without_the_layer_and_one_of_zeros_do_not_act():
    adapters = {"s": lora(1), "t": lora(2, s=0.0), "u": lora(3)}
    adapters["u"].factors = {"b": adapters["u"].factors["b"]}
    files, _ = features_of(adapters)
    found = interference(adapters, files, base=Base())
    assert found.layers["a"][1].tolist() == found.layers["a"][2].tolist() == [0, 0, 0]
    assert (found.layers["b"][[0, 2]] > 0).all()
    mean = found.mean()
    assert not mean[1].any()
    torch.testing.assert_close(mean[2], found.layers["b"][2])  # of the layer where it acts


def test_the_mean_is_geometric_over_the_layers_where_an_adapter_acts():
    layers = {
        "a": torch.tensor([[1.0, 1e-8], [0.0, 1.0]]),
        "b": torch.tensor([[4.0, 1e-2], [0.0, torch.nan]]),
        "c": torch.tensor([[2.0, 1e-2], [0.0, torch.inf]]),
    }
    found = Interference(["s", "t"], {name: matrix.double() for name, matrix in layers.items()}, "own")
    expected = torch.tensor([[2.0, 1e-4], [0.0, 1.0]]).double()
    torch.testing.assert_close(found.mean(), expected, rtol=1e-6, atol=0)


def test_one_number_is_the_geometric_mean_over_the_pairs():
    adapters = three()
    found = interference(adapters, features_of(adapters)[0])
    logs = [math.log(found.mean()[j, t]) for j in range(3) for t in range(3) if j != t]
    assert found.off_diagonal() == pytest.approx(math.exp(sum(logs) / 6))
    alone = interference({"s": adapters["s"]}, features_of("s")[0])
    assert math.isnan(alone.off_diagonal()) and alone.mean().item() == pytest.approx(1)


def test_its_size_counts_squared_and_its_sign_does_not():
    adapters = {"s": lora(1, s=1.0), "t": lora(1, s=-3.0)}
    for shares in interference(adapters, features_of("st")[0]).layers.values():
        close(shares, torch.tensor([[1.0, 1 / 9], [9.0, 1.0]]), 1e-6)


def test_it_can_be_written_as_json():
    adapters = three()
    found = interference(adapters, features_of(adapters)[0])
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["tasks"] == found.tasks and content["layers"]["a"] == found.layers["a"].tolist()
    assert content["relative_to"] == "own" and content["off_diagonal"] == found.off_diagonal()
    alone = interference({"s": adapters["s"]}, features_of("s")[0])
    assert alone.to_dict()["off_diagonal"] is None


def test_with_adapters_of_other_layers_it_can_be_written_as_json_too():
    adapters = {"s": lora(1), "u": lora(3, {"b": LAYERS["b"]})}
    json.dumps(interference(adapters, features_of(adapters)[0]).to_dict(), allow_nan=False)


# --- what adapters share

WIDE = {"a": (40, 50, 2), "b": (60, 45, 2)}


def with_a_of(one, other):
    """`other` with the A of `one`."""
    return replace(other, factors={k: Factors(one.factors[k].A, f.B, f.s) for k, f in other.factors.items()})


def sharing_a():
    """Three adapters, of which s and t share A."""
    s, t, u = (lora(seed, WIDE) for seed in range(3))
    return {"s": s, "t": with_a_of(s, t), "u": u}


def test_what_adapters_share_needs_no_features():
    adapters = {"s": lora(1), "t": lora(2, {"b": (4, 7, 1)}), "u": lora(3)}
    found, (files, _) = interference(adapters), features_of(adapters)
    assert (found.layers, found.regmean, found.relative_to) == ({}, {}, None)
    for name in LAYERS:
        factors = [adapter.factors.get(name) for adapter in adapters.values()]
        o, n, _ = LAYERS[name]
        products = [(torch.zeros(o, 0), torch.zeros(0, n)) if f is None else (f.B, f.A) for f in factors]
        for mine, theirs in zip((found.overlap_a[name], found.overlap_b[name]), overlaps(products), strict=True):
            for part in ("shared", "largest", "random"):
                torch.testing.assert_close(getattr(mine, part), getattr(theirs, part), equal_nan=True)
    assert found.overlap_a["a"].shared.isnan().sum() == 5  # t has no such layer
    given = interference(adapters, files)
    assert {k: vars(v)["tsv"] for k, v in given.overlap_a.items()} == {k: v.tsv for k, v in found.overlap_a.items()}
    with pytest.raises(ValueError, match=r"who acts on whose features is not known without them: give features=\{task"):
        found.mean()


def test_the_solve_of_regmean_is_that_of_the_tasks_moments():
    adapters = three()
    files, vectors = features_of(adapters, "token", count=40)
    found = interference(adapters, files).regmean
    for name in LAYERS:
        S = sum(h[name].mT @ h[name] / len(h[name]) for h in vectors.values())
        assert found[name].condition == pytest.approx(condition(S), rel=1e-5) and found[name][1:] == (0, 0)
    few = features_of(adapters, "sample", layers={"a": (6, 5, 2), "b": (4, 300, 3)}, count=2)[0]
    wide = {task: lora(seed, {"a": (6, 5, 2), "b": (4, 300, 3)}) for seed, task in enumerate("stu")}
    solve = interference(wide, few).regmean["b"]
    S = sum(one.layers["b"].second_moment() for one in few.values())
    assert solve.ridge == 0 and condition(S) * 2**-24 < 1e-2 and solve.condition == pytest.approx(condition(S))
    before = RIDGES[RIDGES.index(solve.exact_ridge) - 1]
    assert condition(S, off_diagonal=1.0, ridge=solve.exact_ridge) * 2**-24 <= 1e-2
    assert condition(S, off_diagonal=1.0, ridge=before) * 2**-24 > 1e-2
    assert interference(adapters, features_of(adapters, "mean")[0]).regmean == {}  # one vector is no Gram matrix


def test_an_input_that_is_always_0_needs_a_ridge():
    adapters = three()
    files, _ = features_of(adapters)
    for one in files.values():
        one.layers["a"].second[0] = one.layers["a"].second[:, 0] = 0
    found = interference(adapters, files)
    assert found.regmean["a"].condition == math.inf and found.regmean["a"].ridge == 1e-6
    assert found.to_dict()["regmean"]["a"]["condition"] is None
    assert (
        "RegMean (its condition is up to inf on these features, whatever A is) needs ridge ≥ 1e-06" in found.verdict()
    )


def test_the_verdict_has_the_ridge_that_is_enough_for_every_layer():
    def verdict(*solves):
        return Interference(["s"], {}, None, regmean={str(i): one for i, one in enumerate(solves)}).verdict()

    assert verdict(Solve(10.0, 0.0, 0.0), Solve(30.0, 0.0, 0.0)) == (
        "RegMean (its condition is up to 30 on these features, whatever A is) needs no ridge."
    )
    text = verdict(Solve(10.0, 0.0, 1e-2), Solve(9.0, 1e-3, None), Solve(9.0, 1e-4, 0.0))
    assert text.endswith(" needs ridge ≥ 0.001; with off_diagonal=1 it needs a ridge above 1.")


def test_a_layer_that_is_too_wide_is_not_solved(monkeypatch):
    monkeypatch.setattr("osrm_peft.evaluation.interference._WIDEST", 6)
    adapters = three()
    assert list(interference(adapters, features_of(adapters)[0]).regmean) == ["a"]


def test_the_verdict_names_who_shares_a_and_what_that_means():
    text = interference(sharing_a()).verdict()
    assert text.startswith(
        "'s', 't' share A (mean squared cosine 1, random spaces 0.042): sums and averages are safe, for they sum B; "
        "but nothing keeps the inputs of these tasks apart. "
    )
    assert "The adapters' B are as far apart as random spaces (mean squared cosine 0." in text
    assert re.search(
        r"TSV-M does not leave the adapters' directions alone \(.*: 0\.8\d for A and 0\.9\d for B\)\.$", text
    )
    turned = {name: LoraAdapter({k: Factors(f.B.mT, f.A.mT) for k, f in one.factors.items()}, {}, one.config)
              for name, one in sharing_a().items()}  # fmt: skip
    text = interference(turned).verdict()
    assert "'s', 't' share B (mean squared cosine 1, random spaces 0.042): they write the same directions" in text
    assert "share A" not in text


def test_the_verdict_of_random_adapters_and_of_near_ones():
    apart = {task: lora(seed, {"a": (300, 300, 8)}) for seed, task in enumerate("stu")}
    text = interference(apart).verdict()
    assert re.fullmatch(
        r"The adapters' A are as far apart as random spaces \(mean squared cosine 0.0\d+, random spaces 0.027\)\. "
        r"The adapters' B are as far apart as random spaces \(mean squared cosine 0.0\d+, random spaces 0.027\)\.",
        text,
    )
    for name, f in apart["u"].factors.items():
        apart["u"].factors = {name: Factors(torch.cat([apart["s"].factors[name].A[:3], f.A[3:]]), f.B)}
    assert "No adapters share A; 's' and 'u' come nearest (mean squared cosine 0.3" in interference(apart).verdict()


def test_nothing_is_said_of_adapters_that_have_nothing_to_compare():
    zero = {task: lora(seed, s=1.0) for seed, task in enumerate("st")}
    for one in zero.values():
        one.factors = {k: Factors(f.A, torch.zeros_like(f.B)) for k, f in one.factors.items()}
    assert interference(zero).verdict() == ""
    json.dumps(interference(zero).to_dict(), allow_nan=False)
    lone = {"s": lora(1)}
    assert interference(lone, features_of("s")[0]).verdict().startswith("RegMean (its condition is up to ")
    with pytest.raises(ValueError, match=r"one adapter shares nothing with another: give a second one, or features="):
        interference(lone)
    with pytest.raises(ValueError, match=r"the base model is compared with on features: give features=\{task: file\}"):
        interference(three(), base=Base())


def test_what_is_shared_can_be_written_as_json_and_drawn(tmp_path):
    found = interference(sharing_a(), features_of("stu", layers=WIDE)[0])
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["overlap"]["A"]["layers"]["a"]["shared"][0][1] == pytest.approx(1)
    assert content["overlap"]["B"]["mean"]["largest"][0][2] < 1 and content["overlap"]["A"]["mean"]["tsv"] < 0.9
    assert set(content["overlap"]["A"]["layers"]["a"]) == {"shared", "largest", "random", "tsv"}
    assert content["regmean"]["a"] == found.regmean["a"]._asdict() and content["verdict"] == found.verdict()
    bare = interference(sharing_a())
    assert {k: v for k, v in bare.to_dict().items() if k in ("mean", "layers", "relative_to", "off_diagonal")} == {
        "mean": None, "layers": {}, "relative_to": None, "off_diagonal": None,
    }  # fmt: skip
    lone = interference({"s": sharing_a()["s"]}, features_of("s", layers=WIDE)[0])
    for panels, maps in (({"x": found}, 3), ({"x": bare}, 2), ({"x": found, "y": bare}, 6), ({"x": lone}, 1)):
        figure = draw_interference(panels)
        drawn = [axis for part in figure.subfigs for axis in part.axes if axis.get_label() != "<colorbar>"]
        assert len(drawn) == maps and sum(axis.has_data() for axis in drawn) == maps - (len(panels) == 2)
        texts = [text.get_text() for axis in drawn for text in axis.texts]
        assert maps == 1 or texts.count("100") >= 2  # s and t, in percent
        assert maps != 2 or (texts.count("100"), len(texts)) == (2, 12)  # and none for an adapter with itself
        plot_interference(panels, tmp_path / "plot.png")


FILES, _ = features_of("stu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": {"s": FILES["s"]}}, r"interference needs features=\{task: file\} of every task, missing t, u"),
        ({"base": nn.Sequential(nn.Linear(2, 2))}, r"the base model has None at 'a', the adapters \(6, 5\)"),
        (
            {"base": nn.ModuleDict({"a": nn.Linear(5, 6), "b": nn.Linear(4, 7)})},
            r"the base model has \(7, 4\) at 'b', the adapters \(4, 7\): it is another model",
        ),
        ({"adapters": {}}, r"no adapters to merge"),
        (
            {"features": FILES | {"t": TaskFeatures("t", "tiny", "", "token")}},
            r"features of task 't' \(of tiny\) lack 2 of the 2",
        ),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        interference(**({"adapters": three(), "features": FILES} | change))
