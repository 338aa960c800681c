"""Random streams: each is named by a seed and by what it is for, so no order of work changes a draw."""

import hashlib

import torch


def task_generator(seed: int, task: str, layer: str) -> torch.Generator:
    """The stream of one task's draws at one layer: DARE's mask, A's free choice."""
    return torch.Generator().manual_seed(int.from_bytes(_digest(f"{seed}\0{task}\0{layer}")[:8], "big") >> 1)


def task_seed(seed: int, task: str) -> int:
    """A seed of 32 bits for one task's weights: tasks trained with one seed share no A and no head by accident."""
    return int.from_bytes(_digest(f"{seed}\0{task}")[:4], "big")


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
