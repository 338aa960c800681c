import copy
import json
import re
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

from osrm_peft import DiagonalFisher, TaskFeatures, collect_features, collect_fisher
from osrm_peft.models.layers import target_layers
from tests.helpers.adapters import make_adapter
from tests.helpers.models import make_base, make_batch

TARGETS = ["query", "value", "dense"]  # pooler.dense sees one vector a sample, the others one a token
POOLER = "bert.pooler.dense"


def batches(num_labels=3, pads=(0, 2, 3, 1)):
    found = [make_batch(seed=seed, pads=pads) for seed in range(2)]
    generator = torch.Generator().manual_seed(7)
    for batch in found:
        classes = torch.randint(0, max(num_labels, 2), (4,), generator=generator)
        batch["labels"] = torch.randn(4, generator=generator) if num_labels == 1 else classes
    return found


def rebatched(loader, size):
    whole = {key: torch.cat([batch[key] for batch in loader]) for key in loader[0]}
    return [{key: value[i : i + size] for key, value in whole.items()} for i in range(0, 8, size)]


def collect(model, loader=None, **options):
    loader = batches() if loader is None else loader
    return collect_fisher(model, loader, task="t", **({"target_modules": TARGETS, "progress": False} | options))


def brute_force(model, loader, labels):
    """One example at a time, cut to its real length: autograd's gradient of log p(y|x) by each layer's own weight."""
    model = copy.deepcopy(model)
    layers = {name: getattr(m, "base_layer", m).weight for name, m in target_layers(model, TARGETS).items()}
    for weight in layers.values():
        weight.requires_grad_(True)
    total, seen = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in layers.items()}, 0
    for batch in loader:
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            logits = model(input_ids=ids[: int(mask.sum())][None]).logits[0]
            if len(logits) == 1:  # −½(y − f)²; its expected square has E(y − f)² = 1
                scores = [(logits[0], 1.0 if labels == "expected" else float(label - logits[0].detach()) ** 2)]
            else:
                p, q = logits.softmax(0), logits.detach().softmax(0).tolist()
                scores = [(p[y].log(), q[y] if labels == "expected" else float(y == label)) for y in range(len(p))]
            for score, weight in scores:
                gradients = torch.autograd.grad(score, list(layers.values()), retain_graph=True)
                for name, gradient in zip(layers, gradients, strict=True):
                    total[name] += weight * gradient.double() ** 2
            seen += 1
    return {name: one / seen for name, one in total.items()}


def close(found, expected, tolerance=1e-5):  # float32 forward and backward passes, squared
    assert list(found) == list(expected) and len(found) == 11
    for name, F in found.items():
        assert float((F.double() - expected[name].double()).norm()) <= tolerance * float(expected[name].norm()), name


@pytest.fixture
def tuned(tmp_path):
    """make(num_labels) → a live PeftModel, and the same model with the adapter baked into plain weights."""

    def make(num_labels=3):
        model = make_adapter(tmp_path / "adapter", num_labels=num_labels, target_modules=TARGETS)
        return model, copy.deepcopy(model).merge_and_unload()

    return make


@pytest.mark.parametrize("labels", ["expected", "true"])
@pytest.mark.parametrize("num_labels", [1, 2, 3])
def test_it_is_the_mean_squared_gradient_of_single_examples(tuned, num_labels, labels):
    model, plain = tuned(num_labels)
    loader = batches(num_labels)
    found = collect(model, loader, labels=labels)
    expected = brute_force(model, loader, labels)
    assert (found.num_samples, found.labels, found.base_model, found.task) == (8, labels, "tiny", "t")
    close(found.layers, expected)
    close(collect(plain, loader, labels=labels).layers, expected)
    assert all(F.shape == plain.get_submodule(name).weight.shape for name, F in found.layers.items())
    assert all(float(F.min()) >= 0 and F.dtype == torch.float32 for F in found.layers.values())


def test_the_adapter_counts(tuned):
    model, _ = tuned()
    with model.disable_adapter():
        off = collect(model).layers[POOLER]
    assert float((off - collect(model).layers[POOLER]).norm()) > 0.1 * float(off.norm())


