"""The public names: what `osrm_peft` exports, for its `__init__` and for type checkers."""

from .adapters.load import load_adapter as load_adapter
from .adapters.lora_adapter import LoraAdapter as LoraAdapter
from .checkpoints.bake import bake_adapter as bake_adapter
from .checkpoints.extract import Extraction as Extraction
from .checkpoints.extract import extract_adapter as extract_adapter
from .checkpoints.merge import load_merged_checkpoint as load_merged_checkpoint
from .checkpoints.merge import merge_checkpoints as merge_checkpoints
from .evaluation.evaluate import evaluate_task as evaluate_task
from .evaluation.harness import HarnessScore as HarnessScore
from .evaluation.harness import evaluate_with_harness as evaluate_with_harness
from .evaluation.interference import Interference as Interference
from .evaluation.interference import interference as interference
from .features.collect import collect_features as collect_features
from .features.collect import collect_gram as collect_gram
from .features.fisher import DiagonalFisher as DiagonalFisher
from .features.fisher import collect_fisher as collect_fisher
from .features.task_features import TaskFeatures as TaskFeatures
from .hub.push import push_to_hub as push_to_hub
from .merging.emr_adapter import EMRAdapter as EMRAdapter
from .merging.merge import merge_adapters as merge_adapters
from .merging.merged_adapter import MergedAdapter as MergedAdapter
from .merging.methods.registry import register as register
from .merging.rules import LeastSquares as LeastSquares
from .models.loading import load_base as load_base
from .models.loading import load_tokenizer as load_tokenizer
from .osrm.callback import OSRMCallback as OSRMCallback
from .osrm.config import OSRMLoraConfig as OSRMLoraConfig
from .osrm.initialize import initialize_osrm_weights as initialize_osrm_weights
from .osrm.project import Projection as Projection
from .osrm.project import project_adapter as project_adapter
from .pipeline.run import run_recipe as run_recipe
from .selection.select import select_merge as select_merge
from .selection.selection import Selection as Selection
from .tasks.files import TaskData as TaskData
from .tasks.harness import write_harness_tasks as write_harness_tasks
from .tasks.suites import list_tasks as list_tasks
from .tasks.suites import load_task as load_task
from .tasks.task import Task as Task
from .tasks.task import tokenize as tokenize
from .training.recipe import Recipe as Recipe
from .training.train import train_task as train_task

__version__: str
