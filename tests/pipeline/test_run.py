"""A recipe is run: each step once, again when it has changed, and on after an interrupt."""

import json
from pathlib import Path

import pytest
import yaml

from osrm_peft import load_adapter
from osrm_peft.io.manifest import read_manifest
from osrm_peft.io.places import alone_in
from osrm_peft.pipeline import run as pipeline
from osrm_peft.pipeline.run import run_recipe
from osrm_peft.training.recipe import Recipe
from tests.helpers.suites import tiny_recipe


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(the recipe's file, what its run said, its answer)."""
    path = tiny_recipe(tmp_path_factory.mktemp("run"))
    said = []
    return path, said, run_recipe(Recipe.from_yaml(path), say=said.append, progress=False)


def again(path, **changes):
    """What a run says, with other fields than the file's; without the counts."""
    content = yaml.safe_load(path.read_text()) | changes
    other = path.with_name("changed.yaml")
    other.write_text(yaml.safe_dump(content))
    said = []
    run_recipe(Recipe.from_yaml(other), say=said.append, progress=False)
    return {line.split("] ")[1].partition(": ")[0]: line.partition(": ")[2] for line in said if line.startswith("[")}


def test_a_run_leaves_features_adapters_interference_the_choice_and_a_page(ran):
    path, said, selection = ran
    out = path.parent / "results"
    assert {entry.name for entry in out.iterdir()} == {
        "features", "adapters", "statistics", "interference", "selection", "report.html", "steps.json",
    }  # fmt: skip
    assert selection["verdict"].startswith("Take ")
    assert said[0] == "[1/12] features/colours: making it" and said[-1] == "[12/12] report.html: making it"
    assert read_manifest(out / "adapters/sizes")["label_names"] == ["sizes-even", "sizes-odd"]
    assert "initialized" in json.dumps(read_manifest(out / "adapters/sizes")["osrm"])
    winner = load_adapter(out / "selection/winner", task="sizes")
    assert winner.heads and winner.label_names == ("sizes-even", "sizes-odd")
    page = (out / "report.html").read_text()
    assert selection["ranked"][0]["name"].partition(",")[0] in page


def test_a_second_run_makes_nothing_but_the_page(ran):
    said = again(ran[0])
    assert {name for name, text in said.items() if text != "is there already"} == {"report.html"}


def test_from_another_working_directory_it_is_the_same_run(ran, monkeypatch):
    monkeypatch.chdir(ran[0].parents[1])
    said = []
    run_recipe(Recipe.from_yaml(ran[0].relative_to(ran[0].parents[1])), say=said.append, progress=False)
    assert [line for line in said if "is there already" not in line] == ["[12/12] report.html: making it"]


# (what changes in the recipe, the steps that are made anew, what is said of the first of them)
CHANGES = {
    "a choice": ({"select": {"rows": 12, "candidates": [{"method": "average"}]}}, {"selection"}, "select"),
    "rank": (
        {"lora": {"r": 3, "target_modules": ["query", "value"]}},
        {"adapters", "statistics", "interference", "selection"},
        "lora r was 2, is 3",
    ),
    "metric": (
        {
            "tasks": {
                name: {"train": f"data/{name}.csv", "metric": "matthews"} for name in ("colours", "shapes", "sizes")
            }
        },
        {"selection"},
        "metrics colours was 'accuracy', is 'matthews'",
    ),
    "length": (
        {"max_length": 5},
        {"features", "adapters", "statistics", "interference", "selection"},
        "max_length was 8, is 5",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_recipe_remakes_what_it_touches_and_says_why(name, tmp_path):
    change, touched, why = CHANGES[name]
    path = tiny_recipe(tmp_path)
    run_recipe(Recipe.from_yaml(path), say=lambda line: None, progress=False)
    said = again(path, **change)
    anew = {key.partition("/")[0] for key, text in said.items() if text.startswith("making it anew")}
    assert anew == touched
    first = next(text for text in said.values() if text.startswith("making it anew"))
    assert why in first
    if name == "rank":
        assert load_adapter(path.parent / "results/adapters/sizes").rank == 3


def test_a_config_edited_by_hand_is_seen(tmp_path):
    path = tiny_recipe(tmp_path)
    run_recipe(Recipe.from_yaml(path), say=lambda line: None, progress=False)
    config = tmp_path / "results/adapters/sizes/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 99}))
    said = again(path)
    anew = {name for name, text in said.items() if text.startswith("making it anew")}
    assert {"statistics/sizes.gram", "interference", "selection"} <= anew and "adapters/sizes" not in anew


def test_changed_rows_of_one_task_remake_its_own_and_what_looked_at_them(tmp_path):
    path = tiny_recipe(tmp_path, osrm=None)
    run_recipe(Recipe.from_yaml(path), say=lambda line: None, progress=False)
    table = tmp_path / "data/sizes.csv"
    table.write_text(table.read_text().replace("w3 ", "w4 "))
    said = again(path, osrm=None)
    anew = {key for key, text in said.items() if text.startswith("making it anew")}
    assert {"features/sizes", "adapters/sizes", "interference", "selection"} <= anew
    assert not {"features/shapes", "adapters/shapes", "features/colours", "adapters/colours"} & anew


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    path = tiny_recipe(tmp_path)
    trained = []
    real = Recipe.train

    def stop(self, name, *arguments, **named):
        if trained:
            raise KeyboardInterrupt
        trained.append(name)
        return real(self, name, *arguments, **named)

    monkeypatch.setattr(Recipe, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(Recipe.from_yaml(path), say=lambda line: None, progress=False)
    monkeypatch.setattr(Recipe, "train", real)
    said = again(path)
    assert said["features/sizes"] == said[f"adapters/{trained[0]}"] == "is there already"
    assert said["adapters/sizes"] == "making it"


@pytest.mark.parametrize("step, part", [("collect", "features/colours"), ("measure_interference", "interference")])
def test_what_was_being_made_anew_when_it_was_interrupted_is_made_again(step, part, tmp_path, monkeypatch):
    path = tiny_recipe(tmp_path, select={"rows": 4, "candidates": [{"method": "average"}]})
    again(path)

    def stop(*arguments, **named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        owner = Recipe if step == "collect" else pipeline
        patch.setattr(owner, step if step == "collect" else "interference", stop)
        with pytest.raises(KeyboardInterrupt):
            again(path, max_length=6, seed=3)
    assert again(path, max_length=6, seed=3)[part] == "making it anew (an earlier run was interrupted)"


def test_changed_names_of_classes_train_again(tmp_path):
    path = tiny_recipe(tmp_path, osrm=None, select={"rows": 4, "candidates": [{"method": "average"}]})
    again(path)
    table = tmp_path / "data/sizes.csv"
    table.write_text(table.read_text().replace("sizes-even", "sizes-equal"))
    assert "label_names" in again(path)["adapters/sizes"]
    assert read_manifest(tmp_path / "results/adapters/sizes")["label_names"] == ["sizes-equal", "sizes-odd"]


def test_features_lie_in_the_folder_of_the_run(tmp_path):
    path = tiny_recipe(tmp_path, out="first", select={"rows": 4, "candidates": [{"method": "average"}]})
    again(path)
    assert again(path, out="second")["features/sizes"] == "making it"
    assert {"features"} <= {one.name for one in (tmp_path / "first").iterdir()}


def test_another_run_into_the_same_folder_waits_its_turn(tmp_path):
    path = tiny_recipe(tmp_path)
    with alone_in(tmp_path / "results"), pytest.raises(FileExistsError, match="another process writes in"):
        run_recipe(Recipe.from_yaml(path), say=lambda line: None, progress=False)


def test_a_page_of_the_users_is_not_replaced(tmp_path):
    path = tiny_recipe(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results/report.html").write_text("mine")
    with pytest.raises(FileExistsError, match=r"report.html exists, and no run made it"):
        run_recipe(Recipe.from_yaml(path), say=lambda line: None, progress=False)


def test_what_is_not_of_a_run_is_not_replaced(tmp_path):
    path = tiny_recipe(tmp_path)
    features = tmp_path / "results/features/shapes.features.safetensors"
    features.parent.mkdir(parents=True)
    features.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"shapes.features.safetensors exists, and no run into .*results made it"):
        run_recipe(Recipe.from_yaml(path), say=lambda line: None, progress=False)
    assert features.read_bytes() == b"mine"


def test_mistakes_are_told_before_any_work(tmp_path):
    path = tiny_recipe(tmp_path)
    for change, message in (
        ({"select": {"rule": "best"}}, "select in the recipe: rule='best'"),
        ({"select": {"candidates": [{"method": "tsvv"}]}}, "unknown merge method 'tsvv'"),
        ({"push": {}}, "push in the recipe needs repo: user/name"),
        ({"tasks": {"sizes": {"train": "data/sizes.csv"}}}, "one task, 'sizes': a merge needs at least two"),
        ({"tasks": {}}, "no task: a merge needs at least two"),
        ({"osrm": None, "inits": {"a b": None, "A-b": {}}}, "'A-b' and 'a b' would share the folder 'a_b'"),
    ):
        with pytest.raises(ValueError, match=message):
            again(path, **change)
    assert not (tmp_path / "results").exists()


def test_paths_are_relative_to_the_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Recipe.from_yaml(tiny_recipe(tmp_path / "home", out="~/x")).out == str(tmp_path / "x")
    path = tiny_recipe(tmp_path / "a", features="f", out="o", select={"candidates": "c.yaml"})
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.from_yaml("a/recipe.yaml")
    assert (recipe.model, recipe.features, recipe.out) == ("a/model", "a/f", "a/o")
    assert recipe.tasks["sizes"]["train"] == "a/data/sizes.csv" and recipe.select == {"candidates": "a/c.yaml"}
    content = yaml.safe_load(path.read_text()) | {
        "suite": "files:data",
        "tasks": ["sizes"],
        "osrm": {"in_task": "x.safetensors"},
    }
    path.write_text(yaml.safe_dump(content))
    recipe = Recipe.from_yaml("a/recipe.yaml")
    assert recipe.suite == "files:a/data" and recipe.osrm == {"in_task": "a/x.safetensors"}
    content = content | {
        "model": "org/name",
        "suite": None,
        "tasks": {"hub": {"train": "org/data.v2", "validation": "dev"}},
    }
    path.write_text(yaml.safe_dump(content))
    recipe = Recipe.from_yaml("a/recipe.yaml")
    assert recipe.model == "org/name" and recipe.tasks == {"hub": {"train": "org/data.v2", "validation": "dev"}}


def test_several_inits_are_compared_on_the_same_rows(tmp_path):
    inits = {"plain LoRA": None, "OSRM, the paper's": {"objective": "least_energy"}}
    path = tiny_recipe(tmp_path, osrm=None, inits=inits)
    said = []
    best = run_recipe(Recipe.from_yaml(path), say=said.append, progress=False)
    out = tmp_path / "results"
    assert {one.name for one in (out / "adapters").iterdir()} == {"plain_LoRA", "OSRM_the_paper_s"}
    tables = {
        name: json.loads((out / f"selection/{name}/selection.json").read_text())
        for name in ("plain_LoRA", "OSRM_the_paper_s")
    }
    assert best["ranked"][0]["value"]["value"] == max(one["ranked"][0]["value"]["value"] for one in tables.values())
    assert load_adapter(best["folder"], task="sizes").heads and Path(best["folder"]).parent.parent == out / "selection"
    assert said[-1].startswith("the best merge of each init, mean over tasks: ") and "plain LoRA: " in said[-1]
    assert read_manifest(out / "adapters/OSRM_the_paper_s/sizes")["osrm"]["initialized"]
    assert "osrm" not in read_manifest(out / "adapters/plain_LoRA/sizes")
    panels = json.loads((out / "interference/interference.json").read_text())["interference"][""]
    assert set(panels) == set(inits)
    assert set(again(path, inits=inits | {"third": {"objective": "difference"}}, osrm=None)) > {
        "adapters/third/sizes", "selection/third",
    }  # fmt: skip
    with pytest.raises(ValueError, match="the inits look at different features"):
        again(
            path,
            inits={"a": {"statistic": "token"}, "b": {"statistic": "mean", "objective": "least_energy"}},
            osrm=None,
        )


def test_statistics_are_those_that_a_candidate_needs(tmp_path):
    path = tiny_recipe(tmp_path, select={"rows": 8, "candidates": [{"method": "regmean"}, {"method": "fisher"}]})
    run_recipe(Recipe.from_yaml(path), say=lambda line: None, progress=False)
    files = {file.name for file in (tmp_path / "results/statistics").iterdir()}
    assert files == {
        f"{task}.{kind}.safetensors" for task in ("colours", "shapes", "sizes") for kind in ("gram", "fisher")
    }
