"""Merging LoRA adapters: a method × a space × an output."""

from osrm_peft.merging.emr_adapter import EMRAdapter
from osrm_peft.merging.merge import merge_adapters
from osrm_peft.merging.merged_adapter import MergedAdapter
from osrm_peft.merging.methods import METHODS, Merged, register

__all__ = ["METHODS", "EMRAdapter", "Merged", "MergedAdapter", "merge_adapters", "register"]
