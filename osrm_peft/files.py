"""Writing so that a file or folder is complete or absent: to a temporary name first, then renamed."""

import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ADAPTER_NOTES = "osrm_config.json"  # beside an adapter: OSRM's settings and provenance
MANIFEST = "osrm_peft.json"  # in every merged folder: how it was made
OURS = (ADAPTER_NOTES, MANIFEST)


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
def new_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path`, renamed to it when the block ends without an error.

    Raises:
        FileExistsError: see `check_replaceable`.
    """
    path = Path(path)
    check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    partial.chmod(0o755)
    try:
        yield partial
        if path.exists():  # ours, or empty (checked above)
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            path.replace(old)
            partial.replace(path)
            shutil.rmtree(old)
        else:
            partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_replaceable(path: str | Path) -> None:
    """Refuse a path that we would overwrite although we did not write it.

    Raises:
        FileExistsError: `path` is a file, or a non-empty folder without one of our marker files.
    """
    path = Path(path)
    if path.is_file():
        raise FileExistsError(f"{path} is a file: name a new folder")
    if path.is_dir() and any(path.iterdir()) and not any((path / name).is_file() for name in OURS):
        raise FileExistsError(
            f"{path} exists and was not written by osrm_peft (no {' or '.join(OURS)} in it): "
            "name a new folder, or remove it yourself"
        )


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented JSON, complete or not at all."""
    with new_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
