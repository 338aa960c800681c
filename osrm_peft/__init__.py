"""Train LoRA adapters so that they can be merged (OSRM), and merge them (LoRE-Merging and the baselines)."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `as`: exported, also for `mypy --strict`
    from osrm_peft.adapter_reader import load_adapter as load_adapter
    from osrm_peft.adapters import LoraAdapter as LoraAdapter
    from osrm_peft.callback import OSRMCallback as OSRMCallback
    from osrm_peft.checkpoints import load_merged as load_merged
    from osrm_peft.checkpoints import merge_checkpoints as merge_checkpoints
    from osrm_peft.collection import collect_features as collect_features
    from osrm_peft.collection import collect_gram as collect_gram
    from osrm_peft.config import OSRMLoraConfig as OSRMLoraConfig
    from osrm_peft.crosstalk import Interference as Interference
    from osrm_peft.crosstalk import interference as interference
    from osrm_peft.evaluation import evaluate_task as evaluate_task
    from osrm_peft.features import TaskFeatures as TaskFeatures
    from osrm_peft.fisher import DiagonalFisher as DiagonalFisher
    from osrm_peft.fisher import collect_fisher as collect_fisher
    from osrm_peft.initialization import initialize_osrm_weights as initialize_osrm_weights
    from osrm_peft.merging import MaskedAdapter as MaskedAdapter
    from osrm_peft.merging import MergedAdapter as MergedAdapter
    from osrm_peft.merging import merge_adapters as merge_adapters
    from osrm_peft.projection import Projection as Projection
    from osrm_peft.projection import project_adapter as project_adapter
    from osrm_peft.push import push_to_hub as push_to_hub
    from osrm_peft.tasks import Task as Task
    from osrm_peft.tasks import list_tasks as list_tasks
    from osrm_peft.tasks import load_task as load_task
    from osrm_peft.training import train_task as train_task

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


def __dir__() -> list[str]:
    """The public names, whether imported already or not."""
    return [*__all__, "__version__"]
