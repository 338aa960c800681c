"""Whether features and statistics fit a model, an adapter, and each other. Every such check is one of these."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from osrm_peft.features.fisher import DiagonalFisher
from osrm_peft.features.task_features import TaskFeatures, tokenizer_hash
from osrm_peft.models.fingerprint import counts_all_rows, embedding_hash, hash_of, sampled_weights
from osrm_peft.models.layers import base_name, base_of, input_width

Statistic = TaskFeatures | DiagonalFisher


def check_model(
    features: TaskFeatures,
    model: nn.Module,
    layers: Iterable[str],
    tokenizer: Any = None,
    sampled: Mapping[str | int, bytes] | None = None,
) -> None:
    """Check that features are of `model` (and `tokenizer`) and hold all of `layers`, at the right widths.

    Args:
        sampled: the model's `fingerprint.sampled_weights`, with those of the features' layers and `vocabulary`; None:
            they are read here.

    Raises:
        ValueError: names the task, all layers that are missing or differ in width, or both models or tokenizers.
    """
    base = base_of(model)
    check_pretrained(features)
    widths = {name: input_width(name, base.get_submodule(name)) for name in layers}
    check_layers(features, {name: (n,) for name, n in widths.items()}, "adapted layers", "the model")
    foreign = sorted(set(features.layers) - set(dict(base.named_modules())))
    if foreign:
        raise ValueError(
            f"{_whose(features)} are of {features.base_model}, another architecture: "
            f"{base_name(base)} has no layer {foreign[0]!r}"
        )
    if sampled is None:
        sampled = sampled_weights(base, features.layers, features.rows())
    _check_weights(features, base, sampled)
    given = None if tokenizer is None else tokenizer_hash(tokenizer)
    if None not in (given, features.tokenizer_hash) and given != features.tokenizer_hash:
        raise ValueError(
            f"{_whose(features)} were collected with the tokenizer {features.tokenizer} "
            f"({features.tokenizer_hash}), but this one is {tokenizer.name_or_path} ({given}): "
            "collect them with the tokenizer that the adapter is trained with"
        )


def check_pretrained(features: TaskFeatures) -> None:
    """Raise ValueError if features are of a fine-tuned model."""
    if features.of_finetuned_model:
        raise ValueError(
            f"{_whose(features)} are of its fine-tuned model (collect_gram, for RegMean): "
            "collect them on the pre-trained model with collect_features"
        )


def check_layers(statistic: Statistic, wanted: Mapping[str, tuple[int, ...]], what: str, target: str) -> None:
    """Check that a statistic has all layers, at their shapes.

    Args:
        wanted: {layer: (n,) or (o, n)}; features are compared by n alone.
        what: the layers, for the error.
        target: what has them.

    Raises:
        ValueError: names the layers that are missing, or the first of another shape.
    """
    held: dict[str, tuple[int, ...]] = shapes_of(statistic)
    missing = sorted(set(wanted) - set(held))
    if missing:
        raise ValueError(
            f"{_whose(statistic)} (of {statistic.base_model}) lack {len(missing)} of the {len(wanted)} {what}: "
            f"{', '.join(missing[:4])}{' …' if len(missing) > 4 else ''}; "
            "collect them again on all of them (target_modules=…)"
        )
    for name, shape in wanted.items():
        asked = shape if isinstance(statistic, DiagonalFisher) else shape[-1:]
        if held[name] != asked:
            size, right = ("×".join(map(str, one)) for one in (held[name], asked))
            kind = "width" if len(asked) == 1 else "shape"
            raise ValueError(
                f"{_whose(statistic)} have {kind} {size} at {name!r}, {target} has {right}: they are of another "
                "base model"
            )


def shapes_of(statistic: Statistic) -> dict[str, tuple[int, ...]]:
    """{layer: (n,)} of features, {layer: (o, n)} of Fisher information."""
    if isinstance(statistic, DiagonalFisher):
        return {name: tuple(F.shape) for name, F in statistic.layers.items()}
    return {name: (n,) for name, n in statistic.widths().items()}


def check_other_tasks(others: Sequence[TaskFeatures], own: TaskFeatures | None) -> None:
    """Check that these are features of different tasks, made alike.

    Raises:
        ValueError: there are none, a task comes twice, or see `check_alike`.
    """
    if not others:
        raise ValueError("no out-of-task features: give OSRMLoraConfig(out_of_task=[files of the other tasks])")
    tasks = [features.task for features in others]
    twice = sorted({task for task in tasks if tasks.count(task) > 1})
    if twice:
        raise ValueError(f"out_of_task names {', '.join(twice)} more than once: one features file a task")
    if own is not None and own.task in tasks:
        raise ValueError(f"task {own.task!r} is both in_task and out_of_task: leave it out of out_of_task")
    check_alike([*others, *([own] if own else [])])


def check_alike(features: Sequence[TaskFeatures]) -> None:
    """Check that features were made alike.

    Raises:
        ValueError: two tasks' statistics or tokenizers differ; names them.
    """
    first = features[0]
    for other in features[1:]:
        if other.reference != first.reference:
            raise ValueError(
                f"{_whose(first)} were collected with reference={first.reference}, those of "
                f"{other.task!r} with reference={other.reference}: collect them alike"
            )
        if other.statistic != first.statistic:
            raise ValueError(
                f"{_whose(first)} hold the statistic {first.statistic!r}, those of {other.task!r} "
                f"{other.statistic!r}: collect them alike"
            )
    known = [one for one in features if one.tokenizer_hash is not None]
    for other in known[1:]:
        if other.tokenizer_hash != known[0].tokenizer_hash:
            raise ValueError(
                f"{_whose(known[0])} were collected with the tokenizer {known[0].tokenizer} "
                f"({known[0].tokenizer_hash}), those of {other.task!r} with {other.tokenizer} "
                f"({other.tokenizer_hash}): collect them with one tokenizer"
            )


def check_one_base(features: Sequence[TaskFeatures]) -> None:
    """Raise ValueError if features are of different base models; files of the same layers have comparable hashes."""
    first: dict[frozenset[str], TaskFeatures] = {}
    for one in features:
        other = first.setdefault(frozenset(one.layers), one)
        if one.weight_hash != other.weight_hash:
            raise ValueError(
                f"{_whose(other)} are of {other.base_model} ({other.weight_hash}), those of {one.task!r} of "
                f"{one.base_model} ({one.weight_hash}): the features are of different base models, collect them on one"
            )


def _whose(statistic: Statistic) -> str:
    pretrained = isinstance(statistic, TaskFeatures) and not statistic.of_finetuned_model
    return f"the {'features' if pretrained else 'statistics'} of task {statistic.task!r}"


def _check_weights(features: TaskFeatures, base: nn.Module, sampled: Mapping[str | int, bytes]) -> None:
    actual, collected = hash_of(sampled, features.layers, like=features.weight_hash), features.weight_hash
    if actual == collected and features.vocabulary is not None:
        # A vocabulary cut since then says nothing: the layers decide.
        found, expected = embedding_hash(sampled, features.vocabulary), features.embedding_hash
        actual, collected = (actual, collected) if found is None else (f"{found}", f"{expected}")
    if actual != collected:
        resized = (
            ". (The file is of an earlier version, which took a base whose embedding was resized for another one: "
            "if that is all, collect again)"
        )
        raise ValueError(
            f"{_whose(features)} were collected on {features.base_model} (weights {collected}), "
            f"but this model is {base_name(base)} (weights {actual}): collect them on the same pre-trained model"
            + (resized if counts_all_rows(features.weight_hash) else "")
        )
