"""Full disks, killed processes, damaged and changed files: a whole result, or none and a clear error."""

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
import torch
from safetensors.torch import load_file, save_file

from osrm_peft import load_merged_checkpoint, merge_checkpoints
from osrm_peft.checkpoints import blocks
from osrm_peft.checkpoints import merge as engine
from tests.helpers.adapters import make_adapter
from tests.helpers.checkpoints import CASES, QUICK, hashes, noisy, rewrite, same, tensors_of, write

ROOT = Path(__file__).parents[2]
SIZES = {"vocab_size": 4000, "hidden_size": 64, "intermediate_size": 1024}  # three weight files of 1 MiB
SHARDS = [f"model-{place:05d}-of-00003.safetensors" for place in (1, 2, 3)]
PARTIAL, STATE = ".out.merging", "merge_state.json"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    return {name: noisy(root / name, seed, **SIZES) for seed, name in enumerate(("base", "a", "b"))}


def arguments(trained, method="ties"):
    """Of a merge into three weight files."""
    return {
        "models": {"a": trained["a"], "b": trained["b"]}, "base": trained["base"], "method": method,
        "shard_size": 2**20,
    }  # fmt: skip


@pytest.fixture
def small(tmp_path):
    """Two models and a base of a matrix and a vector."""
    folders = {}
    for name in ("base", "a", "b"):
        folders[name] = write(tmp_path / "small" / name, {"matrix": torch.randn(4, 6), "vector": torch.randn(5)})
    return folders


def weights_of(folder):
    """{file below `folder`: its bytes' hash}, of weight files."""
    return {
        str(path.relative_to(folder)): digest
        for path, digest in hashes(folder).items()
        if path.suffix == ".safetensors"
    }


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    """Uninterrupted merges."""
    root = tmp_path_factory.mktemp("whole")
    return {
        method: merge_checkpoints(out=root / method, **arguments(trained, method)) for method in ("ties", "emr", "dare")
    }


class StopHereError(Exception):
    """Raised in the middle of a merge."""


def interrupted(monkeypatch, out, after=1, **given):
    """A merge that stops after so many weight files."""
    write_shard, done = engine.write_shard, []

    def stopping(*args):
        if len(done) == after:
            raise StopHereError
        done.append(1)
        return write_shard(*args)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "write_shard", stopping)
        with pytest.raises(StopHereError):
            merge_checkpoints(out=out, **given)


@pytest.fixture
def written(monkeypatch):
    """Names of the weight files that are written from now on."""
    write_shard, seen = engine.write_shard, []

    def spying(merge, paths, *rest):
        seen.append(paths[0].name)
        return write_shard(merge, paths, *rest)

    monkeypatch.setattr(engine, "write_shard", spying)
    return seen


# processes that end in the middle

