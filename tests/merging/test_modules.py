"""Modules of the pre-trained model that adapters trained whole, and their vocabularies."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models

from osrm_peft import EMRAdapter, load_adapter, merge_adapters
from osrm_peft.models.vocabulary import first_difference, tokens_in
from tests.helpers.modules import EMBED, LM_HEAD, SAVES, alike, close, tensors, weights
from tests.zoo.adapters import adapted, edit, stock, write
from tests.zoo.models import noisy, outputs


@pytest.fixture
def folders(tmp_path):
    """Three adapters that trained lm_head and embed_tokens."""
    return {f"t{seed}": write(adapted("llama", seed, **SAVES), tmp_path / f"t{seed}") for seed in (1, 2, 3)}


@torch.no_grad()
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5], {"t1": 3, "t2": -1, "t3": 1}])
def test_the_average_is_by_weights_and_stock_peft_loads_it(weights, folders, tmp_path):
    merged = merge_adapters(folders, "task_arithmetic", weights=weights, scale=0.5)
    merged.save_pretrained(tmp_path / "out")
    shares = torch.tensor([1.0] * 3 if weights is None else list(getattr(weights, "values", lambda: weights)()))
    shares = shares / shares.sum()
    own = {task: tensors(folder) for task, folder in folders.items()}
    base = noisy("llama", 0)
    expected = {
        name: sum(share * one[name] for share, one in zip(shares, own.values(), strict=True))
        for name in (LM_HEAD, EMBED)
    }
    for name, value in expected.items():
        close(merged.modules[name], value)
        base.get_parameter(name).copy_(value)
    for layer, delta in merged.deltas().items():
        base.get_submodule(layer).weight += delta.float()
    assert json.loads((tmp_path / "out/osrm_peft.json").read_text())["modules"] == dict.fromkeys(
        [LM_HEAD, EMBED], "average"
    )
    close(outputs(stock("llama", tmp_path / "out")), outputs(base), 1e-5)
    close(outputs(merged.load(noisy("llama", 0))), outputs(base), 1e-5)
    close(merged.at_scale(2.0).modules[LM_HEAD], expected[LM_HEAD])  # λ does not touch them


def test_weights_by_pattern_count_for_modules_too(folders):
    weights = {"t1": {"lm_head*": 1, "*": 0.5}, "t2": {"lm_head*": 3, "*": 0.5}, "t3": {"*lm_head*": 0, "*": 1}}
    merged = merge_adapters(folders, "task_arithmetic", weights=weights)
    own = [tensors(folder) for folder in folders.values()]
    close(merged.modules[LM_HEAD], (own[0][LM_HEAD] + 3 * own[1][LM_HEAD]) / 4)
    close(merged.modules[EMBED], (own[0][EMBED] + own[1][EMBED] + 2 * own[2][EMBED]) / 4)


@torch.no_grad()
def test_per_task_keeps_each_task_s_own(folders, tmp_path):
    merged = merge_adapters(folders, "average", modules="per_task")
    merged.save_pretrained(tmp_path / "out")
    assert not any(name in tensors(tmp_path / "out") for name in (LM_HEAD, EMBED))
    for task, folder in folders.items():
        loaded = load_adapter(tmp_path / "out", task=task)
        assert set(loaded.modules) == {LM_HEAD, EMBED} and not loaded.heads
        close(loaded.modules[LM_HEAD], tensors(folder)[LM_HEAD], 0)
        loaded.save_pretrained(tmp_path / task)
        close(outputs(stock("llama", tmp_path / task)), outputs(merged.load(noisy("llama", 0), task)))
    with pytest.raises(ValueError, match="is a merge of several tasks: say whose head"):
        merge_adapters({"again": tmp_path / "out"}, "average")


@torch.no_grad()
def test_one_task_s_modules_are_taken_where_a_task_is_named(folders, tmp_path):
    merged = merge_adapters(folders, "average", modules="t2")
    merged.save_pretrained(tmp_path / "out")
    close(tensors(tmp_path / "out")[LM_HEAD], tensors(folders["t2"])[LM_HEAD], 0)
    again = merge_adapters({"x": tmp_path / "out"}, "average")  # a merge without heads can be merged again
    close(outputs(again.load(noisy("llama", 0))), outputs(merged.load(noisy("llama", 0))), 1e-5)


@torch.no_grad()
def test_emr_keeps_them_per_task_and_saves_them(folders, tmp_path):
    merge_adapters(folders, "emr").save_pretrained(tmp_path / "out")
    merged = EMRAdapter.from_pretrained(tmp_path / "out")
    for task, folder in folders.items():
        close(merged.load(noisy("llama", 0), task).get_parameter(LM_HEAD), tensors(folder)[LM_HEAD], 0)
    model = noisy("llama", 0)
    with merged.applied_to(model, "t1"):
        assert not torch.equal(model.get_parameter(LM_HEAD), noisy("llama", 0).get_parameter(LM_HEAD))
    close(model.get_parameter(LM_HEAD), noisy("llama", 0).get_parameter(LM_HEAD), 0)
    averaged = merge_adapters(folders, "emr", modules="average")
    mean = sum(tensors(folder)[LM_HEAD] for folder in folders.values()) / 3
    close(averaged.load(noisy("llama", 0), "t1").get_parameter(LM_HEAD), mean)


def test_what_cannot_be_averaged_is_refused_and_each_way_out_works(folders, tmp_path):
    folders["plain"] = write(adapted("llama", 4, target_modules=["q_proj"]), tmp_path / "plain")
    message = rf"'{LM_HEAD}' was trained by t1, t2, t3 and not by plain, .* has no average: .* modules=TASK"
    with pytest.raises(ValueError, match=message):
        merge_adapters(folders, "average")
    assert merge_adapters(folders, "average", modules="per_task").tasks["t1"].modules
    assert set(merge_adapters(folders, "average", modules="t3").modules) == {LM_HEAD, EMBED}
    base = merge_adapters(folders, "average", modules="plain")
    assert not base.modules and base.manifest["modules"] == dict.fromkeys(
        [LM_HEAD, EMBED], "the base model's, as in plain"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modules": "error"}, r"t1, t2, t3 trained lm_head.weight, model.embed_tokens.weight and modules='error'"),
        ({"modules": "sum"}, r"unknown modules policy 'sum': choose from average, per_task, error, t1, t2, t3"),
        ({"weights": [1, -1, 0]}, r"the weights of 'lm_head.weight' add up to 0, so it has no average"),
        ({"weights": [1, -3, 1]}, r"the weights of 'lm_head.weight' add up to -1"),
    ],
)
def test_bad_arguments_are_named(arguments, message, folders):
    with pytest.raises(ValueError, match=message):
        merge_adapters(folders, "task_arithmetic", **arguments)


def test_a_dtype_is_kept_and_mixed_ones_are_promoted(tmp_path):
    for seed, dtype in ((1, torch.bfloat16), (2, torch.float32)):
        model = adapted("llama", seed, **SAVES)
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "lora_" in name:
                parameter.data = parameter.data.to(dtype)
        write(model, tmp_path / f"t{seed}")
    one, both = {"a": tmp_path / "t1"}, {"a": tmp_path / "t1", "b": tmp_path / "t2"}
    assert merge_adapters(one, "average").modules[LM_HEAD].dtype == torch.bfloat16
    assert merge_adapters(both, "average").modules[LM_HEAD].dtype == torch.float32


# vocabularies


def tokenizer(folder, words):
    """A tokenizer.json of these words, as a Trainer saves it beside an adapter."""
    Tokenizer(models.WordLevel({word: row for row, word in enumerate(words)}, unk_token=words[0])).save(
        str(folder / "tokenizer.json")
    )


WORDS = [f"w{i}" for i in range(40)]


@pytest.mark.parametrize(
    ("other", "token"),
    [
        (WORDS[::-1], "w0"),
        ([*WORDS[:7], "new", *WORDS[8:]], "w7"),
        ([*WORDS[:5], WORDS[6], WORDS[5], *WORDS[7:]], "w5"),
    ],
)
def test_vocabularies_that_differ_are_refused_by_token(other, token, folders):
    tokenizer(folders["t1"], WORDS)
    tokenizer(folders["t3"], other)
    with pytest.raises(ValueError, match=rf"token '{token}' is row \d+ in 't1', (row \d+|missing) in 't3'"):
        merge_adapters(folders, "average")
    assert merge_adapters(folders, "average", modules="per_task").layers


def test_a_token_more_is_no_difference_and_other_layers_do_not_ask(folders, tmp_path):
    tokenizer(folders["t1"], WORDS)
    tokenizer(folders["t2"], WORDS[:39])
    assert merge_adapters(folders, "average").modules
    plain = {
        f"p{seed}": write(adapted("llama", seed, target_modules=["q_proj"]), tmp_path / f"p{seed}") for seed in (1, 2)
    }
    tokenizer(plain["p1"], WORDS)
    tokenizer(plain["p2"], WORDS[::-1])
    assert merge_adapters(plain, "average").layers


def test_embeddings_of_two_sizes_are_refused_by_token(tmp_path):
    options = SAVES | {"modules_to_save": ["embed_tokens", "lm_head"]}
    a = write(adapted("llama", 1, 2, **options), tmp_path / "a", save_embedding_layers=True)
    b = write(adapted("llama", 2, 3, **options), tmp_path / "b", save_embedding_layers=True)
    tokenizer(a, [*WORDS, "<x>", "<y>"])
    tokenizer(b, [*WORDS, "<x>", "<y>", "<z>"])
    with pytest.raises(
        ValueError, match=r"is 42×16 in 'a', 43×16 in 'b': vocabularies differ \(token '<z>' is only in 'b'\)"
    ):
        merge_adapters({"a": a, "b": b}, "average")
    assert merge_adapters({"a": a, "b": b}, "average", modules="b").modules[LM_HEAD].shape == (43, 16)


def test_tokenizers_of_every_kind_are_read(tmp_path):
    unigram = {"model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.0]]},
               "added_tokens": [{"id": 2, "content": "<new>"}]}  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(unigram))
    assert tokens_in(tmp_path) == {"<unk>": 0, "a": 1, "<new>": 2}
    assert tokens_in(tmp_path / "nothing") == tokens_in(None) == {}
    slow = tmp_path / "slow"
    slow.mkdir()
    decoder = {"added_tokens_decoder": {"2": {"content": "<new>"}, "0": {"content": "<unk>"}}}
    (slow / "tokenizer_config.json").write_text(json.dumps(decoder))
    assert tokens_in(slow) == {"<new>": 2, "<unk>": 0}
    (slow / "added_tokens.json").write_text('{"<other>": 7}')
    assert tokens_in(slow) == {"<other>": 7}
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(ValueError, match=r"tokenizer.json is damaged .* save the tokenizer again"):
        tokens_in(tmp_path)
    assert first_difference({"a": 0, "b": 1}, {"a": 0, "b": 1, "c": 2}) is None
    assert first_difference({"a": 0, "b": 1}, {"a": 0, "c": 1}) == ("b", 1, None)


def test_a_module_that_the_model_lacks_is_named(tmp_path):
    folder = write(adapted("llama", 1, **SAVES), tmp_path / "a")
    with pytest.raises(ValueError, match=r"LlamaModel lacks 2 of the 2 adapted layers"):
        load_adapter(folder).attach(noisy("llama", 0).model)


def test_a_head_of_a_task_is_no_module(tmp_path):
    """Heads stay apart, and modules beside them are averaged."""
    options = {"target_modules": ["query"], "modules_to_save": ["pooler"]}
    for seed in (1, 2):
        write(adapted("bert", seed, **options), tmp_path / f"t{seed}")
    merged = merge_adapters({f"t{seed}": tmp_path / f"t{seed}" for seed in (1, 2)}, "average")
    merged.save_pretrained(tmp_path / "out")
    for seed in (1, 2):
        close(load_adapter(tmp_path / "out", task=f"t{seed}").heads["classifier.weight"],
              tensors(tmp_path / f"t{seed}")["classifier.weight"], 0)  # fmt: skip
    mean = sum(tensors(tmp_path / f"t{seed}")["bert.pooler.dense.weight"] for seed in (1, 2)) / 2
    close(merged.modules["bert.pooler.dense.weight"], mean)
    stock("bert", tmp_path / "out")
    edit(tmp_path / "out", task_type="CAUSAL_LM")
    assert load_adapter(tmp_path / "out").modules


def test_weights_by_pattern_are_those_of_the_layer_that_a_module_is(folders):
    weights = {"t1": {"lm_head": 1, "*": 0}, "t2": {"lm_head": 3, "*embed_tokens": 1, "*": 1}, "t3": {"*": 0}}
    merged = merge_adapters(folders, "task_arithmetic", weights=weights)
    own = {task: tensors(folder) for task, folder in folders.items()}
    close(merged.modules[LM_HEAD], (own["t1"][LM_HEAD] + 3 * own["t2"][LM_HEAD]) / 4)
    close(merged.modules[EMBED], own["t2"][EMBED])


@torch.no_grad()
@pytest.mark.parametrize("rank", [1, "serving"])
def test_a_rank_and_a_scale_do_not_touch_modules(rank, folders, tmp_path):
    exact = merge_adapters(folders, "average")
    merged = merge_adapters(folders, "average", rank=rank).at_scale(2.0)
    merged.save_pretrained(tmp_path / "out")
    for name, one in load_adapter(tmp_path / "out").modules.items():
        close(one, exact.modules[name], 0)
    close(outputs(stock("llama", tmp_path / "out")), outputs(merged.load(noisy("llama", 0))), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_merge_of_a_merge_keeps_modules_and_heads(name, tmp_path):
    """Of three adapters, two merged first: their average weighs half."""
    config = {"llama": SAVES, "bert": {"target_modules": ["query"], "modules_to_save": ["pooler"]}}[name]
    live = [adapted(name, seed, **config) for seed in (1, 2, 3)]
    folders = [write(model, tmp_path / str(place)) for place, model in enumerate(live)]
    merge_adapters({"x": folders[0], "y": folders[1]}, "average").save_pretrained(tmp_path / "first")
    first = load_adapter(tmp_path / "first", task="x")
    merged = merge_adapters({"first": first, "z": folders[2]}, "average")
    merged.save_pretrained(tmp_path / "second")
    one, two, three = map(weights, live)
    mean = {name: (one[name] + two[name] + 2 * three[name]) / 4 for name in one}
    for task, head in (("first", one), ("z", three)):
        expected = mean | {key: value for key, value in head.items() if "classifier" in key}
        alike(weights(merged.load(noisy(name, 0), task)), expected)
        load_adapter(tmp_path / "second", task=task).save_pretrained(tmp_path / task)
        alike(weights(stock(name, tmp_path / task)), expected)
