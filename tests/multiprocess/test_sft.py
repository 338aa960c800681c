"""recipes/train_sft.py in two real processes, against one process with batches of twice the size."""

import json

import pytest
from safetensors.torch import load_file

from tests.helpers.causal import save_tiny
from tests.multiprocess.conftest import launch
from tests.tasks.test_text import ROWS, write


def trained(folder, config, batch):
    training = {"max_steps": 4, "per_device_train_batch_size": batch, "logging_steps": 1, "use_cpu": True}
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    recipe = {"model": "model", "suite": "files:data", "lora": lora, "training": training, "max_length": 16}
    (folder / f"{config}.yaml").write_text(json.dumps(recipe))
    launch(config, "recipes/train_sft.py", "--config", folder / f"{config}.yaml", "--task", "films", "--out",
           folder / config)  # fmt: skip
    log = json.loads((folder / config / "films/osrm_peft.json").read_text())["log"]
    return load_file(folder / config / "films/adapter_model.safetensors"), [one["loss"] for one in log if "loss" in one]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    save_tiny(folder / "model")
    write(folder / "data", ROWS * 4)
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    return trained(folder, "single", 8)


@pytest.mark.parametrize("config", ["cpu_fsdp2", "cpu_zero3"])
def test_two_processes_train_what_one_does(config, folder, alone):
    weights, losses = trained(folder, config, 4)
    assert losses == pytest.approx(alone[1], rel=1e-5)
    for name, expected in alone[0].items():
        moved = expected.square().mean().sqrt()
        assert (weights[name] - expected).square().mean().sqrt() <= 1e-5 * moved, name
