"""Tiny random models of each family: features against single samples without padding, A from them, training, reload."""

import gc
import tempfile
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import transformers
from datasets import Dataset
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from osrm_peft import OSRMCallback, OSRMLoraConfig, collect_features, initialize_osrm_weights
from osrm_peft.layers import lora_layers
from osrm_peft.moments import STATISTICS

LENGTHS, TARGET_LENGTHS = (7, 4, 2, 5, 7, 3), (3, 7, 5, 2, 1, 7)  # of the samples; both sides padded to 7
MASKS = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask", "pixel_values": None}
QKV = ["q_proj", "k_proj", "v_proj"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {"vocab_size": 50, "pad_token_id": 0, "num_labels": 3, "name_or_path": "tiny"}
BERT = SIZES | TEXT | {"max_position_embeddings": 32}
LLAMA = BERT | {"num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = TEXT | {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24, "n_positions": 32}
T5 = TEXT | {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
VIT = SIZES | {"image_size": 8, "patch_size": 2, "num_labels": 3, "name_or_path": "tiny"}
BART = TEXT | {"d_model": 16, "max_position_embeddings": 32, "decoder_start_token_id": 2, "forced_eos_token_id": None}
BART |= {f"{side}_{key}": 2 for side in ("encoder", "decoder") for key in ("layers", "attention_heads")}
BART |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24}


@dataclass
class Family:
    model: str  # its class in transformers
    config: str
    sizes: dict
    task_type: str | None
    targets: list
    distinct: int  # how many different inputs the target layers receive
    rotary: bool = False  # positions are relative: padding may be on the left
    options: dict | None = None

    def make(self, seed=0, **sizes):
        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(**(self.sizes | sizes))
        return getattr(transformers, self.model)(config).eval()

    def adapted(self, base=None, **options):
        options = {"r": 4, "lora_alpha": 8, "target_modules": self.targets, "task_type": self.task_type} | options
        torch.manual_seed(1)
        return get_peft_model(base or self.make(), OSRMLoraConfig(**((self.options or {}) | options)))

    @property
    def two_sides(self):
        return self.task_type == "SEQ_2_SEQ_LM"


SEQ = {"modules_to_save": ["classification_head"]}
FAMILIES = {
    "bert": Family("BertForSequenceClassification", "BertConfig", BERT, "SEQ_CLS", ["query", "key", "value"], 2),
    "roberta": Family("RobertaForSequenceClassification", "RobertaConfig", BERT, "SEQ_CLS", ["query", "value"], 2),
    "llama": Family("LlamaForCausalLM", "LlamaConfig", LLAMA, "CAUSAL_LM", [*QKV, "o_proj", "down_proj"], 6, True),
    "llama-cls": Family("LlamaForSequenceClassification", "LlamaConfig", LLAMA, "SEQ_CLS", QKV, 2, True),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", LLAMA | {"head_dim": 8}, "CAUSAL_LM", QKV, 2, True),
    "t5": Family("T5ForConditionalGeneration", "T5Config", T5, "SEQ_2_SEQ_LM", ["q", "k", "v", "wo"], 12, True),
    "t5-cls": Family("T5ForSequenceClassification", "T5Config", T5, "SEQ_CLS", ["q", "k", "v"], 8, options=SEQ),
    "bart": Family("BartForConditionalGeneration", "BartConfig", BART, "SEQ_2_SEQ_LM", QKV, 8),
    "gpt2": Family(
        "GPT2LMHeadModel", "GPT2Config", GPT2, "CAUSAL_LM", ["c_attn", "c_proj", "c_fc"], 8,
        options={"fan_in_fan_out": True},
    ),
    "vit": Family(
        "ViTForImageClassification", "ViTConfig", VIT, None, QKV, 2, options={"modules_to_save": ["classifier"]}
    ),
}  # fmt: skip
LLM = FAMILIES["llama"]
CASES = [(name, side) for name, family in FAMILIES.items() for side in ("right", "left")[: 1 + family.rotary]]


def padded(rows, side, value=0):
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


def batch_of(family, seed=1, side="right", lengths=LENGTHS):
    generator = torch.Generator().manual_seed(seed)
    if family.sizes is VIT:
        return {"pixel_values": torch.randn(len(lengths), 3, 8, 8, generator=generator)}

    def texts(lengths):  # 1 ends a text: T5's classifier looks for it
        return [torch.cat([torch.randint(3, 50, (n - 1,), generator=generator), torch.tensor([1])]) for n in lengths]

    rows = texts(lengths)
    batch = {"input_ids": padded(rows, side), "attention_mask": padded([torch.ones_like(row) for row in rows], side)}
    if family.two_sides:
        batch["labels"] = padded(texts(TARGET_LENGTHS), side, -100)
        batch["decoder_input_ids"] = family.make().prepare_decoder_input_ids_from_labels(batch["labels"])
        batch["decoder_attention_mask"] = (batch["labels"] != -100).long()
    return batch


def with_labels(family, batch):
    if family.task_type == "CAUSAL_LM":
        return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
    return batch if family.two_sides else batch | {"labels": torch.arange(len(next(iter(batch.values())))) % 3}


def collect(model, batches, targets, task="t", **options):
    batches = [batches] if isinstance(batches, dict) else batches
    return collect_features(model, batches, task=task, target_modules=targets, **({"progress": False} | options))


def alone(model, names, batch):
    """{layer: [(s, n) what it receives of each sample]}: one at a time, cut to its length, neither mask nor batch."""
    seen = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0][0]))
        for name in names
    ]
    with torch.no_grad():
        for row in range(len(next(iter(batch.values())))):
            keeps = {key: batch[mask][row].bool() if mask in batch else ... for key, mask in MASKS.items()}
            model(**{key: batch[key][row][keep][None] for key, keep in keeps.items() if key in batch})
    for handle in handles:
        handle.remove()
    return seen


