"""Everything that writes refuses what it cannot replace, before any work and without touching it."""

import sys
from pathlib import Path

import pytest
import torch

from osrm_peft import OSRMLoraConfig, load_adapter, merge_adapters, merge_checkpoints
from osrm_peft.demo.run import run_demo
from osrm_peft.evaluation.interference import Interference
from osrm_peft.evaluation.page import write_report
from osrm_peft.evaluation.plots import plot_drift, plot_interference, plot_scales
from osrm_peft.evaluation.spectra import plot_spectra
from osrm_peft.evaluation.tables import MultiTaskTable, Score
from osrm_peft.features.fisher import DiagonalFisher
from osrm_peft.features.moments import FeatureMoments
from osrm_peft.features.task_features import TaskFeatures
from osrm_peft.hub.card import record_scores, write_manifest
from osrm_peft.io.json import write_json
from osrm_peft.pipeline.init import write_recipe
from osrm_peft.pipeline.run import run_recipe
from osrm_peft.selection.select import select_merge
from osrm_peft.training.recipe import Recipe
from tests.helpers.adapters import make_adapter
from tests.helpers.places import ODD, plant, state

REFUSED = r"is a (\w+, so .* cannot be a (file|folder)|link that leads to itself.*): name another"
NONE = ["a=no/such", "b=no/such"]  # inputs that are read only after the check

# {command with files or folders below --out: what lies there}
BELOW = {
    ("interference", *NONE, "--features", "a=none"): ("interference.json", "interference.png"),
    ("inspect", *NONE, "--spectrum"): ("spectrum.json", "spectrum.png"),
    ("statistics", "-c", "RECIPE", "--kind", "gram"): ("tweets.gram.safetensors", "sms_spam.gram.safetensors"),
    ("features", "-c", "RECIPE"): ("tweets.features.safetensors", "sms_spam.features.safetensors"),
    ("demo",): ("settings.json", "scores.json", "scales.png", "report.md",
                "report.html"),
}  # fmt: skip
FOLDERS = [
    ("merge", *NONE), ("merge", *NONE, "-m", "emr"), ("merge", *NONE, "--scale", "1", "--scale", "2"),
    ("merge", *NONE, "--dry-run"), ("merge-checkpoints", *NONE), ("merge-checkpoints", *NONE, "--dry-run"),
    ("project", "no/such", "--features", "none"), ("train", "-c", "RECIPE"), *BELOW,
]  # fmt: skip
FILES = [("evaluate", "no/such"), ("report", "no/such")]


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "inputs/recipe.yaml"
    path.parent.mkdir()
    path.write_text("model: no/such\nsuite: packaged\ntasks: [tweets, sms_spam]\n")
    return path


def refuses(call, command, recipe, out, planted):
    before = state(planted)
    found = call(*(str(recipe) if one == "RECIPE" else one for one in command), "--out", out, code=2)
    assert "name another" in found and " is a" in found, found
    assert state(planted) == before


@pytest.mark.parametrize("kind", [*ODD, "file", "link to a file"])
@pytest.mark.parametrize("command", FOLDERS, ids=" ".join)
def test_commands_that_write_a_folder(call, recipe, tmp_path, command, kind):
    plant(tmp_path / "place/out", kind)
    refuses(call, command, recipe, tmp_path / "place/out", tmp_path / "place")
    refuses(call, command, recipe, tmp_path / "place/out/below", tmp_path / "place")


@pytest.mark.parametrize("kind", [*ODD, "folder", "link to a folder"])
@pytest.mark.parametrize("command", FILES, ids=" ".join)
def test_commands_that_write_a_file(call, recipe, tmp_path, command, kind):
    plant(tmp_path / "place/out.html", kind)
    refuses(call, command, recipe, tmp_path / "place/out.html", tmp_path / "place")


@pytest.mark.parametrize("kind", ["fifo", "link to a device", "folder", "loop"])
@pytest.mark.parametrize("command, name", [(one, name) for one, names in BELOW.items() for name in names])
def test_files_that_commands_write_into_a_folder(call, recipe, tmp_path, command, name, kind):
    plant(tmp_path / "place/out" / name, kind)
    refuses(call, command, recipe, tmp_path / "place/out", tmp_path / "place")


def _merged(method="average"):
    return lambda path: merge_adapters({"a": load_adapter(path.parents[1] / "adapter")}, method).save_pretrained(path)


def _features(task="a"):
    moments = FeatureMoments("mean", 2, 1, torch.ones(2), None, None)
    return TaskFeatures(task, "base", "0", "mean", 1, layers={"layer": moments})


def _table():
    return MultiTaskTable.of([Score("x", "ties", scale, 0, task, 0.5) for scale in (0.1, 1.0) for task in "ab"])


