"""An adapter baked into its base's weights is what PEFT's merge_and_unload gives, and computes what the adapter did."""

import json
import logging
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from osrm_peft import bake_adapter, load_adapter, merge_adapters
from osrm_peft.checkpoints import bake
from osrm_peft.checkpoints import resumable as engine
from osrm_peft.checkpoints.model_files import ModelFiles
from osrm_peft.io.manifest import read_manifest
from tests.helpers.checkpoints import hashes, same, tensors_of
from tests.helpers.checkpoints import write as write_checkpoint
from tests.zoo.adapters import adapted, stock, write
from tests.zoo.models import MOE, ZOO, noisy, outputs
from tests.zoo.test_adapters import EVERY, made, of

PEFT_ALONE = {  # what is not s·B·A, which PEFT's own layers merge
    "dora": of(use_dora=True),
    "dora_conv1d": of("gpt2", target_modules=["c_attn"], use_dora=True),
    "dora_embedding": of(target_modules=["embed_tokens", "q_proj"], use_dora=True),
    "dora_convolutions": of("resnet", target_modules=["convolution"], use_dora=True),
    "dora_head": of("bert", target_modules=["query"], use_dora=True, modules_to_save=["pooler"]),
    "lora_bias": of("bert", target_modules=["query"], lora_bias=True),
    "bias_all": of("bert", target_modules=["query"], bias="all"),
    "bias_lora_only": of("gpt2", target_modules=["c_attn"], bias="lora_only"),
    "trained_tokens": of(trainable_token_indices=[3, 4]),
    "trained_tokens_tied": of("llama_tied", trainable_token_indices=[3, 4]),
    "experts": of("gpt_oss", target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"]),
}
ALONE = ("t5_shared",)  # one of three tied weights: no model has both
BAKED = {name: kind for name, kind in (EVERY | PEFT_ALONE).items() if name not in ALONE}


def base_of(name, folder, dtype=torch.float32, **options):
    noisy(name, 0).to(dtype).save_pretrained(folder, **options)
    return folder


def loaded(name, folder):
    return getattr(transformers, ZOO[name][0]).from_pretrained(folder).eval()


def merged_by_peft(name, folder, base, dtype=torch.float32):
    """The state of stock PEFT's merge_and_unload."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(
            getattr(transformers, ZOO[name][0]).from_pretrained(base, dtype=dtype), folder
        )
        return model.merge_and_unload(safe_merge=True).state_dict()


@torch.no_grad()
@pytest.mark.parametrize("name", BAKED)
def test_the_baked_model_computes_what_the_adapter_computed(name, tmp_path):
    kind = BAKED[name]
    expected = outputs(made(kind, tmp_path / "adapter"))
    out = bake_adapter(base_of(kind.model, tmp_path / "base"), tmp_path / "adapter", tmp_path / "out")
    low = 2e-2 if "dtype" in kind.options else 2e-5
    found = outputs(loaded(kind.model, out))
    assert float((found - expected).abs().max()) <= low * max(1.0, float(expected.abs().max()))


LIKE_PEFT = {
    "llama": of(target_modules="all-linear"),
    "conv1d": of("gpt2", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    "head": of("bert", target_modules=["query", "value"]),
    "pooler": of("bert", target_modules=["query"], modules_to_save=["pooler"]),
    "embedding": of(target_modules=["q_proj", "embed_tokens"]),
    "rslora": of(use_rslora=True, lora_alpha=5),
    "patterns": of(rank_pattern={"v_proj": 1}, alpha_pattern={"q_proj": 5}),
    "tied": of("llama_tied"),
    "tied_both": of("llama_tied", modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "norms": of(modules_to_save=["input_layernorm", "model.norm"]),
    **{name: PEFT_ALONE[name] for name in ("dora", "lora_bias", "trained_tokens", "experts")},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LIKE_PEFT)
def test_it_is_pefts_merge_and_unload_to_rounding(name, dtype, tmp_path):
    kind = LIKE_PEFT[name]
    made(kind, tmp_path / "adapter")
    base = base_of(kind.model, tmp_path / "base", dtype)
    expected = merged_by_peft(kind.model, tmp_path / "adapter", base, dtype)
    found = loaded(kind.model, bake_adapter(base, tmp_path / "adapter", tmp_path / "out")).state_dict()
    assert {one.dtype for one in found.values() if one.is_floating_point()} == {dtype}
    step = torch.finfo(dtype).eps
    same(found, expected, rtol=2 * step, atol=2 * step)


def test_it_is_rounded_once(tmp_path):
    kind = LIKE_PEFT["llama"]
    made(kind, tmp_path / "adapter")
    base, wide = base_of("llama", tmp_path / "base", torch.bfloat16), tmp_path / "wide"
    loaded("llama", base).float().save_pretrained(wide)
    exact = tensors_of(bake_adapter(wide, tmp_path / "adapter", tmp_path / "exact"))
    found = tensors_of(bake_adapter(base, tmp_path / "adapter", tmp_path / "out"))
    same(found, {name: one.bfloat16() for name, one in exact.items()})
    asked = tensors_of(bake_adapter(base, tmp_path / "adapter", tmp_path / "asked", dtype="float32"))
    same(asked, exact)


# the scale


def pair(tmp_path, name="llama", **config):
    """A base's folder and an adapter's."""
    made(of(name, **config), tmp_path / "adapter")
    return base_of(name, tmp_path / "base"), tmp_path / "adapter"


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"modules_to_save": ["embed_tokens"]}], ids=str)
def test_a_scale_multiplies_the_task_vector(tmp_path, config):
    base, adapter = pair(tmp_path, **config)
    under, whole = tensors_of(base), tensors_of(bake_adapter(base, adapter, tmp_path / "one"))
    half = tensors_of(bake_adapter(base, adapter, tmp_path / "half", scale=-0.5))
    same(half, {name: under[name] - 0.5 * (whole[name] - under[name]) for name in under}, rtol=1e-5, atol=1e-6)
    same(tensors_of(bake_adapter(base, adapter, tmp_path / "none", scale=0.0)), under)


@pytest.mark.parametrize("dora", [False, True])
def test_heads_stay_whole_at_any_scale(tmp_path, dora):
    base, adapter = pair(tmp_path, "bert", target_modules=["query"], use_dora=dora)
    out = bake_adapter(base, adapter, tmp_path / "out", scale=0.0)
    trained, under = tensors_of(adapter), tensors_of(base)
    found = tensors_of(out)
    torch.testing.assert_close(found["classifier.weight"], trained["base_model.model.classifier.weight"])
    same({name: one for name, one in found.items() if "classifier" not in name},
         {name: one for name, one in under.items() if "classifier" not in name})  # fmt: skip


# classes, names and files


def test_the_head_of_a_task_makes_the_bare_base_a_classifier(tmp_path):
    bare = transformers.BertModel(transformers.BertConfig(**ZOO["bert_mlm"][1]))
    bare.save_pretrained(tmp_path / "base")
    base = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    expected = outputs(model.eval())
    out = bake_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["architectures"] == ["BertForSequenceClassification"]
    found = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert found.config.num_labels == 5
    torch.testing.assert_close(outputs(found), expected)
    same(tensors_of(out), found.state_dict())


def test_what_was_drawn_when_the_adapter_was_trained_is_refused(tmp_path):
    base_of("bert_mlm", tmp_path / "base")  # without a pooler
    base = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"lacks 'bert.pooler.dense.bias', which BertForSequenceClassification has"):
        bake_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_merge_is_baked_with_the_head_of_a_task(tmp_path):
    for seed, name in enumerate("ab"):
        write(adapted("bert", seed, target_modules=["query"]), tmp_path / name)
    merge_adapters({name: tmp_path / name for name in "ab"}, "average").save_pretrained(tmp_path / "merged")
    base = base_of("bert", tmp_path / "base")
    with pytest.raises(ValueError, match="merge of several tasks: say whose head to take along"):
        bake_adapter(base, tmp_path / "merged", tmp_path / "out")
    out = bake_adapter(base, tmp_path / "merged", tmp_path / "out", task="b")
    own = tensors_of(tmp_path / "b")["base_model.model.classifier.weight"]
    torch.testing.assert_close(tensors_of(out)["classifier.weight"], own)


def test_one_of_two_tied_weights_is_a_tensor_of_its_own_after_it(tmp_path, caplog):
    base, adapter = pair(tmp_path, "llama_tied", target_modules=["q_proj", "embed_tokens"])
    with caplog.at_level(logging.WARNING):
        out = bake_adapter(base, adapter, tmp_path / "out")
    assert "changes one of two tied weights: lm_head.weight is a tensor of its own now" in caplog.text
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(tensors_of(out)["lm_head.weight"], tensors_of(base)["model.embed_tokens.weight"])
    assert read_manifest(out)["untied"] == ["lm_head.weight"]


def test_new_tokens_are_rows_of_the_result(tmp_path):
    made(of(resize=3, modules_to_save=["embed_tokens", "lm_head"]), tmp_path / "adapter")
    out = bake_adapter(base_of("llama", tmp_path / "base"), tmp_path / "adapter", tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 43
    assert tensors_of(out)["lm_head.weight"].shape == (43, 16)


def test_files_are_sharded_as_the_bases_are(tmp_path):
    made(of(), tmp_path / "adapter")
    base = base_of("llama", tmp_path / "base", max_shard_size="8KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    out = bake_adapter(base, tmp_path / "adapter", tmp_path / "out")
    files = {
        folder: {name: entry.path.name for name, entry in ModelFiles(folder).tensors.items()} for folder in (base, out)
    }
    assert files[base] == files[out]


def test_tokenizer_and_settings_are_carried(tmp_path):
    base, adapter = pair(tmp_path)
    (base / "generation_config.json").write_text('{"eos_token_id": 7}')
    words = {f"w{index}": index for index in range(40)}
    for folder, template in ((base, None), (adapter, "{{ messages }}")):
        tokenizer = _tokenizer(words, template)
        tokenizer.save_pretrained(folder)
    out = bake_adapter(base, adapter, tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template == "{{ messages }}"
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 7
    out = bake_adapter(base, adapter, tmp_path / "of_base", tokenizer="base")
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template is None


def _tokenizer(words, template):
    from tokenizers import Tokenizer, models

    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template)


def test_the_manifest_says_how_it_was_made(tmp_path):
    base, adapter = pair(tmp_path)
    manifest = read_manifest(bake_adapter(base, adapter, tmp_path / "out", scale=0.5))
    assert (manifest["kind"], manifest["method"], manifest["scale"], manifest["by"]) == (
        "checkpoint", "bake", 0.5, "osrm_peft")  # fmt: skip
    assert {name: one["source"] for name, one in manifest["inputs"].items()} == {
        "base": str(base), "adapter": str(adapter)}  # fmt: skip
    assert manifest["versions"]["peft"] and manifest["crc32"].keys() == {"model.safetensors"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# A LoRA adapter in the weights of its base model" in card and "merge" not in card.split("---")[1]


# memory, interrupts and refusals


def test_no_block_holds_more_than_some_rows(tmp_path, monkeypatch):
    base, adapter = pair(tmp_path, target_modules="all-linear", modules_to_save=["embed_tokens"])
    whole = tensors_of(bake_adapter(base, adapter, tmp_path / "whole"))
    seen, rounded = [], bake.Baker._rounded
    monkeypatch.setattr(bake, "_ENTRIES", 48)
    monkeypatch.setattr(
        bake.Baker, "_rounded", lambda self, name, block, changed: seen.append(block.numel())
        or rounded(self, name, block, changed),
    )  # fmt: skip
    same(tensors_of(bake_adapter(base, adapter, tmp_path / "parts")), whole, rtol=1e-6, atol=1e-6)
    assert max(seen) <= 48


def test_an_interrupted_bake_goes_on_and_is_the_same(tmp_path, monkeypatch):
    made(of(), tmp_path / "adapter")
    base = base_of("llama", tmp_path / "base", max_shard_size="8KB")
    whole = hashes(bake_adapter(base, tmp_path / "adapter", tmp_path / "whole"))
    write_shard, written = engine.write_shard, []

    def stopping(work, maker, paths, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(paths[0].name)
        return write_shard(work, maker, paths, *rest)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(engine, "write_shard", stopping)
        with pytest.raises(KeyboardInterrupt):
            bake_adapter(base, tmp_path / "adapter", out)
    assert not out.exists()
    with pytest.raises(FileExistsError, match="holds 2 finished weight files of this merge"):
        bake_adapter(base, tmp_path / "adapter", out)
    with pytest.raises(ValueError, match="is of another merge"):
        bake_adapter(base, tmp_path / "adapter", out, scale=2.0, resume=True)
    written.clear()
    monkeypatch.setattr(engine, "write_shard", lambda work, maker, paths, *rest: written.append(paths[0].name)
                        or write_shard(work, maker, paths, *rest))  # fmt: skip
    bake_adapter(base, tmp_path / "adapter", out, resume=True)
    weights = {path.name: one for path, one in whole.items() if path.suffix == ".safetensors"}
    assert {path.name: one for path, one in hashes(out).items() if path.suffix == ".safetensors"} == weights
    assert len(written) == len(weights) - 2


def test_another_result_is_not_replaced_unasked(tmp_path):
    base, adapter = pair(tmp_path)
    out = bake_adapter(base, adapter, tmp_path / "out")
    with pytest.raises(FileExistsError, match=r"scale 1.0, not 0.5"):
        bake_adapter(base, adapter, out, scale=0.5)
    bake_adapter(base, adapter, out, scale=0.5, overwrite=True)
    with pytest.raises(FileExistsError, match="not a folder that osrm_peft wrote"):
        bake_adapter(base, adapter, base, overwrite=True)


def test_an_adapter_that_changes_meanwhile_is_told(tmp_path, monkeypatch):
    base, adapter = pair(tmp_path)
    write_shard = engine.write_shard
    monkeypatch.setattr(engine, "write_shard", lambda *args: (
        (adapter / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text() + " "),
        write_shard(*args))[1])  # fmt: skip
    with pytest.raises(ValueError, match="the files of 'adapter' were changed while they were"):
        bake_adapter(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


REFUSED = {
    "pissa": ("llama", {"init_lora_weights": "pissa"}, "which changed the base model's weights"),
    "another type": ("llama", {"peft_type": "LOHA"}, "is a LOHA adapter: only LoRA"),
    "replicated layers": ("llama", {"layer_replication": [[0, 1], [0, 1]]}, "layers are replicated"),
    "another size": ("mistral_wide", {}, "it is of another base model"),
    "another model": ("gpt2", {}, r"has no 'model.layers.0.self_attn.q_proj'.*it is of another base model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_baked_is_refused_before_any_work(case, tmp_path):
    name, fields, message = REFUSED[case]
    made(of(), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()) | fields
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    if name == "mistral_wide":
        wide = transformers.MistralConfig(**ZOO["mistral"][1] | {"hidden_size": 32})
        transformers.MistralForCausalLM(wide).save_pretrained(tmp_path / "base")
    else:
        base_of(name, tmp_path / "base")
    with pytest.raises(ValueError, match=message):
        bake_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_adapter_on_another_base_than_it_names_is_a_warning(tmp_path, caplog):
    base, adapter = pair(tmp_path)
    with caplog.at_level(logging.WARNING):
        bake_adapter(base, adapter, tmp_path / "out")
    assert "was trained on tiny/base, says its adapter_config.json" in caplog.text


def test_too_large_for_the_dtype_is_refused(tmp_path):
    base, adapter = pair(tmp_path)
    with pytest.raises(ValueError, match=r"q_proj.weight' of the result is too large for float16: give another dtype"):
        bake_adapter(base, adapter, tmp_path / "out", scale=1e7, dtype="float16")


def test_experts_one_by_one_are_refused_with_the_way_out(tmp_path):
    made(of("mixtral", target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]), tmp_path / "adapter")
    base = base_of("mixtral", tmp_path / "base")
    with pytest.raises(ValueError, match=r"in other pieces; save the base anew, .*save_original_format=False"):
        bake_adapter(base, tmp_path / "adapter", tmp_path / "out")
    whole = base_of("mixtral", tmp_path / "whole", save_original_format=False)
    expected = outputs(stock("mixtral", tmp_path / "adapter"))
    torch.testing.assert_close(outputs(loaded("mixtral", bake_adapter(whole, tmp_path / "adapter", tmp_path / "out"))),
                               expected)  # fmt: skip


@torch.no_grad()
def test_a_merge_of_experts_with_heads_is_baked_a_task_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setitem(ZOO, "classifier", ("MixtralForSequenceClassification", MOE | {"num_labels": 3}))
    kind = of("classifier", target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    folders = {task: tmp_path / task for task in "ab"}
    for seed, folder in enumerate(folders.values()):
        made(kind, folder, seed)
    merged = merge_adapters(folders, "average")
    merged.save_pretrained(tmp_path / "merged")
    base = base_of("classifier", tmp_path / "base", save_original_format=False)
    with pytest.raises(ValueError, match=r"is a merge of a, b .*load_adapter\(.*, task='a'\).save_pretrained\(FOLDER"):
        bake_adapter(base, tmp_path / "merged", tmp_path / "out")
    load_adapter(tmp_path / "merged", task="b").save_pretrained(tmp_path / "one")
    out = bake_adapter(base, tmp_path / "one", tmp_path / "out")
    torch.testing.assert_close(outputs(loaded("classifier", out)), outputs(merged.load(noisy("classifier", 0), "b")))


# 4-bit bases

TABLE = torch.linspace(-1, 1, 16)  # what a 4-bit code stands for, times the largest entry of its block of 64


def pack(folder):
    """The linear layers of a model's folder in 4 bits, as bitsandbytes stores them; returns what they stand for."""
    tensors, whole = tensors_of(folder), {}
    for name in [one for one in tensors if "_proj" in one]:
        weight = tensors.pop(name)
        blocks = weight.reshape(-1, 64)
        absmax = blocks.abs().amax(1)
        codes = (blocks[..., None] / absmax[:, None, None] - TABLE).abs().argmin(-1)
        whole[name] = (TABLE[codes] * absmax[:, None]).reshape(weight.shape)
        pairs = codes.reshape(-1, 2).to(torch.uint8)
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)}
        tensors |= {
            name: (pairs[:, :1] << 4) | pairs[:, 1:], f"{name}.absmax": absmax, f"{name}.quant_map": TABLE.clone(),
            f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
        }  # fmt: skip
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    write_checkpoint(
        folder, tensors, json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    )
    return whole


