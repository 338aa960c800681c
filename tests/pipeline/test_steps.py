import json

import pytest

from osrm_peft.pipeline.steps import Steps, difference


def test_a_step_is_made_once_and_again_when_what_it_is_made_from_changes(tmp_path):
    said = []
    steps = Steps(tmp_path, said.append, 3)
    assert steps.needs("adapters/a", {"lora": {"r": 8}}, False)
    steps.done("adapters/a", {"lora": {"r": 8}})
    steps = Steps(tmp_path, said.append, 3)
    assert not steps.needs("adapters/a", {"lora": {"r": 8}}, True)
    assert steps.needs("adapters/a", {"lora": {"r": 16}}, True)
    assert said == [
        "[1/3] adapters/a: making it",
        "[1/3] adapters/a: is there already",
        "[2/3] adapters/a: making it anew (lora r was 8, is 16)",
    ]
    assert steps.needs("adapters/a", {"lora": {"r": 16}}, False)  # somebody removed it


def test_what_no_run_has_made_is_refused(tmp_path):
    with pytest.raises(FileExistsError, match=r"adapters/a exists, and no run into .* made it: name another folder"):
        Steps(tmp_path, print, 1).needs("adapters/a", {}, True)


def test_a_step_that_was_begun_and_not_finished_is_made_again(tmp_path):
    steps = Steps(tmp_path, lambda line: None, 1)
    steps.done("a", {"r": 1})
    assert steps.needs("a", {"r": 2}, True)  # and then the machine stops: neither the old nor the new is recorded
    steps.done("b", {})
    assert json.loads((tmp_path / "steps.json").read_text()) == {"begun": {"a": {"r": 2}}, "b": {}}
    steps = Steps(tmp_path, lambda line: None, 1)
    assert steps.begun("a") == {"r": 2} and steps.needs("a", {"r": 2}, True)  # what lies there is the run's own
    steps.done("a", {"r": 2})
    assert steps.begun("a") is None


@pytest.mark.parametrize("content", ['{"begun": 3}', '{"features/a": []}', "[]"])
def test_a_file_of_others_is_refused(content, tmp_path):
    (tmp_path / "steps.json").write_text(content)
    with pytest.raises(ValueError, match=r"steps.json is (no file of a run|damaged)"):
        Steps(tmp_path, print, 1)


@pytest.mark.parametrize(
    "before, now, text",
    [
        ({"a": 1}, {"a": 2}, "a was 1, is 2"),
        ({"a": {"b": [1]}}, {"a": {"b": [2]}}, "a b was [1], is [2]"),
        ({"a": 1}, {}, "a was 1, is None"),
        ({}, {"x": {"y": 1}}, "x was None, is {'y': 1}"),
    ],
)
def test_the_first_difference_is_named(before, now, text):
    assert difference(before, now) == text
