"""The reproduction: its graph, and every experiment on a tiny model through the real command."""

import csv
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
import yaml
from reproduction.experiments import EXPERIMENTS, planned
from reproduction.graph import Node, levels, make, missing, ordered, plan_table, run
from reproduction.outputs import write_outputs
from reproduction.suite import OSRM, PLAIN, Suite
from rich.console import Console
from transformers import AutoModelForCausalLM, BertTokenizerFast

from tests.helpers.causal import save_tiny
from tests.helpers.models import make_base

ROOT = Path(__file__).parents[2]


CONFIGS = sorted((ROOT / "recipes/configs").glob("reproduce_*.yaml"))


def node(name, log, *inputs, kind="text", about=None):
    def write(path, given, processes):
        log.append(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name + "".join(one.read_text() for one in given.values()))

    return Node(kind, about or {"name": name}, write, {f"i{n}": one for n, one in enumerate(inputs)}, ".txt")


def diamond(log, **changed):
    a = node("a", log, about=changed.get("a"))
    b, c = node("b", log, a), node("c", log, a, about=changed.get("c"))
    return node("d", log, b, c)


def test_each_artefact_is_made_once_inputs_first(tmp_path):
    log = []
    end = diamond(log)
    assert [one.about["name"] for one in ordered([end, end])] == ["a", "b", "c", "d"]
    assert [[one.about["name"] for one in level] for level in levels(ordered([end]))] == [["a"], ["b", "c"], ["d"]]
    run([end], tmp_path)
    assert log == ["a", "b", "c", "d"] and end.path(tmp_path).read_text() == "dbaca"
    run([diamond(log)], tmp_path)  # another graph with the same artefacts
    assert len(log) == 4


def test_what_changed_is_made_anew_and_what_needs_it(tmp_path):
    log = []
    run([diamond(log)], tmp_path)
    log.clear()
    run([diamond(log, c={"name": "c", "version": 2})], tmp_path)
    assert log == ["c", "d"]
    log.clear()
    run([diamond(log, a={"name": "a", "version": 2})], tmp_path)
    assert log == ["a", "b", "c", "d"]


def test_an_interrupted_run_goes_on(tmp_path):
    log = []
    end = diamond(log)
    a, b, c = ordered([end])[:3]
    make(a, tmp_path)
    b.path(tmp_path).write_text("half")  # written, but not noted: it was interrupted
    c.note(tmp_path).write_text("{}")
    assert [one.about["name"] for one in missing([end], tmp_path)] == ["b", "d"]
    c.path(tmp_path).write_text("c")
    run([end], tmp_path)
    assert log == ["a", "b", "d"] and end.path(tmp_path).read_text() == "dbac"


def test_inputs_of_what_is_there_are_not_made(tmp_path):
    log = []
    end = diamond(log)
    run([end], tmp_path)
    for one in ordered([end])[:3]:
        one.note(tmp_path).unlink()
    assert missing([end], tmp_path) == []


def planned_row(end, cache):
    console = Console(width=120)
    with console.capture() as captured:
        console.print(plan_table([end], cache))
    return next(line for line in captured.get().splitlines() if "text" in line).replace("│", "").split()


def test_a_plan_counts_what_is_there(tmp_path):
    end = diamond([])
    make(ordered([end])[0], tmp_path)
    assert planned_row(end, tmp_path)[:6] == ["text", "4", "1", "3", "3", "files"]


def test_a_plan_does_not_guess_the_time_of_another_model(tmp_path):
    made, same, other = (node(name, [], about={"name": name, "model": name[0]}) for name in ("small", "same", "large"))
    make(made, tmp_path)
    assert planned_row(same, tmp_path) == ["text", "1", "0", "1", "1", "files", "0", "min"]
    assert planned_row(other, tmp_path) == ["text", "1", "0", "1", "1", "files"]


def test_a_note_tells_how_an_artefact_was_made(tmp_path):
    log = []
    end = diamond(log)
    run([end], tmp_path)
    note = json.loads(end.note(tmp_path).read_text())
    assert note["about"] == {"name": "d"} and set(note["inputs"]) == {"i0", "i1"}
    assert note["versions"]["torch"] and note["seconds"] >= 0 and note["inputs"]["i0"] == end.inputs["i0"].key


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_planned_without_loading_anything(path):
    suite = Suite.from_yaml(path)
    experiments = planned(suite, [])
    nodes = ordered(node for one in experiments for node in one.needs())
    assert len({one.key for one in nodes}) == len(nodes) > 40
    kinds = {one.kind for one in nodes}
    assert {"features", "adapter", "merged", "alone", "statistic"} <= kinds
    assert ("rate" in kinds) == (len(suite.rates) > 1) and ("projected" in kinds) == ("post" in suite.experiments)


