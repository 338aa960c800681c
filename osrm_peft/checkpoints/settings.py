"""Settings beside a tokenizer's tokens: read from files, compared, and written into a config.json."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from osrm_peft.checkpoints.config_checks import TOKEN_IDS, shown
from osrm_peft.io.json import read_object

_VERSIONS = ("transformers_version", "_from_model_config", "processor_class", "_processor_class",
             "image_processor_type", "feature_extractor_type", "auto_map", "use_cache")  # fmt: skip


def files_of(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """The files of a model's folder that match; sorted."""
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """The number of rows of the token embeddings: `vocab_size`, or the `vocab_size` of the text model in it."""
    inner = config.get("text_config")
    size = config.get("vocab_size", inner.get("vocab_size") if isinstance(inner, dict) else None)
    return size if isinstance(size, int) else None


def tokenizer_settings(tokenizer: Any) -> dict[str, Any]:
    """{name: value} of a tokenizer's settings besides its tokens, without those for padding and length."""
    found: dict[str, Any] = {"chat template": tokenizer.chat_template}
    for name, token in tokenizer.special_tokens_map.items():
        found[name] = sorted(map(str, token)) if isinstance(token, (list, tuple)) else str(token)
    for name in ("add_bos_token", "add_eos_token", "add_prefix_space", "do_lower_case"):
        found[name] = getattr(tokenizer, name, None) or None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        parts = json.loads(backend.to_str())
        found |= {name: parts.get(name) for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder")}
        merges = parts.get("model", {}).get("merges")
        found["merges"] = None if merges is None else hashlib.sha256(json.dumps(merges).encode()).hexdigest()
    return {name: value for name, value in found.items() if value is not None}


def json_settings(folder: Path, patterns: Sequence[str], strict: bool) -> dict[str, Any]:
    """Fields of the JSON files without defaults; a list of one entry counts as its entry.

    Args:
        strict: a missing field is a difference, as in generation_config.json, whose defaults are known.
    """
    found: dict[str, Any] = {} if strict else {"": None}
    files = files_of(folder, patterns)
    defaults = _generation_defaults() if strict and files else {}
    for path in files:
        for key, value in read_object(path).items():
            if key not in _VERSIONS and value is not None and value != defaults.get(key, False if strict else None):
                found[f"{path.name}: {key}"] = _one(value)
    return found


def same_files(folders: Sequence[Path], patterns: Sequence[str]) -> bool:
    """Whether the JSON files of all folders have the same names and contents, versions apart."""
    contents = [
        [
            (path.name, {key: value for key, value in read_object(path).items() if key not in _VERSIONS})
            for path in files_of(folder, patterns)
        ]
        for folder in folders
    ]
    return all(one == contents[0] for one in contents)


def _generation_defaults() -> dict[str, Any]:
    from transformers import GenerationConfig

    return GenerationConfig._get_default_generation_params()


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The fields that differ; among those that both have, if `one` is marked as not strict."""
    keys = one.keys() & other.keys() if "" in one else one.keys() | other.keys()
    return sorted(key for key in keys if one.get(key) != other.get(key))


def refuse_other(settings: Mapping[str, dict[str, Any]], names: Sequence[str], kind: str, rows: str | None) -> None:
    """Raise ValueError if the settings of these inputs differ; names a field, its values, and the way out."""
    for name in names[1:]:
        fields = differing(settings[names[0]], settings[name])
        if fields:
            one, two = (settings[each].get(fields[0]) for each in (names[0], name))
            also = f" (and {', '.join(map(shown, fields[1:4]))})" if fields[1:] else ""
            raise ValueError(
                f"{shown(fields[0])} is {_short(one)} in {names[0]!r}, {_short(two)} in {name!r}{also}: say "
                f"whose {kind} settings the result has, tokenizer={(rows or names[0])!r}"
                + ("" if rows else ", or another input's name")
            )


def _short(value: Any) -> str:
    text = "not set" if value is None else repr(value)
    return text if len(text) < 60 else text[:57] + "…"


def chosen_ids(configs: Mapping[str, Mapping[str, Any]], models: Sequence[str], asked: str | None) -> dict[str, Any]:
    """Token ids for config.json: those of the input `asked` for, else those of all models, which must agree."""
    if asked is not None:
        return _picked(configs[asked], True)
    found: dict[str, Any] = {}
    for name in models:
        _merge_ids(found, _picked(configs[name], False), name, models[0])
    return found


def _picked(config: Mapping[str, Any], empty: bool) -> dict[str, Any]:
    ids = {key: config.get(key) for key in TOKEN_IDS if empty or config.get(key) is not None}
    return ids | {key: _picked(value, empty) for key, value in config.items() if isinstance(value, dict)}


def _merge_ids(found: dict[str, Any], more: Mapping[str, Any], name: str, first: str, path: str = "") -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(found.get(key, {}), dict):
            _merge_ids(found.setdefault(key, {}), value, name, first, f"{path}{key}.")
        elif _one(found.setdefault(key, value)) != _one(value):
            raise ValueError(
                f"config.json: {shown(path + key)} is {_short(value)} in {name!r}, and {_short(found[key])} in those "
                f"before: say whose settings the result has, tokenizer={first!r}, or another input's name"
            )


def _one(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def with_ids(config: dict[str, Any], ids: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with these token ids (`Text.ids`)."""
    new = {key: with_ids(value, ids[key]) if isinstance(value, dict) and isinstance(ids.get(key), dict) else value
           for key, value in config.items()}  # fmt: skip
    for key in TOKEN_IDS:
        if key in ids:
            new[key] = ids[key]
            if ids[key] is None:
                del new[key]
    return new


def with_rows(config: dict[str, Any], rows: int | None) -> dict[str, Any]:
    """A config.json with this many rows of token embeddings, if it has the field (`vocabulary_size`)."""
    if rows is None or vocabulary_size(config) in (None, rows):
        return config
    if "vocab_size" in config:
        return config | {"vocab_size": rows}
    return config | {"text_config": config["text_config"] | {"vocab_size": rows}}
