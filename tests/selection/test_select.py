"""select_merge against scoring every merge on its own."""

import json
import shutil
import sys
import tempfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from osrm_peft import evaluate_task, load_adapter, load_tokenizer, merge_adapters
from osrm_peft.io.manifest import read_manifest
from osrm_peft.io.places import alone_in
from osrm_peft.merging.emr_adapter import EMRAdapter
from osrm_peft.selection.command import CommandScore
from osrm_peft.selection.select import select_merge
from osrm_peft.selection.selection import Estimate, Line, kept_of, value_of
from osrm_peft.selection.split import Split
from osrm_peft.tasks.suites import load_task
from tests.helpers.adapters import make_adapter
from tests.helpers.models import TEXT
from tests.helpers.suites import csv_tasks, tiny_model

CANDIDATES = [
    {"method": "average"},
    {"method": "tsv", "scale": [0.5, 1.0]},
    {"method": "ties", "scale": [0.5, 1.0]},
    {"method": "lore"},
    {"method": "emr"},
]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """(adapters, tasks) of a tiny model."""
    root = tmp_path_factory.mktemp("cohort")
    base = str(tiny_model(root / "model"))
    csv_tasks(root / "data", rows=160)
    adapters, tasks = {}, {}
    for seed, name in enumerate(("colours", "shapes", "sizes")):
        make_adapter(root / name, seed=seed + 3, num_labels=2)
        config = json.loads((root / name / "adapter_config.json").read_text())
        (root / name / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        adapters[name], tasks[name] = str(root / name), load_task(f"files:{root / 'data'}", name)
    return adapters, tasks


@pytest.fixture(scope="module")
def chosen(cohort, tmp_path_factory):
    """(the selection on all rows, its folder)."""
    adapters, tasks = cohort
    out = tmp_path_factory.mktemp("chosen") / "selection"
    return select_merge(adapters, CANDIDATES, tasks=tasks, max_length=8, halving=False, out=out), out


def rows_of(tasks):
    return {name: Split.of(task, 512, 0) for name, task in tasks.items()}


def test_every_score_is_that_of_the_merge_loaded_by_itself(cohort, chosen):
    adapters, tasks = cohort
    base = load_adapter(adapters["colours"]).base_model
    tokenizer, selection = load_tokenizer(base), chosen[0]
    lines = {line.name: line for line in (*selection.ranked, *selection.apart, selection.individual)}
    assert len(lines) == 8
    merges = {
        "individual adapters": lambda task: load_adapter(adapters[task]).attach(base),
        "lore, λ 1": lambda task: merge_adapters(adapters, "lore").load(base, task),
        "tsv, λ 0.5": lambda task: merge_adapters(adapters, "tsv", scale=0.5).load(base, task),
        "emr, λ 1": lambda task: merge_adapters(adapters, "emr").load(base, task),
    }
    for name, load in merges.items():
        for task, split in rows_of(tasks).items():
            alone = evaluate_task(load(task), split.choose, tokenizer, max_length=8, progress=False)
            # a row of 16 may fall on the other side by the rounding of another order of sums
            assert lines[name].scores[task].value == pytest.approx(alone, abs=1.01 / len(split.choose.validation))


def test_the_best_mean_is_first_and_emr_is_ranked_apart(chosen):
    selection = chosen[0]
    values = [line.value.value for line in selection.ranked]
    assert values == sorted(values, reverse=True) and len(values) == 6
    assert [line.name for line in selection.apart] == ["emr, λ 1"]
    first = selection.ranked[0]
    assert first.value.value == pytest.approx(np.mean([one.value for one in first.scores.values()]))
    assert first.behind is None and all(line.behind.value <= 0 for line in selection.ranked[1:])
    for line in selection.ranked[1:]:
        assert line.behind.value == pytest.approx(line.value.value - first.value.value)
        assert line.value.low <= line.value.value <= line.value.high


def test_the_share_of_the_adaptation_is_relative_to_base_and_adapters():
    alone, bare = ({"a": np.array([high, 1.0]), "b": np.array([high, 1.0])} for high in (0.9, 0.5))
    merged = {"a": np.array([0.8, 1.0]), "b": np.array([0.7, 1.0])}
    assert kept_of(merged, alone, bare).value == pytest.approx((0.75 - 0.5) / (0.9 - 0.5))
    assert kept_of(merged, bare, alone) is None  # the adapters are no better than the base


@pytest.mark.parametrize("rule, wanted", [("mean", 0.6), ("relative", (0.5 / 1.0 + 0.7 / 0.8) / 2), ("worst", 0.5)])
def test_rules(rule, wanted):
    merged = {"a": np.array([0.5]), "b": np.array([0.7])}
    assert value_of(rule, merged, {"a": 1.0, "b": 0.8})[0] == pytest.approx(wanted)


def test_a_rule_that_divides_refuses_an_adapter_that_has_learned_nothing():
    with pytest.raises(ValueError, match=r"'a' alone scores 0.000, so no score is relative to it: train it longer"):
        value_of("relative", {"a": np.array([0.5])}, {"a": 0.0})


def test_the_folder_holds_the_winner_with_its_scores_and_the_table(chosen, cohort):
    selection, out = chosen
    table = json.loads((out / "selection.json").read_text())
    assert table["ranked"][0]["name"] == selection.ranked[0].name and table["kind"] == "selection"
    assert table["verdict"].startswith(f"Take {selection.ranked[0].name}: ")
    assert f"| {selection.ranked[0].name} |" in (out / "selection.md").read_text()
    manifest = read_manifest(out / "winner")
    assert manifest["method"] == selection.ranked[0].candidate["method"]
    assert manifest["scale"] == selection.ranked[0].candidate["scale"]
    assert {(one["task"], one["split"], one["rows"]) for one in manifest["scores"]} == {
        (name, "test", len(task.test)) for name, task in cohort[1].items()
    }
    assert EMRAdapter.from_pretrained(out / "best_per_task").scales
    assert torch.equal(
        load_adapter(out / "winner", task="sizes").factors["bert.encoder.layer.0.attention.self.query"].A,
        selection.winner.for_task("sizes").factors["bert.encoder.layer.0.attention.self.query"].A,
    )


def test_the_last_lines_are_of_rows_that_had_no_say(chosen, cohort):
    names = [line.name for line in chosen[0].test]
    assert names == [chosen[0].ranked[0].name, "emr, λ 1", "individual adapters", "base under the heads"]
    assert {line.rows for line in chosen[0].test} == {sum(len(task.test) for task in cohort[1].values())}


def test_a_second_run_scores_nothing_and_another_is_refused(cohort, chosen):
    adapters, tasks = cohort
    selection, out = chosen
    again = select_merge(adapters, CANDIDATES, tasks=tasks, max_length=8, halving=False, out=out)
    assert again.made["rows_scored"] == 0 < selection.made["rows_scored"]
    assert again.ranked == selection.ranked
    before = (out / "selection.json").read_bytes()
    for change, what in (({"max_length": 7}, "max_length"), ({"rule": "worst"}, "rule"), ({"rank": 2}, "candidates")):
        with pytest.raises(FileExistsError, match=r"holds another selection .*overwrite=True"):
            select_merge(adapters, CANDIDATES, tasks=tasks, halving=False, out=out, **({"max_length": 8} | change))
        assert (out / "selection.json").read_bytes() == before, what


def test_a_selection_by_other_rows_another_metric_or_score_is_another(cohort, chosen, tmp_path):
    adapters, tasks = cohort
    out = chosen[1]
    csv_tasks(tmp_path, rows=120)
    others = {name: load_task(f"files:{tmp_path}", name) for name in tasks}
    by_matthews = {name: replace(task, metric="matthews") for name, task in tasks.items()}
    for change in ({"tasks": others}, {"tasks": by_matthews}, {"score": lambda model, task: 1.0}):
        with pytest.raises(FileExistsError, match=r"holds another selection \((data|settings)"):
            select_merge(adapters, CANDIDATES, **({"tasks": tasks} | change), max_length=8, halving=False, out=out)


def test_an_adapter_of_another_scale_is_another_adapter(cohort, tmp_path):
    adapters, tasks = cohort
    copies = {name: shutil.copytree(folder, tmp_path / name) for name, folder in adapters.items()}
    given = {"tasks": tasks, "max_length": 8, "out": tmp_path / "s"}
    select_merge(copies, CANDIDATES[:1], **given)
    for folder in copies.values():
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 400}))
    with pytest.raises(FileExistsError, match=r"holds another selection \(inputs"):
        select_merge(copies, CANDIDATES[:1], **given)
    found = select_merge(copies, CANDIDATES[:1], **given, overwrite=True)
    assert found.made["rows_scored"] > 0  # the predictions of the others are not taken over


