"""Tiny random models of each family: features against single samples without padding, A from them, training, reload."""

import tempfile
from collections import namedtuple

import pytest
import torch
import transformers
from datasets import Dataset
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.utils.rnn import pad_sequence
from trl import SFTConfig, SFTTrainer

from osrm_peft import OSRMCallback, OSRMLoraConfig, collect_features, initialize_osrm_weights
from osrm_peft.features.moments import STATISTICS
from osrm_peft.models.layers import lora_layers
from tests.helpers.models import TINY
from tests.helpers.osrm import PAPER

LENGTHS, TARGET_LENGTHS = (7, 4, 2, 5, 7, 3), (3, 7, 5, 2, 1, 7)  # of the samples; both sides are padded to 7
MASKS = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask", "pixel_values": None}
QKV = ["q_proj", "k_proj", "v_proj"]
SIZES = TINY | {"num_labels": 3, "name_or_path": "tiny", "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
SIZES |= {"num_key_value_heads": 1, "head_dim": 8, "image_size": 8, "patch_size": 2, "d_kv": 8, "d_ff": 24}
SIZES |= {"num_layers": 2, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 0}
SIZES |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24}

# distinct: inputs that the targets receive; rotary: padding may be on the left; head: PEFT would not save it of itself
Family = namedtuple("Family", "model task_type targets distinct rotary head", defaults=(False, None))
FAMILIES = {
    "bert": Family("BertForSequenceClassification", "SEQ_CLS", ["query", "key", "value"], 2),
    "roberta": Family("RobertaForSequenceClassification", "SEQ_CLS", ["query", "key", "value"], 2),
    "llama": Family("LlamaForCausalLM", "CAUSAL_LM", [*QKV, "o_proj", "down_proj"], 6, True),
    "llama-cls": Family("LlamaForSequenceClassification", "SEQ_CLS", QKV, 2, True),
    "qwen3": Family("Qwen3ForCausalLM", "CAUSAL_LM", QKV, 2, True),
    "gpt2": Family("GPT2LMHeadModel", "CAUSAL_LM", ["c_attn", "c_proj", "c_fc"], 8),
    "t5": Family("T5ForConditionalGeneration", "SEQ_2_SEQ_LM", ["q", "k", "v", "wo"], 11, True),
    "bart": Family("BartForConditionalGeneration", "SEQ_2_SEQ_LM", QKV, 7),
    "t5-cls": Family("T5ForSequenceClassification", "SEQ_CLS", ["q", "k", "v"], 7, False, "classification_head"),
    "vit": Family("ViTForImageClassification", None, QKV, 2, False, "classifier"),
}
CASES = [(name, side, ()) for name, family in FAMILIES.items() for side in ("right", "left")[: 1 + family.rotary]]
for left_out in (["decoder_attention_mask"], ["decoder_attention_mask", "decoder_input_ids"]):  # labels tell of both
    CASES += [("t5", "right", left_out), ("t5", "left", left_out), ("bart", "right", left_out)]


def make(name):
    torch.manual_seed(0)
    kind = getattr(transformers, FAMILIES[name].model)
    return kind(kind.config_class(**SIZES)).eval()


def adapted(name, base=None, **options):
    family = FAMILIES[name]
    options = {"modules_to_save": family.head and [family.head], "fan_in_fan_out": name == "gpt2"} | options
    options = {"r": 4, "target_modules": family.targets, "task_type": family.task_type} | PAPER | options
    return get_peft_model(make(name) if base is None else base, OSRMLoraConfig(**options))


def batch_of(name, seed=1, side="right", lengths=LENGTHS):
    generator = torch.Generator().manual_seed(seed)
    classes = {"labels": torch.arange(len(lengths)) % 3}
    if name == "vit":
        return classes | {"pixel_values": torch.randn(len(lengths), 3, 8, 8, generator=generator)}

    def texts(lengths):  # −100 is padding, and 1 ends a text: T5's classifier looks for it
        rows = [torch.cat([torch.randint(3, 50, (n - 1,), generator=generator), torch.tensor([1])]) for n in lengths]
        return pad_sequence(rows, batch_first=True, padding_value=-100, padding_side=side)

    ids = texts(lengths)
    batch = {"input_ids": ids.clamp_min(0), "attention_mask": (ids != -100).long()}
    if FAMILIES[name].task_type != "SEQ_2_SEQ_LM":
        return batch | (classes if FAMILIES[name].task_type == "SEQ_CLS" else {"labels": ids})
    labels = texts(TARGET_LENGTHS)
    decoder = {"decoder_input_ids": make(name).prepare_decoder_input_ids_from_labels(labels)}
    return batch | decoder | {"decoder_attention_mask": (labels != -100).long(), "labels": labels}


