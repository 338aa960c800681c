"""BakePlan: an adapter to be written into its base model's weights, with all checks made before the first byte."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from osrm_peft.adapters.config import CONFIG, checked_config
from osrm_peft.adapters.keys import is_head, part_of, saved_modules
from osrm_peft.adapters.layouts import fused_in, model_of
from osrm_peft.adapters.load import config_in, load_adapter
from osrm_peft.adapters.lora_adapter import HEADS, WEIGHTS, LoraAdapter, shape_in, tensors_of
from osrm_peft.checkpoints.changes import Change, changes_by_peft, plain_changes
from osrm_peft.checkpoints.config_checks import shown
from osrm_peft.checkpoints.model_files import BESIDE, ModelFiles
from osrm_peft.checkpoints.names import PART, align
from osrm_peft.checkpoints.settings import vocabulary_size, with_ids, with_rows
from osrm_peft.checkpoints.shapes import BASE, OUTPUT_DTYPES
from osrm_peft.checkpoints.skeleton import architecture, skeleton
from osrm_peft.checkpoints.text import Text, choose_text
from osrm_peft.checkpoints.work import Work, named_shards
from osrm_peft.checks import choice, number
from osrm_peft.hub.sources import local_folder, pinned
from osrm_peft.io.manifest import command, versions
from osrm_peft.io.tensors import tensor_headers
from osrm_peft.models.identity import Base, common_base
from osrm_peft.models.loading import head_width

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

ADAPTER = "adapter"  # its name among the inputs
# fields of a LoRA config that make it more than s·B·A, and that PEFT's own layers merge
BY_PEFT = ("use_dora", "lora_bias", "target_parameters", "trainable_token_indices", "use_qalora", "use_bdlora")


@dataclass(frozen=True)
class Beside:
    """An adapter's folder, as far as a tokenizer beside it goes."""

    source: str
    folder: Path
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BakePlan(Work):
    """What `bake_adapter` will do.

    Attributes:
        files: the base model's.
        adapter: its folder.
        changes: {tensor of the result: what becomes of it}.
        places: {parameter in the model: the base's tensor}.
        of_base: {tensor of the result: the base's tensor}, without those that only the adapter has.
        scale: λ.
        shapes, dtypes, shards, settings: see `Work`.
        config: the result's config.json.
        text: whose tokenizer the result has.
    """

    files: ModelFiles
    adapter: Beside
    changes: dict[str, Change]
    places: dict[str, str]
    of_base: dict[str, str]
    scale: float
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    shards: list[tuple[str, list[str]]]
    config: dict[str, Any]
    text: Text
    settings: dict[str, Any]

    @property
    def inputs(self) -> dict[str, ModelFiles]:
        """The base model."""
        return {BASE: self.files}

    @property
    def verb(self) -> str:
        """What is done, for the progress bar."""
        return "bake"

    def manifest(self) -> dict[str, Any]:
        """The manifest of the result's folder."""
        return {
            "kind": "checkpoint",
            "method": "bake",
            "scale": self.scale,
            "inputs": {
                BASE: {"source": self.files.source, "files": self.files.identity()},
                ADAPTER: {"source": self.adapter.source, "files": _identity(self.adapter.folder)},
            },
            "text": self.text.manifest(),
            **self.settings,
            "command": command(),
            "versions": versions(),
        }


def _identity(folder: Path) -> dict[str, list[int]]:
    """{file: [size, time of change]} of an adapter."""
    found = {name: (folder / name).stat() for name in (CONFIG, WEIGHTS)}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}


