"""ExtractPlan: a fine-tuned model and its base, compared, and what of their difference an adapter can hold."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from osrm_peft.adapters.experts import layers_of, owners, taken_for_experts
from osrm_peft.adapters.keys import TASK_HEADS
from osrm_peft.checkpoints.config_checks import shown
from osrm_peft.checkpoints.model_files import ModelFiles
from osrm_peft.checkpoints.names import PART, align
from osrm_peft.checkpoints.plan import check_configs, check_kinds
from osrm_peft.checkpoints.settings import vocabulary_size
from osrm_peft.checkpoints.shapes import BASE, expert_stacks, is_matrix, said_of
from osrm_peft.checkpoints.skeleton import architecture, skeleton
from osrm_peft.checkpoints.text import choose_text
from osrm_peft.checkpoints.work import Work
from osrm_peft.checks import choice, integer
from osrm_peft.io.manifest import command, versions
from osrm_peft.libraries import is_conv1d
from osrm_peft.merging.lowrank import SERVING
from osrm_peft.models.identity import located
from osrm_peft.models.packaged import MODEL, resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

TUNED = "tuned"  # the fine-tuned model's name among the inputs
Kind = Literal["embeddings", "norms", "heads", "others"]
KINDS = get_args(Kind)
FACTORS = Literal["float32", "bfloat16", "float16"]
_TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS",
}  # fmt: skip
_MAMBA = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
_ROWS = 2**22  # entries of a tensor that are compared at once


@dataclass(frozen=True)
class ExtractPlan(Work):
    """What `extract_adapter` will do.

    Attributes:
        base, tuned: the models' files, their tensors named alike.
        layers: {layer: its weight is (n, o)}: the linear layers and the matrices of `parameters`, which get LoRA.
        weights: {layer: its tensor's name in the files}.
        parameters: {parameter: E} of stacks of experts and of matrices beside them, see `LoraAdapter`.
        kept: {parameter: tensor in the files} of what was trained and is kept whole.
        lost: {parameter: ‖Δ‖²} of what was trained and the adapter cannot hold, or is not to.
        squares: Σ ‖Δ‖² of what is kept whole.
        rank: the largest; None: a rank for servers.
        fields: of adapter_config.json.
        saved: the modules of `kept`, as PEFT names them.
        names: of all modules.
        shapes, dtypes, shards, settings: see `Work`; of factors, in a file for each layer until all are there.
    """

    base: ModelFiles
    tuned: ModelFiles
    layers: dict[str, bool]
    weights: dict[str, str]
    parameters: dict[str, int]
    kept: dict[str, str]
    lost: dict[str, float]
    squares: float
    rank: int | None
    fields: dict[str, Any]
    saved: list[str]
    names: list[str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    shards: list[tuple[str, list[str]]]
    settings: dict[str, Any]
    kind: str = field(default="adapter", init=False)

    @property
    def inputs(self) -> dict[str, ModelFiles]:
        """Both models."""
        return {TUNED: self.tuned, BASE: self.base}

    @property
    def verb(self) -> str:
        """What is done, for the progress bar."""
        return "extract"

    @property
    def labels(self) -> list[str]:
        """The names of a task's classes, if the adapter has its head."""
        names = list(map(str, (self.tuned.config.get("id2label") or {}).values()))
        given = names != [f"LABEL_{label}" for label in range(len(names))]
        return names if given and self.fields["task_type"] == "SEQ_CLS" and self.kept else []

    def manifest(self) -> dict[str, Any]:
        """The manifest of the adapter's folder."""
        labels = self.labels
        return {
            "kind": "adapter",
            "method": "extract",
            "base_model": self.fields["base_model_name_or_path"],
            "task_type": self.fields["task_type"],
            "rank": "serving" if self.rank is None else self.rank,
            "inputs": {name: {"source": one.source, "files": one.identity()} for name, one in self.inputs.items()},
            "modules": dict.fromkeys(self.kept, "kept whole") | dict.fromkeys(self.lost, "lost"),
            **({"num_labels": len(labels), "label_names": labels} if labels else {}),
            **self.settings,
            "command": command(),
            "versions": versions(),
        }


def plan_extract(
    base: str | Path,
    tuned: str | Path,
    *,
    rank: int | Literal["serving"],
    keep: Sequence[str],
    dtype: str,
) -> ExtractPlan:
    """Check everything, open all files, and compare what is no linear layer; see `extract_adapter`."""
    most = None if rank == "serving" else integer("rank", rank, 1)
    if isinstance(keep, str):
        raise TypeError(f"keep={keep!r} must be a list of kinds: {', '.join(KINDS)}")
    for one in keep:
        choice("kind of keep", one, KINDS)
    choice("dtype", dtype, get_args(FACTORS))
    every = {TUNED: ModelFiles(tuned), BASE: ModelFiles(base)}
    check_kinds(every)
    aligned = align(every, [TUNED])
    check_configs(every, aligned)
    files = every[TUNED]
    model = skeleton(files.folder / "config.json", files.config, architecture(files.config), len(files.tensors))
    if model is None:
        raise ValueError(
            f"{tuned} is of no class that transformers has, so its linear layers are not known: give a model of its own"
        )
    choose_text(every, [TUNED], None, "error", False)
    found = _Found(model, {aligned.canonical[name]: name for name in files.tensors}, aligned.ties or {}, every)
    found.sort_out()
    kept, saved, lost, squares = found.changed(set(keep))
    width = SERVING[-1] if most is None else most
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    shards: list[tuple[str, list[str]]] = []
    for number, (layer, turned) in enumerate(found.layers.items(), 1):
        rows, columns = files.tensors[found.weights[layer]].shape[-2:]
        o, n = (columns, rows) if turned else (rows, columns)
        r = min(width, o, n)
        parts: dict[str, tuple[int, ...]] = {f"{layer}|A": (r, n), f"{layer}|B": (o, r), f"{layer}|energy": (2,)}
        shapes |= parts
        dtypes |= {name: torch.float64 if name.endswith("|energy") else getattr(torch, dtype) for name in parts}
        shards.append((f"layer-{number:05d}.safetensors", list(parts)))
    if not found.layers:
        raise ValueError(f"{tuned} has no linear layer in common with {base}: there is nothing that LoRA could hold")
    return ExtractPlan(
        every[BASE], files, found.layers, found.weights, found.parameters, kept, lost, squares, most,
        _config(model, str(base)), saved, [name for name, _ in model.named_modules()], shapes, dtypes, shards,
        {"keep": sorted(keep), "dtype": dtype, "left_out": aligned.left_out,
         "read": {name: one.identity() for name, one in every.items()}},
    )  # fmt: skip


@dataclass
class _Found:
    """The parameters of a model, by what an adapter does with them.

    Attributes:
        model: on the meta device.
        names: {parameter: tensor in the files}.
        ties: {input: {tied parameter: the one that it copies}}.
        layers, weights, parameters: see `ExtractPlan`.
        rest: {parameter: its kind}; "biases" are those of linear layers.
    """

    model: "PreTrainedModel"
    names: dict[str, str]
    ties: Mapping[str, Mapping[str, str]]
    every: Mapping[str, ModelFiles]
    layers: dict[str, bool] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    rest: dict[str, str] = field(default_factory=dict)

    def sort_out(self) -> None:
        """Fill layers, weights and rest.

        Raises:
            ValueError: a tensor has another shape in the base, or lies in pieces in a file.
        """
        pieces = [name for name in self.names if PART in name]
        if pieces:
            raise ValueError(
                f"{pieces[0].partition(PART)[0]!r} lies in pieces in the files (experts one by one), which no LoRA "
                "targets: save both models anew, from_pretrained(…).save_pretrained(folder, save_original_format=False)"
            )
        prefix = self.model.base_model_prefix
        inner = f"{prefix}." if isinstance(getattr(self.model, prefix, None), nn.Module) else ""
        output = self.model.get_output_embeddings()
        base = self.every[BASE].tensors
        stacks = self._stacks()
        for place, module in self.model.named_modules():
            head = module is output or not place.startswith(inner)
            for leaf, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                name = f"{place}.{leaf}" if place else leaf
                if name not in self.names:  # tied to another, or no part of the file
                    continue
                tensor = self.names[name]
                linear = (isinstance(module, nn.Linear) or is_conv1d(module)) and not head and not self._refused(place)
                if linear and leaf == "weight" and tensor in base and is_matrix(base[tensor].shape):
                    self._check_shape(tensor)
                    self.layers[place], self.weights[place] = is_conv1d(module), tensor
                elif name in stacks:
                    self._check_shape(tensor)
                    self.parameters[name] = stacks[name]
                    turned = bool(stacks[name]) and bool(getattr(module, "is_transposed", False))
                    for layer in layers_of(name, stacks[name]):
                        self.layers[layer], self.weights[layer] = turned, tensor
                else:
                    self.rest[name] = "heads" if head else "biases" if place in self.layers else _kind(module)
        linear_layers = [one for one in self.layers if one not in owners(self.parameters)]
        for layer in taken_for_experts(self.model, linear_layers) if self.parameters else ():
            weight = f"{layer}.weight"
            self.parameters[weight] = 0
            self.layers[weight], self.weights[weight] = self.layers.pop(layer), self.weights.pop(layer)

    def _stacks(self) -> dict[str, int]:
        """{parameter: E} of stacks of experts, and 0 of matrices beside them in their modules."""
        files, base = self.every[TUNED], self.every[BASE].tensors
        shapes = {name: files.tensors[tensor].shape for name, tensor in self.names.items() if tensor in base}
        said = said_of({name: name for name in shapes}, self.model)
        found: dict[str, int] = {name: shapes[name][0] for name in expert_stacks(files.config, shapes, said)}
        modules = {name.rpartition(".")[0] for name in found}
        beside = [name for name in shapes if name.rpartition(".")[0] in modules and is_matrix(shapes[name])]
        return found | dict.fromkeys(beside, 0)

    def _refused(self, place: str) -> bool:
        """Whether PEFT refuses LoRA on a linear layer: fused kernels of Mamba read its weight past the layer."""
        return self.model.config.model_type in _MAMBA and place.endswith("out_proj")

    def _check_shape(self, tensor: str) -> None:
        shapes = [files.tensors[tensor].shape for files in self.every.values()]
        if shapes[0] != shapes[1]:
            one, other = ("×".join(map(str, shape)) for shape in shapes)
            raise ValueError(f"{shown(tensor)!r} is {one} in the tuned model and {other} in the base: other models")

    def changed(self, keep: set[str]) -> tuple[dict[str, str], list[str], dict[str, float], float]:
        """{parameter: tensor} to keep whole, its modules, {parameter: ‖Δ‖²} lost, and Σ ‖Δ‖² of what is kept.

        Raises:
            ValueError: the vocabularies have other sizes.
        """
        tied: dict[str, list[str]] = {}
        for target, source in self.ties.get(TUNED, {}).items():
            if target not in self.names and source in self.names:
                tied.setdefault(source, []).append(target)
        squares = {name: one for name in self.rest if (one := self._square(name)) > 0}
        wanted = {
            one.rpartition(".")[0]
            for name in squares
            if self.rest[name] in keep or (name in tied and "heads" in keep)
            for one in (name, *tied.get(name, ()))
        }
        task = _task_type(self.model)
        if any(self.rest.get(name) == "heads" and name.rpartition(".")[0] in wanted for name in squares):
            wanted |= {one for one in TASK_HEADS.get(str(task), ()) if one in dict(self.model.named_modules())}
        modules = self._modules(wanted)  # with the heads that PEFT saves by itself
        kept: dict[str, str] = {}
        for name in self.rest:
            for one in (name, *tied.get(name, ())):
                if any(one.startswith(f"{module}.") for module in modules):
                    kept[one] = self.names[name]
        lost = {name: one for name, one in squares.items() if name not in kept}
        return kept, modules, lost, sum(one for name, one in squares.items() if name in kept)

    def _modules(self, wanted: set[str]) -> list[str]:
        """The modules to save: none with a LoRA layer in it, none inside another, and all that PEFT takes by the name.

        PEFT takes a module whose name ends with the name given.
        """
        holders = {"", *(layer[:end] for layer in self.layers for end, one in enumerate(f"{layer}.") if one == ".")}
        free = [name for name, _ in self.model.named_modules(remove_duplicate=False) if name not in holders]
        found = sorted(wanted - holders)
        found = [name for name in free if name.endswith(tuple(found))] if found else []
        return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]

    def _square(self, name: str) -> float:
        """‖Δ‖² of a parameter; of one that the base has not, or has in another shape, ‖θ‖²."""
        tensor = self.names[name]
        tuned, base = self.every[TUNED], self.every[BASE]
        one, other = tuned.tensors[tensor], base.tensors.get(tensor)
        if other is not None and one.shape != other.shape:
            rows = [vocabulary_size(files.config) for files in (tuned, base)]
            if one.shape[1:] == other.shape[1:] and [one.shape[0], other.shape[0]] == rows:
                raise ValueError(
                    f"{shown(tensor)!r} has {rows[0]} rows in the tuned model and {rows[1]} in the base: vocabularies "
                    f"differ; give the base as many, model.resize_token_embeddings({rows[0]}), save it, and extract "
                    "against that"
                )
            if self.rest[name] != "heads":
                self._check_shape(tensor)
            other = None
        if not one.dtype.is_floating_point:
            return 0.0
        total = torch.zeros((), dtype=torch.float64)
        for start, stop in rows_of(one.rows, one.width):
            delta = tuned.read(tensor, start, stop).double()
            delta = delta if other is None else delta - base.read(tensor, start, stop).double()
            total += delta.square().sum()
        if not total.isfinite():
            raise ValueError(f"{shown(tensor)!r} holds NaN or Inf in the tuned model or the base: download it again")
        return float(total)


