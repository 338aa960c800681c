"""Features, init, training, save, reload and resume under each engine, in 2 real processes, against one process."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from osrm_peft import TaskFeatures
from osrm_peft.models.loading import load_base
from tests.multiprocess.conftest import ENGINES, launch, write_recipe
from tests.multiprocess.worker import CHECKPOINT

TASKS = ("questions", "tweets")
RUNS = {  # the classes that really ran: accelerate falls back in silence
    "single": "PeftModelForSequenceClassification AcceleratedOptimizer AdamW",
    "DDP": "PeftModelForSequenceClassification AcceleratedOptimizer AdamW",
    "FSDP2": "FSDPPeftModelForSequenceClassification AcceleratedOptimizer AdamW",
    "ZeRO-2": "PeftModelForSequenceClassification DeepSpeedOptimizerWrapper DeepSpeedZeroOptimizer",
    "ZeRO-3": "PeftModelForSequenceClassification DeepSpeedOptimizerWrapper DeepSpeedZeroOptimizer_Stage3",
}
LOCAL = {"FSDP2": [4, 384], "ZeRO-3": [0]}  # what one process has of an A of (8, 384)
FEATURES = 1e-6  # float32 sums of 5 samples in another order
# Adam divides a gradient by its own size, so entries whose gradient is mere rounding may go elsewhere, by the learning
# rate of 1e-3 at most: what all others do counts, their root mean square.
WEIGHTS = 2e-6

engines = pytest.mark.parametrize("engine", ENGINES)


def adapter(run, name):
    return load_file(run.folder / name / "adapter_model.safetensors")


def assert_near(found, expected, most):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name] - tensor).square().mean().sqrt() <= most, name


@engines
def test_features(engine, run_of):
    for task in TASKS:
        found, expected = (
            TaskFeatures.load(run_of(one).folder / f"features/{task}.features.safetensors")
            for one in (engine, "single")
        )
        assert (found.num_samples, found.weight_hash, found.same_input()) == (
            5,
            expected.weight_hash,
            expected.same_input(),
        )
        for name, moments in expected.layers.items():
            assert found.layers[name].count == moments.count
            S, T = found.layers[name].second_moment(), moments.second_moment()
            assert (S - T).norm() <= FEATURES * T.norm()
            assert (found.layers[name].mean() - moments.mean()).norm() <= FEATURES * moments.mean().norm()


@engines
def test_init(engine, run_of):
    run, single = run_of(engine), run_of("single").about["whole"][0]
    every = run.about["whole"]
    assert [one["world_size"] for one in every] == [len(every)] * (1 if engine == "single" else 2)
    for one in every:
        assert (one["step"], one["engine"], one["local"]) == (0, RUNS[engine], LOCAL.get(engine, [8, 384]))
        assert one["A"] == single["A"]  # to the bit
    for A in map(torch.tensor, single["A"].values()):
        torch.testing.assert_close(A @ A.mT, torch.eye(8), rtol=0, atol=1e-6)


@engines
def test_steps(engine, run_of):
    run = run_of(engine)
    assert_near(adapter(run, "whole"), adapter(run_of("single"), "whole"), WEIGHTS)
    logs = json.loads((run.folder / "whole/osrm_peft.json").read_text())["log"]
    drift = [entry["osrm/drift"] for entry in logs if "loss" in entry]
    assert drift[0] < 1e-6 < drift[1] < drift[-1] and all(entry["osrm/out_of_task_energy"] < 1 for entry in logs[:-1])


@engines
def test_save(engine, run_of):
    shapes = {tuple(tensor.shape) for tensor in adapter(run_of(engine), "whole").values()}
    assert shapes == {(8, 384), (384, 8), (6, 384), (6,)}
    assert json.loads((run_of(engine).folder / "whole/osrm_peft.json").read_text())["osrm"]["initialized"]


@engines
def test_reload(engine, run_of, model_folder):
    inputs = {"input_ids": torch.arange(12).view(2, 6) + 2000, "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    logits = {}
    for one in {engine, "single"}:
        with torch.no_grad():
            model = PeftModel.from_pretrained(load_base(model_folder, 6), run_of(one).folder / "whole").eval()
            logits[one] = model(**inputs).logits
            model.disable_adapter_layers()
            assert (model(**inputs).logits - logits[one]).abs().max() > 1e-4  # B has been trained, and was loaded
    torch.testing.assert_close(logits[engine], logits["single"], rtol=0, atol=1e-4)


@engines
def test_resume(engine, run_of):
    run = run_of(engine)
    assert {one["step"] for one in run.about["resumed"]} == {CHECKPOINT}
    for resumed, whole in zip(run.about["resumed"], run.about["whole"], strict=True):
        assert resumed["A"] != whole["A"]  # the checkpoint's A, not the initial one
    assert_near(adapter(run, "cut"), adapter(run, "whole"), WEIGHTS)


def test_an_engine_that_restores_another_a_is_found(run_of):
    for rank in range(2):
        said = (run_of("ZeRO-2").folder / f"late.{rank}.txt").read_text()
        assert "moved by 1" in said and "while B = 0, A has no gradient" in said and "accelerator.prepare" in said
        assert "a DeepSpeed optimizer has its own copy of the adapter's weights already" in said  # our own, too late


def test_zero3_without_its_init_flag_in_bfloat16_keeps_a_frozen_a(run_of, model_folder, tmp_path):
    single = run_of("single")
    write_recipe(tmp_path, model_folder, single.folder / "features", {"bf16": True}, {"freeze_a": True})
    flags = ["--zero3_init_flag", "false", "--mixed_precision", "bf16"]
    launch("cpu_zero3", "tests/multiprocess/worker.py", tmp_path, "whole", flags=flags)
    found = load_file(tmp_path / "whole/adapter_model.safetensors")
    for name, A in json.loads((tmp_path / "whole.1.json").read_text())["A"].items():
        expected = torch.tensor(single.about["whole"][0]["A"][name]).bfloat16()
        assert torch.equal(torch.tensor(A).bfloat16(), expected)
        assert torch.equal(found[f"base_model.model.{name}.lora_A.weight"], expected)
    assert any(tensor.float().abs().max() > 1e-3 for name, tensor in found.items() if "lora_B" in name)
