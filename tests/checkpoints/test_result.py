"""What a merge of checkpoints writes: a model, or with EMR a model for each task; weight files, and the manifest."""

import json
import zlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from osrm_peft import merge_checkpoints
from tests.helpers.checkpoints import CASES, QUICK, WEIGHTS, hashes, noisy, same, tensors_of, write

# EMR: a model each


def emr_by_hand(models, base):
    states, under = {task: tensors_of(folder) for task, folder in models.items()}, tensors_of(base)
    flat = {task: torch.cat([(state[n] - under[n]).flatten() for n in under]) for task, state in states.items()}
    tau = torch.stack(list(flat.values()))
    sign = tau.sum(0).sign()
    unified = sign * torch.where(tau * sign > 0, tau.abs(), 0).amax(0)
    results = {}
    for task, one in flat.items():
        mask = one * unified > 0
        masked = one.abs().sum() / unified[mask].abs().sum() * mask * unified
        parts = masked.split([under[n].numel() for n in under])
        results[task] = {n: under[n] + part.view(under[n].shape) for n, part in zip(under, parts, strict=True)}
    return results


def test_emr_writes_a_model_for_each(three, base, tmp_path):
    out = merge_checkpoints(three, tmp_path / "out", "emr", base=base)
    for task, expected in emr_by_hand(three, base).items():
        same(tensors_of(out / task), expected, rtol=1e-4, atol=1e-5)
        same(AutoModelForSequenceClassification.from_pretrained(out / task).state_dict(), tensors_of(out / task))
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "a", "b", "c", "osrm_peft.json"]
    single = merge_checkpoints({"a": three["a"]}, tmp_path / "single", "emr", base=base)
    same(tensors_of(single / "a"), tensors_of(three["a"]), rtol=1e-5, atol=1e-6)


def test_emr_writes_whole_numbers_into_every_model(tmp_path):
    folders = {
        name: write(tmp_path / name, {"ids": torch.arange(5), "x": torch.full((3, 4), float(place))})
        for place, name in enumerate(("base", "a", "b"))
    }
    out = merge_checkpoints({n: folders[n] for n in "ab"}, tmp_path / "out", "emr", base=folders["base"])
    for task in "ab":
        assert torch.equal(tensors_of(out / task)["ids"], torch.arange(5))
        torch.testing.assert_close(tensors_of(out / task)["x"], tensors_of(folders[task])["x"])


def test_emr_keeps_heads_beside_the_models(tmp_path):
    base = noisy(tmp_path / "base", 0)
    models = {name: noisy(tmp_path / name, seed, num_labels=seed + 1) for seed, name in ((1, "x"), (2, "y"))}
    out = merge_checkpoints(models, tmp_path / "out", "emr", base=base, heads=["classifier*"])
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "heads", "osrm_peft.json", "x", "y"]
    assert set(load_file(out / "heads" / "y.safetensors")) == {"classifier.weight", "classifier.bias"}
    assert "classifier.weight" not in tensors_of(out / "y")


@pytest.mark.parametrize("name", ["heads", "osrm_peft.json", "merge_state.json"])
def test_emr_models_named_like_our_own_files_are_refused_or_kept_apart(three, base, tmp_path, name):
    models = {name: three["a"], "b": three["b"]}
    try:
        out = merge_checkpoints(models, tmp_path / "out", "emr", base=base, heads=["classifier*"])
    except ValueError as error:
        assert name in str(error)
    else:
        assert json.loads((out / "osrm_peft.json").read_text())["inputs"]
        assert tensors_of(out / name) and not (out / name / "b.safetensors").exists()


# files


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """Models of 1.6 MiB."""
    root = tmp_path_factory.mktemp("larger")
    sizes = {"vocab_size": 3000, "hidden_size": 64, "intermediate_size": 512}
    return {name: noisy(root / name, seed, **sizes) for seed, name in enumerate(("base", "a", "b"))}


@pytest.mark.parametrize("method", ["average", "ties", "emr"])
def test_shards_have_an_index_and_load(larger, tmp_path, method):
    models = {name: larger[name] for name in "ab"}
    arguments = {"base": larger["base"], "method": method}
    whole = merge_checkpoints(models, tmp_path / "whole", **arguments)
    out = merge_checkpoints(models, tmp_path / "out", shard_size=2**20, **arguments)
    for folder in ("a", "b") if method == "emr" else ("",):
        files = sorted((out / folder).glob("*.safetensors"))
        assert [file.name for file in files] == [f"model-{k:05d}-of-00002.safetensors" for k in (1, 2)]
        index = json.loads((out / folder / "model.safetensors.index.json").read_text())
        states = {file.name: load_file(file) for file in files}
        assert index["weight_map"] == {name: file for file, state in states.items() for name in state}
        sizes = [sum(tensor.nbytes for tensor in state.values()) for state in states.values()]
        assert index["metadata"]["total_size"] == sum(sizes) and max(sizes) <= 2**20
        same(tensors_of(out / folder), tensors_of(whole / folder))
        same(AutoModelForSequenceClassification.from_pretrained(out / folder).state_dict(), tensors_of(whole / folder))
        assert (whole / folder / "model.safetensors").is_file()
        assert not (whole / folder / "model.safetensors.index.json").exists()


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path):
    tensors = {"a": torch.ones(3), "big": torch.ones(600, 600), "c": torch.ones(3), "d": torch.ones(3)}
    model = write(tmp_path / "m", tensors)
    out = merge_checkpoints({"m": model}, tmp_path / "out", shard_size=2**20)
    assert [len(load_file(file)) for file in sorted(out.glob("*.safetensors"))] == [1, 1, 2]
    same(tensors_of(out), tensors)
    with pytest.raises(ValueError, match=r"shard_size=1048575 must be a whole number of at least 1048576"):
        merge_checkpoints({"m": model}, out, shard_size=2**20 - 1)


