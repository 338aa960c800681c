"""Features files: round trips, what is in them, when it is read, and from where."""

import copy
import gc
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from osrm_peft import OSRMLoraConfig, TaskFeatures, collect_features, initialize_osrm_weights
from osrm_peft.features.fit import check_model, check_other_tasks
from osrm_peft.features.moments import STATISTICS, FeatureMoments
from osrm_peft.features.task_features import tokenizer_hash
from osrm_peft.io import tensors as tensor_files
from osrm_peft.io.tensors import write_tensors
from osrm_peft.osrm.spectrum import PooledMoment, Spectrum
from osrm_peft.osrm.subspace import choose_directions
from tests.helpers.hub import Hub
from tests.helpers.models import make_base, make_batch
from tests.helpers.osrm import PAPER

WIDTH = 24
TARGETS = ["query", "value"]


def features_of(statistic="token", count=9, task="t", **fields):
    """Layers a and b with one input, c with another."""
    made = []
    for _ in range(2):
        made.append(FeatureMoments(statistic, WIDTH))
        made[-1].add_(torch.randn(count, 2, WIDTH))
        made[-1].settle_()  # as collecting does
    layers = {"a": made[0], "b": made[0], "c": made[1]}
    return TaskFeatures(task, "tiny", "0" * 16, statistic, count, **fields, layers=layers)


# relative error of one number that is rounded (and of the float32 products and quotients before and after)
ROUNDING = {torch.float32: 4 * 2**-24, torch.bfloat16: 2**-8 + 4 * 2**-24}  # bfloat16 has 8 bits


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("statistic", "count"), [*((statistic, 9) for statistic in STATISTICS), ("sample", 30)])
def test_round_trip(tmp_path, statistic, count, dtype):
    features = features_of(statistic, count, seed=3, tokenizer="words", tokenizer_hash="f" * 16, adapter_sha256="e")
    features.save(tmp_path / "t.safetensors", dtype)
    again = TaskFeatures.load(tmp_path / "t.safetensors")
    for name, value in vars(features).items():
        if name != "layers":
            assert getattr(again, name) == value, name
    assert list(again.layers) == ["a", "b", "c"] and again.widths() == dict.fromkeys("abc", WIDTH)
    exact = True
    for name, moments in features.layers.items():
        found = again.layers[name]
        assert (found.statistic, found.width, found.count) == (statistic, WIDTH, moments.count)
        pairs = [(found.mean(), moments.mean()), (found.total, moments.total)]
        pairs += [(found.second, moments.second), (found.rows, moments.rows)]
        for mine, theirs in pairs:
            assert (mine is None) == (theirs is None)
            if theirs is not None:
                torch.testing.assert_close(mine, theirs, rtol=ROUNDING[dtype], atol=1e-30)
                exact &= torch.allclose(mine, theirs, rtol=ROUNDING[torch.float32], atol=1e-30)
        assert found.second is None or torch.equal(found.second, found.second.T)
        if dtype == torch.float32:
            assert torch.equal(found.mean(), moments.mean())
            assert torch.equal(found.second_moment(), moments.second_moment())
    assert exact == (dtype == torch.float32)


@pytest.mark.parametrize(
    ("statistic", "count", "numbers"),
    [("mean", 9, 0), ("sample", 9, 9 * WIDTH), ("sample", 30, 300), ("token", 9, 300)],  # 300 = 24 · 25 / 2
)
@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 32), (torch.bfloat16, 16)])
def test_a_file_holds_a_mean_and_vectors_or_a_triangle_an_input(tmp_path, statistic, count, numbers, dtype, bits):
    path = tmp_path / "t.safetensors"
    features_of(statistic, count).save(path, dtype)
    tensors = load_file(path)
    assert {key.partition(".")[0] for key in tensors} == {"a", "c"}
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert sum(tensor.numel() for tensor in tensors.values()) == 2 * (WIDTH + numbers)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + header + 2 * (WIDTH + numbers) * bits // 8


