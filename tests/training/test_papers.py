"""The papers' printed figures: averages that agree with the papers' own, and differences beside ours."""

import json
import random
import re
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev

import pytest
from compare_with_papers import main
from reproduction.experiments import EXPERIMENTS, planned
from reproduction.papers import comparison, figures, gains, printed
from reproduction.suite import OSRM, PLAIN, Suite

from osrm_peft.evaluation.tables import Score

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "recipes/configs").glob("reproduce_*.yaml"))
OF_PAPER = [path for path in CONFIGS if Suite.from_yaml(path).paper]


def rows_of_tasks():
    """((model, adapters, merge), row) of every row that ends in its average; LoRE's among them."""
    for model, inits in figures()["main"]["rows"].items():
        for init, merges in inits.items():
            for merge, row in merges.items():
                yield (model, init, merge), row
    yield from ((("lore", merge), row) for merge, row in figures()["lore"]["rows"].items())


def test_the_average_of_every_row_is_the_printed_one():
    rows = dict(rows_of_tasks())
    assert len(rows) == 55
    wrong = {name: round(abs(fmean(row[:-1]) - row[-1]), 3) for name, row in rows.items()}
    assert {name: off for name, off in wrong.items() if off > 0.005} == {("llama-3.2-3b", PLAIN, "individual"): 0.006}


def test_averages_that_two_tables_print_are_equal():
    rows = figures()["main"]["rows"]["roberta-large"][OSRM]
    k = figures()["samples"]["rows"]["roberta-large"]["OSRM, k = 100"]
    assert len(k) == 3 and all(rows[merge][-1] == average for merge, average in k.items())


def cells(texts):
    """{(adapters, merge): {column: text}} of the table of differences."""
    lines = [line[2:-2].split(" | ") for line in "\n\n".join(texts).splitlines() if line.startswith("| ")]
    start = max(place for place, line in enumerate(lines) if line[:2] == ["adapters", "merge"])
    header, _, *rows = lines[start:]
    return {tuple(row[:2]): dict(zip(header[2:], row[2:], strict=True)) for row in rows}


def test_the_papers_differences_are_those_of_sums_by_hand():
    found = cells(comparison("main", {}))
    every = {merge: [] for merge in ("individual", "task_arithmetic", "regmean", "fisher", "ties", "emr")}
    for model, inits in figures()["main"]["rows"].items():
        column = f"{model} ({figures()['main']['tables'][model]})"
        for merge, differences in every.items():
            cell = found["OSRM − LoRA", merge][column].strip()
            if merge in inits[PLAIN]:
                pairs = zip(inits[OSRM][merge][:-1], inits[PLAIN][merge][:-1], strict=True)
                differences.append(sum(ours - theirs for ours, theirs in pairs) / 8)
                assert cell == f"{differences[-1]:+.1f}"
            else:
                assert cell == ""
    assert {merge: found["OSRM − LoRA", merge]["their mean"] for merge in every} == {
        merge: f"{fmean(differences):+.1f}" for merge, differences in every.items()
    }
    assert found["OSRM − LoRA", "task_arithmetic"]["roberta-large (Table 1)"] == "+6.6"  # 76.59 − 70.04


def write(folder, scores):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.json").write_text(json.dumps({"scores": [asdict(score) for score in scores]}))


def test_ours_are_paired_by_seed_and_averaged_over_tasks(tmp_path):
    draw = random.Random(0)
    score = {
        (init, seed, task): draw.random()
        for init in (PLAIN, OSRM)
        for seed in (1, 2, 3)
        for task in ("one", "two")
    }  # fmt: skip
    write(tmp_path / "main", [Score(init, "ties", 1.0, seed, task, x) for (init, seed, task), x in score.items()])
    texts = comparison("main", {"here": tmp_path, "elsewhere": tmp_path / "nothing"})
    paired = [50 * sum(score[OSRM, seed, t] - score[PLAIN, seed, t] for t in ("one", "two")) for seed in (1, 2, 3)]
    found = cells(texts)
    assert found["OSRM − LoRA", "ties"]["here"] == f"{fmean(paired):+.1f} ± {stdev(paired):.1f}"
    assert found["OSRM − LoRA", "emr"]["here"].strip() == "" and "elsewhere" not in found["OSRM − LoRA", "ties"]
    assert texts[-1] == f"Merges in which the sign is the paper's: here {int(fmean(paired) > 0)} of 1."


