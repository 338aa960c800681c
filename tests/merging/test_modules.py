"""Modules of the pre-trained model that adapters trained whole, and copies of base weights that PEFT wrote along."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models

from osrm_peft import EMRAdapter, load_adapter, merge_adapters
from osrm_peft.models.vocabulary import first_difference, tokens_in
from tests.zoo.adapters import WEIGHTS, adapted, edit, resized, stock, write
from tests.zoo.models import noisy, outputs

LM_HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"
SAVES = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}
PREFIX = "base_model.model."


@pytest.fixture
def folders(tmp_path):
    """Three adapters that trained lm_head and embed_tokens."""
    return {f"t{seed}": write(adapted("llama", seed, **SAVES), tmp_path / f"t{seed}") for seed in (1, 2, 3)}


def tensors(folder):
    return {key.removeprefix(PREFIX): value for key, value in load_file(folder / WEIGHTS).items()}


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


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


def test_a_token_more_is_no_difference_and_layers_without_rows_of_a_vocabulary_do_not_ask(folders, tmp_path):
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


# copies of base weights

COPIES = {
    "targeted": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "beside": {"target_modules": ["q_proj"]},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", COPIES)
def test_copies_that_differ_are_refused_by_rows_unless_a_policy_is_named(kind, tmp_path):
    folders = {}
    for seed in (1, 2):
        model = adapted("llama", seed, 3, **COPIES[kind])
        resized_rows = model.get_base_model().get_input_embeddings()
        weight = getattr(resized_rows, "base_layer", resized_rows).weight
        weight[40:] += seed  # each user's own new rows
        folders[f"t{seed}"] = write(model, tmp_path / f"t{seed}", save_embedding_layers=True)
    with pytest.raises(
        ValueError, match=rf"the base's '{EMBED}' that differ in 3 rows from 40 to 42 of 43: .*modules='average'"
    ):
        merge_adapters(folders, "average")
    own = [load_adapter(folder).copies[EMBED] for folder in folders.values()]
    close(merge_adapters(folders, "average", modules="average").copies[EMBED], sum(own) / 2)
    merge_adapters(folders, "average", modules="t2").save_pretrained(tmp_path / "out")
    close(load_adapter(tmp_path / "out").copies[EMBED], own[1], 0)
    merged = merge_adapters(folders, "average", modules="per_task")
    merged.save_pretrained(tmp_path / "apart")
    for task, kept in zip(folders, own, strict=True):
        rows = merged.load(resized(noisy("llama", 0), 3, 99), task).get_base_model().get_input_embeddings()
        close(getattr(rows, "base_layer", rows).weight, kept, 0)
        close(load_adapter(tmp_path / "apart", task=task).copies[EMBED], kept, 0)


def test_copies_are_compared_in_the_coarser_dtype(tmp_path):
    for seed, dtype in ((1, torch.bfloat16), (2, torch.float32)):
        model = adapted("llama", seed, **COPIES["beside"])
        model.get_base_model().to(dtype)
        write(model, tmp_path / f"t{seed}", save_embedding_layers=True)
    merged = merge_adapters({f"t{seed}": tmp_path / f"t{seed}" for seed in (1, 2)}, "average")
    assert set(merged.copies) == {EMBED, LM_HEAD}


def test_a_trained_module_of_one_and_a_copy_of_the_other_are_averaged(tmp_path):
    a = write(adapted("llama", 1, target_modules=["q_proj"], modules_to_save=["lm_head"]), tmp_path / "a")
    b = write(adapted("llama", 2, **COPIES["beside"]), tmp_path / "b", save_embedding_layers=True)
    merged = merge_adapters({"a": a, "b": b}, "average")
    close(merged.modules[LM_HEAD], (tensors(a)[LM_HEAD] + tensors(b)[LM_HEAD]) / 2)
    assert set(merged.copies) == {EMBED}


def test_a_base_without_the_new_tokens_is_refused_and_the_way_out_works(tmp_path):
    model = adapted("llama", 1, 3, **SAVES)
    folder = write(model, tmp_path / "a", save_embedding_layers=True)
    base = noisy("llama", 0)
    with pytest.raises(
        ValueError, match=r"has shape \(40, 16\) in the model and \(43, 16\) .*resize_token_embeddings\(43\)"
    ):
        load_adapter(folder).attach(base)
    assert not any("lora" in name for name, _ in base.named_modules())
    base.resize_token_embeddings(43)
    with torch.no_grad():
        close(outputs(load_adapter(folder).attach(base)), outputs(model), 1e-5)


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


# a layer that one has trained whole and another adapted by LoRA


def weights(model):
    """All of a PeftModel's weights after stock PEFT's merge_and_unload."""
    return {name: one.clone() for name, one in copy.deepcopy(model).merge_and_unload().state_dict().items()}


def alike(found, expected):
    for name, value in expected.items():
        close(found[name], value, 2e-6)


SAVED, ADAPTED = {"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}


@pytest.fixture
def clash(tmp_path):
    """a has trained lm_head whole, b by LoRA; and the weights of both, of the base, and of the average of τ alone."""
    live = {"a": adapted("llama", 1, target_modules=["q_proj"], **SAVED), "b": adapted("llama", 2, **ADAPTED)}
    folders = {task: write(model, tmp_path / task) for task, model in live.items()}
    own = {task: weights(model) for task, model in live.items()}
    base = noisy("llama", 0).state_dict()
    mean = {name: (value + own["b"][name]) / 2 for name, value in own["a"].items()}
    return folders, own, mean | {LM_HEAD: (base[LM_HEAD] + own["b"][LM_HEAD]) / 2}


@torch.no_grad()
@pytest.mark.parametrize("policy", ["per_task", "a", "b"])
def test_a_layer_trained_whole_has_no_lora(policy, clash, tmp_path):
    folders, own, mean = clash
    message = rf"'{LM_HEAD}' was trained by a and adapted by LoRA in b, so it has no average: modules='per_task' .*TASK"
    for default in (None, "average"):
        with pytest.raises(ValueError, match=message):
            merge_adapters(folders, "average", modules=default)
    merged = merge_adapters(folders, "average", modules=policy)
    assert ("lm_head" in merged.deltas()) == (policy != "a")
    merged.save_pretrained(tmp_path / "out")
    whole, by_lora = mean | {LM_HEAD: own["a"][LM_HEAD]}, mean
    shared = whole if policy == "a" else by_lora
    alike(weights(stock("llama", tmp_path / "out")), shared)
    alike(weights(merged.load(noisy("llama", 0))), shared)
    for task in ("a", "b"):
        expected = whole if policy == "a" or (policy, task) == ("per_task", "a") else by_lora
        alike(weights(merged.load(noisy("llama", 0), task)), expected)
        if policy != "b":  # nobody has anything for itself
            load_adapter(tmp_path / "out", task=task).save_pretrained(tmp_path / "one")
            alike(weights(stock("llama", tmp_path / "one")), expected)
    fate = "each task's own" if policy == "per_task" else f"that of {policy}"  # b has a copy of the base's
    assert merged.manifest["modules"] == {LM_HEAD: fate}


@torch.no_grad()
def test_emr_of_a_layer_trained_whole_by_one(clash, tmp_path):
    folders, own, _ = clash
    for merged in (merge_adapters(folders, "emr"), merge_adapters(folders, "emr", modules="a")):
        merged.save_pretrained(tmp_path / "emr")
        again = EMRAdapter.from_pretrained(tmp_path / "emr")
        for task in ("a", "b"):
            expected = merged.load(noisy("llama", 0), task).state_dict()
            if task == "a":
                close(expected[LM_HEAD], own["a"][LM_HEAD], 0)
            alike(again.load(noisy("llama", 0), task).state_dict(), expected)
            again.adapter(task).save_pretrained(tmp_path / task)
            found = weights(stock("llama", tmp_path / task))
            for name, value in expected.items():
                close(found[name], value, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_emr_in_a_live_model_refuses_a_trained_half_of_tied_weights_and_the_way_out_works(module, tmp_path):
    config = {"target_modules": ["q_proj"], "modules_to_save": [module]}
    folders = {f"t{seed}": write(adapted("llama_tied", seed, **config), tmp_path / f"t{seed}") for seed in (1, 2)}
    merged = merge_adapters(folders, "emr")
    base = noisy("llama_tied", 0)
    before = outputs(base)
    with pytest.raises(ValueError, match=rf"{module}.weight' shares its weight with .*; use .adapter\(task\)"):
        merged.load(base, "t1")
    close(outputs(base), before, 0)
    merged.adapter("t1").save_pretrained(tmp_path / "out")
    attached = merged.adapter("t1").attach(base)
    close(outputs(stock("llama_tied", tmp_path / "out")), outputs(attached), 1e-5)
    # trained together, they are one weight
    config |= {"ensure_weight_tying": True}
    folders = {f"t{seed}": write(adapted("llama_tied", seed, **config), tmp_path / f"t{seed}") for seed in (1, 2)}
    merged = merge_adapters(folders, "emr")
    merged.adapter("t1").save_pretrained(tmp_path / "out")
    close(outputs(merged.load(noisy("llama_tied", 0), "t1")), outputs(stock("llama_tied", tmp_path / "out")), 1e-5)


@torch.no_grad()
def test_what_other_tasks_trained_whole_is_no_target_of_the_shared_adapter(tmp_path):
    """all-linear, saved without the projector's modules, would adapt the projector."""
    config = {"target_modules": "all-linear", "modules_to_save": ["multi_modal_projector"]}
    folders = {f"t{seed}": write(adapted("llava", seed, **config), tmp_path / f"t{seed}") for seed in (1, 2)}
    merge_adapters(folders, "average", modules="per_task").save_pretrained(tmp_path / "out")
    shared = stock("llava", tmp_path / "out")  # which refuses missing keys
    assert not any("projector" in name and "lora" in name for name, _ in shared.named_parameters())
    alike({k: v for k, v in weights(shared).items() if "projector" in k},
          {k: v for k, v in noisy("llava", 0).state_dict().items() if "projector" in k})  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("policy", [None, "average", "per_task", "t1"])
