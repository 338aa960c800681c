"""Whatever stock PEFT loads as LoRA is read to the same task vectors and modules, and what is written loads alike."""

import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from osrm_peft import load_adapter, merge_adapters
from osrm_peft.models.layers import as_weight, lora_layers
from tests.zoo.adapters import adapted, config, keys, resized, stock, write
from tests.zoo.models import ZOO, noisy, outputs

QV = ["q_proj", "v_proj"]


@dataclass(frozen=True)
class Kind:
    """A kind of adapter: the model, PEFT's config, tokens added to the base, and edits of the folder.

    Attributes:
        loads: whether stock PEFT loads the edited folder; it must give what the adapter gave before the edit.
        saved: trained parameters that are modules of the pre-trained model; heads where they are a task's.
    """

    model: str = "llama"
    config: dict[str, Any] = field(default_factory=dict)
    resize: int = 0
    edits: tuple = ()
    loads: bool = True
    modules: frozenset = frozenset()
    heads: frozenset = frozenset()
    options: dict[str, Any] = field(default_factory=dict)


def of(model="llama", *edits, resize=0, loads=True, modules=(), heads=(), options=None, **config):
    config = {"target_modules": QV} | config if model.startswith("llama") else config
    return Kind(model, config, resize, edits, loads, frozenset(modules), frozenset(heads), options or {})


def wrapped(rename, model="llama", **config):
    """Names that stock PEFT does not find in an unwrapped model: it ignores the adapter with a warning."""
    return of(model, keys(rename), loads=False, **config)


def both(*modules):
    return {f"{module}.{parameter}" for module in modules for parameter in ("weight", "bias")}


def of_layers(name, *ends):
    """Parameters and buffers of a zoo model's layers whose names end so."""
    layers = (key.rpartition(".")[0] for key in noisy(name, 0).state_dict())
    return {key for layer, key in zip(layers, noisy(name, 0).state_dict(), strict=True) if layer.endswith(ends)}


HEAD, TWO_LAYERS = both("classifier"), both("classifier.dense", "classifier.out_proj")
LM_HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"
CONV = {"target_modules": ["q_proj", "k_proj"]}
OLD_PEFT = {
    "drop": ("alpha_pattern", "rank_pattern", "use_rslora", "use_dora", "lora_bias", "exclude_modules", "peft_version",
             "layers_pattern", "layers_to_transform", "megatron_config", "loftq_config", "revision", "auto_mapping"),
    "enable_lora": None, "merge_weights": False,
}  # fmt: skip

# the fields that versions of PEFT wrote
_0_2 = ("base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "lora_alpha", "lora_dropout",
        "modules_to_save", "peft_type", "r", "target_modules", "task_type")  # fmt: skip
_0_4 = (*_0_2, "auto_mapping", "init_lora_weights", "layers_pattern", "layers_to_transform", "revision")
_0_7 = (*_0_4, "alpha_pattern", "rank_pattern", "loftq_config", "megatron_config", "megatron_core", "use_rslora")
_0_10 = (*_0_7, "use_dora", "layer_replication")
_0_14 = (*_0_10, "eva_config", "exclude_modules", "lora_bias")
_0_17 = (*_0_14, "corda_config", "qalora_group_size", "target_parameters", "trainable_token_indices", "use_qalora")
FIELDS_OF_PEFT = {"0.2": _0_2, "0.4": _0_4, "0.7": _0_7, "0.10": _0_10, "0.14": _0_14, "0.17": _0_17}

# PEFT's all-linear on every architecture
ARCHITECTURES = {
    "mamba": {"target_modules": ["in_proj", "x_proj"]},
    "mixtral": {"target_modules": QV}, "qwen3_moe": {"target_modules": QV},
    "distilbert": {"target_modules": ["q_lin", "v_lin", "lin1"], "heads": both("classifier", "pre_classifier")},
    "deberta": {"target_modules": ["query_proj", "value_proj"], "heads": HEAD},
    "wav2vec2": CONV, "hubert": CONV, "resnet": {"target_modules": ["convolution"]},
    "roberta_classifier": {"target_modules": ["query"], "heads": TWO_LAYERS},
    "bert_questions": {"target_modules": ["key", "dense"], "heads": {"qa_outputs.weight", "qa_outputs.bias"}},
    "modernbert_classifier": {"target_modules": ["Wqkv", "Wi"], "heads": HEAD},
    "bert": {"heads": HEAD}, "llama_classifier": {"target_modules": "all-linear", "heads": {"score.weight"}},
    "electra": {"heads": TWO_LAYERS},
}  # fmt: skip
ARCHITECTURES = {name: of(name, **({"target_modules": "all-linear"} | ARCHITECTURES.get(name, {}))) for name in ZOO}

