"""Adapters whose experts are layers of their own, as transformers had them before it fused them: PEFT converts them."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from osrm_peft import load_adapter, merge_adapters
from tests.zoo.adapters import WEIGHTS, adapted, edit, stock, write
from tests.zoo.models import noisy, outputs

EXPERTS = {
    "mixtral": ("block_sparse_moe", {"w1": (24, 16), "w3": (24, 16), "w2": (16, 24)}),
    "qwen3_moe": ("mlp", {"gate_proj": (8, 16), "up_proj": (8, 16), "down_proj": (16, 8)}),
}


def written(name, seed, folder):
    """A folder in the layout of transformers 4: one pair for each expert's projection."""
    place, shapes = EXPERTS[name]
    write(adapted(name, seed, target_modules=["q_proj"]), folder)
    tensors, generator = load_file(folder / WEIGHTS), torch.Generator().manual_seed(seed)
    for layer in range(2):
        for expert in range(2):
            for projection, (o, n) in shapes.items():
                key = f"base_model.model.model.layers.{layer}.{place}.experts.{expert}.{projection}"
                tensors[f"{key}.lora_A.weight"] = 0.3 * torch.randn(3, n, generator=generator)
                tensors[f"{key}.lora_B.weight"] = 0.3 * torch.randn(o, 3, generator=generator)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    edit(folder, target_modules=["q_proj", *shapes])
    return folder


def baked(name, folder):
    return stock(name, folder).merge_and_unload().state_dict()


@torch.no_grad()
@pytest.mark.parametrize("name", EXPERTS)
def test_they_are_read_merged_attached_and_written_as_peft_converts_them(name, tmp_path):
    a, b = (written(name, seed, tmp_path / f"t{seed}") for seed in (1, 2))
    expected = outputs(stock(name, a))
    assert not torch.allclose(expected, outputs(noisy(name, 0)), atol=1e-2)
    adapter = load_adapter(a)
    assert len(adapter.factors) == 14
    torch.testing.assert_close(outputs(adapter.attach(noisy(name, 0))), expected, rtol=1e-4, atol=1e-5)
    merge_adapters({"x": a, "y": a}, "average").save_pretrained(tmp_path / "same")
    torch.testing.assert_close(outputs(stock(name, tmp_path / "same")), expected, rtol=1e-4, atol=1e-5)
    merge_adapters({"a": a, "b": b}, "task_arithmetic", scale=1).save_pretrained(tmp_path / "sum")
    base, one, other, both = noisy(name, 0).state_dict(), *(baked(name, x) for x in (a, b, tmp_path / "sum"))
    for key, value in both.items():
        torch.testing.assert_close(value, one[key] + other[key] - base[key], rtol=1e-4, atol=1e-5)