def test_without_target_modules_it_is_of_the_adapted_layers(tmp_path):
    model = make_adapter(tmp_path)
    named = collect(model, target_modules=["query", "value"]).layers
    found = collect(model, target_modules=None).layers
    assert len(found) == 4 and all(torch.equal(found[name], named[name]) for name in named)


@pytest.mark.parametrize("labels", ["expected", "true"])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_the_batch_size_does_not_matter(tuned, size, labels):
    model, loader = tuned()[0], batches()
    close(collect(model, rebatched(loader, size), labels=labels).layers, collect(model, loader, labels=labels).layers)


def test_more_padding_does_not_matter(tuned):
    model, loader = tuned()[0], batches()
    longer = [
        batch
        | {
            "input_ids": nn.functional.pad(batch["input_ids"], (0, 9), value=5),
            "attention_mask": nn.functional.pad(batch["attention_mask"], (0, 9)),
        }
        for batch in loader
    ]
    close(collect(model, longer).layers, collect(model, loader).layers)


def test_k_cuts_in_the_middle_of_a_batch(tuned):
    model, loader = tuned()[0], batches()
    few = collect(model, loader, num_samples=5, labels="true")
    one_by_one = rebatched(loader, 1)[:5]
    assert few.num_samples == 5
    close(few.layers, brute_force(model, one_by_one, "true"))


def test_labels_may_be_called_label_and_are_not_shown_to_the_model(tuned):
    model, loader = tuned()[0], batches()
    renamed = [{("label" if key == "labels" else key): value for key, value in batch.items()} for batch in loader]
    close(collect(model, renamed, labels="true").layers, collect(model, loader, labels="true").layers, 0)
    nonsense = [batch | {"labels": torch.full((4,), 99)} for batch in loader]
    close(collect(model, nonsense).layers, collect(model, loader).layers, 0)


@pytest.mark.parametrize("rows", [4, 16])  # 16 is also the width of the layers: no error there, other numbers
def test_labels_of_a_regression_may_have_a_column_of_their_own(rows):
    model, batch, labels = make_base(1), make_batch(rows, pads=()), torch.randn(rows)
    flat = collect(model, [batch | {"labels": labels}], labels="true").layers
    close(collect(model, [batch | {"labels": labels[:, None]}], labels="true").layers, flat)


def test_a_certain_model_has_no_information_and_an_even_one_has(base):
    with torch.no_grad():
        base.classifier.bias[0] = 100.0
    assert all(float(F.max()) < 1e-30 for F in collect(base).layers.values())
    with torch.no_grad():
        base.classifier.bias[0] = 0.0
    assert all(float(F.max()) > 1e-20 for F in collect(base).layers.values())


def test_bfloat16_models_are_squared_in_float32(tuned):
    model, loader = tuned()[1].bfloat16(), batches()
    found = collect(model, loader).layers
    assert {F.dtype for F in found.values()} == {torch.float32}
    close(found, collect(tuned()[1], loader).layers, 0.1)  # forward and backward have 8 bits


class Broken(list):
    def __iter__(self):
        yield from super().__iter__()
        raise RuntimeError("the disk is gone")


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(tuned, fails):
    model, _ = tuned()
    model.train()
    model.base_model.model.bert.encoder.layer[0].eval()

    def state():
        hooks = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks), set(vars(m))) for m in model.modules()]
        return hooks, [(p.requires_grad, p.grad) for p in model.parameters()]

    before, values = state(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if fails:
        with pytest.raises(RuntimeError, match="the disk is gone"):
            collect(model, Broken(batches()))
    else:
        with torch.no_grad():  # the caller's mode neither stops it nor is changed by it
            collect(model)
            assert not torch.is_grad_enabled()
    assert state() == before
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())


def test_a_model_in_training_is_measured_without_dropout(tuned):
    model, loader = tuned()[0], batches()
    expected = collect(model, loader).layers
    close(collect(model.train(), loader).layers, expected, 0)


