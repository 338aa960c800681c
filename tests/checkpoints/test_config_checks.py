"""Quantised and hostile checkpoints are one line with file and field, and the way out works."""

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    BertForSequenceClassification,
    CanineConfig,
    CanineModel,
    FineGrainedFP8Config,
    LlamaConfig,
    LlamaForCausalLM,
)

from osrm_peft import merge_checkpoints
from osrm_peft.checkpoints import blocks, writing
from tests.helpers.checkpoints import LLAMA, edit, noisy, rewrite, tensors_of, write


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    return {name: noisy(root / name, seed) for seed, name in enumerate("ab", 1)}


@pytest.fixture
def folders(trained, tmp_path):
    import shutil

    return {name: shutil.copytree(folder, tmp_path / name) for name, folder in trained.items()}


def refused(folders, tmp_path, message, error=ValueError, **given):
    with pytest.raises(error, match=message) as caught:
        merge_checkpoints(folders, tmp_path / "out", **given)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    return str(caught.value)


# quantised


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_files_are_said_to_be_fp8_and_the_way_out_works(folders, tmp_path, dtype):
    file = folders["b"] / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    kind = "F8_E4M3" if dtype is torch.float8_e4m3fn else "F8_E5M2"
    message = (
        rf"b/model\.safetensors: '.*' has the dtype {kind}, which cannot be merged: the weights are FP8: save them"
    )
    assert "damaged" not in refused(folders, tmp_path, message)
    model = BertForSequenceClassification.from_pretrained(folders["b"], dtype="bfloat16")
    model.save_pretrained(tmp_path / "anew")
    assert merge_checkpoints(folders | {"b": tmp_path / "anew"}, tmp_path / "out", dtype="bfloat16").is_dir()


def test_fp8_with_scales_says_how_it_is_made_bfloat16(tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    packed = {}
    for name, tensor in tensors.items():
        if "_proj" in name:
            packed[name.replace("weight", "weight_scale_inv")] = torch.full((1, 1), 0.5)
            packed[name] = (2 * tensor).to(torch.float8_e4m3fn)
        else:
            packed[name] = tensor
    write(tmp_path / "b", packed, json.loads((tmp_path / "a" / "config.json").read_text()))
    edit(tmp_path / "b", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    folders = {name: tmp_path / name for name in "ab"}
    message = r"b/config\.json: quantization_config says 'fp8'.*FineGrainedFP8Config\(dequantize=True\)"
    refused(folders, tmp_path, message)
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "b", dtype="bfloat16", quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    model.save_pretrained(tmp_path / "anew")
    out = merge_checkpoints(folders | {"b": tmp_path / "anew"}, tmp_path / "out", dtype="float32")
    for name, tensor in tensors.items():  # FP8 has 3 bits after the point
        torch.testing.assert_close(tensors_of(out)[name], tensor, rtol=2**-4, atol=2**-10)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "mxfp4", "hqq", 3])
def test_quantised_models_are_refused_by_name(folders, tmp_path, method):
    edit(folders["b"], quantization_config={"quant_method": method, "bits": 4})
    refused(folders, tmp_path, rf"b/config\.json: quantization_config says {method!r}: quantised weights cannot be")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("x.qweight", "GPTQ or AWQ"), ("x.qzeros", "GPTQ or AWQ"), ("x.weight.absmax", "bitsandbytes"),
     ("x.SCB", "bitsandbytes"), ("x.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
     ("x.weight_packed", "compressed-tensors"),
     ("experts.gate_up_proj_blocks", "MXFP4"), ("x.weight_scale_inv", "FP8")],
)  # fmt: skip
def test_packed_weights_are_refused_though_the_configuration_says_nothing(folders, tmp_path, name, kind):
    for folder in folders.values():
        rewrite(folder, **{name: torch.ones(2, 2, dtype=torch.uint8)})
    refused(folders, tmp_path, rf"a/model\.safetensors: '{name}' is part of a quantised weight \({kind}")


