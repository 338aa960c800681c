"""What is known of PEFT's LoraConfig without importing PEFT, against PEFT itself."""

from importlib.metadata import version
from itertools import product

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from osrm_peft.adapters import config
from osrm_peft.adapters.config import KNOWN_PEFT, TARGETS, content_of, content_of_peft, defaults, is_target

FIELDS = {
    "r": 4, "lora_alpha": 4, "modules_to_save": ["classifier", "score"], "inference_mode": True, "revision": "main",
    "base_model_name_or_path": "user/base", "auto_mapping": {"base_model_class": "BertModel", "parent_library": "x"},
    "fan_in_fan_out": False, "task_type": "SEQ_CLS", "target_modules": ["v", "q", "v"], "exclude_modules": ["b", "a"],
    "layers_to_transform": None, "layers_pattern": None,
}  # fmt: skip


def test_the_defaults_are_those_of_the_installed_peft():
    assert version("peft") == KNOWN_PEFT, "compare the fields and task types of the new version, and name it there"
    asked = config.defaults_of_peft()
    asked["runtime_config"] = vars(asked["runtime_config"])
    assert defaults() == asked
    defaults()["rank_pattern"]["x"] = 1
    assert defaults()["rank_pattern"] == {}


@pytest.mark.parametrize(
    "changed",
    [
        {}, {"task_type": None}, {"target_modules": r".*\.(q|v)", "exclude_modules": None}, {"modules_to_save": None},
        {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"}, {"auto_mapping": None, "revision": None},
        {"layers_to_transform": [1, 2], "layers_pattern": "layers"}, {"layers_to_transform": 3}, {"target_modules": []},
        *({"task_type": kind} for kind in config._TASK_TYPES),
    ],
    ids=str,
)  # fmt: skip
def test_the_file_is_as_peft_writes_it(changed):
    assert content_of(FIELDS | changed) == content_of_peft(FIELDS | changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"task_type": "POETRY"}, "Invalid task type"),
        ({"layers_pattern": "layers"}, "`layers_to_transform` must also be specified"),
        ({"layers_to_transform": [1], "target_modules": "q"}, "cannot be used when `target_modules` is a str"),
    ],
)
def test_peft_itself_refuses_what_it_refuses(changed, message):
    with pytest.raises(ValueError, match=message):
        content_of(FIELDS | changed)


def test_another_version_of_peft_is_asked_itself(monkeypatch):
    monkeypatch.setattr(config, "version", lambda name: "99.0")
    monkeypatch.setattr(config, "defaults_of_peft", lambda: {"peft_type": None, "of_99": 1})
    assert defaults() == {"peft_type": None, "of_99": 1}
    monkeypatch.setattr(config, "content_of_peft", lambda fields: {"of_99": 1})
    assert content_of(FIELDS) == {"of_99": 1}


def test_targets_are_those_of_peft():
    names = ["q", "x.q", "xq", "layers.1.q", "model.layers.1.q", "model.layers.2.v", "classifier", "a.classifier.out"]
    seen = set()
    lists = [["q"], ["q", "classifier"], ["layers.1.q"], ["x"]]
    for targets, excluded, layers in product(
        [*lists, r".*\.q", r"model\..*"],
        [None, ["x.q"], r".*1\.q"],
        [None, [1]],
    ):
        if isinstance(targets, str) and layers:
            continue
        fields = dict(zip(TARGETS, (targets, excluded, layers, None, None), strict=True))
        for name in names:
            found = is_target(fields, name)
            assert found == bool(check_target_module_exists(LoraConfig(**fields), name)), (fields, name)
            seen.add(found)
    assert seen == {True, False}
