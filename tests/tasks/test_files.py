"""Tasks from the user's own files: formats, columns, labels, splits, and every fault by file and line."""

import contextlib
import csv
import io
import json
import logging
import re

import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
from datasets import are_progress_bars_disabled, config
from hypothesis import given, settings
from hypothesis import strategies as st

from osrm_peft import list_tasks, load_task
from osrm_peft.tasks.files import TaskData, guess, tasks_in

FORMATS = ("csv", "tsv", "jsonl", "parquet")
COLUMNS = ("text", "label")


def write(path, rows, columns=COLUMNS):
    """A table as other programs write it: csv, pandas (TSV), json, pyarrow."""
    table = {name: [row[place] for row in rows] for place, name in enumerate(columns)}
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
    elif path.suffix == ".tsv":
        pd.DataFrame(table).to_csv(path, sep="\t", index=False, quoting=csv.QUOTE_NONNUMERIC)  # for \r
    elif path.suffix == ".jsonl":
        lines = [json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")
    else:
        pyarrow.parquet.write_table(pyarrow.table(table), path)
    return str(path)


def rows_of(labels, count=24):
    return [(f"text {place}", labels[place % len(labels)]) for place in range(count)]


def contents(rows):
    return list(zip(rows["sentence1"], rows["sentence2"], rows["label"], strict=True))


# --- shapes -------------------------------------------------------------------------------------------------------

# {labels in the file: (number of labels, names of the classes, metric, the label of the first row)}
LABELS = {
    "numbers": ([0, 1, 2], 3, None, "accuracy", 0),
    "words": (["spam", "ham"], 2, ("ham", "spam"), "accuracy", 1),
    "from one": ([1, 2, 3, 4, 5], 5, ("1", "2", "3", "4", "5"), "accuracy", 0),
    "with gaps": ([10, 0, 2], 3, ("0", "2", "10"), "accuracy", 2),
    "signs": ([1, -1], 2, ("-1", "1"), "accuracy", 1),
    "booleans": ([True, False], 2, ("false", "true"), "accuracy", 1),
    "whole floats": ([1.0, 0.0], 2, None, "accuracy", 1),
    "fractions": ([0.5, 3, -1.25], 1, None, "pearson_spearman", 0.5),
    "codes": (["007", "7"], 2, ("007", "7"), "accuracy", 0),
}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("name", LABELS)
def test_labels_mean_the_same_in_every_format(tmp_path, name, suffix):
    labels, num_labels, names, metric, first = LABELS[name]
    rows = [(text, float(label) if name == "fractions" else label) for text, label in rows_of(labels)]
    task = TaskData(write(tmp_path / f"t.{suffix}", rows), validation=write(tmp_path / "v.csv", [("new", labels[0])]))
    loaded = task.load("t")
    assert (loaded.num_labels, loaded.label_names, loaded.metric) == (num_labels, names, metric)
    assert contents(loaded.train)[0] == ("text 0", None, first) and len(loaded.train) == len(rows)
    assert contents(loaded.validation) == [("new", None, first)] and loaded.test is None
    assert loaded.data == {"train": task.train, "validation": task.validation, "text": "text", "label": "label",
                           "metric": metric}  # fmt: skip


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)
TEXTS = TEXTS.filter(lambda text: text.strip())
CLASSES = st.one_of(
    st.lists(TEXTS.map(str.strip), min_size=2, max_size=4, unique_by=str.lower),
    st.lists(st.integers(-(10**12), 10**12), min_size=2, max_size=4, unique=True),
    st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=4, unique=True),
)


