"""`train`, `check`, `init` and `run` on a recipe of one's own, in this process."""

import json

import pytest
import yaml

from osrm_peft.io.manifest import read_manifest
from tests.helpers.suites import csv_tasks, tiny_recipe


@pytest.fixture
def recipe(tmp_path):
    return tiny_recipe(tmp_path)


def test_train_collects_the_features_that_are_missing_and_says_so_first(recipe, call):
    printed = call("train", "-c", recipe, "-t", "sizes")
    assert printed.startswith("the features of colours, shapes, sizes are not there yet: collecting them first")
    assert read_manifest(recipe.parent / "results/adapters/sizes")["osrm"]["initialized"]
    assert "not there yet" not in call("train", "-c", recipe, "-t", "shapes")


def test_an_adapter_of_another_recipe_is_not_taken_for_this_ones(recipe, call):
    call("train", "-c", recipe, "-t", "sizes")
    folder = recipe.parent / "results/adapters/sizes"
    before = (folder / "adapter_model.safetensors").read_bytes()
    assert f"{folder} is there already" in call("train", "-c", recipe, "-t", "sizes")
    content = yaml.safe_load(recipe.read_text())
    content["lora"]["r"] = 3
    recipe.write_text(yaml.safe_dump(content))
    printed = call("train", "-c", recipe, "-t", "sizes", code=2)
    assert "made from something else (lora r was 2, is 3): --overwrite makes it anew, --out writes beside it" in printed
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    call("train", "-c", recipe, "-t", "sizes", "--overwrite")
    assert read_manifest(folder)["made_from"]["lora"]["r"] == 3


def test_check_tells_mistakes_with_their_lines_and_ends_with_2(recipe, call):
    printed = call("check", recipe)
    assert "colours: " in printed and f"has no mistake that can be seen from here: `osrm-peft run {recipe}`" in printed
    recipe.write_text(recipe.read_text() + "sede: 3\n")
    assert call("check", recipe, code=2) == f"error: {recipe} has 1 mistake"


def test_init_shows_what_it_found(tmp_path, call):
    csv_tasks(tmp_path / "data", rows=90)
    printed = call("init", tmp_path / "data", "--out", tmp_path / "recipe.yaml")
    assert "sizes-even 45," in printed and "accuracy" in printed
    assert f"`osrm-peft check {tmp_path / 'recipe.yaml'}`" in printed
    found = json.loads(call("init", tmp_path / "data", "--out", tmp_path / "recipe.yaml", "--overwrite", "--json"))
    assert found["sizes"]["labels"] == {"sizes-even": 45, "sizes-odd": 45} and found["sizes"]["metric"] == "accuracy"
    assert "recipe.yaml is there already" in call("init", tmp_path / "data", "--out", tmp_path / "recipe.yaml", code=2)
    assert "--overwrite" in call("init", tmp_path / "data", "--out", tmp_path / "recipe.yaml", code=2)


def test_select_of_the_command_prints_the_table_and_the_answer(recipe, tmp_path, call):
    call("train", "-c", recipe)
    adapters = [recipe.parent / "results/adapters" / task for task in ("colours", "shapes", "sizes")]
    out = tmp_path / "chosen"
    printed = call("select", *adapters, "--rows", 8, "--out", out)  # data, length and model from the manifests
    assert "On rows that had no say in the choice" in printed and "Take " in printed
    assert (out / "winner/README.md").is_file()
    again = call("select", *adapters, "--rows", 9, "--out", out, code=2)
    assert "holds another selection" in again and "--overwrite" in again
    found = json.loads(call("select", *adapters, "--rows", 8, "--out", out, "--json"))
    assert found["kind"] == "selection" and found["rows_scored"] == 0
