"""`osrm-peft env`: what an issue needs to know of a machine, and nothing that names its user."""

import getpass
import socket
from pathlib import Path

import torch
import transformers

import osrm_peft


def test_env_prints_versions_and_machine_and_no_name_or_path(call):
    printed = call("env")
    for fact in (
        f"- osrm_peft: {osrm_peft.__version__}",
        f"- torch: {torch.__version__}",
        f"- transformers: {transformers.__version__}",
        "- bitsandbytes: ",
        "- system: ",
        "- CPUs: ",
        "- GPUs: ",
    ):
        assert fact in printed, fact
    assert str(Path.home()) not in printed and f" {socket.gethostname()} " not in printed
    assert getpass.getuser() not in printed.split()