def test_a_candidate_that_fails_is_named(cohort, monkeypatch):
    adapters, tasks = cohort
    diverging = [{"method": "average"}, {"method": "tsv", "scale": 1e308}]
    with pytest.raises(ValueError, match=r"'tsv, λ 1e\+308' has no score on 'colours': .* are NaN"):
        select_merge(adapters, diverging, tasks=tasks, max_length=8)


def test_a_causal_adapter_is_refused_before_any_work(cohort, tmp_path, monkeypatch):
    adapters, tasks = cohort
    monkeypatch.setattr("osrm_peft.selection.select.execute", None)  # no merge is made
    copies = {name: shutil.copytree(folder, tmp_path / name) for name, folder in adapters.items()}
    for folder in copies.values():
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
    with pytest.raises(
        ValueError, match=r"'colours' is of a causal language model, .*give tasks in words .*or a score of your own"
    ):
        select_merge(copies, CANDIDATES[:1], tasks=tasks, max_length=8)


def test_two_selections_do_not_share_a_folder_at_once(cohort, tmp_path):
    adapters, tasks = cohort
    with alone_in(tmp_path / "s"), pytest.raises(FileExistsError, match="another process writes in"):
        select_merge(adapters, CANDIDATES[:1], tasks=tasks, max_length=8, out=tmp_path / "s")


