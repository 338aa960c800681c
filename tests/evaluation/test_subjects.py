"""What `evaluate` takes: adapters, merges, sweeps and full models, with what their manifests say of them."""

import json
import shutil

import pytest

from osrm_peft import bake_adapter, extract_adapter, load_tokenizer, merge_adapters, merge_checkpoints
from osrm_peft.evaluation.subjects import Subject, subjects
from osrm_peft.io.manifest import read_manifest
from osrm_peft.training.recipe import Recipe
from tests.helpers.adapters import make_adapter
from tests.helpers.models import make_base
from tests.helpers.suites import tiny_recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """{task: adapter folder} of tasks of one's own, trained on rows of 8 tokens."""
    path = tiny_recipe(tmp_path_factory.mktemp("trained"), osrm=None)
    recipe = Recipe.from_yaml(path)
    return {task: recipe.train(task, path.parent / "adapters" / task) for task in recipe.task_names()}


@pytest.fixture(scope="module")
def merged(trained, tmp_path_factory):
    root = tmp_path_factory.mktemp("merged")
    one = merge_adapters(trained, "task_arithmetic")
    one.save_pretrained(root / "one")
    for scale in (0.5, 1.0, 10.0):
        one.at_scale(scale).save_pretrained(root / f"sweep/scale_{scale}")
    merge_adapters(trained, "emr").save_pretrained(root / "emr")
    return root


def scores(call, *words):
    """{name: {task: score}} that `evaluate` prints."""
    found = {}
    for one in json.loads(call("evaluate", *words, "--json", "--quiet")):
        found.setdefault(one["name"], {})[one["task"]] = one["score"]
    return found


def test_an_adapter_and_a_merge_know_their_tasks_data_and_length(trained, merged, call):
    alone = scores(call, trained["sizes"])
    assert list(alone) == ["sizes"] and list(alone["sizes"]) == ["sizes"]
    for name in ("one", "emr"):
        assert list(scores(call, merged / name)[name]) == ["colours", "shapes", "sizes"]
    assert read_manifest(merged / "one")["max_length"] == 8
    assert subjects(str(merged / "one"))[0].suite["sizes"].train.endswith("data/sizes.csv")


def test_select_knows_the_tasks_data_and_length_of_the_adapters(trained, tmp_path, call):
    (tmp_path / "c.yaml").write_text("- {method: average}\n- {method: tsv}\n")
    words = [*trained.values(), "--candidates", tmp_path / "c.yaml", "--out", tmp_path / "chosen"]
    found = json.loads(call("select", *words, "--json", "--quiet"))
    assert list(found["tasks"]) == ["colours", "shapes", "sizes"] and found["settings"]["max_length"] == 8
    foreign = tmp_path / "foreign" / "sizes"  # without a manifest, as stock PEFT writes it
    shutil.copytree(trained["sizes"], foreign)
    (foreign / "osrm_peft.json").unlink()
    rows = f"files:{trained['sizes'].parents[1] / 'data'}"
    words = [foreign, trained["shapes"], "--suite", rows, "--rows", "4", "--candidates", tmp_path / "c.yaml"]
    call("select", *words, "--score", "test -d {model} && echo 0.5", "--out", tmp_path / "other")


@pytest.mark.parametrize("verb", ["evaluate", "select"])
@pytest.mark.parametrize("length", ["0", "-1"])
def test_a_length_that_cannot_be_is_refused(verb, length, trained, tmp_path, call):
    more = ["--out", tmp_path / "s"] if verb == "select" else []
    said = call(verb, trained["sizes"], *more, f"--max-length={length}", code=2)
    assert f"--max-length {length} must be a whole number of at least 1" in said


def test_data_that_a_manifest_names_wrongly_are_named(trained, tmp_path, call):
    copy = shutil.copytree(trained["sizes"], tmp_path / "sizes")
    manifest = json.loads((copy / "osrm_peft.json").read_text())
    manifest["data"]["x"] = 1
    (copy / "osrm_peft.json").write_text(json.dumps(manifest))
    assert "osrm_peft.json: data of sizes has 'x'" in call("evaluate", copy, code=2)