def test_the_small_reproduction_has_every_experiment_and_three_seeds():
    suite = Suite.from_yaml(ROOT / "recipes/configs/reproduce_minilm.yaml")
    assert set(suite.experiments) == set(EXPERIMENTS) and len(suite.seeds) >= 3


def suite_of(**changed):
    return Suite("packaged", "packaged", ["tweets", "sms_spam"], {"target_modules": ["query"]}, {}, **changed)


def test_adapters_are_shared_wherever_they_are_the_same():
    suite = suite_of(rates=[1e-3, 2e-3])
    key = suite.adapter(OSRM, "tweets", 42).key
    assert key == suite_of(rates=[1e-3, 2e-3], validation_rows=5, seeds=[1, 2]).adapter(OSRM, "tweets", 42).key
    for other in (
        suite_of(rates=[1e-3]), suite_of(rates=[1e-3, 2e-3], num_samples=7), suite_of(rates=[1e-3, 2e-3], train_rows=9),
        suite_of(rates=[1e-3, 2e-3], osrm={"statistic": "mean"}),
    ):  # fmt: skip
        assert other.adapter(OSRM, "tweets", 42).key != key
    assert suite.adapter(OSRM, "tweets", 43).key != key != suite.adapter(PLAIN, "tweets", 42).key
    assert suite.adapter(PLAIN, "tweets", 42).key == suite.adapter(PLAIN, "tweets", 42, ["tweets"]).key


