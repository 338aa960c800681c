"""Merges into three weight files, some of them stopped in the middle, and what lies in their folders."""

import pytest

from osrm_peft import merge_checkpoints
from osrm_peft.checkpoints import resumable as engine
from tests.helpers.checkpoints import hashes

SHARDS = [f"model-{place:05d}-of-00003.safetensors" for place in (1, 2, 3)]
PARTIAL, STATE = ".out.merging", "merge_state.json"


def arguments(trained, method="ties"):
    """Of a merge into three weight files, which may replace an earlier result."""
    return {
        "models": {"a": trained["a"], "b": trained["b"]}, "base": trained["base"], "method": method,
        "shard_size": 2**20, "overwrite": True,
    }  # fmt: skip


def weights_of(folder):
    """{file below `folder`: its bytes' hash}, of weight files."""
    return {
        str(path.relative_to(folder)): digest
        for path, digest in hashes(folder).items()
        if path.suffix == ".safetensors"
    }


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


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