def test_data_that_are_not_here_are_not_looked_for_elsewhere(trained, tmp_path, monkeypatch, call):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/sizes.csv").write_text("text,label\nanother,1\n")
    monkeypatch.chdir(tmp_path)
    assert list(scores(call, trained["sizes"])) == ["sizes"]  # its own rows, from any folder
    pushed = tmp_path / "pushed"
    shutil.copytree(trained["sizes"], pushed)
    manifest = read_manifest(pushed)
    for file in ("data/sizes.csv", "sizes.csv", str(tmp_path / "gone.csv")):  # what a push leaves of a path
        manifest["data"]["train"] = file
        (pushed / "osrm_peft.json").write_text(json.dumps(manifest))
        printed = call("evaluate", pushed, code=2)
        assert f"the data of 'sizes', {file}, are not here: name the rows with --suite" in printed


def test_a_sweep_is_scored_scale_by_scale_and_keeps_each_ones_scores(merged, call):
    found = scores(call, merged / "sweep", "--save")
    assert list(found) == ["sweep/scale_0.5", "sweep/scale_1.0", "sweep/scale_10.0"]  # by number
    for name, by_task in found.items():
        saved = {one["task"]: one["value"] for one in read_manifest(merged / name)["scores"]}
        assert saved == pytest.approx(by_task)
    assert found["sweep/scale_1.0"] == scores(call, merged / "sweep/scale_1.0")["scale_1.0"]


def test_a_full_model_is_scored_with_the_head_of_each_task(trained, tmp_path, call):
    base = read_manifest(trained["sizes"])["base_model"]
    for seed, task in enumerate(("shapes", "sizes")):
        make_base(2, seed=seed).save_pretrained(tmp_path / task)
        load_tokenizer(base).save_pretrained(tmp_path / task)
    merge_checkpoints(
        {task: tmp_path / task for task in ("shapes", "sizes")},
        tmp_path / "full",
        "average",
        heads=["classifier.*"],
    )
    suite = f"files:{trained['sizes'].parents[1] / 'data'}"
    assert list(scores(call, tmp_path / "full", "--suite", suite)["full"]) == ["shapes", "sizes"]
    assert list(scores(call, tmp_path / "sizes", "--suite", suite, "--task", "sizes")["sizes"]) == ["sizes"]
    assert "does not say which task it is for: name it with --task" in call(
        "evaluate", tmp_path / "sizes", "--suite", suite, code=2
    )


def test_a_model_without_tokenizer_and_a_causal_one_are_refused(trained, merged, tmp_path, call):
    make_base(2).save_pretrained(tmp_path / "bare")
    for file in ("tokenizer.json", "tokenizer_config.json", "words.txt", "vocab.txt"):
        assert not (tmp_path / "bare" / file).exists()
    printed = call("evaluate", merged / "one", "--base-model", tmp_path / "bare", code=2)
    assert "has no tokenizer, so no row can be read" in printed and "--base-model" in printed
    causal = tmp_path / "causal"
    shutil.copytree(trained["sizes"], causal)
    config = json.loads((causal / "adapter_config.json").read_text())
    (causal / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
    assert "is a causal language model, which has no head for the classes of 'sizes'" in call(
        "evaluate", causal, code=2
    )


def test_a_folder_of_something_else_is_refused(tmp_path, call):
    (tmp_path / "nothing").mkdir()
    assert "holds no adapter, merge or model (none of adapter_config.json, emr.safetensors, config.json)" in call(
        "evaluate", tmp_path / "nothing", code=2
    )


def test_baked_and_extracted_folders_name_no_inputs_as_tasks(tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    make_adapter(tmp_path / "adapter")
    bake_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "baked")
    extract_adapter(tmp_path / "base", tmp_path / "baked", tmp_path / "extracted", rank=4)
    for name in ("baked", "extracted"):
        found = Subject(name, tmp_path / name, read_manifest(tmp_path / name))
        assert found.tasks is None and found.kind == {"baked": "checkpoint", "extracted": "adapter"}[name]
