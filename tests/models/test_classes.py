"""Model classes with batches as users have them: features against a hook of the test's own at the real positions."""

import importlib
import inspect
import re
from collections import namedtuple

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn.modules.module import register_module_forward_pre_hook

from osrm_peft import collect_features, interference
from osrm_peft.features.fit import check_model
from osrm_peft.models.fingerprint import input_embedding, weight_hash
from osrm_peft.models.layers import target_layers
from tests.helpers.models import GPT2, IDS, T5, TEXT, TWO

TEXT = TEXT | {"num_labels": 3}
MOE = TEXT | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
MOE |= {"shared_expert_intermediate_size": 12}
TWO = TWO | {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 40}
MELS = TWO | {"num_mel_bins": 8, "input_feat_per_channel": 8, "max_source_positions": 10, "max_target_positions": 16}
WHISPER = MELS | {"begin_suppress_tokens": None, "suppress_tokens": None}
S2T = MELS | {"conv_channels": 8, "conv_kernel_sizes": (3, 3), "num_conv_layers": 2, "max_source_positions": 40}
SOUND = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
SOUND |= {"conv_dim": (8, 8), "conv_stride": (4, 2), "conv_kernel": (8, 4), "num_feat_extract_layers": 2}
SOUND |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "num_labels": 3, "classifier_proj_size": 8}
SHORTENED = SOUND | {"add_adapter": True, "num_adapter_layers": 1, "adapter_stride": 2, "output_hidden_size": 12}
IMAGE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGE |= {"image_size": 8, "patch_size": 2, "num_labels": 3, "projection_dim": 12}
SEGFORMER = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32]}
SEGFORMER |= {"patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
CONVNEXT = {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]}
MAMBA = IDS | {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
DECODER = TEXT | {"hidden_size": 24, "is_decoder": True, "add_cross_attention": True}  # its width is another


def _llava(**_):
    vision, text = transformers.CLIPVisionConfig(**IMAGE), transformers.LlamaConfig(**TEXT)
    return transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=49)


def _clip(**_):
    return transformers.CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=12)


def _blip(**_):
    """Its decoder of text reads the images: 17 positions of either."""
    return transformers.BlipConfig(
        text_config=TEXT | {"encoder_hidden_size": 16}, vision_config=IMAGE | {"initializer_range": 0.02}
    )


def _blip2(**_):
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = transformers.OPTConfig(**sizes, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=40)
    kind = transformers.Blip2Config
    qformer = sizes | {"intermediate_size": 24, "encoder_hidden_size": 16}
    parts = {"vision_config": IMAGE | {"initializer_range": 0.02}, "qformer_config": qformer}
    return kind(**parts, text_config=text.to_dict(), num_query_tokens=16, image_token_index=49)


def _two(encoder):
    def config(**_):
        text = transformers.BertConfig(**DECODER)
        found = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder(), text)
        kind = transformers.VisionEncoderDecoderConfig if encoder is _vit else transformers.SpeechEncoderDecoderConfig
        return kind(**(found.to_dict() | IDS))

    return config


def _vit():
    return transformers.ViTConfig(**IMAGE)


def _wav2vec2():
    return transformers.Wav2Vec2Config(**SOUND)


