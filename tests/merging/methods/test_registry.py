"""The registry: what is an option, which names are known, and how a name of PEFT's answers."""

import inspect
import re
import typing

import pytest
import torch
from peft.tuners.lora.model import LoraModel

from osrm_peft import LeastSquares, merge_adapters
from osrm_peft.merging import METHODS, register
from osrm_peft.merging.methods.registry import Method, get_method
from tests.helpers.lora import lora

ADAPTERS = {task: lora(seed) for seed, task in enumerate("st")}


@pytest.fixture
def unregistered():
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


def test_keyword_only_parameters_are_the_options(unregistered):
    @register("shrunk", paper="a test", spaces=("weight",))
    def shrunk(tau, weights, *, by=0.5, tasks=None):
        return by * torch.tensordot(weights, tau, 1)

    assert METHODS["shrunk"].options == {"by": 0.5, "tasks": None}
    whole = merge_adapters(ADAPTERS, "task_arithmetic", scale=1).deltas()
    for name, delta in merge_adapters(ADAPTERS, "shrunk", by=0.25).deltas().items():
        torch.testing.assert_close(delta, 0.25 * whole[name], rtol=1e-5, atol=1e-6)


def two(tau, weights, by=0.5):
    raise NotImplementedError


def three(tau, weights, given, by=0.5):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("fn", "description"),
    [(two, {}), (three, {"needs": "gram"}), (three, {"summarise": lambda stacks, add_up: None})],
)
def test_an_option_that_is_not_keyword_only_is_refused(unregistered, fn, description):
    with pytest.raises(ValueError, match=r"by of merge method 'shrunk' must be keyword-only: put it after a \*"):
        register("shrunk", paper="a test", **description)(fn)
    assert "shrunk" not in METHODS


def names_of_peft():
    """PEFT's combination types, from the Literal in its signature."""
    annotation = inspect.signature(LoraModel.add_weighted_adapter).parameters["combination_type"].annotation
    return re.findall(r"'(\w+)'", str(annotation))


def test_every_name_of_peft_answers_with_ours():
    known = names_of_peft()
    assert {"linear", "cat", "svd", "ties", "dare_linear"} <= set(known)
    for name in known:
        if name in METHODS:
            continue
        with pytest.raises(ValueError, match=rf"merge method '{name}' is PEFT's name; here it is '(\w+)'") as caught:
            merge_adapters(ADAPTERS, name)
        assert str(caught.value).split("here it is '")[1].split("'")[0] in METHODS


def test_an_unknown_name_lists_ours():
    with pytest.raises(ValueError, match=r"unknown merge method 'slerp': choose from average, concat, dare"):
        get_method("slerp")


def test_rules_about_a_method_are_on_the_method():
    sums = {name for name, method in METHODS.items() if method.linear == "sum"}
    assert sums == {"concat", "task_arithmetic"}
    assert METHODS["emr"].kind == "emr" and METHODS["ties"].kind == "merged"
    assert METHODS["lore"].full_rank({"combine": "ties"}) and not METHODS["lore"].full_rank({"combine": "sum"})
    assert METHODS["ties"].whole_tensor({"trim": "layer"}) and not METHODS["ties"].whole_tensor({"trim": "model"})


def test_choices_have_types_that_an_editor_completes():
    hints = typing.get_type_hints(merge_adapters)
    assert typing.get_args(hints["space"]) == ("auto", "weight", "core", "knots")
    assert LeastSquares in typing.get_args(hints["weights"]) and LeastSquares in typing.get_args(hints["scale"])
    assert {"name", "fn", "paper"} <= set(Method.__dataclass_fields__)
