"""A tiny BERT made in memory, adapters of it, and no network."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Gemma3Config,
    Gemma3ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from osrm_peft import load_adapter, merge_adapters
from osrm_peft.models.layers import as_weight, lora_layers
from osrm_peft.models.loading import load_base
from tests.helpers.adapters import VARIANTS, kind_of, make_adapter, tensors_of
from tests.helpers.models import make_base, make_batch


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_a_decoder_attached_by_name_pads_as_its_tokenizer(has_tokenizer, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForSequenceClassification(LlamaConfig(vocab_size=50, num_labels=3, **sizes))
    base.save_pretrained(tmp_path / "base")
    if has_tokenizer:
        words = Tokenizer(WordLevel({"<unk>": 0, "</s>": 7}, "<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    model = load_adapter(tmp_path / "adapter").attach(str(tmp_path / "base"))
    assert model.config.pad_token_id == (7 if has_tokenizer else None)
    rows = torch.tensor([[1, 2, 3], [4, 5, 7]])
    with torch.no_grad():
        alone = torch.cat([adapted(row[None]).logits for row in (rows[0], rows[1, :2])])
        if has_tokenizer:
            torch.testing.assert_close(model(rows).logits, alone)
        else:
            torch.testing.assert_close(model(rows[:1]).logits, alone[:1])


def test_a_head_of_two_layers_is_as_wide_as_the_last(tmp_path):
    """PEFT keeps DistilBERT's pre_classifier, too: its name ends like that of the classifier."""
    config = DistilBertConfig(vocab_size=50, dim=16, hidden_dim=24, n_layers=1, n_heads=2, num_labels=3)
    base = DistilBertForSequenceClassification(config).eval()
    base.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_lin"], task_type="SEQ_CLS")).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter")
    assert {name.split(".")[0] for name in adapter.heads} == {"classifier", "pre_classifier"}
    rows = torch.tensor([[1, 2, 3], [4, 5, 7]])
    with torch.no_grad():
        torch.testing.assert_close(adapter.attach(str(tmp_path / "base"))(rows).logits, adapted(rows).logits)
    merge_adapters({"t": tmp_path / "adapter"}, "average").for_task("t").save_pretrained(tmp_path / "merged")
    again = PeftModel.from_pretrained(DistilBertForSequenceClassification(config), str(tmp_path / "merged")).eval()
    assert all(torch.equal(tensor, adapter.heads[name]) for name, tensor in load_adapter(again).heads.items())


def test_a_model_of_several_configurations_is_loaded_by_name(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 50, "num_key_value_heads": 1, "head_dim": 8, **sizes}
    vision = {"image_size": 28, "patch_size": 14, **sizes}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    assert not hasattr(config, "pad_token_id")
    Gemma3ForSequenceClassification(config).save_pretrained(tmp_path)
    assert load_base(str(tmp_path), 3).config.get_text_config().pad_token_id == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_task_vector_is_peft_s(variant, tmp_path):
    model = make_adapter(tmp_path, **VARIANTS[variant])
    adapter = load_adapter(tmp_path)
    layers = lora_layers(model, "default")
    assert set(adapter.factors) == set(layers)
    for name, layer in layers.items():
        factors = adapter.factors[name]
        assert factors.s == layer.scaling["default"]
        assert adapter.shapes[name] == (len(factors.B), factors.rank, factors.A.shape[1])
        with torch.no_grad():  # the definition of τ: what a whole identity batch, or any weight, gains
            theirs = layer.get_delta_weight("default").float()
        tolerance = 2e-2 if variant == "bfloat16" else 1e-5  # PEFT multiplies in bfloat16
        torch.testing.assert_close(
            as_weight(layer.get_base_layer(), factors.delta()), theirs, rtol=tolerance, atol=tolerance
        )
    assert adapter.dtype == VARIANTS[variant].get("dtype", torch.float32)
    heads = {"gpt2": {"score.weight"}, "resnet": {"classifier.1.weight", "classifier.1.bias"}}
    assert set(adapter.heads) == heads.get(kind_of(variant), {"classifier.weight", "classifier.bias"})


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_we_write_loads_in_stock_peft_with_the_same_logits(variant, tmp_path):
    kind = kind_of(variant)
    model = make_adapter(tmp_path / "theirs", **VARIANTS[variant]).float()
    load_adapter(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        again = PeftModel.from_pretrained(make_base(kind=kind), str(tmp_path / "ours")).eval()
    attached = load_adapter(tmp_path / "theirs").attach(make_base(kind=kind))
    config = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] and not config["use_rslora"]
    # folding s into B is exact in float32 up to one rounding, and one bfloat16 rounding (2⁻⁹) in a bfloat16 file
    tolerance = 2e-2 if variant == "bfloat16" else 1e-5
    with torch.no_grad():
        batch = make_batch(kind=kind)
        expected = model(**batch).logits
        torch.testing.assert_close(again(**batch).logits, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(attached(**batch).logits, expected, rtol=tolerance, atol=tolerance)


def test_a_live_model_reads_like_its_folder(tmp_path):
    model = make_adapter(tmp_path)
    live, folder = load_adapter(model), load_adapter(tmp_path)
    assert live.sha256 is None and folder.sha256
    for name, factors in folder.factors.items():
        assert torch.equal(live.factors[name].delta(), factors.delta())
    assert all(torch.equal(live.heads[name], tensor) for name, tensor in folder.heads.items())


def test_attach_loads_the_base_by_name_with_the_right_head(tmp_path, base_folder):
    make_adapter(tmp_path, num_labels=5)
    assert load_adapter(tmp_path).attach(base_folder)(**make_batch()).logits.shape == (4, 5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"use_dora": True},
            r"has use_dora=True; DoRA rescales whole weight columns: bake it into full weights",
        ),
        ({"lora_bias": True}, r"has lora_bias=True; lora_B has a bias"),
        ({"bias": "all"}, r"trained biases \(bias='all'\)"),
        (
            {"init_lora_weights": "pissa"},
            r"init_lora_weights='pissa', which changed the base model's weights",
        ),
        ({"init_lora_weights": "olora"}, r"init_lora_weights='olora'"),
    ],
)
def test_adapters_that_peft_writes_and_that_are_not_plain_lora(tmp_path, config, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_adapter(tmp_path, **config)
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path)


