"""Values of every wrong kind in every file that is read: a result, or one line that names file and field."""

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from osrm_peft import TaskFeatures, load_task, merge_adapters
from osrm_peft.checks import integer, number, shown, task_name, task_names
from osrm_peft.evaluation.results import gather
from osrm_peft.features.moments import FeatureMoments
from osrm_peft.features.task_features import TaskFeatures as Features
from osrm_peft.hub.card import record_scores
from osrm_peft.hub.push import push_to_hub
from osrm_peft.io.json import parse_json
from osrm_peft.io.manifest import MANIFEST, read_manifest
from osrm_peft.io.yaml import check_fields, parse_yaml
from osrm_peft.merging.emr_adapter import EMRAdapter
from osrm_peft.merging.plan import plan_merge
from osrm_peft.merging.request import MergeRequest
from osrm_peft.training.recipe import Recipe
from tests.helpers.adapters import make_adapter
from tests.helpers.files import GOOD, task_folder

WRONG = [None, True, 3, -1, 1.5, "x", "\x1b[31m", "", [], [1], [None], ["a", "a"], [[[]]], {}, {"a": 1}, {"a": None},
         {"a": {"b": [1]}}, {1: 2}, [{}], 2**70, -(2**70), 1e308, float("inf"), float("nan")]  # fmt: skip
VAGUE = (
    r"is not iterable|unhashable type|has no attribute|object is not|not subscriptable|unsupported operand|expected str"
)
DEEP = 100_000


def one_line(error, *names):
    text = str(error)
    assert all(str(name) in text for name in names), text
    assert not re.search(VAGUE, text) and "\n" not in text, text


def dump(path, content):
    path.write_text(yaml.safe_dump(content, allow_unicode=True))
    return path


TRAINING = {"lora", "osrm", "training"}
RECIPE = {"model": "packaged", "suite": "packaged", "tasks": ["tweets"]}


@pytest.mark.parametrize("field", Recipe.__dataclass_fields__)
def test_a_recipe_s_fields(tmp_path, field):
    refused = 0
    for value in WRONG:
        path = dump(tmp_path / "r.yaml", RECIPE | {field: value})
        try:
            recipe = Recipe.from_yaml(path)
            recipe.lora_config(recipe.task_names()[0])
        except ValueError as error:
            refused += 1
            one_line(error, field if f"{path}: " in str(error) else "")
    assert refused >= 10


LORA = [
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "bias",
    "use_rslora",
    "rank_pattern",
    "modules_to_save",
    "no",
]
OSRM = [
    "out_of_task",
    "statistic",
    "null_space",
    "objective",
    "in_task",
    "in_task_weight",
    "ridge",
    "protect_rank",
    "protect_energy",
    "osrm_seed",
    "r",
    "no",
]
ARGUMENTS = ["learning_rate", "num_train_epochs", "max_steps", "optim", "fp16", "report_to", "seed", "save_strategy"]


@pytest.mark.parametrize(
    "part, field",
    [*(("lora", one) for one in LORA), *(("osrm", one) for one in OSRM), *(("training", one) for one in ARGUMENTS)],
)
def test_the_fields_of_a_recipe_s_parts(tmp_path, part, field):
    refused = 0
    for value in WRONG:
        path = dump(tmp_path / "r.yaml", RECIPE | {part: {field: value}})
        try:
            Recipe.from_yaml(path)
        except ValueError as error:
            refused += 1
            one_line(error, path, field)
    assert refused >= 12


def test_unknown_training_arguments_are_named_before_training(tmp_path):
    recipe = Recipe(**RECIPE, training={"learning_rat": 1})
    with pytest.raises(ValueError, match=r"training in the recipe has 'learning_rat', which TrainingArguments"):
        recipe.train("tweets", tmp_path / "out")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    for seed, name in enumerate("ab"):
        make_adapter(root / name, seed=seed)
    return {name: str(root / name) for name in "ab"}


