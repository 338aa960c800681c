"""Every part of `make bench` runs, with models so small that its numbers mean nothing: what breaks shows here."""

import re
import sys
from pathlib import Path

import checkpoints
import merging
import osrm_init
import pytest
import startup
import torch
import transformers

ROOT = Path(__file__).parents[2]
PARTS = [  # program, part, lines of its tables
    (startup, None, 2),
    (merging, "layer", 3),
    (merging, "llama", 12),
    (merging, "memory", 2),
    (checkpoints, "throughput", 3),
    (checkpoints, "memory", 8),
    (checkpoints, "lore", 2),
    (checkpoints, "forecast", 8),
    (osrm_init, "choose", 4),
    (osrm_init, "collect", 3),
    (osrm_init, "wide", 7),
    (osrm_init, "suite", 4),
    (osrm_init, "memory", 2),
    (osrm_init, "sizes", 5),
]
SMALL = {
    startup: {"LINES": dict(list(startup.LINES.items())[:2])},
    merging: {"WIDTH": 256},
    checkpoints: {
        "WIDTH": 64, "VOCABULARY": 500, "DTYPES": (torch.float16,), "SHAPES": {"small": (256, 300, 1, 128, 100)},
    },
    osrm_init: {"WIDTH": 96, "K": 2, "WIDE": 64, "ROUNDS": 1},
}  # fmt: skip


@pytest.fixture(autouse=True)
def as_loud_as_before():
    verbosity = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()


@pytest.mark.parametrize(("program", "part", "lines"), PARTS)
def test_every_part_prints_its_tables(program, part, lines, monkeypatch, capsys):
    for name, value in SMALL[program].items():
        assert type(getattr(program, name)) is type(value)
        monkeypatch.setattr(program, name, value)
    if hasattr(program, "in_process"):  # a process would have the sizes of the file, and imports PEFT for seconds
        monkeypatch.setattr(program, "in_process", lambda file, *words: program._one(*words))
    options = ["--rounds", "1"] if part is None else ["--part", part]
    options += ["--layers", "1"] if part == "llama" else []
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *options])
    program.main()
    printed = [line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert len(list(filter(None, printed))) == lines, printed


def test_no_part_is_left_out():
    """Of the programs of `make bench`, but that beside mergekit, which is not installed here."""
    of_make = re.search(r"^bench: .*?\n\n", (ROOT / "Makefile").read_text(), flags=re.S | re.M)[0]
    programs = {Path(name).stem for name in re.findall(r"benchmarks/(\w+\.py)", of_make)}
    assert programs - {"beside_mergekit"} == {program.__name__ for program, _, _ in PARTS}
    for program in (merging, checkpoints, osrm_init):
        assert [part for one, part, _ in PARTS if one is program] == list(program.PARTS)