def collect(model, batches, targets, task="t", **options):
    batches = [batches] if isinstance(batches, dict) else batches
    return collect_features(model, batches, task=task, target_modules=targets, progress=False, **options)


def alone(model, names, *batches):
    """{layer: [(s, n) what it receives of each sample]}: one at a time, cut to its length, neither mask nor batch."""
    seen = {model.get_submodule(name): [] for name in names}
    hook = register_module_forward_pre_hook(lambda layer, args: seen[layer].extend(args[0]) if layer in seen else None)
    with hook, torch.no_grad():
        for batch in batches:
            for row in range(len(next(iter(batch.values())))):
                keeps = {key: batch[mask][row].bool() if mask in batch else ... for key, mask in MASKS.items()}
                model(**{key: batch[key][row][keep][None] for key, keep in keeps.items() if key in batch})
    return dict(zip(names, seen.values(), strict=True))


def second_moment(samples, statistic="token"):
    h = torch.cat(samples) if statistic == "token" else torch.stack([x.mean(0) for x in samples])
    h = (h.mean(0, keepdim=True) if statistic == "mean" else h).double()
    return (h.mT @ h / len(h)).cpu()


def check_same(features, expected, rtol=1e-4):
    """Second moments within rtol of their largest entries; `expected`: of each layer a matrix or FeatureMoments."""
    assert list(features.layers) and set(features.layers) == set(expected)
    for name, S in expected.items():
        actual, S = features.layers[name].second_moment(), S if isinstance(S, torch.Tensor) else S.second_moment()
        assert float((actual - S).abs().max()) <= rtol * float(S.abs().max()), name


def check_alone(features, model, batch):
    inputs = alone(model, features.layers, batch)
    for name, samples in inputs.items():
        assert features.layers[name].count == len(torch.cat(samples) if features.statistic == "token" else samples)
    check_same(features, {name: second_moment(samples, features.statistic) for name, samples in inputs.items()})


def check_least_energy(model, expected, atol=1e-6):
    for name, module in lora_layers(model, "default").items():
        A, S = module.lora_A["default"].weight.detach().double().cpu(), expected[name]
        S = S if isinstance(S, torch.Tensor) else S.second_moment()
        torch.testing.assert_close(A @ A.T, torch.eye(len(A), dtype=A.dtype), rtol=0, atol=atol)
        least = float(torch.linalg.eigvalsh(S)[: len(A)].sum())
        assert float(torch.trace(A @ S @ A.T)) == pytest.approx(least, rel=1e-3, abs=atol * float(S.trace())), name


def step(model, batch):
    model(**batch).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0).step()
    assert all(bool(layer.lora_B["default"].weight.any()) for layer in lora_layers(model, "default").values())


def changed_by_osrm(model, *arguments, **options):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    initialize_osrm_weights(model, *arguments, **options)
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize(("name", "side", "left_out"), CASES)
def test_padding_and_batches_leave_no_trace(name, side, left_out, statistic):
    model, batch, family = make(name), batch_of(name, side=side), FAMILIES[name]
    given = {key: value for key, value in batch.items() if key not in left_out}
    features = collect(model, given, family.targets, statistic=statistic)
    check_alone(features, model, batch)
    assert len(set(features.same_input().values())) == family.distinct


