"""Stacks of experts are stacks of matrices: spectral methods merge each expert for itself, and λ is of them, too."""

import json

import pytest
import torch
from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

from osrm_peft import merge_checkpoints
from osrm_peft.checkpoints.plan import plan_checkpoints
from osrm_peft.checkpoints.shapes import expert_stacks
from tests.helpers.checkpoints import tensors_of, write
from tests.zoo.models import noisy

E, SHAPE, NAME = 3, (4, 5), "layers.0.mlp.experts.down_proj"
CASES = {"tsv": {}, "iso": {}, "lore": {"max_iterations": 4}, "ties": {"trim": "layer"}}


def both_ways(tmp_path):
    """{name: folder} of a base and three models, their experts in one tensor, and a matrix each."""
    generator = torch.Generator().manual_seed(0)
    stacked, apart = {}, {}
    for name in ("base", "a", "b", "c"):
        stack = torch.randn(E, *SHAPE, generator=generator)
        config = {"model_type": "none", "num_experts": E}
        stacked[name] = write(tmp_path / "stacked" / name, {NAME: stack}, config)
        apart[name] = write(tmp_path / "apart" / name, {f"{NAME}.{e}": stack[e] for e in range(E)}, config)
    return stacked, apart


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("method", CASES)
def test_a_stack_is_merged_as_its_experts_one_by_one(method, scale, tmp_path, caplog):
    found = []
    for folders in both_ways(tmp_path):
        base, models = folders["base"], {name: folders[name] for name in "abc"}
        out = folders["base"].parent / "out"
        merge_checkpoints(models, out, method, base=base, scale=scale, weights=[1.0, 0.5, 2.0], **CASES[method])
        found.append((tensors_of(out), json.loads((out / "osrm_peft.json").read_text())))
    (stacked, manifest), (apart, _) = found
    torch.testing.assert_close(stacked[NAME], torch.stack([apart[f"{NAME}.{e}"] for e in range(E)]))
    assert not manifest.get("averaged") and "averaged instead" not in caplog.text
    if method in ("tsv", "iso"):
        base, once = (tensors_of(tmp_path / "stacked" / name)[NAME] for name in ("base", "out"))
        merge_checkpoints(models_of(tmp_path), tmp_path / "one", method, base=tmp_path / "stacked/base", scale=1.0,
                          weights=[1.0, 0.5, 2.0])  # fmt: skip
        torch.testing.assert_close(once - base, scale * (tensors_of(tmp_path / "one")[NAME] - base))


def models_of(tmp_path):
    return {name: tmp_path / "stacked" / name for name in "abc"}


EVIDENCE = {
    "name": ("mlp.experts.down_proj", (3, 4, 5), {"num_experts": 3}, "", True),
    "field_of_a_part": ("mlp.experts.w", (3, 4, 5), {"text_config": {"n_routed_experts": 3}}, "", True),
    "class": ("mlp.input_linear.weight", (3, 4, 5), {"num_local_experts": 3}, "GraniteMoeParallelExperts", True),
    "kernel": ("mixer.conv1d.weight", (3, 4, 5), {"num_experts": 3}, "Conv1d", False),
    "no_field": ("mlp.experts.down_proj", (3, 4, 5), {"hidden_size": 3}, "", False),
    "another_number": ("mlp.experts.down_proj", (3, 4, 5), {"num_experts": 4}, "", False),
    "vectors": ("mlp.experts.down_proj", (3, 1, 5), {"num_experts": 3}, "", False),
    "four_axes": ("mlp.experts.down_proj", (3, 4, 5, 6), {"num_experts": 3}, "", False),
}


@pytest.mark.parametrize("name", EVIDENCE)
def test_what_is_a_stack_is_said_by_the_config_and_by_the_name_or_class(name):
    tensor, shape, config, kind, expected = EVIDENCE[name]
    assert bool(expert_stacks(config, {tensor: shape}, {tensor: kind})) is expected


def granite():  # whose files name no experts
    config = GraniteMoeConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                              num_attention_heads=2, num_key_value_heads=1, num_local_experts=4)  # fmt: skip
    return GraniteMoeForCausalLM(config)


@pytest.mark.parametrize(("model", "stacks"), [
    (lambda: noisy("gpt_oss", 0), {"gate_up_proj", "down_proj"}),
    (lambda: noisy("mixtral", 0), {"gate_up_proj", "down_proj"}),
    (granite, {"gate_up_proj", "down_proj"}),
], ids=["gpt_oss", "mixtral", "granite"])  # fmt: skip
@pytest.mark.parametrize("original", [True, False])
def test_stacks_of_real_models_are_found(model, stacks, original, tmp_path):
    model().save_pretrained(tmp_path / "a", save_original_format=original)
    plan = plan_checkpoints(
        dict.fromkeys("xy", tmp_path / "a"), "iso", base=tmp_path / "a", weights=None, scale=None, heads=(),
        vocab="error", tokenizer=None, dtype=None, shard_size="1GB", seed=0,
    )  # fmt: skip
    several = {name for name, shape in plan.shapes.items() if len(shape) == 3}
    assert plan.stacks == several and not [name for name in plan.averaged if len(plan.shapes[name]) > 2]
