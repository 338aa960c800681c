import json
import math

import pytest
import torch
from torch import nn

from osrm_peft import Interference, TaskFeatures, collect_features, interference, load_adapter
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
