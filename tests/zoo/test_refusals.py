"""What is no plain LoRA is refused by name, and the way out that the message names works."""

import subprocess
import sys
import time
import warnings

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from osrm_peft import bake_adapter, load_adapter, merge_adapters, merge_checkpoints
from osrm_peft.adapters import config as adapter_config
from tests.zoo.adapters import CONFIG, WEIGHTS, adapted, edit, write
from tests.zoo.models import ZOO, noisy, outputs

QV = {"target_modules": ["q_proj", "v_proj"]}
BAKED = {
    "dora": ("llama", {"use_dora": True} | QV, r"use_dora=True; DoRA rescales whole weight columns"),
    "dora_rslora": ("llama", {"use_dora": True, "use_rslora": True} | QV, r"use_dora=True"),
    "lora_bias": ("bert_mlm", {"lora_bias": True, "target_modules": ["query"]}, r"lora_bias=True; lora_B has a bias"),
    "bias_all": ("bert_mlm", {"bias": "all", "target_modules": ["query"]}, r"trained biases \(bias='all'\)"),
    "bias_only": ("gpt2", {"bias": "lora_only", "target_modules": ["c_attn"]}, r"trained biases \(bias='lora_only'\)"),
    "tokens": ("llama", {"trainable_token_indices": [1, 5]} | QV, r"trainable_token_indices=\[1, 5\]"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "config", "message"), BAKED.values(), ids=BAKED)
def test_what_must_be_baked_is_baked_and_merged_as_checkpoints(name, config, message, tmp_path):
    base = tmp_path / "base"
    noisy(name, 0).save_pretrained(base, save_original_format=False)
    for seed in (1, 2):
        folder = write(adapted(name, seed, **config), tmp_path / f"t{seed}")
        with pytest.raises(ValueError, match=rf"{message}.*\(osrm-peft bake\) and merge the checkpoints"):
            load_adapter(folder)
        bake_adapter(base, folder, tmp_path / f"full{seed}")  # the way out
    out = merge_checkpoints({f"m{seed}": tmp_path / f"full{seed}" for seed in (1, 2)}, tmp_path / "out")
    kind = type(noisy(name, 0))
    one, other, merged = (kind.from_pretrained(tmp_path / x).state_dict() for x in ("full1", "full2", out))
    for key, value in merged.items():
        torch.testing.assert_close(value, (one[key] + other[key]) / 2, rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_an_init_that_changes_the_base_is_converted_by_peft(init, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(
            noisy("llama", 0), LoraConfig(r=3, lora_alpha=3, init_lora_weights=init, task_type="CAUSAL_LM", **QV)
        )
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "initial")
        model.peft_config["default"].init_lora_weights = init
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn_like(parameter)
        model.eval().save_pretrained(tmp_path / "theirs")
        with pytest.raises(
            ValueError, match=rf"init_lora_weights='{init}', which changed .*path_initial_model_for_weight"
        ):
            load_adapter(tmp_path / "theirs")
        expected = outputs(model)
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    torch.testing.assert_close(outputs(load_adapter(tmp_path / "plain").attach(noisy("llama", 0))), expected,
                               rtol=1e-3, atol=1e-4)  # fmt: skip


FIELDS = {
    "alora": ({"alora_invocation_tokens": [3]}, r"has no single task vector"),
    "replication": ({"layer_replication": [[0, 2]]}, r"merge adapters trained without layer_replication"),
    "qalora": ({"use_qalora": True}, r"QALoRA pools its inputs"),
    "block_diagonal": ({"use_bdlora": {"nblocks": 2}}, r"block-diagonal LoRA"),
    "arrow": ({"arrow_config": {"top_k": 1}}, r"merge the single adapters"),
    "kasa": ({"kasa_config": {"beta": 0.1}}, r"KaSA changed the base weights"),
    "monteclora": ({"monteclora_config": {"a": 1}}, r"MonteCLoRA draws its weights"),
    "corda": ({"init_lora_weights": "corda"}, r"init_lora_weights='corda'"),
    "loftq": ({"init_lora_weights": "loftq"}, r"init_lora_weights='loftq'.*on its own quantised base"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, r"init_lora_weights='lora_ga'"),
    # fields that no training writes: file, field and value, and no traceback
    "alpha_text": ({"lora_alpha": "x"}, r"lora_alpha='x' in its adapter_config.json must be a finite number"),
    "alpha_none": ({"lora_alpha": None}, r"lora_alpha=None"),
    "alpha_infinite": ({"lora_alpha": float("inf")}, r"lora_alpha=inf"),
    "alpha_nan": ({"lora_alpha": float("nan")}, r"lora_alpha=nan"),
    "alpha_huge": ({"lora_alpha": 10**400}, r"lora_alpha=1000"),
    "rslora_text": ({"use_rslora": "yes"}, r"use_rslora='yes' .* must be true or false"),
    "fan_text": ({"fan_in_fan_out": "no"}, r"fan_in_fan_out='no' .* must be true or false"),
    "pattern_list": ({"alpha_pattern": ["q_proj"]}, r"alpha_pattern=\['q_proj'\] .* must be a mapping"),
    "pattern_number": ({"rank_pattern": 3}, r"rank_pattern=3 .* must be a mapping"),
    "pattern_value": ({"alpha_pattern": {"q_proj": "x"}}, r"lora_alpha='x' .*\(layer '.*0.self_attn.q_proj'\)"),
    "pattern_broken": ({"alpha_pattern": {"q_proj(": 3}}, r"'q_proj\(' of alpha_pattern .* is no regular expression"),
    "modules_number": ({"modules_to_save": 3}, r"modules_to_save=3 .* must be text or a list"),
    "modules_of_numbers": ({"modules_to_save": [3]}, r"modules_to_save=\[3\]"),
    "base_number": ({"base_model_name_or_path": 7}, r"base_model_name_or_path=7 .* must be text"),
    "task_list": ({"task_type": []}, r"task_type=\[\] .* must be text"),
    "targets_mapping": ({"target_modules": {"a": 1}}, r"target_modules={'a': 1}"),
    "auto_mapping_text": ({"auto_mapping": "x"}, r"auto_mapping='x' .* must be a mapping"),
    "ia3": ({"peft_type": "IA3"}, r"is a IA3 adapter: only LoRA adapters can be merged"),
    "adalora": ({"peft_type": "ADALORA"}, r"is a ADALORA adapter"),
    "no_type": ({"peft_type": None}, r"has no peft_type, so PEFT did not write it"),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), FIELDS.values(), ids=FIELDS)
