"""CheckpointPlan: a merge of checkpoints with every choice made and checked, before the first byte is written."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from osrm_peft.checkpoints.config_checks import TOKEN_IDS, shown
from osrm_peft.checkpoints.model_files import ModelFiles
from osrm_peft.checkpoints.names import Names, align, as_spelled
from osrm_peft.checkpoints.settings import vocabulary_size, with_ids, with_rows
from osrm_peft.checkpoints.shapes import (
    BASE,
    OUTPUT_DTYPES,
    expert_stacks,
    is_matrix,
    result_dtypes,
    result_shapes,
    said_of,
)
from osrm_peft.checkpoints.skeleton import architecture, skeleton
from osrm_peft.checkpoints.text import Text, choose_text
from osrm_peft.checkpoints.work import STATE, Work, shards_of
from osrm_peft.checks import choice, integer, number, size_in_bytes
from osrm_peft.devices import CPU, chosen_device, described
from osrm_peft.io.manifest import MANIFEST, command, versions
from osrm_peft.merging import advice
from osrm_peft.merging.inputs import check_names
from osrm_peft.merging.methods.registry import METHODS, Method, get_method
from osrm_peft.merging.weights import Weights, weights_by_layer, weights_by_task

logger = logging.getLogger(__name__)

Vocab = Literal["error", "intersect"]
_RESERVED = ("heads", "README.md", MANIFEST, STATE)
CHECKPOINT_METHODS = tuple(
    sorted(name for name, one in METHODS.items() if one.needs is None and "weight" in one.spaces)
)
_UNTIE = (
    "untie the head of the one: model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone()); "
    "model.config.tie_word_embeddings = False; model.save_pretrained(folder)"
)
# fields of config.json that may differ between models that can be merged
_FREE = ("_name_or_path", "architectures", "dtype", "torch_dtype", "id2label", "label2id", "transformers_version",
         "problem_type", "use_cache", "vocab_size", "finetuning_task", "tie_word_embeddings", *TOKEN_IDS)  # fmt: skip


@dataclass(frozen=True)
class CheckpointPlan(Work):
    """What `merge_checkpoints` will do.

    Attributes:
        models: {name: its files}.
        base: the base model's files, or None.
        method, options, scale, seed: the merge's.
        weights: {tensor: (T,)}.
        shapes: {tensor: its shape in the result}, in the order in which they are written.
        dtypes: {tensor: its dtype in the result}.
        heads: {tensor: the models that keep their own}.
        shards: [(file name, its tensors)].
        config: the result's config.json: the first model's, with the token ids of `text`.
        text: the choice of tokenizer and generation settings.
        settings: further fields of the manifest.
        device: where blocks are merged.
        stacks: the tensors that are merged an expert at a time, see `shapes.expert_stacks`.
    """

    models: dict[str, ModelFiles]
    base: ModelFiles | None
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
    device: torch.device = CPU
    stacks: frozenset[str] = frozenset()

    @property
    def inputs(self) -> dict[str, ModelFiles]:
        """The models and their base."""
        return self.models | ({} if self.base is None else {BASE: self.base})

    @property
    def verb(self) -> str:
        """What is done, for the progress bar."""
        return f"merge {self.method.name}"

    @property
    def folders(self) -> list[str]:
        """Folders of models in the result: itself, or one a model where the method gives each its own."""
        return [f"{name}/" for name in self.models] if self.method.per_task else [""]

    @property
    def averaged(self) -> list[str]:
        """The tensors that a spectral method averages: those that are neither matrices nor stacks of experts."""
        if not self.method.spectral:
            return []
        floats = (name for name in self.shapes if self.dtypes[name].is_floating_point and name not in self.stacks)
        return [name for name in floats if not is_matrix(self.shapes[name])]

    def manifest(self) -> dict[str, Any]:
        """The manifest of the result's folder."""
        return {
            "kind": "checkpoint",
            "method": self.method.name,
            "paper": self.method.paper,
            "options": self.options,
            "scale": self.scale,
            "seed": self.seed,
            "inputs": {name: {"source": one.source, "files": one.identity()} for name, one in self.inputs.items()},
            "text": self.text.manifest(),
            **({"averaged": self.averaged} if self.method.spectral else {}),
            **self.settings,
            "device": described(self.device),
            "command": command(),
            "versions": versions(),
        }


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
    shard_size: int | str,
    seed: int,
    device: str | None = None,
    **options: Any,
) -> CheckpointPlan:
    """Check everything and open all files; see `merge_checkpoints` for arguments and errors."""
    chosen = get_method(choice("checkpoint method", method, CHECKPOINT_METHODS))
    options, scale = chosen.bind(options), number("scale", chosen.scale if scale is None else scale)
    choice("vocab", vocab, get_args(Vocab))
    if dtype is not None:
        choice("dtype", dtype, OUTPUT_DTYPES)
    shard_size = integer("shard_size", size_in_bytes("shard_size", shard_size), 2**20)
    seed, names, place = integer("seed", seed, 0), check_names(models), chosen_device(device)
    taken = [name for name in names if name in _RESERVED or (name == BASE and base is not None)]
    if taken:
        raise ValueError(f"a model cannot be called {taken[0]!r}, which is a name in the result: give it another")
    named = weights_by_task(weights, names)
    if base is None and not chosen.baseless:
        baseless = " or ".join(name for name in CHECKPOINT_METHODS if METHODS[name].baseless)
        raise ValueError(f"{method} merges differences from a base model: give base=, or use {baseless}")
    if base is None and chosen.weights_need_base and any(set(one.values()) != {1.0} for one in named.values()):
        raise ValueError(
            f"weights multiply task vectors, which {method} has only with base=: leave weights out, or give it"
        )
    opened = {name: ModelFiles(source) for name, source in models.items()}
    base_files = None if base is None else ModelFiles(base)
    every = opened | ({} if base_files is None else {BASE: base_files})
    check_kinds(every)
    aligned = (None if heads else as_spelled(every)) or align(every, opened)  # heads may be named as transformers does
    check_configs(every, aligned)
    shapes, own = result_shapes(every, opened, heads, vocab, aligned)
    cut = any(shape != one.tensors[tensor].shape for one in every.values() for tensor, shape in shapes.items())
    text = choose_text(every, list(opened), tokenizer, vocab, cut)
    config = with_ids(next(iter(opened.values())).config, text.ids)
    if text.rows is not None:
        config = with_rows(config, vocabulary_size(every[text.rows].config))
    plan = CheckpointPlan(
        opened, base_files, chosen, options, scale, seed, weights_by_layer(named, shapes), shapes,
        result_dtypes(every, shapes, dtype, aligned), own, [], config, text,
        {"weights": {name: dict(one) for name, one in named.items()}, "heads": list(heads), "vocab": vocab,
         "dtype": dtype, "shard_size": shard_size, "read": {n: one.identity() for n, one in every.items()},
         "left_out": aligned.left_out}, place, _stacks(chosen, options, opened[names[0]], shapes, aligned),
    )  # fmt: skip
    _warn(plan, aligned)
    for weight in plan.weights.values():
        chosen.check_weights(weight)
    plan.shards.extend(shards_of(plan, shard_size))
    return plan