def plan_bake(
    base: str | Path,
    adapter: str | Path,
    *,
    scale: float,
    task: str | None,
    tokenizer: str | None,
    dtype: str | None,
) -> BakePlan:
    """Check everything and open all files; see `bake_adapter` for arguments and errors."""
    scale = number("scale", scale)
    if dtype is not None:
        choice("dtype", dtype, OUTPUT_DTYPES)
    files = ModelFiles(base, dequantise=True)
    folder = local_folder(str(adapter), [CONFIG, WEIGHTS, "heads/*.safetensors", *BESIDE], "adapter")
    read = _read(adapter, folder, task)
    _say_base(read, str(base), files)
    original = architecture(files.config)
    files.config, model, changes = _fitted(read, files)
    beside = Beside(pinned(str(adapter), folder), folder, files.config)
    aligned = align({BASE: files}, [BASE])
    names = {aligned.canonical[name]: name for name in files.tensors}  # {parameter in the model: the base's tensor}
    ties = {} if aligned.ties is None else aligned.ties[BASE]
    shared = {target: source for target, source in ties.items() if target not in names and source in names}
    changes = {name if name in files.tensors else names.get(name, name): one for name, one in changes.items()}
    places = names | {target: names[source] for target, source in shared.items()}
    apart = _apart(changes, shared, names, lambda name: _whole(files, places[name]))
    other_class = model is not None and architecture(files.config) != original
    of_base = {name: name for name in files.tensors}
    if model is not None and other_class:  # then transformers' own names, and none that the class has not
        state = model.state_dict()
        of_base = {aligned.canonical[name]: name for name in files.tensors if aligned.canonical[name] in state}
        changes = {aligned.canonical.get(name, name): one for name, one in changes.items()}
        _check_whole(set(state) - set(of_base) - set(changes) - set(shared), files)
    left = sorted({*files.tensors} - {*of_base.values()} | {*aligned.left_out.get(BASE, [])})
    of_base |= {target: names[shared[target]] for target in apart}
    _check_changes(changes, of_base, files, aligned.canonical, read)
    shapes = {name: files.tensors[tensor].shape for name, tensor in of_base.items()}
    shapes |= {name: one.shape for name, one in changes.items() if one.shape is not None}
    config = _with_vocabulary(files.config, shapes, of_base, files)
    config = _untied(config, files, apart) if apart else config
    _check_state(shapes, config, files, {name: aligned.canonical.get(name, name) for name in shapes})
    text = choose_text({ADAPTER: beside, BASE: files}, [ADAPTER], tokenizer, "error", False)
    return BakePlan(
        files, beside, changes, places, of_base, scale, shapes, _dtypes(shapes, of_base, files, dtype),
        _shards(shapes, of_base, files), with_ids(config, text.ids), text,
        {"task": task, "dtype": dtype, "by": "osrm_peft" if read.plain is not None else "PEFT",
         "left_out": left, "untied": sorted(apart), "read": {BASE: files.identity(), ADAPTER: _identity(folder)}},
    )  # fmt: skip


def _check_whole(lacking: set[str], files: ModelFiles) -> None:
    """Raise ValueError for parameters of a class that neither the base nor the adapter has."""
    if lacking:
        raise ValueError(
            f"{files.source} lacks {min(lacking)!r}, which {architecture(files.config)} has, and the adapter has not "
            "trained it: it was drawn at random when the adapter was trained, so it cannot be baked"
        )


@dataclass(frozen=True)
class _Read:
    """An adapter as it was read.

    Attributes:
        plain: as LoRA that is s·B·A; None: PEFT's layers are needed.
        fields: its config.
        saved: {parameter: shape} of what was trained whole.
    """

    source: str
    folder: Path
    plain: LoraAdapter | None
    fields: dict[str, Any]
    saved: dict[str, tuple[int, ...]]


def _read(adapter: str | Path, folder: Path, task: str | None) -> _Read:
    """The adapter, its form checked.

    Raises:
        ValueError, FileNotFoundError: see `load_adapter`; PEFT's layers cannot merge it either.
    """
    fields: Any = config_in(folder) if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file() else None
    by_peft = isinstance(fields, dict) and (
        any(fields.get(name) for name in BY_PEFT) or fields.get("bias") in ("all", "lora_only")
    )
    if not by_peft:
        plain = load_adapter(adapter, task=task, require_single_task=True)
        saved = {name: shape_in(part, name) for part in (plain.heads, plain.modules) for name in part}
        return _Read(str(adapter), folder, plain, plain.config, saved)
    left = {name: fields.pop(name) for name in (*BY_PEFT, "bias") if name in fields}
    fields = checked_config(fields, str(adapter)) | left  # refuses all else that is not plain
    heads = sorted(file.stem for file in (folder / HEADS).glob("*.safetensors"))
    if heads:
        raise ValueError(
            f"{adapter} is a merge of {', '.join(heads)} on experts, which PEFT's layers bake a task at a time: write "
            f"one, load_adapter({str(adapter)!r}, task={(task or heads[0])!r}).save_pretrained(FOLDER), and bake that"
        )
    if task is not None:
        raise ValueError(f"{adapter} is one adapter, with no heads of several tasks: leave task={task!r} out")
    modules = saved_modules(fields)
    parts = {key: part_of(key, modules) for key in tensor_headers(folder / WEIGHTS)}
    shapes = tensor_headers(folder / WEIGHTS)
    saved = {part.name: shapes[key][0] for key, part in parts.items() if part.kind == "saved"}
    return _Read(str(adapter), folder, None, fields, saved)


def _say_base(read: _Read, base: str, files: ModelFiles) -> None:
    """Warn if the adapter names another base model."""
    named = read.fields.get("base_model_name_or_path")
    if not named:
        return
    try:
        common_base({ADAPTER: Base(named, read.fields.get("revision")), BASE: Base(base)}, None)
    except ValueError:
        logger.warning("%s was trained on %s, says its %s; it is baked into %s", read.source, named, CONFIG, base)


