"""What `from_pretrained` loads, in whatever way the file has it, merges to the same weights."""

import functools
import json
import re
import shutil
from fnmatch import fnmatch

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from transformers.conversion_mapping import get_model_conversion_mapping

from osrm_peft import merge_checkpoints
from tests.zoo.models import ZOO, noisy, outputs


@functools.cache
def made(name, root):
    """Folder of `a` and `b`, two such models; what is loaded from them; and its average."""
    for seed, part in enumerate("ab"):
        noisy(name, seed).save_pretrained(root / name / part)
    states = {part: loaded(name, root / name / part).state_dict() for part in "ab"}
    a, b = states.values()
    average = {key: (a[key] + b[key]) / 2 if a[key].is_floating_point() else a[key] for key in a}
    return root / name, states, average


def loaded(name, folder):
    model, info = getattr(T, ZOO[name][0]).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    return model


# ways in which files have the same model; each returns new tensors, or None where the model has no such way


def without_prefix(model, tensors):
    prefix = f"{model.base_model_prefix}."
    return {key.removeprefix(prefix): value for key, value in tensors.items()} if has(tensors, f"^{prefix}") else None


def with_prefix(model, tensors):
    return (
        {f"{model.base_model_prefix}.{key}": value for key, value in tensors.items()}
        if model.base_model is model
        else None
    )


def gamma_and_beta(model, tensors):
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    if not has(tensors, r"LayerNorm\.weight"):
        return None
    return {functools.reduce(lambda text, pair: text.replace(*pair), old.items(), key): value
            for key, value in tensors.items()}  # fmt: skip


def tied_copies(model, tensors):
    ties = {target: source for target, source in model.all_tied_weights_keys.items() if source in tensors}
    return tensors | {target: tensors[source].clone() for target, source in ties.items()} if ties else None


def tied_under_the_other_name(model, tensors):
    ties = [(target, source) for target, source in model.all_tied_weights_keys.items() if source in tensors]
    return {ties[0][0] if key == ties[0][1] else key: value for key, value in tensors.items()} if ties else None