@settings(max_examples=30)
@given(data=st.data())
def test_what_other_programs_write_is_read_alike_from_four_formats(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("written")
    labels, texts = data.draw(CLASSES), data.draw(st.lists(TEXTS, min_size=8, max_size=16, unique=True))
    rows = [(text, labels[place % len(labels)]) for place, text in enumerate(texts)]
    found = []
    for suffix in FORMATS:
        try:
            task = TaskData(write(folder / f"t.{suffix}", rows), text="text", label="label").load("t")
            parts = [contents(part) for part in (task.train, task.validation, task.test)]
            read = sorted(first for part in parts for first, _, _ in part)
            assert read == sorted(texts)
            found.append((parts, task.label_names, task.num_labels))
        except ValueError as error:
            found.append(re.sub(r"t\.\w+(, (line|row) \d+)?", "", str(error)))
    assert all(one == found[0] for one in found), found


def test_pairs_own_columns_and_an_order_of_classes(tmp_path):
    rows = [(f"a {n}", f"b {n}", ("no", "yes")[n % 2], n) for n in range(20)]
    path = write(tmp_path / "p.csv", rows, ("left", "right", "same", "id"))
    task = TaskData(path, text=["left", "right"], label="same", labels=["yes", "no"], metric="matthews").load("p")
    assert (task.label_names, task.metric, task.num_labels) == (("yes", "no"), "matthews", 2)
    assert ("a 0", "b 0", 1) in [*contents(task.train), *contents(task.validation), *contents(task.test)]
    declared = TaskData(path, text="left", label="id", metric="pearson_spearman").load("p")
    assert declared.num_labels == 1 and isinstance(declared.train["label"][0], float)


GUESSES = {
    "the usual names": (("id", "label", "text"), (7, "a", "some text"), "text", "label"),
    "pairs": (("premise", "hypothesis", "label"), ("some", "text", "a"), ["premise", "hypothesis"], "label"),
    "sentence2 empty": (("sentence1", "sentence2", "label"), ("some text", "", "a"), "sentence1", "label"),
    "in capitals": (("Review", "Sentiment"), ("some text", "a"), "Review", "Sentiment"),
    "the only other": (("message", "spam"), ("some text", "a"), "message", "spam"),
    "the longest text": (("who", "what", "rating"), ("me", "a long text of words", "a"), "what", "rating"),
    "unknown names": (("Phrase", "Kind"), ("a long text of words", "a"), "Phrase", "Kind"),
}


@pytest.mark.parametrize("name", GUESSES)
def test_columns_are_guessed_and_said(tmp_path, name, caplog):
    columns, row, text, label = GUESSES[name]
    place = columns.index(label)
    varied = [tuple(f"{cell} {n}" if isinstance(cell, str) and cell else cell for cell in row) for n in range(20)]
    varied = [(*cells[:place], "ab"[n % 2], *cells[place + 1 :]) for n, cells in enumerate(varied)]
    with caplog.at_level(logging.INFO, "osrm_peft"):
        facts = guess(write(tmp_path / "g.csv", varied, columns))
    assert (facts.data.text, facts.data.label, facts.data.metric) == (text, label, "accuracy")
    assert "(guessed)" in caplog.text and f"label {label}" in caplog.text
    assert facts.columns == list(columns) and facts.kind == "classes" and facts.labels == {"a": 10, "b": 10}
    assert sum(facts.rows.values()) == 20 and min(facts.rows.values()) >= 2
    assert facts.words[0] <= facts.words[1] <= facts.words[2] <= 12
    assert facts.data.load("g").label_names == ("a", "b")


def test_numbers_that_become_classes_are_said(tmp_path, caplog):
    TaskData(write(tmp_path / "t.csv", rows_of([1, 2, 5]))).load("t")
    assert "t.csv: labels are not 0 … K−1, so they are numbered anew: 1 → 0, 2 → 1, 5 → 2" in caplog.text
    caplog.clear()
    TaskData(write(tmp_path / "t.csv", rows_of([1, 2, 5])), labels=[1, 2, 5]).load("t")
    assert caplog.text == ""


VARIANTS = {
    "a byte-order mark": b"\xef\xbb\xbftext,label\n%s",
    "CRLF": b"text,label\r\n%s",
    "semicolons": b"text;label\n%s",
    "tabs": b"text\tlabel\n%s",
    "blank lines": b"\n\ntext,label\n\n%s\n  \n",
    "spaces in the header": b"text , label\n%s",
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_csv(tmp_path, name):
    header, end = VARIANTS[name], b"\r\n" if name == "CRLF" else b"\n"
    mark = {"semicolons": b";", "tabs": b"\t"}.get(name, b",")
    body = end.join(b'"12, %d"%s%s' % (n, mark, b"yes" if n % 2 else b"no") for n in range(20))
    (tmp_path / "v.csv").write_bytes(header % body)
    task = TaskData(str(tmp_path / "v.csv"), text="text", label="label").load("v")
    texts = [*task.train["sentence1"], *task.validation["sentence1"], *task.test["sentence1"]]
    assert sorted(texts) == sorted(f"12, {n}" for n in range(20)) and task.label_names == ("no", "yes")


def test_cells_are_text_as_they_stand(tmp_path):
    cells = ["007", "1.50", "NA", "null", "2020-01-01", "true", ' "quoted"', "a\r\nb", "x" * 200_000, "\u2028", "'"]
    rows = [(f"{cell}{n}" if cell == "\u2028" else cell, "ab"[n % 2]) for n, cell in enumerate(cells)]
    for suffix in FORMATS:
        task = TaskData(write(tmp_path / f"c.{suffix}", rows)).load("c")
        found = [*contents(task.train), *contents(task.validation), *contents(task.test)]
        assert sorted(first for first, _, _ in found) == sorted(text for text, _ in rows)


def test_a_changed_file_is_read_anew_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hidden = are_progress_bars_disabled()
    for text in ("first", "other"):
        rows = [(f"{text} {n}", n % 2) for n in range(12)]
        assert TaskData(write(tmp_path / "t.csv", rows)).load("t").train["sentence1"][0].startswith(text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.csv"]
    assert are_progress_bars_disabled() == hidden


def test_names_of_files_may_look_like_patterns(tmp_path):
    for suffix in FORMATS:
        path = write(tmp_path / f"a[1]*? {{b}}.{suffix}", rows_of([0, 1]))
        assert len(TaskData(path).load("t").train) >= 18


# --- splits -------------------------------------------------------------------------------------------------------


def test_a_text_decides_its_split_and_equal_texts_are_together(tmp_path):
    rows = [(f"text {n}", "abc"[n % 3]) for n in range(200)] + [(f"text  {n} ", "abc"[n % 3]) for n in range(200)]
    task = TaskData(write(tmp_path / "t.csv", rows)).load("t")
    parts = [
        {" ".join(text.split()) for text in part["sentence1"]} for part in (task.train, task.validation, task.test)
    ]
    assert [len(part) for part in parts] == [158, 24, 18] and len(set.union(*parts)) == 200
    assert sorted(parts[1])[:3] == ["text 103", "text 109", "text 112"]  # the same on every machine
    assert len(task.train) == 2 * len(parts[0])
    shuffled = TaskData(write(tmp_path / "s.jsonl", rows[::-1])).load("t")
    assert sorted(contents(shuffled.test)) == sorted(contents(task.test))


@pytest.mark.parametrize("count", range(2, 40))
def test_small_files_give_two_rows_to_each_split_or_say_how_many_it_takes(tmp_path, count):
    path = write(tmp_path / "t.csv", [(f"text {n}", "abc"[n % 3]) for n in range(count)])
    if count >= 7:
        task = TaskData(path).load("t")
        assert min(len(task.train), len(task.validation), len(task.test)) >= 2 and set(task.train["label"]) == {0, 1, 2}
    else:
        needed = 6 if count < 3 else 7
        with pytest.raises(ValueError, match=rf"t.csv has {count} different texts; .* {needed} are needed: add rows"):
            TaskData(path).load("t")


def test_a_class_of_one_text_stays_in_train(tmp_path):
    rows = [(f"text {n}", "often") for n in range(60)] + [(f"rare {n}", f"rare {n}") for n in range(20)]
    task = TaskData(write(tmp_path / "t.csv", rows)).load("t")
    assert task.num_labels == 21 and set(task.train["label"]) == set(range(21)) and len(task.test) >= 2


def test_rows_in_two_splits_are_left_out_of_the_earlier(tmp_path, caplog):
    train = write(tmp_path / "a.csv", rows_of([0, 1]))
    validation = write(tmp_path / "b.csv", [("text 0", 0), ("text  1", 1), ("own", 0)])
    test = write(tmp_path / "c.csv", [("text 1", 1), ("text 2", 0)])
    task = TaskData(train, validation, test).load("t")
    assert [len(part) for part in (task.train, task.validation, task.test)] == [21, 2, 2]
    assert "1 of validation and 3 of train" in caplog.text
    with pytest.raises(ValueError, match="every text of train is in another split, too"):
        TaskData(train, train).load("t")


def test_a_validation_file_leaves_the_training_rows_whole(tmp_path):
    train, held = (write(tmp_path / f"{name}.csv", [(f"{name} {n}", n % 2) for n in range(20)]) for name in "ab")
    assert TaskData(train, held).load("t").test is None
    only_test = TaskData(train, test=held).load("t")
    assert [len(part) for part in (only_test.train, only_test.validation, only_test.test)] == [18, 2, 20]
    sample = only_test.sample(train=3, validation=1)
    assert [len(part) for part in (sample.train, sample.validation, sample.test)] == [3, 1, 20]


# --- faults -------------------------------------------------------------------------------------------------------

GOOD = "\n".join(f"text {n},{n % 2}" for n in range(12))
ROWS = "\n".join(json.dumps({"text": f"text {n}", "label": n % 2}) for n in range(12))


def many(label):
    return "\n".join(f"text {n},{label(n)}" for n in range(30))


FAULTS = {
    "latin1.csv": ("text,label\ncafé,1\n".encode("latin1"), r"line 2: byte 0xe9 is not .* -f latin1 -t utf-8 f.csv"),
    "latin1.jsonl": (ROWS.encode() + '\n{"text": "é"}'.encode("latin1"), r"line 13: byte 0xe9 is not UTF-8; .*iconv"),
    "utf16.csv": ("text,label\na,1\n".encode("utf-16"), r"line 1: the file is in UTF-16; .*iconv -f utf-16 -t utf-8"),
    "utf16le.tsv": ("text\tlabel\na\t1\n".encode("utf-16-le"), r"line 1: a NUL byte, .*iconv -f utf-16"),
    "nul.jsonl": (ROWS.encode() + b'\n{"text": "a\0"}', r"line 13: a NUL byte"),
    "empty.csv": (b"", r"is empty: give it at least one row"),
    "empty.jsonl": (b"\n \n", r"is empty"),
    "header only.csv": (b"text,label\n", r"has a header and no rows"),
    "long row.csv": (f"text,label\n{GOOD}\nso, so,1\n", r"line 14: 3 cells, .* 2 \('text', 'label'\); put .* quotes"),
    "short row.csv": (f"text,label\n{GOOD}\nso\n", r"line 14: 1 cells, but the header has 2"),
    "ragged after lines in quotes.csv": (f'text,label\n"a\n\nb",1\n{GOOD}\nso\n', r"line 17: 1 cells"),
    "open quote.csv": (f'text,label\n{GOOD}\n"so,1\nb,0\n', r"line 14: a quote is opened and never closed"),
    "quote in quotes.csv": (f'text,label\n"a "so" b",1\n{GOOD}\n', r"line 2: ',' expected after '\"'; write \" inside"),
    "no text.csv": (f"text,label\n{GOOD}\n ,1\n", r"line 14: the text is missing \(column 'text'\): fill it in"),
    "no label.csv": (f"text,label\n{GOOD}\na,\n", r"line 14: the label is missing \(column 'label'\)"),
    "no label.jsonl": (f'{ROWS}\n\n{{"text": "a"}}', r"line 14: the label is missing"),
    "null.jsonl": (f'{ROWS}\n{{"text": null, "label": 1}}', r"line 13: the text is missing"),
    "nan.jsonl": (f'{ROWS}\n{{"text": "a", "label": NaN}}', r"line 13: the label is missing"),
    "infinite.jsonl": (f'{ROWS}\n{{"text": "a", "label": 1e999}}', r"line 13: the label inf is not finite"),
    "a number.jsonl": (f'{ROWS}\n{{"text": 3, "label": 1}}', r"line 13: 3 in column 'text' is no text but int"),
    "an object.jsonl": (f'{ROWS}\n{{"text": "a", "label": {{}}}}', r"line 13: the label \{\} is dict"),
    "surrogate.jsonl": (f'{ROWS}\n{{"text": "\\ud83d", "label": 1}}', r"line 13: half of a surrogate pair \(\\ud83d\)"),
    "cut.jsonl": (f'{ROWS}\n{{"text": "a", "lab', r"line 13: no JSON: "),
    "a list.jsonl": (f"{ROWS}\n[1]", r"line 13: expected a JSON object, got \[1\]"),
    "one list.json": ('[{"text": "a", "label": 1}]', r"line 1: a JSON list; write one object a line"),
    "twice.csv": (f"text,label,text\n{GOOD}", r"line 1: the column 'text' is there twice: rename one"),
    "twice.jsonl": (f'{ROWS}\n{{"text": "a", "text": "b"}}', r"line 13: no JSON: the column 'text' is there twice"),
    "one column.csv": ("text\na\nb\n", r"no label found; the columns are 'text'; is its first row the header\?"),
    "no header.csv": (GOOD, r"the label '0' stands in the first line, as if it were a row: begin the file with"),
    "which text.csv": ("a,b,label\nxxxx,yyyyy,1\n", r"could be the text \('b', 'a'\); .*text: and label:"),
    "which label.csv": ("text,score,topic\na,1,b\n", r"several columns could be the label \('score', 'topic'\)"),
    "lists.jsonl": (f'{ROWS}\n{{"text": "a", "label": ["x", "y"]}}', r"line 13: .*multi-label tasks are not supported"),
    "lists.csv": ("text,label\na,\"['x', 'y']\"\nb,\"['x']\"\n", r"line 2: .*multi-label tasks are not supported"),
    "one class.csv": (f"text,label\n{many('x'.format)}", r"has one class only, 'x'"),
    "ids.csv": (f"text,label\n{many(lambda n: 7 * n)}", r"30 different labels in 30 rows.*metric: pearson_spearman"),
    "texts.csv": (f"text,label\n{many('other {}'.format)}", r"looks like text or an id"),
    "words, numbers.csv": (f"text,label\n{many('{}.5'.format)}\na,n/a\n", r"line 32: the label 'n/a' is no number"),
    "damaged.parquet": (b"PAR1 and no more", r"is no Parquet file, or damaged: "),
    "old.xlsx": (b"PK", r"has the ending '.xlsx': save it as CSV, TSV, JSON lines or Parquet"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_one_line_with_the_way_out(tmp_path, name):
    content, message = FAULTS[name]
    path = tmp_path / f"f.{name.rpartition('.')[2]}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        TaskData(str(path)).load("f")
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def parquet_faults():
    table = pyarrow.table
    yield {"text": ["a", None], "label": [0, 1]}, r"row 2: the text is missing"
    yield {"text": ["a", "b"], "label": [0.0, float("nan")]}, r"row 2: the label is missing"
    yield {"text": ["a", "b"], "label": [[1], [1, 2]]}, r"row 1: .*multi-label tasks are not supported"
    yield {"text": [1, 2], "label": [0, 1]}, r"row 1: 1 in column 'text' is no text but int"
    yield {"text": pyarrow.array([], "string"), "label": pyarrow.array([], "string")}, r"has columns and no rows"
    yield table([["a"], ["b"], ["c"]], names=["text", "text", "label"]), r"the column 'text' is there twice"


@pytest.mark.parametrize("place", range(6))
def test_faults_of_parquet_are_named_by_row(tmp_path, place):
    content, message = list(parquet_faults())[place]
    table = content if isinstance(content, pyarrow.Table) else pyarrow.table(content)
    pyarrow.parquet.write_table(table, tmp_path / "f.parquet")
    with pytest.raises(ValueError, match=rf"f.parquet(,|:)? {message}"):
        TaskData(str(tmp_path / "f.parquet")).load("f")


def test_categories_of_parquet_are_words(tmp_path):
    frame = pd.DataFrame({"text": [f"text {n}" for n in range(20)], "label": pd.Categorical(["x", "y"] * 10)})
    frame.to_parquet(tmp_path / "t.parquet")
    assert TaskData(str(tmp_path / "t.parquet")).load("t").label_names == ("x", "y")


DATA = {
    "a column that is not there": ({"text": "txt"}, r"no column 'txt', only 'text', 'label'; did you mean 'text'\?"),
    "a label that is not there": ({"label": "zzz"}, r"has no column 'zzz', only 'text', 'label'$"),
    "text as label": ({"text": "text", "label": "text"}, r"column 'text' is text and label"),
    "a class that is not named": ({"labels": [0, 5]}, r"line 3: the label '1' is not among labels \('0', '5'\)"),
    "a file that is not there": ({"train": "no.csv"}, r"no.csv is missing: name a file"),
    "a folder": ({"train": "."}, r". is no file: name a file"),
    "a split that is no file": ({"validation": "validation"}, r"validation is missing: name a file"),
    "three texts": ({"text": ["a", "b", "c"]}, r"must be the name of a column, or of two"),
    "an unknown metric": ({"metric": "f1"}, r"unknown metric 'f1': choose from accuracy, matthews"),
    "one class": ({"labels": ["x"]}, r"labels=\['x'\] must be two or more different classes"),
    "a class twice": ({"labels": ["x", "y", "x"]}, r"must be two or more different classes"),
    "classes of a regression": ({"labels": [0, 1], "metric": "pearson_spearman"}, r"\(and no regression\)"),
    "no name": ({"train": 3}, r"train=3 must be str, not int"),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_each_mistake_in_a_task_s_data_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text(f"text,label\n{GOOD}\n")
    fields, message = DATA[name]
    with pytest.raises(ValueError, match=message):
        TaskData(**({"train": "t.csv"} | fields)).load("t")


def test_labels_and_columns_of_other_splits_are_those_of_train(tmp_path):
    train = write(tmp_path / "t.csv", rows_of(["a", "b"]))
    other = write(tmp_path / "v.jsonl", [("x", "a"), ("y", "c")])
    with pytest.raises(
        ValueError, match=r"v.jsonl, line 2: the label 'c' is in validation, but not in train \('a', 'b'"
    ):
        TaskData(train, other).load("t")
    with pytest.raises(ValueError, match=r"v.jsonl has no column 'text', only 'words', 'label'"):
        TaskData(train, write(tmp_path / "v.jsonl", [("x", "a")], ("words", "label"))).load("t")
    fractions = write(tmp_path / "f.csv", rows_of([0.5, 1.5]))
    with pytest.raises(
        ValueError, match=r"f.csv, line 2: the label 0.5 is fractional, and metric accuracy wants classes"
    ):
        TaskData(fractions, metric="accuracy").load("t")
    words = write(tmp_path / "w.csv", rows_of(["a", "b"]))
    with pytest.raises(ValueError, match=r"w.csv, line 2: the label 'a' is no number, and a regression has numbers"):
        TaskData(words, metric="pearson_spearman").load("t")


# --- suites -------------------------------------------------------------------------------------------------------


def test_a_folder_of_files_is_a_suite(tmp_path):
    for place, suffix in enumerate(FORMATS):
        write(tmp_path / f"task{place}.{suffix}", rows_of(["a", "b"]))
    (tmp_path / "own").mkdir()
    for split, suffix in (("train", "csv"), ("validation", "jsonl"), ("test", "parquet")):
        write(tmp_path / f"own/{split}.{suffix}", [(f"{split} {n}", n % 2) for n in range(4)])
    (tmp_path / ".hidden.csv").write_text("x")
    (tmp_path / "notes.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    suite = f"files:{tmp_path}"
    assert list_tasks(suite) == ["own", "task0", "task1", "task2", "task3"]
    parts = [contents(part) for part in (lambda t: (t.train, t.validation, t.test))(load_task(suite, "task0"))]
    for name in ("task1", "task2", "task3"):
        task = load_task(suite, name)
        assert [contents(part) for part in (task.train, task.validation, task.test)] == parts
    own = load_task(suite, "own")
    assert [len(part) for part in (own.train, own.validation, own.test)] == [4, 4, 4]
    mapping = {"mine": TaskData(str(tmp_path / "task0.csv"))}
    assert list_tasks(mapping) == ["mine"] and contents(load_task(mapping, "mine").test) == parts[2]
    with pytest.raises(ValueError, match=r"unknown task 'own' in suite .*: choose from mine"):
        load_task(mapping, "own")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"no task in .*: expected .*<task>.csv \(or .tsv, .jsonl, .parquet\), or .*<task>/train.csv"),
        (["a.csv", "a.jsonl"], r"a.csv and a.jsonl are both 'a': remove one"),
        (["a.csv", "a/train.csv"], r"the task 'a' is there twice"),
        (["a/validation.csv"], r"a has validation and no train: add train.csv"),
        (["train.csv", "test.csv"], r"holds one task, train.csv: put it into .*<task>/"),
        (["con.csv"], r"the task name 'con' cannot be a file name"),
    ],
)
def test_folders_that_are_no_suite_are_named(tmp_path, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, rows_of([0, 1]))
    with pytest.raises(ValueError, match=message):
        tasks_in(tmp_path)


def test_the_csv_of_a_sheet_without_newlines_at_its_end(tmp_path):
    buffer = io.StringIO()
    pd.DataFrame(rows_of(["a", "b"]), columns=COLUMNS).to_csv(buffer)  # with an index that has no name
    (tmp_path / "t.csv").write_text(buffer.getvalue().rstrip("\n"))
    facts = guess(tmp_path / "t.csv")
    assert facts.columns == ["column 1", "text", "label"] and facts.data.text == "text"


@pytest.mark.parametrize("rows", ["a,0\nb,1\n", "a,0\nb,1,2\n", 'a,0\n"b,1\n'])
def test_pythons_own_limit_on_cells_is_left_alone(rows, tmp_path):
    before = csv.field_size_limit()
    (tmp_path / "t.csv").write_text("text,label\n" + rows * 20)
    with contextlib.suppress(ValueError):
        TaskData(str(tmp_path / "t.csv")).load("t")
    assert csv.field_size_limit() == before


def test_a_fault_that_is_kept_leaves_the_reading_of_other_files_alone(tmp_path):
    (tmp_path / "ragged.csv").write_text("text,label\na,b,c\n")
    with pytest.raises(ValueError, match=r"ragged.csv") as kept:
        TaskData(str(tmp_path / "ragged.csv")).load("ragged")
    assert csv.field_size_limit() >= 131072 and kept.value.__traceback__ is not None