SCRIPT = """
import json, os, resource, signal, sys
from pathlib import Path
import osrm_peft.checkpoints.blocks as rows_of
import osrm_peft.checkpoints.merge as engine
from osrm_peft import load_merged_checkpoint, merge_checkpoints

given = json.loads(sys.argv[1])
write_shard, blocks = engine.write_shard, rows_of.Blocks.blocks


def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)


def between_shards():
    calls = []
    engine.write_shard = lambda *args: die() if calls else calls.append(1) or write_shard(*args)


def within_the_second():
    def dying(self, name):
        for count, found in enumerate(blocks(self, name)):
            if "layer.0.output.dense.weight" in name and count == 1:
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
def test_without_resume_it_starts_over(ended, trained, whole, tmp_path, written, fault):
    out = a_copy(ended, tmp_path, fault, "ties")
    merge_checkpoints(out=out, **arguments(trained))
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
    merge_checkpoints({"m": trained["b"]}, out)
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
        with pytest.raises(ValueError, match=r"\.out\.merging is of another merge .*: merge without resume"):
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
        merge_checkpoints(models, out, "lore")
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


# damaged and changed inputs


@pytest.mark.parametrize("changed", ["a", "base"])
def test_an_input_that_changes_meanwhile_is_told(trained, tmp_path, monkeypatch, changed):
    folders = {name: shutil.copytree(trained[name], tmp_path / name) for name in trained}
    out, write_shard = merge_checkpoints({"b": trained["b"]}, tmp_path / "out"), engine.write_shard
    before = hashes(out)

    def changing(*args):
        os.utime(folders[changed] / "model.safetensors")
        return write_shard(*args)

    monkeypatch.setattr(engine, "write_shard", changing)
    with pytest.raises(ValueError, match=f"the files of '{changed}' were changed while they were merged: merge again"):
        merge_checkpoints(out=out, **arguments(folders))
    assert hashes(out) == before


@pytest.mark.parametrize("place", ["a", "base"])
def test_a_flipped_bit_in_an_earlier_result_is_found(small, tmp_path, place):
    models = {name: small[name] for name in "ab"}
    out = merge_checkpoints(models, tmp_path / "first")
    file = out / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    used = {"models": {"a": small["a"]}, "base": out} if place == "base" else {"models": {"a": out, "b": small["b"]}}
    with pytest.raises(ValueError, match=r"first/model\.safetensors is damaged: its checksum is not that in"):
        merge_checkpoints(out=tmp_path / "second", **used)
    assert not (tmp_path / "second").exists()
    assert merge_checkpoints(out=tmp_path / "second", verify=False, **used).is_dir()


def test_a_flipped_bit_in_a_shard_or_a_model_of_emr_is_found(whole, trained, tmp_path):
    for folder in (whole["ties"], whole["emr"] / "b"):
        copied = shutil.copytree(folder, tmp_path / folder.name)
        merge_checkpoints({"m": copied}, tmp_path / "sound")
        content = bytearray((copied / SHARDS[1]).read_bytes())
        content[len(content) // 2] ^= 16
        (copied / SHARDS[1]).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{SHARDS[1]} is damaged: its checksum"):
            merge_checkpoints({"m": copied}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("tensor", ["matrix", "vector"])
@pytest.mark.parametrize("method", CASES)
def test_what_is_no_number_is_refused_by_its_tensor(small, tmp_path, method, tensor, bad):
    models = {name: small[name] for name in "ab"}
    out = merge_checkpoints({"a": small["a"]}, tmp_path / "out")
    before = hashes(out)
    if method == "emr":
        shutil.rmtree(out)
    damaged = load_file(small["b"] / "model.safetensors")[tensor]
    damaged.view(-1)[1] = bad
    rewrite(small["b"], **{tensor: damaged})
    with pytest.raises(ValueError, match=f"'{tensor}'"):
        merge_checkpoints(models, out, method, base=small["base"], **QUICK.get(method, {}))
    assert hashes(out) == ({} if method == "emr" else before)


def test_what_is_no_number_in_the_base_is_refused(small, tmp_path):
    rewrite(small["base"], vector=torch.tensor([1, 2, float("nan"), 4, 5]))
    for method in ("average", "ties", "lore", "dare"):
        with pytest.raises(ValueError, match="'vector'"):
            merge_checkpoints({name: small[name] for name in "ab"}, tmp_path / "out", method, base=small["base"])
        assert not (tmp_path / "out").exists()


def test_what_is_no_number_in_a_head_that_is_kept_is_the_owners(small, tmp_path):
    rewrite(small["b"], vector=torch.full((5,), float("nan")))
    out = merge_checkpoints({name: small[name] for name in "ab"}, tmp_path / "out", heads=["vector"])
    assert load_file(out / "heads" / "b.safetensors")["vector"].isnan().all()


@pytest.mark.parametrize("method", ["average", "ties", "emr", "dare", "lore"])
def test_torch_has_as_many_threads_as_before(small, tmp_path, monkeypatch, method):
    models, before = {name: small[name] for name in "ab"}, torch.get_num_threads()
    given = {"models": models, "base": small["base"], "method": method, "out": tmp_path / "out"}
    torch.set_num_threads(2)
    try:
        merge_checkpoints(**given)
        assert torch.get_num_threads() == 2
        for name in ("_stack", "_rows", "_merge"):
            with monkeypatch.context() as patch:
                patch.setattr(blocks.Blocks, name, lambda *_: (_ for _ in ()).throw(StopHereError))
                with pytest.raises(StopHereError):
                    merge_checkpoints(**given)
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


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
    merge_checkpoints({"a": trained["a"]}, out)
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
    again = merge_checkpoints({"out": out, "b": small["b"]}, out)
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


@pytest.mark.parametrize("about", ["{", "[]", "{}", {}, {"crc32": 3}, {"crc32": {"x": 3}}])
def test_a_damaged_state_is_named(small, tmp_path, monkeypatch, about):
    given = {"models": {"a": small["a"], "b": small["b"]}, "method": "average"}
    interrupted(monkeypatch, tmp_path / "out", after=0, **given)
    state = tmp_path / PARTIAL / STATE
    text = (
        about
        if isinstance(about, str)
        else json.dumps({"fingerprint": json.loads(state.read_text())["fingerprint"]} | about)
    )
    state.write_text(text)
    with pytest.raises(ValueError, match=r"merge_state\.json is damaged.*|is of another merge.*merge without resume"):
        merge_checkpoints(out=tmp_path / "out", resume=True, **given)
    assert merge_checkpoints(out=tmp_path / "out", **given).is_dir()


def test_a_folder_whose_name_is_no_utf_8_merges(small, tmp_path):
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    shutil.copytree(small["a"], odd)
    out = merge_checkpoints({"a": odd, "b": small["b"]}, tmp_path / "out")
    assert json.loads((out / "osrm_peft.json").read_text())["inputs"]["a"]["source"] == str(odd)


@pytest.mark.parametrize(
    "about", [None, {"x": "y"}, *({"config": text} for text in ("[" * 100_000, "3", "{}", '{"model_type": 3}',
              '{"model_type": "no"}', '{"model_type": "bert", "num_hidden_layers": "x"}'))]
)  # fmt: skip
def test_a_head_that_tells_of_no_model_is_damaged(trained, tmp_path, about):
    out = merge_checkpoints({"a": trained["a"], "b": trained["b"]}, tmp_path / "out", heads=["classifier*"])
    file = out / "heads" / "a.safetensors"
    save_file(load_file(file), file, about)
    with pytest.raises(ValueError, match=r"heads/a\.safetensors is damaged \(.*\): merge again") as caught:
        load_merged_checkpoint(out, "a")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sums", [3, True, "x", [], {"model.safetensors": 3}])
def test_checksums_of_the_wrong_kind_are_damage(small, tmp_path, sums):
    (small["a"] / "osrm_peft.json").write_text(json.dumps({"crc32": sums}))
    with pytest.raises(ValueError, match=r"/a/model\.safetensors is damaged|osrm_peft\.json is damaged \(crc32="):
        merge_checkpoints({"a": small["a"], "b": small["b"]}, tmp_path / "out")
