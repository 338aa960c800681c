"""OSRM's configuration of the paper, and features of other tasks."""

from osrm_peft import collect_features
from tests.helpers.models import make_base, make_batch

PAPER = {"objective": "least_energy"}  # no features of the task's own
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}


def features_of(task, seed, base=None, **options):
    loader = [make_batch(seed=10 * seed + step) for step in range(3)]
    options = {"target_modules": ["query", "value"], "progress": False} | options
    return collect_features(base or make_base(), loader, task=task, **options)
