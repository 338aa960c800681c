"""Places of results: whether they can be written, replacing them at once, and cleaning up after killed processes."""

import ctypes
import errno
import logging
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room for what is written
_KINDS = {
    stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFLNK: "a link that leads to itself",
}  # fmt: skip
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux's constants


def check_file(path: str | Path) -> Path:
    """The path of a file that is to be written, links resolved.

    Raises:
        FileExistsError: the path exists and is no regular file, or one of its parents is no folder.
        PermissionError: the folder cannot be written to.
    """
    return _checked(path, stat.S_IFREG)


def check_folder(path: str | Path) -> Path:
    """The path of a folder that is to be made or filled, links resolved.

    Raises:
        FileExistsError: the path exists and is no folder, or one of its parents is none.
        PermissionError: its parent cannot be written to.
    """
    return _checked(path, stat.S_IFDIR)


def _checked(path: str | Path, wanted: int) -> Path:
    try:
        place = Path(path).resolve()
    except RuntimeError as error:  # a link to itself, before Python 3.13
        raise FileExistsError(f"{path} is a link that leads to itself: name another") from error
    for one in (place, *place.parents):
        kind = _kind(one)
        if kind not in (None, wanted if one == place else stat.S_IFDIR):
            what = f"cannot be {_KINDS[wanted]}: name another"
            raise FileExistsError(f"{one} is {_KINDS.get(kind or 0, 'no file or folder')}, so {path} {what}")
        if kind is not None and one != place:
            _try(one, place, path)
            break
    return place


def _try(folder: Path, place: Path, path: str | Path) -> None:
    """Raise PermissionError unless a partial result of `place` can be made in `folder` (its mode bits do not say)."""
    try:
        place.name.encode()  # safetensors takes no other names
        probe = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".partial", dir=folder))
    except (OSError, UnicodeEncodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "its name is no UTF-8"
        raise PermissionError(
            f"{folder} cannot be written to, so {path} cannot be made ({why}): name another"
        ) from error
    with suppress(OSError):  # another process has removed it as a dead process' folder
        probe.rmdir()


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lock a folder, made if need be, for this process until the block ends or the folder is renamed.

    Raises:
        FileExistsError: another process holds the lock; or the path is no folder, or a link to one.
    """
    while True:
        if _kind(folder) not in (None, stat.S_IFDIR):
            raise FileExistsError(f"{folder} is no folder, and what is unfinished lies there: remove it")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = _lock(folder)
        except BlockingIOError as error:
            raise FileExistsError(f"another process writes in {folder}: wait for it, or name another") from error
        with suppress(FileNotFoundError):
            if os.path.samestat(folder.stat() if lock is None else os.fstat(lock), folder.stat()):
                break
        if lock is not None:  # the folder was renamed meanwhile
            os.close(lock)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _kind(path: Path) -> int | None:
    """The kind of a path, as in `stat.S_IFMT`; None if nothing is there."""
    try:
        return stat.S_IFMT(path.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return None


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, gone when the block ends; leftovers of killed processes go first.

    Args:
        path: links resolved (`check_file`, `check_folder`).

    Raises:
        OSError: the disk is full; names `path`, whichever library raised it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    clean_up(path)
    folder, lock = _locked_folder(path)
    try:
        yield folder
    except (OSError, SafetensorError) as error:
        in_words = re.search(r"os error (\d+)", str(error))  # as safetensors has it
        number = error.errno if isinstance(error, OSError) else int(in_words[1]) if in_words else None
        if number not in FULL:
            raise
        reason = f"{os.strerror(number)}: {path} could not be written"
        raise OSError(number, f"{reason}; make room, or name another place") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def put_in_place(partial: Path, path: Path) -> None:
    """Rename a finished folder to `path`, in one step where the system can; an earlier result is removed.

    If the process is killed, `path` holds the earlier result or the new one. Where the system cannot exchange two
    names, the earlier result may lie beside `path` until the next call (`clean_up`).
    """
    clean_up(path)
    if not path.exists():
        partial.replace(path)
    elif _exchange(partial, path):
        shutil.rmtree(partial)
    else:
        with beside(path) as folder:
            old = folder / "old"
            path.replace(old)
            try:
                partial.replace(path)
            except OSError:
                old.replace(path)
                raise


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names at once; False where the system cannot, and nothing has changed."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def clean_up(path: Path) -> None:
    """Remove what killed writers of `path` left beside it; put an earlier result back if `path` is gone.

    A writer holds a lock on its folder as long as it lives, so folders of living writers stay.
    """
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d+|[a-z0-9_]{{8}})\.(partial|old)")
    places = path.parent.iterdir() if path.parent.is_dir() else ()
    for place in [one for one in places if pattern.fullmatch(one.name)]:
        try:
            lock = _lock(place) if _kind(place) in (stat.S_IFREG, stat.S_IFDIR) else None
        except BlockingIOError:
            continue
        if lock is None:
            continue
        try:
            partial = place.suffix == ".partial"
            old = place / "old" if partial else place
            if old.is_dir() and _kind(path) is None:
                old.replace(path)
                logger.warning("%s is back: the process that was to replace it was killed", path)
            elif not partial:  # earlier versions renamed the earlier result to this
                logger.warning("%s is an earlier %s that a killed process left: remove it", place, path.name)
            if partial and _kind(place) == stat.S_IFREG:
                place.unlink()
            elif partial:
                shutil.rmtree(place, ignore_errors=True)
        finally:
            os.close(lock)


def _locked_folder(path: Path) -> tuple[Path, int | None]:
    """A new folder beside `path`, and its lock, by which other processes know that its owner lives."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        lock = _lock(folder, wait=True)
        if folder.exists():
            return folder, lock
        if lock is not None:  # another process has removed it as a dead process' folder
            os.close(lock)


def _lock(place: Path, wait: bool = False) -> int | None:
    """Lock a file or folder until the returned descriptor is closed; None where the system has no locks.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    if sys.platform == "win32":
        return None
    try:
        lock = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        os.close(lock)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return lock


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends without an error.

    Raises:
        FileExistsError, PermissionError: see `check_file`.
    """
    path = check_file(path)  # the file behind a link is replaced, not the link
    with beside(path) as folder:
        partial = folder / path.name
        yield partial
        partial.replace(check_file(path))


def check_space(out: Path, needed: int) -> None:
    """Raise OSError if the disk has no room for so many bytes."""
    place = next(parent for parent in [out, *out.parents] if parent.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OSError(
            f"the result takes {needed / 2**30:.2f} GiB and the disk of {place} has {free / 2**30:.2f} GiB free: "
            "make room, or name another folder"
        )
