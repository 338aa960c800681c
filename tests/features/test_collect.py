import hashlib
import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorWithPadding

from osrm_peft import OSRMLoraConfig, TaskFeatures, collect_features, initialize_osrm_weights, load_task
from osrm_peft.features.fit import check_model
from osrm_peft.models.fingerprint import weight_hash
from osrm_peft.models.layers import target_layers
from osrm_peft.models.loading import load_base
from osrm_peft.models.packaged import resolve_model
from osrm_peft.tasks.task import tokenize
from tests.helpers.models import make_base, make_batch

TARGETS = ["query", "value"]
LORA = {"r": 4, "target_modules": TARGETS, "task_type": "SEQ_CLS"}
PAPER = {"objective": "least_energy"}
QUERY_1 = "bert.encoder.layer.1.attention.self.query"


def batches(count=3):
    return [make_batch(seed=seed) for seed in range(count)]


def collect(model, loader=None, **options):
    loader = batches() if loader is None else loader
    return collect_features(model, loader, task="t", **({"target_modules": TARGETS, "progress": False} | options))


def inputs_without_padding(base, name, rows):
    """What the layer receives, one sample at a time, cut to its real length: no mask, no padding, no batch."""
    seen = []
    handle = base.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0][0].detach()))
    with torch.no_grad():
        for batch in rows:
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                base(input_ids=ids[: int(mask.sum())][None])
    handle.remove()
    return seen


@pytest.mark.parametrize("statistic", ["mean", "sample", "token"])
def test_features_are_those_of_single_samples_without_padding(base, statistic):
    seen = inputs_without_padding(base, QUERY_1, batches())
    h = torch.cat(seen) if statistic == "token" else torch.stack([x.mean(0) for x in seen])
    moments = collect(base, statistic=statistic).layers[QUERY_1]
    assert moments.count == len(h)
    expected = torch.outer(h.mean(0), h.mean(0)) if statistic == "mean" else h.T @ h / len(h)
    torch.testing.assert_close(moments.second_moment(), expected.double(), rtol=1e-4, atol=1e-5)


def test_layers_with_the_same_input_share_one_statistic_counted_once(base):
    layers = collect(base).layers
    assert list(layers) == list(target_layers(base, TARGETS)) and len(layers) == 4
    query, value = (layers[f"bert.encoder.layer.0.attention.self.{name}"] for name in TARGETS)
    assert query is value and query is not layers[QUERY_1]
    assert query.count == sum(int(batch["attention_mask"].sum()) for batch in batches())


