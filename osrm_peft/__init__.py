"""Train LoRA adapters so that they can be merged (OSRM), and merge them (LoRE-Merging and the baselines)."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from osrm_peft.adapter_reader import load_adapter
    from osrm_peft.adapters import LoraAdapter
    from osrm_peft.callback import OSRMCallback
    from osrm_peft.checkpoints import load_merged, merge_checkpoints
    from osrm_peft.collection import collect_features, collect_gram
    from osrm_peft.config import OSRMLoraConfig
    from osrm_peft.crosstalk import Interference, interference
    from osrm_peft.evaluation import evaluate_task
    from osrm_peft.features import TaskFeatures
    from osrm_peft.fisher import DiagonalFisher, collect_fisher
    from osrm_peft.initialization import initialize_osrm_weights
    from osrm_peft.merging import MaskedAdapter, MergedAdapter, merge_adapters
    from osrm_peft.projection import Projection, project_adapter
    from osrm_peft.push import push_to_hub
    from osrm_peft.tasks import Task, list_tasks, load_task
    from osrm_peft.training import train_task

_HOMES = {
    "DiagonalFisher": "fisher",
    "Interference": "crosstalk",
    "LoraAdapter": "adapters",
    "MaskedAdapter": "merging",
    "MergedAdapter": "merging",
    "OSRMCallback": "callback",
    "OSRMLoraConfig": "config",
    "Projection": "projection",
    "Task": "tasks",
    "TaskFeatures": "features",
    "collect_features": "collection",
    "collect_fisher": "fisher",
    "collect_gram": "collection",
    "evaluate_task": "evaluation",
    "initialize_osrm_weights": "initialization",
    "interference": "crosstalk",
    "list_tasks": "tasks",
    "load_adapter": "adapter_reader",
    "load_merged": "checkpoints",
    "load_task": "tasks",
    "merge_adapters": "merging",
    "merge_checkpoints": "checkpoints",
    "project_adapter": "projection",
    "push_to_hub": "push",
    "train_task": "training",
}

__version__ = version("osrm_peft")
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `osrm-peft --help` need not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'osrm_peft' has no attribute {name!r}")
    return getattr(import_module(f"osrm_peft.{_HOMES[name]}"), name)