@pytest.mark.parametrize("field", [*MergeRequest.__dataclass_fields__, "features"])
def test_a_merge_recipe_s_fields(tmp_path, adapters, field):
    refused = 0
    for value in WRONG:
        path = dump(tmp_path / "m.yaml", {"adapters": adapters} | {field: value})
        try:
            plan_merge(MergeRequest.from_yaml(path).at_first_scale())
        except (ValueError, TypeError, OSError) as error:
            refused += 1
            one_line(error)
    assert refused >= 8


@pytest.mark.parametrize(
    "text", ["[" * DEEP, "{a: " * DEEP, "a: &a [*a", "\x00", "{a: 1, a: 2}", "? [1]\n: 2", "a: 2001-99-99"]
)
@pytest.mark.parametrize("cls", [Recipe, MergeRequest])
def test_yaml_that_is_none_is_one_line(tmp_path, text, cls):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"r.yaml is not YAML: .") as caught:
        cls.from_yaml(path)
    one_line(caught.value)
    with pytest.raises(ValueError, match=r"is not YAML: .") as caught:
        parse_yaml(text)
    assert len(str(caught.value)) < 600


def test_yaml_that_contains_itself_or_multiplies_is_one_line(tmp_path):
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
    for text in ("tasks: &t [*t]\nmodel: m\nsuite: s\n", laughs + "model: *a29\nsuite: s\n", laughs):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"r.yaml") as caught:
            Recipe.from_yaml(tmp_path / "r.yaml")
        assert len(str(caught.value)) < 2000


MERGES = [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 30)]
ENDLESS = {
    "keys": "{" + ",".join(f"a{place}: 1" for place in range(20_000)) + "}",
    "number": "1" * 50_000 + ".e",
    "merges": "\n".join(["a0: &a0 {x: 1}", *MERGES]),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_yaml_takes_no_longer_than_it_is_long(name):
    started = time.perf_counter()
    if name == "merges":
        with pytest.raises(ValueError, match="'<<' gives too many keys"):
            parse_yaml(ENDLESS[name])
    else:
        assert len(parse_yaml(ENDLESS[name])) in (20_000, 50_002)
    assert time.perf_counter() - started < 15  # without a bound: minutes to ages


def test_merged_keys_of_yaml_may_come_from_several_mappings():
    text = "a: &a {x: 1}\nb: &b {y: 2}\nc: {<<: *a, <<: *b, z: 3}\nd: {<<: [*a, *b], x: 4}"
    found = parse_yaml(text)
    assert found["c"] == {"x": 1, "y": 2, "z": 3} and found["d"] == {"x": 4, "y": 2}


@dataclass
class Kinds:
    one: Literal[1, "a"] = 1
    yes: Literal[True] = True


@pytest.mark.parametrize("field, value", [("one", True), ("one", 1.0), ("yes", 1), ("one", "b"), ("one", [])])
def test_a_choice_is_of_its_own_type(field, value):
    check_fields("recipe", {"one": "a", "yes": True}, Kinds)
    with pytest.raises(ValueError, match=rf"recipe: {field}=.* must be Literal"):
        check_fields("recipe", {field: value}, Kinds)


@pytest.mark.parametrize("text", ["1e-3", "1.e3", "1.5E+2", ".5e1", "-2e2"])
def test_numbers_of_yaml_1_2(text):
    assert parse_yaml(text) == float(text)


MANIFESTS = {
    "merged": {"kind": "merged", "base_model": "b", "method": "ties", "scale": 1.0, "inputs": {"a": {"source": "s"}},
               "options": {}, "weights": {"a": 1}, "energy_kept": {"l": 1.0}, "written_rank": 2, "space": "auto",
               "label_names": {"a": ["no", "yes"]}},
    "checkpoint": {"kind": "checkpoint", "method": "ties", "scale": 1.0, "inputs": {"a": {"source": "s"}},
                   "files": ["model.safetensors"]},
    "adapter": {"kind": "adapter", "task": "tweets", "base_model": "b", "osrm": {"initialized": True, "settings": {}},
                "label_names": ["no", "yes"], "data": {"train": "tweets.csv"},
                "log": [{"step": 1, "osrm/drift": 0.1}], "scores": [{"task": "t", "metric": "accuracy", "value": 1}]},
}  # fmt: skip


@pytest.mark.parametrize("name, field", [(name, field) for name, found in MANIFESTS.items() for field in found])
def test_a_manifest_s_fields(tmp_path, name, field, call):
    (tmp_path / "adapter_config.json").write_text("{}")
    page = tmp_path / "page.html"
    new = [{"task": "t", "metric": "accuracy", "value": 0.5}]
    for value in [one for one in WRONG if one != {1: 2}]:
        (tmp_path / MANIFEST).write_text(json.dumps(MANIFESTS[name] | {field: value}))
        for use in (
            lambda: read_manifest(tmp_path), lambda: record_scores(tmp_path, new),
            lambda: gather([tmp_path]), lambda: push_to_hub(tmp_path, "user/name"),
        ):  # fmt: skip
            (tmp_path / MANIFEST).write_text(json.dumps(MANIFESTS[name] | {field: value}))
            try:
                use()
            except (ValueError, OSError) as error:
                assert "\n" not in str(error) and re.search(rf"{MANIFEST}|{tmp_path}|Hub", str(error)), error
    (tmp_path / MANIFEST).write_text(json.dumps(MANIFESTS[name] | {field: 3}))
    for command in (
        ("evaluate", tmp_path, "--rows", 1),
        ("report", tmp_path, "--out", page),
        ("push", tmp_path, "u/n"),
    ):
        try:
            assert "Traceback" not in call(*command)
        except AssertionError as error:  # the command failed: its own error is one line
            assert "error: " in str(error) and "Traceback" not in str(error) and "unforeseen" not in str(error)


@pytest.mark.parametrize("text", ["[" * DEEP, '{"a":' * DEEP, '{"a": ' + "9" * 10_000 + "}", "\x00"])
def test_json_that_is_none_is_one_line(tmp_path, text, call):
    (tmp_path / MANIFEST).write_text(text)
    for command in (
        ("report", tmp_path),
        ("evaluate", tmp_path),
        ("push", tmp_path, "u/n"),
        ("merge", f"a={tmp_path}", "--out", tmp_path),
    ):
        found = call(*command, code=2)
        assert MANIFEST in found and "damaged" in found and "Traceback" not in found
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)