def test_sharded_models_are_read(larger, tmp_path):
    sharded = {}
    for name in "ab":
        model = AutoModelForSequenceClassification.from_pretrained(larger[name])
        model.save_pretrained(tmp_path / name, max_shard_size="700KB")
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 1
        sharded[name] = tmp_path / name
    one = merge_checkpoints(sharded, tmp_path / "one")
    two = merge_checkpoints({name: larger[name] for name in "ab"}, tmp_path / "two")
    same(tensors_of(one), tensors_of(two))


def test_shards_that_become_one_file_can_be_loaded(tmp_path):
    """A tensor of 3 bytes before one of floats: the latter may not lie at an odd place."""
    folder = tmp_path / "m"
    folder.mkdir()
    tensors = {"mask": torch.tensor([True, False, True]), "x": torch.arange(6.0).view(2, 3)}
    for place, name in enumerate(tensors, 1):
        save_file({name: tensors[name]}, folder / f"model-0000{place}-of-00002.safetensors")
    weight_map = {name: f"model-0000{place}-of-00002.safetensors" for place, name in enumerate(tensors, 1)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "bert"}')
    out = merge_checkpoints({"m": folder}, tmp_path / "out")
    with safe_open(out / "model.safetensors", framework="pt") as opened:
        same({name: opened.get_tensor(name) for name in opened.keys()}, tensors)  # noqa: SIM118
    same(load_file(out / "model.safetensors"), tensors)


def test_what_belongs_to_the_model_comes_with_it(three, base, tmp_path):
    extra = {"generation_config.json": "{}", "tokenizer.json": "[1]", "vocab.txt": "a\nb", "chat_template.jinja": "x"}
    folder = tmp_path / "base"
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for name, content in (extra | {"optimizer.pt": "large", "notes.txt": "mine"}).items():
        (folder / name).write_text(content)
    out = merge_checkpoints(three, tmp_path / "out", "ties", base=folder)
    expected = {*extra, "README.md", "config.json", "model.safetensors", "osrm_peft.json"}
    assert {path.name for path in out.iterdir()} == expected
    assert all((out / name).read_text() == content for name, content in extra.items())
    config = json.loads((out / "config.json").read_text())
    assert config == json.loads((base / "config.json").read_text()) | {"dtype": "float32"}


def test_inputs_are_untouched(three, base, tmp_path):
    before = hashes(base, *three.values())
    for method in CASES:
        merge_checkpoints(three, tmp_path / "out", method, base=base, overwrite=True, **QUICK.get(method, {}))
    assert hashes(base, *three.values()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_manifest_says_how_it_was_made(three, base, tmp_path):
    out = merge_checkpoints(three, tmp_path / "out", "ties", base=base, weights=WEIGHTS, density=0.3, seed=5)
    manifest = json.loads((out / "osrm_peft.json").read_text())
    assert manifest["kind"] == "checkpoint" and manifest["method"] == "ties" and "TIES" in manifest["paper"]
    assert manifest["options"] == {"density": 0.3, "trim": "model"}
    assert manifest["scale"] == 1.0 and manifest["seed"] == 5
    assert manifest["weights"] == {name: {"*": weight} for name, weight in WEIGHTS.items()}
    assert manifest["heads"] == [] and manifest["vocab"] == "error" and manifest["dtype"] is None
    assert {name: about["source"] for name, about in manifest["inputs"].items()} == {
        name: str(folder) for name, folder in (three | {"base": base}).items()
    }
    stat = (three["a"] / "model.safetensors").stat()
    assert manifest["inputs"]["a"]["files"] == {"model.safetensors": [stat.st_size, stat.st_mtime_ns]}
    assert manifest["crc32"] == {"model.safetensors": f"{zlib.crc32((out / 'model.safetensors').read_bytes()):08x}"}
    assert manifest["files"] == sorted(path.name for path in out.iterdir())
    assert {"python", "torch", "osrm_peft"} <= set(manifest["versions"])


def test_each_model_of_emr_has_a_manifest_with_its_checksum(three, base, tmp_path):
    out = merge_checkpoints(three, tmp_path / "out", "emr", base=base)
    for task in three:
        manifest = json.loads((out / task / "osrm_peft.json").read_text())
        crc = zlib.crc32((out / task / "model.safetensors").read_bytes())
        assert manifest["model"] == task and manifest["crc32"] == {"model.safetensors": f"{crc:08x}"}
    again = merge_checkpoints({"a": out / "a", "b": out / "b"}, tmp_path / "again")
    assert AutoModelForSequenceClassification.from_pretrained(again)


@pytest.mark.parametrize("method", ["task_arithmetic", "emr"])
def test_a_model_named_base_is_not_taken_for_the_base(three, base, tmp_path, method):
    models = {"base": three["a"], "b": three["b"]}
    plain = {"a": three["a"], "b": three["b"]}
    try:
        out = merge_checkpoints(models, tmp_path / "out", method, base=base, overwrite=True)
    except ValueError as error:
        assert "base" in str(error)
        return
    expected = merge_checkpoints(plain, tmp_path / "plain", method, base=base)
    same(tensors_of(out / "b" if method == "emr" else out), tensors_of(expected / "b" if method == "emr" else expected))
    sources = [about["source"] for about in json.loads((out / "osrm_peft.json").read_text())["inputs"].values()]
    assert sorted(sources) == sorted(map(str, (base, three["a"], three["b"])))
