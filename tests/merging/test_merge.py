import json
import os

import pytest
import torch
from peft import PeftModel
from scipy.sparse.linalg import ArpackError

from osrm_peft import load_adapter, merge_adapters
from osrm_peft.adapters.lora_adapter import save_head
from osrm_peft.merging.methods.average import average
from osrm_peft.merging.methods.registry import METHODS, register
from osrm_peft.merging.methods.task_arithmetic import task_arithmetic
from tests.helpers.adapters import make_adapter
from tests.helpers.lora import lora
from tests.helpers.models import make_base, make_batch


@pytest.fixture
def adapters(tmp_path):
    for seed in (1, 2):
        make_adapter(tmp_path / f"t{seed}", seed=seed, num_labels=seed + 1)
    return {f"t{seed}": str(tmp_path / f"t{seed}") for seed in (1, 2)}


def test_average_and_task_arithmetic_are_their_equations():
    tau = torch.randn(3, 4, 5, dtype=torch.float64)
    weights = torch.tensor([1.0, -2.0, 5.0], dtype=torch.float64)
    total = sum(w * t for w, t in zip(weights, tau, strict=True))
    torch.testing.assert_close(task_arithmetic(tau, weights), total)
    torch.testing.assert_close(average(tau, weights), total / 4)
    with pytest.raises(ValueError, match=r"sum to 0, so they have no average: use task_arithmetic"):
        average(tau[:2], torch.tensor([1.0, -1.0]))


def test_paper_scales_are_the_defaults():
    assert METHODS["task_arithmetic"].scale == METHODS["dare"].scale == 0.3
    assert {method.scale for name, method in METHODS.items() if name not in ("task_arithmetic", "dare")} == {1.0}


@pytest.mark.parametrize("method", ["average", "concat", "ties", "lore"])
def test_a_merge_with_a_task_s_head_is_base_weights_plus_merged_delta(adapters, method):
    merged = merge_adapters(adapters, method)
    for task, num_labels in (("t1", 2), ("t2", 3)):
        model = merged.load(make_base(num_labels), task=task)
        head = load_adapter(adapters[task]).heads
        by_hand = make_base(num_labels, seed=0)
        with torch.no_grad():
            for name, delta in merged.deltas().items():
                by_hand.get_submodule(name).weight += delta.float()
            by_hand.classifier.weight.copy_(head["classifier.weight"])
            by_hand.classifier.bias.copy_(head["classifier.bias"])
            expected = by_hand(**make_batch()).logits
            torch.testing.assert_close(model(**make_batch()).logits, expected, rtol=1e-4, atol=1e-5)
            full = model.merge_and_unload()  # full weights, by PEFT itself
            torch.testing.assert_close(full(**make_batch()).logits, expected, rtol=1e-4, atol=1e-5)
            assert not isinstance(full, PeftModel)


def test_for_task_is_an_ordinary_adapter(adapters, tmp_path):
    merged = merge_adapters(adapters, "task_arithmetic")
    merged.for_task("t2").save_pretrained(tmp_path / "out")
    stock = PeftModel.from_pretrained(make_base(3), str(tmp_path / "out")).eval()
    ours = merged.load(make_base(3), task="t2")
    torch.testing.assert_close(stock(**make_batch()).logits, ours(**make_batch()).logits)
    with pytest.raises(ValueError, match="no task 't9' was merged, only t1, t2"):
        merged.for_task("t9")


def test_the_saved_folder_holds_the_adapter_the_heads_and_the_manifest(adapters, tmp_path):
    merged = merge_adapters(adapters, "ties", density=0.5, weights={"t2": 2, "t1": 1}, rank=4)
    merged.save_pretrained(tmp_path / "out")
    files = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert files == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "heads/t1.safetensors",
        "heads/t2.safetensors",
        "osrm_peft.json",
    ]
    manifest = json.loads((tmp_path / "out/osrm_peft.json").read_text())
    assert manifest["method"] == "ties" and "2306.01708" in manifest["paper"]
    assert manifest["options"] == {"density": 0.5, "trim": "model"}
    assert manifest["weights"] == {"t1": 1, "t2": 2} and manifest["rank"] == 4 and manifest["space"] == "weight"
    assert manifest["inputs"]["t1"]["sha256"] == load_adapter(adapters["t1"]).sha256
    assert all(0 < share < 1 for share in manifest["energy_kept"].values()) and len(manifest["energy_kept"]) == 4
    for task, num_labels in (("t1", 2), ("t2", 3)):
        again = load_adapter(tmp_path / "out", task=task).attach(make_base(num_labels))
        torch.testing.assert_close(
            again(**make_batch()).logits, merged.load(make_base(num_labels), task)(**make_batch()).logits
        )
    with pytest.raises(ValueError, match="has no head 't3', only t1, t2"):
        load_adapter(tmp_path / "out", task="t3")
    with pytest.raises(ValueError, match="has no head"):
        load_adapter(tmp_path / "out", task="../heads/t1")