class Wandering(nn.Module):
    """`b` receives what `a` receives in the first pass, and a tensor of its own later."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.calls = nn.Linear(4, 4), nn.Linear(4, 4), 0

    def forward(self, x):
        self.calls += 1
        return self.a(x) + self.b(x if self.calls == 1 else x + 1)


def test_a_layer_that_shares_its_input_only_at_times_is_not_mixed_up():
    loader = [{"x": torch.randn(2, 3, 4)} for _ in range(2)]
    with pytest.raises(RuntimeError, match=r"layer 'b' shared its input with another layer in some batches"):
        collect(Wandering(), loader, target_modules=["a", "b"])
    alone = collect(Wandering(), loader, target_modules=["b"])
    assert alone.layers["b"].count == 12


def test_a_loader_of_tuples_is_refused_and_scalars_are_passed_on(base):
    with pytest.raises(TypeError, match=r"the loader must give dicts as the model takes them, got a tuple"):
        collect(base, [(torch.zeros(2, 3),)])
    batch = make_batch() | {"position_ids": torch.arange(7)[None], "use_cache": torch.tensor(0)}
    assert collect(base, [batch], statistic="sample", num_samples=2).num_samples == 2


def test_k_cuts_in_the_middle_of_a_batch(base):
    few = collect(base, statistic="sample", num_samples=6)
    assert few.num_samples == 6 and few.layers[QUERY_1].count == 6
    seen = inputs_without_padding(base, QUERY_1, batches())[:6]
    torch.testing.assert_close(
        few.layers[QUERY_1].mean(),
        torch.stack([x.mean(0) for x in seen]).mean(0).double(),
        rtol=1e-4,
        atol=1e-5,
    )


def test_reference_counts_padding_in_as_the_released_code_does(base):
    seen = []
    handle = base.get_submodule(QUERY_1).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches():
            base(**batch)
    handle.remove()
    expected = torch.cat(seen).mean(1).mean(0)  # over all positions, then over samples
    features = collect(base, statistic="mean", reference=True)
    assert features.reference
    torch.testing.assert_close(features.layers[QUERY_1].mean(), expected.double(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(collect(base, statistic="mean").layers[QUERY_1].mean(), expected.double(), atol=1e-3)


def test_a_peft_model_runs_with_its_adapter_off(base):
    plain = collect(base).layers[QUERY_1].second_moment()
    model = get_peft_model(make_base(), LoraConfig(target_modules=TARGETS, task_type="SEQ_CLS"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    features = collect(model, target_modules=None)
    torch.testing.assert_close(features.layers[QUERY_1].second_moment(), plain)
    assert features.weight_hash == weight_hash(base, features.layers)


class Broken(list):
    def __iter__(self):
        yield from super().__iter__()
        raise RuntimeError("the disk is gone")


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(base, fails):
    base.train()
    base.bert.encoder.layer[0].eval()
    base.classifier.weight.requires_grad_(False)
    before = [(m.training, len(m._forward_pre_hooks), set(vars(m))) for m in base.modules()]
    grads = [p.requires_grad for p in base.parameters()]
    if fails:
        with pytest.raises(RuntimeError, match="the disk is gone"):
            collect(base, Broken(batches()))
    else:
        collect(base)
    assert before == [(m.training, len(m._forward_pre_hooks), set(vars(m))) for m in base.modules()]
    assert grads == [p.requires_grad for p in base.parameters()]
    assert all(p.grad is None for p in base.parameters())


@pytest.mark.parametrize("statistic", ["mean", "sample", "token"])
def test_file_round_trip(base, statistic, tmp_path):
    features = collect(base, statistic=statistic, seed=7)
    features.save(tmp_path / "t.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["t.safetensors"]
    again = TaskFeatures.load(tmp_path / "t.safetensors")
    assert (again.task, again.base_model, again.weight_hash) == ("t", "tiny", features.weight_hash)
    assert (again.statistic, again.num_samples, again.seed, again.reference) == (statistic, 12, 7, False)
    assert list(again.layers) == list(features.layers)
    for name, moments in features.layers.items():
        assert again.layers[name].count == moments.count
        torch.testing.assert_close(again.layers[name].second_moment(), moments.second_moment(), rtol=1e-6, atol=1e-8)
    assert len({id(moments) for moments in again.layers.values()}) == 2  # sharing survives
    with safe_open(tmp_path / "t.safetensors", "pt") as file:
        assert len(file.keys()) == (2 if statistic == "mean" else 4)
        json.loads(file.metadata()["osrm_peft"])


def test_token_rows_do_not_depend_on_the_batch_size():
    """On the packaged model and real text: batches of 1 (no padding at all) against padded batches of 16."""
    model = resolve_model("packaged")
    tokenizer, base = AutoTokenizer.from_pretrained(model), load_base("packaged", 2)
    rows = tokenize(load_task("packaged", "tweets").sample(train=32).train, tokenizer, 48).remove_columns("labels")
    one, many = (
        collect_features(
            base,
            DataLoader(rows, batch_size=size, collate_fn=DataCollatorWithPadding(tokenizer)),
            task="tweets",
            target_modules=TARGETS,
            progress=False,
        )
        for size in (1, 16)
    )
    for name in one.layers:
        assert one.layers[name].count == many.layers[name].count
        S, T = one.layers[name].second_moment(), many.layers[name].second_moment()
        assert (S - T).norm() / S.norm() < 1e-5


def test_weight_hash_tells_models_apart_but_not_dtypes(base):
    names = [QUERY_1]
    assert weight_hash(base, names) == weight_hash(make_base(num_labels=7).bfloat16(), names)  # heads do not count
    assert weight_hash(base, names) != weight_hash(make_base(seed=1), names)
    both = [QUERY_1, QUERY_1.replace("query", "key")]
    assert weight_hash(base, both) == weight_hash(base, both[::-1]) != weight_hash(base, names)
    trained = make_base()
    trained.get_submodule(QUERY_1).weight.data *= 1.01
    assert weight_hash(base, names) != weight_hash(trained, names)


def resized(rows, **options):
    model = make_base(**options)
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


@pytest.mark.parametrize(("collected_on", "used_on"), [(50, 68), (68, 50), (68, 64), (50, 50)])
def test_a_vocabulary_resized_after_collecting_is_no_other_model(collected_on, used_on, tmp_path):
    torch.manual_seed(1)
    features = collect(resized(collected_on))
    features.save(tmp_path / "t.safetensors")
    features = TaskFeatures.load(tmp_path / "t.safetensors")
    assert features.vocabulary == collected_on
    torch.manual_seed(2)  # new rows are drawn anew
    check_model(features, resized(used_on), features.layers)
    model = get_peft_model(resized(used_on), OSRMLoraConfig(**LORA, **PAPER))
    initialize_osrm_weights(model, [tmp_path / "t.safetensors"])
    with pytest.raises(ValueError, match="collect them on the same pre-trained model"):
        check_model(features, resized(used_on, seed=1), features.layers)


@pytest.mark.parametrize("rows", [50, 68])
def test_a_base_that_differs_in_its_embedding_alone_is_another_model(base, rows):
    features, other = collect(base), resized(rows)
    other.get_input_embeddings().weight.data[:50] *= 1.1
    assert weight_hash(base, features.layers) == weight_hash(other, features.layers)
    with pytest.raises(ValueError, match=r"collected on tiny \(weights \w+\), but this model is tiny \(weights \w+\)"):
        check_model(features, other, features.layers)


def of_format_3(path):
    """The file as the version before wrote it: one hash over the embedding, with all its rows, and the layers."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()["osrm_peft"])
    digest, base = hashlib.sha256(), make_base()
    for name in [*sorted(header["same_input"]), "input_embeddings"]:
        weight = base.get_input_embeddings().weight if name == "input_embeddings" else base.get_submodule(name).weight
        index = torch.linspace(0, weight.numel() - 1, 1024, dtype=torch.float64).long().unique()
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(weight.detach().flatten()[index].to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    header |= {"format": 3, "weight_hash": digest.hexdigest()[:16]}
    del header["vocabulary"], header["embedding_hash"]
    save_file(tensors, path, {"osrm_peft": json.dumps(header)})


def test_an_earlier_version_s_file_fits_its_model_but_not_a_resized_one(base, tmp_path):
    path = tmp_path / "t.safetensors"
    collect(base).save(path)
    of_format_3(path)
    features = TaskFeatures.load(path)
    check_model(features, base, features.layers)
    model = get_peft_model(make_base(), OSRMLoraConfig(**LORA, **PAPER))
    initialize_osrm_weights(model, [path, replace(collect(base), task="u")])  # beside one of today
    with pytest.raises(
        ValueError, match=r"The file is of an earlier version, which .* was resized .*: if that is all, collect again"
    ):
        check_model(features, resized(68), features.layers)
    with pytest.raises(ValueError, match="collect them on the same pre-trained model"):
        check_model(features, make_base(seed=1), features.layers)


def test_features_of_another_model_are_refused(base):
    features = collect(base)
    check_model(features, base, [QUERY_1])
    with pytest.raises(ValueError, match=r"collected on tiny \(weights \w+\), but this model is tiny \(weights \w+\)"):
        check_model(features, make_base(seed=1), [QUERY_1])
    with pytest.raises(ValueError, match=r"have width 16 at '.*query', the model has 8"):
        check_model(features, make_base(hidden_size=8), [QUERY_1])
    with pytest.raises(ValueError, match=r"lack 1 of the 1 adapted layers: .*layer.0.*key; collect them again"):
        check_model(features, base, ["bert.encoder.layer.0.attention.self.key"])
    with pytest.raises(ValueError, match="another architecture"):
        check_model(features, make_base(num_hidden_layers=1), ["bert.encoder.layer.0.attention.self.query"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loader": []}, r"the loader of task 't' gave no sample"),
        ({"statistic": "median"}, r"unknown statistic 'median': choose from mean, sample, token"),
        ({"num_samples": 0}, r"num_samples=0 must be a whole number of at least 1"),
        (
            {"target_modules": ["q_proj"]},
            r"target_modules=\{'q_proj'\} match no layer of BertForSequenceClassification",
        ),
        ({"target_modules": ["LayerNorm"]}, r"is a LayerNorm; OSRM features are of linear layers"),
        ({"statistic": "token", "reference": True}, r"use statistic='mean', not 'token'"),
    ],
)
def test_bad_input(base, options, message):
    with pytest.raises(ValueError, match=message):
        collect(base, **options)


def test_target_layers_follow_peft(base):
    for config in (
        {"target_modules": ["query"], "layers_to_transform": [1]},
        {"target_modules": "all-linear", "exclude_modules": ["dense"]},
        {"target_modules": r".*\.0\..*(query|key)"},
        {"target_modules": None},
    ):
        expected = get_peft_model(make_base(), LoraConfig(task_type="SEQ_CLS", **config))
        ours = target_layers(base, LoraConfig(task_type="SEQ_CLS", **config))
        assert list(ours) == list(target_layers(expected)), config


@pytest.mark.parametrize("content", [b"", b"not a file", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="is not a features file"):
        TaskFeatures.load(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no features file .*: write it with `osrm-peft features`"):
        TaskFeatures.load(tmp_path / "y.safetensors")


def saved(base, tmp_path, **options):
    path = tmp_path / "t.safetensors"
    collect(base, **options).save(path)
    with safe_open(path, "pt") as file:
        return path, {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["osrm_peft"])  # noqa: SIM118


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("header", lambda header: header.pop("counts")),
        ("header", lambda header: header.pop("task")),
        ("header", lambda header: header.update(more=1)),
        ("header", lambda header: header.update(same_input=[1])),
        ("header", lambda header: header["counts"].update(dict.fromkeys(header["counts"], -1))),
        ("header", lambda header: header.update(statistic="sample")),
        ("header", lambda header: header.update(format=99)),
        ("header", lambda header: header.update(same_input={})),
        ("header", lambda header: header.update(task=None)),
        ("header", lambda header: header.update(k="many")),
        ("header", lambda header: header.update(vocabulary="many")),
        ("header", lambda header: header.update(statistic="mean")),  # more in it than the statistic reveals
        ("tensors", lambda tensors: tensors.update({k: -v for k, v in tensors.items() if "second" in k})),
        (
            "tensors",
            lambda tensors: tensors.update({k: v[:5].clone() for k, v in tensors.items() if "second" in k}),
        ),
        ("tensors", lambda tensors: tensors.update({k: v * torch.nan for k, v in tensors.items()})),
        ("tensors", lambda tensors: [tensors.pop(k) for k in list(tensors) if "second" in k]),
    ],
)
def test_damaged_features_are_refused_with_the_file_s_name(base, tmp_path, what, change):
    path, tensors, header = saved(base, tmp_path)
    header |= {"statistic": "token"}
    change(header if what == "header" else tensors)
    if header["statistic"] == "sample":
        tensors = {key: tensor for key, tensor in tensors.items() if "second" not in key}
    save_file(tensors, path, {"osrm_peft": json.dumps(header)})
    with pytest.raises(ValueError, match=r"t.safetensors is (not a features file, or damaged \(|damaged: )"):
        list(TaskFeatures.load(path).layers.values())  # numbers are read, and checked, when they are used


def test_what_peft_does_to_requires_grad_is_undone():
    model = get_peft_model(make_base(), LoraConfig(target_modules=TARGETS, task_type="SEQ_CLS"))
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)  # OSRM's freeze_a
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    collect(model, target_modules=None)
    assert before == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"an adapter is merged into .*: call unmerge_adapter\(\) first"):
        collect(model, target_modules=None)