def test_gradients_of_a_training_step_stay(tuned):
    model, _ = tuned()
    model(**batches()[0]).loss.backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    collect(model)
    assert before and all(torch.equal(p.grad, before[n]) for n, p in model.named_parameters() if p.grad is not None)


def test_a_file_round_trip(base, tmp_path):
    fisher = collect(base, seed=7)
    fisher.save(tmp_path / "t.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["t.safetensors"]
    again = DiagonalFisher.load(tmp_path / "t.safetensors")
    assert {**vars(again), "layers": 0} == {**vars(fisher), "layers": 0} and (again.num_samples, again.seed) == (8, 7)
    assert set(again.layers) == set(fisher.layers)
    assert all(torch.equal(again.layers[name], F) for name, F in fisher.layers.items())


def test_features_are_no_fisher_file_and_a_fisher_file_is_no_features(base, tmp_path):
    collect_features(base, batches(), task="t", progress=False).save(tmp_path / "features.safetensors")
    collect(base).save(tmp_path / "fisher.safetensors")
    with pytest.raises(ValueError, match=r"features.safetensors is not a Fisher file, or damaged \(AttributeError"):
        DiagonalFisher.load(tmp_path / "features.safetensors")
    with pytest.raises(
        ValueError, match=r"fisher.safetensors is not a features file, or damaged \(ValueError: its header"
    ):
        TaskFeatures.load(tmp_path / "fisher.safetensors")


@pytest.mark.parametrize("content", [b"", b"not a file", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"x.safetensors is not a Fisher file, or damaged .*osrm-peft statistics"):
        DiagonalFisher.load(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no Fisher file .*y.safetensors: write it with"):
        DiagonalFisher.load(tmp_path / "y.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda header, tensors: header.pop("format"),
        lambda header, tensors: header.pop("task"),
        lambda header, tensors: header.update(more=1),
        lambda header, tensors: header.update(format=99),
        lambda header, tensors: header.update(format="x"),
        lambda header, tensors: tensors[POOLER].neg_(),
        lambda header, tensors: tensors[POOLER].fill_(torch.nan),
        lambda header, tensors: tensors[POOLER].fill_(torch.inf),
    ],
)
def test_damaged_files_are_refused_with_their_name(base, tmp_path, change):
    path = tmp_path / "t.safetensors"
    collect(base).save(path)
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()["osrm_peft_fisher"])
    change(header, tensors)
    save_file(tensors, path, {"osrm_peft_fisher": json.dumps(header)})
    with pytest.raises(ValueError, match=r"t.safetensors is not a Fisher file, or damaged \("):
        DiagonalFisher.load(path)


class Toy(nn.Module):
    """`lin` runs `times` times; logits of any shape."""

    def __init__(self, times=1, shape=(2, 3)):
        super().__init__()
        self.lin, self.idle, self.times, self.shape = nn.Linear(3, 3), nn.Linear(3, 3), times, shape

    def forward(self, x):
        self.idle(x)  # runs, and has no say in the logits
        for _ in range(self.times):
            x = self.lin(x)
        return SimpleNamespace(logits=x.reshape(self.shape))


def test_a_layer_without_a_say_in_the_logits_has_no_information():
    F = collect(Toy(), [{"x": torch.randn(2, 3)}], target_modules=["lin", "idle"]).layers
    assert F["lin"].any() and F["idle"].shape == (3, 3) and not F["idle"].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loader": []}, r"the loader of task 't' gave no sample"),
        ({"labels": "own"}, r"unknown labels 'own': choose from expected, true"),
        ({"num_samples": 0}, r"num_samples=0 must be a whole number of at least 1"),
        ({"num_samples": 2.5}, r"num_samples=2.5 must be a whole number"),
        ({"loader": [make_batch()], "labels": "true"}, r"labels='true' needs labels in the batches"),
        ({"target_modules": ["q_proj"]}, r"match no layer of BertForSequenceClassification"),
        ({"target_modules": ["LayerNorm"]}, r"is a LayerNorm"),
    ],
)
def test_bad_input(base, options, message):
    with pytest.raises(ValueError, match=message):
        collect(base, **options)


