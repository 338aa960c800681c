"""Merging full checkpoints: the same methods as for adapters, one tensor at a time."""

from osrm_peft.checkpoints.merge import load_merged_checkpoint, merge_checkpoints

__all__ = ["load_merged_checkpoint", "merge_checkpoints"]
