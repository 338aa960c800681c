"""Tensors are matched under transformers' names; what differs in spelling only is one model."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from osrm_peft import load_merged_checkpoint, merge_checkpoints
from osrm_peft.checkpoints.model_files import ModelFiles
from osrm_peft.checkpoints.names import align, as_spelled
from osrm_peft.evaluation.spectra import spectra
from tests.helpers.checkpoints import CASES, LLAMA, QUICK, edit, rewrite, same, tensors_of, write
from tests.helpers.models import TINY, make_batch

KINDS = {
    "llama": (LlamaForCausalLM, lambda: LlamaConfig(**LLAMA)),
    "tied": (LlamaForCausalLM, lambda: LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "gpt2": (GPT2LMHeadModel, lambda: GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16,
                                                 bos_token_id=1, eos_token_id=1)),
    "bert": (BertForSequenceClassification, lambda: BertConfig(**TINY, num_labels=3)),
    "vit": (ViTForImageClassification, lambda: ViTConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                                         num_attention_heads=2, image_size=8, patch_size=4)),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    for kind, (cls, config) in KINDS.items():
        for seed, part in enumerate(("base", "a", "b")):
            torch.manual_seed(seed)
            cls(config()).save_pretrained(root / kind / part)
    return root


@pytest.fixture
def folders(saved, tmp_path):
    def copied(kind):
        return {part: shutil.copytree(saved / kind / part, tmp_path / part) for part in ("base", "a", "b")}

    return copied


def renamed(folder, change, **more):
    file = folder / "model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(file).items()} | more, file, {"format": "pt"})


def merge(folders, out, method="average", **given):
    models = {name: folder for name, folder in folders.items() if name != "base"}
    return merge_checkpoints(models, out, method, base=folders["base"], overwrite=True, **given)


@pytest.mark.parametrize("method", CASES)
def test_a_base_without_the_prefix_gives_the_same_to_the_bit(folders, tmp_path, method):
    found = folders("gpt2")
    given = CASES[method] | QUICK.get(method, {})
    expected = merge(found, tmp_path / "expected", method, **given)
    renamed(found["base"], lambda name: name.removeprefix("transformer."))
    out = merge(found, tmp_path / "out", method, **given)
    for part in "ab" if method == "emr" else [""]:
        same(tensors_of(out / part), tensors_of(expected / part))


@pytest.mark.parametrize("kind", ["tied", "gpt2", "llama", "bert"])
@pytest.mark.parametrize("absent", ["a", "b", "base"])
def test_a_tie_may_be_written_or_be_the_default(folders, tmp_path, kind, absent):
    found = folders(kind)
    default = KINDS[kind][0].config_class().tie_word_embeddings
    if kind == "tied":  # against the default: written as false in a class that has no head at all
        edit(found["a"], architectures=["LlamaForSequenceClassification"], tie_word_embeddings=False)
        edit(found["b"], architectures=["LlamaForSequenceClassification"])
    else:
        for part, folder in found.items():
            edit(folder, tie_word_embeddings=None if part == absent else default)
    assert merge(found, tmp_path / "out").is_dir()


def test_a_head_that_the_file_has_as_its_own_is_merged_as_its_own(folders, tmp_path):
    """The configuration ties it, one file has another head: transformers loads that, and ties nothing."""
    found = folders("tied")
    rewrite(found["b"], **{"lm_head.weight": torch.randn(32, 16)})
    states = {part: LlamaForCausalLM.from_pretrained(found[part]).state_dict() for part in "ab"}
    assert not torch.equal(states["b"]["lm_head.weight"], states["b"]["model.embed_tokens.weight"])
    for order in ("ab", "ba"):
        out = merge_checkpoints({part: found[part] for part in order}, tmp_path / "out")
        expected = {name: (states["a"][name] + states["b"][name]) / 2 for name in states["a"]}
        same(LlamaForCausalLM.from_pretrained(out).state_dict(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("holders", ["a", "ab"])
def test_a_copy_of_a_tied_tensor_is_written_once(folders, tmp_path, holders):
    found = folders("tied")
    expected = tensors_of(merge(found, tmp_path / "expected"))
    for part in holders:
        embedding = tensors_of(found[part])["model.embed_tokens.weight"]
        rewrite(found[part], **{"lm_head.weight": embedding.clone()})
    assert "lm_head.weight" not in expected
    same(tensors_of(merge(found, tmp_path / "out")), expected)


def test_whole_numbers_that_transformers_ignores_may_differ(folders, tmp_path):
    found = folders("bert")
    expected = tensors_of(merge(found, tmp_path / "expected"))
    for place, folder in enumerate(found.values()):
        rewrite(folder, **{"bert.embeddings.position_ids": torch.arange(place, place + 32)[None]})
    same(tensors_of(merge(found, tmp_path / "out")), expected)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_a_tied_base_has_its_copy_where_the_models_have_heads_of_their_own(folders, tmp_path, method):
    found = folders("llama")
    torch.manual_seed(7)
    tied = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True))
    shutil.rmtree(found["base"])
    tied.save_pretrained(found["base"])
    out = merge(found, tmp_path / "out", method, scale=0.5)
    rewrite(found["base"], **{"lm_head.weight": tied.lm_head.weight.detach().clone()})
    edit(found["base"], tie_word_embeddings=False)
    same(tensors_of(out), tensors_of(merge(found, tmp_path / "expected", method, scale=0.5)))
    assert not LlamaForCausalLM.from_pretrained(out).config.tie_word_embeddings


def test_tied_and_untied_models_merge_by_the_way_out(folders, tmp_path):
    found = {"tied": folders("tied")["a"]}
    torch.manual_seed(7)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "untied")
    found["untied"] = tmp_path / "untied"
    message = r"tie_word_embeddings=True, 'untied' False: .*; untie the head of the one: model"
    with pytest.raises(ValueError, match=message):
        merge_checkpoints(found, tmp_path / "out")
    model = LlamaForCausalLM.from_pretrained(found["tied"])
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path / "anew")
    out = merge_checkpoints(found | {"tied": tmp_path / "anew"}, tmp_path / "out", overwrite=True)
    one, two = (LlamaForCausalLM.from_pretrained(folder).state_dict() for folder in found.values())
    same(LlamaForCausalLM.from_pretrained(out).state_dict(), {name: (one[name] + two[name]) / 2 for name in one})


def test_one_tensor_under_two_names_in_a_file_is_refused(folders, tmp_path):
    found = folders("bert")
    name = "bert.embeddings.LayerNorm.weight"
    for other in (name.replace("weight", "gamma"), name.removeprefix("bert.")):
        rewrite(found["b"], **{other: torch.ones(16)})
        message = rf"b/model\.safetensors holds '{name}' and '{other}', which are both '{name}' to transformers: remove"
        if other != name.removeprefix("bert."):
            message = rf"holds '{other}' and '{name}', which are both '{name}' to transformers: remove one"
        with pytest.raises(ValueError, match=message):
            merge(found, tmp_path / "out")
        shutil.copyfile(found["a"] / "model.safetensors", found["b"] / "model.safetensors")


def test_names_of_the_files_are_kept_where_they_agree(folders, tmp_path):
    found = folders("vit")
    names = set(load_file(found["a"] / "model.safetensors"))
    assert "vit.encoder.layer.0.attention.attention.query.weight" in names  # not what the model in memory calls it
    ViTForImageClassification.from_pretrained(found["base"]).save_pretrained(found["base"], save_original_format=False)
    assert set(load_file(found["base"] / "model.safetensors")) != names
    out = merge(found, tmp_path / "out", "ties")
    assert set(tensors_of(out)) == names
    ViTForImageClassification.from_pretrained(found["b"]).save_pretrained(found["b"], save_original_format=False)
    again = merge(found, tmp_path / "again", "ties")
    assert set(tensors_of(again)) == set(ViTForImageClassification.from_pretrained(out).state_dict())
    same(*(ViTForImageClassification.from_pretrained(folder).state_dict() for folder in (again, out)))


def test_heads_are_found_by_both_names_and_load(folders, tmp_path):
    found = folders("bert")
    renamed(found["b"], lambda name: name.removeprefix("bert."))
    for pattern in ("bert.pooler*", "pooler*"):
        models = {part: found[part] for part in "ba"}
        out = merge_checkpoints(models, tmp_path / "out", overwrite=True, heads=["classifier*", pattern])
        for part in "ab":
            model = load_merged_checkpoint(out, part)
            own = BertForSequenceClassification.from_pretrained(found[part]).state_dict()
            assert torch.equal(model.bert.pooler.dense.weight, own["bert.pooler.dense.weight"])
            assert model(**make_batch()).logits.isfinite().all()


def test_what_transformers_ignores_is_left_out_unless_all_have_it(folders, tmp_path, caplog):
    found, name = folders("llama"), "model.layers.0.self_attn.rotary_emb.inv_freq"
    expected = tensors_of(merge(found, tmp_path / "out"))
    rewrite(found["a"], **{name: torch.ones(4)})
    out = merge(found, tmp_path / "out")
    same(tensors_of(out), expected)
    assert f"of 'a' {name} left out" in caplog.text
    assert json.loads((out / "osrm_peft.json").read_text())["left_out"] == {"a": [name]}
    for part in ("b", "base"):
        rewrite(found[part], **{name: torch.ones(4)})
    same(tensors_of(merge(found, tmp_path / "out")), expected | {name: torch.ones(4)})


def test_tensors_that_only_the_base_has_are_left_out(folders, tmp_path, caplog):
    found = folders("bert")
    rewrite(found["base"], **{"cls.predictions.bias": torch.ones(4)})
    out = merge(found, tmp_path / "out", "ties")
    assert "of 'base' cls.predictions.bias left out" in caplog.text and "cls.predictions.bias" not in tensors_of(out)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "architectures": ["SomeoneElsesModel"], "auto_map": {"AutoModel": "modeling.Mine"}},
        {"model_type": "not_in_transformers", "architectures": ["LlamaForCausalLM"]},
        {"model_type": None},
        {"model_type": "llama", "architectures": ["BertModel"]},
        {"model_type": "llama", "architectures": []},
        {"model_type": "llama", "architectures": ["AutoModel", "logging", "LlamaForCausalLM"]},
    ],
)
def test_models_unknown_to_transformers_are_merged_by_names_in_their_files(tmp_path, config):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "modeling.py").write_text("raise SystemExit('code ran')")
    for part, value in (("a", 1.0), ("b", 3.0)):
        write(tmp_path / part, {"own.name": torch.full((2, 2), value)}, config)
        (tmp_path / part / "modeling.py").write_text("raise SystemExit('code ran')")
    out = merge_checkpoints({part: tmp_path / part for part in "ab"}, tmp_path / "out")
    same(tensors_of(out), {"own.name": torch.full((2, 2), 2.0)})


def test_singular_values_are_of_matrices_under_one_name(folders):
    found = folders("gpt2")
    models = {part: str(found[part]) for part in "ab"}
    expected = spectra(models, base=str(found["base"]), layer="*c_attn*")
    renamed(found["base"], lambda name: name.removeprefix("transformer."))
    renamed(found["b"], lambda name: name.removeprefix("transformer."))
    assert spectra(models, base=str(found["base"]), layer="*c_attn*") == expected


# tensors that are no matrices


@pytest.mark.parametrize("scale", [0.5, 3.0])
@pytest.mark.parametrize("method", ["tsv", "iso", "lore"])
def test_lambda_is_of_all_tensors_and_what_was_averaged_is_named(tmp_path, caplog, method, scale):
    shapes = {"matrix": (4, 6), "experts": (3, 4, 5), "kernel": (3, 2, 2, 2), "vector": (7,), "row": (1, 5), "one": ()}
    generator = torch.Generator().manual_seed(0)
    tensors = {part: {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
               for part in ("base", "a", "b", "c")}  # fmt: skip
    found = {part: write(tmp_path / part, each) for part, each in tensors.items()}
    out = merge(found, tmp_path / "out", method, scale=scale, weights=[1.0, 2.0, 0.5])
    merged, base = tensors_of(out), tensors["base"]
    for name in set(shapes) - {"matrix"}:
        weighted = 1.0 * tensors["a"][name] + 2.0 * tensors["b"][name] + 0.5 * tensors["c"][name]
        tau = weighted / 3.5 - base[name]
        # LoRE: θ* = θ₀ + λ Σδ with θ₀ the mean, from which the δ_t sum to 0
        expected = base[name] + (1 if method == "lore" else scale) * tau
        torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-6)
    assert json.loads((out / "osrm_peft.json").read_text())["averaged"] == sorted(set(shapes) - {"matrix"})
    assert f"{method} has no singular values of experts, kernel" in caplog.text and "averaged" in caplog.text


def test_only_spectral_methods_average(folders, tmp_path):
    out = merge(folders("llama"), tmp_path / "out", "ties")
    assert "averaged" not in json.loads((out / "osrm_peft.json").read_text())


MAMBA2 = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "num_heads": 4, "head_dim": 8,
          "n_groups": 1}  # fmt: skip


def test_configurations_with_infinite_numbers_are_read(tmp_path):
    """As transformers writes them: {"__float__": "Infinity"}."""
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        Mamba2ForCausalLM(Mamba2Config(**MAMBA2)).save_pretrained(tmp_path / name)
    assert "__float__" in (tmp_path / "a" / "config.json").read_text()
    folders = {name: tmp_path / name for name in "ab"}
    out = merge_checkpoints(folders, tmp_path / "out", heads=["lm_head*"])
    first, second = (Mamba2ForCausalLM.from_pretrained(folders[name]).state_dict() for name in "ab")
    found = load_merged_checkpoint(out, "b", AutoModelForCausalLM)
    assert found.config.time_step_limit[1] == float("inf")
    for name, tensor in found.state_dict().items():
        wanted = second[name] if name.startswith("lm_head") else (first[name] + second[name]) / 2
        torch.testing.assert_close(tensor, wanted)


# without transformers

FILE = "model.safetensors"


def different(folder, seed):
    """The model's folder with noise on each tensor, so that no two are equal."""
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(x.shape, generator=generator) / 50 for name, x in load_file(folder / FILE).items()}
    return rewrite(folder, **{name: x + noise[name] for name, x in load_file(folder / FILE).items()})


