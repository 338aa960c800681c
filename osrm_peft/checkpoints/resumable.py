"""carry_out: a work written file by file into a folder that is renamed at the end; an interrupted work can go on.

Processes that share a work write a part of its files each (`carry_out_part`), before one of them carries it out.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
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

_PART = "part-"  # in the folder of an unfinished result, the folder of a part's state
_TRIES = 150  # 30 seconds

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
    partial = _partial(out)
    if not partial.exists():  # else a part of the result may be written already
        check_space(out, len(work.folders) * work.size_of(list(work.shapes)))
    with alone_in(partial), ExitStack() as parts:
        for folder in partial.glob(f"{_PART}*/"):
            parts.enter_context(alone_in(folder))
        state = _state([partial / STATE, *sorted(partial.glob(f"{_PART}*/{STATE}"))], partial, work, resume, overwrite)
        write_json(partial / STATE, state)  # before those of parts go
        kept = {partial / folder / file for file in state["crc32"] for folder in work.folders}
        _clear(partial, {partial / STATE, *kept})
        _write(work, make, state, partial, partial, work.shards, verify, progress)
        return _put(work, finish, out, partial, state, overwrite)


def carry_out_part(
    work: Work,
    make: Callable[[], Maker],
    out: Path,
    part: tuple[int, int],
    *,
    overwrite: bool = False,
    verify: bool = True,
    progress: bool = False,
) -> None:
    """Write the i-th of every n weight files; `carry_out` with `resume` writes what is missing then, and all the rest.

    A part that was interrupted goes on when it is called again. What a method sums up over the whole model, each part
    sums up itself.

    Args:
        part: (i, n), i from 1 to n.
        out: see `carry_out`.
        overwrite: begin this part anew.
        verify, progress: see `merge_checkpoints`.

    Raises:
        FileExistsError: something is in `out`, or another process writes this part, or the whole.
        ValueError, OSError: see `carry_out`.
    """
    partial = _partial(out)
    place = partial / f"{_PART}{part[0]}-of-{part[1]}"
    with ExitStack() as stack:
        with _entered(partial):
            check_replaceable(out, work.kind, work.manifest(), overwrite)
            if not overwrite and out.is_dir() and any(out.iterdir()):
                with suppress(OSError):  # not empty: the lock did not make it
                    partial.rmdir()
                raise FileExistsError(f"{out} is there already: nothing is left for part {part[0]} of {part[1]}")
            stack.enter_context(alone_in(place))
            _check_alike(partial, work)
        state = _state([place / STATE], partial, work, not overwrite, overwrite)
        write_json(place / STATE, state)
        _write(work, make, state, partial, place, work.shards[part[0] - 1 :: part[1]], verify, progress)


def _partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.merging")


@contextmanager
def _entered(partial: Path) -> Iterator[None]:
    """The lock of the whole, which other parts have for a moment each."""
    with ExitStack() as stack:
        for left in reversed(range(_TRIES)):
            try:
                stack.enter_context(alone_in(partial))
                break
            except FileExistsError:
                if not left:
                    raise
                time.sleep(0.2)
        yield


def _check_alike(partial: Path, work: Work) -> None:
    """Raise FileExistsError if the folder holds files of another merge."""
    for file in (partial / STATE, *partial.glob(f"{_PART}*/{STATE}")):
        with suppress(ValueError, AttributeError):  # damaged: nothing that could be mixed up
            if file.is_file() and read_object(file).get("fingerprint") != work.fingerprint():
                raise FileExistsError(
                    f"{partial} holds a part of another merge (other inputs or options): finish that first, remove the "
                    "folder, or name another --out"
                )


def _write(
    work: Work,
    make: Callable[[], Maker],
    state: dict[str, Any],
    partial: Path,
    place: Path,
    shards: Sequence[tuple[str, list[str]]],
    verify: bool,
    progress: bool,
) -> None:
    """Write those of the shards that are missing into `partial`, each noted in the state file in `place`."""
    folders = work.folders
    missing = [name for file, names in shards if file not in state["crc32"] for name in names]
    check_space(partial, len(folders) * work.size_of(missing))
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
            write_json(place / STATE, state)
        total = work.size_of([name for _, names in shards for name in names])
        with tqdm(total=total, desc=work.verb, unit="B", unit_scale=True, disable=not progress) as bar:
            for file, names in shards:
                if file not in state["crc32"]:
                    paths = [partial / folder / file for folder in folders]
                    try:
                        state["crc32"][file] = write_shard(work, maker, paths, names, bar)
                    except OSError as error:
                        if error.errno not in FULL:
                            raise
                        reason = f"{os.strerror(error.errno)}: {paths[0]} could not be written"
                        way = "go on with resume (--resume; a part goes on without)"
                        raise OSError(error.errno, f"{reason}; make room, and {way}") from error
                    write_json(place / STATE, state)
                else:
                    bar.update(work.size_of(names))
        work.check_unchanged()


def _put(work: Work, finish: Finish, out: Path, partial: Path, state: dict[str, Any], overwrite: bool) -> Path:
    """Write what lies beside the weight files, and rename the folder."""
    more = finish(partial, {file: state["crc32"][file] for file, _ in work.shards})
    written = {path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file()} - {STATE}
    written |= {MANIFEST, "README.md"}
    made = work.manifest()
    write_manifest(partial, made | more | {"files": sorted(written)})
    check_replaceable(out, work.kind, made, overwrite)  # the place may have changed meanwhile
    (partial / STATE).unlink()
    with alone_in(out) if out.is_dir() else nullcontext():  # the earlier result, until it is removed
        put_in_place(partial, out)
    return out


def _state(files: Sequence[Path], partial: Path, work: Work, resume: bool, overwrite: bool) -> dict[str, Any]:
    """The state of an interrupted merge, without files that are damaged, to go on with; or a new state.

    Args:
        files: of states, those that are there: of the whole, and of its parts.
    """
    state: dict[str, Any] = {"fingerprint": work.fingerprint(), "summary": None, "crc32": {}}
    files = [file for file in files if file.is_file()]
    if not files or (overwrite and not resume):
        return state
    file = files[0]
    try:
        written: dict[str, list[str]] = {}
        summary, same = None, True
        for file in files:
            earlier = read_object(file)
            written |= earlier["crc32"]
            same = same and earlier.get("fingerprint") == state["fingerprint"]
            summary = earlier.get("summary") if summary is None else summary
        done = {name: sums for name, sums in written.items() if _sound(partial, name, work.folders, sums)}
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        if not resume:
            return state  # nothing that could be gone on with
        raise ValueError(f"{file} is damaged ({error}): begin anew, without resume") from error
    if resume and not same:
        raise ValueError(
            f"{partial} is of another merge (other inputs or options): begin anew with overwrite=True (--overwrite), "
            "without resume"
        )
    finished = done if same else written
    if finished and not resume:
        what = "this merge" if same else "another merge"
        way = "go on with resume=True (--resume), or begin anew" if same else "begin anew"
        raise FileExistsError(
            f"{partial} holds {len(finished)} finished weight files of {what}, which was interrupted: {way} with "
            "overwrite=True (--overwrite)"
        )
    return state | {"summary": summary, "crc32": done} if resume else state


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