def test_a_file_of_format_2_still_reads(tmp_path):
    """As the version before wrote it: the whole second moment, and no word of a tokenizer."""
    features = features_of()
    header = {"task": "t", "base_model": "tiny", "weight_hash": "0" * 16, "statistic": "token", "k": 9, "seed": None}
    header |= {"reference": False, "adapted": False, "adapter_sha256": None, "format": 2}
    header |= {"counts": {"a": 18, "c": 18}, "same_input": {"a": "a", "b": "a", "c": "c"}}
    tensors = {}
    for name in "ac":
        tensors[f"{name}.mean"] = features.layers[name].mean().float()
        tensors[f"{name}.second_moment"] = features.layers[name].second_moment().float()
    save_file(tensors, tmp_path / "t.safetensors", {"osrm_peft": json.dumps(header)})
    again = TaskFeatures.load(tmp_path / "t.safetensors")
    assert (again.tokenizer, again.tokenizer_hash, again.num_samples) == (None, None, 9)
    for name, moments in features.layers.items():
        torch.testing.assert_close(again.layers[name].second_moment(), moments.second_moment(), rtol=2e-7, atol=0)
        torch.testing.assert_close(again.layers[name].mean(), moments.mean(), rtol=2e-7, atol=0)


@pytest.fixture
def read(monkeypatch):
    """The names of the tensors that are read, as they are."""
    names, real = [], tensor_files._read

    def watched(*where):
        names.append(where[-1])
        return real(*where)

    monkeypatch.setattr(tensor_files, "_read", watched)
    return names


def test_tensors_are_read_when_they_are_used_and_once_while_they_are(tmp_path, read):
    features_of().save(tmp_path / "t.safetensors")
    features = TaskFeatures.load(tmp_path / "t.safetensors")
    assert features.same_input() == {"a": "a", "b": "a", "c": "c"} and len(features.layers) == 3
    assert features.widths() == dict.fromkeys("abc", WIDTH) and "a" in features.layers and "d" not in features.layers
    read.clear()  # `in` of a Mapping looks the name up
    a = features.layers["a"]
    first = list(read)
    assert sorted(first) == ["a.mean", "a.second_moment_tril"]
    assert features.layers["b"] is a is features.layers["a"] and read == first
    a = None
    gc.collect()
    assert features.layers["b"].count == 18 and read == 2 * first  # nobody used it any more: memory was given back


def test_loading_reads_no_tensor(tmp_path, read):
    features_of().save(tmp_path / "t.safetensors")
    features = TaskFeatures.load(tmp_path / "t.safetensors")
    features.same_input(), features.widths(), list(features.layers)
    assert read == []


@pytest.mark.parametrize("change", ["another", "touched", "gone"])
def test_a_file_that_changes_after_it_was_loaded_is_an_error_on_use(tmp_path, change):
    path = tmp_path / "t.safetensors"
    features_of().save(path)
    features = TaskFeatures.load(path)
    assert features.layers["a"].count == 18
    if change == "another":
        features_of().save(path)  # of the same size
    elif change == "touched":
        os.utime(path, (1, 1))
    else:
        path.unlink()
    with pytest.raises(FileNotFoundError if change == "gone" else ValueError) as error:
        features.layers["c"]
    assert change == "gone" or "t.safetensors was changed after it was loaded: load it again" in str(error.value)