@pytest.mark.parametrize("method", ["average", "dare"])
@pytest.mark.parametrize("kind", KINDS)
def test_names_that_need_not_be_asked_for_are_the_same(folders, tmp_path, monkeypatch, kind, method):
    models = {part: different(folder, seed) for seed, (part, folder) in enumerate(folders(kind).items())}
    base = models.pop("base")
    opened = {part: ModelFiles(folder) for part, folder in (models | {"base": base}).items()}
    found, asked = as_spelled(opened), align(opened, models)
    assert found is not None and not any(asked.spelled.values()) and not asked.left_out
    assert list(opened["a"].tensors) == list(found.canonical)
    out = merge_checkpoints(models, tmp_path / "out", method, base=base)
    monkeypatch.setattr("osrm_peft.checkpoints.plan.as_spelled", lambda every: None)
    by_name = merge_checkpoints(models, tmp_path / "by_name", method, base=base)
    for file in (FILE, "config.json"):
        assert (out / file).read_bytes() == (by_name / file).read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        lambda x: {"lm_head.weight": x["model.embed_tokens.weight"]},  # a tied copy
        lambda x: {"ids": torch.arange(3)},
        lambda x: {"model.norm.gamma": torch.rand(16)},
        lambda x: {"embed_tokens.weight": torch.rand(32, 16)},  # of the bare model
    ],
)
def test_names_are_asked_for_where_they_may_matter(folders, change):
    models = {part: different(folder, seed) for seed, (part, folder) in enumerate(folders("tied").items())}
    assert as_spelled({part: ModelFiles(folder) for part, folder in models.items()}) is not None
    edit(models["b"], hidden_act="gelu")
    assert as_spelled({part: ModelFiles(folder) for part, folder in models.items()}) is None
    del models["b"]
    for folder in models.values():
        rewrite(folder, **change(load_file(folder / FILE)))
    assert as_spelled({part: ModelFiles(folder) for part, folder in models.items()}) is None
