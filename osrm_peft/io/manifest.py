"""osrm_peft.json, which says how we made a folder, and folders that are written whole or not at all."""

import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from osrm_peft import checks
from osrm_peft.io.json import read_object
from osrm_peft.io.places import beside, check_folder, put_in_place

MANIFEST = "osrm_peft.json"  # in every folder that we write: how it was made
# {kind in the manifest: all names that such a folder may hold}; a checkpoint's manifest lists its own
CONTENTS = {
    "adapter": {"adapter_config.json", "adapter_model.safetensors", "README.md", MANIFEST},
    "emr": {"emr.safetensors", "README.md", MANIFEST, "heads"},
    "merged": {"adapter_config.json", "adapter_model.safetensors", "README.md", MANIFEST, "heads"},
}

_FIELDS = {
    "kind": str, "base_model": str, "task": str, "task_type": str, "method": str, "inputs": dict, "options": dict,
    "files": list | dict, "scores": list, "log": list, "versions": dict, "energy_kept": dict, "serving": dict,
    "scale": int | float, "num_labels": int, "crc32": dict, "label_names": list | dict, "data": dict,
}  # fmt: skip

# Fields of a manifest that say how a result was made, besides its inputs
_MADE_FROM = (
    "method", "options", "scale", "weights", "space", "rank", "seed", "heads", "modules_policy", "vocab", "dtype",
    "base_model", "statistics", "features", "projected", "task",
)  # fmt: skip


@contextmanager
def new_folder(
    path: str | Path, kind: str, made: Mapping[str, Any] | None = None, overwrite: bool = False
) -> Iterator[Path]:
    """A temporary folder beside `path`, renamed to it when the block ends without an error.

    Args:
        kind: the kind in the folder's manifest: `"adapter"`, `"merged"` or `"emr"`.

    Raises:
        FileExistsError: see `check_replaceable`.
    """
    path = check_replaceable(path, kind, made, overwrite)  # the folder behind a link is replaced, not the link
    with beside(path) as folder:
        partial = folder / path.name
        partial.mkdir()
        yield partial
        put_in_place(partial, check_replaceable(path, kind, made, overwrite))  # the place may have changed meanwhile


def check_replaceable(
    path: str | Path, kind: str, made: Mapping[str, Any] | None = None, overwrite: bool = False
) -> Path:
    """Refuse a path that holds anything but an earlier result of the same kind, made in the same way.

    Args:
        kind: `"adapter"`, `"merged"`, `"emr"` or `"checkpoint"`.
        made: the manifest of the result that is to be written: an earlier one that was made otherwise, or that has
            scores, is refused. None: only the kinds are compared.
        overwrite: replace it all the same.

    Returns:
        The path, links resolved.

    Raises:
        FileExistsError: `path` or one of its parents is no folder (`check_folder`), or the folder holds something else.
        PermissionError: see `check_folder`.
    """
    path = check_folder(path)
    kinds = [path.is_mount() and "a file system of its own", _runs_in(path) and "the folder that this runs in"]
    for what in filter(None, kinds):
        raise FileExistsError(f"{path} is {what}, which no other can take the place of: name a folder in it")
    if not path.is_dir() or not any(path.iterdir()):
        return path
    manifest = read_manifest(path)
    if manifest.get("kind") != kind:
        raise FileExistsError(
            f"{path} exists and is not a folder that osrm_peft wrote as {kind!r} (its {MANIFEST} would say so): "
            "name a new folder, or remove it yourself"
        )
    ours = set(manifest.get("files") or []) if kind not in CONTENTS else CONTENTS[kind]
    ours = ours | {f"heads/{task}.safetensors" for task in manifest.get("inputs") or {}}  # CONTENTS stays as it is
    files = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_symlink() or not file.is_dir()}
    foreign = sorted(files - ours)
    if foreign:
        raise FileExistsError(
            f"{path} holds files of others ({', '.join(foreign[:4])}): replacing it would lose them; "
            "name a new folder, or remove them yourself"
        )
    lost = None if made is None or overwrite else what_is_lost(manifest, made)
    if lost:
        raise FileExistsError(
            f"{path} holds another result ({lost}), which would be lost: name a new folder, or replace it with "
            "overwrite=True (--overwrite)"
        )
    return path


def what_is_lost(earlier: Mapping[str, Any], made: Mapping[str, Any]) -> str | None:
    """What of an earlier result the one to be written has not: other inputs, another method or options, scores."""
    made = json.loads(json.dumps(made))
    for name in _MADE_FROM:
        if earlier.get(name) != made.get(name):
            return f"{name} {checks.shown(earlier.get(name))}, not {checks.shown(made.get(name))}"
    before, now = _inputs(earlier), _inputs(made)
    for task in before.keys() | now.keys():
        if before.get(task) != now.get(task):
            return f"{task!r} from another input" if before.keys() == now.keys() else f"of {', '.join(before)}"
    scores = {score["task"] for score in earlier.get("scores") or [] if isinstance(score, Mapping)}
    return f"scores of {', '.join(sorted(scores))}" if scores and not made.get("scores") else None


def _inputs(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """{name: what identifies an input: the hash of its weights, its files, or where it is from}."""
    inputs = manifest.get("inputs") or {}
    return {name: about.get("sha256") or about.get("files") or about.get("source") for name, about in inputs.items()}


def _runs_in(folder: Path) -> bool:
    try:
        return Path.cwd().is_relative_to(folder)
    except FileNotFoundError:  # the working directory is gone
        return False


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a folder that we wrote; empty without a manifest.

    Raises:
        ValueError: the manifest is damaged.
    """
    path = Path(folder) / MANIFEST
    content = read_object(path) if path.is_file() else {}
    try:
        check_manifest(content)
    except ValueError as error:
        raise ValueError(f"the manifest {MANIFEST} is damaged ({error}): write {folder} anew") from error
    return content


def label_names_in(manifest: Mapping[str, Any], task: str | None = None) -> tuple[str, ...] | None:
    """The names of an adapter's classes in its manifest, or in a merge's manifest those of a task; None without."""
    found = manifest.get("label_names")
    names = found.get(task) if isinstance(found, dict) else found
    return tuple(names) if names else None


def check_manifest(content: Mapping[str, Any]) -> None:
    """Check that each field of a manifest has the type that we write.

    Raises:
        ValueError: names the first field that has another, and its value.
    """
    for name, kinds in _FIELDS.items():
        if content.get(name) is not None:
            checks.kind(name, content[name], kinds)
    label_names = content.get("label_names") or []
    for names in label_names.values() if isinstance(label_names, dict) else [label_names]:  # of a merge, by task
        for one in checks.kind("label_names", names, list):
            checks.kind("a name among label_names", one, str)
    for task, one in (content.get("inputs") or {}).items():
        checks.kind(f"inputs of {task!r}", one, dict)
    if isinstance(content.get("files"), list):
        for one in content["files"]:
            checks.kind("a name among files", one, str)


def command() -> str | None:
    """The command line, if it is `osrm-peft`'s; None in other programs."""
    program = Path(sys.argv[0])
    ours = program.name == "osrm-peft" or program.parts[-2:] == ("osrm_peft", "__main__.py")
    return shlex.join(["osrm-peft", *sys.argv[1:]]) if ours else None


def versions() -> dict[str, str]:
    """Versions that a result file records."""
    names = (
        "osrm_peft",
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "datasets",
        "evaluate",
        "safetensors",
    )
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