def test_a_field_that_is_not_plain_lora_is_named(fields, message, tmp_path):
    edit(write(adapted("llama", **QV), tmp_path), **fields)
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("pattern", [r"(\w|[a-z])+[._0-9]", r"((\w|\.)(\w|\.)?)+[._0-9]", r"(\w+[._]?)+(?<!j)"])
def test_a_pattern_that_backtracks_for_ever_in_re_does_not_hang(pattern, tmp_path):
    edit(write(adapted("llama", **QV), tmp_path), alpha_pattern={pattern: 60})
    began = time.monotonic()
    factors = load_adapter(tmp_path).factors["model.layers.0.self_attn.q_proj"]
    assert factors.s == 2 and time.monotonic() - began < 2  # it matches no name that ends with j


def test_a_pattern_that_takes_too_long_is_named(tmp_path, monkeypatch):
    edit(write(adapted("llama", **QV), tmp_path), alpha_pattern={"q_proj": 60})

    def slow(*_, timeout):
        raise TimeoutError

    monkeypatch.setattr(adapter_config.regex, "match", slow)
    with pytest.raises(
        ValueError, match=r"the pattern 'q_proj' of alpha_pattern .* takes too long on 'model.*literally"
    ):
        load_adapter(tmp_path)


@pytest.mark.parametrize("config", [IA3Config(task_type="CAUSAL_LM"),
                                    PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)])  # fmt: skip
