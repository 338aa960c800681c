from dataclasses import replace

import pytest
from datasets import Dataset

from osrm_peft.selection.split import Split, labels
from osrm_peft.tasks.task import Task, fingerprint


def task(validation, test=None):
    def rows(count, name):
        texts = [f"{name} {n}" for n in range(count)]
        return Dataset.from_dict({"sentence1": texts, "sentence2": [None] * count, "label": list(range(count))})

    made = Task("t", 2, "accuracy", rows(4, "train"), rows(validation, "validation"))
    return made if test is None else replace(made, test=rows(test, "test"))


def texts(part):
    return part.validation["sentence1"]


def test_half_of_the_validation_rows_has_no_say():
    split = Split.of(task(21), None, 0)
    assert len(texts(split.choose)) == 11 and len(texts(split.test)) == 10 and not split.own_test
    assert set(texts(split.choose)) | set(texts(split.test)) == set(texts(task(21)))
    assert texts(split.choose) != sorted(texts(split.choose))


def test_a_tasks_own_test_rows_are_the_test():
    split = Split.of(task(20, test=6), None, 0)
    assert len(texts(split.choose)) == 20 and sorted(texts(split.test)) == [f"test {n}" for n in range(6)]
    assert split.own_test


@pytest.mark.parametrize("own", [None, 30])
def test_rows_bound_both_parts_and_a_smaller_bound_is_a_beginning(own):
    large, small = Split.of(task(40, own), 18, 3), Split.of(task(40, own), 6, 3)
    assert len(texts(large.choose)) == len(texts(large.test)) == 18
    assert texts(small.choose) == texts(large.choose)[:6] and texts(small.test) == texts(large.test)[:6]
    assert texts(Split.of(task(40, own), 18, 4).choose) != texts(large.choose)
    assert list(labels(small.choose)) == [int(text.split()[1]) for text in texts(small.choose)]


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="task 't' has 3 validation rows: a choice needs at least 4"):
        Split.of(task(3), None, 0)


def test_a_fingerprint_is_of_texts_labels_and_their_order():
    rows = task(5).validation
    assert fingerprint(rows) == fingerprint(task(5).validation) != fingerprint(rows.select([1, 0, 2, 3, 4]))
    assert fingerprint(rows) != fingerprint(rows.remove_columns("label").add_column("label", [9, 1, 2, 3, 4]))
