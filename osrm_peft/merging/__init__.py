"""Merging LoRA adapters: a method × a space × an output. Importing this registers the methods."""

from osrm_peft.merging import average, lore, task_arithmetic, ties  # noqa: F401 (registration)
from osrm_peft.merging.merge import merge_adapters
from osrm_peft.merging.merged import MergedAdapter
from osrm_peft.merging.registry import METHODS, Merged, register

__all__ = ["METHODS", "Merged", "MergedAdapter", "merge_adapters", "register"]