KINDS = {
    # what LoraConfig can say
    "rslora": of(use_rslora=True),
    "alpha": of(lora_alpha=1),
    "alpha_pattern": of(alpha_pattern={"q_proj": 5, "layers.1.self_attn.v_proj": 0.5}),
    "alpha_patterns_overlap": of(alpha_pattern={"layers.1.self_attn.v_proj": 0.5, "v_proj": 5}),  # the first counts
    "alpha_pattern_regex": of(alpha_pattern={r".*\.0\..*": 5, "^model.layers.1.self_attn.q_proj": 7}),
    "rank_pattern": of(rank_pattern={"v_proj": 1}),
    "rslora_rank_pattern": of(use_rslora=True, rank_pattern={"v_proj": 1}, alpha_pattern={"q_proj": 9}),
    "one_layer": of(layers_to_transform=[1]),
    "exclude": of(exclude_modules=["layers.0.self_attn.q_proj"]),
    "regex_targets": of(target_modules=r".*layers\.1\..*_proj"),
    "bias_all_without_biases": of(bias="all"),
    "bias_lora_only_without_biases": of(bias="lora_only"),
    "gaussian": of(init_lora_weights="gaussian"),
    "orthogonal": of(init_lora_weights="orthogonal", r=4),
    "mica": of(init_lora_weights="mica"),
    "conv1d": of("gpt2", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    "conv1d_unsaid": of("gpt2", target_modules=["c_attn"]),
    "feature_extraction": of("hubert", task_type="FEATURE_EXTRACTION", **CONV),
    "seq2seq": of("t5", task_type="SEQ_2_SEQ_LM", target_modules=["q", "wo"]),
    # embeddings
    "embedding": of(target_modules=["q_proj", "embed_tokens"]),
    "lm_head": of(target_modules=["q_proj", "lm_head"]),
    "embedding_and_lm_head": of(target_modules=["embed_tokens", "lm_head"]),
    "tied_embedding": of("llama_tied", target_modules=["q_proj", "embed_tokens"]),
    "tied_lm_head": of("llama_tied", target_modules=["q_proj", "lm_head"]),
    "tied_both": of("llama_tied", target_modules=["q_proj", "lm_head", "embed_tokens"]),
    "tied_together": of("llama_tied", target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
    "tied_together_lm_head": of("llama_tied", target_modules=["q_proj", "lm_head"], ensure_weight_tying=True),
    "gpt2_embedding": of("gpt2", target_modules=["wte", "c_attn"]),
    "bert_embedding": of("bert", target_modules=["word_embeddings", "query"], heads=HEAD),
    "t5_shared": of("t5", target_modules=["shared", "q"]),
    "copies_asked_for": of(options={"save_embedding_layers": True}),
    "copies_asked_for_bert": of("bert", target_modules=["query"], heads=HEAD, options={"save_embedding_layers": True}),
    "copies_asked_for_phi": of("phi", target_modules=["q_proj"], options={"save_embedding_layers": True}),
    "copies_asked_for_vocab_projector": of("distilbert_mlm", target_modules=["q_lin"],
                                           options={"save_embedding_layers": True}),
    "copies_asked_for_inside_of_lm_head": of("t5gemma", target_modules=["q_proj"],
                                             options={"save_embedding_layers": True}),
    "copies_asked_for_lm_loss": of("xlnet", target_modules=["layer_1"], options={"save_embedding_layers": True}),
    "new_tokens_targeted": of(target_modules=["q_proj", "embed_tokens", "lm_head"], resize=3),
    "new_tokens_unsaid": of(resize=3, options={"save_embedding_layers": True}),
    "new_tokens_tied": of("llama_tied", resize=3, options={"save_embedding_layers": True}),
    # modules trained whole
    "saves_lm_head": of(modules_to_save=["lm_head"], modules={LM_HEAD}),
    "saves_embedding": of(modules_to_save=["embed_tokens"], modules={EMBED}),
    "saves_both": of(modules_to_save=["embed_tokens", "lm_head"], modules={EMBED, LM_HEAD}),
    "saves_norms": of(modules_to_save=["input_layernorm", "model.norm"], modules={
        "model.norm.weight", *(f"model.layers.{i}.input_layernorm.weight" for i in (0, 1))}),
    "saves_new_tokens": of(modules_to_save=["embed_tokens", "lm_head"], resize=3, modules={EMBED, LM_HEAD},
                           options={"save_embedding_layers": True}),
    "saves_tied_embedding": of("llama_tied", modules_to_save=["embed_tokens"], modules={EMBED}),
    "saves_tied_lm_head": of("llama_tied", modules_to_save=["lm_head"], modules={LM_HEAD}),
    "saves_tied_together": of("llama_tied", modules_to_save=["embed_tokens"], ensure_weight_tying=True,
                              modules={EMBED, LM_HEAD}),
    "saves_tied_together_lm_head": of("llama_tied", modules_to_save=["lm_head"], ensure_weight_tying=True,
                                      modules={EMBED, LM_HEAD}),
    "saves_gpt2_embedding": of("gpt2", target_modules=["c_attn"], modules_to_save=["wte"],
                               modules={"transformer.wte.weight"}),
    "saves_pooler": of("bert", target_modules=["query"], modules_to_save=["pooler"], heads=HEAD,
                       modules=both("bert.pooler.dense")),
    "saves_batch_norms": of("resnet", target_modules=["convolution"], modules_to_save=["normalization"],
                            modules=of_layers("resnet", "normalization")),
    "saves_positions": of("clip", target_modules=["q_proj"], modules_to_save=["position_embedding"], modules={
        "text_model.embeddings.position_embedding.weight", "vision_model.embeddings.position_embedding.weight"}),
    "saves_image_projector": of("llava", target_modules=QV, modules_to_save=["multi_modal_projector"], modules=both(
        "model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2")),
    # heads
    "head_of_images": of("vit", target_modules=QV, modules_to_save=["classifier"], heads=HEAD),
    "head_of_convolutions": of("resnet", target_modules=["convolution"], modules_to_save=["classifier"],
                               heads=both("classifier.1")),
    "head_with_batch_norm": of("levit", target_modules=["queries_keys_values.linear"], modules_to_save=["classifier"],
                               heads=of_layers("levit", "classifier.linear", "classifier.batch_norm")),
    "head_of_two_layers": of("modernbert_classifier", target_modules=["Wqkv"], modules_to_save=["head"],
                             heads={*HEAD, "head.dense.weight", "head.norm.weight"}),
    "head_of_roberta": of("roberta_classifier", target_modules=["query", "dense"], heads=TWO_LAYERS),
    "head_of_roberta_out_proj": of("roberta_classifier", target_modules=["dense", "out_proj"], heads=TWO_LAYERS),
    "head_beside_a_pattern_of_exclusions": of("roberta_classifier", target_modules=["query", "dense"],
                                              exclude_modules=r".*layer\.0\..*dense", heads=TWO_LAYERS),
    "head_of_questions": of("bert_questions", target_modules=["query"], heads=both("qa_outputs")),
    "head_unsaid_seq_cls": of("bert", config(modules_to_save=None), target_modules=["query"], heads=HEAD),
    "head_unsaid_token_cls": of("deberta", config(modules_to_save=None), target_modules=["query_proj"], heads=HEAD),
    "head_unsaid_questions": of("bert_questions", config(modules_to_save=None), target_modules=["query"],
                                heads=both("qa_outputs")),
    "head_unsaid_decoder": of("llama_classifier", config(modules_to_save=None), heads={"score.weight"}),
    # how files were written
    "bfloat16": of(options={"dtype": torch.bfloat16}),
    "float16": of(options={"dtype": torch.float16}),
    "raw_state_dict": of("llama", keys(lambda key: key.replace(".weight", ".default.weight"))),
    "raw_embedding": of("llama", keys(lambda key: re.sub(r"(lora_embedding_[AB])$", r"\1.default", key)
                                      if "embedding" in key else key), target_modules=["q_proj", "embed_tokens"]),
    "no_alpha": of("llama", config(drop=["lora_alpha"]), lora_alpha=8),
    **{f"fields_of_peft_{version}": of("llama", config(only=fields)) for version, fields in FIELDS_OF_PEFT.items()},
    "fields_of_peft_0.1_more": of("llama", config(**OLD_PEFT)),
    "newer_fields": of("llama", config(a_field_of_tomorrow=None)),
    "bias_null": of("llama", config(bias=None), loads=False),
    "null_patterns": of("llama", config(rank_pattern={}, alpha_pattern={}, exclude_modules=None)),
    "compiled": wrapped(lambda key: f"_orig_mod.{key}"),
    "compiled_inside": wrapped(lambda key: key.replace("model.model.", "model._orig_mod.model.")),
    "compiled_layers": wrapped(lambda key: key.replace("self_attn", "_orig_mod.self_attn")),
    "ddp": wrapped(lambda key: f"module.{key}"),
    "ddp_inside": wrapped(lambda key: key.replace("base_model.model.", "base_model.model.module.")),
    "fsdp": wrapped(lambda key: key.replace("layers.0", "_fsdp_wrapped_module.layers.0")),
    "checkpointed": wrapped(lambda key: key.replace(".self_attn", "._checkpoint_wrapped_module.self_attn")),
    "twice_wrapped": wrapped(lambda key: f"base_model.model.{key}"),
    "no_prefix": wrapped(lambda key: key.removeprefix("base_model.model.")),
    "compiled_head": wrapped(lambda key: f"_orig_mod.{key}", "bert", target_modules=["query"], heads=HEAD),
}  # fmt: skip
EVERY = {f"all_linear_{name}": kind for name, kind in ARCHITECTURES.items()} | KINDS


def made(kind, folder, seed=1):
    """A kind's folder, and the live model that stock PEFT saved to it."""
    model = adapted(kind.model, seed, kind.resize, **kind.config)
    options = dict(kind.options)
    if "dtype" in options:
        dtype = options.pop("dtype")
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
    write(model, folder, **options)
    for change in kind.edits:
        change(folder)
    return model.float()


def close(found, expected, tolerance=2e-5):
    assert float((found - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("kind", EVERY.values(), ids=EVERY)
def test_an_adapter_is_what_stock_peft_loads(kind, tmp_path):
    live = made(kind, tmp_path / "theirs")
    expected, low = outputs(live), 2e-5 if "dtype" not in kind.options else 2e-2
    if kind.loads:
        close(outputs(stock(kind.model, tmp_path / "theirs", kind.resize)), expected, low)
    adapter = load_adapter(tmp_path / "theirs")
    layers = lora_layers(live, "default")
    assert set(adapter.factors) == set(layers)
    for name, layer in layers.items():
        delta = as_weight(layer.get_base_layer(), adapter.factors[name].delta())
        close(delta, layer.get_delta_weight("default"), low)
    assert (set(adapter.heads), set(adapter.modules)) == (set(kind.heads), set(kind.modules))
    close(outputs(adapter.attach(resized(noisy(kind.model, 0), kind.resize, 99))), expected, low)
    adapter.save_pretrained(tmp_path / "ours")
    close(outputs(stock(kind.model, tmp_path / "ours", kind.resize)), expected, low)


@torch.no_grad()
@pytest.mark.parametrize("method", ["average", "ties"])
@pytest.mark.parametrize("kind", EVERY.values(), ids=EVERY)
def test_a_merge_with_itself_is_itself_and_loads_in_stock_peft(kind, method, tmp_path):
    expected = outputs(made(kind, tmp_path / "theirs"))
    options = {"density": 1.0, "scale": 1.0} if method == "ties" else {}
    merged = merge_adapters(dict.fromkeys("xy", tmp_path / "theirs"), method, **options)
    merged.save_pretrained(tmp_path / "shared")
    alone = outputs(stock(kind.model, tmp_path / "shared", kind.resize))  # heads apart, nothing is missing
    low = 2e-2 if "dtype" in kind.options else 1e-4
    if not kind.heads:
        close(alone, expected, low)
    elif method == "average":
        load_adapter(tmp_path / "shared", task="x").save_pretrained(tmp_path / "with_head")
        close(outputs(stock(kind.model, tmp_path / "with_head", kind.resize)), expected, low)
        close(outputs(merged.load(resized(noisy(kind.model, 0), kind.resize, 99), "y")), expected, low)


def test_the_zoo_is_a_zoo():
    assert len(EVERY) >= 100
    named = {key for kind in EVERY.values() for key in kind.config}
    assert named >= {"use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "ensure_weight_tying", "bias"}
