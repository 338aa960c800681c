"""Whole checkpoints: against the methods applied to whole tensors, in stock transformers, and what is refused."""

import json
import zlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from osrm_peft import load_merged_checkpoint, merge_checkpoints
from osrm_peft.checkpoints import blocks
from osrm_peft.checkpoints.plan import CHECKPOINT_METHODS
from osrm_peft.merging.methods.registry import METHODS, Merged, taken
from osrm_peft.seeding import task_generator
from tests.helpers.checkpoints import CASES, QUICK, hashes, noisy, rewrite, same, tensors_of, write
from tests.helpers.models import TINY, make_batch

ONE_RESULT = [name for name in CASES if name != "emr"]
WEIGHTS = {"a": 1.0, "b": -0.5, "c": 2.0}


def as_matrix(tensor):
    return tensor.float().reshape(tensor.shape[0] if tensor.dim() > 1 else 1, -1)


def by_hand(models, base, method, *, weights=None, scale=None, seed=0, **options):
    """{name: tensor} of the registered method applied to the stack of each whole tensor."""
    described = METHODS[method]
    options = described.bind(options)
    scale = described.scale if scale is None else scale
    states = {task: tensors_of(folder) for task, folder in models.items()}
    under = tensors_of(base) if base else {name: torch.zeros_like(x) for name, x in next(iter(states.values())).items()}
    weights = torch.tensor([(weights or dict.fromkeys(models, 1.0))[task] for task in models])
    stacks = {}
    for name in under:
        stack = torch.stack([as_matrix(state[name]) - as_matrix(under[name]) for state in states.values()])
        if described.prepare:
            generators = [task_generator(seed, task, name) for task in models]
            stack = described.prepare(stack, generators, **taken(described.prepare, options))
        stacks[name] = stack
    given = taken(described.fn, options)
    if described.summarise:
        given["summary"] = described.summarise(list(stacks.values()), **taken(described.summarise, options))
    results = {}
    for name, stack in stacks.items():
        if described.spectral and under[name].dim() != 2:
            found = METHODS["average"].fn(stack, weights) * (1 if method == "lore" else scale)
        else:
            out = described.fn(stack, weights, **given)
            out = out if isinstance(out, Merged) else Merged(out)
            found = scale * (out.finish(out.direction) if out.finish else out.direction)
            found = found if out.offset is None else found + out.offset
        results[name] = (as_matrix(under[name]) + found).view(under[name].shape)
    return results


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base model and three others."""
    root = tmp_path_factory.mktemp("trained")
    return {name: noisy(root / name, seed) for seed, name in enumerate(("base", "a", "b", "c"))}


@pytest.fixture
def base(trained):
    return trained["base"]


@pytest.fixture
def three(trained):
    return {name: trained[name] for name in ("a", "b", "c")}


# what comes out


def test_every_method_has_a_case():
    assert set(CASES) == set(CHECKPOINT_METHODS)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("method", ONE_RESULT)
def test_the_result_is_the_method_on_whole_tensors(three, base, tmp_path, method, weights):
    options = QUICK.get(method, {})
    out = merge_checkpoints(three, tmp_path / "out", method, base=base, weights=weights, **options)
    expected = by_hand(three, base, method, weights=weights, **options)
    same(tensors_of(out), expected, rtol=1e-5, atol=1e-6)
    same(AutoModelForSequenceClassification.from_pretrained(out).state_dict(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("task_arithmetic", {"scale": -1.5}),
        ("ties", {"density": 0.6, "scale": 0.7}),
        ("ties", {"trim": "layer"}),
        ("dare", {"drop_rate": 0.9, "seed": 7}),
        ("dare_ties", {"drop_rate": 0.3, "density": 0.5, "trim": "layer"}),
        ("lore", {"mu_ratio": 0.5, "combine": "average", "max_iterations": 5}),
        ("lore", {"combine": "ties", "density": 0.4, "max_iterations": 4}),
        ("lore", {"rank_ratio": 0.2, "max_iterations": 3}),
        ("tsv", {"rank_share": 0.4}),
        ("iso", {"scale": 0.5}),
    ],
)
def test_options_scale_and_seed_are_the_methods(three, base, tmp_path, method, options):
    out = merge_checkpoints(three, tmp_path / "out", method, base=base, **options)
    same(tensors_of(out), by_hand(three, base, method, **options), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["average", "lore"])
def test_without_a_base_the_same_comes_out(three, base, tmp_path, method):
    options = QUICK.get(method, {})
    lone = merge_checkpoints(three, tmp_path / "lone", method, **options)
    based = merge_checkpoints(three, tmp_path / "based", method, base=base, **options)
    same(tensors_of(lone), tensors_of(based), rtol=1e-5, atol=1e-5)
    same(tensors_of(lone), by_hand(three, None, method, **options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", sorted(set(CASES) - {"average", "lore"}))
def test_other_methods_ask_for_a_base(three, tmp_path, method):
    with pytest.raises(ValueError, match=f"{method} merges differences from a base model: give base="):
        merge_checkpoints(three, tmp_path / "out", method)
    assert not list(tmp_path.iterdir())


def test_lore_has_no_weights_without_a_base(three, base, tmp_path):
    with pytest.raises(ValueError, match=r"lore has only with base=: leave weights out"):
        merge_checkpoints(three, tmp_path / "out", "lore", weights=WEIGHTS)
    assert merge_checkpoints(three, tmp_path / "out", "lore", weights=[1, 1, 1], max_iterations=1)
    assert merge_checkpoints(three, tmp_path / "out", "lore", weights=WEIGHTS, base=base, max_iterations=1)


@pytest.mark.parametrize("method", CASES)
def test_the_order_of_models_does_not_matter(three, base, tmp_path, method):
    turned, options = dict(reversed(three.items())), QUICK.get(method, {})
    one = merge_checkpoints(three, tmp_path / "one", method, base=base, weights=WEIGHTS, **options)
    two = merge_checkpoints(turned, tmp_path / "two", method, base=base, weights=WEIGHTS, **options)
    for folder in three if method == "emr" else [""]:
        same(tensors_of(one / folder), tensors_of(two / folder), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [name for name in ONE_RESULT if name != "iso"])
def test_one_model_is_returned_as_it_is(three, base, tmp_path, method):
    out = merge_checkpoints({"a": three["a"]}, tmp_path / "out", method, base=base, scale=1, **CASES[method])
    same(tensors_of(out), tensors_of(three["a"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ONE_RESULT)
def test_models_that_are_the_base_merge_to_it(base, tmp_path, method):
    out = merge_checkpoints({"a": base, "b": base}, tmp_path / "out", method, base=base)
    same(tensors_of(out), tensors_of(base), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("method", "options"),
    [(name, {}) for name in sorted(set(CASES) - {"lore", "tsv"})]
    + [("ties", {"trim": "layer"}), ("dare_ties", {"trim": "layer"}), ("lore", QUICK["lore"])],
)
def test_the_size_of_blocks_does_not_change_a_bit(three, base, tmp_path, monkeypatch, method, options):
    folders = three if method == "emr" else [""]
    whole = merge_checkpoints(three, tmp_path / "whole", method, base=base, weights=WEIGHTS, seed=3, **options)
    monkeypatch.setattr(blocks, "BLOCK", 100)
    parts = merge_checkpoints(three, tmp_path / "parts", method, base=base, weights=WEIGHTS, seed=3, **options)
    tolerance = 1e-6 if method == "emr" else 0  # its rescalers are sums over all blocks
    for folder in folders:
        same(tensors_of(parts / folder), tensors_of(whole / folder), rtol=tolerance)


def test_dare_drops_by_seed_task_and_tensor(three, base, tmp_path):
    one = merge_checkpoints(three, tmp_path / "one", "dare", base=base, scale=1.0, seed=1)
    again = merge_checkpoints(three, tmp_path / "again", "dare", base=base, scale=1.0, seed=1)
    other = merge_checkpoints(three, tmp_path / "other", "dare", base=base, scale=1.0, seed=2)
    assert hashes(one).keys() != hashes(again).keys()
    same(tensors_of(one), tensors_of(again))
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    assert not torch.equal(tensors_of(one)[name], tensors_of(other)[name])


def test_the_threshold_of_ties_is_over_the_whole_model(tmp_path):
    base = write(tmp_path / "base", {"large": torch.zeros(4, 5), "small": torch.zeros(20)})
    a = write(tmp_path / "a", {"large": torch.arange(20.0).view(4, 5) + 100, "small": torch.arange(20.0)})
    out = tensors_of(merge_checkpoints({"a": a}, tmp_path / "out", "ties", base=base, density=0.5))
    assert torch.equal(out["large"], torch.arange(20.0).view(4, 5) + 100) and not out["small"].any()
    layer = tensors_of(merge_checkpoints({"a": a}, tmp_path / "out", "ties", base=base, density=0.5, trim="layer"))
    assert (layer["large"] > 0).sum() == 10 and (layer["small"] > 0).sum() == 10


def test_weights_are_by_name_in_order_or_by_pattern(three, base, tmp_path):
    def merged(weights):
        return tensors_of(merge_checkpoints(three, tmp_path / "out", "task_arithmetic", base=base, weights=weights))

    named = merged(WEIGHTS)
    same(named, merged(list(WEIGHTS.values())))
    same(named, merged(dict(reversed(WEIGHTS.items()))))
    mixed = merged({"a": {"*layer.0*": 0.0, "*": 1.0}, "b": -0.5, "c": 2.0})
    without_a = merged({"a": 0.0, "b": -0.5, "c": 2.0})
    for name, tensor in mixed.items():
        assert torch.equal(tensor, (without_a if "layer.0" in name else named)[name])
    with pytest.raises(ValueError, match=r"no pattern of task 'a' .* matches layer 'bert\.embeddings"):
        merged({"a": {"*layer.0*": 1.0}, "b": 1.0, "c": 1.0})
    with pytest.raises(ValueError, match="sum to 0"):
        merge_checkpoints(three, tmp_path / "out", "average", weights=[1, -1, 0])


def test_tensors_of_every_shape_are_merged(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = {"scalar": (), "one": (1,), "vector": (7,), "row": (1, 5), "column": (5, 1), "matrix": (6, 4),
              "kernel": (3, 2, 2, 2), "empty": (0, 4), "no_width": (3, 0)}  # fmt: skip
    folders = {
        name: write(tmp_path / name, {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()})
        for name in ("base", "a", "b")
    }
    states = {name: tensors_of(folder) for name, folder in folders.items()}
    models = {"a": folders["a"], "b": folders["b"]}
    for method in ONE_RESULT:
        out = tensors_of(merge_checkpoints(models, tmp_path / "out", method, base=folders["base"], **CASES[method]))
        assert {name: tuple(tensor.shape) for name, tensor in out.items()} == shapes
        if method in ("average", "lore", "tsv", "iso"):
            for name in shapes if method == "average" else {"scalar", "one", "vector", "row", "column", "kernel"}:
                torch.testing.assert_close(out[name], (states["a"][name] + states["b"][name]) / 2)
    emr = merge_checkpoints(models, tmp_path / "emr", "emr", base=folders["base"])
    assert {name: tuple(tensor.shape) for name, tensor in tensors_of(emr / "b").items()} == shapes


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
        merge_checkpoints(three, tmp_path / "out", method, base=base, **QUICK.get(method, {}))
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
        out = merge_checkpoints(models, tmp_path / "out", method, base=base)
    except ValueError as error:
        assert "base" in str(error)
        return
    expected = merge_checkpoints(plain, tmp_path / "plain", method, base=base)
    same(tensors_of(out / "b" if method == "emr" else out), tensors_of(expected / "b" if method == "emr" else expected))
    sources = [about["source"] for about in json.loads((out / "osrm_peft.json").read_text())["inputs"].values()]
    assert sorted(sources) == sorted(map(str, (base, three["a"], three["b"])))


# dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_the_models_is_kept(tmp_path, dtype):
    folders = {name: noisy(tmp_path / name, seed, dtype=dtype) for seed, name in enumerate(("base", "a", "b"))}
    models = {"a": folders["a"], "b": folders["b"]}
    for method in ("average", "task_arithmetic", "lore"):
        options = QUICK.get(method, {})
        out = merge_checkpoints(models, tmp_path / "out", method, base=folders["base"], **options)
        whole = by_hand(models, folders["base"], method, **options)
        expected = {name: tensor.to(dtype) for name, tensor in whole.items()}
        same(tensors_of(out), expected, rtol=2e-2 if dtype != torch.float64 else 1e-5, atol=1e-5)
        assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
        assert AutoModelForSequenceClassification.from_pretrained(out, dtype="auto").dtype == dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_another_dtype_can_be_asked_for(three, base, tmp_path, dtype):
    out = merge_checkpoints(three, tmp_path / "out", "task_arithmetic", base=base, dtype=dtype)
    expected = by_hand(three, base, "task_arithmetic")
    tolerance = {"bfloat16": 8e-3, "float16": 1e-3}.get(dtype, 1e-6)
    same(
        tensors_of(out),
        {name: tensor.to(getattr(torch, dtype)) for name, tensor in expected.items()},
        rtol=tolerance,
        atol=1e-6,
    )
    assert AutoModelForSequenceClassification.from_pretrained(out, dtype="auto").dtype == getattr(torch, dtype)


def test_mixed_dtypes_need_a_choice(three, base, tmp_path):
    half = noisy(tmp_path / "half", 4, dtype=torch.bfloat16)
    models = {"a": three["a"], "half": half}
    message = r"is float32 in 'a', bfloat16 in 'half', .*give the dtype of the result, one of float32, bfloat16"
    with pytest.raises(ValueError, match=message):
        merge_checkpoints(models, tmp_path / "out", "ties", base=base)
    assert not (tmp_path / "out").exists()
    out = merge_checkpoints(models, tmp_path / "out", "ties", base=base, dtype="bfloat16")
    assert {tensor.dtype for tensor in tensors_of(out).values()} == {torch.bfloat16}
    on_half = merge_checkpoints({"a": three["a"], "b": three["b"]}, tmp_path / "on_half", "ties", base=half)
    assert {tensor.dtype for tensor in tensors_of(on_half).values()} == {torch.float32}
    with pytest.raises(ValueError, match="unknown dtype 'int8'"):
        merge_checkpoints(models, tmp_path / "out", "ties", base=base, dtype="int8")


def test_a_number_too_large_for_the_dtype_is_refused_by_its_tensor(tmp_path):
    model = write(tmp_path / "m", {"fine": torch.ones(3), "wide": torch.full((2, 3), 1e5)})
    with pytest.raises(ValueError, match="'wide'"):
        merge_checkpoints({"m": model}, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    assert merge_checkpoints({"m": model}, tmp_path / "out", dtype="bfloat16")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
@pytest.mark.parametrize("method", ["average", "ties", "tsv"])
def test_whole_numbers_are_copied_where_all_are_alike(tmp_path, dtype, method):
    whole = torch.tensor([[0, 1], [1, 1]]).to(dtype)
    folders = {
        name: write(tmp_path / name, {"ids": whole, "x": torch.randn(3, 3)}, {"seed": name})
        for name in ("base", "a", "b")
    }
    models = {"a": folders["a"], "b": folders["b"]}
    out = merge_checkpoints(models, tmp_path / "out", method, base=folders["base"], dtype="bfloat16")
    assert torch.equal(tensors_of(out)["ids"], whole) and tensors_of(out)["ids"].dtype == dtype
    rewrite(folders["b"], ids=torch.zeros(2, 2).to(dtype))
    with pytest.raises(ValueError, match=r"'ids' holds whole numbers, and other ones in 'b' than in 'a'"):
        merge_checkpoints(models, tmp_path / "other", method, base=folders["base"])
    assert not (tmp_path / "other").exists()


def test_whole_numbers_are_not_merged_with_floats(tmp_path):
    a, b = write(tmp_path / "a", {"x": torch.ones(3)}), write(tmp_path / "b", {"x": torch.ones(3, dtype=torch.int64)})
    for dtype in (None, "float32"):
        with pytest.raises(ValueError, match=r"'x' is float32 in 'a', int64 in 'b'"):
            merge_checkpoints({"a": a, "b": b}, tmp_path / "out", dtype=dtype)


# heads


@pytest.fixture(scope="module")
def headed(tmp_path_factory):
    """Models with 2, 3 and 4 classes, and a base model with 3."""
    root = tmp_path_factory.mktemp("headed")
    models = {
        name: noisy(root / name, seed, num_labels=seed + 1) for seed, name in ((1, "two"), (2, "three"), (3, "four"))
    }
    return noisy(root / "base", 0), models


@pytest.mark.parametrize("method", ["average", "ties", "lore"])
def test_each_model_keeps_its_head(headed, tmp_path, method):
    base, models = headed
    options = QUICK.get(method, {})
    out = merge_checkpoints(models, tmp_path / "out", method, base=base, heads=["classifier*"], **options)
    body = tensors_of(out)
    assert not any(name.startswith("classifier") for name in body)
    batch = make_batch()
    for task, folder in models.items():
        own = tensors_of(folder)
        model = load_merged_checkpoint(out, task)
        assert model.num_labels == len(own["classifier.bias"]) and not model.training
        expected = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        heads = {name: own[name] for name in ("classifier.weight", "classifier.bias")}
        expected.load_state_dict(body | heads)
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, expected(**batch).logits, rtol=0, atol=0)
    with pytest.raises(FileNotFoundError, match=r"has no head 'five': it has four, three, two"):
        load_merged_checkpoint(out, "five")
    assert json.loads((out / "osrm_peft.json").read_text())["heads"] == ["classifier*"]


def test_other_heads_are_refused_with_the_way_out(headed, tmp_path):
    _, models = headed
    message = (
        r"'classifier\.(weight|bias)' is .*2.* in 'two', .* it cannot be merged \(if it is a head, name it in heads=\)"
    )
    with pytest.raises(ValueError, match=message):
        merge_checkpoints(models, tmp_path / "out")
    with pytest.raises(ValueError, match=r"heads='score\*' matches no tensor of any model"):
        merge_checkpoints(models, tmp_path / "out", heads=["classifier*", "score*"])
    assert not (tmp_path / "out").exists()


def test_a_head_that_only_one_has_must_be_named(three, base, tmp_path):
    other = write(tmp_path / "other", tensors_of(three["b"]) | {"extra.weight": torch.ones(2, 2)})
    (other / "config.json").write_bytes((three["b"] / "config.json").read_bytes())
    models = {"a": three["a"], "other": other}
    message = r"'other' has a tensor 'extra\.weight', 'a' has not: .*name it in heads="
    with pytest.raises(ValueError, match=message):
        merge_checkpoints(models, tmp_path / "out", "ties", base=base)
    out = merge_checkpoints(models, tmp_path / "out", "ties", base=base, heads=["extra*"])
    assert set(load_file(out / "heads" / "other.safetensors")) == {"extra.weight"}
    with pytest.raises(ValueError, match=r"other\.safetensors holds 'extra\.weight', which .* give another auto_class"):
        load_merged_checkpoint(out, "other")


def test_heads_of_bfloat16_models_load(tmp_path):
    models = {
        name: noisy(tmp_path / name, seed, num_labels=seed + 1, dtype=torch.bfloat16)
        for seed, name in ((1, "x"), (2, "y"))
    }
    out = merge_checkpoints(models, tmp_path / "out", heads=["classifier*"])
    model = load_merged_checkpoint(out, "y")
    assert torch.equal(model.classifier.weight.bfloat16(), tensors_of(models["y"])["classifier.weight"])


# vocabularies


def add_tokenizer(folder, tokens):
    tokenizer = Tokenizer(WordLevel({token: place for place, token in enumerate(tokens)}, unk_token=tokens[0]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=tokens[0]).save_pretrained(folder)
    return folder


TOKENS = [f"word{place}" for place in range(50)]


@pytest.fixture(scope="module")
def wordy(tmp_path_factory):
    """A model with 50 tokens, one with two more at the end, and one where two have changed places."""
    root = tmp_path_factory.mktemp("wordy")
    swapped = [TOKENS[1], TOKENS[0], *TOKENS[2:], "new0", "new1"]
    return {
        "base": add_tokenizer(noisy(root / "base", 0), TOKENS),
        "less": add_tokenizer(noisy(root / "less", 1), TOKENS),
        "more": add_tokenizer(noisy(root / "more", 2, vocab_size=52), [*TOKENS, "new0", "new1"]),
        "swapped": add_tokenizer(noisy(root / "swapped", 3, vocab_size=52), swapped),
    }


def test_other_vocabularies_are_refused_by_name(wordy, tmp_path):
    models = {name: wordy[name] for name in ("less", "more")}
    message = (
        r"'bert\.embeddings\.word_embeddings\.weight' is 50×16 in 'less', 52×16 in 'more'.*vocab='intersect' keeps"
    )
    with pytest.raises(ValueError, match=message):
        merge_checkpoints(models, tmp_path / "out")
    with pytest.raises(ValueError, match="unknown vocab 'union'"):
        merge_checkpoints(models, tmp_path / "out", vocab="union")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["average", "ties", "lore", "dare"])
@pytest.mark.parametrize("turned", [False, True])
def test_the_rows_that_all_have_are_merged(wordy, tmp_path, method, turned):
    models = {name: wordy[name] for name in (("more", "less") if turned else ("less", "more"))}
    options = QUICK.get(method, {})
    out = merge_checkpoints(models, tmp_path / "out", method, base=wordy["base"], vocab="intersect", **options)
    cut = tensors_of(wordy["more"])
    name = "bert.embeddings.word_embeddings.weight"
    cut[name] = cut[name][:50]
    (tmp_path / "cut").mkdir()
    save_file(cut, tmp_path / "cut" / "model.safetensors")
    expected = by_hand(models | {"more": tmp_path / "cut"}, wordy["base"], method, **options)
    same(tensors_of(out), expected, rtol=1e-5, atol=1e-6)
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert model.config.vocab_size == 50 and model.get_input_embeddings().weight.shape == (50, 16)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == {token: place for place, token in enumerate(TOKENS)}


def test_a_larger_base_is_cut_too(wordy, tmp_path):
    models = {"less": wordy["less"], "as_many": wordy["base"]}
    out = merge_checkpoints(models, tmp_path / "out", "average", base=wordy["more"], vocab="intersect")
    expected = by_hand(models, None, "average")
    same(tensors_of(out), expected, rtol=1e-5, atol=1e-6)


def test_tokens_that_moved_are_refused(wordy, tmp_path):
    models = {name: wordy[name] for name in ("less", "swapped")}
    with pytest.raises(ValueError, match=r"token 'word0' is 0 in .*less and 1 in 'swapped'"):
        merge_checkpoints(models, tmp_path / "out", vocab="intersect")
    assert not (tmp_path / "out").exists()


def test_heads_of_models_with_more_tokens_load(wordy, tmp_path):
    models = {name: wordy[name] for name in ("less", "more")}
    out = merge_checkpoints(models, tmp_path / "out", vocab="intersect", heads=["classifier*"])
    for name, folder in models.items():
        model = load_merged_checkpoint(out, name)
        assert model.config.vocab_size == 50
        assert torch.equal(model.classifier.weight, tensors_of(folder)["classifier.weight"])


def test_biases_of_the_vocabulary_are_cut(tmp_path):
    """A masked language model: tied embeddings, and a bias a token."""
    models = {}
    for seed, (name, size) in enumerate((("less", 50), ("more", 52))):
        torch.manual_seed(seed)
        model = BertForMaskedLM(BertConfig(**(TINY | {"vocab_size": size})))
        torch.nn.init.normal_(model.cls.predictions.bias)
        model.save_pretrained(tmp_path / name)
        models[name] = add_tokenizer(tmp_path / name, [f"word{place}" for place in range(size)])
    out = merge_checkpoints(models, tmp_path / "out", vocab="intersect")
    less, more = (tensors_of(folder)["cls.predictions.bias"] for folder in models.values())
    torch.testing.assert_close(tensors_of(out)["cls.predictions.bias"], (less + more[:50]) / 2)
    model = AutoModelForMaskedLM.from_pretrained(out)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


# models that are not alike


def gpt2(folder, seed, **config):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(**sizes, **config)).save_pretrained(folder)
    return folder


def test_tied_weights_stay_tied(tmp_path):
    models = {name: gpt2(tmp_path / name, seed) for seed, name in enumerate("ab")}
    out = merge_checkpoints(models, tmp_path / "out")
    model = GPT2LMHeadModel.from_pretrained(out)
    assert model.lm_head.weight is model.transformer.wte.weight
    expected = sum(tensors_of(folder)["transformer.wte.weight"] for folder in models.values()) / 2
    torch.testing.assert_close(model.lm_head.weight.data, expected)


def test_tied_and_untied_weights_are_not_merged(tmp_path):
    models = {"tied": gpt2(tmp_path / "tied", 0), "untied": gpt2(tmp_path / "untied", 1, tie_word_embeddings=False)}
    message = r"'tied' has tie_word_embeddings=.*, 'untied' False: models of different architectures cannot be merged"
    with pytest.raises(ValueError, match=message):
        merge_checkpoints(models, tmp_path / "out")


def test_other_architectures_are_refused(three, base, tmp_path):
    other = gpt2(tmp_path / "gpt2", 0)
    for models, under in (({"a": three["a"], "g": other}, None), ({"a": three["a"]}, other)):
        name = "base" if under else "g"
        with pytest.raises(ValueError, match=f"'a' has model_type='bert', '{name}' 'gpt2'"):
            merge_checkpoints(models, tmp_path / "out", base=under)
    wide = noisy(tmp_path / "wide", 1, intermediate_size=32)
    with pytest.raises(ValueError, match=r"'bert\.encoder\.layer\.0\.intermediate.* is .* in 'a', .*32.* in 'wide'"):
        merge_checkpoints({"a": three["a"], "wide": wide}, tmp_path / "out")
    deep = noisy(tmp_path / "deep", 1, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"'deep' has a tensor 'bert\.encoder\.layer\.2\..*', 'a' has not"):
        merge_checkpoints({"a": three["a"], "deep": deep}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_configs_that_differ_elsewhere_are_told(three, tmp_path, caplog):
    other = tmp_path / "other"
    write(other, tensors_of(three["b"]))
    config = json.loads((three["b"] / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-6, "_name_or_path": "elsewhere"}))
    merge_checkpoints({"a": three["a"], "other": other}, tmp_path / "out")
    assert "the configs of 'a' and 'other' differ in layer_norm_eps" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "fisher"}, ValueError, "unknown checkpoint method 'fisher': choose from average, dare"),
        ({"density": 0.5}, TypeError, "average has no option density"),
        ({"method": "ties", "density": 2}, ValueError, r"density=2 must lie in \(0, 1\]"),
        ({"scale": float("nan")}, ValueError, "scale=nan must be a finite number"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"weights": [1]}, ValueError, "1 weights for 2 adapters"),
        ({"weights": {"a": 1}}, ValueError, "weights name"),
        ({"base": "no/such/folder"}, FileNotFoundError, "no/such/folder"),
        ({"models": {}}, ValueError, "give at least one"),
        ({"models": ["x"]}, TypeError, "must map"),
        ({"models": {"../a": "x"}}, ValueError, "cannot be a file name"),
        ({"models": {"a": "no/such/folder"}}, FileNotFoundError, "no/such/folder"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(three, tmp_path, arguments, error, message):
    models = {name: three[name] for name in "ab"}
    with pytest.raises(error, match=message):
        merge_checkpoints(**({"models": models, "out": tmp_path / "out"} | arguments))
    assert not list(tmp_path.iterdir())
