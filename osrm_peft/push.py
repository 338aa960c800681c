"""push_to_hub: what we wrote, with its card, as one commit; nothing local but its content goes along."""

import json
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError

from osrm_peft.card import model_card
from osrm_peft.files import CONTENTS, MANIFEST, read_manifest, read_object
from osrm_peft.hub import public, public_name
from osrm_peft.moment_files import features_header

# names of ours in a repository: those that a newer push does not have are removed by it
_FEATURES = ("task", "base_model", "weight_hash", "statistic", "k", "seed")  # of a header
_OURS = (CONFIG_NAME, "*.safetensors", "*.safetensors.index.json", "heads/*.safetensors")


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
) -> str:
    """Push an adapter, a merged adapter, an EMR merge, a merged checkpoint or a features file to the Hub, with a card.

    One commit: a push that is interrupted changes nothing, and is simply made again. Weights, heads, configuration,
    manifest and card go; what else lies in the folder stays. Folders of this machine are cut from their texts. The
    token is the one that `huggingface_hub` has (`hf auth login`, or HF_TOKEN).

    Args:
        folder: what `save_pretrained`, `train_task`, `merge_checkpoints` or `TaskFeatures.save` wrote, or an adapter
            that stock PEFT wrote. Features files of several tasks can share a repository.
        repo_id: `user/name`; made if it is not there.
        private: of a repository that is made.
        revision: the branch; made from `main` if it is not there.
        create_pr: open a pull request instead of committing.
        commit_message: of the commit.

    Returns:
        The address of the commit or the pull request.

    Raises:
        ValueError: no repository name, or nothing that can be pushed.
        FileNotFoundError: no such folder, or one of its files is missing.
        HfHubHTTPError: the Hub refused (401: log in; 403: no right to write).
    """
    folder = Path(folder)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id={repo_id!r} is no name of a repository, such as user/name: {error}") from error
    if create_pr and revision is not None:
        raise ValueError(f"a pull request has a branch of its own: give create_pr or revision={revision!r}, not both")
    files, manifest = _contents(folder)
    model_card(manifest)  # a damaged manifest shows here
    api = HfApi()
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id  # with its owner's name
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    there = set(api.list_repo_files(repo_id, revision=revision))
    if manifest["kind"] == "features":
        manifest["files"] = _features_there(repo_id, revision, there) | manifest["files"]
        stale: set[str] = set()
    else:
        stale = {name for name in there - set(files) if any(fnmatchcase(name, pattern) for pattern in _OURS)}
    manifest = public(manifest) | {"repo_id": repo_id}
    contents: dict[str, Any] = dict(files)
    contents[MANIFEST] = json.dumps(manifest, indent=2, ensure_ascii=False).encode()
    contents["README.md"] = str(model_card(manifest)).encode()
    if CONFIG_NAME in files:
        contents[CONFIG_NAME] = _public_config(files[CONFIG_NAME])
    operations = [
        CommitOperationAdd(name, one if isinstance(one, bytes) else str(one)) for name, one in contents.items()
    ]
    commit = api.create_commit(
        repo_id,
        [*operations, *(CommitOperationDelete(name) for name in sorted(stale))],
        commit_message=commit_message or f"Push {manifest['kind']} with osrm_peft",
        revision=revision,
        create_pr=create_pr,
    )
    return str(commit.pr_url if create_pr else commit.commit_url)


class Pushable:
    """`push_to_hub` of what has `save_pretrained`."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write it."""
        raise NotImplementedError

    def push_to_hub(self, repo_id: str, **arguments: Any) -> str:
        """Push it as it would be saved, see `push.push_to_hub` for the arguments; returns the commit's address."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "pushed")
            return push_to_hub(Path(folder) / "pushed", repo_id, **arguments)


def _contents(folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
    """{name in the repository: file}, and the manifest."""
    if folder.is_file() and folder.name.endswith(".safetensors"):
        return {folder.name: folder}, {"kind": "features", "files": {folder.name: _about_features(folder)}}
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder or features file {folder}")
    manifest = read_manifest(folder)
    if not manifest and (folder / CONFIG_NAME).is_file():  # stock PEFT's
        config = read_object(folder / CONFIG_NAME)
        manifest = {"kind": "adapter", "base_model": config.get("base_model_name_or_path")}
        manifest["task_type"] = config.get("task_type")
    kind = manifest.get("kind")
    if kind in CONTENTS:
        found = {name: folder / _inside(folder, name) for name in _names(folder, kind)}
        needed = {"emr.safetensors"} if kind == "emr" else {CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME}
    elif kind == "checkpoint":
        found = {name: folder / _inside(folder, name) for name in map(str, manifest.get("files") or [])}
        needed = set(found)
    else:
        raise ValueError(
            f"{folder} is nothing that osrm_peft or PEFT wrote (no {MANIFEST}, no {CONFIG_NAME}): give the folder "
            "of an adapter or a merge, or a features file"
        )
    missing = sorted(name for name in needed if not (folder / name).is_file())
    if missing:
        raise FileNotFoundError(f"{folder} lacks {missing[0]}: write it again")
    return {name: path for name, path in found.items() if name not in (MANIFEST, "README.md")}, manifest


def _names(folder: Path, kind: str) -> Iterator[str]:
    for name in sorted(CONTENTS[kind]):
        path = folder / name
        found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
        yield from (one.relative_to(folder).as_posix() for one in found)


def _inside(folder: Path, name: str) -> str:
    """A name from a manifest, refused if it leads out of the folder."""
    parts = PurePosixPath(name).parts
    if (
        not parts
        or ".." in parts
        or name.startswith("/")
        or not (folder / name).resolve().is_relative_to(folder.resolve())
    ):
        raise ValueError(f"{folder / MANIFEST} names {name!r}, which is no file in its folder")
    return name


def _about_features(path: Path) -> dict[str, Any]:
    """What the manifest tells of a features file."""
    try:
        header = features_header(path)
        return {name: header[name] for name in _FEATURES}
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is no features file, or damaged ({error}): give what TaskFeatures.save wrote"
        ) from error


def _features_there(repo_id: str, revision: str | None, names: set[str]) -> dict[str, Any]:
    """Of the features files that are in the repository: what its manifest tells."""
    try:
        known = read_object(Path(hf_hub_download(repo_id, MANIFEST, revision=revision))).get("files")
    except (EntryNotFoundError, ValueError):  # none, or not one of ours: made anew
        return {}
    known = known if isinstance(known, dict) else {}
    return {
        name: one for name, one in known.items() if name in names and isinstance(one, dict) and {*_FEATURES} <= {*one}
    }


def _public_config(path: Path) -> bytes:
    config = read_object(path)
    config["base_model_name_or_path"] = public_name(config.get("base_model_name_or_path"))
    return json.dumps(public(config), indent=2, sort_keys=True).encode()
