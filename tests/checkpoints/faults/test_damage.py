"""Damaged and changed inputs, and damaged results: a clear error, and the earlier result as it was."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from osrm_peft import load_merged_checkpoint, merge_checkpoints
from osrm_peft.checkpoints import blocks
from osrm_peft.checkpoints import resumable as engine
from tests.helpers.checkpoints import CASES, QUICK, hashes, rewrite
from tests.helpers.faults import PARTIAL, SHARDS, STATE, StopHereError, arguments, interrupted


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
        merge_checkpoints({"m": copied}, tmp_path / "sound", overwrite=True)
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
        merge_checkpoints(models, out, method, base=small["base"], overwrite=True, **QUICK.get(method, {}))
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
def test_torch_has_as_many_threads_as_before(small, tmp_path, monkeypatch, method, threads):
    models = {name: small[name] for name in "ab"}
    given = {"models": models, "base": small["base"], "method": method, "out": tmp_path / "out"}
    threads(2)
    merge_checkpoints(**given)
    assert torch.get_num_threads() == 2
    for name in ("_with_base", "rows", "_combined" if method == "average" else "_merge"):
        with monkeypatch.context() as patch:
            patch.setattr(blocks.Blocks, name, lambda *_, **__: (_ for _ in ()).throw(StopHereError))
            with pytest.raises(StopHereError):
                merge_checkpoints(**given)
        assert torch.get_num_threads() == 2


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
    with pytest.raises(ValueError, match=r"merge_state\.json is damaged|is of another merge.*begin anew"):
        merge_checkpoints(out=tmp_path / "out", resume=True, **given)
    assert merge_checkpoints(out=tmp_path / "out", **given).is_dir()


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