# inputs: of which kind the batch is; labels: those of a Trainer's batch; config: how the class's config is made
Case = namedtuple("Case", "model sizes inputs labels config", defaults=("text", None, None))
CASES = {
    "llama": Case("LlamaForCausalLM", TEXT, labels="tokens"),
    "gpt2": Case("GPT2LMHeadModel", GPT2, labels="tokens"),
    "mamba": Case("MambaForCausalLM", MAMBA, labels="tokens"),
    "qwen2-moe": Case("Qwen2MoeForCausalLM", MOE, labels="tokens"),
    "bert": Case("BertForSequenceClassification", TEXT, labels="classes"),
    "roberta": Case("RobertaForTokenClassification", TEXT, labels="tokens"),
    "modernbert": Case("ModernBertForSequenceClassification", TEXT | {"cls_token_id": 1, "sep_token_id": 2}),
    "t5": Case("T5ForConditionalGeneration", T5, labels="tokens"),
    "t5-tokens": Case("T5ForTokenClassification", T5 | {"num_labels": 50}, labels="tokens"),
    "bart": Case("BartForConditionalGeneration", TWO, labels="tokens"),
    "bart-cls": Case("BartForSequenceClassification", TWO | {"num_labels": 3}, labels="classes"),
    "mbart": Case("MBartForConditionalGeneration", TWO, labels="tokens"),
    "m2m100": Case("M2M100ForConditionalGeneration", TWO, labels="tokens"),
    "marian": Case("MarianMTModel", TWO, labels="tokens"),
    "pegasus": Case("PegasusForConditionalGeneration", TWO, labels="tokens"),
    "blenderbot": Case("BlenderbotForConditionalGeneration", TWO, labels="tokens"),
    "whisper": Case("WhisperForConditionalGeneration", WHISPER, "mels", "tokens"),
    "whisper-masked": Case("WhisperForConditionalGeneration", WHISPER, "masked mels", "tokens"),
    "whisper-cls": Case("WhisperForAudioClassification", WHISPER | {"num_labels": 3}, "mels", "classes"),
    "speech2text": Case("Speech2TextForConditionalGeneration", S2T, "masked features", "tokens"),
    "hubert": Case("HubertForCTC", SOUND, "sound"),
    "hubert-masked": Case("HubertForSequenceClassification", SOUND, "masked sound", "classes"),
    "wav2vec2": Case("Wav2Vec2ForSequenceClassification", SOUND, "sound", "classes"),
    "wav2vec2-masked": Case("Wav2Vec2ForSequenceClassification", SOUND, "masked sound", "classes"),
    "wav2vec2-short": Case("Wav2Vec2ForCTC", SHORTENED, "masked sound"),
    "wavlm-masked": Case("WavLMForCTC", SOUND, "masked sound"),
    "segformer": Case("SegformerForImageClassification", SEGFORMER, "images", "classes"),
    "segformer-pixels": Case("SegformerForSemanticSegmentation", SEGFORMER | {"decoder_hidden_size": 8}, "images"),
    "convnext": Case("ConvNextForImageClassification", CONVNEXT, "images", "classes"),
    "vit": Case("ViTForImageClassification", IMAGE, "images", "classes"),
    "clip-vision": Case("CLIPVisionModel", IMAGE, "images"),
    "clip": Case("CLIPModel", {}, "text and images", None, _clip),
    "llava": Case("LlavaForConditionalGeneration", {}, "text and images", "tokens", _llava),
    "blip": Case("BlipForConditionalGeneration", {}, "text and images", None, _blip),
    "blip2": Case("Blip2ForConditionalGeneration", {}, "text and images", None, _blip2),
    "seamless": Case("SeamlessM4TForTextToText", TWO | {"hidden_size": 16}, labels="tokens"),
    "image-to-text": Case("VisionEncoderDecoderModel", {}, "images", "tokens", _two(_vit)),
    "speech-to-text": Case("SpeechEncoderDecoderModel", {}, "masked sound", "tokens", _two(_wav2vec2)),
}
TEXT_LENGTHS, LABEL_LENGTHS, SOUND_LENGTHS = (17, 9, 12), (7, 4, 6), (200, 120, 161)


def make(name, seed=0):
    torch.manual_seed(seed)
    kind = getattr(transformers, CASES[name].model)
    model = kind((CASES[name].config or kind.config_class)(**CASES[name].sizes)).eval()
    for module in model.modules():  # else much is 0, and says nothing
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            torch.nn.init.normal_(module.bias, std=0.1)
    return model


def until(lengths):
    return torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]