names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=6)
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@settings(max_examples=60)
@given(
    wanted=st.dictionaries(names.filter(lambda name: name != "__metadata__"), shapes, max_size=4),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    given_dtype=st.sampled_from([torch.float64, torch.float32]), note=names,
)  # fmt: skip
def test_what_we_write_safetensors_reads(tmp_path_factory, wanted, dtype, given_dtype, note):
    path = tmp_path_factory.getbasetemp() / "w.safetensors"
    tensors = {name: torch.randn(shape[::-1], dtype=given_dtype) for name, shape in wanted.items()}
    tensors = {
        name: tensor.permute(tuple(reversed(range(tensor.dim())))) for name, tensor in tensors.items()
    }  # strided
    write_tensors(path, wanted, dtype, tensors.items(), {"note": note})
    found = load_file(path)
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], tensor.to(dtype)) for name, tensor in tensors.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"note": note}
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # the data are aligned


@pytest.mark.parametrize("before", [False, True])
def test_an_interrupted_save_leaves_no_file_or_the_one_before(tmp_path, before):
    path = tmp_path / "t.safetensors"
    features = features_of()
    if before:
        features.save(path)
    content = path.read_bytes() if before else None
    features.layers["c"].count = 0  # the mean of nothing is an error, after the first layer was written
    with pytest.raises(ValueError, match="no rows were seen"):
        features.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.safetensors"] * before
    assert not before or path.read_bytes() == content


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, "bfloat16"])
def test_another_dtype_is_refused_before_anything_is_written(tmp_path, dtype):
    with pytest.raises(ValueError, match=r"dtype=\S+ of a features file must be torch.float32 or torch.bfloat16"):
        features_of().save(tmp_path / "t.safetensors", dtype)
    assert not list(tmp_path.iterdir())


def tokenizer_of(name, *words, **special):
    vocabulary = {word: i for i, word in enumerate(("[UNK]", *words))}
    made = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=made, name_or_path=name, **special)


def test_a_tokenizer_is_its_vocabulary_and_special_tokens():
    one = tokenizer_hash(tokenizer_of("one", "a", "b"))
    assert re.fullmatch("[0-9a-f]{16}", one)
    assert one == tokenizer_hash(tokenizer_of("two", "a", "b")) == tokenizer_hash(tokenizer_of("one", "a", "b"))
    others = [tokenizer_of("one", "b", "a"), tokenizer_of("one", "a"), tokenizer_of("one", "a", "b", pad_token="a")]
    assert len({one, *map(tokenizer_hash, others)}) == 4
    assert tokenizer_hash(SimpleNamespace(name_or_path="an image processor")) is None


def test_features_of_another_tokenizer_are_refused_naming_both():
    mine, theirs = tokenizer_of("mine", "a", "b"), tokenizer_of("theirs", "b", "a")
    options = {"target_modules": TARGETS, "progress": False}
    own, other, third, unknown = (
        collect_features(make_base(), [make_batch(seed=seed)], task=f"t{seed}", tokenizer=tokenizer, **options)
        for seed, tokenizer in enumerate([mine, theirs, theirs, None])
    )
    assert (own.tokenizer, own.tokenizer_hash) == ("mine", tokenizer_hash(mine))
    assert (unknown.tokenizer, unknown.tokenizer_hash) == (None, None)
    model = get_peft_model(make_base(), OSRMLoraConfig(r=2, target_modules=TARGETS, task_type="SEQ_CLS", **PAPER))
    before = copy.deepcopy(model.state_dict())
    refused = rf"task 't1' were collected with the tokenizer theirs \({tokenizer_hash(theirs)}\), but this one is mine "
    for call in (
        lambda: check_model(other, model, list(other.layers), mine),
        lambda: initialize_osrm_weights(model, [other], tokenizer=mine),
    ):
        with pytest.raises(ValueError, match=refused + rf"\({tokenizer_hash(mine)}\)"):
            call()
    for first, second, alone in ((own, other, None), (unknown, own, other), (other, third, own)):
        with pytest.raises(ValueError, match=r"collected with the tokenizer (mine|theirs) .*with (mine|theirs) "):
            check_other_tasks([first, second], alone)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    check_other_tasks([other, third, unknown], None)
    initialize_osrm_weights(model, [other, third, unknown], tokenizer=theirs)
    initialize_osrm_weights(model, [unknown], tokenizer=mine)  # what is not known is not compared