def test_copies_of_adapted_embeddings_are_restored_under_their_lora(policy, tmp_path):
    live = {f"t{seed}": adapted("llama", seed, 3, **COPIES["targeted"]) for seed in (1, 2)}
    folders = {task: write(model, tmp_path / task) for task, model in live.items()}
    own = [weights(model) for model in live.values()]
    mean = {name: (value + own[1][name]) / 2 for name, value in own[0].items()}
    merged = merge_adapters(folders, "average", modules=policy)
    merged.save_pretrained(tmp_path / "out")
    alike(weights(stock("llama", tmp_path / "out", 3)), mean)
    for task in live:
        alike(weights(merged.load(resized(noisy("llama", 0), 3, 99), task)), mean)
    masked = merge_adapters(folders, "emr", modules=policy)
    masked.save_pretrained(tmp_path / "emr")
    for task in live:
        expected = masked.load(resized(noisy("llama", 0), 3, 99), task).state_dict()
        EMRAdapter.from_pretrained(tmp_path / "emr").adapter(task).save_pretrained(tmp_path / "one")
        found = weights(stock("llama", tmp_path / "one", 3))
        for name, value in expected.items():
            close(found[name], value, 1e-5)


def test_copies_do_not_depend_on_the_order_and_keep_most_digits(tmp_path):
    folders = {}
    for task, dtype, change in (("a", torch.bfloat16, 0), ("b", torch.float32, 0), ("c", torch.float32, 1e-5)):
        model = adapted("llama", 1, **COPIES["beside"])
        with torch.no_grad():
            model.get_base_model().model.embed_tokens.weight[0, 0] = 1 + change
        model.get_base_model().to(dtype)
        folders[task] = write(model, tmp_path / task, save_embedding_layers=True)
    exact = load_adapter(folders["b"]).copies[EMBED]
    for order in ("ab", "ba"):
        copied = merge_adapters({task: folders[task] for task in order}, "average").copies[EMBED]
        assert copied.dtype == torch.float32 and torch.equal(copied, exact)
    for order in ("abc", "bca", "acb", "cab"):
        with pytest.raises(ValueError, match=r"differ in row 0 of 40"):
            merge_adapters({task: folders[task] for task in order}, "average")


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
