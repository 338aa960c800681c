"""Modules that adapters trained whole: their names and tensors, and a whole model's weights."""

import copy

import torch
from safetensors.torch import load_file

from tests.zoo.adapters import WEIGHTS

LM_HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"
SAVES = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}
PREFIX = "base_model.model."


def tensors(folder):
    return {key.removeprefix(PREFIX): value for key, value in load_file(folder / WEIGHTS).items()}


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def weights(model):
    """All of a PeftModel's weights after stock PEFT's merge_and_unload."""
    return {name: one.clone() for name, one in copy.deepcopy(model).merge_and_unload().state_dict().items()}


def alike(found, expected):
    for name, value in expected.items():
        close(found[name], value, 2e-6)
