"""Every mistake of a recipe is found, with its line, and nothing is loaded or written."""

import re

import pytest
import yaml
from transformers import PreTrainedModel

from osrm_peft.pipeline.check import check_recipe
from tests.helpers.suites import tiny_recipe


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return tiny_recipe(tmp_path_factory.mktemp("recipe"))


def changed(good, name, change):
    """A recipe beside the good one, with another value at a dotted key (or without the key)."""
    content = yaml.safe_load(good.read_text())
    for key, value in change.items():
        place, *parts = content, *key.split(".")
        for part in parts[:-1]:
            place = place.setdefault(part, {})
        if value is None:
            place.pop(parts[-1])
        else:
            place[parts[-1]] = value
    path = good.with_name(f"{name}.yaml")
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def line_of(path, text):
    return 1 + next(n for n, line in enumerate(path.read_text().splitlines()) if line.strip().startswith(text))


# (what is changed, the key that is named, the beginning of the line that is named, the message)
MISTAKES = {
    "unknown key": ({"sede": 3}, "sede", "sede", "unknown key 'sede': did you mean 'seed'?"),
    "no model": ({"model": None}, "", "tasks", "model is missing"),
    "no such model": ({"model": "./nothing"}, "model", "model", "'./nothing' cannot be read"),
    "kind of a value": ({"max_length": "long"}, "max_length", "max_length", "'long' must be int, not str"),
    "out of range": ({"max_length": 1}, "max_length", "max_length", "max_length=1 must be a whole number of at least"),
    "too long": ({"max_length": 999}, "max_length", "max_length", "999 tokens, and .* takes at most 32"),
    "lora key": ({"lora.lora_alpa": 3}, "lora.lora_alpa", "lora_alpa", "did you mean 'lora_alpha'?"),
    "rank": ({"lora.r": -1}, "lora.r", "r: -1", "r=-1 must be a whole number of at least 1"),
    "layers": ({"lora.target_modules": ["qery"]}, "lora.target_modules", "target_modules", "match no layer of"),
    "init": ({"osrm": None, "inits": {"x": {"statistic": "tokens"}}}, "inits.x.statistic", "statistic: tok", "'token'"),
    "inits and osrm": ({"inits": {"x": None}}, "inits", "inits", "stand in the place of osrm"),
    "statistic": ({"osrm.statistic": "tokens"}, "osrm.statistic", "statistic", "'tokens': did you mean 'token'?"),
    "protect": ({"osrm.protect_energy": 3.0}, "osrm.protect_energy", "protect_energy", "3.0"),
    "training key": ({"training.learning_rte": 1.0}, "training.learning_rte", "learning_rte", "mean 'learning_rate'"),
    "rate": ({"training.learning_rate": -1.0}, "training.learning_rate", "learning_rate", "must be .* above 0"),
    "optimiser": ({"training.optim": "adm"}, "training.optim", "optim", "adm is not a valid OptimizerNames"),
    "metric": ({"tasks.sizes.metric": "f1"}, "tasks.sizes.metric", "metric", "unknown metric 'f1': choose from"),
    "task key": ({"tasks.sizes.lable": "x"}, "tasks.sizes.lable", "lable", "did you mean 'label'?"),
    "no train": ({"tasks.sizes": {"text": "x"}}, "tasks.sizes", "sizes", "must map train, and more, to values"),
    "no file": ({"tasks.sizes.train": "data/size.csv"}, "tasks.sizes", "sizes", "data/size.csv"),
    "column": ({"tasks.sizes.text": "txt"}, "tasks.sizes", "sizes", "txt"),
    "one task": ({"tasks.sizes": None, "tasks.shapes": None}, "tasks", "tasks", "a merge needs at least two"),
    "suite and tasks": ({"suite": "glue"}, "suite", "suite", "give a suite .* or no suite and your own tasks"),
    "rule": ({"select.rule": "men"}, "select.rule", "rule", "'men': did you mean 'mean'?"),
    "rows": ({"select.rows": 1}, "select", "select", "rows of select in the recipe=1 must be a whole number"),
    "method": (
        {"select.candidates": [{"method": "tsvv"}]}, "select.candidates.0", "- method", "did you mean 'tsv'?",
    ),
    "option": (
        {"select.candidates": [{"method": "ties", "options": {"densty": 1}}]}, "select", "select", "no option densty",
    ),
    "training folder": ({"training.output_dir": "x"}, "training.output_dir", "output_dir", "the adapter's folder"),
    "seed of the training": ({"training.seed": 3}, "training.seed", "seed", "the recipe's own seed"),
    "task type": ({"lora.task_type": "SEQ_2_SEQ_LM"}, "lora.task_type", "task_type", "SEQ_CLS, CAUSAL_LM"),
    "others' features": (
        {"osrm.out_of_task": ["x.safetensors"]}, "osrm.out_of_task", "out_of_task", "no features file .*x.safetensors",
    ),
    "rank of the choice": ({"select.rank": "big"}, "select", "select", "'big' must be a whole number"),
    "weights": (
        {"select.candidates": [{"method": "average", "weights": {"q": 1}}]}, "select", "select", "weights for q, the",
    ),
    "heads": ({"select.candidates": [{"method": "tsv", "heads": "x"}]}, "select", "select", "heads policy 'x'"),
    "no task": ({"tasks": {}}, "tasks", "tasks", "no task: a merge needs at least two"),
    "init's name": ({"osrm": None, "inits": {1: {}}}, "inits", "inits", "must be dict"),
    "a name too long": ({"out": 300 * "a"}, "out", "out", "cannot be a folder"),
    "repository": ({"push.repo": "a/b/c"}, "push.repo", "repo", "'a/b/c'"),
    "no repository": ({"push": {"public": True}}, "push", "push", "repo is missing"),
    "a file is in the way": ({"out": "recipe.yaml"}, "out", "out", "is no folder that can be written to"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_with_its_line(name, good, monkeypatch):
    change, key, line, message = MISTAKES[name]
    path = changed(good, name.replace(" ", "_"), change)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)  # no weights are read
    found, _ = check_recipe(path)
    assert [mistake.key for mistake in found] == [key], list(map(str, found))
    text = str(found[0])
    assert text.startswith(f"{path}:{line_of(path, line) if key else 1}: ")
    assert re.search(message, text), text


def test_a_good_recipe_has_none_and_nothing_is_written(good):
    before = sorted(good.parent.rglob("*"))
    found, tasks = check_recipe(good)
    assert found == [] and list(tasks) == ["colours", "shapes", "sizes"]
    assert sorted(good.parent.rglob("*")) == before


@pytest.mark.parametrize(
    "text",
    [
        "model: &a [*a]\n",
        "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
        + "".join(f"{b}: &{b} [{', '.join(9 * ['*' + a])}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)),
    ],
)
def test_anchors_that_hold_themselves_or_too_much_are_mistakes(text, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    assert check_recipe(tmp_path / "r.yaml")[0]


def test_all_mistakes_are_told_at_once_in_their_order(good):
    names = ("unknown key", "rank", "optimiser", "no file", "method", "repository")
    change = {key: value for name in names for key, value in MISTAKES[name][0].items()}
    found, _ = check_recipe(changed(good, "many", change))
    assert {mistake.key for mistake in found} == {MISTAKES[name][1] for name in names}
    assert [mistake.line for mistake in found] == sorted(mistake.line for mistake in found)


@pytest.mark.parametrize(
    "text, line, message",
    [
        ("model: [", 2, "no YAML"),
        ("model: a\nmodel: b\n", 2, "'model' is there twice"),
        ("- model\n", 1, "a recipe maps keys to values"),
        ("", 1, "a recipe maps keys to values, such as model: packaged; found None"),
    ],
)
def test_a_file_that_is_no_recipe(text, line, message, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    found, tasks = check_recipe(tmp_path / "r.yaml")
    assert len(found) == 1 and message in str(found[0]) and tasks == {}
    assert found[0].line in (1, line)
    with pytest.raises(FileNotFoundError, match="`osrm-peft init FOLDER` writes one"):
        check_recipe(tmp_path / "none.yaml")
