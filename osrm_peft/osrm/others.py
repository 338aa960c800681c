"""The other tasks' features, as they come (files, objects) and as A is chosen from them (pooled, layer by layer)."""

from collections.abc import Sequence
from pathlib import Path

import torch

from osrm_peft.devices import CPU
from osrm_peft.features.moments import FeatureMoments
from osrm_peft.features.task_features import TaskFeatures
from osrm_peft.osrm.spectrum import PooledMoment, Spectrum


def load_features(features: TaskFeatures | str | Path) -> TaskFeatures:
    """Features as they are, or of a file."""
    return features if isinstance(features, TaskFeatures) else TaskFeatures.load(features)


def provenance_of(features: TaskFeatures) -> dict[str, object]:
    """The facts about features that a provenance records."""
    names = ("task", "base_model", "weight_hash", "tokenizer_hash", "statistic", "num_samples", "seed", "reference")
    return {name: getattr(features, name) for name in names}


class OtherTasks:
    """The other tasks' moments, layer by layer; layers with the same input, one after another, share what is made."""

    def __init__(self, features: Sequence[TaskFeatures]) -> None:
        self.features, self._inputs = features, [one.same_input() for one in features]
        self._last: tuple[tuple[str, ...], list[FeatureMoments], PooledMoment, Spectrum] | None = None

    @property
    def task(self) -> str:
        """What stands for the task itself where it shows no features: that it is none of these."""
        return "not " + ", ".join(sorted(one.task for one in self.features))

    def input_of(self, name: str) -> tuple[str, ...]:
        """Key of the layer's input: layers with equal keys receive the same tensors."""
        return tuple(same_input[name] for same_input in self._inputs)

    def pool(self, name: str) -> PooledMoment:
        """The tasks' moments of one layer, pooled."""
        return PooledMoment.of([one.layers[name] for one in self.features])

    def at(self, name: str, device: torch.device = CPU) -> tuple[list[FeatureMoments], PooledMoment, Spectrum]:
        """The tasks' moments of one layer, pooled, and their spectrum, made on this device."""
        leaders = *self.input_of(name), str(device)
        if self._last is None or self._last[0] != leaders:
            self._last = None  # before the next is read: memory holds one
            moments = [one.layers[name].to(device) for one in self.features]
            pool = PooledMoment.of(moments)
            self._last = (leaders, moments, pool, Spectrum.of(pool))
        return self._last[1:]
