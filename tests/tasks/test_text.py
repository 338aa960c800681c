"""Tasks in words: their rows, tokens and mistakes."""

import json

import pytest

from osrm_peft import TaskData, load_task
from osrm_peft.tasks.suites import list_tasks
from osrm_peft.tasks.task import fingerprint
from osrm_peft.tasks.text import TextTask, tokenize_text, with_labels
from tests.helpers.causal import TEMPLATE, save_tiny

ROWS = [{"prompt": f"the film was {word}", "completion": f" {answer}"} for word, answer in
        (("good", "yes"), ("bad", "no"), ("very good", "yes"), ("very bad", "no"))]  # fmt: skip
CHATS = [
    {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"][1:]}]}
    for row in ROWS
]


def write(folder, rows=ROWS, name="films", validation=None):
    """The suite of one task; its validation rows are by default of songs where the training rows are of films."""
    songs = json.loads(json.dumps(rows).replace("film", "song"))
    for split, found in (("train", rows), ("validation", songs if validation is None else validation)):
        file = folder / name / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in found))
    return f"files:{folder}"


@pytest.mark.parametrize("name", list_tasks("packaged-text"))
def test_a_packaged_task_in_words_has_the_rows_of_the_task(name):
    plain, task = load_task("packaged", name), load_task("packaged-text", name)
    assert isinstance(task, TextTask) and task.metric == ("matthews" if name == "sms_spam" else "accuracy")
    assert task.answers == tuple(f" {one}" for one in task.label_names) and task.num_labels == len(task.answers)
    for split in ("train", "validation"):
        before, rows = getattr(plain, split), getattr(task, split)
        for old, label, row in zip(before["sentence1"], before["label"], rows, strict=True):
            assert old in row["prompt"] and row["prompt"].endswith("\nAnswer:")
            assert all(answer in row["prompt"] for answer in task.label_names)
            assert row["completion"] == task.answers[row["label"]]
            if plain.num_labels > 1:
                assert row["label"] == label
            else:
                assert task.label_names[row["label"]] == (
                    "negative" if label < -0.5 else "positive" if label > 0.5 else "neutral"
                )
    assert fingerprint(task.train) != fingerprint(task.validation)


@pytest.mark.parametrize(("rows", "kind"), [(ROWS, str), (CHATS, list)])
def test_own_rows_of_prompts_or_messages(tmp_path, rows, kind):
    task = load_task(write(tmp_path, rows), "films")
    assert isinstance(task, TextTask) and task.metric == "exact_match" and task.answers is None and task.num_labels == 1
    assert isinstance(task.train[0]["prompt"], kind) and task.train[0]["completion"].strip() == "yes"
    files = {split: str(tmp_path / f"films/{split}.jsonl") for split in ("train", "validation")}
    choice = load_task({"films": TaskData(**files, metric="accuracy")}, "films")
    assert choice.label_names == ("no", "yes") and choice.train["label"][:] == [1, 0, 1, 0]
    again = load_task({"films": TaskData(**choice.data)}, "films")  # as a manifest names it
    assert again.answers == choice.answers and fingerprint(again.train) == fingerprint(choice.train)


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([*ROWS, {"prompt": "", "completion": "x"}], {}, r"train.jsonl, line 5: prompt and completion must be texts"),
        ([*ROWS, {"prompt": "a", "completion": " "}], {}, r"line 5: prompt and completion must be texts"),
        ([*ROWS, {"prompt": "a", "completion": 3}], {}, r"line 5: prompt and completion must be texts"),
        ([*ROWS, {"prompt": ["a"], "completion": "b"}], {}, r"some prompts are texts, others messages"),
        ([*CHATS, {"messages": [{"role": "user", "content": "a"}]}], {}, r"line 5: messages=.* with the assistant's"),
        ([*CHATS, {"messages": "a"}], {}, r"line 5: messages='a' must be a list"),
        (ROWS, {"metric": "accuracy", "validation": [{"prompt": "a", "completion": " x"}]},
         r"validation.jsonl, line 1: the completion ' x' is in no training row"),
        (ROWS[:1], {"metric": "matthews"}, r"matthews needs two or more different completions"),
        (ROWS, {"metric": "bleu"}, r"metric 'bleu'"),
        (ROWS, {"metric": "pearson_spearman"}, r"metric pearson_spearman is of numbers, the rows have completions"),
        (ROWS, {"validation": ROWS}, r"every text of train is in another split, too"),
    ],
)  # fmt: skip
def test_mistakes_name_the_row_and_the_way_out(tmp_path, rows, more, message):
    write(tmp_path, rows, validation=more.get("validation"))
    files = {split: str(tmp_path / f"films/{split}.jsonl") for split in ("train", "validation")}
    with pytest.raises(ValueError, match=message):
        load_task({"films": TaskData(**files, metric=more.get("metric"))}, "films")


