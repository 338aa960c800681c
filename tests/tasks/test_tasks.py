import json

import pytest
from transformers import AutoTokenizer

from osrm_peft import list_tasks, load_task
from osrm_peft.models.packaged import packaged_file, packaged_model, resolve_model
from osrm_peft.tasks.task import tokenize

# rows of the packaged suite: (train, validation, classes, metric)
PACKAGED = {
    "questions": (4280, 1101, 6, "accuracy"),
    "sms_spam": (3595, 917, 2, "matthews"),
    "movie_reviews": (8042, 2028, 2, "accuracy"),
    "tweets": (3377, 823, 1, "pearson_spearman"),
    "product_reviews": (2965, 732, 1, "pearson_spearman"),
    "editorials": (4160, 959, 1, "pearson_spearman"),
}


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_tasks_are_real_split_cleanly_and_always_the_same(name):
    assert list_tasks("packaged") == list(PACKAGED)
    task = load_task("packaged", name)
    assert (len(task.train), len(task.validation), task.num_labels, task.metric) == PACKAGED[name]
    train, validation = task.train["sentence1"], task.validation["sentence1"]
    assert not set(train) & set(validation) and len(set(train)) == len(train)
    labels = [*task.train["label"], *task.validation["label"]]
    if task.num_labels == 1:
        assert min(labels) >= -4 and max(labels) <= 4 and isinstance(labels[0], float)
    else:
        assert set(labels) == set(range(task.num_labels))


def test_the_packaged_model_and_data_are_verified(tmp_path, monkeypatch):
    assert (packaged_model() / "model.safetensors").is_file()
    assert resolve_model("packaged") == str(packaged_model()) and resolve_model("bert-base") == "bert-base"
    packaged_file.cache_clear()
    monkeypatch.setitem(__import__("osrm_peft.models.packaged", fromlist=["x"]).CHECKSUMS, "sms-spam.csv", "0" * 64)
    with pytest.raises(ValueError, match=r"sms-spam.csv has sha256 81de8e.*, expected 000.*: reinstall with pip"):
        load_task("packaged", "sms_spam")


def test_samples_are_seeded_and_bounded():
    task = load_task("packaged", "tweets")
    first, again, other = (task.sample(train=50, validation=20, seed=seed) for seed in (1, 1, 2))
    assert (len(first.train), len(first.validation)) == (50, 20)
    assert first.train["sentence1"] == again.train["sentence1"] != other.train["sentence1"]
    assert len(task.sample(train=10**6).train) == len(task.train)
    with pytest.raises(ValueError, match="at least 1 row, got 0"):
        task.sample(train=0)


def write(folder, name, train, validation):
    (folder / name).mkdir()
    for split, rows in (("train", train), ("validation", validation)):
        text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
        (folder / name / f"{split}.jsonl").write_text(text)


def row(label, second=None):
    return {"sentence1": "a", "sentence2": second, "label": label}


def test_jsonl_suite(tmp_path):
    write(tmp_path, "topic", [row(0), row(2)], [row(1)])
    write(tmp_path, "cola", [row(0)], [row(1)])
    write(tmp_path, "score", [row(1, "b")], [row(2.5)])
    write(tmp_path, "stsb", [row(1, "b")], [row(2)])
    suite = f"jsonl:{tmp_path}"
    assert list_tasks(suite) == ["cola", "score", "stsb", "topic"]
    found = {name: (load_task(suite, name).num_labels, load_task(suite, name).metric) for name in list_tasks(suite)}
    assert found == {
        "topic": (3, "accuracy"),
        "cola": (2, "matthews"),
        "score": (1, "pearson_spearman"),
        "stsb": (1, "pearson_spearman"),
    }
    assert load_task(suite, "score").train[0] == {"sentence1": "a", "sentence2": "b", "label": 1.0}


def test_bad_suites_and_rows(tmp_path):
    with pytest.raises(ValueError, match=r"unknown suite 'x': choose from|unknown suite 'x': choose 'packaged'"):
        load_task("x", "y")
    with pytest.raises(ValueError, match=r"unknown task 'y' in suite 'packaged': choose from questions, sms_spam"):
        load_task("packaged", "y")
    with pytest.raises(ValueError, match="unknown task 'wnli' in suite 'glue': choose from cola, mnli"):
        load_task("glue", "wnli")
    with pytest.raises(ValueError, match=r"no task in .*: expected .*<task>/train.jsonl"):
        list_tasks(f"jsonl:{tmp_path}")
    cases = {
        "broken": (["{"], r"broken/train.jsonl, line 1: expected a JSON object"),
        "second": ([row(1), '{"sentence1": "x"}'], r"line 2: .*KeyError: 'label'"),
        "worded": ([row("yes")], r"line 1: .*label \(a number\)"),
        "listed": (["[1]"], r"line 1: expected a JSON object"),
        "empty": ([], r"empty/train.jsonl is empty"),
        "negative": ([row(-1)], r"label -1.0 is negative"),
        "far": ([row(999)], r"label 999 with 2 rows; classes are numbered"),
        "infinite": ([row(float("inf"))], r"line 1: .*label=inf must be a finite number"),
        "untold": ([row(1) | {"sentence1": None}], r"line 1: .*must be texts"),
        "numbered": ([row(1, 5)], r"line 1: .*must be texts"),
    }
    for name, (rows, message) in cases.items():
        write(tmp_path, name, rows, [row(0)])
        with pytest.raises(ValueError, match=message):
            load_task(f"jsonl:{tmp_path}", name)
    write(tmp_path, "half", [row(0)], [row(0)])
    (tmp_path / "half/validation.jsonl").unlink()
    with pytest.raises(ValueError, match=r"half/validation.jsonl is missing"):
        load_task(f"jsonl:{tmp_path}", "half")


def test_jsonl_texts_may_hold_any_separator_and_files_blank_lines(tmp_path):
    (tmp_path / "t").mkdir()
    for split in ("train", "validation"):
        text = json.dumps(row(0) | {"sentence1": "a\u2028b\x85c"}, ensure_ascii=False)
        (tmp_path / "t" / f"{split}.jsonl").write_text(f"\ufeff{text}\n\n{json.dumps(row(1))}\n", encoding="utf-8")
    task = load_task(f"jsonl:{tmp_path}", "t")
    assert task.train["sentence1"] == ["a\u2028b\x85c", "a"]


def test_tokens_of_single_texts_and_pairs(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("packaged"))
    write(tmp_path, "pairs", [row(0, "b c"), row(1, "d")], [row(0)])
    task = load_task(f"jsonl:{tmp_path}", "pairs")
    tokens = tokenize(task.train, tokenizer, 16)
    assert tokens["labels"] == [0, 1]
    assert tokens[0]["input_ids"] == tokenizer("a", "b c")["input_ids"]
    assert tokenize(task.validation, tokenizer, 16)[0]["input_ids"] == tokenizer("a")["input_ids"]
    assert len(tokenize(task.train, tokenizer, 4)[0]["input_ids"]) == 4