def test_saving_over_ours_replaces_it_whole_and_over_others_is_refused(adapters, tmp_path, monkeypatch):
    out = tmp_path / "out"
    merge_adapters(adapters, "average").save_pretrained(out)
    first = (out / "adapter_model.safetensors").read_bytes()

    def fails(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("osrm_peft.merging.merged_adapter.save_head", fails)
        with pytest.raises(OSError, match="disk full"):
            merge_adapters(adapters, "ties").save_pretrained(out, overwrite=True)
    assert (out / "adapter_model.safetensors").read_bytes() == first  # the old result is whole
    assert sorted(os.listdir(tmp_path)) == ["out", "t1", "t2"]  # and nothing half-written lies about
    merge_adapters({"t1": adapters["t1"]}, "ties").save_pretrained(out, overwrite=True)
    assert sorted(os.listdir(out / "heads")) == ["t1.safetensors"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("do not lose me")
    with pytest.raises(FileExistsError, match="is not a folder that osrm_peft wrote as 'merged'"):
        merge_adapters(adapters, "average").save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine/thesis.txt").read_text() == "do not lose me"
    assert callable(save_head)


def rebase(folder, name):
    path = f"{folder}/adapter_config.json"
    with open(path) as file:
        config = json.load(file)
    with open(path, "w") as file:
        json.dump(config | {"base_model_name_or_path": name}, file)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"method": "avg"},
            ValueError,
            r"unknown merge method 'avg': choose from average, concat, dare, dare_ties, emr, fisher, iso, lore, ",
        ),
        ({"density": 0.5}, TypeError, r"average has no option density; its options are none"),
        ({"method": "ties", "dense": 1}, TypeError, r"its options are density=0.2, trim='model'"),
        ({"weights": [1]}, ValueError, r"1 weights for 2 adapters: give one for each"),
        ({"weights": {"t1": 1}}, ValueError, r"weights name \['t1'\], the adapters are \['t1', 't2'\]"),
        ({"weights": [1, float("nan")]}, ValueError, r"weight of 't2'=nan must be a finite number"),
        ({"space": "fourier"}, ValueError, r"unknown space 'fourier': choose from auto, weight, core, knots"),
        ({"rank": 0}, ValueError, r"rank=0 must be a whole number of at least 1"),
        ({"heads": "drop"}, ValueError, r"unknown heads policy 'drop': choose from per_task, error"),
        ({"heads": "error"}, ValueError, r"t1, t2 have trained heads and heads='error'"),
        ({"adapters": {}}, ValueError, r"no adapters to merge"),
        ({"adapters": ["a", "b"]}, TypeError, r"must map task names to adapters, got a list"),
        ({"adapters": {"../x": "a"}}, ValueError, r"'../x' cannot be a file name"),
    ],
)
def test_bad_input(adapters, change, error, message):
    with pytest.raises(error, match=message):
        merge_adapters(**({"adapters": adapters, "method": "average"} | change))


def test_different_base_models_are_refused_unless_said_to_be_one(adapters):
    rebase(adapters["t2"], "other/base")
    with pytest.raises(ValueError, match=r"different base models \(t1: tiny, t2: other/base\).*base_model=NAME"):
        merge_adapters(adapters, "average")
    assert merge_adapters(adapters, "average", base_model="tiny").manifest["base_model"] == "tiny"


def test_other_widths_are_refused_with_the_layer_s_name(adapters, tmp_path):
    wide = {
        name: factors.__class__(torch.randn(4, 20), torch.randn(20, 4))
        for name, factors in load_adapter(adapters["t2"]).factors.items()
    }
    other = load_adapter(adapters["t2"])
    other.factors = wide
    with pytest.raises(ValueError, match=r"layer 'bert.*query' is 20×20 in 't2' and 16×16 in the adapters"):
        merge_adapters({"t1": adapters["t1"], "t2": other}, "average")