def _stacks(
    method: Method,
    options: Mapping[str, Any],
    files: ModelFiles,
    shapes: Mapping[str, tuple[int, ...]],
    aligned: Names,
) -> frozenset[str]:
    """The stacks of experts, for a method that sees whole tensors."""
    if not (method.spectral or method.whole_tensor(options)):
        return frozenset()
    if not expert_stacks(files.config, shapes, dict.fromkeys(shapes, "expert")):
        return frozenset()  # by their shapes: transformers need not say what is an expert's
    model = skeleton(files.folder / "config.json", files.config, architecture(files.config), len(files.tensors))
    names = {name: aligned.canonical.get(name, name) for name in shapes}
    return expert_stacks(files.config, shapes, said_of(names, model))


def check_kinds(every: Mapping[str, ModelFiles]) -> None:
    """Raise ValueError unless all inputs are of one architecture."""
    (first, one), *others = every.items()
    for name, other in others:
        _check_alike(first, one.config.get("model_type"), name, other.config.get("model_type"), "model_type")


def _check_alike(first: str, one: Any, name: str, other: Any, key: str) -> None:
    if one != other:
        raise ValueError(
            f"{first!r} has {key}={one!r}, {name!r} {other!r}: models of different architectures cannot be merged"
            + (f"; {_UNTIE}" if key == "tie_word_embeddings" else "")
        )


def check_configs(every: Mapping[str, ModelFiles], aligned: Names) -> None:
    """Raise ValueError unless all inputs tie the same weights; warn of other fields that differ."""
    (first, one), *others = every.items()
    for name, other in others:
        key = "tie_word_embeddings"
        if aligned.ties is None:
            ties = [files.config[key] for files in (one, other) if files.config.get(key) is not None]
            _check_alike(first, ties[0] if ties else None, name, ties[-1] if ties else None, key)
        elif aligned.ties[first] != aligned.ties[name]:
            _check_alike(first, bool(aligned.ties[first]), name, bool(aligned.ties[name]), key)
            tensor = sorted(aligned.ties[first].keys() ^ aligned.ties[name].keys())[:1]
            raise ValueError(f"{first!r} and {name!r} do not tie the same weights ({tensor}): they cannot be merged")
        differ = [key for key in one.config.keys() | other.config.keys()
                  if key not in _FREE and one.config.get(key) != other.config.get(key)]  # fmt: skip
        if differ:
            logger.warning("the configs of %r and %r differ in %s", first, name, ", ".join(map(shown, sorted(differ))))


def _warn(plan: CheckpointPlan, aligned: Names) -> None:
    """Say what a user may not expect: tensors left out, or averaged instead of merged; and of the method and scale."""
    advice.warn(advice.of_method(plan.method, len(plan.models), plan.scale))
    for name, tensors in aligned.left_out.items():
        logger.warning("of %r %s left out, which no model loads", name, _listed(tensors))
    several = [name for name in plan.averaged if len(plan.shapes[name]) > 2]
    if several:
        share = plan.size_of(several) / max(plan.size_of(list(plan.shapes)), 1)
        tensors_shown = f"{_listed(several)} ({share:.0%} of the model)"
        logger.warning("%s has no singular values of %s: averaged instead", plan.method.name, tensors_shown)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(shown, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