@pytest.mark.parametrize("dtype", ["C64", "U16", "U32", "F4", "F8_E8M0", "F6_E2M3"])
def test_other_dtypes_of_the_format_are_no_damage(tmp_path, dtype):
    folder = write(tmp_path / "m", {"x": torch.ones(2)})
    header = json.dumps({"x": {"dtype": dtype, "shape": [2], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    assert "damaged" not in refused({"m": folder}, tmp_path, rf"'x' has the dtype {dtype}, which cannot be merged: .+")


def test_mlx_folders_are_quantised(folders, tmp_path):
    edit(folders["b"], quantization={"group_size": 64, "bits": 4})
    refused(folders, tmp_path, r"b/config\.json: quantization says 'MLX': quantised weights cannot be merged")


# other files than were meant


def test_other_folders_say_what_they_are(folders, tmp_path):
    weights = folders["b"] / "model.safetensors"
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    refused(folders, tmp_path, r"b/model\.safetensors: a Git LFS pointer, not the weights: run `git lfs pull`")
    weights.rename(folders["b"] / "weights.gguf")
    refused(folders, tmp_path, "holds GGUF weights, which are not merged: save them anew")
    (folders["b"] / "checkpoint-500").mkdir()
    (folders["b"] / "config.json").rename(folders["b"] / "checkpoint-500" / "config.json")
    refused(
        folders, tmp_path, r"holds no config\.json: give one of the models in it, checkpoint-500", FileNotFoundError
    )
    (folders["b"] / "adapter_config.json").write_text("{}")
    refused(folders, tmp_path, r"it is an adapter, which merge_adapters \(osrm-peft merge\) merges", FileNotFoundError)


def test_a_disk_that_is_full_when_heads_are_written_is_one_error(folders, tmp_path, monkeypatch):
    def failing(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(writing, "save_file", failing)
        refused(
            folders, tmp_path, r"heads/a\.safetensors could not be written .*resume", OSError, heads=["classifier*"]
        )
    assert merge_checkpoints(folders, tmp_path / "out", heads=["classifier*"], resume=True).is_dir()


# fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": 3}, r"model_type is 3, and should be of type str"),
        ({"model_type": ["bert"]}, r"model_type is \['bert'\], and should be"),
        ({"architectures": "BertModel"}, r"architectures is 'BertModel', and should be a list of names"),
        ({"architectures": [3]}, r"architectures is \[3\]"),
        ({"architectures": {"a": 1}}, r"architectures is"),
        ({"vocab_size": "50"}, r"vocab_size is '50', and should be of type int"),
        ({"vocab_size": True}, r"vocab_size is True"),
        ({"vocab_size": 2**70}, r"vocab_size is about 2\^70, which is no size of a model"),
        ({"tie_word_embeddings": "no"}, r"tie_word_embeddings is 'no', and should be of type bool"),
        ({"tie_word_embeddings": 1}, r"tie_word_embeddings is 1"),
        ({"num_hidden_layers": 2**70}, r"num_hidden_layers is about 2\^70"),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers is 1000000000, and the weights are \d+ tensors"),
        ({"num_attention_heads": 10**9}, r"num_attention_heads is 1000000000, and"),
        ({"text_config": {"n_layers": 10**7}}, r"text_config\.n_layers is 10000000"),
        ({"hidden_size": -(2**70)}, r"hidden_size is about 2\^70|hidden_size is"),
        ({"hidden_size": "wide"}, r"transformers cannot build BertForSequenceClassification from it \(.*hidden_size"),
        ({"hidden_size": 2**62}, r"transformers cannot build BertForSequenceClassification from it"),
        ({"hidden_size": 0, "num_attention_heads": 0}, r"transformers cannot build"),
        ({"\x1b[2J": 2**70}, r"\\x1b\[2J is about 2\^70"),
        ({"eos_token_id": {"a": 1}}, r"eos_token_id is .*, and should be a number or a list of numbers"),
        ({"pad_token_id": "none"}, r"pad_token_id is 'none'"),
        ({"deep": json.loads("[" * 60 + "]" * 60)}, r"deep is nested more than 32 levels deep"),
        ({"deep": json.loads('{"a":' * 60 + "1" + "}" * 60)}, r"deep.* is nested more than 32 levels deep"),
    ],
)
def test_fields_that_are_no_models_are_named_with_their_file(folders, tmp_path, fields, message):
    edit(folders["b"], **fields)
    refused(folders, tmp_path, rf"{folders['b'] / 'config.json'}: {message}")


@pytest.mark.parametrize("field", ["num_hash_functions", "num_hidden_layers"])
def test_a_model_without_end_is_not_built(tmp_path, field):
    """Whatever the class calls the number of what it makes."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = CanineConfig(**sizes, num_hash_buckets=16, num_hash_functions=2)
    for name in "ab":
        CanineModel(config).save_pretrained(tmp_path / name)
    edit(tmp_path / "b", **{field: 16_000 if field == "num_hidden_layers" else 10**9})
    message = (
        r"b/config\.json: transformers cannot build CanineModel from it \(more than 2\d+ modules, too many for the"
    )
    refused({name: tmp_path / name for name in "ab"}, tmp_path, message)


def test_many_experts_that_are_rows_are_no_absurd_number(folders, tmp_path):
    for folder in folders.values():
        edit(folder, num_experts=2**14)  # Doge's
    assert merge_checkpoints(folders, tmp_path / "out").is_dir()


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a":' * 100_000, '{"a": 1e99999', "\x00", '{"a": ' + "9" * 5000 + "}", "3"]
)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_files_that_are_no_json_are_named(folders, tmp_path, file, content):
    for folder in folders.values():
        (folder / file).write_text(content)
    refused(folders, tmp_path, rf"/a/{file} is damaged")


@pytest.mark.parametrize("metadata", [2**70, "x" * 10, [[]], {"total_size": 2**70}])
@pytest.mark.parametrize(
    "weight_map", [{"x": 3}, {"x": {}}, [["x"]], 2**70, {"x": "../y.safetensors"}, {"x": "a\x1b.safetensors"}]
)
def test_an_index_of_the_wrong_types_is_named(tmp_path, weight_map, metadata):
    folder = write(tmp_path / "m", {"x": torch.ones(2)})
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    about = {"metadata": metadata, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(about))
    told = refused({"m": folder}, tmp_path, r"index\.json|lacks its shard", (ValueError, FileNotFoundError))
    assert told.isprintable()


def test_whole_numbers_of_two_widths_have_a_way_out(folders, tmp_path):
    """`dtype=` is no help there."""
    rewrite(folders["a"], ids=torch.arange(3))
    rewrite(folders["b"], ids=torch.arange(3, dtype=torch.int32))
    told = refused(folders, tmp_path, r"'ids' is int64 in 'a', int32 in 'b': whole numbers are copied, not merged")
    assert "to(torch.int64)" in told and str(folders["b"] / "model.safetensors") in told
    refused(folders, tmp_path, "whole numbers are copied", dtype="float32")
    rewrite(folders["b"], ids=torch.arange(3))  # the way out
    assert torch.equal(tensors_of(merge_checkpoints(folders, tmp_path / "out"))["ids"], torch.arange(3))


@pytest.mark.parametrize(
    "error",
    [torch.linalg.LinAlgError("linalg.svd: failed to converge"), MemoryError(), RuntimeError("[enforce fail] alloc")],
)
@pytest.mark.parametrize("method", ["tsv", "average"])
def test_errors_of_the_arithmetic_name_the_tensor(folders, tmp_path, monkeypatch, error, method):
    step = "_combined" if method == "average" else "_merge"
    merge = getattr(blocks.Blocks, step)

    def failing(self, name, *rest):
        if name == "classifier.weight":
            raise error
        return merge(self, name, *rest)

    monkeypatch.setattr(blocks.Blocks, step, failing)
    message = rf"'classifier\.weight' \(3×16\) cannot be merged by {method} \(.+\): take an element-wise method"
    with pytest.raises(ValueError, match=message):
        merge_checkpoints(folders, tmp_path / "out", method, base=folders["a"])