def batch_of(name, seed=1):
    generator, (_, _, inputs, labels, _) = torch.Generator().manual_seed(seed), CASES[name]
    real, batch = until(TEXT_LENGTHS), {}
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    if "text" in inputs:
        ids = torch.randint(3, 48, real.shape, generator=generator)
        ids[torch.arange(3), real.sum(1) - 1] = 2  # BART's classifier and CLIP look for the end of a text
        if name in ("llava", "blip2"):
            ids[:, :16], real = 49, until((17, 16, 17))
        batch |= {"input_ids": ids * real, "attention_mask": real.long()}
    if "images" in inputs:
        size = 16 if name.startswith(("seg", "conv")) else 8
        batch["pixel_values"] = draw(3, 3, size, size)
    if "sound" in inputs:
        batch["input_values"] = draw(3, max(SOUND_LENGTHS)) * until(SOUND_LENGTHS)
    if "mels" in inputs:
        batch["input_features"] = draw(3, 8, 20)
    if "features" in inputs:
        batch["input_features"] = draw(3, 20, 8)
    if "masked" in inputs:
        lengths = SOUND_LENGTHS if "sound" in inputs else (20, 11, 16)
        batch["attention_mask"] = until(lengths).long()
    if labels == "classes":
        batch["labels"] = torch.tensor([0, 1, 2])
    elif labels == "tokens":
        two = getattr(make(name).config, "is_encoder_decoder", False) and name != "t5-tokens"
        mask = until(LABEL_LENGTHS) if two else real
        batch["labels"] = torch.randint(3, 48, mask.shape, generator=generator).masked_fill(~mask, -100)
    return batch


