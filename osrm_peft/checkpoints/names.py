"""Names: gives each tensor one name in all inputs, as transformers renames it when it loads the file."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from osrm_peft.checkpoints.model_files import ModelFiles
from osrm_peft.checkpoints.skeleton import architecture, skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PART = " from "  # joins the name of a tensor that transformers builds from several, and the name of a part
_ROWS = 2**22  # bytes of each tensor that are compared at once
_BEGINNING = 2**10  # entries that tell one tensor from another
_OTHER_SPELLING = re.compile(r"(^|\.)(gamma|beta|weight_[gv]|parametrizations)($|\.)")  # of some version of torch
# fields of config.json on which no name depends
_NOTES = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "id2label", "label2id", "use_cache")


@dataclass(frozen=True)
class Names:
    """The names of the inputs' tensors.

    Attributes:
        canonical: {name in the result: transformers' name, or its name of the whole, PART and the part's name}.
        spelled: {input: {name in the result: name in its file}}, where they differ.
        left_out: {input: its tensors that no model has, or that transformers does not load}.
        ties: {input: {tied tensor: the tensor that it copies}}, by its configuration; None: unknown to transformers.
    """

    canonical: dict[str, str] = field(default_factory=dict)
    spelled: dict[str, dict[str, str]] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    ties: dict[str, dict[str, str]] | None = None

    def where(self, name: str, tensor: str) -> str:
        """A tensor's name in an input's file, from its name in the result."""
        return self.spelled.get(name, {}).get(tensor, tensor)


def as_spelled(every: Mapping[str, ModelFiles]) -> Names | None:
    """The names of files that `align` would leave as they are, whatever the model: transformers is not imported.

    All inputs have one configuration and the same names of floats, none twice in two spellings. And in one input no two
    tensors are equal, so that no tensor is a tied copy.

    Returns:
        Names, the `canonical` ones as in the files; None: transformers is to be asked.
    """
    first, *others = every.values()
    kinds = {name: (entry.shape, entry.dtype) for name, entry in first.tensors.items()}
    for one in others:
        if _without_notes(one.config) != _without_notes(first.config):
            return None
        if {name: (entry.shape, entry.dtype) for name, entry in one.tensors.items()} != kinds:
            return None
    twice = any(_OTHER_SPELLING.search(name) or kinds.keys() & _endings(name) for name in kinds)
    floats = all(dtype.is_floating_point for _, dtype in kinds.values())
    if twice or not floats or not any(map(_all_differ, every.values())):
        return None
    return Names({name: name for name in kinds}, ties={name: {} for name in every})


def _without_notes(config: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in config.items() if key not in _NOTES}


def _endings(name: str) -> set[str]:
    """The name without its first part, without its first two, …"""
    parts = name.split(".")
    return {".".join(parts[start:]) for start in range(1, len(parts))}


def _all_differ(files: ModelFiles) -> bool:
    """Whether no two tensors of one shape and dtype begin alike."""
    seen: set[tuple] = set()
    for name, entry in files.tensors.items():
        rows = max(1, _BEGINNING // max(entry.width, 1))
        seen.add((entry.shape, entry.dtype, _bytes(files, name, 0, rows).numpy().tobytes()))
    return len(seen) == len(files.tensors)


def align(every: Mapping[str, ModelFiles], models: Iterable[str]) -> Names:
    """Give the tensors of all inputs the same names (`ModelFiles.tensors` is replaced), without reading more than ties.

    The names are those in the models' files, if these agree: programs that load the models then load the result.
    Else they are transformers' own. Left out are: tied tensors that are copies in all inputs; tensors that
    `from_pretrained` ignores, unless all inputs have them alike; and tensors that only the base has. A tied tensor that
    is no copy in one input is a tensor of its own in all; so is a tensor that only the base's configuration ties.

    Args:
        every: {name: files} of the models and their base.
        models: names of the models.

    Raises:
        ValueError: one tensor under two names in one file; or a configuration that transformers cannot build.
    """
    models = list(models)
    class_name = _reference(every, models)
    built = {name: _model(one, class_name) for name, one in every.items()}
    like = next((built[name] for name in models if built[name] is not None), None)
    found = {name: _canonical(one, like) for name, one in every.items()}
    left_out: dict[str, list[str]] = {name: [] for name in every}
    ties = None
    if like is not None:
        _drop_ignored(every, found, like, left_out)
        ties = {name: (one or like).get_expanded_tied_weights_keys(all_submodels=True) for name, one in built.items()}
        _share_ties(every, found, ties)
        _untie(found, ties, models)
    of_models = {one for name in models for one in found[name]}
    for name in set(every) - set(models):
        left_out[name] += [found[name].pop(one) for one in sorted(set(found[name]) - of_models)]
    written = _written(found, models)
    for name, one in every.items():
        one.tensors = {written[canonical]: one.tensors[spelled] for canonical, spelled in found[name].items()}
    return Names(
        {written[one]: one for one in of_models},
        {
            name: {written[one]: own for one, own in names.items() if own != written[one]}
            for name, names in found.items()
        },
        {name: sorted(names) for name, names in left_out.items() if names},
        ties,
    )


def _reference(every: Mapping[str, ModelFiles], models: list[str]) -> str | None:
    """The class that knows the most tensors: that of a model with a head rather than the bare model's."""
    classes = {name: architecture(every[name].config) for name in models}
    known = list(dict.fromkeys(one for one in classes.values() if one is not None))
    if len(known) < 2:
        return known[0] if known else None

    def knows(class_name: str) -> int:
        name = next(name for name, one in classes.items() if one == class_name)
        model = _model(every[name], class_name)
        state = set() if model is None else set(model.state_dict())
        return sum(one.partition(PART)[0] in state for name in models for one in _canonical(every[name], model))

    return max(known, key=knows)