class Flat(nn.Module):
    """A layer that receives the tokens of all samples in one row, as expert layers do."""

    def __init__(self):
        super().__init__()
        self.embed, self.proj = nn.Embedding(50, 8), nn.Linear(8, 8)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        return self.proj(x.reshape(-1, 8)).view_as(x)


@pytest.mark.parametrize("statistic", ["sample", "token"])
def test_flattened_inputs_keep_their_padding_out(statistic):
    model, batch = Flat(), make_batch()
    moments = collect(model, [batch], target_modules=["proj"], statistic=statistic).layers["proj"]
    x, keep = model.embed(batch["input_ids"]).detach(), batch["attention_mask"].bool()
    h = x[keep] if statistic == "token" else torch.stack([row[k].mean(0) for row, k in zip(x, keep, strict=True)])
    assert moments.count == len(h) == (22 if statistic == "token" else 4)
    torch.testing.assert_close(moments.second_moment(), (h.T @ h / len(h)).double(), rtol=1e-5, atol=1e-6)


def test_wrapped_models_are_looked_into(base):
    plain = collect(base).layers
    assert list(collect(nn.DataParallel(base)).layers) == list(plain)
    assert list(collect(torch.compile(base, backend="eager")).layers) == list(plain)


def test_nothing_but_padding_and_broken_models_are_errors(base):
    batch = make_batch()
    with pytest.raises(ValueError, match="no rows were seen"):
        collect(base, [batch | {"attention_mask": torch.zeros_like(batch["attention_mask"])}])
    base.bert.embeddings.word_embeddings.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"receives NaN or Inf: is the model's checkpoint sound"):
        collect(base)


def test_a_model_spread_over_devices_and_disk_gives_the_same_features(tmp_path):
    make_base().save_pretrained(tmp_path)
    load = type(make_base()).from_pretrained
    where = {"bert.encoder.layer.1": "disk", "bert.embeddings": "cpu", "bert.encoder.layer.0": "cpu"}
    where |= {"bert.pooler": "cpu", "classifier": "cpu"}
    spread = load(tmp_path, device_map=where, offload_folder=tmp_path / "offloaded")
    assert spread.bert.encoder.layer[1].attention.self.query.weight.is_meta
    found, expected = collect(spread), collect(load(tmp_path))
    assert found.weight_hash == expected.weight_hash
    for name, moments in expected.layers.items():
        assert torch.equal(found.layers[name].second_moment(), moments.second_moment())
    check_model(found, spread, found.layers)
    assert spread.bert.encoder.layer[1].attention.self.query.weight.is_meta