@pytest.mark.parametrize("field", GOOD)
def test_a_row_s_fields(tmp_path, field):
    for value in [one for one in WRONG if one != {1: 2}]:
        suite = task_folder(tmp_path, json.dumps(GOOD | {field: value}).encode())
        try:
            load_task(suite, "t")
        except ValueError as error:
            assert re.search(
                rf"suite/t(/train.jsonl, line 2)?: .*{'label' if field == 'label' else 'sentence'}", str(error)
            )


@pytest.mark.parametrize(
    "line", [b"[" * DEEP, b'{"label":' * DEEP, b"\xff", b'{"sentence1": "\\ud800", "label": 0}', b"3", b"{}"]
)
def test_a_row_that_is_none_is_named(tmp_path, line):
    with pytest.raises(ValueError, match=r"train.jsonl, line 2: expected a JSON object"):
        load_task(task_folder(tmp_path, line), "t")


def features(path):
    moments = FeatureMoments("mean", 2, 1, torch.ones(2), None, None)
    TaskFeatures("t", "base", "0" * 16, "mean", 1, layers={"layer": moments}).save(path)
    return json.loads(_metadata(path)["osrm_peft"])


def _metadata(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize(
    "field", [*Features.__dataclass_fields__, "k", "adapted", "counts", "same_input", "format", "other"]
)
def test_a_features_file_s_fields(tmp_path, field):
    path, refused = tmp_path / "t.features.safetensors", 0
    header = features(path)
    tensors = load_file(path)
    for value in [one for one in WRONG if one != {1: 2}]:
        save_file(tensors, path, {"osrm_peft": json.dumps(header | {field: value})})
        try:
            dict(TaskFeatures.load(path).layers)
        except ValueError as error:
            refused += 1
            one_line(error, path)
    assert refused >= 8


@pytest.mark.parametrize("text", ["[" * DEEP, '{"task": "t", "a":' * DEEP, "null", "3"])
def test_a_features_file_s_header_is_an_object(tmp_path, text):
    path = tmp_path / "t.features.safetensors"
    save_file({"layer.mean": torch.ones(2)}, path, {"osrm_peft": text})
    with pytest.raises(ValueError, match=r"t.features.safetensors is not a features file, or damaged"):
        TaskFeatures.load(path)


def test_an_emr_merge_s_notes(tmp_path, adapters):
    merge_adapters(adapters, "emr").save_pretrained(tmp_path / "emr")
    path = tmp_path / "emr/emr.safetensors"
    tensors, notes = load_file(path), json.loads(_metadata(path)["osrm_peft"])
    texts = [json.dumps(notes | {field: value}) for field in notes for value in WRONG if value != {1: 2}]
    for text in [*texts, "[" * DEEP, "null", "3"]:
        save_file(tensors, path, {"osrm_peft": text})
        try:
            EMRAdapter.from_pretrained(tmp_path / "emr")
        except ValueError as error:
            assert f"{tmp_path}/emr is damaged: " in str(error)


# --- single values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [2**70, 10**5000, -(10**5000), 1e400, float("nan"), "3", None, True, [1] * 10**6], ids=shown
)
def test_counts_and_numbers_have_bounds(value):
    for check in (lambda: integer("k", value, 1), lambda: number("k", value, -1e9, 1e9)):
        with pytest.raises(ValueError, match=r"^k=.* must (be|lie) .*") as caught:
            check()
        assert len(str(caught.value)) < 300


