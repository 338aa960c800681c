"""Merges that processes, errors and full disks end in the middle: no result, and the next one goes on from there."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from safetensors.torch import load_file

from osrm_peft import merge_checkpoints
from osrm_peft.checkpoints import blocks
from osrm_peft.checkpoints import resumable as engine
from tests.helpers.checkpoints import hashes, same, tensors_of
from tests.helpers.faults import PARTIAL, SHARDS, STATE, arguments, interrupted, names, weights_of

ROOT = Path(__file__).parents[3]


@pytest.fixture
def written(monkeypatch):
    """Names of the weight files that are written from now on."""
    write_shard, seen = engine.write_shard, []

    def spying(work, maker, paths, *rest):
        seen.append(paths[0].name)
        return write_shard(work, maker, paths, *rest)

    monkeypatch.setattr(engine, "write_shard", spying)
    return seen


# processes that end in the middle

SCRIPT = """
import json, os, resource, signal, sys
from pathlib import Path
import osrm_peft.checkpoints.blocks as rows_of
import osrm_peft.checkpoints.resumable as engine
from osrm_peft import load_merged_checkpoint, merge_checkpoints

given = json.loads(sys.argv[1])
write_shard, blocks = engine.write_shard, rows_of.Blocks.blocks


def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)


def between_shards():
    calls = []
    engine.write_shard = lambda *args: die() if calls else calls.append(1) or write_shard(*args)


def within_the_second():
    def dying(self, tensors):
        places = [name for name in tensors for _ in self.rows(name)]
        of_it = [place for place, name in enumerate(places) if "layer.0.output.dense.weight" in name]
        for count, found in enumerate(blocks(self, tensors)):
            if of_it and count == of_it[1]:
                die()
            yield found

    rows_of.BLOCK, rows_of.Blocks.blocks = 2**12, dying


def before_the_end():
    engine.put_in_place = die


def full_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))


for fault in (between_shards, within_the_second, before_the_end, full_disk):
    for method in ("ties", "emr"):
        if pid := os.fork():
            print(fault.__name__, method, os.waitpid(pid, 0)[1], flush=True)
            continue
        fault()
        place = f"{fault.__name__}-{method}"
        try:
            merge_checkpoints(out=Path(given["root"], place, "out"), method=method, **given["merge"])
        except OSError as error:
            Path(given["root"], place + ".json").write_text(json.dumps([error.errno, str(error)]))
        os._exit(0)