def _fitted(read: _Read, files: ModelFiles) -> tuple[dict[str, Any], "PreTrainedModel | None", dict[str, Change]]:
    """The config.json of the class that the adapter fits, its model on the meta device, and what the adapter changes.

    The class is the base's own, or that of the adapter's task if the base's lacks a layer or head of it.
    """
    classes = [architecture(files.config)]
    like = model_of(read.fields, str(files.folder))
    classes += [type(like).__name__] if like is not None else []
    failed: Exception | None = None
    for name in dict.fromkeys(classes):
        config = files.config if name is None else files.config | {"architectures": [name]}
        model = _skeleton(files, config)
        if model is not None:
            config = _with_labels(config, model, read)
            model = _skeleton(files, config)
        try:
            return config, model, _changes(read, model, files)
        except ValueError as error:
            failed = failed or error
    raise failed or ValueError(f"{files.source} is of no class that transformers has")


def _skeleton(files: ModelFiles, config: Mapping[str, Any]) -> "PreTrainedModel | None":
    """The model that a config.json of these files builds, on the meta device, with as many classes as it names."""
    labels = {} if not config.get("id2label") else {"num_labels": len(config["id2label"])}
    return skeleton(files.folder / "config.json", {**config, **labels}, architecture(config), len(files.tensors))


def _changes(read: _Read, model: "PreTrainedModel | None", files: ModelFiles) -> dict[str, Change]:
    """{parameter: what the adapter makes of it} in this model; raises ValueError if it does not fit."""
    if read.plain is None:
        if model is None:
            raise ValueError(
                f"{files.source} is of no class that transformers has, and {read.source} needs PEFT's layers"
            )
        changes = changes_by_peft(read.folder, read.source, model)
        layers = [name.rpartition(".")[0] for name in changes]
        heads = [name for name in changes if is_head(name, read.fields, layers)]
        return changes | {name: replace(changes[name], trained=False) for name in heads}
    adapter = read.plain if model is None else read.plain.named_as_in(model)
    if model is not None:
        known = {*tensors_of(model), *files.tensors}
        wanted = [*adapter.heads, *adapter.modules, *adapter.copies]
        lost = [name for name in wanted if name not in known]
        lost += [name for name in adapter.factors if not {f"{name}.weight", f"{name}.in_proj_weight"} & known]
        if lost and lost[0] in fused_in(model, lost):
            raise ValueError(
                f"the adapter {read.source} changes {lost[0]!r}, which {files.source} has in one piece with others: "
                "save the base anew, from_pretrained(…).save_pretrained(folder), which keeps experts one by one"
            )
        if lost:
            raise ValueError(
                f"{files.source} ({type(model).__name__}) has no {lost[0]!r}, which the adapter {read.source} changes "
                f"({len(lost)} of its {len(wanted) + len(adapter.factors)} parts are missing): it is of another base "
                f"model, {adapter.base_model}"
            )
    return plain_changes(adapter, model)


def _with_labels(config: dict[str, Any], model: "PreTrainedModel", read: _Read) -> dict[str, Any]:
    """A config.json with as many classes as the adapter's head has, and their names where they are known."""
    width = head_width(model, read.saved) if read.saved else None
    names = read.plain.label_names if read.plain is not None else None
    if width is None or (width == model.config.num_labels and not names):
        return config
    known = names if names and len(names) == width else [f"LABEL_{label}" for label in range(width)]
    return {key: value for key, value in config.items() if key != "num_labels"} | {
        "id2label": {str(label): name for label, name in enumerate(known)},
        "label2id": {name: label for label, name in enumerate(known)},
    }


def _whole(files: ModelFiles, name: str) -> Tensor:
    return files.read(name).view(files.tensors[name].shape)


def _apart(
    changes: dict[str, Change], shared: Mapping[str, str], names: Mapping[str, str], base: Callable[[str], Tensor]
) -> list[str]:
    """The tied tensors that the adapter changes otherwise than those they copy; changes that are alike become one."""
    apart = []
    for target, source in shared.items():
        one, other = changes.get(names[source]), changes.get(target)
        if one is None and other is None:
            continue
        if one is not None and other is not None and _alike(one, other, base):
            del changes[target]
        else:
            apart.append(target)
    return apart


def _alike(one: Change, other: Change, base: Callable[[str], Tensor]) -> bool:
    """Whether two parameters that have one value have one again."""
    if one.merged is not None and other.merged is not None:
        return torch.equal(one.merged(base), other.merged(base))
    pairs = [(one.value, other.value), (one.product, other.product)]
    if any((first is None) != (second is None) for first, second in pairs):
        return False
    values = one.value is None or other.value is None or torch.equal(one.value(), other.value())
    products = one.product is None or other.product is None or all(map(torch.equal, one.product(), other.product()))
    return values and products


