"""OSRMLoraConfig: a LoraConfig that also says from which features, and how, A is chosen."""

import dataclasses
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from peft import LoraConfig
from peft.utils import CONFIG_NAME

from osrm_peft.adapters.config import NOT_PLAIN
from osrm_peft.checks import choice, integer, number
from osrm_peft.features.moments import STATISTICS, FeatureStatistic
from osrm_peft.hub.card import write_manifest
from osrm_peft.hub.privacy import public, public_name
from osrm_peft.io.manifest import MANIFEST, command, versions
from osrm_peft.io.places import check_file
from osrm_peft.models.identity import located
from osrm_peft.osrm.subspace import NullSpace, Objective, check_protect

_STATISTIC: FeatureStatistic = "token"
_OBJECTIVE: Objective = "ratio"  # the best of benchmarks/study.py


@dataclass
class OSRMLoraConfig(LoraConfig):
    """LoRA with OSRM's A (Zhang & Zhou, ACL 2025). `get_peft_model` makes a plain LoRA model of it.

    A is set by `OSRMCallback` (in a Trainer) or `initialize_osrm_weights` (by hand). What is saved is a plain LoRA
    adapter: `adapter_config.json` holds LoraConfig's fields only, the fields below go to the
    manifest `osrm_peft.json` beside it.

    The default is the best of our study (docs/results/adaptation_kept.md): A takes the directions with most energy of
    the task's own for each unit of the others'. The paper's choice is `objective="least_energy"`, and needs no features
    of the task's own.

    Args:
        out_of_task: features files of the *other* tasks, written by `osrm-peft features` or `TaskFeatures.save`.
        statistic: what those files hold: `"mean"`, `"sample"` or `"token"` (see FeatureMoments). A file that holds
            another statistic is refused.
        objective: `"least_energy"` (the paper), or `"difference"` or `"ratio"`, which weigh this task's own energy
            against the others', see `subspace.choose_directions`.
        null_space: of `"least_energy"`: who chooses where the other tasks leave more than r directions free: `"random"`
            (seeded) or `"in_task"` (the directions with most energy of this task's own features).
        in_task: this task's own features file, for the objectives but the paper's, and for `null_space="in_task"`.
        in_task_weight: β in [0, 1] of `"difference"`; 0 is the paper.
        ridge: ρ > 0 of `"ratio"`, relative to the mean energy of a direction.
        protect_energy: A must avoid as many of the strongest directions as hold this share in [0, 1] of the other
            tasks' energy; the rest counts as free. None: all (the paper).
        protect_rank: instead, how many of the strongest directions A must avoid.
        freeze_a: train B only (paper §4.4).
        reference: choose as the released code does (needs features collected with `reference=True`); where these are
            left at their defaults, they become `statistic="mean", objective="least_energy"`.
        osrm_seed: seed of the random choice in a null space, mixed with the name of the task that `in_task` is of, or
            with those of the others: tasks without `in_task` that name the same others need a seed each.

    Raises:
        ValueError: an unknown choice, a number out of its range, options that contradict each other, or one of LoRA's
            with which the adapter could not be merged (DoRA, bare parameters, …).
    """

    out_of_task: list[str] | None = None
    statistic: FeatureStatistic = _STATISTIC
    null_space: NullSpace = "random"
    objective: Objective = _OBJECTIVE
    in_task: str | None = None
    in_task_weight: float = 0.5
    ridge: float = 0.1
    protect_energy: float | None = None
    protect_rank: int | None = None
    freeze_a: bool = False
    reference: bool = False
    osrm_seed: int = 0
    provenance: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    pushed: bool = field(default=False, init=False, repr=False)  # what is saved goes to the Hub as it is (Trainer)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in NOT_PLAIN:
            if getattr(self, name, None):
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: OSRM makes adapters to be merged, and no merge takes such a one "
                    f"(it is not plain LoRA): leave {name} out, or use peft.LoraConfig"
                )
        if self.target_parameters:
            raise ValueError(
                f"target_parameters={self.target_parameters!r}: OSRM chooses A from the inputs of linear layers, and "
                "bare parameters (experts) have none of their own: leave target_parameters out, or train with "
                "peft.LoraConfig, whose experts can be merged, too"
            )
        choice("statistic", self.statistic, STATISTICS)
        choice("null_space", self.null_space, get_args(NullSpace))
        choice("objective", self.objective, get_args(Objective))
        if isinstance(self.out_of_task, (str, Path)):
            raise ValueError(f"out_of_task={self.out_of_task!r}: give a list of features files")
        self.in_task_weight = number("in_task_weight", self.in_task_weight, 0, 1)
        self.ridge = number("ridge", self.ridge, 0, open_low=True)
        self.protect_rank, self.protect_energy = check_protect(self.protect_rank, self.protect_energy)
        self.osrm_seed = integer("osrm_seed", self.osrm_seed, 0)
        if self.reference:  # what is at its default becomes the released code's
            self.statistic = "mean" if self.statistic == _STATISTIC else self.statistic
            self.objective = "least_energy" if self.objective == _OBJECTIVE else self.objective
        if self.null_space == "in_task" and self.objective != "least_energy":
            raise ValueError(
                f"null_space='in_task' is a choice of objective='least_energy'; objective={self.objective!r} has no "
                "null space to choose in: give objective='least_energy', too, or leave null_space out"
            )
        chosen = (self.statistic, self.null_space, self.objective, self.protect_energy, self.protect_rank)
        released = chosen == ("mean", "random", "least_energy", None, None)
        if self.reference and not released:
            raise ValueError(
                "reference=True is the released code: it needs statistic='mean', null_space='random', "
                "objective='least_energy' and protect_energy=None"
            )

    @property
    def needs_own_features(self) -> bool:
        """Whether the choice of A looks at the task's own features."""
        return self.objective != "least_energy" or self.null_space == "in_task"

    def osrm_settings(self) -> dict[str, Any]:
        """The fields that LoraConfig does not have."""
        return {name: getattr(self, name) for name in _OWN_FIELDS if name not in ("provenance", "pushed")}

    def to_dict(self) -> dict[str, Any]:
        """LoraConfig's fields only: what `adapter_config.json` holds."""
        fields = {name: value for name, value in super().to_dict().items() if name not in _OWN_FIELDS}
        return fields | {"base_model_name_or_path": self._base_model()}

    def manifest(self) -> dict[str, Any]:
        """How the adapter was made, for its folder: of folders of this machine only the base model's is in it."""
        found = {
            "kind": "adapter",
            "task_type": None if self.task_type is None else str(getattr(self.task_type, "value", self.task_type)),
            "osrm": {
                "initialized": bool(self.provenance),
                "settings": self.osrm_settings(),
                "provenance": self.provenance,
            },
            "command": command(),
            "versions": versions(),
        }
        return public(found) | {"base_model": self._base_model()}

    def _base_model(self) -> str | None:
        name = self.base_model_name_or_path
        return public_name(name) if self.pushed else located(name)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json` (as PEFT does), the manifest `osrm_peft.json` and the card beside it."""
        for name in (CONFIG_NAME, MANIFEST, "README.md"):
            check_file(Path(save_directory) / name)
        if not self.provenance:
            warnings.warn(
                f"{save_directory}: OSRM has not chosen A, so this is a plain LoRA adapter: give the Trainer "
                "callbacks=[OSRMCallback()], or call initialize_osrm_weights(model) before training",
                stacklevel=1,
            )
        super().save_pretrained(save_directory, **kwargs)
        write_manifest(save_directory, self.manifest())


_OWN_FIELDS = {field.name for field in dataclasses.fields(OSRMLoraConfig)} - {
    field.name for field in dataclasses.fields(LoraConfig)
}