def test_models_that_it_cannot_tell_the_gradient_of(base):
    x = [{"x": torch.randn(2, 3)}]
    with pytest.raises(ValueError, match=r"layer 'lin' runs twice in one pass: leave it out of target_modules"):
        collect(Toy(times=2), x, target_modules=["lin"])
    with pytest.raises(ValueError, match=r"logits must be \(samples, classes\), got \(1, 2, 3\)"):
        collect(Toy(shape=(1, 2, 3)), x, target_modules=["lin"])
    with pytest.raises(TypeError, match=r"the loader must give dicts as the model takes them, got a tuple"):
        collect(base, [(torch.zeros(2, 3),)])
    base.bert.embeddings.word_embeddings.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"the Fisher information of layer '.*query' has NaN or Inf"):
        collect(base)


@pytest.mark.parametrize(
    ("label", "bound"),
    [(3, "a class, 0 … 2"), (-1, "a class, 0 … 2"), (-100, "a class, 0 … 2"), (1.5, "a class, 0 … 2"),
     (float("nan"), "a finite number"), (float("inf"), "a finite number"), (2**40, "a class, 0 … 2")],
)  # fmt: skip
@pytest.mark.parametrize("way", ["list", "dataset", "stream"])
def test_labels_that_are_no_classes_are_named_before_the_pass(base, label, bound, way):
    loader = [*batches()[:1], *batches()[:1]]
    loader[1] = loader[1] | {"labels": torch.tensor([0, 1, label, 2], dtype=torch.float64)}
    passes = []
    base.register_forward_pre_hook(lambda *given: passes.append(given))
    if way == "dataset":
        rows = {name: torch.cat([batch[name] for batch in loader]).tolist() for name in loader[0]}
        loader = DataLoader(Dataset.from_dict(rows).with_format("torch"), batch_size=4)
    given = (batch for batch in loader) if way == "stream" else loader
    with pytest.raises(
        ValueError,
        match=rf"labels='true': label {re.escape(format(label, 'g'))} of task 't' must be {bound}: .*expected",
    ):
        collect(base, given, labels="true")
    assert len(passes) <= (2 if way == "stream" else 0)


@pytest.mark.parametrize("label", [float("nan"), float("inf")])
def test_labels_of_a_regression_are_finite(label):
    loader = batches(1)
    loader[1]["labels"][2] = label
    with pytest.raises(ValueError, match=r"must be a finite number"):
        collect(make_base(1), loader, labels="true")
    assert collect(make_base(1), loader).num_samples == 8  # its own predictions need none


def test_one_label_a_sample(base):
    loader = [batch | {"labels": torch.zeros(4, 2, dtype=torch.long)} for batch in batches()]
    with pytest.raises(ValueError, match=r"\(4, 2\) labels of 4 samples: give one each"):
        collect(base, loader, labels="true")


HEADER = {"task": "t", "base_model": "b", "k": 8, "labels": "expected", "seed": None, "format": 1}
WRONG = [None, True, 3, -1, 1.5, "x", "\x1b[31m", [], [1], {}, {"a": 1}, 2**70, float("inf"), [[[]]]]


@pytest.mark.parametrize("field", [*HEADER, "adapter_sha256", "layers", "other"])
def test_a_fisher_file_s_fields_are_good_or_named(tmp_path, field):
    path, refused = tmp_path / "x.fisher.safetensors", 0
    for value in WRONG:
        header = json.dumps(HEADER | {field: value})
        save_file({"layer": torch.ones(2, 2)}, path, {"osrm_peft_fisher": header})
        try:
            DiagonalFisher.load(path)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) and field in str(error) and "unhashable" not in str(error)
    assert refused >= len(WRONG) - 4


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 10_000, "", "null", "3", "[]"])
def test_a_fisher_file_s_header_is_an_object(tmp_path, text):
    path = tmp_path / "x.fisher.safetensors"
    save_file({"layer": torch.ones(2, 2)}, path, {"osrm_peft_fisher": text})
    with pytest.raises(ValueError, match=r"x.fisher.safetensors is not a Fisher file, or damaged"):
        DiagonalFisher.load(path)
