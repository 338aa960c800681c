"""MergeRequest: the arguments of a merge in one object, for Python, YAML files and the command line."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

from osrm_peft.checks import kind, number, shown
from osrm_peft.io.yaml import check_fields, fields_from_yaml, named
from osrm_peft.merging.inputs import Adapters, HeadPolicy
from osrm_peft.merging.rules import WORDS, LeastSquares
from osrm_peft.merging.spaces import Space
from osrm_peft.merging.statistics import Statistics
from osrm_peft.merging.weights import Weights

_FILES = ("adapters", "statistics", "features")
_RULES = ("weights", "scale", "cut")


@dataclass(frozen=True)
class MergeRequest:
    """What to merge, and how: `merge_adapters` says what each field means.

    Attributes:
        scale: as there; or a list of numbers, a sweep from one merge, see `scales`.
        options: the method's own.
    """

    adapters: Adapters = field(default_factory=dict)
    method: str = "average"
    options: dict[str, Any] = field(default_factory=dict)
    weights: Weights | LeastSquares = None
    scale: float | LeastSquares | Sequence[float] | None = None
    space: Space = "auto"
    rank: int | str | None = None
    cut: LeastSquares | None = None
    heads: HeadPolicy = "per_task"
    modules: str | None = None
    base_model: str | None = None
    statistics: Statistics | None = None
    seed: int = 0
    device: str | None = None

    @classmethod
    def from_yaml(cls, path: str | Path, **changes: Any) -> "MergeRequest":
        """Read a merge recipe: these fields, and `features` beside a `weights`, `scale` or `cut` of `features`.

        Args:
            **changes: fields that go before those of the file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a mapping, an unknown key (lists the keys), or a value of another kind.
        """
        read = fields_from_yaml(path, _Recipe, "merge recipe")
        with named(path):
            _check(read)
            read |= {name: _placed(read[name], Path(path).parent) for name in _FILES if read.get(name)}
            options = {**(read.get("options") or {}), **(changes.get("options") or {})}
            return cls.from_fields(**(read | changes | {"options": options}))

    @classmethod
    def from_fields(cls, **given: Any) -> "MergeRequest":
        """A request from the fields of a merge recipe.

        Raises:
            ValueError: see `from_yaml`; or features that no rule uses, or a rule without features.
        """
        _check(given)
        features = given.pop("features", None)
        words = [name for name in _RULES if isinstance(given.get(name), str) and given[name] in WORDS]
        if features is not None and not words:
            raise ValueError(
                "features are for weights='features', scale='features' and cut='features': give one of them, or no "
                "features"
            )
        for name in words:
            given[name] = LeastSquares(features or {}, shared=given[name] == "features_global")
        clash = sorted(set(given.get("options") or {}) & {one.name for one in fields(_Recipe)})
        if clash:
            raise ValueError(f"{', '.join(clash)} in the merge recipe's options: write it beside them, not among them")
        return cls(**given)

    def scales(self) -> list[Any]:
        """The scales to write: one, or those of a sweep."""
        if not isinstance(self.scale, (list, tuple)):
            return [self.scale]
        scales = [number("scale", scale) for scale in self.scale]
        if not scales or len(set(scales)) < len(scales):
            raise ValueError(f"scale={self.scale!r}: a sweep needs different numbers")
        return scales

    def at_first_scale(self) -> "MergeRequest":
        """The request of one merge, from which all scales are written."""
        return replace(self, scale=self.scales()[0])


@dataclass(frozen=True)
class _Recipe(MergeRequest):
    """The keys of a merge recipe."""

    features: dict[str, str] | None = None


def _placed(files: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Files and folders that lie where a recipe names them, relative to it; other names as they are (of the Hub)."""
    return {task: os.path.normpath(folder / file) if (folder / file).exists() else file for task, file in files.items()}


def _check(given: Mapping[str, Any]) -> None:
    for name, what in ({"options": "names to values"} | dict.fromkeys(_FILES, "tasks to files")).items():
        if not isinstance(given.get(name), Mapping | None):
            raise ValueError(f"{name}={shown(given[name])} in the merge recipe must map {what}")
    check_fields("the merge recipe", given, _Recipe, (*_FILES, *_RULES, "space", "rank", "heads"))
    for name in _FILES:
        for task, file in (given.get(name) or {}).items():
            kind(f"{name} of {shown(task)}", file, str | PathLike, " in the merge recipe")
