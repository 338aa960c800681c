"""Tokens of all inputs are compared, and tokenizer and generation settings come from a named source."""

import importlib
import json
import logging
import re
import shutil
import time

import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from osrm_peft import merge_checkpoints
from tests.helpers.checkpoints import tensors_of

WORDS = [f"w{place}" for place in range(40)]
SIZES = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1}  # fmt: skip


def model(folder, seed, eos=2, **overrides):
    torch.manual_seed(seed)
    made = LlamaForCausalLM(LlamaConfig(**(SIZES | {"eos_token_id": eos} | overrides)))
    made.save_pretrained(folder)
    return folder


def tokenizer(folder, words=WORDS, eos="w2", template=None, added=(), **more):
    backend = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="w0"))
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0", eos_token=eos, **more)
    made.add_tokens([AddedToken(token) for token in added])
    made.chat_template = template
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    return {name: model(root / name, seed) for seed, name in enumerate(("base", "a", "b"))}


@pytest.fixture
def folders(saved, tmp_path):
    """A base model and two others, without tokenizers."""
    return {name: shutil.copytree(folder, tmp_path / name) for name, folder in saved.items()}


def merge(folders, tmp_path, **given):
    models = {name: folder for name, folder in folders.items() if name != "base"}
    given = {"method": "task_arithmetic", "base": folders["base"]} | given
    return merge_checkpoints(models, tmp_path / "out", **given)


def text_of(out):
    return json.loads((out / "osrm_peft.json").read_text())["text"]


# tokens

SWAPPED = [*WORDS[:5], WORDS[6], WORDS[5], *WORDS[7:]]
OTHERS = {
    "opposite order": {"words": WORDS[::-1]},
    "two changed places": {"words": SWAPPED},
    "another word": {"words": [*WORDS[:7], "other", *WORDS[8:]]},
    "another added token": {"added": ["<y>"]},
    "added tokens in another order": {"added": ["<z>", "<x>"]},
}


@pytest.mark.parametrize("where", ["b", "base"])
@pytest.mark.parametrize("kind", OTHERS)
def test_vocabularies_of_one_size_are_compared_token_by_token(folders, tmp_path, kind, where):
    added = ["<x>", "<z>"] if "order" in kind and "added" in kind else ["<x>"]
    for name, folder in folders.items():
        tokenizer(folder, **({"added": added} | (OTHERS[kind] if name == where else {})))
    first = {"opposite order": "w39", "two changed places": "w[56]", "another word": "w7|other"}.get(kind, "<[xyz]>")
    with pytest.raises(ValueError, match=f"token '({first})' is .* in 'a' and .* in '{where}': rows of the embeddings"):
        merge(folders, tmp_path)
    assert not (tmp_path / "out").exists()
    for path in folders["a"].glob("tokenizer*"):  # the way out
        shutil.copyfile(path, folders[where] / path.name)
    assert merge(folders, tmp_path).is_dir()


@pytest.mark.parametrize("method", ["average", "lore", "ties"])
def test_without_a_base_model_the_models_are_compared(folders, tmp_path, method):
    tokenizer(folders["a"])
    tokenizer(folders["b"], WORDS[::-1])
    with pytest.raises(ValueError, match=r"token 'w39' is 39 in 'a' and 0 in 'b'"):
        merge(folders, tmp_path, method=method, base=folders["base"] if method == "ties" else None)


def test_a_token_that_a_model_lacks_is_named_and_intersect_leaves_it_out(folders, tmp_path):
    for name, folder in folders.items():
        tokenizer(folder, added=["<x>"] if name == "b" else [])
    message = r"token '<x>' is no token in 'a' and 40 in 'b'.*vocab='intersect' keeps the tokens that all have"
    with pytest.raises(ValueError, match=message):
        merge(folders, tmp_path)
    out = merge(folders, tmp_path, vocab="intersect")
    assert AutoTokenizer.from_pretrained(out).get_vocab() == {word: place for place, word in enumerate(WORDS)}