def second_moment(samples, statistic):
    h = torch.cat(samples) if statistic == "token" else torch.stack([x.mean(0) for x in samples])
    h = h.mean(0, keepdim=True) if statistic == "mean" else h
    return (h.double().mT @ h.double()) / len(h)


def same(features, expected, rtol=1e-4, **options):
    """Each layer's second moment, within rtol of its largest entry."""
    assert list(features.layers) and set(features.layers) == set(expected)
    for name, S in expected.items():
        torch.testing.assert_close(
            features.layers[name].second_moment(), S, rtol=0, atol=rtol * float(S.abs().max()), msg=name, **options
        )


def same_as_alone(features, model, batch):
    inputs = alone(model, features.layers, batch)
    for name, samples in inputs.items():
        count = sum(map(len, samples)) if features.statistic == "token" else len(samples)
        assert features.layers[name].count == count, name
    same(features, {name: second_moment(samples, features.statistic) for name, samples in inputs.items()})


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize(("name", "side"), CASES)
def test_padding_and_batches_leave_no_trace(name, side, statistic):
    family = FAMILIES[name]
    model, batch = family.make(), batch_of(family, side=side)
    features = collect(model, batch, family.targets, statistic=statistic)
    same_as_alone(features, model, batch)
    assert len(set(features.same_input().values())) == family.distinct


@pytest.mark.parametrize("given", [["labels"], ["labels", "decoder_input_ids"]])
@pytest.mark.parametrize(("name", "side"), [("t5", "right"), ("t5", "left"), ("bart", "right")])
def test_a_decoder_s_padding_is_that_of_its_labels(name, side, given):
    family = FAMILIES[name]
    model, batch = family.make(), batch_of(family, side=side)
    inputs = {key: batch[key] for key in ["input_ids", "attention_mask", *given]}
    for statistic in STATISTICS:
        same_as_alone(collect(model, inputs, family.targets, statistic=statistic), model, batch)


