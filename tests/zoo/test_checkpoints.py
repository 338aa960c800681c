"""What `from_pretrained` loads, in whatever way the file has it, merges to the same weights."""

import functools
import json
import re
import shutil
from fnmatch import fnmatch

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from transformers.conversion_mapping import get_model_conversion_mapping

from osrm_peft import merge_checkpoints

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
LLAMA = SIZES | {"num_key_value_heads": 1, "max_position_embeddings": 32}
BERT = SIZES | {"max_position_embeddings": 32}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 8, "patch_size": 4}  # fmt: skip
SEQ2SEQ = {"vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
           "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32,
           "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}  # fmt: skip
MOE = LLAMA | {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8,
               "shared_expert_intermediate_size": 8}  # fmt: skip
CLIP = {"text_config": BERT | {"projection_dim": 8}, "vision_config": VISION | {"projection_dim": 8},
        "projection_dim": 8}  # fmt: skip
LLAVA = {"text_config": LLAMA | {"model_type": "llama"}, "vision_config": VISION | {"model_type": "clip_vision_model"},
         "image_token_id": 39, "vision_feature_layer": -1}  # fmt: skip
SPEECH = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
          "conv_dim": (8, 8), "conv_kernel": (3, 3), "conv_stride": (2, 2), "num_conv_pos_embeddings": 4,
          "num_conv_pos_embedding_groups": 2, "vocab_size": 12, "num_feat_extract_layers": 2}  # fmt: skip

