"""Whether two adapters are of one base model: the weights' hash, else the name, whole."""

import json

import pytest
import torch
from peft import AutoPeftModel, AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from osrm_peft import OSRMLoraConfig, collect_features, initialize_osrm_weights, load_adapter, merge_adapters
from osrm_peft.models.identity import Base, common_base, comparable, located
from tests.helpers.osrm import PAPER
from tests.zoo.adapters import adapted, edit, write
from tests.zoo.models import noisy, outputs

CACHE = "/home/x/.cache/huggingface/hub/models--meta-llama--Llama-3.2-1B/snapshots/0123abcd"
SAME = [
    ("gpt2", "gpt2"),
    ("roberta-base", "FacebookAI/roberta-base"),
    ("google-bert/bert-base-uncased", "bert-base-uncased"),
    ("openai-community/gpt2", "gpt2"),
    (CACHE, "meta-llama/Llama-3.2-1B"),
    (CACHE, CACHE.replace("/home/x", "/root").replace("0123abcd", "4567")),
    ("/models/one/final", "/models/one/final"),
    ("/models/one/final/", "/models/one/final"),
    ("/models/two/../one/final", "/models/one/final"),
    ("C:\\models\\final\\", "C:\\models\\final"),
    ("meta-llama/Llama-3.2-1B/", "meta-llama/Llama-3.2-1B"),
]
OTHER = [
    ("/models/one/final", "/models/two/final"),
    ("one/final", "two/final"),
    ("/models/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
    ("roberta-base", "someone/roberta-base"),
    ("roberta-base", "FacebookAI/roberta-large"),
    ("final", "/models/one/final"),
    ("gpt2", None),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_names_of_one_model(one, other):
    assert common_base({"a": Base(one), "b": Base(other)}, None) == one
    assert common_base({"b": Base(other), "a": Base(one)}, None) == other


@pytest.mark.parametrize(("one", "other"), OTHER)
def test_names_of_two_models_are_refused_unless_the_user_says_so(one, other):
    for pair in ((one, other), (other, one)):
        bases = dict(zip("ab", map(Base, pair), strict=True))
        with pytest.raises(
            ValueError, match=r"the adapters have different base models \(a: .*, b: .*--base-model NAME"
        ):
            common_base(bases, None)
        assert common_base(bases, "mine") == "mine"


def test_a_revision_of_null_is_main():
    assert common_base({"a": Base("gpt2"), "b": Base("gpt2", "main")}, None) == "gpt2"
    with pytest.raises(ValueError, match=r"a: gpt2, b: gpt2@refs/pr/1"):
        common_base({"a": Base("gpt2"), "b": Base("gpt2", "refs/pr/1")}, None)


@pytest.mark.parametrize("revision", ["0123abcd", None, "main"])
def test_a_commit_of_the_cache_is_a_revision(revision):
    assert common_base({"a": Base(CACHE), "b": Base("meta-llama/Llama-3.2-1B", revision)}, None) == CACHE
    assert common_base({"a": Base("meta-llama/Llama-3.2-1B", revision), "b": Base(CACHE)}, None)


def test_another_revision_than_that_of_the_cache_is_refused():
    for pair in ((Base(CACHE), Base("meta-llama/Llama-3.2-1B", "v2")), (Base(CACHE, "v2"), Base(CACHE))):
        for bases in (pair, pair[::-1]):
            with pytest.raises(ValueError, match="the adapters have different base models"):
                common_base(dict(zip("ab", bases, strict=True)), None)


def test_all_are_compared_with_all():
    """What the first does not tell, a revision or a hash, two others may."""
    layers = frozenset({"x"})
    hashes = [Base("gpt2"), Base("gpt2", None, "v2" + "0" * 14, layers), Base("gpt2", None, "v2" + "1" * 14, layers)]
    for order in ((0, 1, 2), (1, 0, 2), (2, 1, 0)):
        with pytest.raises(ValueError, match="trained on base models with different weights"):
            common_base(dict(zip("abc", [hashes[place] for place in order], strict=True)), None)
    name = "meta-llama/Llama-3.2-1B"
    with pytest.raises(ValueError, match="different base models"):
        common_base({"a": Base(CACHE), "b": Base(name), "c": Base(name, "0123abcd")}, None)


def test_a_hash_of_the_weights_decides_where_both_sides_have_one():
    layers = frozenset({"x"})

    def base(name, digest, over=layers):
        return Base(name, None, digest, over)

    assert common_base({"a": base("/one", "v2" + "0" * 14), "b": base("/two", "v2" + "0" * 14)}, None) == "/one"
    for base_model in (None, "mine"):
        with pytest.raises(ValueError, match=r"'a' and 'b' were trained on base models with different weights"):
            common_base({"a": base("gpt2", "v2" + "0" * 14), "b": base("gpt2", "v2" + "1" * 14)}, base_model)
    # hashes of other layers, or of the earlier definition, say nothing
    assert common_base({"a": base("gpt2", "v2" + "0" * 14), "b": base("gpt2", "1" * 16)}, None) == "gpt2"
    other = base("gpt2", "v2" + "1" * 14, frozenset({"y"}))
    assert common_base({"a": base("gpt2", "v2" + "0" * 14), "b": other}, None) == "gpt2"
    assert comparable("v2a", "v2b") and not comparable("v2a", "0a") and not comparable(None, "v2a")


def test_osrm_adapters_of_two_bases_of_one_name_are_refused(tmp_path):
    for who, seed in (("one", 0), ("two", 50)):
        noisy("llama", seed).save_pretrained(tmp_path / who / "final")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / who / "final")
        features = collect_features(base, [{"input_ids": torch.arange(3, 9)[None]}], task="other",
                                    target_modules=["q_proj"], progress=False)  # fmt: skip
        model = get_peft_model(base, OSRMLoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **PAPER))
        initialize_osrm_weights(model, [features])
        model.save_pretrained(tmp_path / f"t_{who}")
        manifest = json.loads((tmp_path / f"t_{who}/osrm_peft.json").read_text())
        assert manifest["base_model"] == str(tmp_path / who / "final")
        assert load_adapter(tmp_path / f"t_{who}").weight_hash == load_adapter(model).weight_hash
    with pytest.raises(ValueError, match=r"trained on base models with different weights \(.*one/final: v2"):
        merge_adapters({"a": tmp_path / "t_one", "b": tmp_path / "t_two"}, "average")
    for who in ("one", "two"):
        edit(tmp_path / f"t_{who}", base_model_name_or_path="same/name")
    with pytest.raises(ValueError, match=r"different weights \(same/name: v2"):
        merge_adapters({"a": tmp_path / "t_one", "b": tmp_path / "t_two"}, "average")


