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
from transformers import AutoTokenizer

from osrm_peft.checkpoints.model_files import ModelFiles
from osrm_peft.checks import choice, integer, number
from osrm_peft.files import MANIFEST, command, versions
from osrm_peft.merging.inputs import check_names
from osrm_peft.merging.registry import METHODS, Method, get_method
from osrm_peft.merging.weights import Weights, weights_by_layer, weights_by_task

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
         "problem_type", "use_cache", "vocab_size", "pad_token_id", "finetuning_task")  # fmt: skip


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
        like: the model whose configuration and tokenizer the result has.
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
    like: ModelFiles
    settings: dict[str, Any] = field(default_factory=dict)

    def size_of(self, names: Sequence[str]) -> int:
        """How large these tensors of the result are."""
        return sum(torch.Size(self.shapes[name]).numel() * self.dtypes[name].itemsize for name in names)

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
    _check_configs(every)
    shapes, own = _shapes(every, opened, heads, vocab)
    like = _like(every, opened, base_files, vocab)
    dtypes = _dtypes(every, shapes, dtype)
    plan = CheckpointPlan(
        opened, base_files, method, chosen, options, scale, seed, weights_by_layer(named, shapes), shapes, dtypes, own,
        [], like, {"weights": {name: dict(one) for name, one in named.items()}, "heads": list(heads), "vocab": vocab,
                   "dtype": dtype, "shard_size": shard_size, "read": {n: one.identity() for n, one in every.items()}},
    )  # fmt: skip
    for weight in plan.weights.values():
        chosen.check_weights(weight)
    plan.shards.extend(_shards(plan, shard_size))
    return plan


def _check_configs(every: Mapping[str, ModelFiles]) -> None:
    (first, one), *others = every.items()
    for name, other in others:
        for key in ("model_type", "tie_word_embeddings"):
            if one.config.get(key) != other.config.get(key):
                raise ValueError(
                    f"{first!r} has {key}={one.config.get(key)!r}, {name!r} {other.config.get(key)!r}: models of "
                    "different architectures cannot be merged"
                )
        differ = [key for key in one.config.keys() | other.config.keys()
                  if key not in _FREE and one.config.get(key) != other.config.get(key)]  # fmt: skip
        if differ:
            logger.warning("the configs of %r and %r differ in %s", first, name, ", ".join(sorted(differ)))


def _shapes(
    every: Mapping[str, ModelFiles], models: Mapping[str, ModelFiles], heads: Sequence[str], vocab: str
) -> tuple[dict[str, tuple[int, ...]], dict[str, list[str]]]:
    """{tensor: shape} of the result, and {tensor: models that keep their own}."""
    own: dict[str, list[str]] = {}
    for name, one in models.items():
        for tensor in one.tensors:
            if _matches(tensor, heads):
                own.setdefault(tensor, []).append(name)
    for pattern in heads:
        if not any(fnmatchcase(tensor, pattern) for tensor in own):
            raise ValueError(f"heads={pattern!r} matches no tensor of any model")
    kept = {name: {tensor for tensor in one.tensors if tensor not in own and not _matches(tensor, heads)}
            for name, one in every.items()}  # fmt: skip
    (first, names), *others = kept.items()
    for name, other in others:
        if names ^ other:
            lone = sorted(names ^ other)[0]
            where, lacks = (first, name) if lone in names else (name, first)
            raise ValueError(
                f"{where!r} has a tensor {lone!r}, {lacks!r} has not: they are of different architectures (of a head "
                "that each model has for itself: name it in heads=)"
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
        by_vocab = all(shape and shape[0] == every[name].config.get("vocab_size") for name, shape in found.items())
        if not by_vocab or len({shape[1:] for shape in found.values()}) > 1:
            raise ValueError(f"{tensor!r} is {listed}: it cannot be merged (if it is a head, name it in heads=)")
        if vocab == "error":
            raise ValueError(f"{tensor!r} is {listed}: vocabularies differ; vocab='intersect' keeps what all have")
        shapes[tensor] = min(found.values())
    return shapes, own


def _like(
    every: Mapping[str, ModelFiles], models: Mapping[str, ModelFiles], base: ModelFiles | None, vocab: str
) -> ModelFiles:
    """The model whose configuration the result has: with the fewest tokens, which all others have, too."""
    first = next(iter(models.values())) if base is None else base
    if vocab == "error":
        return first
    least = min(every.values(), key=lambda one: one.config.get("vocab_size", 0))
    tokens = AutoTokenizer.from_pretrained(least.folder).get_vocab()
    for name, one in every.items():
        theirs = AutoTokenizer.from_pretrained(one.folder).get_vocab()
        moved = next((token for token, place in sorted(tokens.items()) if theirs.get(token) != place), None)
        if moved is not None:
            raise ValueError(
                f"token {moved!r} is {tokens[moved]} in {least.source} and {theirs.get(moved)} in {name!r}: their "
                "vocabularies are not parts of one another, so no rows can be matched"
            )
    return least


def _dtypes(
    every: Mapping[str, ModelFiles], shapes: Mapping[str, tuple[int, ...]], dtype: str | None
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
            raise ValueError(f"{tensor!r} is {listed}: give the dtype of the result, one of {', '.join(OUTPUT_DTYPES)}")
        found[tensor] = next(iter(kinds.values()))
    return found


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


def _matches(tensor: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(tensor, pattern) for pattern in patterns)