@pytest.mark.parametrize("statistic", ["sample", "token"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_has_least_energy_trains_and_reloads_in_stock_peft(name, statistic, tmp_path):
    family = FAMILIES[name]
    base, batch = family.make(), with_labels(family, batch_of(family))
    tasks = [[batch_of(family, seed=10 * task + step) for step in range(4)] for task in (1, 2)]
    others = [
        collect(base, batches, family.targets, str(task), statistic=statistic) for task, batches in enumerate(tasks)
    ]
    seen = [[alone(base, others[0].layers, batch) for batch in batches] for batches in tasks]
    model = family.adapted(base, statistic=statistic).eval()
    with torch.no_grad():
        before = model(**batch).logits
    initialize_osrm_weights(model, others)
    layers = lora_layers(model, "default")
    assert set(layers) == set(others[0].layers)
    for layer, module in layers.items():
        A = module.lora_A["default"].weight.detach().double()
        torch.testing.assert_close(A @ A.T, torch.eye(4, dtype=A.dtype), rtol=0, atol=1e-6)
        S = sum(second_moment([x for one in batches for x in one[layer]], statistic) for batches in seen) / 2
        least = float(torch.linalg.eigvalsh(S)[:4].sum())
        assert float(torch.trace(A @ S @ A.T)) == pytest.approx(least, rel=1e-3, abs=1e-6 * float(S.trace()))

    output = model(**batch)
    assert torch.equal(output.logits, before)
    output.loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0).step()
    assert all(bool(module.lora_B["default"].weight.any()) for module in layers.values())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(family.make(), tmp_path).eval()
    with torch.no_grad():
        after = model(**batch).logits
        assert torch.equal(again(**batch).logits, after) and not torch.allclose(after, before, atol=1e-6)


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_packed_rows_are_their_samples(name, statistic, k):
    family = FAMILIES[name]
    model, batch = family.make(), batch_of(family, lengths=(5, 3, 6))
    rows = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    packed = transformers.DataCollatorWithFlattening()([{"input_ids": row} for row in rows])
    assert packed["input_ids"].shape == (1, 14) and "attention_mask" not in packed
    features = collect(model, dict(packed), family.targets, statistic=statistic, k=k)
    assert features.k == k
    same_as_alone(features, model, {key: value[:k] for key, value in batch.items()})


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.lin, self.unused = nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, input_ids, attention_mask=None):
        return self.lin(input=self.embed(input_ids))


def test_inputs_given_by_keyword_are_seen_and_layers_that_never_run_are_named():
    model, batch = Keywords(), batch_of(LLM)
    h = model.embed(batch["input_ids"][batch["attention_mask"].bool()]).detach()
    same(collect(model, batch, ["lin"]), {"lin": second_moment([h], "token")})
    with pytest.raises(ValueError, match=r"1 of the 2 target layers never ran, 'unused' the first of them"):
        collect(model, batch, ["lin", "unused"])


def test_windows_of_images_are_tokens_not_samples():
    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
    torch.manual_seed(0)
    model = transformers.SwinModel(transformers.SwinConfig(window_size=4, **sizes)).eval()
    batch = {"pixel_values": torch.randn(3, 3, 16, 16)}
    layer = "encoder.layers.0.blocks.0.attention.q_proj"
    with pytest.raises(ValueError, match=r"receives inputs of shape \(12, 16, 8\) for 3 samples.*statistic='token'"):
        collect(model, batch, [layer], statistic="sample")
    windows = []
    model.get_submodule(layer).register_forward_pre_hook(lambda _, args: windows.extend(args[0]))
    for image in batch["pixel_values"]:
        model(pixel_values=image[None])
    expected = second_moment(windows, "token").detach()
    same(collect(model, batch, [layer]), {layer: expected})


def compiled(part, model):
    """Compiled code that has run once: it was traced before there were hooks."""
    if part is None:
        model = torch.compile(model, backend="eager")
    else:
        model.get_submodule(part).compile(backend="eager")
    with torch.no_grad():
        model(**batch_of(LLM))
    return model


