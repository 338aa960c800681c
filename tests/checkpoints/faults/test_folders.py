"""Folders that hold something else, or that another merge writes into: nothing of others is lost."""

import json
import os
import shutil
from pathlib import Path

import pytest

from osrm_peft import merge_checkpoints
from osrm_peft.checkpoints import resumable as engine
from tests.helpers.adapters import make_adapter
from tests.helpers.checkpoints import hashes
from tests.helpers.faults import PARTIAL, arguments, names, weights_of

# folders that hold something else


def test_folders_of_others_are_refused_and_kept(small, tmp_path):
    models = {name: small[name] for name in "ab"}
    make_adapter(tmp_path / "adapter")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    before = hashes(tmp_path)
    for place in ("small/a", "small/base", "adapter", "notes", "small"):
        with pytest.raises(FileExistsError, match="is not a folder that osrm_peft wrote as 'checkpoint'"):
            merge_checkpoints(models, tmp_path / place)
    for place in ("file", "file/below", "notes/a.txt/below"):
        with pytest.raises(FileExistsError, match=r"is a file, so .* cannot be a folder"):
            merge_checkpoints(models, tmp_path / place)
    assert hashes(tmp_path) == before


@pytest.mark.parametrize("foreign", ["notes.txt", "sub/notes.txt", "model-00001-of-00002.safetensors"])
def test_a_file_of_others_in_an_earlier_result_is_not_lost(small, tmp_path, foreign):
    models = {name: small[name] for name in "ab"}
    out = merge_checkpoints(models, tmp_path / "out")
    (out / foreign).parent.mkdir(exist_ok=True)
    (out / foreign).write_text("mine")
    with pytest.raises(FileExistsError, match=f"holds files of others .{foreign.split('/')[0]}"):
        merge_checkpoints(models, out)
    assert (out / foreign).read_text() == "mine"


@pytest.mark.parametrize(("method", "folder"), [("average", "heads"), ("emr", "a")])
def test_a_file_of_others_below_an_earlier_result_is_not_lost(small, tmp_path, method, folder):
    given = {
        "models": {name: small[name] for name in "ab"},
        "base": small["base"],
        "method": method,
        "heads": ["vector"],
    }
    out = merge_checkpoints(out=tmp_path / "out", **given)
    (out / folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        merge_checkpoints(out=out, **given)
    assert (out / folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("earlier", [False, True])
def test_what_others_put_there_meanwhile_is_not_lost(small, tmp_path, monkeypatch, earlier):
    models, out, write_shard = {name: small[name] for name in "ab"}, tmp_path / "out", engine.write_shard
    if earlier:
        merge_checkpoints(models, out)

    def disturbed(*args):
        out.mkdir(exist_ok=True)
        (out / "notes.txt").write_text("mine")
        return write_shard(*args)

    monkeypatch.setattr(engine, "write_shard", disturbed)
    with pytest.raises(FileExistsError):
        merge_checkpoints(models, out)
    assert (out / "notes.txt").read_text() == "mine"


def test_an_earlier_result_is_replaced_whole(trained, whole, tmp_path):
    out = Path(shutil.copytree(whole["ties"], tmp_path / "out"))
    merge_checkpoints({"a": trained["a"]}, out, overwrite=True)
    assert names(out) == ["README.md", "config.json", "model.safetensors", "osrm_peft.json"]
    merge_checkpoints(out=out, **arguments(trained, "emr"))
    assert names(out) == names(whole["emr"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_and_a_new_one_are_filled(small, tmp_path):
    models = {name: small[name] for name in "ab"}
    (tmp_path / "empty").mkdir()
    for place in ("empty", "deep/down/new"):
        assert merge_checkpoints(models, tmp_path / place) == tmp_path / place
        assert names(tmp_path / place) == ["README.md", "config.json", "model.safetensors", "osrm_peft.json"]


def test_a_result_can_be_merged_into_its_own_folder(small, tmp_path):
    out = merge_checkpoints({name: small[name] for name in "ab"}, tmp_path / "out")
    expected = merge_checkpoints({"out": out, "b": small["b"]}, tmp_path / "expected")
    again = merge_checkpoints({"out": out, "b": small["b"]}, out, overwrite=True)
    assert weights_of(again) == weights_of(expected)


# two merges into one folder, and what is left of another


def test_of_two_merges_into_one_folder_the_second_is_refused(trained, whole, tmp_path, monkeypatch):
    write_shard = engine.write_shard

    def meanwhile(*args):
        with pytest.raises(FileExistsError, match=rf"another process writes in .*{PARTIAL}: wait for it"):
            merge_checkpoints(out=tmp_path / "out", **arguments(trained, "dare"))
        return write_shard(*args)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "write_shard", meanwhile)
        merge_checkpoints(out=tmp_path / "out", **arguments(trained))
    assert weights_of(tmp_path / "out") == weights_of(whole["ties"]) and os.listdir(tmp_path) == ["out"]


def test_a_merge_that_begins_while_an_earlier_result_is_removed_is_refused(trained, whole, tmp_path, monkeypatch):
    rmtree, begun = shutil.rmtree, []

    def meanwhile(place, **options):
        if Path(place).name == PARTIAL:
            begun.append(1)
            with pytest.raises(FileExistsError, match="another process writes in"):
                merge_checkpoints(out=tmp_path / "out", **arguments(trained, "dare"))
        rmtree(place, **options)

    monkeypatch.setattr(shutil, "rmtree", meanwhile)
    for method in ("dare", "ties"):
        merge_checkpoints(out=tmp_path / "out", **arguments(trained, method))
        assert weights_of(tmp_path / "out") == weights_of(whole[method]) and os.listdir(tmp_path) == ["out"]
    assert begun == [1]


def test_a_link_is_no_place_for_what_is_unfinished(trained, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").touch()
    (tmp_path / PARTIAL).symlink_to("thesis")
    with pytest.raises(FileExistsError, match=r"\.out\.merging is no folder"):
        merge_checkpoints(out=tmp_path / "out", **arguments(trained))
    assert (tmp_path / "thesis" / "chapter").exists()


def test_a_folder_whose_name_is_no_utf_8_merges(small, tmp_path):
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    shutil.copytree(small["a"], odd)
    out = merge_checkpoints({"a": odd, "b": small["b"]}, tmp_path / "out")
    assert json.loads((out / "osrm_peft.json").read_text())["inputs"]["a"]["source"] == str(odd)
