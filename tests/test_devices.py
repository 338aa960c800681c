"""Names of devices: which are taken, which are refused before any work; and products that stay whole on a GPU."""

import threading

import pytest
import torch

from osrm_peft import MergedAdapter, devices, merge_adapters, merge_checkpoints
from osrm_peft.devices import CPU, chosen_device, computing, device_of, full_float32, in_threads
from osrm_peft.merging.request import MergeRequest
from tests.helpers.devices import CUDA, device_named
from tests.helpers.lora import lora

ADAPTERS = {"s": lora(1), "t": lora(2)}


@pytest.fixture
def gpus(monkeypatch):
    """A machine with so many GPUs, as far as torch says."""

    def have(count, current=0):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current)

    return have


def test_names_of_devices(gpus, monkeypatch):
    gpus(2, current=1)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert chosen_device(None) == CPU and chosen_device(None, torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert chosen_device("cpu") == chosen_device("cpu:0") == chosen_device(torch.device("cpu")) == CPU
    assert chosen_device("cuda:0") == torch.device("cuda", 0)
    assert chosen_device("cuda") == torch.device("cuda", 1)  # the one in use
    monkeypatch.setenv("LOCAL_RANK", "2")  # each process of a launch has its own
    assert chosen_device("cuda") == torch.device("cuda", 0)


@pytest.mark.parametrize("value", ["mps", "meta", "xpu", "gpu", "CUDA", "cuda:x", "", 0, True, 1.5, ["cuda"]])
def test_other_names_are_refused(value):
    with pytest.raises(ValueError, match=r"device=.+ must be 'cpu', 'cuda' or the name of one GPU, such as 'cuda:1'"):
        chosen_device(value)


@pytest.mark.parametrize(("count", "has"), [(0, "has no GPU that torch can use"), (1, "has 1 GPU")])
def test_a_gpu_that_is_not_there_is_one_error_with_the_way_out(gpus, count, has):
    gpus(count)
    with pytest.raises(ValueError, match=f"device='cuda:1' and this machine {has}: give device='cpu', or leave it out"):
        chosen_device("cuda:1")


def test_devices_are_checked_before_anything_is_read(gpus, tmp_path):
    gpus(0)
    missing, message = tmp_path / "missing", "device='cuda' and this machine has no GPU"
    with pytest.raises(ValueError, match=message):
        merge_adapters({"s": missing}, "average", device="cuda")
    with pytest.raises(ValueError, match=message):
        merge_checkpoints({"s": missing, "t": missing}, tmp_path / "out", device="cuda")
    assert not list(tmp_path.iterdir())


def test_the_commands_say_it_too(gpus, call, tmp_path):
    gpus(0)
    said = call("merge", f"s={tmp_path}", "--device", "cuda", code=2)
    assert "--device cuda and this machine has no GPU that torch can use: give --device cpu, or leave it out" in said
    said = call(
        "merge-checkpoints", f"s={tmp_path}", f"t={tmp_path}", "--out", tmp_path / "out", "--device", "mps", code=2
    )
    assert "--device mps must be" in said


def test_a_merge_recipe_names_the_device(tmp_path):
    recipe = tmp_path / "merge.yaml"
    recipe.write_text("adapters: {s: a, t: b}\nmethod: ties\ndevice: cpu\n")
    assert MergeRequest.from_yaml(recipe).device == "cpu"
    assert MergeRequest.from_yaml(recipe, device="cuda").device == "cuda"


def test_the_manifest_names_the_device(monkeypatch):
    for device in (None, "cpu"):
        merged = merge_adapters(ADAPTERS, "average", device=device)
        assert isinstance(merged, MergedAdapter) and merged.manifest["device"] == "cpu"
    with device_named("imagined", monkeypatch) as device:
        assert merge_adapters(ADAPTERS, "average", device="cuda").manifest["device"] == str(device)


def test_what_is_on_no_gpu_counts_as_on_the_cpu():
    assert device_of(torch.zeros(1)) == CPU == device_of(torch.zeros(1, device="meta"))


def test_too_little_memory_is_an_error_that_names_the_way_out():
    with (
        pytest.raises(ValueError, match=r"cpu has too little memory \(out of it\): device='cpu' has more"),
        computing(CPU),
    ):
        raise torch.OutOfMemoryError("out of it. Tried to allocate 20.00 GiB.\nGPU 0 has …")


@pytest.fixture
def tf32():
    """Programs that allow TF32, in each of torch's words for it."""
    yield torch.backends.cuda.matmul
    torch.backends.cuda.matmul.allow_tf32 = False
    if hasattr(torch.backends, "fp32_precision"):
        torch.backends.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"


def allow_by_flag(matmul):
    matmul.allow_tf32 = True
    return lambda: matmul.allow_tf32


def allow_by_precision(matmul):
    torch.set_float32_matmul_precision("high")
    return torch.get_float32_matmul_precision


def allow_by_backend(matmul):
    matmul.fp32_precision = "tf32"
    return lambda: matmul.fp32_precision


ALLOWED = [allow_by_flag, allow_by_precision, allow_by_backend]


def test_we_allow_no_tf32():
    merge_adapters(ADAPTERS, "average")
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("allow", ALLOWED)
def test_products_on_a_gpu_are_whole_where_the_program_allows_tf32(tf32, allow):
    if allow is allow_by_backend and not hasattr(tf32, "fp32_precision"):
        pytest.skip("words of torch 2.9")
    setting = allow(tf32)
    before = setting()
    with full_float32(torch.device("cuda")):
        assert getattr(tf32, "fp32_precision", "ieee") == "ieee"
    assert setting() == before
    with full_float32(CPU):
        assert getattr(tf32, "fp32_precision", "tf32") == "tf32"  # nothing is changed


@pytest.mark.parametrize("allow", ALLOWED)
@pytest.mark.parametrize("marked", [pytest.param(None, marks=CUDA)])
def test_so_they_are_as_exact_as_the_cpus(tf32, allow, marked):
    X = torch.randn(512, 512)
    exact = X.double() @ X.double()
    setting = allow(tf32)
    before = setting()
    with computing(torch.device("cuda")):
        found = X.cuda() @ X.cuda()
    coarse = X.cuda() @ X.cuda()
    assert setting() == before
    assert float((found.cpu() - exact).norm() / exact.norm()) < 1e-6
    assert float((coarse.cpu() - exact).norm() / exact.norm()) > 1e-5  # the program's own products are as it wants them


@pytest.mark.parametrize("there", ["imagined", pytest.param("cuda", marks=CUDA)])
def test_operands_on_two_devices_are_found(there, monkeypatch):
    """That the tests which run on the imagined device would fail like those on a GPU."""
    with device_named(there, monkeypatch) as device:
        x = torch.randn(3, 4).to(device)
        assert x.device == device and (x + 1).sum().device == device and float((x - x).norm()) == 0
        with pytest.raises(RuntimeError):
            x + torch.ones(3, 4)
        with pytest.raises((RuntimeError, TypeError)):
            x.numpy()
    assert torch.zeros(1).device == devices.CPU


@pytest.fixture
def two_threads(threads):
    threads(2)


def test_threads_take_an_item_each_in_order_and_have_one_thread(two_threads):
    def work(item):
        started.wait(10)  # both must be there
        assert not torch.is_grad_enabled()
        return item, torch.get_num_threads(), threading.get_ident()

    started = threading.Barrier(2)
    found = list(in_threads(work, range(6)))
    assert [item for item, *_ in found] == list(range(6)) and {threads for _, threads, _ in found} == {1}
    assert len({ident for *_, ident in found}) == 2 and torch.get_num_threads() == 2
    assert list(in_threads(str, [1])) == ["1"]


def test_an_error_in_a_thread_is_the_caller_s_and_the_threads_come_back(two_threads):
    def work(item):
        if item == 1:
            raise ValueError("the second")
        return item

    with pytest.raises(ValueError, match="the second"):
        list(in_threads(work, range(8)))
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("method", ["average", "ties", "tsv", "iso", "lore", "concat", "dare"])
def test_layers_merged_in_two_threads_are_those_of_one(method, threads):
    threads(2)
    found = merge_adapters(ADAPTERS | {"u": lora(3)}, method, rank=2)
    threads(1)
    alone = merge_adapters(ADAPTERS | {"u": lora(3)}, method, rank=2)
    assert list(found.layers) == list(alone.layers) and len(found.layers) > 1
    for name, layer in alone.layers.items():
        torch.testing.assert_close(found.layers[name].direction.factors.delta(), layer.direction.factors.delta())