def checkpointed(model):
    model.gradient_checkpointing_enable()
    return model.train()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("bert", checkpointed),
        ("llama", checkpointed),
        ("llama", partial(compiled, None)),
        ("llama", partial(compiled, "")),
        ("llama", partial(compiled, "model.layers.1")),
    ],
)
def test_checkpointed_and_compiled_models_show_the_same(name, change):
    family = FAMILIES[name]
    model, batch = change(family.make()), batch_of(family)
    training = model.training
    plain = collect(family.make(), batch, family.targets)
    features = collect(model, batch, family.targets)
    assert features.weight_hash == plain.weight_hash and model.training == training
    same(features, {layer: moments.second_moment() for layer, moments in plain.layers.items()}, rtol=1e-6)


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_models_have_nearly_the_same_features_and_keep_their_dtype(autocast):
    batch, plain = batch_of(LLM), collect(LLM.make(), batch_of(LLM), LLM.targets)
    features = collect(LLM.make().bfloat16(), batch, LLM.targets)
    same(features, {layer: moments.second_moment() for layer, moments in plain.layers.items()}, rtol=0.03)
    config = OSRMLoraConfig(r=4, target_modules=LLM.targets, task_type="CAUSAL_LM")
    model = get_peft_model(LLM.make().bfloat16(), config, autocast_adapter_dtype=autocast)
    initialize_osrm_weights(model, [plain])
    for module in lora_layers(model, "default").values():
        A = module.lora_A["default"].weight.detach()
        assert A.dtype == (torch.float32 if autocast else torch.bfloat16)
        torch.testing.assert_close(A.float() @ A.float().T, torch.eye(4), rtol=0, atol=1e-6 if autocast else 0.02)


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        ({"rank_pattern": {"layers.0.self_attn.q_proj": 2}}, {"0.q": 2, "0.v": 4, "1.q": 4, "1.v": 4}),
        ({"layers_to_transform": [1]}, {"1.q": 4, "1.v": 4}),
        ({"exclude_modules": r".*\.1\..*v_proj"}, {"0.q": 4, "0.v": 4, "1.q": 4}),
        ({"modules_to_save": ["lm_head"], "layers_to_transform": 0}, {"0.q": 4, "0.v": 4}),
    ],
)
def test_peft_s_options_choose_the_layers_and_ranks(options, ranks):
    model = LLM.adapted(target_modules=["q_proj", "v_proj"], **options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    features = collect(LLM.make(), batch_of(LLM), model.peft_config["default"])
    layers = {f"model.layers.{layer[0]}.self_attn.{layer[2]}_proj": rank for layer, rank in ranks.items()}
    assert set(initialize_osrm_weights(model, [features])) == set(features.layers) == set(layers)
    now = model.state_dict()
    for layer, rank in layers.items():
        A = now[f"base_model.model.{layer}.lora_A.default.weight"]
        torch.testing.assert_close(A @ A.T, torch.eye(rank), rtol=0, atol=1e-6)
    changed = {name for name in now if not torch.equal(now[name], before[name])}
    assert changed == {f"base_model.model.{layer}.lora_A.default.weight" for layer in layers}


@pytest.mark.parametrize("named", ["default", "second"])
@pytest.mark.parametrize("active", ["default", "second"])
def test_only_the_named_adapter_changes_whichever_is_active(named, active):
    model = LLM.adapted()
    model.add_adapter("second", OSRMLoraConfig(r=2, target_modules=QKV, task_type="CAUSAL_LM"))
    model.set_adapter(active)
    for module in lora_layers(model, "second" if named == "default" else "default").values():
        nn.init.normal_(module.lora_B["second" if named == "default" else "default"].weight)  # the other is trained
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    features = collect(model, batch_of(LLM), None)
    same_as_alone(features, LLM.make(), batch_of(LLM))
    initialize_osrm_weights(model, [features], adapter_name=named)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if f"lora_A.{named}" in name} and model.active_adapter == active


