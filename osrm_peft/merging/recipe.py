"""MergeRecipe: one merge as one YAML file."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from osrm_peft.checks import number
from osrm_peft.merging.plan import MergePlan, plan_merge
from osrm_peft.yaml_io import fields_from_yaml


@dataclass(frozen=True)
class MergeRecipe:
    """The arguments of `merge_adapters`, as a YAML file has them.

    Attributes:
        adapters: {task: folder or Hub id}.
        method: the merge method.
        options: the method's own options.
        scale: a number, a list of numbers (a sweep from one merge), or `"features"`.
        weights, space, rank, heads, base_model, statistics, features, seed: see `merge_adapters`.
    """

    adapters: dict[str, str] = field(default_factory=dict)
    method: str = "average"
    options: dict[str, Any] = field(default_factory=dict)
    weights: Any = None
    scale: Any = None
    space: str = "auto"
    rank: int | str | None = None
    heads: str = "per_task"
    base_model: str | None = None
    statistics: dict[str, str] | None = None
    features: dict[str, str] | None = None
    seed: int = 0

    @classmethod
    def from_yaml(cls, path: str | Path) -> "MergeRecipe":
        """Read a recipe.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a mapping, or an unknown key; lists the keys.
        """
        return cls(**fields_from_yaml(path, cls, "merge recipe"))

    def __post_init__(self) -> None:
        if not isinstance(self.options, Mapping):
            raise ValueError(f"options={self.options!r} in the merge recipe must map names to values")
        for name in ("statistics", "features"):
            if not isinstance(getattr(self, name), Mapping | None):
                raise ValueError(f"{name}={getattr(self, name)!r} in the merge recipe must map tasks to files")

    def scales(self) -> list[Any]:
        """The scales to write: one, or those of a sweep."""
        if not isinstance(self.scale, (list, tuple)):
            return [self.scale]
        scales = [number("scale", scale) for scale in self.scale]
        if not scales or len(set(scales)) < len(scales):
            raise ValueError(f"scale={self.scale!r}: a sweep needs different numbers")
        return scales

    def plan(self) -> MergePlan:
        """All checks of the merge, at the first of the scales."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        clash = sorted(set(self.options) & set(given))
        if clash:
            raise ValueError(f"{', '.join(clash)} in the merge recipe's options: write it beside them, not among them")
        adapters, method, options = given.pop("adapters"), given.pop("method"), given.pop("options")
        return plan_merge(adapters, method, **(given | {"scale": self.scales()[0]}), **options)
