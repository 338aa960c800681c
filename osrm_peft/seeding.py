"""Random streams: each is named by a seed and by what it is for, so no order of work changes a draw."""

import hashlib

import torch


def layer_generator(seed: int, layer: str) -> torch.Generator:
    """The stream of one layer's choice of A."""
    return torch.Generator().manual_seed(int.from_bytes(_digest(f"{seed}/{layer}")[:7], "big"))


def task_generator(seed: int, task: str, layer: str) -> torch.Generator:
    """The stream of one task's draws at one layer (DARE)."""
    return torch.Generator().manual_seed(int.from_bytes(_digest(f"{seed}\0{task}\0{layer}")[:8], "big") >> 1)


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
