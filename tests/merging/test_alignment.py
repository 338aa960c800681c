"""Adapters of one model whose files name its layers differently: versions of transformers, bare models, towers."""

import re

import pytest
import torch
import transformers as T
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from osrm_peft import load_adapter, merge_adapters
from osrm_peft.models.layers import lora_layers
from tests.zoo.adapters import WEIGHTS, adapted, edit, keys, stock, write
from tests.zoo.models import ZOO, noisy

# {model: (targets, patterns and replacements that give the names of an earlier transformers)}
LAYOUTS = {
    "llava": (r".*language_model.*(q_proj|v_proj)", [(r"^model\.language_model\.", "language_model.model.")]),
    "paligemma": (r".*language_model.*(q_proj|v_proj)", [(r"^model\.language_model\.", "language_model.model.")]),
    "gemma3": (r".*language_model.*(q_proj|v_proj)", [(r"^model\.language_model\.", "language_model.model.")]),
    "qwen2_vl": (r".*language_model.*(q_proj|v_proj)", [(r"^model\.language_model\.", "model.")]),
    "qwen2_vl_images": (r".*visual.*qkv", [(r"^model\.visual\.", "visual.")]),
    "llava_both": (r".*(q_proj|v_proj)", [
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.vision_tower\.", "vision_tower.vision_model.")]),
    "vit": (r".*(q_proj|v_proj)", [
        (r"vit\.layers\.(\d+)\.attention\.q_proj", r"vit.encoder.layer.\1.attention.attention.query"),
        (r"vit\.layers\.(\d+)\.attention\.v_proj", r"vit.encoder.layer.\1.attention.attention.value")]),
}  # fmt: skip


def model_name(case):
    return case if case in ZOO else case.rpartition("_")[0]


def old_layout(folder, patterns):
    def rename(key):
        name = key.removeprefix("base_model.model.")
        for pattern, replacement in patterns:
            name = re.sub(pattern, replacement, name)
        return f"base_model.model.{name}"

    keys(rename)(folder)


def pair(case, tmp_path, hint):
    """Two adapters of one model, the second in the old layout; their live models."""
    name, (targets, patterns) = model_name(case), LAYOUTS[case]
    live = {}
    for task, seed in (("new", 1), ("old", 2)):
        live[task] = adapted(name, seed, target_modules=targets, task_type=None)
        folder = write(live[task], tmp_path / task, base_model="tiny/base")
        if not hint:  # PEFT writes the model's class where there is no task type
            edit(folder, auto_mapping=None)
    old_layout(tmp_path / "old", patterns)
    return name, live


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "hint"),
    [(case, True) for case in LAYOUTS] + [(case, False) for case in LAYOUTS if case != "llava_both"],
)
def test_two_layouts_of_one_model_are_merged_layer_by_layer(case, hint, tmp_path):
    name, live = pair(case, tmp_path, hint)
    for order in (("new", "old"), ("old", "new")):
        merged = merge_adapters({task: tmp_path / task for task in order}, "task_arithmetic", scale=1)
        layers = {task: lora_layers(model, "default") for task, model in live.items()}
        assert set(merged.layers) == set(layers["new"])
        for layer, delta in merged.deltas().items():
            close(delta.float(), sum(layers[task][layer].get_delta_weight("default") for task in live))
    merged.save_pretrained(tmp_path / "out")
    for layer, module in lora_layers(stock(name, tmp_path / "out"), "default").items():
        close(module.get_delta_weight("default"), merged.deltas()[layer].float())


@torch.no_grad()
@pytest.mark.parametrize("case", LAYOUTS)
def test_an_old_layout_attaches_where_stock_peft_loads_it(case, tmp_path):
    name, live = pair(case, tmp_path, True)
    expected = lora_layers(live["old"], "default")
    attached = lora_layers(load_adapter(tmp_path / "old").attach(noisy(name, 0)), "default")
    assert set(attached) == set(expected)
    for layer, module in attached.items():
        close(module.get_delta_weight("default"), expected[layer].get_delta_weight("default"))


def test_towers_that_nothing_tells_apart_are_refused_and_the_way_out_works(tmp_path):
    name, _ = pair("llava_both", tmp_path, hint=False)
    adapters = {task: tmp_path / task for task in ("new", "old")}
    with pytest.raises(ValueError, match=r"nothing tells whether these are the same layers .*give base_model=FOLDER"):
        merge_adapters(adapters, "average")
    noisy(name, 0).save_pretrained(tmp_path / "base")
    merged = merge_adapters(adapters, "average", base_model=str(tmp_path / "base"))
    assert set(merged.layers) == set(load_adapter(tmp_path / "new").shapes)


# adapters of a bare model or a tower beside those of the whole


def lora(model, folder, seed, targets, task_type=None, hint=True, base="tiny/base"):
    torch.manual_seed(seed)
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type=task_type))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    write(peft_model, folder, base_model=base)
    if not hint:
        edit(folder, auto_mapping=None)


def clip(part, hint, folder, seed=1):
    whole = noisy("clip", 0)
    if part == "whole":
        lora(whole, folder, seed, r".*(text_model|vision_model).*q_proj", hint=hint)
    elif part == "text of whole":
        lora(whole, folder, seed, r".*text_model.*q_proj", hint=hint)
    else:
        kind = {"text": T.CLIPTextModel, "vision": T.CLIPVisionModel}[part]
        lora(kind(getattr(whole.config, f"{part}_config")), folder, seed, ["q_proj"], hint=hint)


