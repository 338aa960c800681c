"""Copies of base weights that PEFT wrote along, and layers that one task trained whole and another by LoRA."""

import pytest
import torch

from osrm_peft import EMRAdapter, load_adapter, merge_adapters
from tests.helpers.modules import EMBED, LM_HEAD, SAVES, alike, close, tensors, weights
from tests.zoo.adapters import adapted, resized, stock, write
from tests.zoo.models import noisy, outputs

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


# a layer that one has trained whole and another adapted by LoRA

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
        merged.save_pretrained(tmp_path / "emr", overwrite=True)
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
def test_emr_refuses_a_trained_half_of_live_tied_weights_with_a_way_out(module, tmp_path):
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
