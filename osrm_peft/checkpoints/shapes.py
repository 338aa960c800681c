"""Shapes and dtypes of a merge's result; tensors that each model keeps; refusals of inputs that are not alike."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import nn

from osrm_peft.checkpoints.model_files import ModelFiles
from osrm_peft.checkpoints.names import PART, Names
from osrm_peft.checkpoints.settings import vocabulary_size

BASE = "base"  # the base model's name among the inputs
OutputDtype = Literal["float32", "bfloat16", "float16", "float64"]
OUTPUT_DTYPES = get_args(OutputDtype)


def is_matrix(shape: Sequence[int]) -> bool:
    """Whether a tensor has singular values of its own."""
    return len(shape) == 2 and min(shape) > 1


def expert_stacks(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], said: Mapping[str, str]
) -> frozenset[str]:
    """The tensors that are stacks of experts, (E, o, n): each of their E matrices has singular values of its own.

    A tensor of three axes is one if its first axis is a number of experts in config.json, and its name or the class of
    the module that has it says `expert`. A convolution's kernel is none.

    Args:
        said: {tensor: transformers' name of it and the class of its module}, where they are known.
    """
    counts = set(_numbers_of_experts(config))
    return frozenset(
        name
        for name, shape in shapes.items()
        if len(shape) == 3
        and shape[0] in counts
        and is_matrix(shape[1:])
        and "expert" in f"{name} {said.get(name, '')}".lower()
    )


def said_of(names: Mapping[str, str], model: nn.Module | None) -> dict[str, str]:
    """{tensor: transformers' name of it and the class of its module}.

    Args:
        names: {tensor: its name in the model, with what it is a part of}.
        model: on the meta device; None: of an unknown class.
    """
    classes = {} if model is None else {name: type(one).__name__ for name, one in model.named_modules()}
    whole = {tensor: name.partition(PART)[0] for tensor, name in names.items()}
    return {tensor: f"{name} {classes.get(name.rpartition('.')[0], '')}" for tensor, name in whole.items()}


def _numbers_of_experts(config: Mapping[str, Any]) -> Iterator[int]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers_of_experts(value)
        elif "expert" in key and isinstance(value, int):
            yield value


def result_shapes(
    every: Mapping[str, ModelFiles],
    models: Mapping[str, ModelFiles],
    heads: Sequence[str],
    vocab: str,
    aligned: Names,
) -> tuple[dict[str, tuple[int, ...]], dict[str, list[str]]]:
    """{tensor: shape} of the result, and {tensor: models that keep their own}."""
    own: dict[str, list[str]] = {}
    for name, one in models.items():
        for tensor in one.tensors:
            if _matches(tensor, heads, aligned):
                own.setdefault(tensor, []).append(name)
    for pattern in heads:
        if not any(_matches(tensor, [pattern], aligned) for tensor in own):
            raise ValueError(f"heads={pattern!r} matches no tensor of any model")
    kept = {name: {tensor for tensor in one.tensors if tensor not in own and not _matches(tensor, heads, aligned)}
            for name, one in every.items()}  # fmt: skip
    (first, names), *others = kept.items()
    for name, other in others:
        if names ^ other:
            lone = sorted(names ^ other)[0]
            where, lacks = (first, name) if lone in names else (name, first)
            layout = _layout(lone, kept[lacks], aligned)
            if layout is not None:
                raise ValueError(
                    f"{where!r} has a tensor {aligned.where(where, lone)!r}, {lacks!r} has "
                    f"{aligned.where(lacks, layout)!r} for it: two layouts of one model; save each anew in one, "
                    "from_pretrained(…).save_pretrained(folder, save_original_format=False)"
                )
            raise ValueError(
                f"{where!r} has a tensor {aligned.where(where, lone)!r}, {lacks!r} has not: they are of different "
                "architectures (of a head that each model has for itself: name it in heads=)"
            )
    shapes = {}
    for tensor in every[first].tensors:
        if tensor not in names:
            continue
        found = {name: one.tensors[tensor].shape for name, one in every.items()}
        if len(set(found.values())) == 1:
            shapes[tensor] = found[first]
            continue
        listed = ", ".join(f"{'×'.join(map(str, shape))} in {name!r}" for name, shape in found.items())
        by_vocab = all(shape and shape[0] == vocabulary_size(every[name].config) for name, shape in found.items())
        if not by_vocab or len({shape[1:] for shape in found.values()}) > 1:
            raise ValueError(f"{tensor!r} is {listed}: it cannot be merged (if it is a head, name it in heads=)")
        if vocab == "error":
            raise ValueError(f"{tensor!r} is {listed}: vocabularies differ; vocab='intersect' keeps what all have")
        shapes[tensor] = min(found.values())
    return shapes, own


def _layout(lone: str, others: set[str], aligned: Names) -> str | None:
    """The tensor of another file that holds the same values, in one piece or in other pieces."""
    whole = aligned.canonical.get(lone, lone).partition(PART)[0]
    return next((one for one in sorted(others) if aligned.canonical.get(one, one).partition(PART)[0] == whole), None)


def result_dtypes(
    every: Mapping[str, ModelFiles], shapes: Mapping[str, tuple[int, ...]], dtype: str | None, aligned: Names
) -> dict[str, torch.dtype]:
    """{tensor: dtype} of the result."""
    found = {}
    for tensor in shapes:
        kinds = {name: one.tensors[tensor].dtype for name, one in every.items()}
        floats = [kind.is_floating_point for kind in kinds.values()]
        if any(floats) and dtype is not None and all(floats):
            found[tensor] = getattr(torch, dtype)
            continue
        if len({kind for name, kind in kinds.items() if name != BASE}) > 1 or any(floats) != all(floats):
            listed = ", ".join(f"{str(kind).removeprefix('torch.')} in {name!r}" for name, kind in kinds.items())
            raise ValueError(f"{tensor!r} is {listed}: {_dtype_hint(every, tensor, kinds, aligned)}")
        found[tensor] = next(iter(kinds.values()))
    return found


def _dtype_hint(every: Mapping[str, ModelFiles], tensor: str, kinds: Mapping[str, torch.dtype], aligned: Names) -> str:
    """What to do about a tensor of several dtypes, for the error."""
    if all(kind.is_floating_point for kind in kinds.values()):
        return f"give the dtype of the result, one of {', '.join(OUTPUT_DTYPES)}"
    last = next(name for name, kind in kinds.items() if kind != next(iter(kinds.values())))
    file, wanted = every[last].tensors[tensor].path, next(iter(kinds.values()))
    return (
        "whole numbers are copied, not merged, and dtype= is for floats. Give it one dtype: tensors = "
        f"safetensors.torch.load_file({str(file)!r}); tensors[{aligned.where(last, tensor)!r}] = "
        f"tensors[{aligned.where(last, tensor)!r}].to({wanted}), and save_file them with metadata={{'format': 'pt'}}"
    )


def _matches(tensor: str, patterns: Sequence[str], aligned: Names) -> bool:
    """Whether a pattern matches a tensor's name in the result, in transformers, or in a file."""
    names = {tensor, aligned.canonical.get(tensor, tensor), *(aligned.where(name, tensor) for name in aligned.spelled)}
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
