"""Launches of the engine tests, each once a session; and their table at the end."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from rich.table import Table

from osrm_peft.models.packaged import resolve_model
from tests.multiprocess.worker import CHECKPOINT

ROOT = Path(__file__).parents[2]
ENGINES = {"single": "single", "DDP": "cpu_ddp", "FSDP2": "cpu_fsdp2", "ZeRO-2": "cpu_zero2", "ZeRO-3": "cpu_zero3"}
STAGES = ("features", "init", "steps", "save", "reload", "resume")
_outcomes: dict[tuple[str, str], str] = {}
_seconds: dict[str, float] = {}


def launch(config, *arguments, flags=(), code=0, **environment):
    """`accelerate launch` one of our configs; what it printed."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{config}.yaml"]
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    if "zero" in config:
        # DeepSpeed's own extension: in a user's cache a process that was killed as it compiled leaves a lock for ever
        fixed["TORCH_EXTENSIONS_DIR"] = str(Path(sys.prefix) / "torch_extensions")
        del fixed["ACCELERATE_USE_CPU"]
    if config != "single":  # several workers of pytest launch at once
        command += ["--main_process_port", str(free_port())]
    done = subprocess.run(
        [*command, *flags, *map(str, arguments)],
        cwd=ROOT, env=os.environ | fixed | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=400,
    )  # fmt: skip
    assert (done.returncode == 0) == (code == 0), done.stdout[-8000:]
    return done.stdout


def free_port():
    """A port that nobody listens at now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclass
class Run:
    """What one engine did.

    Attributes:
        folder: with the features and the adapters `cut` (killed and resumed) and `whole`.
        about: {phase: what each process wrote of it}.
    """

    folder: Path
    about: dict[str, list[dict]] = field(default_factory=dict)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """MiniLM without dropout, which would draw other masks in other numbers of processes."""
    folder = tmp_path_factory.mktemp("model")
    shutil.copytree(resolve_model("packaged"), folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def write_recipe(folder, model, features, training=None, osrm=None):
    """`features` are those of one process: of rounded sums A would differ by more than the rounding."""
    training = {"use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-3, "warmup_steps": 0} | (training or {})
    recipe = {
        "model": model,
        "suite": "packaged",
        "tasks": ["questions", "tweets"],
        "lora": {"target_modules": ["query", "value"]},
        "osrm": osrm or {},
        "features": str(features),
        "num_samples": 5,  # in 2 processes a batch of 3 and one of 2
        "training": training,
        "max_length": 32,
        "train_rows": 64,
        "validation_rows": 16,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


@pytest.fixture(scope="session")
def run_of(model_folder, tmp_path_factory):
    """engine → its Run: two launches, the first of which kills itself."""
    runs = {}

    def run(engine):
        if engine not in runs:
            folder = tmp_path_factory.mktemp(engine)
            first = folder if engine == "single" else run("single").folder
            write_recipe(folder, model_folder, first / "features")
            start = time.monotonic()
            runs[engine] = _run(engine, folder)
            _seconds[engine] = time.monotonic() - start
        return runs[engine]

    return run


def _run(engine, folder):
    config, script = ENGINES[engine], "tests/multiprocess/worker.py"
    printed = launch(config, script, folder, "features", "killed", code=1)
    assert f"signal {signal.SIGKILL.value}" in printed or "SIGKILL" in printed, printed[-8000:]
    assert not (folder / "cut").exists()
    assert (folder / f"cut.checkpoints/checkpoint-{CHECKPOINT}").is_dir()
    launch(config, script, folder, "resumed", "whole", *(["late"] if engine == "ZeRO-2" else []))
    found = Run(folder)
    for phase in ("killed", "resumed", "whole"):
        files = sorted(folder.glob(f"{phase}.*.json"))
        found.about[phase] = [json.loads(file.read_text()) for file in files]
    return found


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    engine = getattr(item, "callspec", None) and item.callspec.params.get("engine")
    stage = item.name.partition("[")[0].removeprefix("test_")
    if engine in ENGINES and stage in STAGES and (call.when == "call" or report.failed):
        _outcomes[engine, stage] = "ok" if report.passed else "FAILED"


def pytest_terminal_summary(terminalreporter):
    if not _outcomes:
        return
    table = Table(title="Engines on 2 CPU processes, each compared with one process")
    for column in ("", *STAGES, "seconds"):
        table.add_column(column)
    for engine in ENGINES:
        cells = [_outcomes.get((engine, stage), "") for stage in STAGES]
        table.add_row(engine, *cells, f"{_seconds.get(engine, 0):.0f}")
    console = Console(width=100)
    with console.capture() as captured:
        console.print(table)
    terminalreporter.write(captured.get())