@pytest.mark.parametrize("content", ['{"inputs": 3}', '{"inputs": {"a": 3}}', "[]", "{"])
def test_a_damaged_table_is_named(content, cohort, tmp_path):
    adapters, tasks = cohort
    (tmp_path / "selection.json").write_text(content)
    with pytest.raises(ValueError, match=r"selection.json"):
        select_merge(adapters, CANDIDATES[:1], tasks=tasks, max_length=8, out=tmp_path)


def test_an_interrupted_selection_goes_on(cohort, chosen, tmp_path):
    adapters, tasks = cohort
    calls = []

    def stop(model, inputs, output):
        calls.append(1)
        if len(calls) > 5:
            raise KeyboardInterrupt

    with (
        torch.nn.modules.module.register_module_forward_hook(
            lambda module, inputs, output: (
                stop(module, inputs, output) if type(module).__name__.endswith("Classification") else None
            )
        ),
        pytest.raises(KeyboardInterrupt),
    ):
        select_merge(adapters, CANDIDATES, tasks=tasks, max_length=8, halving=False, out=tmp_path / "s")
    assert not (tmp_path / "s/selection.json").exists()
    found = select_merge(adapters, CANDIDATES, tasks=tasks, max_length=8, halving=False, out=tmp_path / "s")
    rows = chosen[0].made["rows_scored"]
    assert 0 < found.made["rows_scored"] < rows and found.ranked == chosen[0].ranked


def test_halving_finds_the_winner_of_all_rows_with_fewer(cohort):
    adapters, tasks = cohort
    tasks = {name: load_task_of(task) for name, task in tasks.items()}
    sweep = [
        {"method": "task_arithmetic", "scale": [0.01 * n for n in range(1, 11)]},
        {"method": "tsv", "scale": [1.0]},
    ]
    every, halved = (
        select_merge(adapters, sweep, tasks=tasks, max_length=8, halving=halving) for halving in (False, True)
    )
    assert halved.made["rows_scored"] < every.made["rows_scored"]
    assert halved.ranked[0].value.value >= every.ranked[0].value.value - 0.02
    assert {line.rows for line in halved.ranked} > {halved.ranked[0].rows}
    rows = [line.rows for line in halved.ranked]
    assert rows == sorted(rows, reverse=True)


def load_task_of(task):
    """The same task with its training rows as validation rows: more of them."""
    return replace(task, validation=task.train, test=task.validation)


def test_a_score_of_ones_own_ranks_without_error_bars(cohort):
    adapters, tasks = cohort

    def score(model, task):
        with torch.no_grad():
            return -float(model.bert.encoder.layer[0].attention.self.query.weight.norm()) + 0 * len(task.validation)

    found = select_merge(adapters, CANDIDATES[:3], score, tasks=tasks, max_length=8)
    assert len(found.ranked) == 5 and found.ranked[0].value.low is None
    values = [line.value.value for line in found.ranked]
    assert values == sorted(values, reverse=True)
    with pytest.raises(ValueError, match="the score of average, λ 1 on colours=nan must be a finite number"):
        select_merge(adapters, CANDIDATES[:1], lambda model, task: float("nan"), tasks=tasks, max_length=8)