SCRIPT = """
import json, sys
from peft import get_peft_model
from osrm_peft import OSRMLoraConfig, TaskFeatures, initialize_osrm_weights
from tests.helpers.models import make_base
paper = {"objective": "least_energy"}
config = OSRMLoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS", out_of_task=[sys.argv[1]], **paper)
found = {"layers": len(initialize_osrm_weights(get_peft_model(make_base(), config)))}
for source in sys.argv[2:]:
    try:
        found[source] = TaskFeatures.load(source).task
    except Exception as error:
        found[source] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""
SOURCES = {
    "someone/features": "qnli",
    "someone/features@main": "qnli",
    "someone/features@refs/pr/1": "cola",
    "someone/features:qnli.features.safetensors": "qnli",
    "someone/features@two": "FileNotFoundError: 'someone/features@two' is no features file, and the Hub repository "
    "holds 2 of them: name one, someone/features@two:more/mrpc.features.safetensors",
    "someone/features@two:more/mrpc.features.safetensors": "more",
    "someone/features@two:mrpc.features.safetensors": "mrpc",  # although one of that name lies in more/
    "someone/features:mrpc.features.safetensors": "FileNotFoundError: 'someone/features:mrpc.features.safetensors' is "
    "no features file, and the Hub repository holds none",
    "someone/features@three": "FileNotFoundError: 'someone/features@three' is neither a features file nor a Hub "
    "repository that can be reached (",
    "someone/nothing": "FileNotFoundError: 'someone/nothing' is neither a features file nor a Hub repository that can "
    "be reached (",
    "no/such.safetensors": "FileNotFoundError: no features file no/such.safetensors: write it with",
    "./no/such": "FileNotFoundError: no features file ./no/such: write it with",
}


def test_features_from_the_hub(tmp_path):
    """Through the real client, from a Hub server on loopback."""
    branches = {name: tmp_path / name for name in ("main", "two", "refs/pr/1")}
    files = {"main/qnli": "qnli", "two/mrpc": "mrpc", "two/more/mrpc": "more", "refs/pr/1/cola": "cola"}
    for path, task in files.items():
        features = collect_features(make_base(), [make_batch()], task=task, target_modules=TARGETS, progress=False)
        features.save(tmp_path / f"{path}.features.safetensors")
    (tmp_path / "two/model.safetensors").write_bytes(b"not ours")
    with Hub() as hub:
        hub.seed("someone/features", branches)
        environment = os.environ | hub.environment(tmp_path / "home")
        command = [sys.executable, "-c", SCRIPT, "someone/features", *SOURCES]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("layers") == 4
    assert {source: text[: len(SOURCES[source])] for source, text in found.items()} == SOURCES
    assert not any("model.safetensors" in request for request in hub.requests)  # nothing else is downloaded


@pytest.mark.parametrize("triangle", [(0, 5), (5, 0)])
def test_memory_and_file_choose_the_same_a_if_a_triangle_differs_by_a_unit(tmp_path, triangle):
    """On some CPUs float32 XᵀX is symmetric to rounding only; a file holds one triangle, and `eigh` reads one."""
    features = features_of()
    moments = features.layers["a"]
    moments.second[triangle] = moments.second[triangle].nextafter(torch.tensor(torch.inf))
    features.save(tmp_path / "t.safetensors")
    found = TaskFeatures.load(tmp_path / "t.safetensors").layers["a"]
    torch.testing.assert_close(found.second_moment(), moments.second_moment(), rtol=3 * 2**-24, atol=0)
    moments.settle_()
    assert torch.equal(found.second_moment(), moments.second_moment())
    chosen = [
        choose_directions(Spectrum.of(PooledMoment.of([one])), 3, generator=torch.Generator().manual_seed(0))
        for one in (moments, found)
    ]
    assert torch.equal(*chosen)
