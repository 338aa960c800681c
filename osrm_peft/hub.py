"""A folder, or a Hub repository's files on this machine."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError


def local_folder(source: str, patterns: Sequence[str], what: str = "folder") -> Path:
    """The folder `source`, or that of the Hub repository `owner/name` or `owner/name@revision`, downloaded if need be.

    Args:
        patterns: which of the repository's files are wanted.
        what: how the error calls that which is not on this machine.

    Raises:
        FileNotFoundError: neither a folder nor a Hub repository that can be reached.
    """
    if Path(source).is_dir():
        return Path(source)
    repo, _, revision = source.partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=list(patterns)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"{source!r} is neither a {what} nor a Hub repository that can be reached ({reason})"
        ) from error
