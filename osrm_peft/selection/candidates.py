"""Candidates: merges to choose among, as fields of a merge recipe with a scale each."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

from osrm_peft.checks import choice, integer, number, shown
from osrm_peft.io.yaml import named, parse_yaml
from osrm_peft.merging.inputs import HeadPolicy
from osrm_peft.merging.methods.registry import METHODS, get_method
from osrm_peft.merging.request import MergeRequest
from osrm_peft.merging.rules import LeastSquares

_FILES = ("adapters", "features", "statistics", "base_model")
_STATISTICS = ("gram", "fisher")

# What is tried when nothing is named: the best of our tables first, each over the scales where its best was found.
DEFAULT: tuple[dict[str, Any], ...] = (
    {"method": "tsv", "scale": [0.5, 0.75, 1.0, 1.25, 1.5]},
    {"method": "task_arithmetic", "scale": [0.2, 0.3, 0.4, 0.6]},
    {"method": "ties", "scale": [0.5, 1.0, 1.5]},
    {"method": "ties", "space": "knots", "scale": [0.5, 1.0, 1.5]},
    {"method": "iso", "scale": [1.0, 1.5]},
    {"method": "lore", "scale": [0.3, 0.6]},
    {"method": "task_arithmetic", "weights": "features"},
    {"method": "regmean"},
    {"method": "average"},
    {"method": "emr"},
)


@dataclass(frozen=True)
class Candidate:
    """One merge at one scale.

    Attributes:
        fields: of a merge recipe, without files and without a numeric scale.
        scale: λ; None where a rule chooses it.
    """

    fields: dict[str, Any]
    scale: float | None

    @property
    def name(self) -> str:
        """The method, and what differs from its defaults: `"ties in knots, density 0.3, λ 1"`."""
        about = self.fields["method"]
        if self.fields.get("space", "auto") != "auto":
            about += f" in {self.fields['space']}"
        parts = [f"{name} {value}" for name, value in self.fields.get("options", {}).items()]
        parts += [f"{name} {value}" for name, value in self.fields.items() if name in ("rank", "modules", "seed")]
        if "weights" in self.fields:
            weights = self.fields["weights"]
            parts.append("weights by features" if isinstance(weights, str) else f"weights {shown(weights)}")
        parts += ["cut by features"] * ("cut" in self.fields)
        parts.append("λ by features" if self.scale is None else f"λ {self.scale:g}")
        return ", ".join([about, *parts])

    @property
    def merge(self) -> str:
        """What candidates that differ in their scale alone have in common: they share one merge."""
        return json.dumps(self.fields, sort_keys=True, default=str)

    @property
    def per_task(self) -> bool:
        """Whether the result differs by task, so that it is ranked apart."""
        return METHODS[self.fields["method"]].per_task

    def of_rank(self, rank: Any) -> "Candidate":
        """The same candidate with this rank, unless it names one."""
        return replace(self, fields={"rank": rank, **self.fields})

    def request(self, adapters: Any, files: Mapping[str, Any], *, sweep: bool = False) -> MergeRequest:
        """The request that merges these adapters.

        Args:
            files: "features", "gram" and "fisher": {task: file} each, and "base_model", as far as there are any.
            sweep: leave the scale at the method's default: the merge is to be had at several.
        """
        fields, features = dict(self.fields), files.get("features")
        by_features: dict[str, Any] = {"features": {}} if _by_features(fields) or "cut" in fields else {}
        request = MergeRequest.from_fields(**fields, **by_features)
        rules = {name: getattr(request, name) for name in ("weights", "scale", "cut")}
        changes: dict[str, Any] = {
            name: replace(rule, features=features or {})
            for name, rule in rules.items()
            if isinstance(rule, LeastSquares)
        }
        changes |= {} if self.scale is None or sweep else {"scale": self.scale}
        needs = METHODS[fields["method"]].needs
        statistics = None if needs is None else files.get(needs)
        for kind, given in ((needs, statistics), ("features" if by_features else None, features)):
            if kind is not None and adapters and not given:
                raise ValueError(f"the candidate {self.name!r} needs {kind}={{task: file}}: give it, or leave it out")
        return replace(request, adapters=adapters, base_model=files.get("base_model"), statistics=statistics, **changes)


def default_candidates(adapters: int, files: Mapping[str, Any]) -> list[Candidate]:
    """The candidates that are tried when none are named, as far as there are features and statistics for them.

    Args:
        adapters: how many are merged: LoRE of two is their average, which is there already.
    """
    entries = [
        entry
        for entry in DEFAULT
        if (METHODS[entry["method"]].needs or "none") in {"none", *(key for key in _STATISTICS if files.get(key))}
        and (files.get("features") or not _by_features(entry))
        and (adapters > 2 or entry["method"] != "lore")
    ]
    return expand(entries)


def expand(entries: Iterable[Mapping[str, Any]]) -> list[Candidate]:
    """The candidates of entries of a list: each is a merge recipe without files; a list of values is a sweep.

    Raises:
        ValueError: an entry without method, an unknown key or option (names the nearest), an empty list, or a candidate
            that is there twice.
    """
    found: list[Candidate] = []
    for entry in entries:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("method"), str):
            raise ValueError(f"candidate {shown(entry)}: give a mapping with a method, such as {{method: tsv}}")
        with named(f"candidate {entry['method']}"):
            found += _sweep(entry)
    if not found:
        raise ValueError("no candidates: name at least one merge, such as {method: tsv}")
    names = [candidate.name for candidate in found]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise ValueError(f"the candidate {twice[0]!r} is there twice: leave one out")
    return found


def read_candidates(path: str | Path) -> list[Candidate]:
    """The candidates of a YAML file: a list of entries, see `expand`.

    Raises:
        FileNotFoundError, ValueError: no such file, or no such list.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file of candidates {path}: give a YAML list of merges")
    with named(path):
        content = parse_yaml(path.read_text(encoding="utf-8"))
        if not isinstance(content, list):
            raise ValueError(f"candidates are a list of merges, not {shown(content)}")
        return expand(content)


