"""The benchmark of a GPU runs on a CPU at sizes of a few seconds: its program is tried, not its numbers."""

import json
import sys

import gpu
import pytest
import torch

PARTS = ["features", "quantised", "choose", "lore", "adapters"]  # weights takes full matrices, and half a minute


@pytest.mark.parametrize("part", PARTS)
def test_every_part_prints_a_table(part, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--small", "--only", part, "--out", str(tmp_path / "gpu.json")])
    gpu.main()
    heading, *lines = capsys.readouterr().out.strip().splitlines()
    assert f"torch {torch.__version__}" in heading
    table = [line for line in lines if line.startswith("| ")]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert set(found) == {"card", "torch", "small", part} and found["small"] is True
    assert len(table) == 2 + len(found[part]) and len({line.count("|") for line in table}) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.main()
