"""push_to_hub: one commit with a folder's files and its card, without the paths of this machine."""

import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from osrm_peft.hub.card import model_card
from osrm_peft.hub.privacy import public, public_name
from osrm_peft.io.json import read_object
from osrm_peft.io.manifest import CONTENTS, MANIFEST, read_manifest
from osrm_peft.io.tensors import features_header, tensor_headers

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_FEATURES = ("task", "base_model", "weight_hash", "statistic", "k", "seed")  # fields of a features file's header
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
_CONFIGS = (_CONFIG, "config.json", "tokenizer_config.json")
_NAMES = ("base_model_name_or_path", "_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file")


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

    The push is one commit: an interrupted push changes nothing, so push again. It takes weights, heads, configuration,
    manifest and card along, and leaves other files of the folder behind. Paths of this machine are cut from the texts.
    `huggingface_hub` gives the token (`hf auth login`, or HF_TOKEN).

    Args:
        folder: what `save_pretrained`, `train_task`, `merge_checkpoints` or `TaskFeatures.save` wrote, or an adapter
            that stock PEFT wrote. Features files of several tasks can share a repository.
        repo_id: `user/name`; created if it does not exist.
        private: whether a repository that is created is private.
        revision: the branch; created from `main` if it does not exist.
        create_pr: open a pull request instead of committing.
        commit_message: None: "Push <kind> with osrm_peft".

    Returns:
        The address of the commit or the pull request.

    Raises:
        ValueError: no repository name, or nothing that can be pushed.
        FileNotFoundError: no such folder, or one of its files is missing.
        HfHubHTTPError: the Hub refused (401: log in; 403: no right to write).
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    folder = Path(folder)
    try:
        validate_repo_id(repo_id)
    except (HFValidationError, TypeError) as error:
        raise ValueError(f"repo_id={repo_id!r} is no name of a repository, such as user/name: {error}") from error
    if create_pr and revision is not None:
        raise ValueError(f"a pull request has a branch of its own: give create_pr or revision={revision!r}, not both")
    files, manifest = _contents(folder)
    model_card(manifest)  # a damaged manifest shows here
    message = commit_message or f"Push {manifest['kind']} with osrm_peft"
    try:
        return _commit(HfApi(), repo_id, files, manifest, private, revision, create_pr, message)
    except (OSError, ValueError):
        raise  # such as HfHubHTTPError, which has the Hub's answer
    except Exception as error:  # any kind, from the client's transport
        raise OSError(f"the Hub cannot be reached ({type(error).__name__}: {error}): push again") from error


def _commit(
    api: "HfApi",
    repo_id: str,
    files: dict[str, Path],
    manifest: dict[str, Any],
    private: bool,
    revision: str | None,
    create_pr: bool,
    message: str,
) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id  # with its owner's name
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    head = str(api.repo_info(repo_id, revision=revision).sha)
    pushed = set(api.list_repo_files(repo_id, revision=head))
    known = _pushed_manifest(repo_id, head) if MANIFEST in pushed else {}
    features = manifest["kind"] == "features"
    if known and (known.get("kind") == "features") != features:
        raise ValueError(f"{repo_id} holds {known.get('kind')}, this is {manifest['kind']}: name another repository")
    if features:
        manifest["files"] = _pushed_features(known, pushed) | manifest["files"]
    manifest = public(manifest) | {"repo_id": repo_id, "base_model": public_name(manifest.get("base_model"))}
    contents: dict[str, Any] = dict(files) | {"README.md": str(model_card(manifest)).encode()}
    manifest["pushed"] = sorted({*contents, MANIFEST, *(manifest["files"] if features else ())})
    contents[MANIFEST] = json.dumps(manifest, indent=2, ensure_ascii=False).encode()
    contents |= {name: _public_config(files[name]) for name in files if Path(name).name in _CONFIGS}
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        for name, content in contents.items()
    ]
    before = known.get("pushed")
    stale = pushed & {*map(str, before if isinstance(before, list) else ())} - {*manifest["pushed"]}
    operations += [CommitOperationDelete(name) for name in sorted(stale)]
    commit = api.create_commit(
        repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr, parent_commit=head
    )
    return str(commit.pr_url if create_pr else commit.commit_url)


