"""The study's tables against predictions that are made up: what is kept, which λ is chosen, which rows are shown."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from kept import tables
from kept.settings import PARTS, SEEDS, Cell, cells
from kept.trials import TRIALS
from safetensors.numpy import save_file

from osrm_peft.merging.methods.registry import METHODS

TA = ("TA", {"method": "task_arithmetic"}, 0.3, (0.2, 0.3))
EMR = ("EMR", {"method": "emr"}, None, ())
LABELS = np.arange(12.0) % 2
TASKS = ("s", "t")


def right(*rows):
    """Predictions that are right on these rows alone."""
    known = np.isin(np.arange(len(LABELS)), rows)
    return np.where(known, LABELS, 1 - LABELS)


EVEN, ODD = range(0, 12, 2), range(1, 12, 2)
ENTRIES = {
    "base": right(0, 1, 2),
    "alone": right(*range(9)),
    "TA, λ 0.2": right(*EVEN, 1),  # better on the rows of even place
    "TA, λ 0.3": right(*ODD),
    "EMR": right(*range(6)),
}


def write(out, cell, entries=ENTRIES):
    folder = out / cell.key
    folder.mkdir(parents=True)
    found = {f"{key}/{task}": value for key, value in entries.items() for task in TASKS}
    save_file(found | {f"label/{task}": LABELS for task in TASKS}, folder / "predictions.safetensors")
    note = {"drift": 0.1, "before": 0.02, "after": 0.03}
    about = {
        "rate": 3e-4,
        "tasks": {task: {"metric": "accuracy"} for task in TASKS},
        "notes": {task: note for task in TASKS},
    }
    (folder / "cell.json").write_text(json.dumps(about))
    return folder


def test_the_share_kept_lies_between_the_base_model_and_the_adapters_alone(tmp_path):
    scored = tables.Scored.of(write(tmp_path, Cell()))
    assert (scored.mean("base"), scored.mean("alone"), scored.mean("EMR")) == (25, 75, 50)
    assert scored.kept(scored.mean("EMR")) == pytest.approx(50)
    assert scored.kept(scored.mean("base")) == 0 and scored.kept(scored.mean("alone")) == 100


def test_a_chosen_scale_is_scored_on_the_rows_that_did_not_choose_it(tmp_path):
    scored = tables.Scored.of(write(tmp_path, Cell()))
    # on even places λ = 0.2 is right everywhere, on odd ones λ = 0.3: each is scored where it is wrong but for one row
    assert scored.chosen(TA) == pytest.approx(100 * (1 / 6 + 0) / 2)
    assert max(scored.mean(f"TA, λ {scale:g}") for scale in TA[3]) > 50


def test_only_rows_of_which_every_seed_is_there_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MERGES", (TA, EMR))
    wanted = {one.init: one for one in cells("minilm-low") if one.seed == SEEDS[0]}
    for init, better in (("plain", ENTRIES), ("ratio", ENTRIES | {"EMR": right(*range(12))})):
        for seed in SEEDS[: 3 if init == "plain" else 2]:
            write(tmp_path, replace(wanted[init], seed=seed), better)
    assert "ratio" not in tables.of(tmp_path, "minilm-low")
    write(tmp_path, replace(wanted["ratio"], seed=SEEDS[2]), ENTRIES | {"EMR": right(*range(12))})
    text = tables.of(tmp_path, "minilm-low")
    assert "| EMR | 50.0 ± 0.0 | 100.0 ± 0.0 |" in text and "| EMR | 50 ± 0 | 150 ± 0 |" in text
    low, high = map(float, re.search(r"\| EMR \| \+50\.0 \(([+-][\d.]+) … ([+-][\d.]+)\)", text).groups())
    assert 0 < low < 50 < high < 100
    assert re.search(r"\| alone \| \+0\.0 \([+-]0\.0 … [+-]0\.0\)", text)  # the same rows in each resample
    assert tables.of(tmp_path, "mpnet-low").endswith("no row has all seeds yet\n")


def test_each_group_is_compared_with_plain_adapters_of_as_many_tasks(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MERGES", (EMR,))
    for cell in cells("many"):
        if cell.tasks < 16:
            right_rows = range(4 + (cell.init == "ratio") * cell.tasks)
            write(tmp_path, cell, ENTRIES | {"EMR": right(*right_rows)})
    text = tables.of(tmp_path, "many")
    assert (
        "| scores | plain, N = 2 | plain, N = 4 | plain, N = 8 | ratio, N = 2 | ratio, N = 4 | ratio, N = 8 |" in text
    )
    assert "| against plain | ratio, N = 2 | ratio, N = 4 | ratio, N = 8 |" in text
    differences = text.rpartition("| EMR |")[2].split("|")[:3]
    assert [float(one.split()[0]) for one in differences] == [16.7, 33.3, 66.7]


def test_every_cell_has_a_folder_of_its_own():
    made = {}
    for part in PARTS:
        for cell in cells(part):
            assert made.setdefault(cell.key, cell) == cell


def test_trials_are_known_in_the_study_alone():
    assert not [name for name in METHODS if name.startswith("trial")]
    names = [label for label, *_ in TRIALS]
    assert len(set(names)) == len(names)
