"""carry_out: a work written file by file into a folder that is renamed at the end; an interrupted work can go on."""

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from osrm_peft.checkpoints.model_files import crc32_of
from osrm_peft.checkpoints.work import STATE, Maker, Work
from osrm_peft.checkpoints.writing import write_shard
from osrm_peft.hub.card import write_manifest
from osrm_peft.io.json import read_object, write_json
from osrm_peft.io.manifest import MANIFEST, check_replaceable
from osrm_peft.io.places import FULL, alone_in, check_space, put_in_place

# (folder, {weight file: its checksum in each of the work's folders}) → further fields of the manifest
Finish = Callable[[Path, Mapping[str, list[str]]], dict[str, Any]]


def carry_out(
    work: Work,
    make: Callable[[], Maker],
    finish: Finish,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    progress: bool = False,
) -> Path:
    """Write a work into a folder beside `out` that is renamed to it at the end.

    Args:
        make: what makes the tensors.
        finish: writes all but the weight files, manifest and card.
        out: links resolved (`check_replaceable`).
        resume, overwrite, verify, progress: see `merge_checkpoints`.

    Raises:
        FileExistsError: something else is in `out`, another process writes there, or an interrupted work is unfinished.
        ValueError: an input was changed meanwhile.
        OSError: the disk is full.
    """
    check_replaceable(out, work.kind, work.manifest(), overwrite)
    partial = out.with_name(f".{out.name}.merging")
    if not partial.exists():  # else a part of the result may be written already
        check_space(out, len(work.folders) * work.size_of(list(work.shapes)))
    with alone_in(partial):
        state = _state(partial, work, resume, overwrite)
        return _carry_out(work, make, finish, out, partial, state, overwrite, verify, progress)


def _carry_out(
    work: Work,
    make: Callable[[], Maker],
    finish: Finish,
    out: Path,
    partial: Path,
    state: dict[str, Any],
    overwrite: bool,
    verify: bool,
    progress: bool,
) -> Path:
    folders = work.folders
    missing = [name for file, names in work.shards if file not in state["crc32"] for name in names]
    _clear(partial, {partial / STATE, *(partial / folder / file for file in state["crc32"] for folder in folders)})
    check_space(out, len(folders) * work.size_of(missing))
    write_json(partial / STATE, state)
    with ExitStack() as stack:
        for files in work.inputs.values():
            stack.callback(files.close)
            if verify:
                files.verify()
        maker = make()
        stack.callback(maker.close)
        maker.summarise(state["summary"])
        if maker.summary is not None:
            state["summary"] = maker.summary
            write_json(partial / STATE, state)
        total = work.size_of([name for _, names in work.shards for name in names])
        with tqdm(total=total, desc=work.verb, unit="B", unit_scale=True, disable=not progress) as bar:
            for file, names in work.shards:
                if file not in state["crc32"]:
                    paths = [partial / folder / file for folder in folders]
                    try:
                        state["crc32"][file] = write_shard(work, maker, paths, names, bar)
                    except OSError as error:
                        if error.errno not in FULL:
                            raise
                        reason = f"{os.strerror(error.errno)}: {paths[0]} could not be written"
                        raise OSError(error.errno, f"{reason}; make room, and go on with resume (--resume)") from error
                    write_json(partial / STATE, state)
                else:
                    bar.update(work.size_of(names))
        work.check_unchanged()
        more = finish(partial, state["crc32"])
    written = {path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file()} - {STATE}
    written |= {MANIFEST, "README.md"}
    made = work.manifest()
    write_manifest(partial, made | more | {"files": sorted(written)})
    check_replaceable(out, work.kind, made, overwrite)  # the place may have changed meanwhile
    (partial / STATE).unlink()
    with alone_in(out) if out.is_dir() else nullcontext():  # the earlier result, until it is removed
        put_in_place(partial, out)
    return out


def _state(partial: Path, work: Work, resume: bool, overwrite: bool) -> dict[str, Any]:
    """The state of an interrupted merge, without files that are damaged, to go on with; or a new state."""
    state: dict[str, Any] = {"fingerprint": work.fingerprint(), "summary": None, "crc32": {}}
    if not (partial / STATE).is_file() or (overwrite and not resume):
        return state
    try:
        earlier = read_object(partial / STATE)
        done = {file: sums for file, sums in earlier["crc32"].items() if _sound(partial, file, work.folders, sums)}
        same = earlier.get("fingerprint") == state["fingerprint"]
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        if not resume:
            return state  # nothing that could be gone on with
        raise ValueError(f"{partial / STATE} is damaged ({error}): begin anew, without resume") from error
    if resume and not same:
        raise ValueError(
            f"{partial} is of another merge (other inputs or options): begin anew with overwrite=True (--overwrite), "
            "without resume"
        )
    finished = done if same else earlier["crc32"]
    if finished and not resume:
        what = "this merge" if same else "another merge"
        way = "go on with resume=True (--resume), or begin anew" if same else "begin anew"
        raise FileExistsError(
            f"{partial} holds {len(finished)} finished weight files of {what}, which was interrupted: {way} with "
            "overwrite=True (--overwrite)"
        )
    return state | {"summary": earlier.get("summary"), "crc32": done} if resume else state


def _sound(partial: Path, file: str, folders: list[str], sums: list[str]) -> bool:
    """Whether each folder has this weight file as it was written."""
    paths = [partial / folder / file for folder in folders]
    return all(path.is_file() and crc32_of(path) == one for path, one in zip(paths, sums, strict=True))


def _clear(partial: Path, kept: set[Path]) -> None:
    """Remove all but these files from the folder: what a killed process had half written."""
    for path in sorted(partial.rglob("*"), reverse=True):  # a folder comes after its content
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path not in kept:
            path.unlink()