def test_the_result_s_targets_are_short_where_all_agree_and_full_elsewhere(adapters, tmp_path):
    same = merge_adapters(adapters, "average").for_task(None).peft_config()
    assert sorted(same.target_modules) == ["query", "value"] and same.task_type is None
    make_adapter(tmp_path / "key", seed=3, target_modules=["key"])
    mixed = merge_adapters({"t1": adapters["t1"], "key": str(tmp_path / "key")}, "average")
    assert len(mixed.for_task(None).peft_config().target_modules) == 6
    mixed.save_pretrained(tmp_path / "mixed")
    PeftModel.from_pretrained(make_base(), str(tmp_path / "mixed"))
    assert len(load_adapter(tmp_path / "mixed").factors) == 6


def test_a_live_model_merges_like_its_folder(tmp_path):
    live = make_adapter(tmp_path / "t1", seed=1)
    make_adapter(tmp_path / "t2", seed=2)
    state = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    from_live = merge_adapters({"t1": live, "t2": tmp_path / "t2"}, "ties").deltas()
    from_folder = merge_adapters({"t1": tmp_path / "t1", "t2": tmp_path / "t2"}, "ties").deltas()
    assert all(torch.equal(from_live[name], from_folder[name]) for name in from_folder)
    assert all(torch.equal(tensor, state[name]) for name, tensor in live.state_dict().items())


def test_two_methods_cannot_have_one_name():
    with pytest.raises(ValueError, match=r"merge method 'ties' is already osrm_peft.merging.methods.ties"):
        register("ties", paper="")(lambda tau, weights: tau[0])


def test_a_merge_does_not_replace_its_input_nor_files_of_others(adapters, tmp_path):
    out = tmp_path / "out"
    merged = merge_adapters(adapters, "average")
    merged.save_pretrained(out)
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds files of others \(thesis.txt\)"):
        merged.save_pretrained(out)
    with pytest.raises(FileExistsError, match="is not a folder that osrm_peft wrote as 'merged'"):
        merged.save_pretrained(adapters["t1"])
    with pytest.raises(FileExistsError, match=r"thesis.txt is a file"):
        merged.save_pretrained(out / "thesis.txt/sub")
    assert (out / "thesis.txt").read_text() == "mine" and load_adapter(adapters["t1"]).heads


def test_saving_through_a_link_replaces_what_is_behind_it(adapters, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for method in ("average", "ties"):
        merge_adapters(adapters, method).save_pretrained(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real/heads/t1.safetensors").is_file()


def test_a_merge_of_a_live_model_does_not_follow_its_training(tmp_path):
    live = make_adapter(tmp_path / "t1")
    merged, adapter = merge_adapters({"t1": live}, "average"), load_adapter(live)
    before = [merged.for_task("t1").heads["classifier.weight"].clone(), *merged.deltas().values()]
    factors = [factors.delta() for factors in adapter.factors.values()]
    with torch.no_grad():
        for parameter in live.parameters():
            parameter.zero_()
    after = [merged.for_task("t1").heads["classifier.weight"], *merged.deltas().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(a, f.delta()) for a, f in zip(factors, adapter.factors.values(), strict=True))


def test_a_merged_folder_is_merged_on_only_with_a_named_head(adapters, tmp_path):
    merge_adapters(adapters, "average").save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match=r"is a merge of several tasks: .*task=…\), one of t1, t2"):
        merge_adapters({"both": tmp_path / "out", "t1": adapters["t1"]}, "average")
    one = load_adapter(tmp_path / "out", task="t2")
    again = merge_adapters({"both": one, "t1": adapters["t1"]}, "average")
    assert again.for_task("both").heads["classifier.weight"].shape == (3, 16)


def test_a_second_load_onto_a_wrapped_base_is_refused_with_the_reason(adapters):
    merged, base = merge_adapters(adapters, "average"), make_base(2)
    merged.load(base, task="t1")
    with pytest.raises(TypeError, match="carries an adapter already"):
        merged.load(base, task="t1")


def test_numbers_of_numpy_and_torch_are_taken(adapters, tmp_path):
    numpy = pytest.importorskip("numpy")
    options = {"rank": numpy.int64(3), "scale": numpy.float32(0.5), "mu_ratio": numpy.float64(0.5)}
    merged = merge_adapters(adapters, "lore", weights=torch.tensor([1.0, 2.0]), **options)
    merged.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out/osrm_peft.json").read_text())["options"]["mu_ratio"] == 0.5


def test_an_overflow_of_the_file_s_dtype_is_refused(tmp_path):
    make_adapter(tmp_path / "half", dtype=torch.float16)
    merged = merge_adapters({"t": tmp_path / "half"}, "average", scale=1e7)
    with pytest.raises(ValueError, match=r"overflows torch.float16: lower the scale"):
        merged.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": float("nan")}, r"scale=nan must be a finite number"),
        ({"scale": "0.5"}, r"scale='0.5' must be a finite number"),
        ({"weights": "12"}, r"weights='12' must be a list"),
        ({"weights": {5.0, 1.0}}, r"weights=.* must be a list"),
        ({"rank": "8"}, r"rank='8' must be a whole number"),
        ({"rank": 2.5}, r"rank=2.5 must be a whole number"),
        ({"method": "ties", "density": "x"}, r"density='x' must lie in \(0, 1\]"),
        ({"method": "lore", "tolerance": "1e-4"}, r"tolerance='1e-4' must be a finite number"),
        ({"method": ["ties"]}, r"unknown merge method \['ties'\]"),
        ({"adapters": {1: "a"}}, r"the task name 1 cannot be a file name"),
        ({"adapters": {"a\0b": "a"}}, r"cannot be a file name"),
    ],
)
def test_values_of_the_wrong_kind(adapters, change, message):
    with pytest.raises(ValueError, match=message):
        merge_adapters(**({"adapters": adapters, "method": "average"} | change))
    with pytest.raises(ValueError, match="scale=inf"):
        merge_adapters(adapters, "average").at_scale(float("inf"))


