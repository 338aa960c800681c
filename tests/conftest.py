"""A tiny BERT made in memory, adapters of it, and no network."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test may reach for the Hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

TINY = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}

# What `make test-fast` leaves out: files, or single tests (the beginning of FILE::NAME), below tests/.
MARKED = {
    "process": (
        "multiprocess/",
        "checkpoints/test_faults.py",
        "test_demo.py",
        "test_docs.py::test_every_python_block",
        "test_docs.py::test_a_users_file",
        "test_glue.py",
        "test_hub.py",
        "test_places.py",
        "test_push.py",
        "test_recipes.py",
        "test_reproduce.py",
        "test_terminal.py",
    ),
    "slow": (
        "checkpoints/test_merge.py",
        "checkpoints/test_names.py",
        "checkpoints/test_text.py",
        "merging/test_alignment.py",
        "test_base_models.py",
        "test_callback.py",
        "test_card.py",
        "test_cli",
        "test_families.py",
        "test_hostile_files.py",
        "test_model_classes.py",
        "test_writers.py",
        "zoo/",
    ),
    "browser": ("test_html_report.py::test_a_browser",),
}


HERE = Path(__file__).parent
FAST = "not (process or slow or browser)"


def pytest_ignore_collect(collection_path, config):
    """`make test-fast` does not import the files that it leaves out: importing TRL alone takes seconds."""
    name = collection_path.relative_to(HERE).as_posix()
    if config.option.markexpr == FAST and name.endswith(".py"):
        return name.startswith(sum(MARKED.values(), ())) or None
    return None


def pytest_collection_modifyitems(items):
    for item in items:
        name = f"{item.path.relative_to(HERE).as_posix()}::{item.name}"
        for mark, beginnings in MARKED.items():
            if name.startswith(beginnings):
                item.add_marker(mark)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_base(num_labels=3, seed=0, kind="bert", **overrides):
    """A tiny model: `"bert"` (Linear), `"gpt2"` (Conv1D) or `"resnet"` (Conv2d)."""
    torch.manual_seed(seed)
    common = {"num_labels": num_labels, "name_or_path": "tiny"}
    if kind == "gpt2":
        sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "pad_token_id": 0}
        return GPT2ForSequenceClassification(GPT2Config(**sizes, **common)).eval()
    if kind == "resnet":
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
        return ResNetForImageClassification(ResNetConfig(**sizes, **common)).eval()
    return BertForSequenceClassification(BertConfig(**(TINY | overrides), **common)).eval()


@pytest.fixture
def base():
    return make_base()


@pytest.fixture
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_base().save_pretrained(folder)
    return str(folder)


def make_batch(rows=4, length=7, seed=0, pads=(0, 2, 3, 1), kind="bert"):
    generator = torch.Generator().manual_seed(seed)
    if kind == "resnet":
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}
    ids = torch.randint(0, 50, (rows, length), generator=generator)
    mask = torch.ones(rows, length, dtype=torch.long)
    for row, pad in zip(range(rows), pads, strict=False):
        if pad:
            mask[row, -pad:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def make_adapter(folder, *, seed=1, num_labels=3, base_seed=0, dtype=torch.float32, kind="bert", **config):
    """A stock PEFT adapter with random B and head, saved by PEFT; returns the live model."""
    base = make_base(num_labels, base_seed, kind)
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"} | config
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding" in name or "modules_to_save" in name:
                parameter.normal_(std=0.3)
    if dtype != torch.float32:
        model = model.to(dtype)
    model.eval().save_pretrained(folder)
    return model


def tensors_of(folder):
    return load_file(f"{folder}/adapter_model.safetensors")


@pytest.fixture
def call(monkeypatch, capsys):
    """The command `osrm-peft` in this process: importing torch and transformers anew takes seconds.

    call(*arguments, code=0) → what it printed (with another code, its error), white space as single spaces.
    """
    from osrm_peft.cli import main

    def called(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["osrm-peft", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        assert (stopped.value.code or 0) == code, printed.err
        return " ".join((printed.out if code == 0 else printed.err).split())

    return called