def edit_config(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "is a IA3 adapter: only LoRA adapters"),
        ({"trainable_token_indices": [3]}, "trained token embeddings"),
        ({"alora_invocation_tokens": [3]}, "no single task vector"),
        (
            {"modules_to_save": None, "task_type": None},
            r"not understood: classifier.bias \(3,\), classifier.weight \(3, 16\)",
        ),
    ],
)
def test_configs_that_say_more_than_plain_lora(tmp_path, fields, message):
    make_adapter(tmp_path)
    edit_config(tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path)


def test_nan_is_refused_with_the_layer_s_name(tmp_path):
    make_adapter(tmp_path)
    tensors = tensors_of(tmp_path)
    key = "base_model.model.bert.encoder.layer.1.attention.self.value.lora_B.weight"
    tensors[key][0, 0] = torch.nan
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"NaN or Inf in layer 'bert.encoder.layer.1.attention.self.value'"):
        load_adapter(tmp_path)


def test_folders_that_are_no_adapter(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder nor a Hub repository that can be reached"):
        load_adapter(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="neither a folder nor a Hub repository"):
        load_adapter("nobody/nothing")
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config.json"):
        load_adapter(tmp_path)
    make_adapter(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        load_adapter(tmp_path)
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pickled .bin files are never read"):
        load_adapter(tmp_path)


def test_a_base_with_another_head_or_without_the_layers_is_refused(tmp_path):
    make_adapter(tmp_path)
    with pytest.raises(ValueError, match=r"has shape \(3,\), the model's is \(2,\): load .* num_labels=3"):
        load_adapter(tmp_path).attach(make_base(num_labels=2))
    with pytest.raises(ValueError, match=r"lacks 2 of the 4 adapted layers: bert.encoder.layer.1.*is of tiny"):
        load_adapter(tmp_path).attach(make_base(num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"layer '.*' is 8×8, the adapter's is 16×16"):
        load_adapter(tmp_path).attach(narrow := make_base(hidden_size=8))
    assert not any("lora" in name for name, _ in narrow.named_modules())  # refused before anything was wrapped
    with pytest.raises(TypeError, match=r"carries an adapter already"):
        load_adapter(tmp_path).attach(load_adapter(tmp_path).attach(make_base()))


def test_stock_peft_alone_loads_what_we_write(tmp_path, base_folder):
    """A process that never imports osrm_peft."""
    model = make_adapter(tmp_path / "theirs", use_rslora=True)
    load_adapter(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    script = f"""
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
base = AutoModelForSequenceClassification.from_pretrained({base_folder!r}, num_labels=3)
model = PeftModel.from_pretrained(base, {str(tmp_path / "ours")!r}).eval()
print(json.dumps(model(input_ids=torch.arange(6)[None]).logits.tolist()))
assert "osrm_peft" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    logits = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    torch.testing.assert_close(model(input_ids=torch.arange(6)[None]).logits, logits, rtol=1e-5, atol=1e-5)


def test_a_live_model_s_only_or_active_adapter_is_read(tmp_path):
    model = get_peft_model(make_base(), LoraConfig(target_modules=["query"], task_type="SEQ_CLS"), adapter_name="mine")
    assert load_adapter(model).factors
    model.add_adapter("other", LoraConfig(target_modules=["key"], task_type="SEQ_CLS"))
    model.set_adapter("other")
    assert all("key" in name for name in load_adapter(model).factors)
    with pytest.raises(ValueError, match=r"no adapter 'zz', only mine, other"):
        load_adapter(model, adapter_name="zz")


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("classifier.weight", lambda t: t * torch.nan, r"NaN or Inf in its head 'classifier.weight'"),
        ("query.lora_A.weight", lambda t: t.to(torch.int8), r"I8 factors of rank 4"),
        ("query.lora_A.weight", lambda t: t[:0], r"not understood: .*query"),
    ],
)
def test_tensors_that_no_training_writes(tmp_path, key, change, message):
    make_adapter(tmp_path)
    tensors = {name: change(t) if name.endswith(key) else t for name, t in tensors_of(tmp_path).items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path)


@pytest.mark.parametrize("text", ["[1]", "null", '{"peft_type": "LORA"}', '{"peft_type": "LORA", "lora_alpha": "x"}'])
def test_damaged_configs(tmp_path, text):
    make_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"is damaged|not understood|lora_alpha='x' must be a finite number"):
        load_adapter(tmp_path)


def test_a_damaged_head_is_named(tmp_path):
    make_adapter(tmp_path)
    (tmp_path / "heads").mkdir()
    (tmp_path / "heads/t.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"is damaged: SafetensorError"):
        load_adapter(tmp_path, task="t")


def test_a_base_by_name_needs_a_task_type_that_tells_its_class(tmp_path, base_folder):
    make_adapter(tmp_path)
    edit_config(tmp_path, task_type="TOKEN_CLS")
    with pytest.raises(ValueError, match=r"needs for task_type='TOKEN_CLS': pass the loaded base model"):
        load_adapter(tmp_path).attach(base_folder)


@pytest.mark.parametrize("tying", [False, True])
@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head", "q_proj"], ["embed_tokens", "lm_head"]])
def test_tied_embeddings(tmp_path, targets, tying):
    """Head and embedding share a weight, not an adapter, unless PEFT is told to tie that too."""

    def tied_base():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        return LlamaForCausalLM(
            LlamaConfig(vocab_size=50, tie_word_embeddings=True, name_or_path="tiny", **sizes)
        ).eval()

    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM", ensure_weight_tying=tying)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(tied_base(), config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.eval().save_pretrained(tmp_path / "theirs")
        copied = {name for name in tensors_of(tmp_path / "theirs") if "base_layer" in name}  # rows of the base
        assert copied or (tying and targets == ["lm_head", "q_proj"])  # PEFT then adapts the embedding, too
        merged = merge_adapters({"t": tmp_path / "theirs"}, "average")
        merged.save_pretrained(tmp_path / "ours")
        assert {name for name in tensors_of(tmp_path / "ours") if "base_layer" in name} == copied
        again = PeftModel.from_pretrained(tied_base(), str(tmp_path / "ours")).eval()
    with torch.no_grad():
        expected = model(torch.arange(8)[None]).logits
        torch.testing.assert_close(again(torch.arange(8)[None]).logits, expected, rtol=1e-4, atol=1e-5)
        emr = merge_adapters({"t": tmp_path / "theirs"}, "emr")
        if tying:  # one weight changed once
            with emr.applied_to(tied_base(), "t") as switched:
                torch.testing.assert_close(switched(torch.arange(8)[None]).logits, expected, rtol=1e-4, atol=1e-4)
        elif len(set(targets) & {"embed_tokens", "lm_head"}) == 2:
            with pytest.raises(ValueError, match="shares its weight with lm_head, which this task does not"):
                emr.load(tied_base(), "t")
