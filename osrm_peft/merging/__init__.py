"""Merging LoRA adapters: a method × a space × an output. Importing this registers the methods."""

from osrm_peft.merging import (  # noqa: F401 (registration)
    average,
    concat,
    dare,
    emr,
    fisher,
    iso,
    lore,
    regmean,
    task_arithmetic,
    ties,
    tsv,
)
from osrm_peft.merging.masked import MaskedAdapter
from osrm_peft.merging.merge import merge_adapters
from osrm_peft.merging.merged import MergedAdapter
from osrm_peft.merging.registry import METHODS, Merged, register

__all__ = ["METHODS", "MaskedAdapter", "Merged", "MergedAdapter", "merge_adapters", "register"]
