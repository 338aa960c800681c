"""CheckpointPlan: a merge of checkpoints with every choice made and checked, before the first byte is written."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osrm_peft.checkpoints.config_checks import TOKEN_IDS
from osrm_peft.checkpoints.model_files import ModelFiles
from osrm_peft.checkpoints.names import PART, Names, align
from osrm_peft.checkpoints.settings import vocabulary_size, with_ids, with_rows
from osrm_peft.checkpoints.text import Text, choose_text
from osrm_peft.checks import choice, integer, number
from osrm_peft.files import MANIFEST, command, versions
from osrm_peft.merging.inputs import Weights, check_names, weights_by_layer, weights_by_task
from osrm_peft.merging.registry import METHODS, Method, get_method

logger = logging.getLogger(__name__)

VOCAB = ("error", "intersect")
BASE = "base"  # the base model's name among the inputs
STATE = "merge_state.json"  # of an unfinished merge
_RESERVED = ("heads", "README.md", MANIFEST, STATE)
OUTPUT_DTYPES = ("float32", "bfloat16", "float16", "float64")
CHECKPOINT_METHODS = tuple(
    sorted(name for name, one in METHODS.items() if one.needs is None and "weight" in one.spaces)
)
# of two config.json: what may differ between models that can be merged
_FREE = ("_name_or_path", "architectures", "dtype", "torch_dtype", "id2label", "label2id", "transformers_version",
         "problem_type", "use_cache", "vocab_size", "finetuning_task", "tie_word_embeddings", *TOKEN_IDS)  # fmt: skip


@dataclass(frozen=True)
class CheckpointPlan:
    """What `merge_checkpoints` will do.

    Attributes:
        models: {name: its files}.
        base: the base model's, or None.
        name, method, options, scale, seed: of the method.
        weights: {tensor: (T,)}.
        shapes: {tensor: its shape in the result}, in the order in which they are written.
        dtypes: {tensor: its dtype in the result}.
        heads: {tensor: the models that keep their own}.
        shards: [(file name, its tensors)].
        config: the result's config.json: the first model's, with the token ids of `text`.
        text: whose tokenizer and generation settings the result has.
    """

    models: dict[str, ModelFiles]
    base: ModelFiles | None
    name: str
    method: Method
    options: dict[str, Any]
    scale: float
    seed: int
    weights: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    heads: dict[str, list[str]]
    shards: list[tuple[str, list[str]]]
    config: dict[str, Any]
    text: Text
    settings: dict[str, Any] = field(default_factory=dict)

    def size_of(self, names: Sequence[str]) -> int:
        """How large these tensors of the result are."""
        return sum(torch.Size(self.shapes[name]).numel() * self.dtypes[name].itemsize for name in names)

    @property
    def averaged(self) -> list[str]:
        """Tensors that a spectral method averages, as they are no matrices."""
        floats = (name for name in self.shapes if self.dtypes[name].is_floating_point)
        return [name for name in floats if not is_matrix(self.shapes[name])] if self.method.spectral else []

    def named(self, name: str) -> ModelFiles:
        """An input, by its name."""
        return self.base if name == BASE and self.base is not None else self.models[name]

    def manifest(self) -> dict[str, Any]:
        """How the merge is made, for its folder."""
        every = self.models | ({} if self.base is None else {BASE: self.base})
        return {
            "kind": "checkpoint",
            "method": self.name,
            "paper": self.method.paper,
            "options": self.options,
            "scale": self.scale,
            "seed": self.seed,
            "inputs": {name: {"source": one.source, "files": one.identity()} for name, one in every.items()},
            "text": self.text.manifest(),
            **({"averaged": self.averaged} if self.method.spectral else {}),
            **self.settings,
            "command": command(),
            "versions": versions(),
        }

    def fingerprint(self) -> str:
        """Of all that decides the result."""
        about = {name: value for name, value in self.manifest().items() if name not in ("command", "versions")}
        return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def check_unchanged(self) -> None:
        """Raise ValueError if an input was changed since the plan was made."""
        for name, about in self.manifest()["inputs"].items():
            if about["files"] != self.settings["read"][name]:
                raise ValueError(f"the files of {name!r} were changed while they were merged: merge again")


def plan_checkpoints(
    models: Mapping[str, str | Path],
    method: str,
    *,
    base: str | Path | None,
    weights: Weights,
    scale: float | None,
    heads: Sequence[str],
    vocab: str,
    tokenizer: str | None,
    dtype: str | None,
    shard_size: int,
    seed: int,
    **options: Any,
) -> CheckpointPlan:
    """Check everything and open all files; see `merge_checkpoints` for arguments and errors."""
    chosen = get_method(choice("checkpoint method", method, CHECKPOINT_METHODS))
    options, scale = chosen.bind(method, options), number("scale", chosen.scale if scale is None else scale)
    choice("vocab", vocab, VOCAB)
    if dtype is not None:
        choice("dtype", dtype, OUTPUT_DTYPES)
    shard_size, seed, names = integer("shard_size", shard_size, 2**20), integer("seed", seed, 0), check_names(models)
    taken = [name for name in names if name in _RESERVED or (name == BASE and base is not None)]
    if taken:
        raise ValueError(f"a model cannot be called {taken[0]!r}, which is a name in the result: give it another")
    named = weights_by_task(weights, names)
    if base is None and not chosen.baseless:
        raise ValueError(f"{method} merges differences from a base model: give base=, or use average or lore")
    if base is None and method == "lore" and any(set(one.values()) != {1.0} for one in named.values()):
        raise ValueError("weights multiply task vectors, which lore has only with base=: leave weights out, or give it")
    opened = {name: ModelFiles(source) for name, source in models.items()}
    base_files = None if base is None else ModelFiles(base)
    every = opened | ({} if base_files is None else {BASE: base_files})
    _check_kinds(every)
    aligned = align(every, opened)
    _check_configs(every, aligned)
    shapes, own = _shapes(every, opened, heads, vocab, aligned)
    cut = any(shape != one.tensors[tensor].shape for one in every.values() for tensor, shape in shapes.items())
    text = choose_text(every, list(opened), tokenizer, vocab, cut)
    config = with_ids(next(iter(opened.values())).config, text.ids)
    if text.rows is not None:
        config = with_rows(config, vocabulary_size(every[text.rows].config))
    plan = CheckpointPlan(
        opened, base_files, method, chosen, options, scale, seed, weights_by_layer(named, shapes), shapes,
        _dtypes(every, shapes, dtype, aligned), own, [], config, text,
        {"weights": {name: dict(one) for name, one in named.items()}, "heads": list(heads), "vocab": vocab,
         "dtype": dtype, "shard_size": shard_size, "read": {n: one.identity() for n, one in every.items()},
         "left_out": aligned.left_out},
    )  # fmt: skip
    _tell(plan, aligned)
    for weight in plan.weights.values():
        chosen.check_weights(weight)
    plan.shards.extend(_shards(plan, shard_size))
    return plan


def is_matrix(shape: Sequence[int]) -> bool:
    """Whether a tensor has singular values of its own."""
    return len(shape) == 2 and min(shape) > 1


def _check_kinds(every: Mapping[str, ModelFiles]) -> None:
    (first, one), *others = every.items()
    for name, other in others:
        _check_alike(first, one.config.get("model_type"), name, other.config.get("model_type"), "model_type")


def _check_alike(first: str, one: Any, name: str, other: Any, key: str) -> None:
    if one != other:
        raise ValueError(
            f"{first!r} has {key}={one!r}, {name!r} {other!r}: models of different architectures cannot be merged"
        )


def _check_configs(every: Mapping[str, ModelFiles], aligned: Names) -> None:
    """Tied weights must be alike, whether a config.json says it or its class; what else differs is told."""
    (first, one), *others = every.items()
    for name, other in others:
        key = "tie_word_embeddings"
        if aligned.ties is None:
            told = [files.config[key] for files in (one, other) if files.config.get(key) is not None]
            _check_alike(first, told[0] if told else None, name, told[-1] if told else None, key)
        elif aligned.ties[first] != aligned.ties[name]:
            _check_alike(first, bool(aligned.ties[first]), name, bool(aligned.ties[name]), key)
            tensor = sorted(aligned.ties[first].keys() ^ aligned.ties[name].keys())[:1]
            raise ValueError(f"{first!r} and {name!r} do not tie the same weights ({tensor}): they cannot be merged")
        differ = [key for key in one.config.keys() | other.config.keys()
                  if key not in _FREE and one.config.get(key) != other.config.get(key)]  # fmt: skip
        if differ:
            logger.warning("the configs of %r and %r differ in %s", first, name, ", ".join(sorted(differ)))


def _tell(plan: CheckpointPlan, aligned: Names) -> None:
    """Say what a user would not expect of the result."""
    for name, tensors in aligned.left_out.items():
        logger.warning("of %r %s left out, which no model loads", name, _listed(tensors))
    several = [name for name in plan.averaged if len(plan.shapes[name]) > 2]
    if several:
        share = plan.size_of(several) / max(plan.size_of(list(plan.shapes)), 1)
        about = f"{_listed(several)} ({share:.0%} of the model)"
        logger.warning("%s has no singular values of %s: averaged instead", plan.name, about)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _shapes(
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
    """The tensor of another file that has what this one has, in one piece or in other pieces."""
    whole = aligned.canonical.get(lone, lone).partition(PART)[0]
    return next((one for one in sorted(others) if aligned.canonical.get(one, one).partition(PART)[0] == whole), None)


def _dtypes(
    every: Mapping[str, ModelFiles], shapes: Mapping[str, tuple[int, ...]], dtype: str | None, aligned: Names
) -> dict[str, torch.dtype]:
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
    """What to do about a tensor of several dtypes."""
    if all(kind.is_floating_point for kind in kinds.values()):
        return f"give the dtype of the result, one of {', '.join(OUTPUT_DTYPES)}"
    last = next(name for name, kind in kinds.items() if kind != next(iter(kinds.values())))
    file, wanted = every[last].tensors[tensor].path, next(iter(kinds.values()))
    return (
        "whole numbers are copied, not merged, and dtype= is for floats. Give it one dtype: tensors = "
        f"safetensors.torch.load_file({str(file)!r}); tensors[{aligned.where(last, tensor)!r}] = "
        f"tensors[{aligned.where(last, tensor)!r}].to({wanted}), and save_file them with metadata={{'format': 'pt'}}"
    )


def _shards(plan: CheckpointPlan, most: int) -> list[tuple[str, list[str]]]:
    """Tensors in their order, as many in a file as fit."""
    groups: list[list[str]] = [[]]
    for tensor in plan.shapes:
        if groups[-1] and plan.size_of([*groups[-1], tensor]) > most:
            groups.append([])
        groups[-1].append(tensor)
    if len(groups) == 1:
        return [("model.safetensors", groups[0])]
    return [(f"model-{place:05d}-of-{len(groups):05d}.safetensors", group) for place, group in enumerate(groups, 1)]


def _matches(tensor: str, patterns: Sequence[str], aligned: Names) -> bool:
    """Whether a pattern matches the name in the result, or transformers' own."""
    both = (tensor, aligned.canonical.get(tensor, tensor))
    return any(fnmatchcase(name, pattern) for name in both for pattern in patterns)