def unpacked(codes, state):
    codes = torch.cat([codes >> 4, codes & 15], 1).flatten().long()
    return (state["quant_map"][codes].reshape(-1, 64) * state["absmax"][:, None]).flatten()


def test_a_4_bit_base_is_unpacked_on_the_way(tmp_path, monkeypatch):
    base, adapter = pair(tmp_path, target_modules=["q_proj", "down_proj"])
    whole = tensors_of(base) | pack(base)
    functional = SimpleNamespace(
        QuantState=SimpleNamespace(from_dict=lambda parts, device: parts), dequantize_4bit=unpacked
    )
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(functional=functional))
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", functional)
    found = tensors_of(bake_adapter(base, adapter, tmp_path / "out"))
    plain = base_of("llama", tmp_path / "plain")
    write_checkpoint(plain, whole, json.loads((plain / "config.json").read_text()))
    same(found, tensors_of(bake_adapter(plain, adapter, tmp_path / "expected")))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert loaded("llama", tmp_path / "out")


def test_a_4_bit_base_without_bitsandbytes_is_refused_with_the_remedy(tmp_path, monkeypatch):
    base, adapter = pair(tmp_path)
    pack(base)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(
        ValueError, match=r"bitsandbytes, 4 bits: bitsandbytes unpacks them \(pip install bitsandbytes\), or"
    ):
        bake_adapter(base, adapter, tmp_path / "out")


def test_the_command_bakes(call, tmp_path):
    base, adapter = pair(tmp_path)
    said = call("bake", base, adapter, "--out", tmp_path / "out", "--dry-run")
    assert f"would write {tmp_path}/out: 21 tensors" in said and not (tmp_path / "out").exists()
    said = call("bake", base, adapter, "--out", tmp_path / "out", "--scale", "0.5")
    assert f"wrote {tmp_path}/out: 21 tensors" in said and "4 of 21 tensors are changed" in said
    same(tensors_of(tmp_path / "out"), tensors_of(bake_adapter(base, adapter, tmp_path / "same", scale=0.5)))
    facts = json.loads(call("bake", base, adapter, "--out", tmp_path / "json", "--json"))
    assert (facts["changed"], facts["by"]) == (4, "osrm_peft")
