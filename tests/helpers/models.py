"""Tiny models made in memory, and batches for them."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

TINY = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}


def make_base(num_labels=3, seed=0, kind="bert", **overrides):
    """A tiny model: `"bert"` (Linear), `"gpt2"` (Conv1D) or `"resnet"` (Conv2d)."""
    torch.manual_seed(seed)
    common = {"num_labels": num_labels, "name_or_path": "tiny"}
    if kind == "gpt2":
        sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "pad_token_id": 0}
        return GPT2ForSequenceClassification(GPT2Config(**sizes, **common)).eval()
    if kind == "resnet":
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
        return ResNetForImageClassification(ResNetConfig(**sizes, **common)).eval()
    return BertForSequenceClassification(BertConfig(**(TINY | overrides), **common)).eval()


def make_batch(rows=4, length=7, seed=0, pads=(0, 2, 3, 1), kind="bert"):
    generator = torch.Generator().manual_seed(seed)
    if kind == "resnet":
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}
    ids = torch.randint(0, 50, (rows, length), generator=generator)
    mask = torch.ones(rows, length, dtype=torch.long)
    for row, pad in zip(range(rows), pads, strict=False):
        if pad:
            mask[row, -pad:] = 0
    return {"input_ids": ids, "attention_mask": mask}


IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
TEXT = IDS | {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 40}
TEXT |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
GPT2 = IDS | {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40}
T5 = IDS | {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
TWO = IDS | {"vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
