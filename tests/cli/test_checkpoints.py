import json
import re

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from osrm_peft.evaluation.spectra import spectra
from tests.helpers.adapters import make_adapter
from tests.helpers.models import make_base


@pytest.fixture
def models(tmp_path):
    """A base and two models of rank 1 away from it in each matrix."""
    for seed, name in enumerate(("base", "a", "b")):
        model = make_base()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if name != "base" and parameter.dim() == 2:
                    left = torch.randn(len(parameter), 1, generator=generator)
                    parameter += 0.1 * left @ torch.randn(1, parameter.shape[1], generator=generator)
        model.save_pretrained(tmp_path / name)
    return tmp_path


def test_the_command_merges_what_it_said_it_would(models, call):
    arguments = [
        "merge-checkpoints",
        models / "a",
        models / "b",
        "--base-model",
        models / "base",
        "--out",
        models / "out",
    ]
    arguments += ["--method", "task_arithmetic", "--scale", "0.5", "--weight", "a=1", "--weight", "b=-1"]
    said = call(*arguments, "--dry-run")
    takes, would = said.split(" of memory ")
    assert re.fullmatch(r"about [\d.e-]+ (s|min) on this machine, [\d.]+ MB", takes)
    assert would.startswith("would write") and not (models / "out").exists()
    assert call(*arguments) == would.replace("would write", "wrote")

    a, b, base, out = (
        AutoModelForSequenceClassification.from_pretrained(models / name).state_dict()
        for name in ("a", "b", "base", "out")
    )
    for name, tensor in out.items():
        torch.testing.assert_close(tensor, base[name] + 0.5 * (a[name] - b[name]), rtol=0, atol=1e-6)
    assert json.loads((models / "out/osrm_peft.json").read_text())["weights"] == {"a": {"*": 1.0}, "b": {"*": -1.0}}


def test_what_takes_long_is_told_before_it_begins(models, call):
    names = models / "a", models / "b"
    arguments = "--out", models / "out", "--method", "iso", "--base-model", models / "base"
    assert re.match(r"about .+ of memory wrote ", call("merge-checkpoints", *names, *arguments))
    facts = json.loads(call("merge-checkpoints", *names, "--out", models / "other", "--dry-run", "--json"))
    assert facts["seconds"] > 0 and facts["memory"] > 0


def test_an_error_is_one_line_and_nothing_is_written(models, call):
    said = call("merge-checkpoints", models / "a", models / "b", "--method", "ties", "--out", models / "out", code=2)
    assert (
        "ties merges differences from a base model: give --base-model, or use" in said and not (models / "out").exists()
    )


def test_spectra_are_singular_values_of_task_vectors(models, call):
    named = {name: str(models / name) for name in ("a", "b")}
    query = "bert.encoder.layer.0.attention.self.query.weight"
    found = spectra(named, base=str(models / "base"), layer=query)
    for name in named:
        weights = [AutoModelForSequenceClassification.from_pretrained(models / one).get_parameter(query).double()
                   for one in (name, "base")]  # fmt: skip
        expected = torch.linalg.svdvals(weights[0] - weights[1])
        torch.testing.assert_close(
            torch.tensor(found[name][query], dtype=torch.float64), expected, rtol=0, atol=1e-6 * float(expected[0])
        )
    arguments = ["inspect", models / "a", models / "b", "--spectrum", "--layer", "*query.weight", "--out", models / "s"]
    said = call(*arguments, "--base-model", models / "base")
    assert "a 2 16" in said.replace("│", " ") and (models / "s/spectrum.png").stat().st_size > 1000
    values = json.loads((models / "s/spectrum.json").read_text())["singular_values"]
    assert values["a"][query] == found["a"][query]
    assert "matches no matrix" in call(*arguments[:4], "--layer", "nothing", code=2)


def test_spectra_of_adapters_and_of_no_mixture(models, call):
    model = make_adapter(models / "adapter", seed=3)
    query = "bert.encoder.layer.0.attention.self.query"
    found = spectra({"x": str(models / "adapter")}, layer="*query")["x"]
    delta = model.base_model.model.get_submodule(query).get_delta_weight("default").detach().double()
    torch.testing.assert_close(
        torch.tensor(found[query], dtype=torch.float64), torch.linalg.svdvals(delta)[:4], rtol=1e-5, atol=1e-7
    )
    assert "adapter are adapters, the others full models" in call(
        "inspect", models / "a", models / "adapter", "--spectrum", code=2
    )
