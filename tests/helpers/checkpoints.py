"""Checkpoints of tiny models, written, edited and compared."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.helpers.models import make_base

# name: options under which one model of weight 1 is returned as it is (nothing trimmed, nothing dropped)
CASES = {
    "average": {},
    "dare": {"drop_rate": 0.0},
    "dare_ties": {"drop_rate": 0.0, "density": 1.0},
    "emr": {},
    "iso": {},
    "lore": {},
    "task_arithmetic": {},
    "ties": {"density": 1.0},
    "tsv": {},
}
QUICK = {"lore": {"max_iterations": 4}}  # enough to compare


def write(folder, tensors, config=None):
    """A model's folder of these tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"} | (config or {})))
    return folder


def rewrite(folder, **changed):
    """The model's folder with some tensors changed or added."""
    file = folder / "model.safetensors"
    save_file(load_file(file) | changed, file, {"format": "pt"})
    return folder


def noisy(folder, seed, *, num_labels=3, size=0.02, dtype=None, **overrides):
    """A tiny BERT, some way from that of seed 0."""
    model = make_base(num_labels, **overrides)
    if seed:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += size * torch.randn(parameter.shape, generator=generator)
    model.to(dtype or torch.float32).save_pretrained(folder)
    return folder


def tensors_of(folder):
    """{name: tensor} of all weight files in a folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def hashes(*folders):
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in folders
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def same(found, expected, rtol=0.0, atol=0.0):
    assert set(found) == set(expected)
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


LLAMA = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def edit(folder, **fields):
    """Fields of config.json set, or removed where the value is None."""
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