@pytest.mark.parametrize("part", ["text", "vision"])
@pytest.mark.parametrize("whole", ["whole", "text of whole"])
def test_a_tower_s_adapter_goes_into_its_tower(part, whole, tmp_path):
    clip(whole, True, tmp_path / "whole")
    clip(part, True, tmp_path / "tower", 2)
    merged = merge_adapters({task: tmp_path / task for task in ("whole", "tower")}, "concat")
    own = load_adapter(tmp_path / "tower").factors
    for name, factors in own.items():
        added = merged.deltas()[f"{part}_model.{name}"].float()
        both = load_adapter(tmp_path / "whole").factors.get(f"{part}_model.{name}")
        close(added, factors.delta() + (0 if both is None else both.delta()))
    other = {"text": "vision", "vision": "text"}[part]
    for name, factors in load_adapter(tmp_path / "whole").factors.items():
        if name.startswith(other):
            close(merged.deltas()[name].float(), factors.delta())


@pytest.mark.parametrize("part", ["text", "vision"])
@pytest.mark.parametrize("whole", ["whole", "text of whole"])
def test_a_tower_s_adapter_of_an_unknown_class_is_refused_and_a_name_helps(part, whole, tmp_path):
    clip(whole, False, tmp_path / "whole")
    clip(part, False, tmp_path / "tower", 2)
    with pytest.raises(ValueError, match=r"nothing tells whether these are the same layers .* name them alike"):
        merge_adapters({task: tmp_path / task for task in ("whole", "tower")}, "concat")
    placed = load_adapter(tmp_path / "tower").renamed(lambda name: f"{part}_model.{name}")
    merged = merge_adapters({"whole": tmp_path / "whole", "tower": placed}, "concat")
    assert set(placed.factors) <= set(merged.layers)


@pytest.mark.parametrize("hint", [True, False])
def test_a_bare_model_s_adapter_goes_into_the_task_s_model(hint, tmp_path):
    whole = noisy("bert", 0)
    lora(T.BertModel(whole.config), tmp_path / "bare", 1, ["query"], hint=hint)
    lora(whole, tmp_path / "task", 2, ["query"], task_type="SEQ_CLS")
    merged = merge_adapters({task: tmp_path / task for task in ("bare", "task")}, "concat")
    layer = "encoder.layer.0.attention.self.query"
    both = [load_adapter(tmp_path / "bare").factors[layer], load_adapter(tmp_path / "task").factors[f"bert.{layer}"]]
    close(merged.deltas()[f"bert.{layer}"].float(), sum(one.delta() for one in both))
    merged.save_pretrained(tmp_path / "out")
    assert set(lora_layers(PeftModel.from_pretrained(noisy("bert", 0), str(tmp_path / "out")), "default")) == set(
        merged.layers
    )


def test_attention_and_mlp_of_one_model_are_apart(tmp_path):
    for task, targets in (("attention", ["q_proj"]), ("mlp", ["up_proj"])):
        write(adapted("llama", 1, target_modules=targets), tmp_path / task)
    merged = merge_adapters({task: tmp_path / task for task in ("attention", "mlp")}, "average")
    assert len(merged.layers) == 4


def test_towers_of_one_class_are_apart(tmp_path):
    for seed, tower in enumerate(("text_model", "vision_model")):
        lora(noisy("clip", 0), tmp_path / tower, seed, rf".*{tower}.*q_proj")
    merged = merge_adapters({tower: tmp_path / tower for tower in ("text_model", "vision_model")}, "average")
    assert len(merged.layers) == 4


def test_trained_modules_get_the_names_of_the_layers(tmp_path):
    """Stock PEFT keeps the names of saved modules as they are, so only the prefix of a bare model concerns them."""
    whole = noisy("bert_mlm", 0)
    for task, model in (("bare", T.BertModel(whole.config)), ("task", whole)):
        torch.manual_seed(len(task))
        peft_model = get_peft_model(
            model, LoraConfig(r=2, target_modules=["query"], modules_to_save=["word_embeddings"])
        )
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                torch.nn.init.normal_(parameter)
        write(peft_model, tmp_path / task)
    merged = merge_adapters({task: tmp_path / task for task in ("bare", "task")}, "average")
    values = [load_file(tmp_path / task / WEIGHTS) for task in ("bare", "task")]
    names = [f"base_model.model.{p}embeddings.word_embeddings.weight" for p in ("", "bert.")]
    mean = sum(one[name] for one, name in zip(values, names, strict=True)) / 2
    close(merged.modules["bert.embeddings.word_embeddings.weight"], mean)


def test_two_layers_cannot_get_one_name(tmp_path):
    adapter = load_adapter(write(adapted("llama", 1, target_modules=["q_proj"]), tmp_path))
    with pytest.raises(ValueError, match="two layers would get one name"):
        adapter.renamed(lambda name: "x")


def test_a_bare_model_s_adapter_is_refused_if_two_modules_are_of_its_class(tmp_path):
    bert = noisy("bert", 0).config
    whole = T.EncoderDecoderModel(
        T.EncoderDecoderConfig.from_encoder_decoder_configs(
            bert, T.BertConfig(**(bert.to_dict() | {"is_decoder": True, "add_cross_attention": True}))
        )
    )
    whole.save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    lora(whole, tmp_path / "whole", 1, ["query"], base=base)
    lora(T.BertModel(bert), tmp_path / "bare", 2, ["query"], base=base)
    for order in (("whole", "bare"), ("bare", "whole")):
        with pytest.raises(ValueError, match=r"nothing tells whether these are the same layers"):
            merge_adapters({task: tmp_path / task for task in order}, "average")
    placed = load_adapter(tmp_path / "bare").renamed(lambda name: f"encoder.{name}")
    assert len(merge_adapters({"whole": tmp_path / "whole", "bare": placed}, "average").layers) == 6