@pytest.mark.parametrize("statistic", ["sample", "token"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_has_least_energy_trains_and_reloads_in_stock_peft(name, statistic, tmp_path):
    base, batch = make(name), batch_of(name)
    tasks = {task: [batch_of(name, seed) for seed in seeds] for task, seeds in {"a": (10, 11), "b": (20, 21)}.items()}
    others = [collect(base, tasks[task], FAMILIES[name].targets, task, statistic=statistic) for task in tasks]
    seen = [alone(base, others[0].layers, *batches) for batches in tasks.values()]
    model = adapted(name, base, statistic=statistic).eval()
    before = model(**batch).logits
    initialize_osrm_weights(model, others)
    assert set(lora_layers(model, "default")) == set(others[0].layers) and torch.equal(model(**batch).logits, before)
    check_least_energy(model, {name: sum(second_moment(one[name], statistic) for one in seen) / 2 for name in seen[0]})
    step(model, batch)
    model.save_pretrained(tmp_path)
    again, after = PeftModel.from_pretrained(make(name), tmp_path).eval(), model(**batch).logits
    assert torch.equal(again(**batch).logits, after) and not torch.allclose(after, before, atol=1e-6)


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize(("name", "k"), [("llama", 2), ("llama", 3), ("qwen3", 2)])
def test_packed_rows_are_their_samples(name, statistic, k):
    model, batch = make(name), batch_of(name, lengths=(5, 3, 6))
    rows = [{"input_ids": ids[:n]} for ids, n in zip(batch["input_ids"], (5, 3, 6), strict=True)]
    packed = transformers.DataCollatorWithFlattening()(rows)
    assert packed["input_ids"].shape == (1, 14) and "attention_mask" not in packed
    kept = {key: value[:k] for key, value in batch.items()}
    check_alone(collect(model, dict(packed), QKV, statistic=statistic, num_samples=k), model, kept)


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.lin, self.unused = nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, input_ids, attention_mask):
        return self.lin(input=self.embed(input_ids))


def test_keyword_inputs_are_seen_and_layers_that_never_run_are_named():
    model, batch = Keywords(), batch_of("llama")
    h = model.embed(batch["input_ids"][batch["attention_mask"].bool()]).detach()
    check_same(collect(model, batch, ["lin"]), {"lin": second_moment([h])})
    with pytest.raises(ValueError, match=r"1 of the 2 target layers never ran, 'unused' the first of them"):
        collect(model, batch, ["lin", "unused"])


def test_windows_of_images_are_tokens_not_samples():
    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
    model = transformers.SwinModel(transformers.SwinConfig(window_size=4, **sizes)).eval()
    batch, layer = {"pixel_values": torch.randn(3, 3, 16, 16)}, "encoder.layers.0.blocks.0.attention.q_proj"
    with pytest.raises(ValueError, match=r"receives inputs of shape \(12, 16, 8\) for 3 samples.*statistic='token'"):
        collect(model, batch, [layer], statistic="sample")
    check_same(collect(model, batch, [layer]), {layer: second_moment(alone(model, [layer], batch)[layer])})


@pytest.mark.parametrize("change", ["bert/train", "llama/train", "llama/all", "llama/", "llama/model.layers.1"])
def test_checkpointed_and_compiled_models_show_the_same(change):
    name, change = change.split("/")
    model, batch = make(name), batch_of(name)
    if change == "train":
        model.train().gradient_checkpointing_enable()
    elif change == "all":
        model = torch.compile(model, backend="eager")
    else:
        model.get_submodule(change).compile(backend="eager")
    with torch.no_grad():  # as features are collected, but for their hooks
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    training, plain = model.training, collect(make(name), batch, FAMILIES[name].targets)
    features = collect(model, batch, FAMILIES[name].targets)
    assert features.weight_hash == plain.weight_hash and model.training == training == (change == "train")
    check_same(features, plain.layers, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_of_bfloat16_models_are_close_and_a_keeps_its_dtype(dtype):
    plain, base = collect(make("llama"), batch_of("llama"), QKV), make("llama").bfloat16()
    check_same(collect(base, batch_of("llama"), QKV), plain.layers, rtol=0.03)
    config = OSRMLoraConfig(r=4, target_modules=QKV, task_type="CAUSAL_LM", **PAPER)
    model = get_peft_model(base, config, autocast_adapter_dtype=dtype == torch.float32)
    initialize_osrm_weights(model, [plain])
    check_least_energy(model, plain.layers, atol=1e-6 if dtype == torch.float32 else 1e-2)
    assert {module.lora_A["default"].weight.dtype for module in lora_layers(model, "default").values()} == {dtype}


OPTIONS = [
    ({"rank_pattern": {"layers.0.self_attn.q_proj": 2}}, {"0.q": 2, "0.v": 4, "1.q": 4, "1.v": 4}),
    ({"layers_to_transform": [1]}, {"1.q": 4, "1.v": 4}),
    ({"exclude_modules": r".*\.1\..*v_proj"}, {"0.q": 4, "0.v": 4, "1.q": 4}),
    ({"modules_to_save": ["lm_head"], "layers_to_transform": 0}, {"0.q": 4, "0.v": 4}),
]


@pytest.mark.parametrize(("options", "ranks"), OPTIONS)
def test_peft_s_options_choose_the_layers_and_ranks(options, ranks):
    model = adapted("llama", target_modules=["q_proj", "v_proj"], **options)
    features = collect(make("llama"), batch_of("llama"), model.peft_config["default"])
    layers = {f"model.layers.{layer[0]}.self_attn.{layer[2]}_proj": rank for layer, rank in ranks.items()}
    assert changed_by_osrm(model, [features]) == {f"base_model.model.{name}.lora_A.default.weight" for name in layers}
    assert {name: module.r["default"] for name, module in lora_layers(model, "default").items()} == layers
    assert set(features.layers) == set(layers)
    check_least_energy(model, features.layers)


@pytest.mark.parametrize("active", ["default", "second"])
@pytest.mark.parametrize(("named", "other"), [("default", "second"), ("second", "default")])
def test_only_the_named_adapter_changes_whichever_is_active(named, other, active):
    model = adapted("llama")
    model.add_adapter("second", OSRMLoraConfig(r=2, target_modules=QKV, task_type="CAUSAL_LM", **PAPER))
    model.set_adapter(active)
    for module in lora_layers(model, other).values():
        nn.init.normal_(module.lora_B[other].weight)  # trained
    features = collect(model, batch_of("llama"), None)
    check_alone(features, make("llama"), batch_of("llama"))
    found = changed_by_osrm(model, [features], adapter_name=named)
    assert found == {key for key in model.state_dict() if f"lora_A.{named}" in key} and model.active_adapter == active


@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize("name", ["bert", "t5", "bart"])
def test_groups_of_layers_give_what_one_pass_gives(name, group_size, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, batches, targets = make(name), [batch_of(name, seed) for seed in (1, 2)], FAMILIES[name].targets
    whole, parts = (collect(model, batches, targets, group_size=size) for size in (None, group_size))
    assert list(parts.layers) == list(whole.layers) and parts.same_input() == whole.same_input()
    assert parts.weight_hash == whole.weight_hash and parts.num_samples == whole.num_samples == 12
    check_same(parts, whole.layers, rtol=1e-6)
    assert len(list(tmp_path.iterdir())) == 1
    del parts
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="group_size reads the loader several times"):
        collect(model, (batch for batch in batches), targets, group_size=group_size)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="4-bit layers of bitsandbytes are tested on a CUDA device")
def test_a_quantised_base_trains(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    make("llama").save_pretrained(tmp_path)
    quantised = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=quantised, device_map=0)
    batch = {key: value.to(base.device) for key, value in batch_of("llama").items()}
    features = collect(base, batch, FAMILIES["llama"].targets)
    check_alone(features, base, batch)
    model = adapted("llama", prepare_model_for_kbit_training(base))
    initialize_osrm_weights(model, [features])
    check_least_energy(model, features.layers)
    assert {type(module.base_layer).__name__ for module in lora_layers(model, "default").values()} == {"Linear4bit"}
    step(model, batch)


def seq2seq_trainer(arguments, callbacks, **options):
    rows = Dataset.from_dict({key: value.tolist() for key, value in batch_of("t5").items()})
    args = transformers.Seq2SeqTrainingArguments(**arguments)
    return transformers.Seq2SeqTrainer(adapted("t5", **options), args, train_dataset=rows, callbacks=callbacks)


def sft_trainer(arguments, callbacks, **options):
    words = Tokenizer(models.WordLevel({"</s>": 0} | {f"w{index}": index for index in range(1, 50)}, "w1"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
    rows = Dataset.from_dict({"text": [f"w{n} w{n + 1} w{n + 2}" for n in range(1, 9)]})
    options = {"peft_config": OSRMLoraConfig(r=4, target_modules=QKV, task_type="CAUSAL_LM", **(PAPER | options))}
    options |= {"processing_class": tokenizer, "callbacks": callbacks, "train_dataset": rows}
    return SFTTrainer(make("llama"), SFTConfig(**arguments, bf16=False), **options)


@pytest.mark.parametrize(("name", "build"), [("t5", seq2seq_trainer), ("llama", sft_trainer)])
def test_other_trainers_set_a_and_report_what_becomes_of_it(name, build, tmp_path):
    path, reporter, seen = tmp_path / "other.safetensors", transformers.TrainerCallback(), []
    reporter.on_log = lambda *_, logs, **__: seen.append(set(logs))  # as TensorBoard's or W&B's would
    features = collect(make(name), batch_of(name), FAMILIES[name].targets, "other")
    features.save(path)
    arguments = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    arguments |= {"max_steps": 2, "logging_steps": 1, "save_strategy": "no", "learning_rate": 0.01}
    trainer = build(arguments, [reporter, OSRMCallback()], out_of_task=[str(path)])
    check_least_energy(trainer.model, features.layers)
    trainer.train()
    keys, history = {"osrm/drift", "osrm/out_of_task_energy"}, trainer.state.log_history
    assert [keys <= set(logs) for logs in [*seen, *history]] == [True, True, False] * 2  # the last sums up the run
    assert history[0]["osrm/drift"] < 1e-6 < history[1]["osrm/drift"]  # B is 0 in the first step: A has no gradient
    assert 0 < history[1]["osrm/out_of_task_energy"] < 1
