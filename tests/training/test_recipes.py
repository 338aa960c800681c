"""Values of every wrong kind in every file that is read: a result, or one line that names file and field."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from osrm_peft import OSRMLoraConfig, load_adapter
from osrm_peft.io.yaml import parse_yaml
from osrm_peft.models.loading import load_base
from osrm_peft.training.recipe import Recipe
from tests.helpers.files import SMALL, write

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "recipes/configs").glob("*.yaml"))


def test_every_recipe_parses_and_builds_its_lora_config():
    training = [path for path in CONFIGS if not path.name.startswith(("merge", "reproduce"))]
    assert len(training) == 5
    for path in training:
        recipe = Recipe.from_yaml(path)
        for task in recipe.task_names():
            config = recipe.lora_config(task)
            expected = (128, {"q_proj", "v_proj"}) if recipe.in_words else (16, {"query", "value"})
            assert (config.r, config.lora_alpha, config.target_modules) == (8, *expected)
            if recipe.osrm is not None:
                assert isinstance(config, OSRMLoraConfig) and len(config.out_of_task) == len(recipe.task_names()) - 1
                assert not any(f"/{task}." in file for file in config.out_of_task)
        header = path.read_text().splitlines()
        flag = "--recipe" if recipe.inits else "--config"
        command = next(line for line in header if "accelerate launch" in line or "osrm-peft demo" in line)
        assert f"{flag} recipes/configs/{path.name}" in command


@pytest.mark.parametrize("osrm", [None, {"statistic": "mean", "freeze_a": True}])
def test_accelerate_launch_trains_an_adapter_that_stock_peft_loads(tmp_path, osrm):
    """The recipe as a user launches it: one real process under `accelerate launch`."""
    path = write(tmp_path, **({"osrm": osrm} if osrm else {}))
    if osrm:
        recipe = Recipe.from_yaml(path)
        for task in recipe.task_names():
            recipe.collect(task, progress=False).save(recipe.features_file(task))
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "accelerate_configs/single.yaml",
    ]
    command = [
        "recipes/train_adapter.py",
        "--config",
        str(path),
        "--task",
        "tweets",
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run([*launch, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out/tweets"
    assert not (tmp_path / "out/tweets.checkpoints").exists()
    assert set(json.loads((folder / "adapter_config.json").read_text())) == set(LoraConfig().to_dict())
    manifest = json.loads((folder / "osrm_peft.json").read_text())
    assert ("osrm" in manifest) == bool(osrm)
    assert (manifest["task"], manifest["num_labels"], manifest["train_rows"]) == ("tweets", 1, 16)
    assert manifest["training"]["warmup_steps"] == 0.06 and manifest["training"]["lr_scheduler_type"] == "linear"
    assert ("osrm/drift" in manifest["log"][0]) == bool(osrm)
    if osrm:
        assert manifest["log"][0]["osrm/drift"] == pytest.approx(0, abs=1e-6)  # A is frozen
    PeftModel.from_pretrained(load_base("packaged", 1), str(folder))
    assert any(
        "lora_B" in key and tensor.any() for key, tensor in load_file(folder / "adapter_model.safetensors").items()
    )


def test_an_interrupted_training_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    training = SMALL["training"] | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    recipe = Recipe.from_yaml(write(tmp_path, training=training))
    recipe.train("tweets", tmp_path / "whole")

    from osrm_peft.training import train as module

    class Interrupted(module.Trainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 3:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, "Trainer", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            recipe.train("tweets", tmp_path / "cut")
    assert not (tmp_path / "cut").exists() and (tmp_path / "cut.checkpoints/checkpoint-2").is_dir()
    recipe.train("tweets", tmp_path / "cut")
    whole, cut = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert all((whole[key] - cut[key]).abs().max() < 1e-6 for key in whole)
    assert not (tmp_path / "cut.checkpoints").exists()


def test_bad_recipes(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no recipe .*nothing.yaml: see recipes/configs/"):
        Recipe.from_yaml(tmp_path / "nothing.yaml")
    with pytest.raises(ValueError, match=r"a recipe needs model and knows .*'modle'"):
        Recipe.from_yaml(write(tmp_path, modle="x"))
    with pytest.raises(ValueError, match=r"unknown task twets in suite 'packaged': choose from questions"):
        Recipe.from_yaml(write(tmp_path, tasks=["twets"])).task_names()
    with pytest.raises(ValueError, match=r"unknown task 'editorials': the recipe has tweets, sms_spam, questions"):
        Recipe.from_yaml(write(tmp_path)).task("editorials")
    osrm = Recipe.from_yaml(write(tmp_path, osrm={"statistic": "mean"}))
    with pytest.raises(FileNotFoundError, match=r"no features file .*sms_spam.features.safetensors: write it with"):
        osrm.train("tweets", tmp_path / "out")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/file").touch()
    with pytest.raises(FileExistsError, match="is not a folder that osrm_peft wrote as 'adapter'"):
        osrm.train("tweets", tmp_path / "theirs")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": "tweets"}, r"tasks='tweets' in the recipe must be list \| dict \| None, not str"),
        ({"lora": ["a"]}, r"lora=\['a'\] in the recipe must be dict"),
        ({"model": None}, r"model=None in the recipe must be str"),
        ({"num_samples": "10"}, r"num_samples='10' must be a whole number of at least 1"),
        ({"seed": "x"}, r"seed='x' must be a whole number"),
        ({"max_length": 0}, r"max_length=0 must be a whole number of at least 4"),
        ({"tasks": ["tweets", "tweets"]}, r"names a task twice"),
    ],
)
def test_recipes_with_values_of_the_wrong_kind(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        Recipe.from_yaml(write(tmp_path, **change))


def test_numbers_are_yaml_1_2_s(tmp_path):
    (tmp_path / "r.yaml").write_text("model: packaged\nsuite: packaged\ntraining: {learning_rate: 2e-3, eps: 1.5E+2}\n")
    assert Recipe.from_yaml(tmp_path / "r.yaml").training == {"learning_rate": 0.002, "eps": 150.0}
    assert parse_yaml("1e-4") == 1e-4 and parse_yaml("12") == 12 and parse_yaml("x1e-4") == "x1e-4"
    (tmp_path / "r.yaml").write_text("model: [")
    with pytest.raises(ValueError, match="is not YAML"):
        Recipe.from_yaml(tmp_path / "r.yaml")


def test_a_trained_adapter_is_not_trained_over_by_chance(tmp_path):
    recipe = Recipe.from_yaml(write(tmp_path))
    recipe.train("tweets", tmp_path / "out")
    before = (tmp_path / "out/osrm_peft.json").stat().st_mtime_ns
    with pytest.raises(FileExistsError, match=r"holds a trained adapter: pass overwrite=True"):
        recipe.train("tweets", tmp_path / "out")
    assert (tmp_path / "out/osrm_peft.json").stat().st_mtime_ns == before
    recipe.train("tweets", tmp_path / "out", overwrite=True)
    assert (tmp_path / "out/osrm_peft.json").stat().st_mtime_ns > before


def test_features_are_collected_as_the_config_will_ask_for_them(tmp_path):
    for osrm in ({}, {"statistic": "sample"}, {"reference": True}):
        recipe = Recipe.from_yaml(write(tmp_path, tasks=["tweets", "sms_spam"], osrm=osrm))
        features, config = recipe.collect("tweets", progress=False), recipe.lora_config("sms_spam")
        assert (features.statistic, features.reference) == (config.statistic, config.reference)


def test_trained_biases_are_saved_too(tmp_path):
    recipe = Recipe.from_yaml(write(tmp_path, lora={"target_modules": ["query"], "bias": "all"}))
    found = load_file(recipe.train("tweets", tmp_path / "out") / "adapter_model.safetensors")
    assert "base_model.model.bert.encoder.layer.0.attention.output.LayerNorm.bias" in found


def test_plain_lora_may_be_on_experts_and_osrm_may_not(tmp_path):
    lora = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
    config = Recipe.from_yaml(write(tmp_path, lora=lora)).lora_config("tweets")
    assert config.target_parameters == ["experts.down_proj"]
    with pytest.raises(ValueError, match=r"OSRM chooses A from the inputs of linear layers.*leave target_parameters"):
        Recipe.from_yaml(write(tmp_path, lora=lora, osrm={}))
    with pytest.raises(ValueError, match=r"inits in the recipe: ours: target_parameters.*OSRM chooses A"):
        Recipe.from_yaml(write(tmp_path, lora=lora, inits={"plain": None, "ours": {}}))


def test_tasks_of_one_seed_share_neither_a_nor_head(tmp_path):
    recipe = Recipe.from_yaml(
        write(tmp_path, tasks=["tweets", "editorials"], training={"max_steps": 1, "learning_rate": 1e-9})
    )
    first, second = (load_adapter(recipe.train(name, tmp_path / name)) for name in ("tweets", "editorials"))
    for name, factors in first.factors.items():
        assert not torch.allclose(factors.A, second.factors[name].A, atol=0.01)
    weights = [name for name, head in first.heads.items() if head.ndim > 1]
    assert weights and not any(torch.allclose(first.heads[one], second.heads[one], atol=0.01) for one in weights)