def test_what_is_shown_is_short():
    deep = []
    for _ in range(DEEP):
        deep = [deep]
    for value in (deep, "x" * 10**6, list(range(10**6)), {n: n for n in range(10**5)}, 10**10_000):
        assert len(shown(value)) < 500


DEVICES = ["con", "CON", "prn", "AUX", "nul", "NUL", "com1", "COM9", "lpt0", "com¹", "conin$", "CONOUT$"]
NO_NAMES = [
    *DEVICES, *(f"{one}.txt" for one in DEVICES), "nul.tar.gz", "con ", "con .txt",
    "a|b", "a<b", "a>b", "a?b", "a*b", 'a"b',
    "a:b", "a/b", "a\\b", "a.", "a ", "a..", ".", "..", ".a", "", " ", "a\x00b", "a\x1b[31m", "a\x7f", "a\x9b", "a\nb",
    "a\u202eb", "\ud800", "x" * 201, "ä" * 101, None, 3, ["a"],
]  # fmt: skip


@pytest.mark.parametrize("name", NO_NAMES, ids=repr)
def test_names_that_some_machine_cannot_hold(name):
    with pytest.raises(ValueError, match=r"the task name .* cannot be a file name"):
        task_name(name)


def test_names_that_every_machine_holds():
    for name in (
        "a",
        "console",
        "com",
        "com10",
        "null",
        "aux_1",
        "a.b",
        "a b",
        "ä",
        "日本",
        "x" * 200,
        "lpt",
        "my-con.txt",
    ):
        assert task_name(name) == name


@pytest.mark.parametrize("names", [("a", "A"), ("ß", "ss"), ("é", "e\u0301"), ("Tweets", "b", "tweets")])
def test_names_that_some_machine_takes_for_one(tmp_path, names, adapters):
    with pytest.raises(ValueError, match="would share files where case does not count: rename one"):
        task_names(names)
    with pytest.raises(ValueError, match="would share files"):
        merge_adapters(dict.fromkeys(names, adapters["a"]), "average")
    with pytest.raises(ValueError, match="would share files"):
        Recipe("packaged", "packaged", tasks=list(names))


def test_a_suite_s_tasks_are_names(tmp_path):
    suite = task_folder(tmp_path)
    Path(tmp_path, "suite/t").rename(tmp_path / "suite/con")
    with pytest.raises(ValueError, match="the task name 'con' cannot be a file name"):
        load_task(suite, "con")