"""
FAULTS = ["between_shards", "within_the_second", "before_the_end", "full_disk"]


@pytest.fixture(scope="module")
def ended(trained, tmp_path_factory):
    """A folder of merges that ended in the middle, some of them where an earlier result was."""
    root = tmp_path_factory.mktemp("ended")
    for fault in ("before_the_end", "full_disk"):
        merge_checkpoints(out=root / f"{fault}-ties" / "out", models={"b": trained["b"]})
    merge = {
        name: value if isinstance(value, (int, dict)) else str(value)
        for name, value in arguments(trained).items()
        if name != "method"
    }
    merge["models"] = {name: str(folder) for name, folder in merge["models"].items()}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps({"root": str(root), "merge": merge})],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    statuses = {tuple(line.split()[:2]): int(line.split()[2]) for line in run.stdout.splitlines()}
    for (fault, _), status in statuses.items():
        assert status == (0 if fault == "full_disk" else signal.SIGKILL), run.stderr
    return root


def a_copy(ended, tmp_path, fault, method):
    return Path(shutil.copytree(ended / f"{fault}-{method}", tmp_path / "copy")) / "out"


@pytest.mark.parametrize("method", ["ties", "emr"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_merge_that_ended_in_the_middle_leaves_no_result(ended, trained, fault, method):
    out = ended / f"{fault}-{method}" / "out"
    if fault in ("before_the_end", "full_disk") and method == "ties":
        same(tensors_of(out), tensors_of(trained["b"]))
        assert names(out) == ["README.md", "config.json", "model.safetensors", "osrm_peft.json"]
    else:
        assert not out.exists()
    assert names(out.parent)[0] == PARTIAL


@pytest.fixture(scope="module")
def resumed(ended, trained, tmp_path_factory):
    """All of them, gone on with."""
    root, outs = tmp_path_factory.mktemp("resumed"), {}
    for fault in FAULTS:
        for method in ("ties", "emr"):
            outs[fault, method] = a_copy(ended, root / fault / method, fault, method)
            merge_checkpoints(out=outs[fault, method], resume=True, **arguments(trained, method))
    return outs


@pytest.mark.parametrize("method", ["ties", "emr"])
@pytest.mark.parametrize("fault", FAULTS)
def test_it_goes_on_to_the_same_bits(resumed, whole, fault, method):
    out = resumed[fault, method]
    assert weights_of(out) == weights_of(whole[method])
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("method", ["ties", "emr"])
@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_of_the_interrupted_one_is_left_in_the_result(resumed, whole, fault, method):
    out = resumed[fault, method]
    assert names(out) == names(whole[method])
    manifest = json.loads((out / "osrm_peft.json").read_text())
    assert manifest == json.loads((whole[method] / "osrm_peft.json").read_text())


@pytest.mark.parametrize("method", ["ties", "emr"])
@pytest.mark.parametrize("fault", ["between_shards", "within_the_second"])
def test_finished_weight_files_are_not_written_again(ended, trained, tmp_path, written, monkeypatch, fault, method):
    out = a_copy(ended, tmp_path, fault, method)
    folder = Path("a" if method == "emr" else "")
    before = (out.parent / PARTIAL / folder / SHARDS[0]).stat()
    monkeypatch.setattr(blocks, "_Stacks", None)  # the threshold of TIES is known
    merge_checkpoints(out=out, resume=True, **arguments(trained, method))
    after = (out / folder / SHARDS[0]).stat()
    assert written == SHARDS[1:]
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("fault", FAULTS)
def test_without_resume_it_starts_over_where_it_may(ended, trained, whole, tmp_path, written, fault):
    out = a_copy(ended, tmp_path, fault, "ties")
    before, given = hashes(out.parent / PARTIAL), arguments(trained)
    state = out.parent / PARTIAL / STATE
    if state.exists() and json.loads(state.read_text())["crc32"] and not out.exists():
        message = r"\.out\.merging holds \d finished weight files of this merge, which was interrupted: go on with"
        with pytest.raises(FileExistsError, match=message + r" resume=True \(--resume\), or begin anew with overwrite"):
            merge_checkpoints(out=out, **(given | {"overwrite": False}))
    assert hashes(out.parent / PARTIAL) == before
    merge_checkpoints(out=out, **given)
    assert written == SHARDS
    assert names(out) == names(whole["ties"]) and weights_of(out) == weights_of(whole["ties"])
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("method", ["ties", "emr"])
def test_a_disk_that_fills_up_is_told(ended, method):
    number, message = json.loads((ended / f"full_disk-{method}.json").read_text())
    assert number == errno.EFBIG and "File too large" in message
    assert not weights_of(ended / f"full_disk-{method}" / PARTIAL)
    assert not list((ended / f"full_disk-{method}").rglob("*.partial"))


def test_nothing_of_an_abandoned_merge_is_left_in_another(ended, trained, tmp_path):
    out = a_copy(ended, tmp_path, "between_shards", "emr")
    with pytest.raises(FileExistsError, match=r"finished weight files of another merge, .*: begin anew with overwrite"):
        merge_checkpoints({"m": trained["b"]}, out)
    merge_checkpoints({"m": trained["b"]}, out, overwrite=True)
    assert names(out) == ["README.md", "config.json", "model.safetensors", "osrm_peft.json"]


# going on


def test_dare_draws_the_same_after_an_interruption(trained, whole, tmp_path, monkeypatch):
    given = arguments(trained, "dare")
    interrupted(monkeypatch, tmp_path / "out", 2, **given)
    merge_checkpoints(out=tmp_path / "out", resume=True, **given)
    assert weights_of(tmp_path / "out") == weights_of(whole["dare"])


def test_several_interruptions_are_gone_on_from(trained, whole, tmp_path, monkeypatch, written):
    out, given = tmp_path / "out", arguments(trained)
    interrupted(monkeypatch, out, 1, **given)
    interrupted(monkeypatch, out, 1, resume=True, **given)
    merge_checkpoints(out=out, resume=True, **given)
    assert written == SHARDS
    assert names(out) == names(whole["ties"]) and weights_of(out) == weights_of(whole["ties"])


def test_with_nothing_to_go_on_from_it_is_a_merge(trained, whole, tmp_path):
    out = merge_checkpoints(out=tmp_path / "out", resume=True, **arguments(trained))
    assert weights_of(out) == weights_of(whole["ties"])
    merge_checkpoints(out=out, resume=True, **arguments(trained))
    assert weights_of(out) == weights_of(whole["ties"])


def others(trained, tmp_path):
    """Merges that are not the interrupted one."""
    given = arguments(trained)
    yield given | {"method": "dare_ties"}
    for change in (
        {"density": 0.3}, {"weights": [1, 2]}, {"scale": 0.5}, {"seed": 1}, {"dtype": "bfloat16"},
        {"shard_size": 2**21}, {"heads": ["classifier*"]}, {"base": trained["a"]}, {"models": {"a": trained["a"]}},
        {"models": {"b": trained["a"], "a": trained["b"]}}, {"models": {"b": trained["b"], "a": trained["a"]}},
    ):  # fmt: skip
        yield given | change
    copied = shutil.copytree(trained["a"], tmp_path / "copied")
    yield given | {"models": given["models"] | {"a": copied}}


def test_another_merge_is_not_gone_on_with(trained, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupted(monkeypatch, out, 1, **arguments(trained))
    before = hashes(tmp_path / PARTIAL)
    for other in others(trained, tmp_path):
        if list(other["models"]) == ["b", "a"] and other["models"]["a"] == trained["a"]:
            continue  # the same models in another order may go on, or not
        with pytest.raises(ValueError, match=r"\.out\.merging is of another merge .*: begin anew with overwrite=True"):
            merge_checkpoints(out=out, resume=True, **other)
        assert hashes(tmp_path / PARTIAL) == before and not out.exists()
    merge_checkpoints(out=out, resume=True, **arguments(trained))


def test_inputs_that_changed_since_are_not_gone_on_with(trained, tmp_path, monkeypatch):
    models = {name: shutil.copytree(trained[name], tmp_path / name) for name in "ab"}
    given = arguments(trained) | {"models": models}
    interrupted(monkeypatch, tmp_path / "out", 1, **given)
    os.utime(models["b"] / "model.safetensors")
    with pytest.raises(ValueError, match=r"is of another merge \(other inputs or options\)"):
        merge_checkpoints(out=tmp_path / "out", resume=True, **given)


def test_a_finished_weight_file_that_is_gone_is_written_again(trained, whole, tmp_path, monkeypatch):
    given = arguments(trained)
    interrupted(monkeypatch, tmp_path / "out", 2, **given)
    (tmp_path / PARTIAL / SHARDS[0]).unlink()
    merge_checkpoints(out=tmp_path / "out", resume=True, **given)
    assert weights_of(tmp_path / "out") == weights_of(whole["ties"])


def test_heads_are_written_after_an_interruption(trained, tmp_path, monkeypatch):
    given = arguments(trained) | {"heads": ["classifier*"]}
    interrupted(monkeypatch, tmp_path / "out", 1, **given)
    merge_checkpoints(out=tmp_path / "out", resume=True, **given)
    assert set(load_file(tmp_path / "out" / "heads" / "b.safetensors")) == {"classifier.weight", "classifier.bias"}


# full disks

Usage = namedtuple("Usage", "total used free")


def limit_disk(monkeypatch, free):
    asked = []
    monkeypatch.setattr(
        shutil, "disk_usage", lambda place: asked.append(Path(place)) or Usage(10**12, 10**12 - free, free)
    )
    return asked


@pytest.mark.parametrize("method", ["average", "emr"])
def test_too_little_room_is_known_before_a_byte_is_written(small, tmp_path, monkeypatch, method):
    size = sum(tensor.nbytes for tensor in tensors_of(small["a"]).values())
    copies = 2 if method == "emr" else 1
    models = {name: small[name] for name in "ab"}
    out = tmp_path / "new" / "out"
    asked = limit_disk(monkeypatch, copies * size - 1)
    with pytest.raises(OSError, match=r"the result takes .* GiB and the disk of .* GiB free: make room"):
        merge_checkpoints(models, out, method, base=small["base"])
    assert asked[0].is_dir() and asked[0] in out.parents
    assert not out.exists() and not list(tmp_path.rglob("*.partial"))
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    limit_disk(monkeypatch, copies * size + 4096)
    assert merge_checkpoints(models, out, method, base=small["base"]).is_dir()


def test_an_earlier_result_outlives_too_little_room(small, tmp_path, monkeypatch):
    models = {name: small[name] for name in "ab"}
    out = merge_checkpoints(models, tmp_path / "out")
    before = hashes(out)
    limit_disk(monkeypatch, 10)
    with pytest.raises(OSError, match="make room"):
        merge_checkpoints(models, out, "lore", overwrite=True)
    assert hashes(out) == before


def test_room_is_asked_for_what_is_missing_only(trained, tmp_path, monkeypatch):
    """What an interrupted merge has written need not fit on the disk once more."""
    given = arguments(trained)
    interrupted(monkeypatch, tmp_path / "out", 2, **given)
    size = sum(tensor.nbytes for tensor in tensors_of(trained["a"]).values())
    finished = sum((tmp_path / PARTIAL / name).stat().st_size for name in SHARDS[:2])
    limit_disk(monkeypatch, size - finished + 10_000)
    assert merge_checkpoints(out=tmp_path / "out", resume=True, **given).is_dir()


def test_room_that_an_abandoned_merge_takes_is_free(trained, tmp_path, monkeypatch):
    given = arguments(trained)
    interrupted(monkeypatch, tmp_path / "out", 2, **given)
    size = sum(tensor.nbytes for tensor in tensors_of(trained["a"]).values())

    def usage(_):
        taken = sum(path.stat().st_size for path in (tmp_path / PARTIAL).rglob("*") if path.is_file())
        return Usage(size + 10_000, taken, size + 10_000 - taken)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert merge_checkpoints(out=tmp_path / "out", **given).is_dir()
