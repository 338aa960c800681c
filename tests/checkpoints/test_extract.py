"""A fine-tuned model as a LoRA adapter of its base: stock PEFT loads it, and it merges with others."""

import json
import logging
import warnings

import pytest
import torch
import transformers
from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from osrm_peft import bake_adapter, extract_adapter, load_adapter, merge_adapters
from osrm_peft.checkpoints import extract
from osrm_peft.checkpoints import resumable as engine
from osrm_peft.io.manifest import read_manifest
from osrm_peft.merging.methods.svt import leading
from tests.helpers.checkpoints import edit, hashes, same, tensors_of
from tests.zoo.adapters import adapted, write
from tests.zoo.models import MOE, ZOO, noisy, outputs

FUSED = {"save_original_format": False}


def tuned(name, folder, only=lambda module, parameter: True, size=0.05, seed=5):
    """A fine-tuned model in a folder: some parameters some way from the base's, none of them a linear layer's bias."""
    model, generator = noisy(name, 0), torch.Generator().manual_seed(seed)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for place, parameter in model.named_parameters():
            module, leaf = modules[place.rpartition(".")[0]], place.rpartition(".")[2]
            noise = size * torch.randn(parameter.shape, generator=generator)
            if only(module, leaf) and not (leaf == "bias" and isinstance(module, (nn.Linear, Conv1D))):
                parameter += noise
    model.save_pretrained(folder, **FUSED)
    return model.eval()


def linear(module, leaf):
    return isinstance(module, (nn.Linear, Conv1D)) and leaf == "weight"


def base_of(name, folder):
    noisy(name, 0).save_pretrained(folder, **FUSED)
    return folder