def test_other_kinds_of_adapters_are_named(config, tmp_path):
    get_peft_model(noisy("llama", 0), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a (IA3|PROMPT_TUNING) adapter: only LoRA adapters can be merged"):
        load_adapter(tmp_path)


def rename(folder, change):
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
TENSORS = {
    "one_layer_twice": (lambda t: t | {f"_orig_mod.{A}": t[A].clone()}, r"has layer '.*' twice, as '_orig_mod.*' and "),
    "raw_and_plain": (lambda t: t | {A.replace("lora_A", "lora_A.default"): t[A].clone()}, r"has layer '.*' twice"),
    "two_adapters": (lambda t: {k.replace("0.self_attn.q_proj.lora_A", "0.self_attn.q_proj.lora_A.x").replace(
        "0.self_attn.q_proj.lora_B", "0.self_attn.q_proj.lora_B.x"): v for k, v in t.items()},
        r"holds several adapters \(default, x\)"),
    "half": (lambda t: {k: v for k, v in t.items() if k != A}, r"not understood: model.layers.0.self_attn.q_proj"),
    "magnitude": (lambda t: t | {A.replace("lora_A.weight", "lora_magnitude_vector"): t[A][0].clone()},
                  r"not understood: .*lora_magnitude_vector"),
    "strange": (lambda t: t | {"base_model.model.model.norm.weight": torch.ones(16)}, r"not understood: model.norm"),
    "other_base_layer": (lambda t: t | {"base_model.model.up_proj.base_layer.weight": torch.ones(3, 3)},
                         r"not understood: up_proj.weight"),
    "empty": (lambda t: {"base_model.model.lm_head.weight": torch.ones(40, 16)}, r"holds no lora_A and lora_B: it is "),
    "nan_module": (lambda t: t | {"base_model.model.lm_head.weight": torch.full((40, 16), torch.nan)},
                   r"NaN or Inf in its module 'lm_head.weight'"),
    "fp8": (lambda t: {k: v.to(torch.float8_e4m3fn) for k, v in t.items()}, r"F8_E4M3 factors"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_mean_nothing_are_named(change, message, tmp_path):
    rename(write(adapted("llama", **QV), tmp_path), lambda tensors: change(tensors))
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path)


def test_saved_modules_inside_of_saved_modules_are_refused(tmp_path):
    write(adapted("roberta_classifier", target_modules=["query"], modules_to_save=["dense"]), tmp_path)
    with pytest.raises(KeyError):
        PeftModel.from_pretrained(noisy("roberta_classifier", 0), str(tmp_path))
    with pytest.raises(ValueError, match=r"has two values of 'classifier.dense.*none is inside of another"):
        load_adapter(tmp_path)


# folders that are something else

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1182680\n"


def git_lfs_weights(folder):
    (folder / WEIGHTS).write_text(POINTER)


def git_lfs_config(folder):
    (folder / CONFIG).write_text(POINTER)


def mlx(folder):
    (folder / WEIGHTS).rename(folder / "adapters.safetensors")
    (folder / CONFIG).write_text('{"fine_tune_type": "lora", "lora_parameters": {"rank": 8}, "num_layers": 8}')


def mlx_renamed(folder):
    (folder / CONFIG).write_text('{"fine_tune_type": "lora", "lora_parameters": {"rank": 8}, "num_layers": 8}')


def adapter_hub(folder):
    (folder / CONFIG).write_text('{"config": {}, "model_type": "bert", "version": "3.0.1"}')


def adapter_hub_files(folder):
    for name in (CONFIG, WEIGHTS):
        (folder / name).unlink()
    (folder / "head_config.json").write_text("{}")


def no_weights(folder):
    (folder / WEIGHTS).unlink()


def no_config(folder):
    (folder / CONFIG).unlink()


def diffusers(folder):
    for name in (CONFIG, WEIGHTS):
        (folder / name).unlink()
    save_file({"lora_unet_x.lora_down.weight": torch.ones(4, 8)}, folder / "style.safetensors")


def full_model(folder):
    for name in (CONFIG, WEIGHTS):
        (folder / name).unlink()
    noisy("llama", 0).save_pretrained(folder)


def a_run(folder):
    for name in (CONFIG, WEIGHTS):
        (folder / name).unlink()
    for step in (500, 1000):
        write(adapted("llama", **QV), folder / f"checkpoint-{step}")


def with_bom(folder):
    (folder / CONFIG).write_bytes(b"\xef\xbb\xbf" + (folder / CONFIG).read_bytes())


def nested(folder):
    (folder / CONFIG).write_text('{"peft_type": "LORA", "lora_alpha": ' + "[" * 100_000 + "]" * 100_000 + "}")


FOLDERS = {
    git_lfs_weights: r"adapter_model.safetensors is a Git LFS pointer, not the file itself: run `git lfs pull` in ",
    git_lfs_config: r"adapter_config.json is a Git LFS pointer",
    mlx: r"it is an adapter of MLX",
    mlx_renamed: r"it is an adapter of MLX",
    adapter_hub: r"it is an adapter of AdapterHub",
    adapter_hub_files: r"it is an adapter of AdapterHub",
    no_weights: r"its weights are missing \(it holds README.md, adapter_config.json\)",
    no_config: r"holds no adapter_config.json: it is not a PEFT adapter \(it holds README.md, adapter_model",
    diffusers: r"it is a LoRA file of kohya or diffusers",
    full_model: r"it is a full model, not an adapter: merge it with `osrm-peft merge-checkpoints`",
    a_run: r"its folders checkpoint-1000, checkpoint-500 do: give one of them",
    with_bom: r"adapter_config.json is damaged: .*without a BOM",
    nested: r"adapter_config.json is damaged: RecursionError",
}


@pytest.mark.parametrize("change", FOLDERS, ids=lambda change: change.__name__)
def test_a_folder_that_is_something_else_is_told_what_it_is(change, tmp_path):
    change(write(adapted("llama", **QV), tmp_path))
    with pytest.raises((ValueError, FileNotFoundError), match=FOLDERS[change]) as caught:
        load_adapter(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_a_run_is_an_adapter(tmp_path):
    a_run(write(adapted("llama", **QV), tmp_path))
    assert load_adapter(tmp_path / "checkpoint-500").factors


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (WEIGHTS, r"it is a file of an adapter: give its folder"),
        (CONFIG, r"it is a file of an adapter: give its folder"),
        ("style.safetensors", r"it is a LoRA file of kohya or diffusers"),
        ("notes.txt", r"it is a file: give the folder that PEFT's save_pretrained wrote"),
    ],
)
def test_a_file_in_place_of_a_folder_is_told_what_it_is(name, message, tmp_path):
    write(adapted("llama", **QV), tmp_path)
    save_file({"lora_unet_x.lora_down.weight": torch.ones(4, 8)}, tmp_path / "style.safetensors")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=message):
        load_adapter(tmp_path / name)


