"""Models that are no transformers: PEFT takes any nn.Module, and its layers may be called like a wrapper's."""

import copy
import json
import warnings

import pytest
import torch
import transformers as T
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from osrm_peft import load_adapter, merge_adapters
from tests.zoo.adapters import write
from tests.zoo.models import LLAMA

LINEAR = nn.Linear(8, 8)


class Model(nn.Module):
    """Modules of these names, none of which are ever called: weights are compared."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, copy.deepcopy(module))


def reward_model():
    """A model whose own layers lie where PEFT puts those of another."""
    return Model(base_model=T.LlamaForCausalLM(T.LlamaConfig(**LLAMA)), reward=nn.Linear(16, 1))


# {kind: (model, LoraConfig)}
KINDS = {
    "module": (lambda: Model(module=nn.Sequential(LINEAR, nn.ReLU(), nn.Linear(8, 4)), head=nn.Linear(4, 2)),
               {"target_modules": ["0", "2"], "modules_to_save": ["head"]}),
    "module_of_layers": (lambda: Model(layers=nn.ModuleList([Model(module=LINEAR, fc=LINEAR) for _ in range(2)])),
                         {"target_modules": ["module", "fc"]}),
    "base_model": (reward_model, {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["reward"]}),
    "called_like_lora": (lambda: Model(lora_like=LINEAR, lora_mixer=Model(fc=LINEAR), fc=LINEAR),
                         {"target_modules": ["lora_like", "fc"]}),
    "called_weight": (lambda: Model(weight=LINEAR, bias=LINEAR, head=LINEAR),
                      {"target_modules": ["weight", "bias"], "modules_to_save": ["head"]}),
    "convolutions": (lambda: Model(one=nn.Conv1d(4, 6, 3), two=nn.Conv2d(3, 4, (3, 1)), three=nn.Conv3d(2, 3, 2)),
                     {"target_modules": ["one", "two", "three"]}),
    # PEFT adapts the output layer of nn.MultiheadAttention, too, as `attn.base_layer.out_proj`
    "attention": (lambda: Model(attn=nn.MultiheadAttention(8, 2), fc=LINEAR), {"target_modules": ["attn", "fc"]}),
    "attention_output": (lambda: Model(attn=nn.MultiheadAttention(8, 2), fc=LINEAR),
                         {"target_modules": ["attn.out_proj"]}),
    "attention_inside": (lambda: Model(layers=nn.ModuleList([Model(attn=nn.MultiheadAttention(8, 2))])),
                         {"target_modules": ["attn"]}),
    "batch_norm": (lambda: Model(fc=LINEAR, norm=nn.BatchNorm1d(8), head=nn.Linear(8, 2)),
                   {"target_modules": ["fc"], "modules_to_save": ["norm", "head"]}),
    "numbered": (lambda: Model(layers=nn.ModuleList([copy.deepcopy(LINEAR) for _ in range(3)])),
                 {"target_modules": ["0", "1"], "modules_to_save": ["2"]}),
}  # fmt: skip


def made(kind):
    torch.manual_seed(0)
    return KINDS[kind][0]().eval()


def adapted(kind, seed, **config):
    torch.manual_seed(seed)
    model = get_peft_model(made(kind), LoraConfig(r=2, lora_alpha=6, **(KINDS[kind][1] | config)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        trained = [one for one in model.parameters() if one.requires_grad]
        for one in [*trained, *(one for name, one in model.named_buffers() if "modules_to_save" in name)]:
            change = torch.randn(one.shape, generator=generator)
            one += 0.3 * change if one.is_floating_point() else seed
    return model.eval()


def weights(model):
    """All of a PeftModel's weights after stock PEFT's merge_and_unload."""
    return {name: one.double() for name, one in copy.deepcopy(model).merge_and_unload().state_dict().items()}


def stock(kind, folder):
    """Stock PEFT's model of a folder; a missing key is an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(made(kind), str(folder))
    assert not [one for one in caught if "missing" in str(one.message).lower()]
    return model


