"""Checkpoints of tiny models, written, edited and compared."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from osrm_peft.merging.methods.registry import METHODS, Merged, taken
from osrm_peft.seeding import task_generator
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
WEIGHTS = {"a": 1.0, "b": -0.5, "c": 2.0}


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


def as_matrix(tensor):
    return tensor.float().reshape(tensor.shape[0] if tensor.dim() > 1 else 1, -1)


def by_hand(models, base, method, *, weights=None, scale=None, seed=0, **options):
    """{name: tensor} of the registered method applied to the stack of each whole tensor."""
    described = METHODS[method]
    options = described.bind(options)
    scale = described.scale if scale is None else scale
    states = {task: tensors_of(folder) for task, folder in models.items()}
    under = tensors_of(base) if base else {name: torch.zeros_like(x) for name, x in next(iter(states.values())).items()}
    weights = torch.tensor([(weights or dict.fromkeys(models, 1.0))[task] for task in models])
    stacks = {}
    for name in under:
        stack = torch.stack([as_matrix(state[name]) - as_matrix(under[name]) for state in states.values()])
        if described.prepare:
            generators = [task_generator(seed, task, name) for task in models]
            stack = described.prepare(stack, generators, **taken(described.prepare, options))
        stacks[name] = stack
    given = taken(described.fn, options)
    if described.summarise:
        given["summary"] = described.summarise(list(stacks.values()), **taken(described.summarise, options))
    results = {}
    for name, stack in stacks.items():
        if described.spectral and under[name].dim() != 2:
            found = METHODS["average"].fn(stack, weights) * (1 if method == "lore" else scale)
        else:
            out = described.fn(stack, weights, **given)
            out = out if isinstance(out, Merged) else Merged(out)
            found = scale * (out.finish(out.direction) if out.finish else out.direction)
            found = found if out.offset is None else found + out.offset
        results[name] = (as_matrix(under[name]) + found).view(under[name].shape)
    return results