def _check_changes(
    changes: Mapping[str, Change],
    of_base: Mapping[str, str],
    files: ModelFiles,
    canonical: Mapping[str, str],
    read: _Read,
) -> None:
    """Raise ValueError for a change of a tensor that the base has not, or has in another shape."""
    lost = [name for name, one in changes.items() if name not in of_base and (one.value is None or one.product)]
    if lost:
        parts = [name for name in canonical.values() if name.startswith(f"{lost[0]}{PART}")]
        raise ValueError(
            f"{files.source} holds no {lost[0]!r}, which the adapter {read.source} changes ({len(lost)} of "
            f"{len(changes)} tensors): "
            + (
                "its file has it in other pieces; save the base anew, "
                "from_pretrained(…).save_pretrained(folder, save_original_format=False)"
                if parts else "the adapter is of another base model"
            )
        )  # fmt: skip
    for name, one in changes.items():
        if one.product is None or name not in of_base:
            continue
        left, right = one.product()
        shape = one.shape or files.tensors[of_base[name]].shape
        rows, width = (shape[0] if len(shape) > 1 else 1), torch.Size(shape).numel() // max(shape[0], 1)
        if (len(left), right.shape[1]) != (rows, width):
            raise ValueError(
                f"{name!r} is {rows}×{width} in {files.source} and {len(left)}×{right.shape[1]} in the adapter "
                f"{read.source}: it is of another base model"
            )


def _with_vocabulary(
    config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], of_base: Mapping[str, str], files: ModelFiles
) -> dict[str, Any]:
    """A config.json with the rows that the adapter gives the token embeddings."""
    rows = vocabulary_size(config)
    grown = {
        shapes[name][0] for name, tensor in of_base.items()
        if shapes[name] != files.tensors[tensor].shape and files.tensors[tensor].shape[:1] == (rows,)
    }  # fmt: skip
    return with_rows(config, grown.pop()) if len(grown) == 1 else config


def _untied(config: dict[str, Any], files: ModelFiles, apart: Sequence[str]) -> dict[str, Any]:
    """A config.json under which these tensors are tensors of their own."""
    inner = config.get("text_config")
    untied = config | {"tie_word_embeddings": False}
    if isinstance(inner, dict) and "tie_word_embeddings" in inner:
        untied |= {"text_config": inner | {"tie_word_embeddings": False}}
    model = _skeleton(files, untied)
    tied = {} if model is None else model.get_expanded_tied_weights_keys(all_submodels=True)
    still = sorted(set(apart) & set(tied))
    if still:
        raise ValueError(
            f"{type(model).__name__} ties {still[0]!r} to {tied[still[0]]!r}, and the adapter changes one of them: no "
            "model has both; train it with ensure_weight_tying=True"
        )
    logger.warning("the adapter changes one of two tied weights: %s is a tensor of its own now", ", ".join(apart))
    return untied


def _check_state(
    shapes: Mapping[str, tuple[int, ...]], config: dict[str, Any], files: ModelFiles, canonical: Mapping[str, str]
) -> None:
    """Raise ValueError for a tensor of another shape than the model that its configuration builds has."""
    model = _skeleton(files, config)
    state = {} if model is None else {name: tuple(one.shape) for name, one in model.state_dict().items()}
    for name, shape in shapes.items():
        wanted = state.get(canonical[name], shape)
        if shape != wanted:
            raise ValueError(
                f"{shown(name)!r} would be {'×'.join(map(str, shape))}, and a {type(model).__name__} of its "
                f"config.json has {'×'.join(map(str, wanted))}: the adapter is of another base model"
            )


def _dtypes(
    shapes: Mapping[str, tuple[int, ...]], of_base: Mapping[str, str], files: ModelFiles, dtype: str | None
) -> dict[str, torch.dtype]:
    """{tensor: dtype} of the result: the base's own, and for what only the adapter has the base's most common."""
    own = {name: files.tensors[of_base[name]].dtype for name in shapes if name in of_base}
    floats = [one for one in own.values() if one.is_floating_point]
    usual = max(set(floats), key=lambda one: (floats.count(one), str(one)), default=torch.float32)
    asked = None if dtype is None else getattr(torch, dtype)
    found = {name: own.get(name, usual) for name in shapes}
    return {name: asked if asked is not None and one.is_floating_point else one for name, one in found.items()}


def _shards(
    shapes: Mapping[str, tuple[int, ...]], of_base: Mapping[str, str], files: ModelFiles
) -> list[tuple[str, list[str]]]:
    """[(file name, its tensors)]: as in the base's files; what only the result has lies in the last."""
    paths = sorted(files.paths)
    groups: dict[Path, list[str]] = {path: [] for path in paths}
    for name in shapes:
        added = name not in of_base or (of_base[name] != name and of_base[name] in shapes)
        path = paths[-1] if added else files.tensors[of_base[name]].path
        groups[path].append(name)
    return named_shards([names for names in groups.values() if names])
