"""Adapters that stock PEFT made and saved."""

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from tests.helpers.models import make_base


def make_adapter(folder, *, seed=1, num_labels=3, base_seed=0, dtype=torch.float32, kind="bert", **config):
    """A stock PEFT adapter with random B and head, saved by PEFT; returns the live model."""
    base = make_base(num_labels, base_seed, kind)
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"} | config
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding" in name or "modules_to_save" in name:
                parameter.normal_(std=0.3)
    if dtype != torch.float32:
        model = model.to(dtype)
    model.eval().save_pretrained(folder)
    return model


def tensors_of(folder):
    return load_file(f"{folder}/adapter_model.safetensors")


VARIANTS = {
    "plain": {},
    "alpha_is_4r": {"lora_alpha": 16},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"value": 2}},
    "alpha_pattern": {"alpha_pattern": {"layer.1.attention.self.query": 3}},
    "one_layer": {"layers_to_transform": [1]},
    "bfloat16": {"dtype": torch.bfloat16},
    "embedding": {"target_modules": ["word_embeddings", "query"]},
    "conv1d": {"kind": "gpt2", "target_modules": ["c_attn"], "fan_in_fan_out": True},
    "conv2d": {
        "kind": "resnet",
        "target_modules": ["convolution"],
        "task_type": None,
        "modules_to_save": ["classifier"],
    },
}


def kind_of(variant):
    return VARIANTS[variant].get("kind", "bert")


def two_adapters(root, variant="plain"):
    """{task: folder} of two adapters, both with heads of 3 classes."""
    for seed in (1, 2):
        make_adapter(root / f"{variant}{seed}", seed=seed, **VARIANTS[variant])
    return {f"t{seed}": root / f"{variant}{seed}" for seed in (1, 2)}
