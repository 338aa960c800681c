"""Causal language models on text tasks: likelihoods, what is written, and scores, against one row at a time."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
)

from osrm_peft import TaskData, evaluate_task, load_task
from osrm_peft.evaluation.bootstrap import metric_on
from osrm_peft.evaluation.text import generate, likelihoods, settings_of
from osrm_peft.tasks.text import tokenize_labelled, tokenize_text
from tests.helpers.causal import LLAMA, SPECIAL, TEMPLATE, save_tiny
from tests.tasks.test_text import CHATS, ROWS, write

GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2}
KINDS = {
    "llama": LlamaConfig(**LLAMA, **SPECIAL, vocab_size=17),
    "mistral": MistralConfig(**LLAMA, **SPECIAL, vocab_size=17, num_key_value_heads=1, head_dim=8),
    "mistral, a window": MistralConfig(**LLAMA, **SPECIAL, vocab_size=17, num_key_value_heads=1, sliding_window=3),
    "qwen2": Qwen2Config(**LLAMA, **SPECIAL, vocab_size=17, num_key_value_heads=1),
    "gemma": GemmaConfig(**LLAMA, **SPECIAL, vocab_size=17, num_key_value_heads=1, head_dim=8),
    "gpt2": GPT2Config(**GPT2, **SPECIAL, vocab_size=17),
    "gpt_neox": GPTNeoXConfig(**LLAMA, **SPECIAL, vocab_size=17),
    "opt": OPTConfig(hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=17, **SPECIAL,
                     word_embed_proj_dim=16),
    "falcon, alibi": FalconConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=17, alibi=True,
                                  **SPECIAL),
}  # fmt: skip
PROMPTS = [[3, 4, 5, 6, 7, 8], [9], [10, 11, 12], [5, 5, 5, 5]]
ANSWERS = [[13], [14, 4], [7, 8, 9], [13, 2]]


@pytest.fixture
def tokenizer(tmp_path):
    return save_tiny(tmp_path / "model")[1]


def model_of(kind):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(KINDS[kind]).eval()


@torch.no_grad()
def one_by_one(model, prompts, answers):
    """Each answer behind its prompt, alone, without padding or cache."""
    rows = []
    for prompt in prompts:
        found = []
        for answer in answers:
            logits = model(torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0].double().log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
            found.append(sum(float(logits[place, token]) for place, token in zip(places, answer, strict=True)))
        rows.append(found)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_likelihoods_are_those_of_each_answer_alone(kind, batch_size, tokenizer):
    model = model_of(kind)
    found = likelihoods(model, PROMPTS, ANSWERS, tokenizer, batch_size=batch_size)
    torch.testing.assert_close(found.double(), one_by_one(model, PROMPTS, ANSWERS), rtol=0, atol=2e-5)


def test_a_model_without_a_cache_of_keys_is_refused_where_it_is_needed(tokenizer):
    config = MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=17, **SPECIAL)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match="MambaForCausalLM has no cache of keys and values"):
        likelihoods(model, PROMPTS, ANSWERS, tokenizer)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mistral, a window"])
def test_what_is_written_in_batches_is_what_is_written_alone(kind, tokenizer, tmp_path):
    model, task = model_of(kind), load_task(write(tmp_path / "data"), "films")
    settings = settings_of(task, tokenizer, model)
    assert not settings.do_sample and settings.max_new_tokens == 3 and settings.eos_token_id == [2]
    found = generate(model, PROMPTS, tokenizer, settings, batch_size=3)
    for prompt, text in zip(PROMPTS, found, strict=True):
        tokens = list(prompt)
        with torch.no_grad():
            for _ in range(3):
                tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
                if tokens[-1] == 2:
                    break
        assert text == tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("rows", "metric"),
    [
        (ROWS, "accuracy"),
        (ROWS, "matthews"),
        (ROWS, "exact_match"),
        (ROWS, "rouge_l"),
        (CHATS, "accuracy"),
        (CHATS, "exact_match"),
    ],
)
def test_a_model_trained_on_the_rows_scores_1_and_is_left_as_it_was(rows, metric, tmp_path):
    model, tokenizer = save_tiny(tmp_path / "model", TEMPLATE)
    write(tmp_path / "data", rows)
    files = {split: str(tmp_path / f"data/films/{split}.jsonl") for split in ("train", "validation")}
    task = load_task({"films": TaskData(**files, metric=metric)}, "films")
    task = dataclasses.replace(task, validation=task.train)
    tokens = tokenize_text(task.train, tokenizer, 32)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        for ids, mask in zip(tokens["input_ids"], tokens["completion_mask"], strict=True):
            logits = model(torch.tensor([ids])).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
            (loss * torch.tensor(mask[1:])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.train()
    assert evaluate_task(model, task, tokenizer, batch_size=3, progress=False) == 1
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    wrong = dataclasses.replace(task, validation=task.validation.select([0, 0, 0, 1]))
    wrong = dataclasses.replace(wrong, validation=wrong.validation.remove_columns(["completion", "label"]))
    swapped = wrong.validation.add_column("completion", [" no"] * 3 + [" no"]).add_column("label", [0] * 4)
    wrong = dataclasses.replace(wrong, validation=swapped)
    expected = 0 if metric == "matthews" else 0.25
    assert evaluate_task(model, wrong, tokenizer, progress=False) == expected


@pytest.mark.parametrize("kind", ["llama", "mistral, a window", "gpt2", "falcon, alibi"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_inverse_perplexity_is_exp_of_the_loss_of_each_row_alone(kind, batch_size, tokenizer, tmp_path):
    model, rows = model_of(kind), [*ROWS, {"prompt": "it was", "completion": " very very good"}]
    write(tmp_path / "data", rows)
    files = {split: str(tmp_path / f"data/films/{split}.jsonl") for split in ("train", "validation")}
    task = load_task({"films": TaskData(**files, metric="inverse_perplexity")}, "films")
    expected = []
    for row in tokenize_labelled(task.validation, tokenizer, 32):
        batch = {name: torch.tensor([row[name]]) for name in ("input_ids", "labels")}
        with torch.no_grad():
            expected.append(float(torch.exp(-model(**batch).loss)))
    found = evaluate_task(model, task, tokenizer, batch_size=batch_size, progress=False)
    assert found == pytest.approx(np.mean(expected), rel=1e-5)


def test_a_metric_of_rows_on_resamples_is_their_weighted_mean():
    values, counts = np.array([0.0, 1.0, 0.5]), np.array([[1.0, 1, 1], [0, 2, 1], [3, 0, 0]])
    np.testing.assert_allclose(metric_on("exact_match", values, np.zeros(3), counts), [0.5, 2.5 / 3, 0])