@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize("name", ["bert", "t5", "bart"])
def test_groups_of_layers_give_what_one_pass_gives(name, group_size, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    family = FAMILIES[name]
    model, batches = family.make(), [batch_of(family, seed) for seed in (1, 2)]
    whole, parts = (collect(model, batches, family.targets, group_size=size) for size in (None, group_size))
    assert list(parts.layers) == list(whole.layers) and parts.weight_hash == whole.weight_hash
    assert parts.same_input() == whole.same_input() and parts.k == whole.k == 12
    same(parts, {layer: moments.second_moment() for layer, moments in whole.layers.items()}, rtol=1e-6)
    assert len(list(tmp_path.iterdir())) == 1
    del parts
    gc.collect()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="group_size needs a loader that can be read several times"):
        collect(model, (batch for batch in batches), family.targets, group_size=group_size)


@pytest.mark.gpu
def test_a_quantised_base_trains(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    if not torch.cuda.is_available():
        pytest.skip("4-bit layers of bitsandbytes need a CUDA device")
    folder, batch = tmp_path / "base", batch_of(LLM)
    LLM.make().save_pretrained(folder)
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map=0)
    features = collect(base, batch, QKV)
    same_as_alone(features, base, {key: value.to(base.device) for key, value in batch.items()})
    model = LLM.adapted(prepare_model_for_kbit_training(base), target_modules=QKV)
    initialize_osrm_weights(model, [features])
    model(**{key: value.to(base.device) for key, value in with_labels(LLM, batch).items()}).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0).step()
    for module in lora_layers(model, "default").values():
        assert type(module.base_layer).__name__ == "Linear4bit" and bool(module.lora_B["default"].weight.any())


class Reporter(transformers.TrainerCallback):
    """Stands for those that report to TensorBoard or W&B: sees what is in `logs` when its turn comes."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(set(logs))


def seq2seq_trainer(features, arguments, callbacks):
    family = FAMILIES["t5"]
    rows = Dataset.from_dict({key: value.tolist() for key, value in batch_of(family).items()})
    model = family.adapted(out_of_task=features)
    args = transformers.Seq2SeqTrainingArguments(**arguments)
    return transformers.Seq2SeqTrainer(model, args, train_dataset=rows, callbacks=callbacks)


def sft_trainer(features, arguments, callbacks):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(48)} | {"</s>": 48, "?": 49}, "?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="w0")
    return SFTTrainer(
        LLM.make(),
        SFTConfig(**arguments, bf16=False, max_length=16),
        train_dataset=Dataset.from_dict({"text": [f"w{n} w{n + 1} w{n + 2}" for n in range(1, 9)]}),
        processing_class=tokenizer,
        callbacks=callbacks,
        peft_config=OSRMLoraConfig(r=4, target_modules=LLM.targets, task_type="CAUSAL_LM", out_of_task=features),
    )


@pytest.mark.parametrize(("name", "build"), [("t5", seq2seq_trainer), ("llama", sft_trainer)])
def test_other_trainers_set_a_and_report_what_becomes_of_it(name, build, tmp_path):
    family, reporter = FAMILIES[name], Reporter()
    path = tmp_path / "other.safetensors"
    features = collect(family.make(), batch_of(family), family.targets, "other")
    features.save(path)
    arguments = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    arguments |= {"max_steps": 2, "logging_steps": 1, "save_strategy": "no", "learning_rate": 0.01}
    trainer = build([str(path)], arguments | {"per_device_train_batch_size": 2}, [reporter, OSRMCallback()])
    for layer, module in lora_layers(trainer.model, "default").items():
        A, S = module.lora_A["default"].weight.detach().double(), features.layers[layer].second_moment()
        least = float(torch.linalg.eigvalsh(S)[:4].sum())
        assert float(torch.trace(A @ S @ A.T)) == pytest.approx(least, rel=1e-3, abs=1e-6 * float(S.trace()))
    trainer.train()
    keys, history = {"osrm/drift", "osrm/out_of_task_energy"}, trainer.state.log_history
    assert [keys <= seen for seen in reporter.seen] == [True, True, False]  # the last sums up the run
    assert [keys <= set(entry) for entry in history] == [True, True, False]
    assert 0 < history[0]["osrm/drift"] < history[1]["osrm/drift"] and 0 < history[1]["osrm/out_of_task_energy"] < 1
