"""Which servers take an adapter: what transformers and PEFT do with the files, and the rules of vLLM and SGLang."""

import copy
import json
import shutil
from functools import cache, partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from osrm_peft import load_adapter, merge_adapters
from osrm_peft.merging.serving import served

LOAD, SWAP, SWAP_BY_PEFT = (
    "transformers, load_adapter", "transformers, load_adapter(hotswap=True)", "PEFT, hotswap_adapter"
)  # fmt: skip
TARGETS = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
KINDS = {
    "plain": TARGETS,
    "other alpha": TARGETS | {"lora_alpha": 16},
    "rank 8": TARGETS | {"r": 8},
    "rslora": TARGETS | {"use_rslora": True},
    "dora": TARGETS | {"use_dora": True},
    "ranks": TARGETS | {"rank_pattern": {"layers.1.*q_proj": 2}},
    "alphas": TARGETS | {"alpha_pattern": {"layers.1.*q_proj": 3}},
    "bias": TARGETS | {"lora_bias": True},
    "embedding": {"r": 4, "target_modules": ["q_proj", "embed_tokens"]},
    "whole module": TARGETS | {"modules_to_save": ["lm_head"]},
    "tokens": TARGETS | {"trainable_token_indices": [1, 2]},
    "more layers": {"r": 4, "target_modules": ["q_proj", "v_proj", "o_proj"]},
    "fewer layers": {"r": 4, "target_modules": ["q_proj"]},
    "dropout": TARGETS | {"lora_dropout": 0.1},
    "classifier": TARGETS | {"task_type": "SEQ_CLS"},
}
# what vLLM and SGLang do not take, and why
SGLANG = {"rslora": "use_rslora"}  # beside the following
VLLM = {"dora": "DoRA", "ranks": "scale 4", "alphas": "scale 0.75", "bias": "lora_bias", "whole module": "lm_head",
        "tokens": "trained tokens", "classifier": "score"}  # fmt: skip
IDS = torch.arange(12).reshape(2, 6)


@cache
def made(cls):
    torch.manual_seed(0)
    return cls(LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                           vocab_size=20, pad_token_id=1))  # fmt: skip


def base_of(kind):
    return copy.deepcopy(made(LlamaForSequenceClassification if kind == "classifier" else LlamaForCausalLM))


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    for seed, (kind, fields) in enumerate(KINDS.items()):
        model = get_peft_model(base_of(kind), LoraConfig(**({"task_type": "CAUSAL_LM"} | fields)))
        generator = torch.Generator().manual_seed(seed)
        for parameter in (one for one in model.parameters() if one.requires_grad):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder / kind)
    return folder


def verdict(found, server):
    return next(one for one in found if one.server == server)


def right(folder, kind, made):
    """Whether a model that was made answers as PEFT's own does; what fails does not."""
    try:
        answered = logits(made())
    except (KeyError, RuntimeError, ValueError):
        return False
    expected = logits(PeftModel.from_pretrained(base_of(kind), folder / kind))
    return torch.allclose(answered, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_takes_what_we_say(kind, folder):
    def loaded():
        model = base_of(kind)
        model.load_adapter(str(folder / kind))
        return model

    assert verdict(served(folder / kind), LOAD).takes is right(folder, kind, loaded)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "classifier"])
def test_swaps_are_right_where_we_say_so(kind, folder):
    def by_transformers(*kinds):
        model = base_of(kind)
        model.load_adapter(str(folder / "plain"))
        for one in kinds:
            model.load_adapter(str(folder / one), hotswap=True, adapter_name="default")
        return model

    def by_peft(*kinds):
        model = PeftModel.from_pretrained(base_of(kind), folder / "plain")
        for one in kinds:
            hotswap_adapter(model, str(folder / one), adapter_name="default")
        return model

    alone, pair = served(folder / kind), served(folder / "plain", [folder / kind])
    for server, swapped in ((SWAP, by_transformers), (SWAP_BY_PEFT, by_peft)):
        taken = verdict(alone, server).takes and verdict(pair, server).takes
        there, back = (
            right(folder, kind, partial(swapped, kind)),
            right(folder, "plain", partial(swapped, kind, "plain")),
        )
        assert taken is (there and back), (server, verdict(alone, server), verdict(pair, server))


@pytest.mark.parametrize("kind", KINDS)
def test_rules_of_vllm_and_sglang(kind, folder):
    found = served(folder / kind)
    for server, refused in (("vLLM", VLLM), ("SGLang", VLLM | SGLANG)):
        one = verdict(found, server)
        assert one.takes is (kind not in refused) and refused.get(kind, "") in " ".join(one.notes)


def test_what_we_merge_is_taken_by_all_and_swapped_for_each_other(folder, tmp_path):
    adapters = {kind.replace(" ", "_"): load_adapter(folder / kind) for kind in ("plain", "ranks", "rank 8", "alphas")}
    for method in ("ties", "average"):
        merge_adapters(adapters, method, rank="serving").save_pretrained(tmp_path / method)
    for first, second in (("ties", "average"), ("average", "ties")):
        found = served(tmp_path / first, [tmp_path / second])
        assert all(one.takes for one in found), found
        model = base_of("plain")
        model.load_adapter(str(tmp_path / first))
        model.load_adapter(str(tmp_path / second), hotswap=True, adapter_name="default")
        expected = logits(PeftModel.from_pretrained(base_of("plain"), tmp_path / second))
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)
    wide = merge_adapters(adapters, "concat")
    wide.save_pretrained(tmp_path / "wide")
    assert verdict(served(tmp_path / "wide"), "vLLM").notes == ("--max-lora-rank 32",)


def test_no_adapter_is_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        served(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    (tmp_path / "adapter_model.safetensors").write_bytes((folder / "plain/adapter_model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"no LoRA adapter \(peft_type='IA3'\)"):
        served(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lora_alpha": None}, "lora_alpha=None in its adapter_config.json must be a finite number"),
        ({"r": 0}, "r in the adapter_config.json of .*=0"),
        ({"alpha_pattern": ["x"]}, r"alpha_pattern=\['x'\] in its adapter_config.json must be a mapping"),
    ],
)
def test_a_damaged_config_is_named(changed, message, folder, tmp_path):
    shutil.copytree(folder / "plain", tmp_path / "it")
    file = tmp_path / "it/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(ValueError, match=message):
        served(tmp_path / "it")


def test_an_emr_merge_is_refused_with_the_way_out(folder, tmp_path):
    adapters = {"a": load_adapter(folder / "plain"), "b": load_adapter(folder / "other alpha")}
    merge_adapters(adapters, "emr").save_pretrained(tmp_path / "emr")
    with pytest.raises(ValueError, match=r"EMR merge, which needs a mask for each task: .*adapter\(task, rank=16\)"):
        served(tmp_path / "emr")