def test_a_command_gets_a_whole_model_and_the_rows(cohort, tmp_path, monkeypatch):
    adapters, tasks = cohort
    script = tmp_path / "score.py"
    script.write_text(
        "import json, sys, pathlib\n"
        "model, task, rows = sys.argv[1:]\n"
        "config = json.loads(pathlib.Path(model, 'config.json').read_text())\n"
        "assert pathlib.Path(model, 'tokenizer_config.json').is_file() and config['model_type'] == 'bert'\n"
        "lines = [json.loads(line) for line in pathlib.Path(rows).read_text().splitlines()]\n"
        "print('scoring', task)\nprint(len(lines) / 1000)\n"
    )
    tokenizer = load_tokenizer(load_adapter(adapters["colours"]).base_model)
    command = CommandScore(f"{sys.executable} {script} {{model}} {{task}} {{rows}}", tokenizer)
    found = select_merge(adapters, CANDIDATES[:1], command, tasks=tasks, max_length=8, rows=6)
    assert found.ranked[0].scores["sizes"].value == pytest.approx(0.006)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "a folder"))
    (tmp_path / "a folder").mkdir()
    quoted = CommandScore("cat; test -d {model} && wc -l < {rows}", tokenizer)  # and nothing to read for `cat`
    assert select_merge(adapters, CANDIDATES[:1], quoted, tasks=tasks, max_length=8, rows=6).base.mean.value == 6
    failing = CommandScore("echo broken {model}; exit 3", tokenizer)
    with pytest.raises(
        ValueError, match=r"ended with exit code 3 and printed 'broken .*its last line must be a number"
    ):
        select_merge(adapters, CANDIDATES[:1], failing, tasks=tasks, max_length=8, rows=6)
    with pytest.raises(ValueError, match=r"needs \{model\}"):
        CommandScore("python score.py", tokenizer)


def test_causal_adapters_are_scored_by_a_score_of_ones_own(tmp_path, cohort):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TEXT))
    tiny_model(tmp_path / "base")  # for its tokenizer
    model.save_pretrained(tmp_path / "base")
    adapters = {}
    for name in ("colours", "shapes"):
        live = get_peft_model(
            LlamaForCausalLM.from_pretrained(tmp_path / "base"),
            LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False),
        )
        live.save_pretrained(tmp_path / name)
        adapters[name] = tmp_path / name
    tasks = {name: cohort[1][name] for name in adapters}

    def score(model, task):
        ids = torch.arange(3, 9)[None]
        with torch.no_grad():
            return -float(model(input_ids=ids, labels=ids).loss)

    found = select_merge(adapters, CANDIDATES[:3], score, tasks=tasks)
    assert len(found.ranked) == 5 and found.ranked[0].value.value > -20
    with pytest.raises(ValueError, match="of a causal language model, which has no head for the classes"):
        select_merge(adapters, CANDIDATES[:3], tasks=tasks)


def test_mistakes_are_told_before_any_work(cohort, tmp_path, monkeypatch):
    adapters, tasks = cohort
    monkeypatch.setattr("osrm_peft.selection.select.execute", None)  # no merge is made
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    cases = [
        (
            {"tasks": {"colours": tasks["colours"]}},
            r"tasks \['colours'\] for adapters \['colours', 'shapes', 'sizes'\]",
        ),
        ({"gram": {"sises": "x"}}, r"gram of sises, which are no tasks of the adapters \['colours'"),
        ({"rule": "best"}, "unknown rule 'best': choose from mean, relative, worst"),
        ({"rows": 1}, "rows=1 must be a whole number of at least 2"),
        ({"candidates": [{"method": "regmean"}]}, "the candidate 'regmean, λ 1' needs gram="),
        ({"candidates": [{"method": "task_arithmetic", "weights": "features"}]}, "needs features="),
        ({"out": tmp_path / "mine"}, "holds notes.txt and is no selection's folder"),
        ({"out": tmp_path / "mine/notes.txt"}, "is a file, so .* cannot be a folder"),
    ]
    for change, message in cases:
        given = {"candidates": CANDIDATES, "tasks": tasks, "max_length": 8} | change
        with pytest.raises((ValueError, FileExistsError), match=message):
            select_merge(adapters, **given)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("best, hint", [(0.5, "smallest that was tried: try smaller"), (1.0, None), (1.5, "largest")])
def test_a_winner_at_the_edge_of_its_sweep_is_told(chosen, best, hint):
    def line(scale, value):
        given = {"method": "tsv", "scale": scale}
        return Line(f"tsv, λ {scale:g}", 10, {}, Estimate(value), Estimate(value), None, None, given)

    lines = sorted((line(scale, 0.5 + (scale == best)) for scale in (0.5, 1.0, 1.5)), key=lambda one: -one.value.value)
    text = replace(chosen[0], ranked=lines, apart=[], test=[]).verdict()
    assert ("that was tried" in text) is (hint is not None) and (hint or "") in text
    assert "that was tried" not in replace(chosen[0], ranked=lines[:1], apart=[], test=[]).verdict()


def test_a_task_whose_adapter_has_learned_nothing_is_told(chosen):
    def line(selection, **values):
        return replace(selection, scores={task: Estimate(value) for task, value in values.items()})

    alone = line(chosen[0].individual, colours=0.9, shapes=0.5, sizes=0.8)
    base = line(chosen[0].base, colours=0.5, shapes=0.5, sizes=0.5)
    first = replace(chosen[0].ranked[0], kept=Estimate(0.9))
    selection = replace(chosen[0], individual=alone, base=base, ranked=[first], apart=[])
    assert "On shapes the adapter alone is no better than the base model." in selection.verdict()
