"""Full models, one tensor at a time: merged by the methods of adapters, made from adapters, and made into adapters."""

from osrm_peft.checkpoints.bake import bake_adapter
from osrm_peft.checkpoints.extract import Extraction, extract_adapter
from osrm_peft.checkpoints.merge import load_merged_checkpoint, merge_checkpoints

__all__ = ["Extraction", "bake_adapter", "extract_adapter", "load_merged_checkpoint", "merge_checkpoints"]
