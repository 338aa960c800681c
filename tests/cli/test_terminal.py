"""What a terminal is sent: text, on one line where it is an error, and nothing from a file that it would obey."""

import json
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from osrm_peft.checks import printable
from osrm_peft.cli import main as cli
from osrm_peft.cli.app import console, escape_messages
from osrm_peft.evaluation.tables import MultiTaskTable, Score, markdown_table
from osrm_peft.features.moments import FeatureMoments
from osrm_peft.features.task_features import TaskFeatures
from tests.helpers.adapters import make_adapter
from tests.helpers.files import task_folder

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e[bold][link=http://x]y[/link]\r"
OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def clean(text):
    assert not OBEYED.search(text), repr(OBEYED.search(text))
    return text


def test_what_is_not_printed_is_escaped():
    text = "".join(map(chr, [*range(0x300), *range(0x2000, 0x2100), 0xFEFF, 0xE0001, 0xDC80]))
    clean(printable(text)).encode()
    assert printable("a\n\tß日\x1b") == "a\n\tß日\\x1b" and printable(printable(text)) == printable(text)


@pytest.fixture
def evil_adapter(tmp_path):
    """As a stranger may have written it."""
    folder = tmp_path / "adapter"
    make_adapter(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": EVIL}))
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {name.replace("query", "qu\x1b[31mery[bold]"): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_names_in_files_are_shown_and_not_obeyed(evil_adapter, tmp_path, monkeypatch, capsys):
    def called(*arguments):
        monkeypatch.setattr(sys, "argv", ["osrm-peft", *map(str, arguments)])
        with pytest.raises(SystemExit):
            cli.main()
        return clean("".join(capsys.readouterr()).replace("\rmerge ", "merge "))  # a progress bar's

    found = called("inspect", f"a={evil_adapter}")
    assert r"\x1b[31m" in found and "[bold]" in found and "[link" in found
    assert "[bold]" in called("merge", f"a={evil_adapter}", "--out", tmp_path / "out", "--dry-run")
    called("merge", f"a={evil_adapter}", "--out", tmp_path / "out")
    called("merge", f"a={evil_adapter}", "--out", tmp_path / "rank", "--rank", 99)
    called("evaluate", evil_adapter)
    called("evaluate", evil_adapter, "-t", EVIL)
    moments = FeatureMoments("mean", 2, 1, torch.ones(2), None, None)
    features = TaskFeatures(EVIL, EVIL, EVIL, "mean", 1, tokenizer=EVIL, tokenizer_hash="1", layers={EVIL: moments})
    features.save(tmp_path / "x.features.safetensors")
    shown = called("features", "show", tmp_path / "x.features.safetensors")
    assert shown.count("[bold]") >= 4
    called("merge", f"a={evil_adapter}", "--out", tmp_path / "o", "-m", "lore", "--scale", "features",
           "--features", f"a={tmp_path}/x.features.safetensors")  # fmt: skip
    suite = task_folder(tmp_path)
    (tmp_path / "suite/t").rename(tmp_path / "suite/e\x1b[2Jvil")
    assert "cannot be a file name" in called("features", "--base-model", "packaged", "--suite", suite)
    (tmp_path / "r.yaml").write_text(json.dumps({"model": EVIL, "suite": EVIL, "tasks": [3]}))
    called("features", "-c", tmp_path / "r.yaml")
    (tmp_path / "osrm_peft.json").write_text(json.dumps({"kind": EVIL, "task": EVIL, "base_model": EVIL, "inputs": 3}))
    called("evaluate", tmp_path)
    called("report", tmp_path, "--out", tmp_path / "page.html")
    called("push", tmp_path, EVIL)


def test_tables_of_scores(capsys):
    table = MultiTaskTable.of([Score(EVIL, EVIL, 1.0, 0, EVIL, 0.5), Score(EVIL, "ties", 1.0, 0, EVIL, 0.5)])
    console.print(table.terminal("scores"))
    assert clean(capsys.readouterr().out).count("[bold]") == 3
    assert len(markdown_table(["a|b", "c"], [[EVIL + "|", "x\ny"]]).splitlines()) == 3
    clean(markdown_table([EVIL], [[EVIL]]))


def test_log_messages_and_warnings(capsys, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(logging.lastResort, "formatter", None)
    escape_messages()
    record = logging.LogRecord("x", logging.WARNING, "", 0, "from %s\nnext", (EVIL,), None)
    assert "\n" not in clean(logging.lastResort.format(record))
    clean(warnings.formatwarning(UserWarning(EVIL), UserWarning, "x.py", 1, None))


def test_styles_still_reach_a_terminal(monkeypatch):
    command = "from osrm_peft.cli.app import console; console.print('[bold]x[/bold]', 'a\\x1b[2Jb', highlight=False)"
    environment = os.environ | {"FORCE_COLOR": "1", "TERM": "xterm"}
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, env=environment, check=True)
    assert "\x1b[1mx" in done.stdout and "\\x1b[2J" in done.stdout and "\x1b[2J" not in done.stdout


@pytest.mark.parametrize("where", ["cp1252", "ascii", "closed"])
def test_what_an_output_cannot_show_is_escaped(where):
    command = "import sys; sys.argv[1:] = ['merge', '--help']; from osrm_peft.cli.main import main; main()"
    given = {"stdout": None, "preexec_fn": lambda: os.close(1)} if where == "closed" else {"stdout": subprocess.PIPE}
    encoding = {"PYTHONIOENCODING": "utf-8" if where == "closed" else where}
    run = [sys.executable, "-W", "ignore", "-c", command]
    done = subprocess.run(run, stderr=subprocess.PIPE, env=os.environ | encoding, check=False, **given)
    assert (done.returncode, done.stderr) == (0, b"")
    assert where == "closed" or b"\\u03bb" in done.stdout


# --- faults that no check foresees ---------------------------------------------------------------------------------


FAULTS = [
    (MemoryError(), "osrm-peft merge: out of memory"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127]\n DefaultCPUAllocator: can't allocate memory"), "out of memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
    (torch.linalg.LinAlgError("linalg.svd: failed to converge\nat x"), "osrm-peft merge: _LinAlgError at cli/main.py:"),
    (OverflowError("Python int too large to convert to C long"), "osrm-peft merge: OverflowError"),
    (RecursionError("maximum recursion depth exceeded"), "osrm-peft merge: RecursionError"),
    (SafetensorError("Error while deserializing header"), "osrm-peft merge: SafetensorError"),
    (type("PanicException", (BaseException,), {})("of a library"), "osrm-peft merge: PanicException"),
    (KeyError("x"), "osrm-peft merge: KeyError"), (AssertionError(), "osrm-peft merge: AssertionError"),
    (OSError(28, "No space left on device"), "No space left on device"), (ValueError(f"a\nb{EVIL}"), "error: a b"),
]  # fmt: skip


@pytest.mark.parametrize("error, message", FAULTS, ids=lambda one: type(one).__name__)
def test_a_fault_that_nobody_foresaw_is_one_line(monkeypatch, capsys, error, message):
    def fails():
        raise error

    monkeypatch.setattr(cli, "app", fails)
    monkeypatch.setattr(sys, "argv", ["osrm-peft", "merge", "x"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and "Traceback" not in clean(said)
    ours = re.search("[A-Z][a-zA-Z]+( at [a-z/]+.py:[0-9]+)?: .*this is a fault in osrm_peft: please report it", said)
    assert stopped.value.code == (1 if ours else 2)
    assert bool(ours) == (not isinstance(error, ValueError | OSError | MemoryError) and "memory" not in message), said


LIMITED = """
import resource, sys
sys.argv[1:2], limit = [], int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from osrm_peft.cli.main import main
main()
"""


def test_a_full_disk_in_a_merge_is_one_line_and_leaves_nothing(tmp_path):
    make_adapter(tmp_path / "a", r=8)
    command = [sys.executable, "-W", "ignore", "-c", LIMITED, "3000", "merge", f"a={tmp_path}/a"]
    done = subprocess.run([*command, "--out", tmp_path / "out"], capture_output=True, text=True)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert re.search(rf"File too large: {tmp_path}/out could not be written; make room, or name another", lines[-1])
    assert [one.name for one in Path(tmp_path).iterdir()] == ["a"]


NUMBERS = [str(2**70), "1e400", str(-(2**70)), "9" * 5000]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda one: one[:12])
@pytest.mark.parametrize(
    "command",
    [("features", "--base-model", "packaged", "--suite", "packaged", "-t", "tweets", one)
     for one in ("--num-samples", "--max-length", "--seed", "--group-size")]
    + [("merge", "ADAPTER", "-m", "dare", one) for one in ("--seed", "--scale", "--rank", "--weight")]
    + [("merge", "ADAPTER", "-m", "ties", "-o", "density="), ("merge", "ADAPTER", "-m", "lore", "-o", "iterations=")]
    + [("merge-checkpoints", "a=no/such", one) for one in ("--shard-size", "--seed", "--scale")]
    + [("demo", "--seeds"), ("demo", "--osrm", "osrm_seed="), ("demo", "--osrm", "protect_energy=")]
    + [("statistics", "-c", "RECIPE", "--kind", "gram", "--rows")]
    + [("evaluate", "ADAPTER", "-t", "tweets", one) for one in ("--rows", "--max-length")],
    ids=" ".join,
)  # fmt: skip
def test_numbers_beyond_all_bounds_are_one_line(tmp_path, monkeypatch, capsys, command, number):
    make_adapter(tmp_path / "adapter")
    (tmp_path / "r.yaml").write_text("model: packaged\nsuite: packaged\ntasks: [tweets]\n")
    places = {"ADAPTER": f"tweets={tmp_path}/adapter", "RECIPE": str(tmp_path / "r.yaml")}
    if command[0] == "evaluate":
        places["ADAPTER"] = str(tmp_path / "adapter")
    given = [places.get(one, one) for one in command]
    if given[-1].endswith("="):
        given[-1] += number
    elif given[-1] == "--weight":
        given += [f"tweets={number}"]
    else:
        given[-1] = f"{given[-1]}={number}"
    monkeypatch.setattr(sys, "argv", ["osrm-peft", *given, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr().err
    if "dare" in command and stopped.value.code == 0:  # a large number, but one
        return
    assert stopped.value.code == 2 and "Traceback" not in said, said
    last = said.strip().splitlines()
    assert len(last[-1]) < 6000 and ("error: " in last[-1] or "Invalid value" in said), said
    assert "Error at" not in last[-1], said  # no fault of ours that only the last resort caught