def frames(lengths, halvings=False):
    """(b, f) bool: the frames of two convolutions, whose kernel and stride are (8, 4) and (4, 2), or which halve."""
    if halvings:
        return until([((n - 1) // 2 + 1 - 1) // 2 + 1 for n in lengths])
    return until([((n - 8) // 4 + 1 - 4) // 2 + 1 for n in lengths])


def shifted(model, labels):
    """The decoder's inputs by the function of the model's own module, as its forward uses it."""
    if hasattr(model, "_shift_right"):
        return model._shift_right(labels)
    function = importlib.import_module(type(model).__module__).shift_tokens_right
    options = {"pad_token_id": 0, "decoder_start_token_id": 2}
    return function(labels, **{key: options[key] for key in inspect.signature(function).parameters if key in options})


def kept(name, layer, x, batch):
    """(b, s) bool of this layer's input: the rule, written out for the table's models."""
    inputs, length = CASES[name].inputs, x.shape[1] if x.dim() > 2 else 1
    if layer.endswith("gru_rel_pos_linear"):  # (b, heads, s, n)
        return frames(SOUND_LENGTHS)[:, None].expand(-1, x.shape[1], -1).flatten(1)
    if x.dim() == 2 and len(x) == 3:
        return torch.ones(3, 1, dtype=torch.bool)  # pooled: one vector a sample
    crosses = re.search(r"(encoder_attn|EncDecAttention|cross_?attention)\b.*\.(k|v|k_proj|v_proj|key|value)$", layer)
    if crosses and name.startswith("blip"):
        return torch.ones(3, length, dtype=torch.bool)
    if (
        re.search(r"(^|\.)(text_)?decoder\.", layer)
        and not name.startswith("blip")
        and not crosses
        and name not in ("bart-cls", "segformer-pixels")
    ):
        return batch["labels"] != -100
    if "images" in inputs and (
        "text" not in inputs or re.search("vision|projector|qformer|language_projection", layer)
    ):
        return torch.ones(3, x[0].numel() // x.shape[-1], dtype=torch.bool)
    if inputs == "masked sound":
        found = frames(SOUND_LENGTHS)
        return found if length == found.shape[1] else until([(n + 2 - 3) // 2 + 1 for n in found.sum(1).tolist()])
    if inputs == "masked features":
        return frames((20, 11, 16), halvings=True)
    return batch["attention_mask"].bool() if "text" in inputs else torch.ones(3, length, dtype=torch.bool)


def brute_force(name, model, batch, layers):
    """{layer: [(s, n) of each sample]} from one pass with a hook of this test's."""
    given = {key: value for key, value in batch.items() if key != "labels"}
    two = getattr(model.config, "is_encoder_decoder", False)
    if two and batch.get("labels") is not None and batch["labels"].dim() == 2 and name != "t5-tokens":
        given["decoder_input_ids"] = shifted(model, batch["labels"].clone())
        given["decoder_attention_mask"] = (batch["labels"] != -100).long()
    modules, seen = {model.get_submodule(layer): layer for layer in layers}, {}

    def hook(module, args):
        if module in modules:
            layer, x = modules[module], args[0]
            keep = kept(name, layer, x, batch)
            x = x.reshape(*keep.shape, x.shape[-1])
            seen[layer] = [row[mask].double() for row, mask in zip(x, keep, strict=True)]

    with register_module_forward_pre_hook(hook), torch.no_grad():
        model(**given)
    return seen


def close(actual, expected, layer):
    assert float((actual - expected).abs().max()) <= 1e-4 * float(expected.abs().max()), layer


def state(model):
    hooks = [len(getattr(m, kind)) for m in model.modules() for kind in ("_forward_pre_hooks", "_forward_hooks")]
    kept = [(m.training, set(vars(m))) for m in model.modules()]
    return hooks, kept, [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()]


def collect(name, model, batch, statistic="token"):
    options = {"target_modules": targets(name), "progress": False, "statistic": statistic}
    return collect_features(model, [batch], task="t", **options)


def targets(name):
    """All linear layers, but for those whose weights are read without a call, or that PEFT does not take."""
    some = {"mamba": ["in_proj", "x_proj"], "wavlm-masked": ["gru_rel_pos_linear", "intermediate_dense"]}
    return some.get(name, "all-linear")


@pytest.mark.parametrize("name", CASES)
def test_a_user_s_batch_gives_the_moments_of_the_real_positions(name):
    model, batch = make(name), batch_of(name)
    brute_force(name, model, batch, [])  # transformers sets hooks of its own in a first pass
    model.train()
    next(model.parameters()).requires_grad_(False)
    before = state(model)
    found = {statistic: collect(name, model, batch, statistic) for statistic in ("token", "sample", "mean")}
    assert state(model) == before
    model.eval()
    inputs = brute_force(name, model, batch, found["token"].layers)
    assert set(inputs) == set(target_layers(model, targets(name)))
    for layer, samples in inputs.items():
        tokens, means = torch.cat(samples), torch.stack([sample.mean(0) for sample in samples])
        assert found["token"].layers[layer].count == len(tokens), layer
        assert found["sample"].layers[layer].count == len(samples) == 3, layer
        for statistic, h in (("token", tokens), ("sample", means)):
            close(found[statistic].layers[layer].mean(), h.mean(0), layer)
            close(found[statistic].layers[layer].second_moment(), h.mT @ h / len(h), layer)
        close(found["mean"].layers[layer].mean(), means.mean(0), layer)


@pytest.mark.parametrize("name", CASES)
def test_hash_and_interference_of_the_same_models(name):
    model, batch = make(name), batch_of(name)
    features = collect(name, model, batch)
    check_model(features, make(name), features.layers)
    assert weight_hash(model, features.layers) == weight_hash(make(name).bfloat16(), features.layers)
    with pytest.raises(ValueError, match="collect them on the same pre-trained model"):
        check_model(features, make(name, seed=1), features.layers)
    layers = [layer for layer in features.layers if layer != "lm_head"]  # PEFT takes its name for an embedding's
    adapted = get_peft_model(make(name), LoraConfig(r=2, target_modules=layers, init_lora_weights=False))
    found = interference({"t": adapted}, {"t": features}, base=model)
    inputs = brute_force(name, model, batch, features.layers)
    layer = layers[0]
    part, h = adapted.get_base_model().get_submodule(layer), torch.cat(inputs[layer]).float()
    with torch.no_grad():
        base, tau = part.base_layer(h), part(h) - part.base_layer(h)
        base = base - (0 if part.base_layer.bias is None else part.base_layer.bias)
    share = float(tau.square().sum() / base.square().sum())
    assert float(found.layers[layer][0, 0]) == pytest.approx(share, rel=1e-3)


def test_which_of_them_have_no_embedding():
    without = {name for name in CASES if input_embedding(make(name)) is None}
    assert {"hubert", "wav2vec2", "segformer", "convnext", "vit"} <= without and not {"llama", "whisper"} & without


def test_padding_that_a_model_shortens_its_own_way_is_refused():
    sizes = SOUND | {"squeeze_factor": 2}
    torch.manual_seed(0)
    model, batch = transformers.SEWModel(transformers.SEWConfig(**sizes)).eval(), batch_of("hubert-masked")
    del batch["labels"]
    options = {"task": "t", "target_modules": ["q_proj"], "progress": False}
    with pytest.raises(ValueError, match=r"but the attention_mask is \(3, 200\): padding cannot be told apart"):
        collect_features(model, [batch], **options)
    batch["attention_mask"][:] = 1
    plain = collect_features(model, [{"input_values": batch["input_values"]}], **options)
    for name, moments in collect_features(model, [batch], **options).layers.items():
        assert moments.count == plain.layers[name].count
        close(moments.second_moment(), plain.layers[name].second_moment(), name)


def test_a_model_that_ignores_labels_asks_for_the_decoder_s_inputs():
    model, batch = transformers.M2M100Model(transformers.M2M100Config(**TWO)).eval(), batch_of("m2m100")
    with pytest.raises(ValueError, match=r"M2M100Model makes no inputs of its decoder from labels: give decoder_input"):
        collect("m2m100", model, batch)
    given = batch | {"decoder_input_ids": shifted(model, batch["labels"].clone())}
    expected = make("m2m100")
    expected.model.load_state_dict(model.state_dict())
    found, whole = collect("m2m100", model, given), collect("m2m100", expected, batch)
    for name, moments in found.layers.items():
        close(moments.second_moment(), whole.layers[f"model.{name}"].second_moment(), name)


def test_labels_of_several_tokens_a_position_make_the_decoder_s_inputs():
    sound = transformers.EncodecConfig(
        num_filters=4, hidden_size=16, codebook_size=8, num_lstm_layers=1, upsampling_ratios=[2, 2]
    )
    decoder = {"vocab_size": 9, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    decoder |= {"num_codebooks": 2, "pad_token_id": 8, "bos_token_id": 8, "decoder_start_token_id": 8}
    parts = {"text_encoder": transformers.T5Config(**T5).to_dict(), "audio_encoder": sound.to_dict()}
    config = transformers.MusicgenConfig(**parts, decoder=transformers.MusicgenDecoderConfig(**decoder).to_dict())
    torch.manual_seed(0)
    model, text = transformers.MusicgenForConditionalGeneration(config).eval(), batch_of("bert")
    real = until(LABEL_LENGTHS)
    labels = torch.randint(0, 8, (*real.shape, 2)).masked_fill(~real[..., None], -100)
    made = model.prepare_decoder_input_ids_from_labels(labels).flatten(0, 1)
    given = {"decoder_input_ids": made, "decoder_attention_mask": real.long()}
    options = {"task": "t", "target_modules": ["q", "v", "q_proj", "v_proj"], "progress": False}
    del text["labels"]
    found = collect_features(model, [text | {"labels": labels}], **options)
    expected = collect_features(model, [text | given], **options)
    assert len(expected.layers) == 6
    for name, moments in expected.layers.items():
        self_attention = "decoder" in name and ("self_attn" in name or "q_proj" in name)
        assert found.layers[name].count == moments.count == (real.sum() if self_attention else 38), name
        close(found.layers[name].second_moment(), moments.second_moment(), name)