@pytest.mark.parametrize("chats", [False, True])
@pytest.mark.parametrize("metric", ["exact_match", "accuracy"])
def test_no_prompt_is_in_two_splits(tmp_path, chats, metric, caplog):
    rows = [{"prompt": f"film {i}", "completion": " yes" if i % 2 else " no"} for i in range(40)]
    others = [{"prompt": f"film   {i}", "completion": " no"} for i in range(35, 45)]  # white space makes no difference
    if chats:
        rows, others = ([{"messages": [{"role": "user", "content": one["prompt"]},
                                       {"role": "assistant", "content": one["completion"]}]} for one in found]
                        for found in (rows, others))  # fmt: skip
    write(tmp_path, rows, validation=others)
    files = [str(tmp_path / f"films/{split}.jsonl") for split in ("train", "validation")]
    task = load_task({"films": TaskData(*files, metric=metric)}, "films")
    assert (len(task.train), len(task.validation)) == (35, 10)
    assert "rows with the text of a row in another split are left out: 5 of train" in caplog.text
    shared = load_task({"films": TaskData(files[0], metric=metric)}, "films")  # shares of one file
    splits = [[str(one) for one in found["prompt"]] for found in (shared.train, shared.validation, shared.test)]
    assert sum(map(len, splits)) == len(set().union(*splits)) == 40 and min(map(len, splits)) >= 2


def test_tokens_are_prompt_completion_and_end(tmp_path):
    _, tokenizer = save_tiny(tmp_path, TEMPLATE)
    task = load_task(write(tmp_path / "data"), "films")
    rows = tokenize_text(task.train, tokenizer, 32)
    assert tokenizer.decode(rows[0]["input_ids"]) == "the film was good yes <end>"
    assert rows[2]["completion_mask"] == [0] * 5 + [1, 1] and rows[2]["attention_mask"] == [1] * 7
    assert with_labels(rows)[0]["labels"] == [-100] * 4 + rows[0]["input_ids"][4:]
    short = tokenize_text(task.train, tokenizer, 4)
    assert tokenizer.decode(short[0]["input_ids"]) == "was good yes <end>"  # the prompt loses its first tokens
    chat = tokenize_text(load_task(write(tmp_path / "chats", CHATS), "films").train, tokenizer, 32)
    assert tokenizer.decode(chat[0]["input_ids"]) == "<user> the film was good <assistant> yes <end>"
    assert chat[0]["completion_mask"] == [0] * 6 + [1, 1]
    empty = task.train.select([0]).map(lambda row: {"prompt": "  "})
    with pytest.raises(ValueError, match="the prompt '  ' has no tokens"):
        tokenize_text(empty, tokenizer, 32)
    with pytest.raises(ValueError, match=r"' yes' has 2 tokens, max_length=2 leaves room for 1: raise it"):
        tokenize_text(task.train, tokenizer, 2)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        tokenize_text(load_task(write(tmp_path / "chats", CHATS), "films").train, tokenizer, 32)
