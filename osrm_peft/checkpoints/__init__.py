"""Full models: merged by the methods of adapters, and adapters baked into them, one tensor at a time."""

from osrm_peft.checkpoints.bake import bake_adapter
from osrm_peft.checkpoints.merge import load_merged_checkpoint, merge_checkpoints

__all__ = ["bake_adapter", "load_merged_checkpoint", "merge_checkpoints"]