def test_rates_are_chosen_by_another_seed_on_rows_of_the_training_split():
    suite = suite_of(rates=[1e-3, 2e-3], train_rows=40, held_out=20)
    rows = suite._held_out("tweets")
    reported = set(suite.recipe(42).task("tweets").validation["sentence1"])
    assert len(rows.train) == 40 and len(rows.validation) == 20
    assert not set(rows.train["sentence1"]) & set(rows.validation["sentence1"])
    assert not reported & (set(rows.train["sentence1"]) | set(rows.validation["sentence1"]))
    rate = suite.rate(OSRM, "tweets")
    assert {one.about["seed"] for one in rate.inputs.values()} == {suite.tuning_seed}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tuning_seed": 42}, r"tuning_seed=42 is among seeds=\[42\]"),
        ({"training": {"learning_rate": 1e-3}}, r"learning_rate among training: give rates"),
        ({"epochs": 3}, r"found \['epochs', "),
        ({"experiments": {"table9": {}}}, r"unknown experiment 'table9': choose from main, rank"),
        ({"paper": "roberta"}, r"paper='roberta' has no figures: choose from roberta-large, t5-large"),
        ({"merge_options": {"regmean": {"ridge": -1}}}, r"merge_options: ridge=-1"),
        ({"merge_options": {"regmeen": {}}}, r"merge_options: .*'regmeen'"),
    ],
)
def test_configurations_that_are_wrong(changed, message, tmp_path):
    content = {"model": "packaged", "suite": "packaged", "tasks": ["tweets"], "lora": {}, "training": {}}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(content | changed))
    with pytest.raises(ValueError, match=message):
        planned(Suite.from_yaml(tmp_path / "x.yaml"), [])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A configuration of a tiny model with two tasks of JSON lines."""
    root = tmp_path_factory.mktemp("tiny")
    words = [f"w{n}" for n in range(45)]
    (root / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    make_base().save_pretrained(root / "model")
    BertTokenizerFast(str(root / "vocab.txt"), model_max_length=32).save_pretrained(root / "model")
    for task in ("one", "two"):
        for split, count in (("train", 40), ("validation", 8)):
            path = root / "suite" / task / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = [
                {"sentence1": f"w{n % 45} w{(n * 7 + len(task)) % 45} {split[0]}w{n}", "label": n % 2}
                for n in range(count)
            ]
            path.write_text("\n".join(map(json.dumps, rows)))
    content = {
        "model": str(root / "model"), "suite": f"jsonl:{root / 'suite'}", "tasks": ["one", "two"],
        "lora": {"target_modules": ["query", "value"], "r": 2},
        "training": {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1},
        "rates": [1e-3, 1e-2], "max_length": 8, "train_rows": 16, "validation_rows": 8, "held_out": 8, "num_samples": 4,
        "seeds": [1, 2], "tuning_seed": 0,
        "experiments": {
            "main": {}, "rank": {"num_samples": [2, 4]}, "drift": {}, "scales": {"scales": [0.5, 1.0]},
            "tasks": {"merges": ["ties"]}, "samples": {"num_samples": [2, 4], "merges": ["ties"]},
            "post": {"merges": ["ties"]},
            "blocks": {"modules": ["query", "key", "value"], "merges": ["ties"]},
        },
    }  # fmt: skip
    (root / "tiny.yaml").write_text(yaml.safe_dump(content))
    return root


def command(root, *words, launch=(), config="tiny.yaml"):
    words = [*launch, ROOT / "recipes/reproduce.py", "--config", root / config, *words]
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=root,
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def out(tiny):
    command(tiny, "--cache", tiny / "cache", "--out", tiny / "out")
    return tiny / "out"


def test_every_experiment_writes_its_tables_and_plots(out):
    scored = {"main", "scales", "tasks", "samples", "blocks", "post"}
    for name in scored:
        assert {"scores.json", "scores.csv", "table.md"} <= {path.name for path in (out / name).iterdir()}
    for name in ("rank", "drift"):
        assert {path.name for path in (out / name).iterdir()} == {"values.json", "values.csv", "table.md", "plot.png"}
    for name in ("scales", "tasks", "samples"):
        assert (out / name / "plot.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "README.md").read_text()
    assert all(f"({name}/plot.png)" in text for name in ("rank", "drift", "scales", "tasks", "samples"))
    assert "recipes/reproduce.py --config" in text and "torch" in text
    assert re.search(r"\(\d+ artefacts, \d+ minutes of work\)", text)
    assert re.search(r"\| one \| OSRM \| 0\.0?01 \| \d+\.\d \| \d+\.\d \|", text)  # the learning rate of its grid
    assert "<table" in (out / "report.html").read_text()


def test_the_main_table_has_every_method_without_and_with_osrm(out):
    rows = list(csv.DictReader((out / "main/scores.csv").open(encoding="utf-8")))
    methods = {row["method"] for row in rows}
    named = {"individual", "task_arithmetic", "regmean", "fisher", "ties", "emr", "lore", "knots ties", "core ties"}
    assert named | {"tsv", "iso", "TA features"} <= methods
    assert {(row["init"], row["seed"]) for row in rows} == {(init, seed) for init in (PLAIN, OSRM) for seed in "12"}
    assert len(rows) == 2 * 2 * 2 * len(methods)
    text = (out / "main/table.md").read_text()
    assert "±" in text and re.search(r"\| roberta-large \(Table 1\) \|.*\| their mean \| here \|", text)
    assert "The paper's Fig. 3: A moves" in (out / "drift/table.md").read_text()


def test_what_osrm_adds_is_paired_by_seed(out):
    rows = [row for row in csv.DictReader((out / "main/scores.csv").open(encoding="utf-8")) if row["method"] == "ties"]
    score = {(row["init"], row["seed"], row["task"]): 100 * float(row["score"]) for row in rows}
    differences = {
        task: [score[OSRM, seed, task] - score[PLAIN, seed, task] for seed in "12"] for task in ("one", "two")
    }
    differences["average"] = [fmean(pair) for pair in zip(*differences.values(), strict=True)]
    cells = [f"{fmean(pair):.1f} ± {stdev(pair):.1f}" for pair in differences.values()]
    assert f"| OSRM − LoRA | ties | 1 | {' | '.join(cells)} |" in (out / "main/table.md").read_text()
    assert "What OSRM adds" not in (out / "post/table.md").read_text()


def test_what_the_lore_recipe_wrote_is_shown(tmp_path):
    import lore_checkpoints as recipe

    setting = recipe.CLASSIFIER
    merges = [*setting.merges, *setting.swept()]
    scores = {f"tasks/{name} alone": {name: 0.9} for name in setting.tasks}
    scores |= {"run/checkpoint-0": {setting.long: 0.25}}
    scores |= {f"run/{name}": {setting.long: 0.5} for name in ("checkpoint-1", *merges)}
    for place, name in enumerate(merges):
        scores[f"tasks/{name}"] = {task: place / 100 + number / 10 for number, task in enumerate(setting.tasks)}
    (experiment,) = planned(suite_of(experiments={"lore": {}}), [])
    recipe.report(
        setting, scores, ["checkpoint-0", "checkpoint-1"], {"versions": {}}, experiment.made.path(tmp_path) / "results"
    )
    write_outputs(suite_of(), [experiment], tmp_path, tmp_path / "out", "the command")
    for name in ("tasks/scores.json", "run/scores.json", "scores.csv", "sweep.png", "table.md"):
        assert (tmp_path / "out/lore" / name).stat().st_size > 0
    table = (tmp_path / "out/lore/table.md").read_text()
    assert "| task models | TIES | 1 | 2.0 | 12.0 | 22.0 | 12.0 |" in table and "| task models | DARE | 0.5 |" in table
    assert "| checkpoint-1 | individual |  | 50.0 |" in table and "| one each | individual |  | 90.0 |" in table
    assert "| task models | rank_ratio=0.4 | 1 | 12.0 | 22.0 | 32.0 | 22.0 |" in table
    # (6 + 6.9 + 1.5 + 0.4) / 4 and (7.5 + 7.1 + 3.2) / 3 in the paper; the baseline of the run is its last checkpoint
    assert "| LoRE − average | +3.7 | +5.9 | +3.0 | +0.0 |" in table
    assert re.search(r"\| average − baseline \| -1\.8 \| -2\.5 \| -80\.0 \| \+0\.0 \|", table)
    assert (
        table.strip() in (tmp_path / "out/README.md").read_text()
        and "TIES" in (tmp_path / "out/report.html").read_text()
    )


def test_a_language_model_s_checkpoints_are_merged_as_a_classifier_s(tmp_path):
    import lore_checkpoints as recipe

    save_tiny(tmp_path / "model", words=["What", "Is", "the", "negative", "positive", "person", "number", "Answer:"])
    changes = {"rows": 8, "validation": 6, "steps": 3, "batch": 4}
    setting = dataclasses.replace(recipe.causal(str(tmp_path / "model")), **changes)
    recipe.reproduce(tmp_path / "out", setting)
    table = (tmp_path / "out/results/table.md").read_text()
    for row in ("average | 1", "DARE | 0.5", "TIES | 1", "LoRE, average | 1", "LoRE, sum | 1"):
        assert f"| task models | {row} |" in table and f"| one run | {row} |" in table
    assert "| checkpoint-3 | individual |" in table
    folders = [tmp_path / "out/merged" / name / "tasks" for name in ("LoRE, average", "average")]
    found, average = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    for name, parameter in found.named_parameters():  # θ₀ is the mean of θ − δ, so adding the mean of δ gives the mean
        torch.testing.assert_close(parameter, average.get_parameter(name), rtol=0, atol=1e-4)  # LoRE's tolerance
    spectrum = json.loads((tmp_path / "out/spectrum.json").read_text())
    assert spectrum["settings"]["suite"] == "packaged-text" and len(spectrum["singular_values"]) == 3


def test_the_rank_of_h_is_bounded_by_its_samples(out):
    values = json.loads((out / "rank/values.json").read_text())["values"]
    assert {key: max(found.values()) for key, found in values.items()} == {"k = 2": 2, "k = 4": 4}


def test_nothing_is_made_twice(out, tiny):
    before = {path: path.stat().st_mtime_ns for path in (tiny / "cache").rglob("*.note.json")}
    printed = command(tiny, "--cache", tiny / "cache", "--out", tiny / "again", "--experiments", "scales", "post")
    assert "[1/" not in printed
    assert before == {path: path.stat().st_mtime_ns for path in (tiny / "cache").rglob("*.note.json")}
    assert (tiny / "again/scales/scores.csv").read_text() == (out / "scales/scores.csv").read_text()


def test_submitted_jobs_make_the_same(out, tiny):
    """submitit's local executor runs jobs as its SLURM executor does, in processes here."""
    content = yaml.safe_load((tiny / "tiny.yaml").read_text())
    (tiny / "jobs.yaml").write_text(yaml.safe_dump(content | {"experiments": {"rank": {"num_samples": [2]}}}))
    words = ["--cache", tiny / "jobs", "--out", tiny / "submitted"]
    words += ["--submit", "local", "--submit-option", "timeout_min=5"]
    assert "1 jobs: features" in command(tiny, *words, config="jobs.yaml")
    submitted, whole = (json.loads((one / "rank/values.json").read_text()) for one in (tiny / "submitted", out))
    assert submitted["values"] == {"k = 2": whole["values"]["k = 2"]}


def test_two_processes_make_the_same(out, tiny):
    """Features, projections and scores of the same adapters; and adapters, whose batches are twice as large."""
    shutil.copytree(tiny / "cache", tiny / "two")
    for kind in ("features", "projected", "statistic", "alone", "merged"):
        shutil.rmtree(tiny / "two" / kind)
    for note in (tiny / "two/adapter").glob("*.note.json"):
        if json.loads(note.read_text())["about"]["init"] == OSRM:
            note.unlink()
            shutil.rmtree(note.with_name(note.name.removesuffix(".note.json")))
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs/cpu_ddp.yaml")]
    words = ["--cache", tiny / "two", "--out", tiny / "shared", "--experiments", "rank", "drift", "post"]
    printed = command(tiny, *words, launch=launch)
    assert all(f"] {kind} " in printed for kind in ("features", "adapter", "projected", "alone", "merged"))
    for name in ("rank/values.csv", "post/scores.csv"):
        assert (tiny / "shared" / name).read_text() == (out / name).read_text()
    drifts = [json.loads((one / "drift/values.json").read_text())["values"]["one"] for one in (tiny / "shared", out)]
    assert drifts[0].keys() == drifts[1].keys()