def test_pickled_weights_are_converted_by_the_command_in_the_message(tmp_path):
    folder = write(adapted("llama", **QV), tmp_path / "a folder's name")
    before = load_file(folder / WEIGHTS)
    torch.save(before, folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"pickled .bin files are never read") as caught:
        load_adapter(folder)
    command = str(caught.value).partition("torch reads tensors only: ")[2]
    subprocess.run(command.replace("python ", f"{sys.executable} ", 1), shell=True, check=True)
    assert all(torch.equal(before[key], value) for key, value in load_file(folder / WEIGHTS).items())
    assert load_adapter(folder).factors


def test_unknown_fields_are_warned_of_as_peft_does(tmp_path, caplog):
    edit(write(adapted("llama", **QV), tmp_path), a_field_of_tomorrow=3)
    load_adapter(tmp_path)
    assert "fields that this version of PEFT does not know (a_field_of_tomorrow)" in caplog.text
    with pytest.warns(UserWarning, match="a_field_of_tomorrow"):
        PeftModel.from_pretrained(noisy("llama", 0), str(tmp_path))


def test_two_adapters_with_an_unmergeable_one_are_refused_before_any_work(tmp_path):
    write(adapted("llama", **QV), tmp_path / "a")
    write(adapted("llama", use_dora=True, **QV), tmp_path / "b")
    with pytest.raises(ValueError, match=r"b has use_dora=True"):
        merge_adapters({"a": tmp_path / "a", "b": tmp_path / "b"}, "average")


assert set(ZOO) >= {name for name, _, _ in BAKED.values()}
