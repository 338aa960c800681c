"""Checkpoints with other heads or other vocabularies: what each keeps, what is cut, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
)

from osrm_peft import load_merged_checkpoint, merge_checkpoints
from tests.helpers.checkpoints import QUICK, by_hand, noisy, same, tensors_of, write
from tests.helpers.models import TINY, make_batch

# heads


@pytest.fixture(scope="module")
def headed(tmp_path_factory):
    """Models with 2, 3 and 4 classes, and a base model with 3."""
    root = tmp_path_factory.mktemp("headed")
    models = {
        name: noisy(root / name, seed, num_labels=seed + 1) for seed, name in ((1, "two"), (2, "three"), (3, "four"))
    }
    return noisy(root / "base", 0), models


@pytest.mark.parametrize("method", ["average", "ties", "lore"])
def test_each_model_keeps_its_head(headed, tmp_path, method):
    base, models = headed
    options = QUICK.get(method, {})
    out = merge_checkpoints(models, tmp_path / "out", method, base=base, heads=["classifier*"], **options)
    body = tensors_of(out)
    assert not any(name.startswith("classifier") for name in body)
    batch = make_batch()
    for task, folder in models.items():
        own = tensors_of(folder)
        model = load_merged_checkpoint(out, task)
        assert model.num_labels == len(own["classifier.bias"]) and not model.training
        expected = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        heads = {name: own[name] for name in ("classifier.weight", "classifier.bias")}
        expected.load_state_dict(body | heads)
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, expected(**batch).logits, rtol=0, atol=0)
    with pytest.raises(FileNotFoundError, match=r"has no head 'five': it has four, three, two"):
        load_merged_checkpoint(out, "five")
    assert json.loads((out / "osrm_peft.json").read_text())["heads"] == ["classifier*"]


def test_other_heads_are_refused_with_the_way_out(headed, tmp_path):
    _, models = headed
    message = (
        r"'classifier\.(weight|bias)' is .*2.* in 'two', .* it cannot be merged \(if it is a head, name it in heads=\)"
    )
    with pytest.raises(ValueError, match=message):
        merge_checkpoints(models, tmp_path / "out")
    with pytest.raises(ValueError, match=r"heads='score\*' matches no tensor of any model"):
        merge_checkpoints(models, tmp_path / "out", heads=["classifier*", "score*"])
    assert not (tmp_path / "out").exists()


def test_a_head_that_only_one_has_must_be_named(three, base, tmp_path):
    other = write(tmp_path / "other", tensors_of(three["b"]) | {"extra.weight": torch.ones(2, 2)})
    (other / "config.json").write_bytes((three["b"] / "config.json").read_bytes())
    models = {"a": three["a"], "other": other}
    message = r"'other' has a tensor 'extra\.weight', 'a' has not: .*name it in heads="
    with pytest.raises(ValueError, match=message):
        merge_checkpoints(models, tmp_path / "out", "ties", base=base)
    out = merge_checkpoints(models, tmp_path / "out", "ties", base=base, heads=["extra*"])
    assert set(load_file(out / "heads" / "other.safetensors")) == {"extra.weight"}
    with pytest.raises(ValueError, match=r"other\.safetensors holds 'extra\.weight', which .* give another auto_class"):
        load_merged_checkpoint(out, "other")


def test_heads_of_bfloat16_models_load(tmp_path):
    models = {
        name: noisy(tmp_path / name, seed, num_labels=seed + 1, dtype=torch.bfloat16)
        for seed, name in ((1, "x"), (2, "y"))
    }
    out = merge_checkpoints(models, tmp_path / "out", heads=["classifier*"])
    model = load_merged_checkpoint(out, "y")
    assert torch.equal(model.classifier.weight.bfloat16(), tensors_of(models["y"])["classifier.weight"])


# vocabularies


def add_tokenizer(folder, tokens):
    tokenizer = Tokenizer(WordLevel({token: place for place, token in enumerate(tokens)}, unk_token=tokens[0]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=tokens[0]).save_pretrained(folder)
    return folder


TOKENS = [f"word{place}" for place in range(50)]


@pytest.fixture(scope="module")
def wordy(tmp_path_factory):
    """A model with 50 tokens, one with two more at the end, and one where two have changed places."""
    root = tmp_path_factory.mktemp("wordy")
    swapped = [TOKENS[1], TOKENS[0], *TOKENS[2:], "new0", "new1"]
    return {
        "base": add_tokenizer(noisy(root / "base", 0), TOKENS),
        "less": add_tokenizer(noisy(root / "less", 1), TOKENS),
        "more": add_tokenizer(noisy(root / "more", 2, vocab_size=52), [*TOKENS, "new0", "new1"]),
        "swapped": add_tokenizer(noisy(root / "swapped", 3, vocab_size=52), swapped),
    }


def test_other_vocabularies_are_refused_by_name(wordy, tmp_path):
    models = {name: wordy[name] for name in ("less", "more")}
    message = (
        r"'bert\.embeddings\.word_embeddings\.weight' is 50×16 in 'less', 52×16 in 'more'.*vocab='intersect' keeps"
    )
    with pytest.raises(ValueError, match=message):
        merge_checkpoints(models, tmp_path / "out")
    with pytest.raises(ValueError, match="unknown vocab 'union'"):
        merge_checkpoints(models, tmp_path / "out", vocab="union")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["average", "ties", "lore", "dare"])
@pytest.mark.parametrize("turned", [False, True])
def test_the_rows_that_all_have_are_merged(wordy, tmp_path, method, turned):
    models = {name: wordy[name] for name in (("more", "less") if turned else ("less", "more"))}
    options = QUICK.get(method, {})
    out = merge_checkpoints(models, tmp_path / "out", method, base=wordy["base"], vocab="intersect", **options)
    cut = tensors_of(wordy["more"])
    name = "bert.embeddings.word_embeddings.weight"
    cut[name] = cut[name][:50]
    (tmp_path / "cut").mkdir()
    save_file(cut, tmp_path / "cut" / "model.safetensors")
    expected = by_hand(models | {"more": tmp_path / "cut"}, wordy["base"], method, **options)
    same(tensors_of(out), expected, rtol=1e-5, atol=1e-6)
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert model.config.vocab_size == 50 and model.get_input_embeddings().weight.shape == (50, 16)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == {token: place for place, token in enumerate(TOKENS)}


def test_a_larger_base_is_cut_too(wordy, tmp_path):
    models = {"less": wordy["less"], "as_many": wordy["base"]}
    out = merge_checkpoints(models, tmp_path / "out", "average", base=wordy["more"], vocab="intersect")
    expected = by_hand(models, None, "average")
    same(tensors_of(out), expected, rtol=1e-5, atol=1e-6)


def test_tokens_that_moved_are_refused(wordy, tmp_path):
    models = {name: wordy[name] for name in ("less", "swapped")}
    with pytest.raises(ValueError, match=r"token 'word0' is 0 in .*less and 1 in 'swapped'"):
        merge_checkpoints(models, tmp_path / "out", vocab="intersect")
    assert not (tmp_path / "out").exists()


def test_heads_of_models_with_more_tokens_load(wordy, tmp_path):
    models = {name: wordy[name] for name in ("less", "more")}
    out = merge_checkpoints(models, tmp_path / "out", vocab="intersect", heads=["classifier*"])
    for name, folder in models.items():
        model = load_merged_checkpoint(out, name)
        assert model.config.vocab_size == 50
        assert torch.equal(model.classifier.weight, tensors_of(folder)["classifier.weight"])


def test_biases_of_the_vocabulary_are_cut(tmp_path):
    """A masked language model: tied embeddings, and a bias a token."""
    models = {}
    for seed, (name, size) in enumerate((("less", 50), ("more", 52))):
        torch.manual_seed(seed)
        model = BertForMaskedLM(BertConfig(**(TINY | {"vocab_size": size})))
        torch.nn.init.normal_(model.cls.predictions.bias)
        model.save_pretrained(tmp_path / name)
        models[name] = add_tokenizer(tmp_path / name, [f"word{place}" for place in range(size)])
    out = merge_checkpoints(models, tmp_path / "out", vocab="intersect")
    less, more = (tensors_of(folder)["cls.predictions.bias"] for folder in models.values())
    torch.testing.assert_close(tensors_of(out)["cls.predictions.bias"], (less + more[:50]) / 2)
    model = AutoModelForMaskedLM.from_pretrained(out)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
