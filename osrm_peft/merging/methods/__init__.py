"""Merge methods, one a file: plain functions of one layer's task vectors. Importing this registers them."""

from osrm_peft.merging.methods import (  # noqa: F401 (registration)
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
from osrm_peft.merging.methods.registry import METHODS, Merged, register

__all__ = ["METHODS", "Merged", "register"]