def old_buffers(model, tensors):
    buffers = [name for name, _ in model.named_buffers()]
    more = {}
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        more["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    more |= {name: torch.arange(32)[None] for name in buffers if name.endswith("position_ids") and name not in tensors}
    return tensors | more if more else None


def old_weight_norm(model, tensors):
    names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    if not has(tensors, "parametrizations"):
        return None
    return {functools.reduce(lambda text, pair: text.replace(*pair), names.items(), key): value
            for key, value in tensors.items()}  # fmt: skip


def has(tensors, pattern):
    return any(re.search(pattern, key) for key in tensors)


WAYS = (
    without_prefix,
    with_prefix,
    gamma_and_beta,
    tied_copies,
    tied_under_the_other_name,
    old_buffers,
    old_weight_norm,
)


@functools.cache
def ways_of(name):
    """Names of the ways that a model has."""
    model = noisy(name, 0)
    tensors = {key: value for key, value in model.state_dict().items() if key not in model.all_tied_weights_keys}
    converted = ["layout_of_memory"] if get_model_conversion_mapping(model, add_legacy=False) else []
    sharded = ["sharded"] if name in ("llama_tied", "bert_mlm", "mixtral", "t5") else []
    named = [way.__name__ for way in WAYS if way(model, tensors)]
    if name == "qwen2_vl":  # transformers takes a file without prefix for one of the first version's text model
        named.remove("without_prefix")
    return ["short_config", *converted, *sharded, *named]


def rewritten(name, folder, new, way):
    """The model in `folder` once more, written another way."""
    if way == "sharded":
        loaded(name, folder).save_pretrained(new, max_shard_size="4KB")
    elif way == "layout_of_memory":
        loaded(name, folder).save_pretrained(new, save_original_format=False)
    else:
        shutil.copytree(folder, new)
    if way == "short_config":
        config, defaults = (
            json.loads((new / "config.json").read_text()),
            getattr(T, ZOO[name][0]).config_class().to_dict(),
        )
        kept = {key: value for key, value in config.items() if key == "model_type" or value != defaults.get(key)}
        (new / "config.json").write_text(json.dumps(kept))
    changes = {one.__name__: one for one in WAYS}
    if way in changes:
        tensors = changes[way](noisy(name, 0), load_file(new / "model.safetensors"))
        if tensors is not None:
            save_file(tensors, new / "model.safetensors", {"format": "pt"})
    return new


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("zoo")


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(("name", "way"), [(name, way) for name in ZOO for way in ["as_saved", *ways_of(name)]])
def test_what_from_pretrained_loads_is_merged_to_the_same_weights(root, tmp_path, name, way):
    folder, states, expected = made(name, root)
    b = rewritten(name, folder / "b", tmp_path / "b", way) if way != "as_saved" else folder / "b"
    if way != "as_saved":
        same(loaded(name, b).state_dict(), states["b"])  # transformers reads this way
    orders = [{"b": b, "a": folder / "a"}, {"a": folder / "a", "b": b}]
    for order in orders if way in ("without_prefix", "tied_under_the_other_name") else orders[:1]:
        try:
            out = merge_checkpoints(order, tmp_path / "out")
        except ValueError as error:
            assert "two layouts of one model" in str(error) and way == "layout_of_memory", error
            anew = {part: tmp_path / f"{part}_anew" for part in order}
            for part, source in order.items():  # the way out
                loaded(name, source).save_pretrained(anew[part], save_original_format=False)
            out = merge_checkpoints(anew, tmp_path / "out")
        model = loaded(name, out)
        same(model.state_dict(), expected)
    if way == "as_saved":
        by_hand = noisy(name, 2)
        by_hand.load_state_dict(expected)
        with torch.no_grad():
            torch.testing.assert_close(outputs(model), outputs(by_hand), rtol=1e-4, atol=1e-5)


# a base file has the bare model, or another head: what the models lack of it is left out, what it lacks is named


@pytest.mark.parametrize(
    ("name", "other", "heads"),
    [
        ("bert", "BertModel", ["classifier*"]),
        ("bert", "BertForPreTraining", ["classifier*"]),
        ("roberta", "RobertaModel", ["lm_head*"]),
        ("distilbert", "DistilBertForMaskedLM", ["*classifier*"]),
        ("llama", "LlamaModel", ["lm_head*"]),
        ("llama_classifier", "LlamaForCausalLM", ["score*"]),
        ("llama_tied", "LlamaModel", []),
        ("gpt2", "GPT2Model", []),
        ("t5", "T5Model", []),
        ("vit", "ViTModel", ["classifier*"]),
        ("mixtral", "MixtralModel", ["lm_head*"]),
    ],
)
def test_a_base_of_another_head_is_a_base(root, tmp_path, name, other, heads):
    folder, states, _ = made(name, root)
    config = getattr(T, ZOO[name][0]).config_class(**ZOO[name][1])
    torch.manual_seed(5)
    getattr(T, other)(config).save_pretrained(tmp_path / "base")
    models = {part: folder / part for part in "ab"}
    if heads:
        with pytest.raises(ValueError, match=r"has a tensor .* has not: .* name it in heads="):
            merge_checkpoints(models, tmp_path / "out", "task_arithmetic", base=tmp_path / "base")
    out = merge_checkpoints(models, tmp_path / "out", "task_arithmetic", base=tmp_path / "base", heads=heads)
    start = getattr(T, ZOO[name][0]).from_pretrained(tmp_path / "base").state_dict()
    found = getattr(T, ZOO[name][0]).from_pretrained(out).state_dict()
    own = {key for key in start if any(fnmatch(key, pattern) for pattern in heads)}
    for key, value in start.items():
        if key not in own:
            tau = sum(states[part][key] - value for part in "ab")
            torch.testing.assert_close(found[key], value + 0.3 * tau, rtol=1e-5, atol=1e-6)
    assert len(own) < len(start) / 2
