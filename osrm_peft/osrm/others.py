"""The other tasks' features, as they come (files, objects) and as A is chosen from them (pooled, layer by layer)."""

from collections.abc import Sequence
from pathlib import Path

from osrm_peft.features.moments import FeatureMoments
from osrm_peft.features.task_features import TaskFeatures
from osrm_peft.osrm.spectrum import PooledMoment, Spectrum


def load_features(features: TaskFeatures | str | Path) -> TaskFeatures:
    """Features as they are, or of a file."""
    return features if isinstance(features, TaskFeatures) else TaskFeatures.load(features)


def check_tasks(others: Sequence[TaskFeatures], own: TaskFeatures | None) -> None:
    """Are these features of different tasks, and made alike?

    Raises:
        ValueError: there are none, a task comes twice, or two tasks' statistics or tokenizers differ; names them.
    """
    if not others:
        raise ValueError("no out-of-task features: give OSRMLoraConfig(out_of_task=[files of the other tasks])")
    tasks = [features.task for features in others]
    twice = sorted({task for task in tasks if tasks.count(task) > 1})
    if twice:
        raise ValueError(f"out_of_task names {', '.join(twice)} more than once: one features file a task")
    if own is not None and own.task in tasks:
        raise ValueError(f"task {own.task!r} is both in_task and out_of_task: leave it out of out_of_task")
    every = [*others, *([own] if own else [])]
    known = [one for one in every if one.tokenizer_hash is not None]
    for one in every[1:]:
        if one.reference != every[0].reference:
            raise ValueError(
                f"the features of {every[0].task!r} were collected with reference={every[0].reference}, those of "
                f"{one.task!r} with reference={one.reference}: collect them alike"
            )
        if one.statistic != every[0].statistic:
            raise ValueError(
                f"the features of {every[0].task!r} hold the statistic {every[0].statistic!r}, those of {one.task!r} "
                f"{one.statistic!r}: collect them alike"
            )
    for one in known[1:]:
        if one.tokenizer_hash != known[0].tokenizer_hash:
            raise ValueError(
                f"the features of {known[0].task!r} were collected with the tokenizer {known[0].tokenizer} "
                f"({known[0].tokenizer_hash}), those of {one.task!r} with {one.tokenizer} ({one.tokenizer_hash}): "
                "collect them with one tokenizer"
            )


def provenance_of(features: TaskFeatures) -> dict[str, object]:
    """What the provenance records of features."""
    names = ("task", "base_model", "weight_hash", "tokenizer_hash", "statistic", "num_samples", "seed", "reference")
    return {name: getattr(features, name) for name in names}


class OtherTasks:
    """The other tasks' moments, layer by layer; layers with the same input, one after another, share what is made."""

    def __init__(self, features: Sequence[TaskFeatures]) -> None:
        self.features, self._inputs = features, [one.same_input() for one in features]
        self._last: tuple[tuple[str, ...], list[FeatureMoments], PooledMoment, Spectrum] | None = None

    def input_of(self, name: str) -> tuple[str, ...]:
        """What tells the layer's input from others."""
        return tuple(same_input[name] for same_input in self._inputs)

    def pool(self, name: str) -> PooledMoment:
        """The tasks' moments of one layer, pooled."""
        return PooledMoment.of([one.layers[name] for one in self.features])

    def at(self, name: str) -> tuple[list[FeatureMoments], PooledMoment, Spectrum]:
        """The tasks' moments of one layer, pooled, and their spectrum."""
        leaders = self.input_of(name)
        if self._last is None or self._last[0] != leaders:
            self._last = None  # before the next is read: memory holds one
            moments = [one.layers[name] for one in self.features]
            pool = PooledMoment.of(moments)
            self._last = (leaders, moments, pool, Spectrum.of(pool))
        return self._last[1:]