def rows_of(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of blocks of rows."""
    step = max(1, _ROWS // max(width, 1))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _kind(module: nn.Module) -> str:
    """The kind of a module that is no linear layer and no head."""
    if isinstance(module, nn.Embedding):
        return "embeddings"
    own = list(module.named_parameters(recurse=False))
    plain = not any(True for _ in module.children()) and all(one.dim() == 1 for _, one in own)
    return "norms" if plain else "others"


def _task_type(model: "PreTrainedModel") -> str | None:
    """PEFT's task type of a model's class."""
    name = type(model).__name__
    if name.endswith("ForConditionalGeneration") and model.config.is_encoder_decoder:
        return "SEQ_2_SEQ_LM" if model.main_input_name == "input_ids" else None  # Whisper's is not
    return next((kind for end, kind in _TASK_TYPES.items() if name.endswith(end)), None)


def _config(model: "PreTrainedModel", base: str) -> dict[str, Any]:
    """The fields of an adapter's config that say what it is of."""
    task = _task_type(model)
    repo, _, revision = base.partition("@") if not Path(base).exists() else (base, "", "")
    library = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return {
        "base_model_name_or_path": resolve_model(MODEL) if base == MODEL else located(repo),
        "revision": revision or None,
        "task_type": task,
        "auto_mapping": library if task is None else None,
        "fan_in_fan_out": any(is_conv1d(module) for module in model.modules()),
    }
