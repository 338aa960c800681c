"""Checkpoints merged on a GPU are those merged on the CPU, to rounding. An imagined GPU stands in where none is."""

import json
from concurrent.futures import Future

import pytest

from osrm_peft import merge_checkpoints
from osrm_peft.checkpoints import blocks, merge
from tests.helpers.checkpoints import CASES, QUICK, same, tensors_of
from tests.helpers.devices import DEVICES, device_named

FOLDERS = {"emr": ["a", "b", "c"]}


class InThisThread:
    """Workers that do their work at once: the imagined device is one thread's."""

    def __init__(self, workers):
        pass

    def submit(self, work, *arguments):
        done = Future()
        done.set_result(work(*arguments))
        return done

    def shutdown(self, **_):
        pass


@pytest.fixture(params=DEVICES)
def there(request, monkeypatch):
    if request.param == "imagined":
        monkeypatch.setattr(blocks, "ThreadPoolExecutor", InThisThread)
    with device_named(request.param, monkeypatch) as device:
        yield device


@pytest.mark.parametrize("scale", [0.5])
@pytest.mark.parametrize("method", CASES)
def test_every_method(there, three, base, tmp_path, method, scale):
    options = QUICK.get(method, {}) | {"base": base, "scale": scale}
    cpu, gpu = (merge_checkpoints(three, tmp_path / one, method, device=one, **options) for one in ("cpu", "cuda"))
    for folder in FOLDERS.get(method, [""]):
        same(tensors_of(gpu / folder), tensors_of(cpu / folder), rtol=1e-5, atol=1e-6)
    assert json.loads((gpu / "osrm_peft.json").read_text())["device"].startswith(str(there))
    assert json.loads((cpu / "osrm_peft.json").read_text())["device"] == "cpu"


@pytest.mark.parametrize(
    "options", [{"combine": "ties", "max_iterations": 3}, {"rank_ratio": 0.2, "max_iterations": 3}]
)
def test_options_of_lore(there, three, tmp_path, options):
    cpu, gpu = (merge_checkpoints(three, tmp_path / one, "lore", device=one, **options) for one in ("cpu", "cuda"))
    same(tensors_of(gpu), tensors_of(cpu), rtol=1e-5, atol=1e-6)


def test_another_device_goes_on_with_an_interrupted_merge(there, three, base, tmp_path, monkeypatch):
    options = {"base": base, "shard_size": 2**20}
    real = merge.write_rest

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(merge, "write_rest", stop)
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(three, tmp_path / "out", "ties", device="cuda", **options)
    monkeypatch.setattr(merge, "write_rest", real)
    out = merge_checkpoints(three, tmp_path / "out", "ties", resume=True, **options)
    expected = merge_checkpoints(three, tmp_path / "whole", "ties", **options)
    same(tensors_of(out), tensors_of(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal step"), MemoryError()])
def test_a_fault_of_the_device_names_the_tensor_and_the_cpu(there, three, base, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(blocks.Blocks, "_merge", fail)
    message = (
        r"'.+' \(.+\) cannot be merged by lore \(.+\): take device='cpu', which has more memory, or an element-wise"
    )
    with pytest.raises(ValueError, match=message):
        merge_checkpoints(three, tmp_path / "out", "lore", base=base, device="cuda")