ZOO = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama_tied": ("LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True}),
    "llama_classifier": ("LlamaForSequenceClassification", LLAMA | {"num_labels": 3}),
    "mistral": ("MistralForCausalLM", LLAMA),
    "qwen2": ("Qwen2ForCausalLM", LLAMA | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", LLAMA | {"head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", LLAMA | {"head_dim": 8}),
    "phi": ("PhiForCausalLM", LLAMA | {"num_key_value_heads": 2}),
    "phi3": ("Phi3ForCausalLM", LLAMA),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32,
                                 "bos_token_id": 1, "eos_token_id": 2}),
    "gpt_neox": ("GPTNeoXForCausalLM", BERT),
    "opt": ("OPTForCausalLM", BERT | {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    "bloom": ("BloomForCausalLM", {"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "falcon": ("FalconForCausalLM", BERT),
    "mamba": ("MambaForCausalLM", {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4,
                                   "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    "mixtral": ("MixtralForCausalLM", MOE),
    "qwen2_moe": ("Qwen2MoeForCausalLM", MOE),
    "gpt_oss": ("GptOssForCausalLM", MOE | {"head_dim": 8, "num_hidden_layers": 1}),
    "bert": ("BertForSequenceClassification", BERT | {"num_labels": 3}),
    "bert_mlm": ("BertForMaskedLM", BERT),
    "roberta": ("RobertaForMaskedLM", BERT),
    "distilbert": ("DistilBertForSequenceClassification", {"vocab_size": 40, "dim": 16, "hidden_dim": 24, "n_layers": 2,
                                                           "n_heads": 2, "max_position_embeddings": 32}),
    "deberta": ("DebertaV2ForTokenClassification", BERT),
    "electra": ("ElectraForSequenceClassification", BERT | {"embedding_size": 16}),
    "modernbert": ("ModernBertForMaskedLM", BERT | {"cls_token_id": 1, "sep_token_id": 2}),
    "t5": ("T5ForConditionalGeneration", {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1,
                                          "num_heads": 2, "decoder_start_token_id": 0}),
    "bart": ("BartForConditionalGeneration", SEQ2SEQ),
    "whisper": ("WhisperForConditionalGeneration", SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 8,
                                                              "max_target_positions": 16}),
    "wav2vec2": ("Wav2Vec2ForCTC", SPEECH),
    "hubert": ("HubertModel", SPEECH),
    "vit": ("ViTForImageClassification", VISION | {"num_labels": 3}),
    "clip": ("CLIPModel", CLIP),
    "llava": ("LlavaForConditionalGeneration", LLAVA),
}  # fmt: skip


def noisy(name, seed):
    """A tiny model of the zoo with weights of its own."""
    class_name, options = ZOO[name]
    cls = getattr(T, class_name)
    torch.manual_seed(seed)
    model = cls(cls.config_class(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model


@functools.cache
def made(name, root):
    """Folder of `a` and `b`, two such models; what is loaded from them; and its average."""
    for seed, part in enumerate("ab"):
        noisy(name, seed).save_pretrained(root / name / part)
    states = {part: loaded(name, root / name / part).state_dict() for part in "ab"}
    a, b = states.values()
    average = {key: (a[key] + b[key]) / 2 if a[key].is_floating_point() else a[key] for key in a}
    return root / name, states, average


def loaded(name, folder):
    model, info = getattr(T, ZOO[name][0]).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    return model


# ways in which files have the same model; each returns new tensors, or None where the model has no such way


def without_prefix(model, tensors):
    prefix = f"{model.base_model_prefix}."
    return {key.removeprefix(prefix): value for key, value in tensors.items()} if has(tensors, f"^{prefix}") else None


def with_prefix(model, tensors):
    return (
        {f"{model.base_model_prefix}.{key}": value for key, value in tensors.items()}
        if model.base_model is model
        else None
    )


def gamma_and_beta(model, tensors):
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    if not has(tensors, r"LayerNorm\.weight"):
        return None
    return {functools.reduce(lambda text, pair: text.replace(*pair), old.items(), key): value
            for key, value in tensors.items()}  # fmt: skip


def tied_copies(model, tensors):
    ties = {target: source for target, source in model.all_tied_weights_keys.items() if source in tensors}
    return tensors | {target: tensors[source].clone() for target, source in ties.items()} if ties else None


def tied_under_the_other_name(model, tensors):
    ties = [(target, source) for target, source in model.all_tied_weights_keys.items() if source in tensors]
    return {ties[0][0] if key == ties[0][1] else key: value for key, value in tensors.items()} if ties else None


def old_buffers(model, tensors):
    buffers = [name for name, _ in model.named_buffers()]
    more = {}
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        more["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    more |= {name: torch.arange(32)[None] for name in buffers if name.endswith("position_ids") and name not in tensors}
    return tensors | more if more else None


def old_weight_norm(model, tensors):
    names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    if not has(tensors, "parametrizations"):
        return None
    return {functools.reduce(lambda text, pair: text.replace(*pair), names.items(), key): value
            for key, value in tensors.items()}  # fmt: skip


def has(tensors, pattern):
    return any(re.search(pattern, key) for key in tensors)


WAYS = (
    without_prefix,
    with_prefix,
    gamma_and_beta,
    tied_copies,
    tied_under_the_other_name,
    old_buffers,
    old_weight_norm,
)


@functools.cache
def ways_of(name):
    """Names of the ways that a model has."""
    model = noisy(name, 0)
    tensors = {key: value for key, value in model.state_dict().items() if key not in model.all_tied_weights_keys}
    converted = ["layout_of_memory"] if get_model_conversion_mapping(model, add_legacy=False) else []
    sharded = ["sharded"] if name in ("llama_tied", "bert_mlm", "mixtral", "t5") else []
    return ["short_config", *converted, *sharded, *(way.__name__ for way in WAYS if way(model, tensors))]


def rewritten(name, folder, new, way):
    """The model in `folder` once more, written another way."""
    if way == "sharded":
        loaded(name, folder).save_pretrained(new, max_shard_size="4KB")
    elif way == "layout_of_memory":
        loaded(name, folder).save_pretrained(new, save_original_format=False)
    else:
        shutil.copytree(folder, new)
    if way == "short_config":
        config, defaults = (
            json.loads((new / "config.json").read_text()),
            getattr(T, ZOO[name][0]).config_class().to_dict(),
        )
        kept = {key: value for key, value in config.items() if key == "model_type" or value != defaults.get(key)}
        (new / "config.json").write_text(json.dumps(kept))
    changes = {one.__name__: one for one in WAYS}
    if way in changes:
        tensors = changes[way](noisy(name, 0), load_file(new / "model.safetensors"))
        if tensors is not None:
            save_file(tensors, new / "model.safetensors", {"format": "pt"})
    return new


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("zoo")


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(("name", "way"), [(name, way) for name in ZOO for way in ["as_saved", *ways_of(name)]])
def test_what_from_pretrained_loads_is_merged_to_the_same_weights(root, tmp_path, name, way):
    folder, states, expected = made(name, root)
    b = rewritten(name, folder / "b", tmp_path / "b", way) if way != "as_saved" else folder / "b"
    if way != "as_saved":
        same(loaded(name, b).state_dict(), states["b"])  # transformers reads this way
    orders = [{"b": b, "a": folder / "a"}, {"a": folder / "a", "b": b}]
    for order in orders if way in ("without_prefix", "tied_under_the_other_name") else orders[:1]:
        try:
            out = merge_checkpoints(order, tmp_path / "out")
        except ValueError as error:
            assert "two layouts of one model" in str(error) and way == "layout_of_memory", error
            anew = {part: tmp_path / f"{part}_anew" for part in order}
            for part, source in order.items():  # the way out
                loaded(name, source).save_pretrained(anew[part], save_original_format=False)
            out = merge_checkpoints(anew, tmp_path / "out")
        model = loaded(name, out)
        same(model.state_dict(), expected)
    if way == "as_saved":
        by_hand = noisy(name, 2)
        by_hand.load_state_dict(expected)
        with torch.no_grad():
            torch.testing.assert_close(outputs(model), outputs(by_hand), rtol=1e-4, atol=1e-5)


def outputs(model):
    """The first tensor that a model gives for inputs of its kind."""
    seed = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": lambda: torch.randint(3, 38, (1, 6), generator=seed),
        "input_values": lambda: torch.randn(1, 64, generator=seed),
        "input_features": lambda: torch.randn(1, 8, 16, generator=seed),
        "pixel_values": lambda: torch.randn(1, 3, 8, 8, generator=seed),
    }
    inputs = {model.main_input_name: inputs[model.main_input_name]()}
    if isinstance(model, T.CLIPModel):
        inputs["pixel_values"] = torch.randn(1, 3, 8, 8, generator=seed)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, 38, (1, 4), generator=seed)
    return model(**inputs)[0]


# a base file has the bare model, or another head: what the models lack of it is left out, what it lacks is named


@pytest.mark.parametrize(
    ("name", "other", "heads"),
    [
        ("bert", "BertModel", ["classifier*"]),
        ("bert", "BertForPreTraining", ["classifier*"]),
        ("roberta", "RobertaModel", ["lm_head*"]),
        ("distilbert", "DistilBertForMaskedLM", ["*classifier*"]),
        ("llama", "LlamaModel", ["lm_head*"]),
        ("llama_classifier", "LlamaForCausalLM", ["score*"]),
        ("llama_tied", "LlamaModel", []),
        ("gpt2", "GPT2Model", []),
        ("t5", "T5Model", []),
        ("vit", "ViTModel", ["classifier*"]),
        ("mixtral", "MixtralModel", ["lm_head*"]),
    ],
)
def test_a_base_of_another_head_is_a_base(root, tmp_path, name, other, heads):
    folder, states, _ = made(name, root)
    config = getattr(T, ZOO[name][0]).config_class(**ZOO[name][1])
    torch.manual_seed(5)
    getattr(T, other)(config).save_pretrained(tmp_path / "base")
    models = {part: folder / part for part in "ab"}
    if heads:
        with pytest.raises(ValueError, match=r"has a tensor .* has not: .* name it in heads="):
            merge_checkpoints(models, tmp_path / "out", "task_arithmetic", base=tmp_path / "base")
    out = merge_checkpoints(models, tmp_path / "out", "task_arithmetic", base=tmp_path / "base", heads=heads)
    start = getattr(T, ZOO[name][0]).from_pretrained(tmp_path / "base").state_dict()
    found = getattr(T, ZOO[name][0]).from_pretrained(out).state_dict()
    own = {key for key in start if any(fnmatch(key, pattern) for pattern in heads)}
    for key, value in start.items():
        if key not in own:
            tau = sum(states[part][key] - value for part in "ab")
            torch.testing.assert_close(found[key], value + 0.3 * tau, rtol=1e-5, atol=1e-6)
    assert len(own) < len(start) / 2