class Pushable:
    """Gives `push_to_hub` to a class that has `save_pretrained`."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the folder."""
        raise NotImplementedError

    def push_to_hub(self, repo_id: str, **arguments: Any) -> str:
        """Save into a temporary folder and push that; see `push.push_to_hub` for arguments and result."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "pushed")
            return push_to_hub(Path(folder) / "pushed", repo_id, **arguments)


def _contents(folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
    """{name in the repository: file}, and the manifest."""
    if folder.is_file() and folder.name.endswith(".safetensors"):
        return {folder.name: folder}, {"kind": "features", "files": {folder.name: _features_entry(folder)}}
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder or features file {folder}")
    manifest = read_manifest(folder)
    if not manifest and (folder / _CONFIG).is_file():
        manifest = _of_peft(folder)
    kind = manifest["kind"] = str(manifest.get("kind"))
    if kind in CONTENTS:
        names = list(_names(folder, kind))
        needed = {"emr.safetensors"} if kind == "emr" else {_CONFIG, _WEIGHTS}
    elif kind == "checkpoint":
        names = [str(name) for name in manifest.get("files") or [] if name not in ("README.md", MANIFEST)]
        needed = set(names)
    else:
        raise ValueError(
            f"{folder} is nothing that osrm_peft or PEFT wrote (no {MANIFEST}, no {_CONFIG}): give the folder "
            "of an adapter or a merge, or a features file"
        )
    found = {name: _inside(folder, name) for name in names}
    if not found:
        raise ValueError(f"{folder / MANIFEST} names no files: write the model again")
    missing = sorted(name for name in needed if not (folder / name).is_file())
    if missing:
        raise FileNotFoundError(f"{folder} lacks {missing[0]}: write it again")
    return found, manifest


def _of_peft(folder: Path) -> dict[str, Any]:
    """The manifest of an adapter that stock PEFT wrote."""
    config = read_object(folder / _CONFIG)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder} is a {config.get('peft_type')} adapter: only LoRA adapters are pushed")
    manifest = {"kind": "adapter", "base_model": config.get("base_model_name_or_path")}
    manifest["task_type"] = config.get("task_type")
    weights = _inside(folder, _WEIGHTS)
    shapes = {name: shape for name, (shape, _) in (tensor_headers(weights) if weights.is_file() else {}).items()}
    heads = {name: shape for name, shape in shapes.items() if ".lora_" not in name and shape}
    return manifest | ({"num_labels": heads[last_layer(heads)][0]} if heads else {})


def _names(folder: Path, kind: str) -> Iterator[str]:
    for name in sorted(CONTENTS[kind] - {"README.md", MANIFEST}):
        path = folder / name
        found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
        yield from (one.relative_to(folder).as_posix() for one in found)


def _inside(folder: Path, name: str) -> Path:
    """The file of this name, refused if it lies outside the folder."""
    path = folder / name
    if not name or not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{name!r} of {folder} is no file in its folder, but leads out of it: copy what is to be pushed into one "
            "folder (of the Hub's cache: download with local_dir=…)"
        )
    return path


def _features_entry(path: Path) -> dict[str, Any]:
    """The manifest's entry for a features file."""
    try:
        header = features_header(path)
        return {name: header[name] for name in _FEATURES}
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is no features file, or damaged ({error}): give what TaskFeatures.save wrote"
        ) from error


def _pushed_manifest(repo_id: str, revision: str) -> dict[str, Any]:
    """The manifest in the repository; empty where another program wrote it."""
    from huggingface_hub import hf_hub_download

    try:
        return read_object(Path(hf_hub_download(repo_id, MANIFEST, revision=revision)))
    except ValueError:
        return {}


def _pushed_features(manifest: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """{file: entry} of the repository's manifest, for the features files that the repository still has."""
    files = manifest.get("files")
    entries = {name: one for name, one in files.items() if isinstance(one, dict)} if isinstance(files, dict) else {}
    return {name: entry for name, entry in entries.items() if name in names and {*_FEATURES} <= {*entry}}


def _public_config(path: Path) -> bytes:
    """A configuration file, with its models' names cut to what others may read."""
    config = read_object(path)
    shown = {name: public_name(one) for name, one in config.items() if name in _NAMES and isinstance(one, str)}
    return json.dumps(config | shown, indent=2, sort_keys=True, ensure_ascii=False).encode()


def last_layer(heads: Iterable[str]) -> str:
    """Name of a parameter of the head's output layer, which has a row for each label (see `loading.head_width`).

    The name is one of PEFT's (`classifier`, `classifier.out_proj`, `score`), never that of `pre_classifier` or of what
    else is saved beside the head (ModernBERT's own head, an embedding).
    """
    return max(heads, key=lambda name: (bool(re.search(r"(^|\.)(classifier|score|classification_head)\.", name)), name))