def close(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-5, atol=2e-6, msg=lambda text, name=name: f"{name} {text}"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_what_stock_peft_loads(kind, tmp_path):
    live = {task: adapted(kind, seed) for task, seed in (("a", 1), ("b", 2))}
    expected = {task: weights(model) for task, model in live.items()}
    for task, model in live.items():
        folder = write(model, tmp_path / task)
        close(weights(stock(kind, folder)), expected[task])
        close(weights(load_adapter(folder).attach(made(kind))), expected[task])
        close(weights(load_adapter(model).attach(made(kind))), expected[task])
        for source in (folder, model):
            load_adapter(source).save_pretrained(tmp_path / "again")
            close(weights(stock(kind, tmp_path / "again")), expected[task])
    mean = {name: (value + expected["b"][name]) / 2 for name, value in expected["a"].items()}
    counts = [name for name in mean if name.endswith("num_batches_tracked")]
    mean |= {name: mean[name].round() for name in counts}
    for sources in ({task: tmp_path / task for task in live}, live):
        merged = merge_adapters(sources, "average", base_model="tiny/base")
        close(weights(merged.load(made(kind))), mean)
        merged.save_pretrained(tmp_path / "merged", overwrite=True)
        close(weights(stock(kind, tmp_path / "merged")), mean)
        further = merge_adapters({"merged": tmp_path / "merged"}, "average")  # a merge is an adapter
        close(weights(further.load(made(kind))), mean)


def test_adapters_of_other_targets_are_merged_by_the_outermost_layers(tmp_path):
    live = [adapted("attention", 1), adapted("attention", 2, target_modules=["attn"])]
    folders = {str(place): write(model, tmp_path / str(place)) for place, model in enumerate(live)}
    one, other = map(weights, live)
    merge_adapters(folders, "average").save_pretrained(tmp_path / "merged")
    close(weights(stock("attention", tmp_path / "merged")), {name: (one[name] + other[name]) / 2 for name in one})


OTHERS = {
    "kernels": (nn.Conv2d(3, 4, (2, 1)), nn.Conv2d(3, 4, (1, 2)), r"4×6 \(a kernel \(3, 1, 2\)\) .* \(3, 2, 1\)\)"),
    "linear": (nn.Conv1d(3, 4, 2), nn.Linear(6, 4), r"4×6 in 'b' and 4×6 \(a kernel \(3, 2\)\) in"),
    "embedding": (nn.Linear(6, 4), nn.Embedding(6, 4), r"4×6 \(an embedding\) in 'b' and 4×6 in"),
}


@pytest.mark.parametrize(("one", "other", "message"), OTHERS.values(), ids=OTHERS)
def test_layers_of_one_name_and_two_kinds_are_refused(one, other, message, tmp_path):
    for task, layer in (("a", one), ("b", other)):
        write(get_peft_model(Model(layer=layer), LoraConfig(r=2, target_modules=["layer"])), tmp_path / task)
    with pytest.raises(ValueError, match=rf"layer 'layer' is {message} .*of different base models"):
        merge_adapters({task: tmp_path / task for task in "ab"}, "average")


def test_an_embedding_of_any_name_has_rows_of_a_vocabulary(tmp_path):
    for task, words in (("a", "xy"), ("b", "yx")):
        write(
            get_peft_model(Model(codes=nn.Embedding(2, 4)), LoraConfig(r=2, target_modules=["codes"])), tmp_path / task
        )
        vocab = {"model": {"vocab": {word: row for row, word in enumerate(words)}}}
        (tmp_path / task / "tokenizer.json").write_text(json.dumps(vocab))
    with pytest.raises(ValueError, match=r"token 'x' is row 0 in 'a', row 1 in 'b'"):
        merge_adapters({task: tmp_path / task for task in "ab"}, "average")


def test_a_table_of_whole_numbers_that_differs_has_no_average(tmp_path):
    def model():
        part = Model(fc=LINEAR)
        part.register_buffer("table", torch.arange(4))
        return Model(fc=LINEAR, part=part)

    for task in ("a", "b"):
        live = get_peft_model(model(), LoraConfig(r=2, target_modules=["fc"], modules_to_save=["part"]))
        live.base_model.model.part.modules_to_save["default"].table.add_(task == "b")
        write(live, tmp_path / task)
    folders = {task: tmp_path / task for task in ("a", "b")}
    with pytest.raises(ValueError, match=r"'part.table' holds whole numbers that differ, .*modules='per_task' keeps"):
        merge_adapters(folders, "average")
    own = merge_adapters(folders, "average", modules="per_task").for_task("b").modules["part.table"]
    assert own.tolist() == [1, 2, 3, 4]
    same = merge_adapters({"a": folders["a"], "c": folders["a"]}, "average").modules["part.table"]
    assert same.tolist() == [0, 1, 2, 3] and same.dtype == torch.int64


def test_a_wrapper_in_a_model_with_a_like_name_of_its_own_is_left_out():
    live = adapted("module", 1)
    expected = weights(live)
    live.base_model.model.module = torch.compile(live.base_model.model.module)
    adapter = load_adapter(live)
    assert set(adapter.factors) == {"module.0", "module.2"}
    close(weights(adapter.attach(made("module"))), expected)


@pytest.mark.parametrize("library", ["torch.nn.parallel.distributed", "deepspeed.runtime.engine", "peft.peft_model"])
def test_what_a_wrapper_was_called_is_none_of_the_model_s_names(library, tmp_path):
    """A PeftModel of a DistributedDataParallel has its name for the class, and `module` in each layer's."""
    folder = write(adapted("module", 1), tmp_path / "a")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config["auto_mapping"]["base_model_class"] == "Model" and "module.0" in load_adapter(folder).factors
    config["auto_mapping"]["parent_library"] = library
    path.write_text(json.dumps(config))
    assert "0" in load_adapter(folder).factors