def _sweep(entry: Mapping[str, Any]) -> list[Candidate]:
    method, fields = get_method(entry["method"]), dict(entry)
    for name in _FILES:
        if name in fields:
            raise ValueError(f"{name} is the same for all candidates: give it beside them, not in one of them")
    options = fields.pop("options", None) or {}
    if not isinstance(options, Mapping):
        raise ValueError(f"options={shown(options)} must map names to values")
    scales = _listed("scale", fields.pop("scale", None))
    ranks = _listed("rank", fields.pop("rank", None))
    for rank in ranks:
        if rank not in (None, "serving"):
            integer("rank", rank, 1)
    if method.per_task and ranks != [None]:
        raise ValueError(f"{method.name} has a result for each task, which takes no rank: leave rank out")
    choice("heads policy", fields.get("heads", "per_task"), get_args(HeadPolicy))
    grid = [_listed(name, value) for name, value in options.items()]
    found = []
    for rank, *values in product(ranks, *grid):
        chosen = dict(zip(options, values, strict=True))
        method.bind(chosen)
        one = {**fields, **({} if rank is None else {"rank": rank}), **({"options": chosen} if chosen else {})}
        for scale in scales:
            by_rule = isinstance(scale, str)
            merge = {**one, "scale": scale} if by_rule else one
            found.append(Candidate(merge, None if by_rule else _scale(method.scale, merge, scale)))
    for candidate in found:
        candidate.request({}, {})  # an unknown key or word stops here
    return found


def _scale(default: float, fields: Mapping[str, Any], scale: Any) -> float:
    if scale is None:
        return 1.0 if _by_features(fields) else default
    return number("scale", scale)


def _by_features(fields: Mapping[str, Any]) -> bool:
    return any(isinstance(fields.get(name), str) for name in ("weights", "scale"))


def _listed(name: str, value: Any) -> Sequence[Any]:
    if isinstance(value, (list, tuple)) and not value:
        raise ValueError(f"{name}=[] is an empty sweep: name its values, or leave it out")
    return value if isinstance(value, (list, tuple)) else [value]
