"""A result takes the place of none that was made otherwise, or that has scores, unless it is told to."""

import json
from dataclasses import replace

import pytest

from osrm_peft import LeastSquares, load_adapter, merge_adapters, project_adapter
from osrm_peft.hub.card import record_scores
from osrm_peft.io.manifest import read_manifest, what_is_lost
from tests.helpers.adapters import make_adapter
from tests.helpers.lora import lora
from tests.helpers.merging import features_of

SCORES = [{"task": "a", "metric": "accuracy", "value": 0.5}]


@pytest.fixture
def adapters(tmp_path):
    for seed, name in enumerate("ab", start=1):
        make_adapter(tmp_path / name, seed=seed)
    return {name: str(tmp_path / name) for name in "ab"}


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


CHANGES = {
    "method": (lambda given: given | {"method": "average"}, r"method 'task_arithmetic', not 'average'"),
    "scale": (lambda given: given | {"scale": 0.7}, r"scale 0.3, not 0.7"),
    "weights": (lambda given: given | {"weights": [1, 2]}, r"weights \{'a': 1.0, 'b': 1.0\}, not"),
    "rank": (lambda given: given | {"rank": 2}, r"rank None, not 2"),
    "space": (lambda given: given | {"space": "weight"}, r"space 'core', not 'weight'"),
    "options": (lambda given: given | {"method": "ties", "density": 0.5}, r"method 'task_arithmetic', not 'ties'"),
    "fewer": (lambda given: given | {"adapters": {"a": given["adapters"]["a"]}}, r"weights \{"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_merge_of_another_kind_takes_no_place(tmp_path, adapters, change, message):
    given = {"adapters": adapters, "method": "task_arithmetic"}
    merge_adapters(**given).save_pretrained(tmp_path / "out")
    before = content(tmp_path / "out")
    merge_adapters(**given).save_pretrained(tmp_path / "out")  # the same again
    other = merge_adapters(**change(given))
    with pytest.raises(
        FileExistsError, match=rf"out holds another result \({message}.* overwrite=True \(--overwrite\)"
    ):
        other.save_pretrained(tmp_path / "out")
    assert content(tmp_path / "out").keys() == before.keys()
    other.save_pretrained(tmp_path / "out", overwrite=True)
    assert read_manifest(tmp_path / "out")["method"] == change(given)["method"]


def test_another_input_under_the_same_name_is_told(tmp_path, adapters):
    merge_adapters(adapters, "average").save_pretrained(tmp_path / "out")
    make_adapter(tmp_path / "b", seed=9)  # trained anew
    with pytest.raises(FileExistsError, match=r"another result \('b' from another input\)"):
        merge_adapters(adapters, "average").save_pretrained(tmp_path / "out")


@pytest.mark.parametrize("method", ["average", "emr"])
def test_scores_are_not_lost(tmp_path, adapters, method):
    merge_adapters(adapters, method).save_pretrained(tmp_path / "out")
    record_scores(tmp_path / "out", SCORES)
    with pytest.raises(FileExistsError, match=r"another result \(scores of a\)"):
        merge_adapters(adapters, method).save_pretrained(tmp_path / "out")
    assert read_manifest(tmp_path / "out")["scores"] == SCORES
    merge_adapters(adapters, method).save_pretrained(tmp_path / "out", overwrite=True)
    assert "scores" not in read_manifest(tmp_path / "out")


def test_a_merge_by_a_rule_is_compared_by_its_features(tmp_path):
    given = {task: lora(seed) for seed, task in enumerate("st")}
    files, _ = features_of(given)
    merged = merge_adapters(given, "average", scale=LeastSquares(files))
    merged.save_pretrained(tmp_path / "out")
    with pytest.raises(FileExistsError, match=r"another result \(features \{"):
        merge_adapters(given, "average", scale=1).save_pretrained(tmp_path / "out")


def test_a_projected_adapter_does_not_replace_the_trained_one(tmp_path, adapters):
    trained = load_adapter(adapters["a"])
    features, _ = features_of("x", layers={name: (o, n, r) for name, (o, r, n) in trained.shapes.items()})
    known = replace(features["x"], base_model=trained.base_model)
    first = project_adapter(trained, [known], seed=0)
    first.save_pretrained(tmp_path / "projected")
    first.save_pretrained(tmp_path / "projected")
    other = project_adapter(trained, [known], seed=1)
    with pytest.raises(FileExistsError, match=r"another result \(projected \{"):
        other.save_pretrained(tmp_path / "projected")
    other.save_pretrained(tmp_path / "projected", overwrite=True)


def test_a_folder_of_a_sweep_is_of_one_sweep(tmp_path, adapters, call):
    given = ["merge", *(f"{name}={folder}" for name, folder in adapters.items()), "--out", tmp_path / "out"]
    call(*given, "-m", "ties", "--scale", "0.5", "--scale", "1")
    before = content(tmp_path / "out")
    printed = call(*given, "-m", "average", "--scale", "0.7", "--scale", "0.8", code=2)
    assert "out holds scale_0.5 of another sweep: name a new folder" in printed and content(tmp_path / "out") == before
    printed = call(*given, "-m", "average", "--scale", "0.5", "--scale", "0.8", code=2)
    assert "holds another result (method 'ties', not 'average')" in printed and content(tmp_path / "out") == before
    call(*given, "-m", "ties", "--scale", "0.5", "--scale", "0.25")  # one more scale of the same merge
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["scale_0.25", "scale_0.5", "scale_1.0"]


def test_a_second_merge_is_refused_before_any_work_and_a_flag_replaces_the_first(tmp_path, adapters, call):
    given = ["merge", *(f"{name}={folder}" for name, folder in adapters.items()), "--out", tmp_path / "out"]
    call(*given, "-m", "ties")
    before = content(tmp_path / "out")
    printed = call(*given, "-m", "lore", "--dry-run", code=2)
    assert "holds another result (method 'ties', not 'lore')" in printed and "--overwrite" in printed
    assert content(tmp_path / "out") == before
    call(*given, "-m", "lore", "--overwrite")
    assert read_manifest(tmp_path / "out")["method"] == "lore"


def test_what_is_lost_is_said_in_the_words_of_the_manifest():
    earlier = {"method": "ties", "inputs": {"a": {"sha256": "1"}}}
    assert what_is_lost(earlier, earlier) is None
    assert what_is_lost(earlier, earlier | {"inputs": {"a": {"sha256": "2"}}}) == "'a' from another input"
    assert what_is_lost(earlier, earlier | {"inputs": {"b": {"sha256": "1"}}}) == "of a"
    assert what_is_lost(earlier | {"scores": SCORES}, earlier) == "scores of a"
    assert what_is_lost(earlier, json.loads(json.dumps(earlier)) | {"command": "another"}) is None


def test_a_task_of_an_earlier_merge_makes_no_other_file_ours(tmp_path, adapters):
    merge_adapters(adapters, "average").save_pretrained(tmp_path / "both")
    merge_adapters(adapters, "average").save_pretrained(tmp_path / "both")
    alone = merge_adapters({"a": adapters["a"]}, "average")
    alone.save_pretrained(tmp_path / "one")
    (tmp_path / "one/heads/b.safetensors").write_text("of somebody else")
    with pytest.raises(FileExistsError, match=r"holds files of others \(heads/b.safetensors\)"):
        alone.save_pretrained(tmp_path / "one")
