"""Causal language models trained on tasks in words: the loss, packing, features, and files that stock PEFT loads."""

import json

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, DataCollatorForTokenClassification

from osrm_peft import collect_features, load_adapter, merge_adapters
from osrm_peft.cli.features import _check_same
from osrm_peft.io.manifest import read_manifest
from osrm_peft.pipeline.check import check_recipe
from osrm_peft.tasks.text import tokenize_text, with_labels
from osrm_peft.training.recipe import Recipe
from tests.helpers.causal import save_tiny
from tests.tasks.test_text import ROWS, write


@pytest.fixture
def place(tmp_path):
    """A folder with a tiny model and two tasks of 12 rows."""
    model, tokenizer = save_tiny(tmp_path / "model")
    for name in ("films", "songs"):
        write(tmp_path / "data", ROWS * 3, name)
    return tmp_path, model, tokenizer


def recipe_of(folder, **fields):
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    training = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "use_cpu": True}
    given = {
        "lora": lora,
        "training": training,
        "max_length": 16,
        "num_samples": 8,
        "out": str(folder / "out"),
    } | fields
    return Recipe(model=str(folder / "model"), suite=f"files:{folder}/data", **given)


def test_the_first_loss_is_the_mean_over_the_tokens_of_the_completions(place):
    folder, model, tokenizer = place
    recipe = recipe_of(folder, training={"max_steps": 1, "per_device_train_batch_size": 12, "logging_steps": 1,
                                         "use_cpu": True})  # fmt: skip
    recipe.train("films", folder / "films", progress=False)
    rows = tokenize_text(recipe.task("films").train, tokenizer, 16)
    losses = []
    for ids, mask in zip(rows["input_ids"], rows["completion_mask"], strict=True):
        logits = model(torch.tensor([ids])).logits[0, :-1]
        each = cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        losses += each[torch.tensor(mask[1:], dtype=torch.bool)].tolist()
    log = read_manifest(folder / "films")["log"]
    assert log[0]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)  # in float32, not in bfloat16


@pytest.mark.parametrize("osrm", [None, {}])
@pytest.mark.parametrize("packing", [False, True])
def test_an_adapter_loads_in_stock_peft_with_equal_logits(place, osrm, packing):
    folder, _, tokenizer = place
    recipe = recipe_of(folder, osrm=osrm, packing=packing)
    if osrm is not None:
        for name in recipe.task_names():
            recipe.collect(name, progress=False).save(recipe.features_file(name))
    recipe.train("films", folder / "films", progress=False)
    batch = tokenizer(["the film was good"], return_tensors="pt")
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), folder / "films").eval()
    logits = stock(**batch).logits
    torch.testing.assert_close(load_adapter(folder / "films").attach(str(folder / "model"))(**batch).logits, logits)
    with stock.disable_adapter():
        assert not torch.equal(stock(**batch).logits, logits)
    merged = merge_adapters({"a": folder / "films", "b": folder / "films"}, "average")
    torch.testing.assert_close(merged.load(str(folder / "model"), "a")(**batch).logits, logits, rtol=0, atol=1e-5)
    manifest = read_manifest(folder / "films")
    assert manifest["task_type"] == "CAUSAL_LM" and manifest["metric"] == "exact_match"
    assert manifest.get("packing", False) is packing and ("out_of_task" in json.dumps(manifest)) is (osrm is not None)


