"""MergeRecipe: one merge as one YAML file."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from osrm_peft.checks import kind, number, shown
from osrm_peft.io.yaml import check_fields, fields_from_yaml, named
from osrm_peft.merging.plan import MergePlan, plan_merge

_FILES = ("adapters", "statistics", "features")


@dataclass(frozen=True)
class MergeRecipe:
    """The arguments of `merge_adapters`, as a YAML file has them.

    Attributes:
        adapters: {task: folder or Hub id}.
        method: the merge method.
        options: the method's own options.
        scale: a number, a list of numbers (a sweep from one merge), or `"features"`.
        weights, space, rank, heads, modules, base_model, statistics, features, seed: see `merge_adapters`.
    """

    adapters: dict[str, str] = field(default_factory=dict)
    method: str = "average"
    options: dict[str, Any] = field(default_factory=dict)
    weights: Any = None
    scale: Any = None
    space: str = "auto"
    rank: int | str | None = None
    heads: str = "per_task"
    modules: str | None = None
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
        fields = fields_from_yaml(path, cls, "merge recipe")
        with named(path):
            return cls(**fields)

    def __post_init__(self) -> None:
        for name, what in ({"options": "names to values"} | dict.fromkeys(_FILES, "tasks to files")).items():
            if not isinstance(getattr(self, name), Mapping | None):
                raise ValueError(f"{name}={shown(getattr(self, name))} in the merge recipe must map {what}")
        check_fields("the merge recipe", vars(self), MergeRecipe, _FILES)
        for name in _FILES:
            for task, file in (getattr(self, name) or {}).items():
                kind(f"{name} of {shown(task)}", file, str | PathLike, " in the merge recipe")

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