CROSSTALK = Interference(["a", "b"], {"layer": torch.ones(2, 2)}, "own")
WRITE_FOLDERS = {
    "a merge": _merged(),
    "an EMR merge": _merged("emr"),
    "an adapter": lambda path: load_adapter(path.parents[1] / "adapter").save_pretrained(path),
    "a checkpoint": lambda path: merge_checkpoints({"a": "no/such"}, path),
    "a trained adapter": lambda path: Recipe(model="packaged", suite="packaged").train("tweets", path),
    "the demo": run_demo,
    "a run": lambda path: run_recipe(Recipe(model="packaged", suite="packaged", out=str(path))),
    "a selection": lambda path: select_merge({"a": "no/such"}, tasks={}, out=path),
    "a manifest": lambda path: write_manifest(path, {"kind": "adapter"}),
    "a configuration": lambda path: OSRMLoraConfig().save_pretrained(str(path)),
}
WRITE_FILES = {
    "JSON": lambda path: write_json(path, {}),
    "features": lambda path: _features().save(path),
    "Fisher": lambda path: DiagonalFisher("a", "base", 1, "true", layers={"layer": torch.ones(2, 2)}).save(path),
    "scales": lambda path: plot_scales(_table(), path),
    "interference": lambda path: plot_interference({"x": CROSSTALK}, path),
    "drift": lambda path: plot_drift({"x": [(0, 0.1)]}, path),
    "spectra": lambda path: plot_spectra({"x": {"layer": [2.0, 1.0]}}, path),
    "a page": lambda path: write_report(["no/such"], path),
    "a recipe": lambda path: write_recipe("no/such", path),
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("writers")
    make_adapter(folder / "adapter")
    return folder / "adapter"


@pytest.mark.parametrize("kind", [*ODD, "file", "link to a file"])
@pytest.mark.parametrize("what", WRITE_FOLDERS)
def test_functions_that_write_a_folder(adapter, tmp_path, what, kind):
    (tmp_path / "adapter").symlink_to(adapter)
    plant(tmp_path / "place/out", kind)
    before = state(tmp_path / "place")
    with pytest.raises(FileExistsError, match=REFUSED):
        WRITE_FOLDERS[what](tmp_path / "place/out")
    assert state(tmp_path / "place") == before


@pytest.mark.parametrize("kind", [*ODD, "folder", "link to a folder"])
@pytest.mark.parametrize("what", WRITE_FILES)
def test_functions_that_write_a_file(tmp_path, what, kind):
    plant(tmp_path / "place/out.html", kind)
    before = state(tmp_path / "place")
    with pytest.raises(FileExistsError, match=REFUSED):
        WRITE_FILES[what](tmp_path / "place/out.html")
    assert state(tmp_path / "place") == before


def test_links_to_where_nothing_is_yet_are_followed(adapter, tmp_path):
    (tmp_path / "adapter").symlink_to(adapter)
    (tmp_path / "place").mkdir()
    (tmp_path / "place/out").symlink_to("../real")
    _merged()(tmp_path / "place/out")
    assert (tmp_path / "place/out").is_symlink() and isinstance(
        load_adapter(tmp_path / "real"), type(load_adapter(adapter))
    )


def test_scores_go_into_no_file_that_others_share(adapter, tmp_path):
    """A folder of the Hub's cache holds links to files of several versions."""
    write_manifest(tmp_path / "blobs", {"kind": "adapter", "task": "tweets"})
    (tmp_path / "snapshot").mkdir()
    for name in ("osrm_peft.json", "README.md"):
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / name)
    before = (tmp_path / "blobs/osrm_peft.json").read_bytes()
    with pytest.raises(ValueError, match=r"is a link out of its folder: copy the folder"):
        record_scores(tmp_path / "snapshot", [{"task": "tweets", "metric": "accuracy", "value": 1.0}])
    assert (tmp_path / "blobs/osrm_peft.json").read_bytes() == before


@pytest.mark.parametrize("script", ["smollm2", "train_adapter", "reproduce", "lore_checkpoints"])
def test_recipes_check_their_folder_first(tmp_path, monkeypatch, script, recipe):
    root = Path(__file__).parents[2] / "recipes"
    monkeypatch.syspath_prepend(str(root))
    module = __import__(script)
    configs = {"train_adapter": recipe, "reproduce": root / "configs/reproduce_minilm.yaml"}
    given = ["--config", str(configs[script])] if script in configs else []
    plant(tmp_path / "place/out", "fifo")
    monkeypatch.setattr(sys, "argv", [script, *given, "--out", str(tmp_path / "place/out")])
    with pytest.raises(FileExistsError, match=REFUSED):
        module.main()
    assert (tmp_path / "place/out").is_fifo()


def test_a_folder_of_others_is_not_replaced_by_a_model(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "recipes"))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter").touch()
    monkeypatch.setattr(sys, "argv", ["smollm2", "--out", str(tmp_path / "thesis")])
    with pytest.raises(FileExistsError, match="name a new folder"):
        __import__("smollm2").main()
    assert (tmp_path / "thesis/chapter").exists()