def _model(files: ModelFiles, class_name: str | None) -> "PreTrainedModel | None":
    return skeleton(files.folder / "config.json", files.config, class_name, len(files.tensors))


def _canonical(files: ModelFiles, model: "PreTrainedModel | None") -> dict[str, str]:
    """{canonical name: name in the file}, in the file's order."""
    if model is None:
        return {name: name for name in files.tensors}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        apply_renamings,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, str] = {}
    for name in sorted(files.tensors, key=dot_natural_key):  # some renamings depend on the names before
        new, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if new not in state and name in state:
            new, pattern = rename_source_key(name, [], [], prefix, state)
        if pattern is not None:
            new += PART + apply_renamings(name, renamings).removeprefix(f"{prefix}.")
        if new in found:
            raise ValueError(
                f"{files.tensors[name].path} holds {found[new]!r} and {name!r}, which are both {new!r} to "
                "transformers: remove one of them"
            )
        found[new] = name
    place = {name: index for index, name in enumerate(files.tensors)}
    return dict(sorted(found.items(), key=lambda item: place[item[1]]))


def _drop_ignored(
    every: Mapping[str, ModelFiles],
    found: dict[str, dict[str, str]],
    model: "PreTrainedModel",
    left: dict[str, list[str]],
) -> None:
    """Leave out the tensors that `from_pretrained` ignores, unless all inputs have them alike."""
    buffers = {name for name, _ in model.named_buffers()}
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    patterns |= {r"rotary_emb\.inv_freq"} if any(name.endswith("rotary_emb.inv_freq") for name in buffers) else set()
    patterns |= {r"(^|\.)position_ids$"} if any(name.endswith("position_ids") for name in buffers) else set()
    ignored, state = [re.compile(pattern) for pattern in patterns], model.state_dict()
    for one in {one for names in found.values() for one in names if one not in state}:
        if any(pattern.search(one) for pattern in ignored):
            entries = [every[name].tensors[names[one]] for name, names in found.items() if one in names]
            kinds = {(entry.shape, entry.dtype) for entry in entries}
            if len(entries) < len(found) or len(kinds) > 1 or not entries[0].dtype.is_floating_point:
                for name, names in found.items():
                    if one in names:
                        left[name].append(names.pop(one))


def _share_ties(
    every: Mapping[str, ModelFiles], found: dict[str, dict[str, str]], ties: dict[str, dict[str, str]]
) -> None:
    """Leave out copies of tied tensors; if a tied tensor is no copy in some input, give all inputs their own."""
    own: set[tuple[str, str]] = set()
    copies: dict[tuple[str, str], list[str]] = {}
    for name, names in found.items():
        for target, source in ties[name].items():
            if target in names and source not in names:  # the file has it under the copy's name
                names[source] = names.pop(target)
            if target in names:
                alike = _equal(every[name], names[target], names[source])
                copies.setdefault((target, source), []).append(name)
                own |= set() if alike else {(target, source)}
    for (target, source), holders in copies.items():
        for name, names in found.items():
            if (target, source) in own:
                if source in names:
                    names.setdefault(target, names[source])
            elif name in holders:
                del names[target]


def _untie(found: dict[str, dict[str, str]], ties: dict[str, dict[str, str]], models: list[str]) -> None:
    """Give a base with a tied head a copy of its own, if the models' heads are not tied."""
    for name in set(found) - set(models):
        for target, source in list(ties[name].items()):
            if all(target not in ties[model] and target in found[model] for model in models) and source in found[name]:
                found[name].setdefault(target, found[name][source])
                del ties[name][target]


def _equal(files: ModelFiles, one: str, other: str) -> bool:
    """Whether two tensors of a file are the same to the bit."""
    first, second = files.tensors[one], files.tensors[other]
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    step = max(1, _ROWS // max(first.width * first.dtype.itemsize, 1))
    pairs = ((start, start + step) for start in range(0, first.rows, step))
    return all(torch.equal(_bytes(files, one, *pair), _bytes(files, other, *pair)) for pair in pairs)


def _bytes(files: ModelFiles, name: str, start: int, stop: int) -> torch.Tensor:
    return files.read(name, start, stop).view(-1).view(torch.uint8)


def _written(found: Mapping[str, Mapping[str, str]], models: list[str]) -> dict[str, str]:
    """{canonical name: name in the result}."""
    spellings: dict[str, list[str]] = {}
    for name in [*models, *found]:
        for canonical, spelled in found[name].items():
            spellings.setdefault(canonical, []).append(spelled)
    of_models = [found[name] for name in models]
    alike = all(len({names[one] for names in of_models if one in names}) < 2 for one in spellings)
    written: dict[str, str] = {}
    taken: set[str] = set()
    for canonical, each in spellings.items():
        name = each[0] if alike or PART in canonical else canonical
        written[canonical] = canonical if name in taken else name
        taken.add(written[canonical])
    return written
