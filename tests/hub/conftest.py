"""A Hub on loopback, and adapters to push to it."""

import json

import pytest

from osrm_peft import load_adapter
from osrm_peft.features.collect import collect_features
from osrm_peft.features.fisher import collect_fisher
from tests.helpers.adapters import make_adapter
from tests.helpers.hub import Hub
from tests.helpers.models import make_base, make_batch


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two adapters of a base model in a local folder, and their tasks' features."""
    root = tmp_path_factory.mktemp("secret_home")
    make_base().save_pretrained(root / "base")
    for seed, task in enumerate(("t1", "t2"), 1):
        make_adapter(root / task, seed=seed)
        config = json.loads((root / task / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(root / "base")  # as PEFT writes it of a model from a folder
        (root / task / "adapter_config.json").write_text(json.dumps(config))
        features = collect_features(
            make_base(), [make_batch(seed=seed)], task=task, target_modules=["query", "value"], progress=False
        )
        features.save(root / f"{task}.features.safetensors")
        model = load_adapter(root / task).attach(make_base())
        fisher = collect_fisher(model, [make_batch(seed=seed)], task=task, progress=False)
        fisher.save(root / f"fisher/{task}.fisher.safetensors")
    return root


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        yield hub
