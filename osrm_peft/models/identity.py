"""Base models of adapters: whether two names and hashes are of one model."""

import hashlib
import logging
import os
import re
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from osrm_peft.hub.privacy import is_local, public_name
from osrm_peft.models.fingerprint import counts_all_rows
from osrm_peft.models.packaged import MODEL

logger = logging.getLogger(__name__)

# owners of models whose names on the Hub once had no owner: `roberta-base` is `FacebookAI/roberta-base`
_OWNERS = ("FacebookAI", "albert", "almanach", "distilbert", "google-bert", "google-t5", "openai-community", "xlnet",
           "transfo-xl", "facebook", "Helsinki-NLP", "dbmdz", "microsoft", "google")  # fmt: skip


class Base(NamedTuple):
    """What an adapter's files say about its base model.

    Attributes:
        name: Hub id or path; None where the adapter does not name it.
        revision: None is `main`.
        weight_hash: the base weights' hash (`fingerprint.weight_hash`), where the adapter's manifest has it.
        layers: the layers that the hash covers.
    """

    name: str | None
    revision: str | None = None
    weight_hash: str | None = None
    layers: frozenset[str] = frozenset()


def located(name: str | None) -> str | None:
    """A base model's name that holds in any working directory: a folder's name becomes its whole path."""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def weight_files(model: str) -> list[Any]:
    """What tells a local model's weights from another's without reading them: names and sizes of its files, its config.

    Returns:
        [] for a model that is not on this machine, whose name tells it.
    """
    folder = Path(model)
    if not folder.is_dir():
        return []
    config = folder / "config.json"
    digest = hashlib.sha256(config.read_bytes()).hexdigest()[:16] if config.is_file() else None
    return [digest, *([file.name, file.stat().st_size] for file in sorted(folder.glob("*.safetensors")))]


def common_base(bases: Mapping[str, Base], base_model: str | None) -> str | None:
    """The name of the adapters' common base model.

    Two adapters have one base if its weights' hashes agree. Without hashes they have one base if the names and the
    revisions agree: whole paths, or Hub ids with their aliases (`roberta-base`).

    Args:
        base_model: the user's word that all names are names of this model.

    Raises:
        ValueError: the base models differ; names them.
    """
    for (first, one), (name, other) in combinations(bases.items(), 2):  # all pairs: some adapters have no hash
        hashes = one.weight_hash, other.weight_hash
        known = comparable(*hashes) and one.layers == other.layers
        if known and len({*hashes}) > 1:
            raise ValueError(
                f"{first!r} and {name!r} were trained on base models with different weights ({one.name}: "
                f"{hashes[0]}, {other.name}: {hashes[1]}): they cannot be merged"
            )
        if base_model is None and not known and not _same(one, other):
            listed = ", ".join(
                f"{task}: {base.name}{f'@{base.revision}' if base.revision else ''}" for task, base in bases.items()
            )
            raise ValueError(
                f"the adapters have different base models ({listed}): they cannot be merged; if these are names of one "
                "and the same model, say so with base_model=NAME (--base-model NAME)"
            )
    return base_model if base_model is not None else next(iter(bases.values())).name


def comparable(one: str | None, other: str | None) -> bool:
    """Whether both weight hashes are known and of one version (`fingerprint.weight_hash` has had two)."""
    return one is not None and other is not None and counts_all_rows(one) == counts_all_rows(other)


def _same(one: Base, other: Base) -> bool:
    revisions = [base.revision or _commit(base.name) or "main" for base in (one, other)]
    named = one.revision or other.revision  # else two commits in the Hub's cache may differ by a README alone
    if named and revisions[0] != revisions[1] and {*revisions} != {"main", _commit(one.name) or _commit(other.name)}:
        return False
    names = _key(one.name), _key(other.name)
    return names[0] == names[1] or _alias(*names) or _alias(*reversed(names)) or _same_on_hub(*names)


def _commit(name: str | None) -> str | None:
    """The commit of a folder in the Hub's cache; None for any other name."""
    found = re.search(r"[/\\]models--.+?[/\\]snapshots[/\\]([^/\\]+)", name or "")
    return found[1] if found else None


def _key(name: str | None) -> str:
    """The name for comparisons: a folder's whole path; the short name for the packaged model and the Hub's cache."""
    if not name:
        return ""
    short = public_name(name) or ""
    if short == MODEL or _commit(name):
        return short
    return os.path.normpath(str(located(name))).rstrip("\\") if is_local(name) else name.rstrip("/")


def _alias(short: str, whole: str) -> bool:
    """Whether `whole` is the Hub's present name of `short`, a name without owner."""
    owner, _, name = whole.partition("/")
    return bool(short) and "/" not in short and short == name and owner in _OWNERS


def _same_on_hub(one: str, other: str) -> bool:
    """Whether the Hub has both names for one repository, which was renamed; False if the Hub cannot be reached."""
    if not one or not other or is_local(one) or is_local(other):
        return False
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return False
    try:
        found: list[Any] = [HfApi().model_info(name, timeout=5).id for name in (one, other)]
    except Exception as error:  # no network, no such repository: the names alone decide
        logger.debug("the Hub could not tell whether %s is %s: %s", one, other, error)
        return False
    return found[0] == found[1]