@pytest.mark.parametrize("statistic", ["mean", "sample", "token"])
@pytest.mark.parametrize("tokens", ["all", "prompt", "completion"])
def test_features_look_at_the_tokens_that_are_named(place, tokens, statistic, tmp_path):
    _, model, tokenizer = place
    rows = tokenize_text(recipe_of(tmp_path).task("films").train.select(range(5)), tokenizer, 16)
    batches = [DataCollatorForTokenClassification(tokenizer)(list(with_labels(rows)))]
    found = collect_features(
        model, batches, task="films", target_modules=["q_proj"], tokens=tokens, statistic=statistic, num_samples=5,
        progress=False,
    )  # fmt: skip
    seen = []
    layer = model.model.layers[1].self_attn.q_proj
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    for ids, mask in zip(rows["input_ids"], rows["completion_mask"], strict=True):
        model(torch.tensor([ids]))
        wanted = torch.tensor(mask, dtype=torch.bool) == (tokens == "completion")
        seen[-1] = seen[-1][0] if tokens == "all" else seen[-1][0][wanted]
    handle.remove()
    moments = found.layers["model.layers.1.self_attn.q_proj"]
    vectors = torch.cat(seen) if statistic == "token" else torch.stack([one.mean(0) for one in seen])
    torch.testing.assert_close(moments.mean(), vectors.double().mean(0), rtol=0, atol=1e-6)
    if statistic != "mean":
        expected = vectors.double().mT @ vectors.double() / len(vectors)
        torch.testing.assert_close(moments.second_moment(), expected, rtol=0, atol=1e-6)
    found.save(tmp_path / "f.safetensors")
    assert type(found).load(tmp_path / "f.safetensors").tokens == tokens


def test_a_file_of_other_tokens_is_not_what_is_asked_for(place):
    folder, *_ = place
    recipe = recipe_of(folder, tokens="prompt")
    found = recipe.collect("films", progress=False)
    _check_same(found, recipe)
    with pytest.raises(ValueError, match=r"is there already, with tokens='prompt' and not 'completion'"):
        _check_same(found, recipe_of(folder, tokens="completion"))


def test_tokens_need_a_label_each(place):
    _, model, tokenizer = place
    batch = dict(tokenizer(["the film was good"], return_tensors="pt"))
    for labels in ({}, {"labels": torch.tensor([1])}):
        with pytest.raises(ValueError, match=r"tokens='prompt' needs a label for each token, −100 in the prompt"):
            collect_features(model, [batch | labels], task="t", target_modules=["q_proj"], tokens="prompt")
    with pytest.raises(ValueError, match="tokens 'words'"):
        collect_features(model, [batch], task="t", target_modules=["q_proj"], tokens="words")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora": {"task_type": "SEQ_2_SEQ_LM"}}, r"task_type in lora of the recipe 'SEQ_2_SEQ_LM'"),
        ({"lora": {"task_type": "SEQ_CLS"}, "packing": True}, r"packing in the recipe is of tasks in words"),
        ({"lora": {"task_type": "SEQ_CLS"}, "tokens": "prompt"}, r"tokens in the recipe is of tasks in words"),
        ({"tokens": "words"}, r"tokens 'words'"),
    ],
)
def test_fields_that_do_not_fit_tasks_in_words(place, fields, message):
    with pytest.raises(ValueError, match=message):
        recipe_of(place[0], **fields)


def test_rows_and_task_type_must_agree(place):
    folder, *_ = place
    with pytest.raises(ValueError, match=r"the rows of 'films' are of prompts: give lora: {task_type: CAUSAL_LM}"):
        recipe_of(folder, lora={}).task("films")
    with pytest.raises(ValueError, match=r"the rows of 'tweets' are of classes: give lora: {task_type: SEQ_CLS}"):
        Recipe(model="packaged", suite="packaged", lora={"task_type": "CAUSAL_LM"}).task("tweets")


def test_check_knows_a_recipe_in_words(place):
    folder, *_ = place
    path = folder / "recipe.yaml"
    path.write_text(
        "model: model\nsuite: files:data\nlora: {target_modules: [q_proj], task_type: CAUSAL_LM}\ntokens: completion\n"
    )
    mistakes, tasks = check_recipe(path)
    assert not mistakes and list(tasks) == ["films", "songs"]
    path.write_text(path.read_text().replace("q_proj", "query"))
    assert "query" in check_recipe(path)[0][0].text
