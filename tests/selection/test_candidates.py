from pathlib import Path

import pytest

from osrm_peft.merging import METHODS
from osrm_peft.selection.candidates import DEFAULT, default_candidates, expand, read_candidates


def names(*entries):
    return [candidate.name for candidate in expand(entries)]


def test_a_list_is_a_sweep_and_scales_share_a_merge():
    entry = {"method": "ties", "options": {"density": [0.2, 0.4]}, "scale": [0.5, 1], "rank": [None, 16]}
    found = expand([entry])
    assert len(found) == 8 and len({candidate.merge for candidate in found}) == 4
    assert found[0].name == "ties, density 0.2, λ 0.5" and found[-1].name == "ties, density 0.4, rank 16, λ 1"


def test_a_name_says_what_differs_from_the_defaults():
    assert names({"method": "task_arithmetic"}) == ["task_arithmetic, λ 0.3"]  # the paper's scale
    assert names({"method": "ties", "space": "knots"}) == ["ties in knots, λ 1"]
    assert names({"method": "task_arithmetic", "weights": "features"}) == ["task_arithmetic, weights by features, λ 1"]
    assert names({"method": "lore", "scale": "features"}) == ["lore, λ by features"]


def test_the_defaults_are_what_the_files_allow():
    none = {candidate.fields["method"] for candidate in default_candidates(3, {})}
    assert "regmean" not in none and {"tsv", "ties", "lore", "emr"} <= none <= set(METHODS)
    files = {"features": {"a": "f"}, "gram": {"a": "g"}}
    every = default_candidates(3, files)
    assert len(every) == len(expand(DEFAULT)) > len(default_candidates(3, {}))
    assert f"{len(every)} merges tried" in (Path(__file__).parents[2] / "README.md").read_text()
    assert [candidate.per_task for candidate in every].count(True) == 1
    assert not any(candidate.fields["method"] == "lore" for candidate in default_candidates(2, files))  # the average


MISTAKES = [
    ([], "no candidates: name at least one merge"),
    (["tsv"], "candidate 'tsv': give a mapping with a method"),
    ([{"scale": 1}], "give a mapping with a method"),
    ([{"method": "tsvv"}], "candidate tsvv: unknown merge method 'tsvv': choose from average"),
    ([{"method": "ties", "options": {"densty": 1}}], "candidate ties: ties has no option densty; its options are"),
    ([{"method": "ties", "options": {"density": 2}}], r"density=2 must lie in \(0, 1\]"),
    ([{"method": "ties", "scale": []}], r"scale=\[\] is an empty sweep"),
    ([{"method": "ties", "scale": [1, "x"]}], "candidate ties"),
    ([{"method": "ties", "adapters": {}}], "adapters is the same for all candidates"),
    ([{"method": "ties", "densty": 0.2}], "densty"),
    ([{"method": "ties", "rank": 0}], "candidate ties: rank=0 must be a whole number of at least 1"),
    ([{"method": "emr", "rank": 8}], "candidate emr: emr has a result for each task, which takes no rank"),
    ([{"method": "ties", "heads": "mean"}], "candidate ties: unknown heads policy 'mean'"),
    ([{"method": "ties"}, {"method": "ties", "scale": 1.0}], "'ties, λ 1' is there twice"),
]


@pytest.mark.parametrize("entries, message", MISTAKES)
def test_a_mistake_names_the_candidate_and_the_way_out(entries, message):
    with pytest.raises((ValueError, TypeError), match=message):
        expand(entries)


def test_candidates_from_a_file(tmp_path):
    (tmp_path / "c.yaml").write_text("- {method: tsv, scale: [0.5, 1]}\n- method: average\n")
    assert [one.name for one in read_candidates(tmp_path / "c.yaml")] == ["tsv, λ 0.5", "tsv, λ 1", "average, λ 1"]
    (tmp_path / "c.yaml").write_text("method: tsv\n")
    with pytest.raises(ValueError, match=r"c.yaml: candidates are a list of merges, not \{'method': 'tsv'\}"):
        read_candidates(tmp_path / "c.yaml")
    with pytest.raises(FileNotFoundError, match="no file of candidates"):
        read_candidates(tmp_path / "none.yaml")
