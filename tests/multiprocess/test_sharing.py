"""Features, merges and predictions that two processes share are those of one; what cannot be shared is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

from osrm_peft import load_adapter, merge_adapters
from osrm_peft.distributed import ALONE
from osrm_peft.io.manifest import read_manifest
from tests.helpers.adapters import make_adapter
from tests.multiprocess.conftest import launch
from tests.multiprocess.sharing import TASKS, features, logits, merges


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for seed, task in enumerate(TASKS, start=1):
        make_adapter(folder / f"adapter_{task}", seed=seed)
        make_adapter(folder / f"one_{task}", seed=seed, target_modules=r".*layer\.0\.attention\.self\.query")
    return folder


@pytest.fixture
def one_thread(threads):
    threads(1)


@pytest.fixture(scope="module")
def shared(adapters, tmp_path_factory):
    """[(tensors, what was said)] of each process."""
    out = tmp_path_factory.mktemp("shared")
    launch("cpu_ddp", "tests/multiprocess/sharing.py", adapters, out)
    return [(load_file(out / f"{rank}.safetensors"), json.loads((out / f"{rank}.json").read_text())) for rank in (0, 1)]


def test_two_processes_really_ran_and_have_the_same_to_the_bit(shared):
    (first, about), (second, _) = shared
    assert about["count"] == 2 and set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_features_are_those_of_one_process(shared):
    expected, found = features(False), shared[0][0]
    for name, tensor in expected.items():
        if name.endswith((" k", " N")):
            assert torch.equal(found[name], tensor), name
        else:  # float32 sums in another order
            assert (found[name] - tensor).norm() <= 1e-6 * tensor.norm(), name
    assert {int(expected[f"{case} token k"]) for case in ("uneven", "no sample for one", "cut")} == {9, 3, 6}


def test_merges_are_those_of_one_process_to_the_bit(shared, adapters, one_thread):
    """With as many threads as each of the two has: another number of them adds in another order."""
    expected, found = merges(adapters, False), shared[0][0]
    assert len(expected) > 100
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_predictions_are_those_of_one_process_in_the_order_of_the_rows(shared):
    for name, tensor in logits(ALONE).items():
        torch.testing.assert_close(shared[0][0][name], tensor, rtol=1e-4, atol=1e-4)  # other rows, other padding
    assert (shared[0][0]["logits"][:, 0].sort().values.diff() > 1e-3).any()  # the order can be told


SAID = {
    "shuffled": "ValueError: several processes share the samples of one loader, which must be the same everywhere",
    "sampler": "ValueError: the loader of task 't' is split over the processes already",
    "prepared": "ValueError: the loader of task 't' is split over the processes already",
    "fewer": "ValueError: the processes' loaders of task 't' gave [4, 8] samples, or other ones",
    "others": "ValueError: the processes' loaders of task 't' gave [48, 48] samples, or other ones",
    "one layer": "ZeroDivisionError: float division by zero",
    "empty": "ValueError: the loader of task 't' gave no sample",
    "main": "FileNotFoundError: no file on the main process",
    "unsendable": "RuntimeError: Local: cannot be pickled",
}


@pytest.mark.parametrize("case", SAID)
def test_every_process_says_what_is_wrong(case, shared):
    for _, said in shared:
        assert said[case].startswith(SAID[case])


def test_the_merge_command_in_two_processes_writes_a_sweep_once(adapters, tmp_path):
    folders = [str(adapters / f"adapter_{task}") for task in TASKS]
    arguments = ["-m", "osrm_peft", "merge", *folders, "--method", "ties", "--scale", "0.5", "--scale", "1"]
    printed = launch("cpu_ddp", *arguments, "--out", tmp_path / "two")
    assert printed.count("wrote ") == 2  # one writer
    expected = merge_adapters(dict(zip(TASKS, folders, strict=True)), "ties", scale=1.0).deltas()
    for scale in (0.5, 1.0):
        folder = tmp_path / f"two/scale_{scale!r}"
        assert read_manifest(folder)["scale"] == scale
        for name, factors in load_adapter(folder).factors.items():
            torch.testing.assert_close(factors.delta().double(), scale * expected[name], rtol=1e-5, atol=1e-6)
