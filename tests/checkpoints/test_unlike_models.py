"""Checkpoints of other dtypes and of other architectures, and bad arguments."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from osrm_peft import merge_checkpoints
from tests.helpers.checkpoints import QUICK, by_hand, noisy, rewrite, same, tensors_of, write

# dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_the_models_is_kept(tmp_path, dtype):
    folders = {name: noisy(tmp_path / name, seed, dtype=dtype) for seed, name in enumerate(("base", "a", "b"))}
    models = {"a": folders["a"], "b": folders["b"]}
    for method in ("average", "task_arithmetic", "lore"):
        options = QUICK.get(method, {})
        out = merge_checkpoints(models, tmp_path / "out", method, base=folders["base"], overwrite=True, **options)
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