def stock(name, folder):
    """Stock PEFT's model; a missing key is an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(noisy(name, 0), str(folder)).eval()
    lost = [str(one.message) for one in caught if "missing" in str(one.message).lower()]
    assert not lost, lost[0][:300]
    return model


def close(found, expected, tolerance=2e-5):
    assert float((found - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


# what a full-rank adapter cannot be: bare parameters (gpt_oss, …), and without linear layers (resnet)
WHOLE = [
    "llama", "llama_tied", "llama_classifier", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox", "opt", "bloom",
    "falcon", "mixtral", "qwen3_moe", "bert", "bert_mlm", "roberta_classifier", "distilbert", "deberta", "electra",
    "modernbert", "t5", "bart", "whisper", "vit", "llava", "qwen2_vl", "bert_questions",
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", WHOLE)
def test_at_full_rank_stock_peft_computes_what_the_tuned_model_does(name, tmp_path):
    expected = outputs(tuned(name, tmp_path / "tuned"))
    found = extract_adapter(base_of(name, tmp_path / "base"), tmp_path / "tuned", tmp_path / "out", rank=64)
    close(outputs(stock(name, tmp_path / "out")), expected)
    assert not found.lost and found.energy == pytest.approx(1)
    assert set(found.energy_kept) == set(load_adapter(tmp_path / "out").factors)


@torch.no_grad()
def test_each_expert_of_a_stack_is_a_layer_and_matrices_beside_it_are_too(tmp_path):
    expected = outputs(tuned("gpt_oss", tmp_path / "tuned", lambda module, leaf: leaf != "sinks"))
    found = extract_adapter(base_of("gpt_oss", tmp_path / "base"), tmp_path / "tuned", tmp_path / "out", rank=64)
    close(outputs(stock("gpt_oss", tmp_path / "out")), expected)
    assert not found.lost and {"experts" in name for name in found.kept} == {False}
    experts = "model.layers.0.mlp.experts"
    assert {f"{experts}.down_proj.1", f"{experts}.gate_up_proj.0", f"{experts}.down_proj_bias"} <= set(
        found.energy_kept
    )


@torch.no_grad()
def test_a_dense_layer_of_a_mixture_which_peft_takes_for_experts_is_a_parameter(tmp_path, monkeypatch):
    monkeypatch.setitem(ZOO, "dense", ("Qwen3MoeForCausalLM", MOE | {"head_dim": 8, "mlp_only_layers": [0]}))
    expected = outputs(tuned("dense", tmp_path / "tuned"))
    found = extract_adapter(base_of("dense", tmp_path / "base"), tmp_path / "tuned", tmp_path / "out", rank=64)
    close(outputs(stock("dense", tmp_path / "out")), expected)
    assert "model.layers.0.mlp.down_proj.weight" in found.energy_kept and not found.lost


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_an_expert_keeps_its_own_largest_singular_values_and_one_that_did_not_change_none(name, tmp_path):
    model, generator = noisy(name, 0), torch.Generator().manual_seed(3)
    stack = model.model.layers[0].mlp.experts.down_proj
    delta = 0.05 * torch.randn(stack[1].shape, generator=generator)
    stack[1] += delta
    model.save_pretrained(tmp_path / "tuned", **FUSED)
    found = extract_adapter(base_of(name, tmp_path / "base"), tmp_path / "tuned", tmp_path / "out", rank=2)
    adapter, layer = load_adapter(tmp_path / "out"), "model.layers.0.mlp.experts.down_proj"
    assert set(adapter.factors) == set(found.energy_kept) == {f"{layer}.0", f"{layer}.1"}
    U, S, Vh = torch.linalg.svd(delta.double(), full_matrices=False)
    nearest = U[:, :2] * S[:2] @ Vh[:2]
    close(adapter.factors[f"{layer}.1"].delta().double(), nearest.mT if name == "gpt_oss" else nearest)
    assert not adapter.factors[f"{layer}.0"].delta().any() and found.energy_kept[f"{layer}.0"] == 1
    assert found.energy == pytest.approx(float(S[:2].square().sum() / S.square().sum()), rel=1e-4)
    merged = merge_adapters({"a": tmp_path / "out", "b": tmp_path / "out"}, "average")
    close(outputs(merged.load(noisy(name, 0))), outputs(stock(name, tmp_path / "out")))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_lower_rank_keeps_the_largest_singular_values(name, tmp_path):
    tuned(name, tmp_path / "tuned", linear)
    found = extract_adapter(base_of(name, tmp_path / "base"), tmp_path / "tuned", tmp_path / "out", rank=3)
    adapter = load_adapter(tmp_path / "out")
    assert found.rank == adapter.rank == 3 and len(adapter.factors) > 4
    models = [transformers.AutoModel.from_pretrained(tmp_path / one) for one in ("base", "tuned")]
    for layer, factors in adapter.factors.items():
        if "classifier" in layer or layer.startswith("lm_head"):
            continue
        inner = layer.removeprefix(f"{models[0].base_model_prefix}.")
        before, after = (model.get_submodule(inner).weight.double() for model in models)
        delta = (after - before).mT if isinstance(models[0].get_submodule(inner), Conv1D) else after - before
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        close(factors.delta().double(), U[:, :3] * S[:3] @ Vh[:3])
        share = float(S[:3].square().sum() / S.square().sum())
        assert found.energy_kept[layer] == pytest.approx(share, rel=1e-6)


SPECTRA = {
    "noise": lambda x: x,
    "falling": lambda x: x[:, :300] @ torch.diag(torch.logspace(0, -3, 300, dtype=x.dtype)) @ x[:300],
    "of low rank": lambda x: x[:, :8] @ x[:8],
    "low rank in noise": lambda x: x[:, :40] @ x[:40] + x,
}


@pytest.mark.parametrize("rank", [1, 16, 80])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_quick_svd_of_wide_layers_has_the_energy_of_a_dense_one(spectrum, rank, monkeypatch):
    monkeypatch.setattr(extract, "_EXACT", 100)
    X = SPECTRA[spectrum](torch.randn(400, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    found, squares = extract.nearest(X, rank), torch.linalg.svdvals(X).square()
    best = float(squares[:rank].sum() / squares.sum())
    assert best - 3e-6 <= found.energy_kept <= best + 1e-9
    left = float((X - found.factors.delta()).square().sum() / X.square().sum())
    assert left == pytest.approx(1 - found.energy_kept, abs=1e-8)
    if rank <= 400 // 8:
        assert leading(X, rank).V.shape == (500, rank)


# what LoRA does not hold


def test_embeddings_norms_and_heads_that_changed_are_kept_whole(tmp_path):
    model = tuned("llama", tmp_path / "tuned")
    found = extract_adapter(base_of("llama", tmp_path / "base"), tmp_path / "tuned", tmp_path / "out", rank=2)
    adapter = load_adapter(tmp_path / "out")
    assert set(found.kept) == set(adapter.modules) == {
        "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight",
        *(f"model.layers.{i}.{at}_layernorm.weight" for i in (0, 1) for at in ("input", "post_attention")),
    }  # fmt: skip
    torch.testing.assert_close(adapter.modules["lm_head.weight"], model.lm_head.weight.data)


def test_what_did_not_change_is_not_in_the_adapter(tmp_path):
    tuned("llama", tmp_path / "tuned", lambda module, leaf: linear(module, leaf) and module.out_features == 24)
    found = extract_adapter(base_of("llama", tmp_path / "base"), tmp_path / "tuned", tmp_path / "out")
    assert {layer.rpartition(".")[2] for layer in found.energy_kept} == {"up_proj", "gate_proj"}
    assert not found.kept and not found.lost
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["gate_proj", "up_proj"] and config["modules_to_save"] is None
    assert "model.layers.0.self_attn.q_proj" in read_manifest(tmp_path / "out")["unchanged"]


def test_what_is_lost_is_named_and_measured(tmp_path, caplog):
    base, model = base_of("bert", tmp_path / "base"), tuned("bert", tmp_path / "tuned")
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.query.bias += 1
    model.save_pretrained(tmp_path / "tuned")
    states = [tensors_of(tmp_path / one) for one in ("base", "tuned")]
    changed = {name: float((states[1][name] - one).square().sum()) for name, one in states[0].items()}
    with caplog.at_level(logging.WARNING):
        found = extract_adapter(base, tmp_path / "tuned", tmp_path / "out", rank=64)
    bias = "bert.encoder.layer.0.attention.self.query.bias"
    assert found.lost == {bias: pytest.approx(changed[bias] / sum(changed.values()))}
    assert found.energy == pytest.approx(1 - found.lost[bias])
    assert f"1 tensors changed that the adapter does not hold, {found.lost[bias]:.2g} of all" in caplog.text
    made = read_manifest(tmp_path / "out")
    assert made["lost"] == found.lost and made["modules"][bias] == "lost"
    none = extract_adapter(base, tmp_path / "tuned", tmp_path / "none", rank=64, keep=["heads"])
    assert {"bert.embeddings.word_embeddings.weight", bias} <= none.lost.keys()
    assert set(none.kept) == {"classifier.weight"} | {"classifier.bias"}


@torch.no_grad()
def test_the_head_of_a_task_comes_from_a_base_without_one(tmp_path):
    model = tuned("bert", tmp_path / "tuned")
    noisy("bert", 0).bert.save_pretrained(tmp_path / "base")
    extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=64)
    adapter = load_adapter(tmp_path / "out")
    assert set(adapter.heads) == {"classifier.weight", "classifier.bias"}
    base = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    close(outputs(PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()), outputs(model))


@torch.no_grad()
def test_a_tied_head_follows_its_embedding(tmp_path):
    model = tuned("llama_tied", tmp_path / "tuned", lambda module, leaf: linear(module, leaf) or leaf == "weight")
    base = base_of("llama_tied", tmp_path / "base")
    for kinds in (["embeddings"], ["heads"]):
        found = extract_adapter(base, tmp_path / "tuned", tmp_path / kinds[0], rank=64, keep=[*kinds, "norms"])
        assert {"lm_head.weight", "model.embed_tokens.weight"} <= {*found.kept} and not found.lost
        close(outputs(stock("llama_tied", tmp_path / kinds[0])), outputs(model))


# back and forth, and merges


@pytest.mark.parametrize(
    "config",
    [{"target_modules": "all-linear"}, {"use_rslora": True, "rank_pattern": {"v_proj": 1}},
     {"modules_to_save": ["embed_tokens", "norm"]}],
    ids=str,
)  # fmt: skip
def test_a_baked_adapter_is_extracted_as_it_was(tmp_path, config):
    model = adapted("llama", **{"target_modules": ["q_proj", "v_proj"], **config})
    write(model, tmp_path / "adapter")
    base = base_of("llama", tmp_path / "base")
    baked = bake_adapter(base, tmp_path / "adapter", tmp_path / "baked")
    found = extract_adapter(base, baked, tmp_path / "out", rank=3)
    before, after = load_adapter(tmp_path / "adapter"), load_adapter(tmp_path / "out")
    assert set(before.factors) == set(after.factors)
    for layer, factors in before.factors.items():
        close(after.factors[layer].delta(), factors.delta(), 1e-5)
    same(dict(after.modules), dict(before.modules))
    assert min(found.energy_kept.values()) > 1 - 1e-9
    again = bake_adapter(base, tmp_path / "out", tmp_path / "again")
    same(tensors_of(again), tensors_of(baked), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_fine_tune_merges_with_an_adapter(tmp_path):
    base = base_of("llama", tmp_path / "base")
    tuned("llama", tmp_path / "tuned", linear)
    extract_adapter(base, tmp_path / "tuned", tmp_path / "extracted", rank=64, keep=[])
    write(adapted("llama", target_modules=["q_proj", "v_proj"]), tmp_path / "adapter", base_model=str(base))
    merged = merge_adapters(
        {"tuned": tmp_path / "extracted", "adapter": tmp_path / "adapter"}, "task_arithmetic", scale=1.0
    )
    merged.save_pretrained(tmp_path / "merged")
    deltas = {name: load_adapter(tmp_path / name) for name in ("extracted", "adapter")}
    state = tensors_of(base)
    for adapter in deltas.values():
        for layer, factors in adapter.factors.items():
            state[f"{layer}.weight"] = state[f"{layer}.weight"] + factors.delta()
    expected = noisy("llama", 0)
    expected.load_state_dict(state)
    close(outputs(stock("llama", tmp_path / "merged")), outputs(expected))


# ranks, dtypes, manifest


@pytest.mark.parametrize(("rank", "written"), [(5, 8), (9, 16)])
def test_serving_is_the_least_rank_of_servers_that_keeps_all_but_rounding(tmp_path, rank, written):
    write(adapted("llama", r=rank, target_modules=["q_proj", "o_proj"]), tmp_path / "adapter")
    base = base_of("llama", tmp_path / "base")
    baked = bake_adapter(base, tmp_path / "adapter", tmp_path / "baked")
    found = extract_adapter(base, baked, tmp_path / "out", rank="serving")
    assert found.rank == load_adapter(tmp_path / "out").rank == written
    assert list(found.serving) == [one for one in (8, 16) if one <= written]
    assert found.serving[written] > 1 - 1e-6 and min(found.energy_kept.values()) > 1 - 1e-6


def test_factors_have_the_dtype_asked_for_and_the_rest_its_own(tmp_path):
    tuned("llama", tmp_path / "tuned")
    extract_adapter(base_of("llama", tmp_path / "base"), tmp_path / "tuned", tmp_path / "out", dtype="bfloat16")
    kinds = {name: one.dtype for name, one in tensors_of(tmp_path / "out").items()}
    assert {one for name, one in kinds.items() if "lora_" in name} == {torch.bfloat16}
    assert {one for name, one in kinds.items() if "lora_" not in name} == {torch.float32}


def test_the_manifest_says_how_it_was_made(tmp_path):
    base = base_of("bert", tmp_path / "base")
    tuned("bert", tmp_path / "tuned")
    edit(tmp_path / "tuned", id2label={"0": "no", "1": "yes", "2": "perhaps"})
    found = extract_adapter(base, tmp_path / "tuned", tmp_path / "out", rank=4)
    made = read_manifest(tmp_path / "out")
    assert (made["kind"], made["method"], made["rank"], made["written_rank"]) == ("adapter", "extract", 4, 4)
    assert made["energy_kept"] == found.energy_kept and made["base_model"] == str(base)
    assert {name: one["source"] for name, one in made["inputs"].items()} == {
        "tuned": str(tmp_path / "tuned"), "base": str(base)}  # fmt: skip
    assert made["label_names"] == ["no", "yes", "perhaps"] and made["versions"]["torch"]
    assert {one.name for one in (tmp_path / "out").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "osrm_peft.json", "README.md"}  # fmt: skip
    assert "# LoRA adapter from a fine-tuned model" in (tmp_path / "out" / "README.md").read_text()


# interrupts and refusals


def test_an_interrupted_extraction_goes_on_and_is_the_same(tmp_path, monkeypatch):
    base = base_of("llama", tmp_path / "base")
    tuned("llama", tmp_path / "tuned")
    extract_adapter(base, tmp_path / "tuned", tmp_path / "whole")
    made, factors = [], extract.Extractor._factors

    def stopping(self, layer):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(layer)
        return factors(self, layer)

    with monkeypatch.context() as patch:
        patch.setattr(extract.Extractor, "_factors", stopping)
        with pytest.raises(KeyboardInterrupt):
            extract_adapter(base, tmp_path / "tuned", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileExistsError, match="holds 5 finished weight files of this"):
        extract_adapter(base, tmp_path / "tuned", tmp_path / "out")
    done = list(made)
    made.clear()
    monkeypatch.setattr(extract.Extractor, "_factors", lambda self, layer: made.append(layer) or factors(self, layer))
    extract_adapter(base, tmp_path / "tuned", tmp_path / "out", resume=True)
    assert len(made) == 14 - 5 and not set(made) & set(done)
    name = "adapter_model.safetensors"
    assert hashes(tmp_path / "out")[tmp_path / "out" / name] == hashes(tmp_path / "whole")[tmp_path / "whole" / name]


def test_a_model_that_changes_meanwhile_is_told(tmp_path, monkeypatch):
    base = base_of("llama", tmp_path / "base")
    tuned("llama", tmp_path / "tuned")
    write_shard, file = engine.write_shard, tmp_path / "tuned" / "model.safetensors"
    monkeypatch.setattr(engine, "write_shard", lambda *args: (file.touch(), write_shard(*args))[1])
    with pytest.raises(ValueError, match="the files of 'tuned' were changed while they were"):
        extract_adapter(base, tmp_path / "tuned", tmp_path / "out")


def test_the_base_itself_is_no_fine_tune(tmp_path):
    base = base_of("llama", tmp_path / "base")
    with pytest.raises(ValueError, match="the tuned model is the base: none of its tensors differs"):
        extract_adapter(base, base, tmp_path / "out")


REFUSED = {
    "another model": ("gpt2", {}, "models of different architectures"),
    "another size": ("llama", {"hidden_size": 32}, "is 16×16 in the tuned model and 32×32 in the base|other models"),
    "another vocabulary": ("llama", {"vocab_size": 43}, r"has 40 rows in the tuned model and 43 in the base: voc.*"
                                                        r"model.resize_token_embeddings\(40\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_are_not_alike_are_refused_before_any_work(case, tmp_path):
    name, fields, message = REFUSED[case]
    cls = getattr(transformers, ZOO[name][0])
    cls(cls.config_class(**ZOO[name][1] | fields)).save_pretrained(tmp_path / "base")
    tuned("llama", tmp_path / "tuned")
    with pytest.raises(ValueError, match=message):
        extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["base", "tuned"]


def test_experts_in_pieces_are_refused_with_the_way_out(tmp_path):
    for folder in ("base", "tuned"):
        noisy("mixtral", 0).save_pretrained(tmp_path / folder)
    with pytest.raises(ValueError, match=r"lies in pieces in the files .*save_original_format=False"):
        extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": "vllm"}, "rank"),
        ({"keep": ["biases"]}, "kind of keep"),
        ({"keep": "norms"}, "must be a list of kinds"),
        ({"dtype": "int8"}, "dtype"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        extract_adapter(tmp_path, tmp_path, tmp_path / "out", **options)


def test_the_command_extracts(call, tmp_path):
    base = base_of("bert", tmp_path / "base")
    tuned("bert", tmp_path / "tuned")
    given = ["extract", base, tmp_path / "tuned", "--out", tmp_path / "out"]
    said = call(*given, "--dry-run", "--keep", "norms")
    assert "13 linear layers at rank 16" in said and "changed and lost: bert.embeddings.word_embeddings.weight" in said
    assert not (tmp_path / "out").exists()
    said = call(*given, "--rank", "4")
    assert f"wrote {tmp_path}/out: rank 4" in said and "Energy kept" in said and "bert.encoder.layer.#" in said
    facts = json.loads(call(*given, "--json", "--overwrite", "--rank", "serving"))
    assert facts["written_rank"] == 16 and facts["serving"]["8"] < 1 and facts["lost"] == {}