@pytest.mark.parametrize("more", ["models", "base"])
def test_a_base_may_have_more_or_fewer_tokens(folders, tmp_path, more):
    """Added tokens take rows that were there before: the base's row is where all models began."""
    for name, folder in folders.items():
        tokenizer(folder, added=["<x>"] if (name == "base") == (more == "base") else [])
    out = merge(folders, tmp_path)
    assert ("<x>" in AutoTokenizer.from_pretrained(out).get_vocab()) == (more == "models")


def test_models_without_tokenizer_files_merge_and_it_is_said(folders, tmp_path):
    assert text_of(merge(folders, tmp_path))["tokens_compared"] == []
    tokenizer(folders["a"])
    out = merge(folders, tmp_path)
    assert text_of(out)["no_tokenizer"] == ["b", "base"] and text_of(out)["tokenizer"] == "a"
    tokenizer(folders["base"], WORDS[::-1])
    with pytest.raises(ValueError, match="token 'w39'"):
        merge(folders, tmp_path)
    tokenizer(folders["base"])
    out = merge(folders, tmp_path)
    assert text_of(out)["tokens_compared"] == ["a", "base"] and text_of(out)["no_tokenizer"] == ["b"]


def test_a_tokenizer_that_cannot_be_read_is_one_error(folders, tmp_path):
    tokenizer(folders["a"])
    tokenizer(folders["b"])
    panics = {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}, "model": {"type": "WordLevel"}}
    panics["model"] |= {"vocab": {"a": 0}, "unk_token": "a"}
    endless = {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 4 * 10**9}, "unk_token": "a"}}
    for content in (
        "{",
        "[" * 100_000,
        json.dumps(panics),
        json.dumps(endless),
        '{"model": {"type": "WordLevel", "vocab": {"a": 1180591620717411303424}}}',
    ):
        (folders["b"] / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=r"tokenizer of 'b' in .*/b cannot be read.*remove its files") as caught:
            merge(folders, tmp_path)
        assert "\n" not in str(caught.value)
    for path in folders["b"].glob("tokenizer*"):  # the way out
        path.unlink()
    assert merge(folders, tmp_path).is_dir()


def test_a_tokenizer_that_git_did_not_fetch_is_named(folders, tmp_path):
    for name in "ab":  # the same one, so that the files are equal
        tokenizer(folders[name])
        pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
        (folders[name] / "tokenizer.json").write_text(pointer)
    with pytest.raises(ValueError, match=r"/a/tokenizer\.json: a Git LFS pointer, not the file: run `git lfs pull`"):
        merge(folders, tmp_path)


def test_rows_that_are_cut_need_tokenizers(folders, tmp_path):
    folders["b"] = model(tmp_path / "larger", 3, vocab_size=50)
    tokenizer(folders["a"])
    with pytest.raises(ValueError, match=r"'b' has no tokenizer files .*vocab='intersect' matches rows by token"):
        merge(folders, tmp_path, vocab="intersect")
    tokenizer(folders["b"], added=["<x>"])
    tokenizer(folders["base"])
    out = merge(folders, tmp_path, vocab="intersect")
    assert tensors_of(out)["model.embed_tokens.weight"].shape == (48, 16)
    assert text_of(out)["tokenizer"] == "a" and json.loads((out / "config.json").read_text())["vocab_size"] == 48
    with pytest.raises(ValueError, match="tokenizer='b' has the token '<x>', which 'a' has not"):
        merge(folders, tmp_path, vocab="intersect", tokenizer="b")


def test_intersect_where_nothing_is_cut_needs_no_tokenizer_of_each(folders, tmp_path):
    tokenizer(folders["a"])
    tokenizer(folders["base"], model_max_length=7)
    assert (folders["a"] / "tokenizer_config.json").read_bytes() != (
        folders["base"] / "tokenizer_config.json"
    ).read_bytes()
    assert text_of(merge(folders, tmp_path, vocab="intersect"))["no_tokenizer"] == ["b"]


