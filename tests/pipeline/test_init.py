import json
import re

import jsonschema
import pytest
import yaml

from osrm_peft.pipeline.check import check_recipe
from osrm_peft.pipeline.init import length_for, metric_for, write_recipe
from osrm_peft.pipeline.schema import recipe_schema
from osrm_peft.tasks.files import guess
from osrm_peft.training.recipe import Recipe
from tests.helpers.suites import csv_tasks, tiny_recipe

# recipes that an editor with the schema underlines
BAD = [
    {"sede": 3},
    {"max_length": "long"},
    {"lora.lora_alpa": 3},
    {"osrm.statistic": "tokens"},
    {"training.learning_rte": 1.0},
    {"tasks.sizes.lable": "x"},
    {"tasks.sizes.metric": "f1"},
    {"select.rule": "men"},
    {"select.candidates": [{"method": "tsvv"}]},
    {"push": {"repository": "a/b"}},
]


def test_a_recipe_from_a_folder_of_files_is_one_without_mistakes(tmp_path):
    csv_tasks(tmp_path / "some data", rows=90)
    facts = write_recipe(tmp_path / "some data", tmp_path / "recipes" / "mine.yaml")
    text = (tmp_path / "recipes/mine.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    content = yaml.safe_load(text)
    assert content["tasks"]["sizes"]["train"] == "../some data/sizes.csv"  # relative to the recipe
    assert re.search(r"  sizes:  # \d+ train, \d+ validation, \d+ test rows; labels sizes-\w+ 45, sizes-\w+ 45\n", text)
    found, tasks = check_recipe(tmp_path / "recipes/mine.yaml")
    assert found == [] and tasks["sizes"].label_names == ("sizes-even", "sizes-odd")
    assert facts["sizes"].labels == {"sizes-even": 45, "sizes-odd": 45}
    recipe = Recipe.from_yaml(tmp_path / "recipes/mine.yaml")
    assert recipe.out == str(tmp_path / "recipes/results") and recipe.osrm == {}


def test_nothing_is_replaced_unasked_and_one_task_is_no_merge(tmp_path):
    csv_tasks(tmp_path / "data")
    (tmp_path / "recipe.yaml").write_text("mine")
    with pytest.raises(FileExistsError, match=r"recipe.yaml is there already: name another recipe"):
        write_recipe(tmp_path / "data", tmp_path / "recipe.yaml")
    assert (tmp_path / "recipe.yaml").read_text() == "mine" and not (tmp_path / "recipe.schema.json").exists()
    write_recipe(tmp_path / "data", tmp_path / "recipe.yaml", overwrite=True)
    csv_tasks(tmp_path / "one", tasks=("alone",))
    with pytest.raises(ValueError, match="holds one task, 'alone': a merge needs at least two"):
        write_recipe(tmp_path / "one", tmp_path / "r.yaml")
    with pytest.raises(ValueError, match=r"no task in .*expected .*<task>.csv"):
        write_recipe(tmp_path / "nothing", tmp_path / "r.yaml")


def rows(path, labels, words=3):
    path.write_text("text,label\n" + "".join(f"{'w ' * words}{n},{label}\n" for n, label in enumerate(labels)))
    return guess(path)


def test_metric_and_length_follow_the_data(tmp_path):
    balanced = rows(tmp_path / "a.csv", ["x", "y"] * 30)
    rare = rows(tmp_path / "b.csv", ["x", "y", "y", "y", "y"] * 12)
    three = rows(tmp_path / "c.csv", ["x", "y", "z", "z", "z", "z", "z", "z"] * 8)
    numbers = rows(tmp_path / "d.csv", [n / 7 for n in range(60)], words=60)
    assert [metric_for(one) for one in (balanced, rare, three, numbers)] == [
        "accuracy", "matthews", "accuracy", "pearson_spearman",
    ]  # fmt: skip
    assert length_for({"a": balanced}) == 16 and length_for({"a": balanced, "d": numbers}) == 96
    assert length_for({"d": rows(tmp_path / "e.csv", ["x", "y"] * 30, words=900)}) == 512


def test_the_schema_takes_good_recipes_and_refuses_what_check_refuses(tmp_path):
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validate = jsonschema.Draft202012Validator(schema)
    good = yaml.safe_load(tiny_recipe(tmp_path).read_text())
    assert not list(validate.iter_errors(good))
    json.dumps(schema)
    for change in BAD:
        content = json.loads(json.dumps(good))
        for key, value in change.items():
            place, *parts = content, *key.split(".")
            for part in parts[:-1]:
                place = place[part]
            place[parts[-1]] = value
        assert list(validate.iter_errors(content)), change
    assert "A away" not in json.dumps(schema["properties"]["seed"])
    assert schema["properties"]["max_length"]["description"].startswith("tokens a row is cut to")
