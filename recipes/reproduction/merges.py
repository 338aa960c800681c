"""The merges of the experiments, by the names that the tables give them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from osrm_peft.merging.methods.registry import METHODS
from osrm_peft.merging.request import MergeRequest


class Merge(NamedTuple):
    """One merge.

    Attributes:
        method: of `merge_adapters`.
        scales: λ, a row of the table each.
        arguments: the other fields of a merge recipe; features and statistics are filled in.
    """

    method: str
    scales: tuple[float, ...] = (1.0,)
    arguments: Mapping[str, Any] = {}

    def default_scale(self) -> float:
        """The method's λ in its paper; 1 where features choose."""
        return 1.0 if self.guided() else METHODS[self.method].scale

    def guided(self) -> bool:
        """Whether features choose its weights or its scale."""
        return "features" in self.arguments.values()

    def request(self, adapters: Mapping[str, Path], **files: Mapping[str, Path]) -> MergeRequest:
        """The request that merges these adapters, with `features` and `statistics` files where it needs them."""
        options = {name: value for name, value in self.arguments.items() if name in METHODS[self.method].options}
        fields = {name: value for name, value in self.arguments.items() if name not in options}
        return MergeRequest.from_fields(adapters=adapters, method=self.method, options=options, **fields, **files)


MERGES: dict[str, Merge] = {
    "average": Merge("average"),
    "task_arithmetic": Merge("task_arithmetic", (0.3, 0.6)),
    "TA features": Merge("task_arithmetic", (1.0,), {"weights": "features"}),
    "ties": Merge("ties", (0.6, 1.0)),
    "knots ties": Merge("ties", (1.0,), {"space": "knots"}),
    "dare": Merge("dare", (0.3,)),
    "dare_ties": Merge("dare_ties"),
    "fisher": Merge("fisher"),
    "regmean": Merge("regmean"),
    "emr": Merge("emr"),
    "tsv": Merge("tsv"),
    "iso": Merge("iso"),
    "lore": Merge("lore", (0.3, 1.0)),
    "lore features": Merge("lore", (1.0,), {"scale": "features"}),
}
STATISTICS_ROWS = 100  # training rows a task for Fisher and RegMean