def test_large_vocabularies_are_compared_quickly(folders, tmp_path):
    words = [f"w{place}" for place in range(60_000)]
    tokenizer(folders["a"], words)
    tokenizer(folders["b"], words[:20_000])
    started = time.perf_counter()
    with pytest.raises(ValueError, match="token 'w20000' is 20000 in 'a' and no token in 'b'"):
        merge(folders, tmp_path)
    tokenizer(folders["base"], words[:10])
    tokenizer(folders["b"], words)
    assert merge(folders, tmp_path).is_dir()
    assert time.perf_counter() - started < 20  # quadratic: hours


MODULES = ["bertweet", "phobert", "bartpho", "myt5", "gpt_neox_japanese", "luke", "whisper", "prophetnet", "roc_bert",
           "fsmt", "xlm", "bert", "gpt2", "t5", "xlm_roberta", "deberta_v2", "wav2vec2", "clip", "esm"]  # fmt: skip
UNINSTALLED = ["source.spm", "target.spm", "target_vocab.json", "dict.txt", "qwen.tiktoken", "tekken.json",
               "sentencepiece.bpe.model", "spiece.model", "tokenizer.model.v3"]  # fmt: skip


def test_all_files_of_transformers_tokenizers_are_copied(folders, tmp_path):
    files = set(UNINSTALLED)
    for name in MODULES:
        module = importlib.import_module(f"transformers.models.{name}.tokenization_{name}")
        files |= {
            one for cls in vars(module).values() for one in (getattr(cls, "vocab_files_names", None) or {}).values()
        }
    assert len(files) > 25
    for folder in folders.values():
        for name in files - {"tokenizer.json"}:
            (folder / name).write_text(name)
    out = merge(folders, tmp_path)
    assert files - {"tokenizer.json"} <= {path.name for path in out.iterdir()}
    (folders["b"] / "source.spm").write_text("other")  # is one of them, so that tokens are compared
    with pytest.raises(ValueError, match=r"the tokenizer of 'a' in .* cannot be read"):
        merge(folders, tmp_path)


# whose settings


def settings(folder, eos, template):
    """A model's tokenizer, config.json and generation_config.json with this end of text."""
    tokenizer(folder, eos=f"w{eos}", template=template)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": eos}))
    GenerationConfig(eos_token_id=[eos, eos + 1], temperature=eos / 10, do_sample=True).save_pretrained(folder)


def found(out):
    read = AutoTokenizer.from_pretrained(out)
    loaded = LlamaForCausalLM.from_pretrained(out)
    return read.eos_token, read.chat_template, loaded.config.eos_token_id, loaded.generation_config.eos_token_id


def test_fine_tunes_that_agree_give_their_settings(folders, tmp_path, caplog):
    for name, folder in folders.items():
        settings(folder, *((2, None) if name == "base" else (5, "{{ messages }}")))
    out = merge(folders, tmp_path)
    assert found(out) == ("w5", "{{ messages }}", 5, [5, 6])
    assert text_of(out)["tokenizer"] == text_of(out)["generation"] == "a" and text_of(out)["asked"] is None
    assert "the tokenizer is that of 'a'; 'base' has another chat template, eos_token" in caplog.text
    assert found(merge(folders, tmp_path, tokenizer="base")) == ("w2", None, 2, [2, 3])


def differing(folder, what):
    if what == "chat template":
        tokenizer(folder, template="{{ other }}")
    elif what == "eos_token":
        tokenizer(folder, eos="w9", template="{{ messages }}")
    elif what == "pad_token":
        tokenizer(folder, template="{{ messages }}", pad_token="w8")
    elif what.startswith("generation_config"):
        GenerationConfig(eos_token_id=7).save_pretrained(folder)
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": 7}))