def test_adapters_without_a_plain_partner_are_held_against_the_main_table():
    main = [Score(PLAIN, "ties", 1.0, 1, "one", 0.5), Score(OSRM, "ties", 1.0, 1, "one", 0.9)]
    samples = [Score("OSRM, k = 2", "ties", 1.0, 1, "one", 0.75), Score("OSRM, k = 2", "emr", 1.0, 1, "one", 0.75)]
    assert gains(samples, main) == [Score("OSRM − LoRA, k = 2", "ties", 1.0, 1, "one", 0.25)]
    blocks = [Score("LoRA, q", "ties", 1.0, 1, "one", 0.5), Score("OSRM, q", "ties", 1.0, 1, "one", 0.25)]
    assert gains(blocks, main) == [Score("OSRM − LoRA, q", "ties", 1.0, 1, "one", -0.25)]


@pytest.mark.parametrize("path", OF_PAPER, ids=lambda path: path.stem)
def test_every_row_that_the_paper_has_of_a_model_has_ours_beside_it(path, tmp_path):
    suite = Suite.from_yaml(path)
    experiments = planned(suite, [])
    for one in experiments:
        write(tmp_path / one.name, [
            Score(cell.label, cell.method, None, cell.seed, task, 0.5) for cell in one.cells for task in suite.tasks
        ])  # fmt: skip
    tables = [one.name for one in experiments if suite.paper in figures().get(one.name, {}).get("tables", {})]
    assert len(tables) == (4 if suite.paper == "roberta-large" else 1)
    for name in tables:
        texts = comparison(name, {"here": tmp_path}, suite.paper)
        table = figures()[name]["tables"][suite.paper]
        assert f"The paper's {table}:" in texts
        found = cells(texts)
        of_paper = {(score.init, score.method) for score in printed(name, suite.paper) if score.init != PLAIN}
        assert len(found) >= len({pair for pair in of_paper if not pair[0].startswith(PLAIN)}) > 2
        for row in found.values():
            assert set(row) == {f"{suite.paper} ({table})", "here"} and row["here"] == "+0.0", (name, row)


def test_the_papers_settings_are_those_of_its_configurations():
    settings = {Suite.from_yaml(path).paper: Suite.from_yaml(path) for path in OF_PAPER}
    assert list(figures()["main"]["tables"]) == sorted(settings, key=lambda name: figures()["main"]["tables"][name])
    encoder = [3e-5, 2e-4, 4e-4]
    rates = {
        "roberta-large": encoder, "t5-large": encoder, "llama-3.2-1b": [1e-4, 2e-4, 4e-4], "llama-3.2-3b": [2e-4, 4e-4]
    }  # fmt: skip
    assert {name: settings[name].rates for name in rates} == rates
    assert [settings[name].training["num_train_epochs"] for name in rates] == [10, 10, 10, 5]
    for name, suite in settings.items():
        assert (suite.num_samples, suite.statistics_rows) == (100, 1000)
        (node,) = [one for one in planned(suite, ["main"])[0].needs() if _is_regmean(one) and "OSRM" in _inits(one)]
        assert node.about["merge"][2].get("off_diagonal", 0.9) == (0.1 if name == "t5-large" else 0.9)


def _is_regmean(node):
    return node.kind == "merged" and node.about["merge"][0] == "regmean"


def _inits(node):
    return {one.about["init"] for one in node.inputs.values() if one.kind == "adapter"}


def test_the_results_page_has_what_the_command_prints(monkeypatch, capsys):
    folders = ["docs/results/minilm", "docs/results/smollm2"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["recipes/compare_with_papers.py", *folders])
    main()
    text = capsys.readouterr().out.strip()
    assert set(re.findall(r"^### (\w+)$", text, re.M)) == set(EXPERIMENTS)
    page = (ROOT / "docs/results/reproduction.md").read_text(encoding="utf-8")
    assert text in page and f"python {' '.join(sys.argv)}" in page
