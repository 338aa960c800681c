"""Writing so that a file or folder is complete or absent: to a temporary name first, then renamed."""

import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "osrm_peft.json"  # in every folder of ours: how it was made
# {kind in the manifest: all names that such a folder of ours may hold}; a checkpoint's manifest lists its own
CONTENTS = {
    "adapter": {"adapter_config.json", "adapter_model.safetensors", "README.md", MANIFEST},
    "emr": {"emr.safetensors", "README.md", MANIFEST, "heads"},
    "merged": {"adapter_config.json", "adapter_model.safetensors", "README.md", MANIFEST, "heads"},
}


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | Path, kind: str) -> Iterator[Path]:
    """A temporary folder beside `path`, renamed to it when the block ends without an error.

    Args:
        kind: `"adapter"`, `"merged"` or `"emr"`, as the manifest in the folder will say.

    Raises:
        FileExistsError: see `check_replaceable`.
    """
    path = Path(path).resolve()  # of a link, the folder behind it is replaced
    check_replaceable(path, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    partial.chmod(0o755)
    try:
        yield partial
        put_in_place(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def put_in_place(partial: Path, path: Path) -> None:
    """Rename a finished folder to `path`; what is there must be replaceable (`check_replaceable`)."""
    if not path.exists():
        partial.replace(path)
        return
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    path.replace(old)
    partial.replace(path)
    shutil.rmtree(old)


def check_replaceable(path: str | Path, kind: str) -> None:
    """Refuse a path that holds anything but an earlier result of the same kind, whole and nothing else.

    Raises:
        FileExistsError: `path` or one of its parents is a file, or the folder holds something else.
    """
    path = Path(path).resolve()
    for place in (path, *path.parents):
        if place.is_file():
            raise FileExistsError(f"{place} is a file, so {path} cannot be a folder: name another")
    if not path.is_dir() or not any(path.iterdir()):
        return
    manifest = read_manifest(path)
    if manifest.get("kind") != kind:
        raise FileExistsError(
            f"{path} exists and is not a folder that osrm_peft wrote as {kind!r} (its {MANIFEST} would say so): "
            "name a new folder, or remove it yourself"
        )
    if kind in CONTENTS:
        foreign = sorted({entry.name for entry in path.iterdir()} - CONTENTS[kind])
    else:
        there = {entry.relative_to(path).as_posix() for entry in path.rglob("*") if not entry.is_dir()}
        foreign = sorted(there - set(manifest.get("files", [])))
    if foreign:
        raise FileExistsError(
            f"{path} holds files of others ({', '.join(foreign[:4])}): replacing it would lose them; "
            "name a new folder, or remove them yourself"
        )


def check_space(out: Path, needed: int) -> None:
    """Raise OSError if the disk has no room for so many bytes."""
    place = next(parent for parent in [out, *out.parents] if parent.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OSError(
            f"the result takes {needed / 2**30:.2f} GiB and the disk of {place} has {free / 2**30:.2f} GiB free: "
            "make room, or name another folder"
        )


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a folder that we wrote; empty where there is none.

    Raises:
        ValueError: there is one, but it is damaged.
    """
    path = Path(folder) / MANIFEST
    return read_object(path) if path.is_file() else {}


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        ValueError: it is damaged, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: expected a JSON object")
    return content


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented JSON, complete or not at all."""
    with new_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def command() -> str | None:
    """The command line, if it is one of ours; None in other programs."""
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
