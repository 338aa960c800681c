"""A merge that several processes share: the same bytes as of one, whatever was interrupted, and never by mistake."""

import subprocess
import sys
from pathlib import Path

import pytest

from osrm_peft import merge_checkpoints
from osrm_peft.checkpoints import resumable
from osrm_peft.io.places import alone_in
from tests.helpers import faults
from tests.helpers.checkpoints import hashes

ROOT = Path(__file__).parents[3]


def arguments(trained, method):
    """Of a merge into three weight files, which replaces nothing."""
    return {name: value for name, value in faults.arguments(trained, method).items() if name != "overwrite"}


def content(folder):
    """{file: its bytes' hash} without manifests and cards, which say where and by which command."""
    found = hashes(folder).items()
    left_out = ("osrm_peft.json", "README.md")
    return {path.relative_to(folder).as_posix(): digest for path, digest in found if path.name not in left_out}


@pytest.mark.parametrize("method", ["ties", "emr"])
def test_parts_in_any_order_make_what_one_process_makes(trained, whole, tmp_path, method):
    given = arguments(trained, method) | {"out": tmp_path / "out"}
    for part in ((2, 2), (1, 2), (2, 2)):
        merge_checkpoints(**given, part=part)
        assert not (tmp_path / "out").exists()
    with pytest.raises(FileExistsError, match=r"finished weight files of this merge.*resume=True"):
        merge_checkpoints(**given)
    merge_checkpoints(**given, resume=True)
    assert content(tmp_path / "out") == content(whole[method])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_no_part_has_written_the_last_call_writes(trained, whole, tmp_path, monkeypatch):
    given = arguments(trained, "ties") | {"out": tmp_path / "out"}
    merge_checkpoints(**given, part=(2, 3))
    names, real = [], resumable.write_shard

    def watched(work, maker, paths, *rest):
        names.append(paths[0].name)
        return real(work, maker, paths, *rest)

    monkeypatch.setattr(resumable, "write_shard", watched)
    merge_checkpoints(**given, resume=True)
    assert names == ["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"]
    assert content(tmp_path / "out") == content(whole["ties"])


def test_a_part_that_is_written_is_waited_for(trained, tmp_path, monkeypatch):
    given = arguments(trained, "ties") | {"out": tmp_path / "out"}
    merge_checkpoints(**given, part=(1, 3))
    partial = tmp_path / ".out.merging"
    with alone_in(partial / "part-1-of-3"):
        for more in ({"resume": True}, {"part": (1, 3)}):
            with pytest.raises(FileExistsError, match=r"another process writes in .*part-1-of-3"):
                merge_checkpoints(**given, **more)
        merge_checkpoints(**given, part=(2, 3))
    monkeypatch.setattr(resumable, "_TRIES", 2)
    with alone_in(partial), pytest.raises(FileExistsError, match=r"another process writes in .*\.out\.merging"):
        merge_checkpoints(**given, part=(3, 3))


def test_parts_of_another_merge_are_not_mixed_in(trained, tmp_path, monkeypatch):
    given = arguments(trained, "ties") | {"out": tmp_path / "out"}
    merge_checkpoints(**given, part=(1, 3))
    for more in ({}, {"overwrite": True}):
        with pytest.raises(FileExistsError, match="holds a part of another merge"):
            merge_checkpoints(**given, scale=0.5, part=(2, 3), **more)
    with pytest.raises(ValueError, match="is of another merge"):
        merge_checkpoints(**given, scale=0.5, resume=True)
    faults.interrupted(monkeypatch, tmp_path / "whole", **arguments(trained, "ties"))
    with pytest.raises(FileExistsError, match="holds a part of another merge"):
        merge_checkpoints(**arguments(trained, "ties"), out=tmp_path / "whole", scale=0.5, part=(2, 3))


def test_a_part_of_a_finished_merge_is_an_error_that_leaves_nothing(trained, tmp_path):
    given = arguments(trained, "ties") | {"out": tmp_path / "out"}
    merge_checkpoints(**given)
    with pytest.raises(FileExistsError, match=r"out is there already: nothing is left for part 1 of 3"):
        merge_checkpoints(**given, part=(1, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / ".out.merging").mkdir()
    (tmp_path / ".out.merging/left").touch()  # of a killed process
    with pytest.raises(FileExistsError, match=r"out is there already"):
        merge_checkpoints(**given, part=(1, 3))
    (tmp_path / "empty").mkdir()
    merge_checkpoints(**given | {"out": tmp_path / "empty"}, part=(1, 3))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"part": (4, 3)}, r"part=4 of 3: there are parts 1 to 3"),
        ({"part": (1, 4)}, r"4 parts of 3 weight files: give 3 at most, or a smaller shard_size"),
        ({"part": (0, 3)}, r"part=0"),
        ({"part": 2}, r"part=2 must be \(i, n\)"),
        ({"part": "1/2"}, r"part='1/2' must be \(i, n\)"),
        ({"part": (1, 3), "resume": True}, r"leave resume"),
    ],
)
def test_parts_that_there_are_not_are_refused(trained, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        merge_checkpoints(**arguments(trained, "ties"), out=tmp_path / "out", **more)
    assert not any(tmp_path.iterdir())


def test_jobs_of_submitit_make_what_one_process_makes(trained, whole, tmp_path):
    """submitit's local executor runs jobs as its SLURM executor does, in processes here."""
    given = arguments(trained, "ties")
    words = [*(f"{name}={folder}" for name, folder in given["models"].items()), "--base-model", given["base"]]
    words += ["--method", "ties", "--shard-size", str(given["shard_size"]), "--out", tmp_path / "out"]
    command = [
        "recipes/merge_checkpoints_on_slurm.py",
        "--parts",
        "2",
        "--submit",
        "local",
        "--jobs",
        tmp_path / "jobs",
    ]
    done = subprocess.run(
        [sys.executable, *map(str, command), "--", *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "out") == content(whole["ties"])
