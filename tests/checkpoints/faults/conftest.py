"""The models that the tests of faults merge, and their uninterrupted merges."""

import pytest
import torch

from osrm_peft import merge_checkpoints
from tests.helpers.checkpoints import noisy, write
from tests.helpers.faults import arguments

SIZES = {"vocab_size": 4000, "hidden_size": 64, "intermediate_size": 1024}  # three weight files of 1 MiB


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    return {name: noisy(root / name, seed, **SIZES) for seed, name in enumerate(("base", "a", "b"))}


@pytest.fixture
def small(tmp_path):
    """Two models and a base of a matrix and a vector."""
    folders = {}
    for name in ("base", "a", "b"):
        folders[name] = write(tmp_path / "small" / name, {"matrix": torch.randn(4, 6), "vector": torch.randn(5)})
    return folders


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    """Uninterrupted merges."""
    root = tmp_path_factory.mktemp("whole")
    return {
        method: merge_checkpoints(out=root / method, **arguments(trained, method)) for method in ("ties", "emr", "dare")
    }
