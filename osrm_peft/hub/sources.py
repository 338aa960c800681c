"""From a name to a folder or file: on this machine, or downloaded from the Hub."""

import re
from collections.abc import Sequence
from pathlib import Path


def local_folder(source: str, patterns: Sequence[str], what: str = "folder") -> Path:
    """The folder `source`, or that of the Hub repository `owner/name` or `owner/name@revision`, downloaded if need be.

    Args:
        patterns: of the names of the repository's files to download.
        what: the word for such a folder in the error.

    Raises:
        FileNotFoundError: neither a folder nor a Hub repository that can be reached.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repo, _, revision = source.partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=list(patterns)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"{source!r} is neither a {what} nor a Hub repository that can be reached ({reason})"
        ) from error


def local_file(source: str, suffix: str, what: str, remedy: str) -> Path:
    """The file `source`, or that of a Hub repository: `owner/name`, `owner/name@revision` or `…:FILE`.

    Args:
        suffix: the end of the file's name, where no FILE is named.
        what: the word for such a file in errors.
        remedy: how to make such a file, for errors.

    Raises:
        FileNotFoundError: neither a file nor a Hub repository with one; or a repository with several, which it lists.
    """
    path = Path(source)
    if path.is_file():
        return path
    repo, _, name = source.partition(":")
    slashes = repo.partition("@")[0].count("/")  # revisions (refs/pr/1) and FILEs may have more
    if (
        (path.suffix == ".safetensors" and not name)
        or path.is_dir()
        or slashes != 1
        or {"..", "/"} & {*Path(name).parts}
    ):
        raise FileNotFoundError(f"no {what} {source}: {remedy}")
    folder = local_folder(repo, [name or f"*{suffix}"], what)
    found = [folder / name] if name else folder.rglob(f"*{suffix}")
    names = sorted(str(file.relative_to(folder)) for file in found if file.is_file())
    if len(names) != 1:
        held = f"holds {len(names)} of them: name one, {repo}:{names[0]}" if names else "holds none"
        raise FileNotFoundError(f"{source!r} is no {what}, and the Hub repository {held}")
    return folder / names[0]


def pinned(source: str, place: Path) -> str:
    """`source` as it can be found again: a Hub id with the commit that was read, a path as it is.

    Args:
        place: the folder or file on this machine that `source` led to.
    """
    cached = re.search(r"models--[^/\\]+[/\\]snapshots[/\\]([^/\\]+)", str(place))
    if Path(source).exists() or cached is None:
        return source
    repo, _, file = source.partition(":")
    return f"{repo.partition('@')[0]}@{cached[1]}" + (f":{file}" if file else "")