@pytest.mark.parametrize(
    "what",
    ["chat template", "eos_token", "pad_token", "generation_config.json: eos_token_id", "config.json: pad_token_id"],
)
def test_settings_that_differ_between_models_are_named_with_the_way_out(folders, tmp_path, what):
    for folder in folders.values():
        tokenizer(folder, template="{{ messages }}")
        GenerationConfig(eos_token_id=2).save_pretrained(folder)
    before = found(merge(folders, tmp_path))
    differing(folders["b"], what)
    with pytest.raises(ValueError, match=rf"{what} is .* in '[ab]'.* tokenizer='a', or another input's name"):
        merge(folders, tmp_path)
    assert found(merge(folders, tmp_path, tokenizer="a")) == before
    assert found(merge(folders, tmp_path, tokenizer="base")) == before
    other = merge(folders, tmp_path, tokenizer="b")
    expected = AutoTokenizer.from_pretrained(folders["b"])
    read = AutoTokenizer.from_pretrained(other)
    assert (read.chat_template, read.special_tokens_map) == (expected.chat_template, expected.special_tokens_map)
    theirs = LlamaForCausalLM.from_pretrained(folders["b"])
    loaded = LlamaForCausalLM.from_pretrained(other)
    assert loaded.generation_config.eos_token_id == theirs.generation_config.eos_token_id
    assert loaded.config.pad_token_id == theirs.config.pad_token_id
    assert text_of(other)["asked"] == "b"


def test_a_source_that_says_nothing_of_a_token_leaves_the_default(folders, tmp_path):
    config = json.loads((folders["base"] / "config.json").read_text())
    del config["bos_token_id"], config["pad_token_id"]
    (folders["base"] / "config.json").write_text(json.dumps(config))
    for name in "ab":
        config = json.loads((folders[name] / "config.json").read_text())
        (folders[name] / "config.json").write_text(json.dumps(config | {"bos_token_id": 5}))
    out = merge(folders, tmp_path, tokenizer="base")
    assert not {"bos_token_id", "pad_token_id"} & set(json.loads((out / "config.json").read_text()))
    assert LlamaForCausalLM.from_pretrained(out).config.bos_token_id == LlamaConfig().bos_token_id == 1


def test_what_one_model_has_not_is_taken_from_the_other(folders, tmp_path):
    """A pad token in one config.json, a generation_config.json and a tokenizer in one folder: nothing differs."""
    config = json.loads((folders["a"] / "config.json").read_text())
    config.pop("pad_token_id")
    (folders["a"] / "config.json").write_text(json.dumps(config))
    for name in ("a", "base"):
        (folders[name] / "generation_config.json").unlink()
    GenerationConfig(eos_token_id=4).save_pretrained(folders["b"])
    tokenizer(folders["b"], template="{{ messages }}")
    for models in (folders, {name: folders[name] for name in ("base", "b", "a")}):
        out = merge(models, tmp_path)
        assert found(out) == ("w2", "{{ messages }}", 2, 4)
        assert LlamaForCausalLM.from_pretrained(out).config.pad_token_id == 0


@pytest.mark.parametrize(
    "default", [{"temperature": 1.0}, {"do_sample": False}, {"output_attentions": False}, {"use_cache": False},
                {"transformers_version": "4.1"}, {"eos_token_id": [2]}, {"max_length": 20}, {"bad_words_ids": None}]
)  # fmt: skip
def test_defaults_that_are_written_are_no_difference(folders, tmp_path, default):
    for name in "ab":
        about = {"eos_token_id": 2, **(default if name == "b" else {})}
        (folders[name] / "generation_config.json").write_text(json.dumps(about))
    assert merge(folders, tmp_path).is_dir()
    (folders["b"] / "generation_config.json").write_text(json.dumps(about | {"top_p": 0.5}))
    with pytest.raises(ValueError, match=r"top_p is not set in 'a', 0\.5 in 'b'"):
        merge(folders, tmp_path)


def test_several_chat_templates_are_kept(folders, tmp_path):
    for folder in folders.values():
        tokenizer(folder, template={"default": "{{ messages }}", "tools": "{{ tools }}"})
    assert (folders["a"] / "additional_chat_templates").is_dir()
    out = merge(folders, tmp_path)
    assert AutoTokenizer.from_pretrained(out).chat_template == {"default": "{{ messages }}", "tools": "{{ tools }}"}
    assert merge(folders, tmp_path) == out  # all its files are known to be ours
    (folders["b"] / "additional_chat_templates" / "tools.jinja").write_text("{{ other }}")
    with pytest.raises(ValueError, match="chat template is"):
        merge(folders, tmp_path)