@torch.no_grad()
def test_auto_peft_loads_our_results_and_never_another_folder_of_the_name(tmp_path, monkeypatch):
    for who, seed in (("one", 0), ("two", 50)):
        noisy("llama", seed).save_pretrained(tmp_path / who / "final")
    for seed in (1, 2):
        write(adapted("llama", seed, target_modules=["q_proj"]), tmp_path / f"t{seed}", str(tmp_path / "one/final"))
    merged = merge_adapters({f"t{seed}": tmp_path / f"t{seed}" for seed in (1, 2)}, "average")
    expected = outputs(merged.load(noisy("llama", 0)))
    monkeypatch.chdir(tmp_path / "two")
    merged.save_pretrained(tmp_path / "out")
    torch.testing.assert_close(outputs(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()), expected)
    # a path from the working directory is made whole
    monkeypatch.chdir(tmp_path / "one")
    for seed in (1, 2):
        edit(tmp_path / f"t{seed}", base_model_name_or_path="final")
    merge_adapters({f"t{seed}": tmp_path / f"t{seed}" for seed in (1, 2)}, "average").save_pretrained(
        tmp_path / "out", overwrite=True
    )
    monkeypatch.chdir(tmp_path / "two")
    torch.testing.assert_close(outputs(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()), expected)
    assert located("final") == str(tmp_path / "two/final") and located("gpt2") == "gpt2" and located(None) is None


def test_a_live_model_s_adapters_are_told_apart_by_the_tasks_names():
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(noisy("llama", 0), config, adapter_name="a")
    model.add_adapter("b", config)
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))
    a, b = (load_adapter(model, adapter_name=name) for name in "ab")
    merged = merge_adapters({"b": model, "a": model}, "average")
    for layer, delta in merged.deltas().items():
        expected = (a.factors[layer].delta() + b.factors[layer].delta()) / 2
        torch.testing.assert_close(delta.float(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(
        ValueError, match=r"given for task 'cola' has several adapters \(a, b\): call the task like its"
    ):
        merge_adapters({"cola": model}, "average")
    assert merge_adapters({"cola": load_adapter(model, adapter_name="b")}, "average").layers


@torch.no_grad()
@pytest.mark.parametrize("model", ["vit", "clip", "hubert"])
def test_auto_peft_loads_results_without_a_task_type(model, tmp_path):
    """PEFT then takes the model's class from `auto_mapping`."""
    noisy(model, 0).save_pretrained(tmp_path / "base")
    for seed in (1, 2):
        live = adapted(model, seed, target_modules=["q_proj"])
        write(live, tmp_path / f"t{seed}", str(tmp_path / "base"))
    sources = {f"t{seed}": tmp_path / f"t{seed}" for seed in (1, 2)}
    for adapters in (sources, sources | {"t2": live}):
        merged = merge_adapters(adapters, "average", base_model=str(tmp_path / "base"))
        merged.save_pretrained(tmp_path / "out", overwrite=True)
        found = AutoPeftModel.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(outputs(found), outputs(merged.load(noisy(model, 0))))
        assert json.loads((tmp_path / "out/adapter_config.json").read_text())["auto_mapping"]


@pytest.mark.parametrize("method", ["average", "ties", "tsv", "lore", "concat"])
@pytest.mark.parametrize("rank", [8, 16, 100])
def test_a_rank_above_the_narrowest_layer_is_allowed(method, rank, tmp_path):
    """k_proj is 8 wide: it is kept exactly, and q_proj is cut at the rank."""
    for seed in (1, 2):
        write(adapted("llama", seed, r=6, target_modules=["q_proj", "k_proj"]), tmp_path / f"t{seed}")
    folders = {f"t{seed}": tmp_path / f"t{seed}" for seed in (1, 2)}
    exact, cut = (merge_adapters(folders, method, rank=one).deltas() for one in (None, rank))
    for layer, delta in cut.items():
        U, s, Vh = torch.linalg.svd(exact[layer], full_matrices=False)
        best = U[:, :rank] @ torch.diag(s[:rank]) @ Vh[:rank]
        torch.testing.assert_close(delta, best, rtol=1e-4, atol=1e-5)