def test_the_scale_of_rslora_follows_the_layer_s_own_rank(tmp_path):
    """α/√r with the r and α that the patterns give the layer, as stock PEFT has it."""
    patterns = {
        "rank_pattern": {"value": 2, "layer.1.attention.self.query": 9},
        "alpha_pattern": {"layer.0.attention.self.value": 5},
    }
    live = make_adapter(tmp_path / "t", use_rslora=True, **patterns)
    stock = live.merge_and_unload().state_dict()
    deltas = merge_adapters({"t": str(tmp_path / "t")}, "concat").deltas()
    assert len(deltas) == 4
    for name, delta in deltas.items():
        before = make_base().get_submodule(name).weight
        torch.testing.assert_close(before + delta.float(), stock[f"{name}.weight"], rtol=1e-5, atol=1e-6)


LARGE = [name for name, method in METHODS.items() if method.needs is None]


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize(("method", "space"), [(name, space) for name in LARGE for space in METHODS[name].spaces])
def test_weights_too_large_for_float32_are_an_error_that_names_the_layer(method, space, rank):
    """A product, a sum, or the scale overflows: no NaN, no Inf and no silent 0."""
    if METHODS[method].per_task and rank is not None:
        return
    options = {"space": "auto" if space == "factors" else space, "rank": rank}
    options |= {"dare": {"drop_rate": 0.0}, "dare_ties": {"drop_rate": 0.0}}.get(method, {})
    for size, scale in ((1e25, 1.0), (1e17, 1e30)):
        adapters = {task: lora(seed, {"fine": (6, 5, 2), "big": (6, 5, 2)}) for seed, task in enumerate("st", start=1)}
        for adapter in adapters.values():
            adapter.factors["big"].A.mul_(size)
            adapter.factors["big"].B.mul_(size / (1 if scale == 1 else 1e17))
        message = r"layer 'big': (the merged weights would be NaN or Inf in float32|its singular values were not found)"
        if method == "lore" and scale != 1:
            continue  # of two adapters it has no direction to scale
        with pytest.raises(ValueError, match=message):
            merge_adapters(adapters, method, scale=scale, **options)


@pytest.mark.parametrize("error", [torch.linalg.LinAlgError("did not converge"), ArpackError(-9)])
@pytest.mark.parametrize("method", ["tsv", "lore", "average"])
def test_an_svd_that_fails_names_the_layer(method, error, monkeypatch):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(torch.linalg, "svd", fail)
    adapters = {task: lora(seed, {"x": (6, 5, 2)}) for seed, task in enumerate("st", start=1)}
    with pytest.raises(ValueError, match=r"layer 'x': its singular values were not found \(.*\): are all weights"):
        merge_adapters(adapters, method, space="weight")