def test_the_rules_of_splitting_text_are_settings(folders, tmp_path):
    from tokenizers.pre_tokenizers import Whitespace, WhitespaceSplit

    for name, folder in folders.items():
        backend = Tokenizer(WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="w0"))
        backend.pre_tokenizer = WhitespaceSplit() if name == "b" else Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0").save_pretrained(folder)
    with pytest.raises(ValueError, match=r"pre_tokenizer is .* in 'a', .* in 'b'"):
        merge(folders, tmp_path)


def test_processors_come_with_the_settings(folders, tmp_path):
    for name, folder in folders.items():
        about = {"image_mean": [0.5], "size": {"height": 8}} | ({"processor_class": "Other"} if name == "b" else {})
        (folder / "preprocessor_config.json").write_text(json.dumps(about))
    out = merge(folders, tmp_path)
    assert (out / "preprocessor_config.json").read_bytes() == (folders["a"] / "preprocessor_config.json").read_bytes()
    (folders["b"] / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1], "size": {"height": 8}}))
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: image_mean is 0\.5 in 'a', 0\.1 in 'b'"):
        merge(folders, tmp_path)
    out = merge(folders, tmp_path, tokenizer="b")
    assert json.loads((out / "preprocessor_config.json").read_text())["image_mean"] == [0.1]


@pytest.mark.parametrize("asked", ["c", "base", "", 3, ["a"]])
def test_a_source_that_is_no_input_is_refused(folders, tmp_path, asked):
    with pytest.raises(ValueError, match=rf"tokenizer={re.escape(repr(asked))} names no input: choose from 'a', 'b'"):
        merge(folders, tmp_path, method="average", base=None, tokenizer=asked)


def test_a_source_without_a_tokenizer_is_refused(folders, tmp_path):
    tokenizer(folders["b"])
    with pytest.raises(ValueError, match=r"tokenizer='a': .*/a has no tokenizer files; 'b' has"):
        merge(folders, tmp_path, tokenizer="a")


def test_the_source_is_part_of_what_an_interrupted_merge_is_of(folders, tmp_path, monkeypatch):
    from osrm_peft.checkpoints import resumable as engine

    for folder in folders.values():
        tokenizer(folder)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "put_in_place", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            merge(folders, tmp_path, tokenizer="a")
    state = {"fingerprint": "x", "summary": None, "crc32": {}}
    (tmp_path / ".out.merging" / "merge_state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="is of another merge"):
        merge(folders, tmp_path, tokenizer="b", resume=True)


def test_every_model_of_emr_has_the_settings(folders, tmp_path):
    for name, folder in folders.items():
        settings(folder, *((2, None) if name == "base" else (5, "{{ messages }}")))
    out = merge(folders, tmp_path, method="emr")
    for name in "ab":
        assert found(out / name) == ("w5", "{{ messages }}", 5, [5, 6])


def test_the_command_takes_the_source(folders, tmp_path, call):
    settings(folders["a"], 2, "{{ a }}")
    settings(folders["b"], 5, "{{ b }}")
    arguments = ["merge-checkpoints", folders["a"], folders["b"], "--out", tmp_path / "out"]
    assert "say whose" in call(*arguments, code=2)
    said = call(*arguments, "--tokenizer", "b")
    assert "tokenizer and settings of b (tokens compared of a, b)" in said
    assert found(tmp_path / "out") == ("w5", "{{ b }}", 5, [5, 6])


def test_resized_rows_without_tokens_merge(folders, tmp_path, caplog):
    """Rows that no token has, to fill up to a multiple: the same tokens, other sizes."""
    folders["b"] = model(tmp_path / "padded", 3, vocab_size=64)
    for folder in folders.values():
        tokenizer(folder)
    with pytest.raises(ValueError, match="vocab='intersect' keeps what all have"):
        merge(folders, tmp_path)
    with caplog.at_level(logging.WARNING):
        out = merge(folders, tmp_path, vocab="intersect")
    assert LlamaForCausalLM.from_pretrained(out).get_input_embeddings().weight.shape == (48, 16)
