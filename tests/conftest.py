"""What `make test-fast` leaves out, and the fixtures that all tests share."""

import gc
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.helpers.models import make_base

settings.register_profile("other work on the machine", deadline=None)
settings.load_profile("other work on the machine")

# What `make test-fast` leaves out: files, or single tests (the beginning of FILE::NAME), below tests/.
MARKED = {
    "process": (
        "multiprocess/",
        "adapters/test_adapters.py::test_stock_peft_alone",
        "benchmarks/test_make_bench.py",
        "checkpoints/faults/",
        "cli/test_terminal.py",
        "demo/",
        "features/test_file.py::test_features_from_the_hub",
        "hub/test_push.py",
        "hub/test_push_of_training.py",
        "hub/test_push_refusals.py",
        "hub/test_serving.py",
        "hub/test_sources.py",
        "io/test_places.py",
        "merging/methods/test_svt.py::test_of_task_vectors_of_full_rank_no_copies",
        "tasks/test_glue.py",
        "tasks/test_hub_data.py",
        "test_docs.py::test_every_python_block",
        "test_docs.py::test_a_users_file",
        "test_examples.py",
        "test_imports.py::test_commands",
        "training/",
    ),
    "slow": (
        "checkpoints/test_bake.py",
        "checkpoints/test_extract.py",
        "checkpoints/test_heads_and_vocabularies.py",
        "checkpoints/test_merge.py",
        "checkpoints/test_names.py",
        "checkpoints/test_result.py",
        "checkpoints/test_text.py",
        "checkpoints/test_unlike_models.py",
        "cli/",
        "evaluation/test_harness.py",
        "evaluation/test_page.py",
        "evaluation/test_subjects.py",
        "evaluation/test_scored.py",
        "hub/test_card.py",
        "io/test_hostile_files.py",
        "io/test_writers.py",
        "merging/test_alignment.py",
        "merging/test_contract.py",
        "models/test_classes.py",
        "models/test_families.py",
        "models/test_loading.py",
        "osrm/test_callback.py",
        "pipeline/",
        "selection/test_select.py",
        "test_pictures.py",
        "zoo/",
    ),
    "browser": ("evaluation/test_page_in_a_browser.py",),
}


HERE = Path(__file__).parent
FAST = "not (process or slow or browser)"


def pytest_collection_finish(session) -> None:
    """What the imports made is not searched for garbage again: Trainer collects after each run, at length."""
    gc.collect()
    gc.freeze()


def pytest_ignore_collect(collection_path, config):
    """`make test-fast` does not import the files that it leaves out: importing TRL alone takes seconds."""
    name = collection_path.relative_to(HERE).as_posix()
    if config.option.markexpr == FAST and name.endswith(".py"):
        return name.startswith(sum(MARKED.values(), ())) or None
    return None


def pytest_collection_modifyitems(items):
    for item in items:
        name = f"{item.path.relative_to(HERE).as_posix()}::{item.name}"
        for mark, beginnings in MARKED.items():
            if name.startswith(beginnings):
                item.add_marker(mark)


@pytest.fixture
def threads():
    """threads(number): torch's number of threads, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def base():
    return make_base()


@pytest.fixture
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_base().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def call(monkeypatch, capsys):
    """The command `osrm-peft` in this process: importing torch and transformers anew takes seconds.

    call(*arguments, code=0) → what it printed (with another code, its error), white space as single spaces.
    """
    from osrm_peft.cli.main import main

    def called(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["osrm-peft", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        assert (stopped.value.code or 0) == code, printed.err
        return " ".join((printed.out if code == 0 else printed.err).split())

    return called
