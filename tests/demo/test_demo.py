import json
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from osrm_peft.demo import run as demo
from osrm_peft.evaluation.plots import plot_scales
from osrm_peft.evaluation.tables import AVERAGE, MultiTaskTable, Score
from osrm_peft.merging import METHODS
from osrm_peft.pipeline.check import check_recipe
from osrm_peft.selection import contestants
from osrm_peft.selection.candidates import expand

SMALL = replace(
    demo.demo_recipe(),
    tasks=["tweets", "sms_spam"],
    training=demo.demo_recipe().training | {"max_steps": 2, "use_cpu": True},
    max_length=16,
    train_rows=32,
    validation_rows=20,
    num_samples=8,
    statistics_rows=8,
)
INITS = ["plain LoRA", "OSRM, the paper's", "OSRM, ratio"]


def files(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*.safetensors") if "cache" not in path.parts}


def test_the_demo_runs_stops_goes_on_and_reports(tmp_path, monkeypatch):
    out, calls = tmp_path / "out", []
    original = contestants.outputs_of

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(contestants, "outputs_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(out, recipe=SMALL, progress=False)
    before = files(out)
    assert len([path for path in before if path.name == "adapter_model.safetensors"]) == 6
    with Console(record=True, width=200) as console:
        table = demo.run_demo(out, recipe=SMALL, console=console, progress=False)
    assert files(out).items() >= before.items()  # nothing that was there was made again
    candidates = expand(SMALL.select["candidates"])
    assert len(table.rows) == 3 * (1 + len(candidates))
    merges = [one for one in candidates if not one.per_task]
    scored = 2 * (len(merges) + 1 + 2)  # two tasks; EMR; alone and base
    assert len(calls) == 3 * (scored + 2 * 4) + 1  # and on the rows that had no say: winner, EMR, alone, base

    report = (out / "report.md").read_text()
    selected = json.loads((out / "seed42/selection/OSRM_ratio/selection.json").read_text())
    first = report.partition("| OSRM, ratio | ")[2].partition("\n")[0]  # alone, the choice, its score
    tested = {line["name"]: 100 * line["mean"]["value"] for line in selected["test"]}
    name = selected["ranked"][0]["name"]
    assert first.startswith(f"{tested['individual adapters']:.1f} | `{name}` | {tested[name]:.1f} |")
    assert "<table" in (out / "report.html").read_text()
    for name in (*INITS, "individual", "average", "ties in knots", "task_arithmetic, weights by features"):
        assert f"| {name} |" in report
    assert "one seed" in report and "one seed" in console.export_text() and '"train_rows": 32' in report
    assert (out / "scales.png").read_bytes().startswith(b"\x89PNG")
    panels = json.loads((out / "seed42/interference/interference.json").read_text())["interference"][""]
    assert list(panels) == INITS and len(panels["OSRM, ratio"]["mean"]) == 2
    written = json.loads((out / "scores.json").read_text())
    assert len(written["scores"]) == 2 * len(table.rows) and written["versions"]["peft"]
    for init in ("plain_LoRA", "OSRM_the_paper_s", "OSRM_ratio"):
        assert (out / f"seed42/adapters/{init}/tweets/adapter_model.safetensors").is_file()
        assert (out / f"seed42/selection/{init}/winner/heads/tweets.safetensors").is_file()
        assert (out / f"seed42/selection/{init}/best_per_task/emr.safetensors").is_file()
        assert (out / f"seed42/statistics/{init}/tweets.fisher.safetensors").is_file()

    count = len(calls)
    demo.run_demo(out, recipe=SMALL, progress=False)
    assert len(calls) == count  # a finished demo evaluates nothing
    with pytest.raises(FileExistsError, match="was made with other settings"):
        demo.run_demo(out, recipe=replace(SMALL, train_rows=31))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    with pytest.raises(FileExistsError, match="is not a demo's results"):
        demo.run_demo(tmp_path / "mine", recipe=SMALL)


def test_the_demos_recipe_has_no_mistake_and_names_each_method():
    found, tasks = check_recipe(demo.FILE)
    assert found == [] and len(tasks) == 6
    recipe = demo.demo_recipe()
    methods = {one.fields["method"] for one in expand(recipe.select["candidates"])}
    assert methods == set(METHODS) - {"concat"}  # which is task arithmetic, in its own factors
    assert list(recipe.inits) == INITS


def scores():
    values = {(1, "a"): 0.5, (1, "b"): 0.7, (2, "a"): 0.6, (2, "b"): 1.0}
    return [
        Score("x", "ties", scale, seed, task, value / (1 + scale))
        for scale in (0.0, 1.0)
        for (seed, task), value in values.items()
    ]


def test_the_table_is_mean_and_spread_over_seeds():
    table = MultiTaskTable.of(scores())
    assert table.tasks == ["a", "b"] and [row["scale"] for row in table.rows] == [0.0, 1.0]
    row = table.rows[0]
    assert row["seeds"] == 2 and row["scores"]["a"] == pytest.approx(55)
    assert row["spread"]["a"] == pytest.approx(statistics.stdev([50, 60]))
    assert row["scores"][AVERAGE] == pytest.approx(70)
    assert row["spread"][AVERAGE] == pytest.approx(statistics.stdev([60, 80]))  # over seeds, not over tasks
    assert "| x | ties | 1 | 27.5 ± 3.5 | 42.5 ± 10.6 | 35.0 ± 7.1 |" in table.markdown()
    assert len(MultiTaskTable.of(scores()[:3]).rows) == 1  # a seed with a missing task does not count


def test_the_plot_is_written(tmp_path):
    plot_scales(MultiTaskTable.of(scores()), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1


def test_ctrl_c_ends_the_command_with_a_word_on_how_to_go_on(tmp_path):
    """A real SIGINT to the real command, once it has begun to work."""
    command = [Path(sys.executable).with_name("osrm-peft"), "demo", "--out", tmp_path / "out"]
    running = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("out/seed42/features/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.2)
    for patience in (60, 60, 60):  # on a busy machine the first was once not enough
        running.send_signal(signal.SIGINT)
        try:
            printed, _ = running.communicate(timeout=patience)
            break
        except subprocess.TimeoutExpired:
            continue
    else:
        running.kill()
        pytest.fail("three interrupts did not end the command")
    assert running.returncode == 130
    assert "interrupted; what is finished lies in" in printed and "run the same command to go on" in printed
    assert not list(tmp_path.rglob("*.partial"))
