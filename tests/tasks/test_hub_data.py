"""Tasks from Hub datasets, through the real `datasets` client, from a Hub server on loopback."""

import json
import os
import subprocess
import sys

from datasets import ClassLabel, Dataset, Features, Value

from tests.helpers.hub import Hub

SCRIPT = """
import json, sys
from osrm_peft.tasks.files import TaskData, guess
found = {}
for name, fields in json.loads(sys.argv[1]).items():
    try:
        task = TaskData(**fields).load(name)
        rows = [len(part) if part else None for part in (task.train, task.validation, task.test)]
        found[name] = [rows, task.label_names, task.train[0], task.data]
    except ValueError as error:
        found[name] = str(error)
found["facts"] = guess("user/reviews:en").labels
print(json.dumps(found))
"""
CASES = {
    "splits": {"train": "user/reviews:en"},
    "named": {"train": "user/reviews:en", "validation": "test", "text": "review"},
    "test": {"train": "user/reviews:en", "test": "test"},
    "shares": {"train": "user/reviews:de"},
    "config": {"train": "user/reviews"},
    "split": {"train": "user/reviews:en", "test": "dev"},
    "twice": {"train": "user/reviews:en", "validation": "test", "test": "test"},
    "hidden": {"train": "user/reviews:en", "validation": "hidden"},
    "absent": {"train": "user/nothing"},
}


def write(folder):
    features = Features({"review": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    files: dict[str, list[str]] = {}
    for path, count in (("en/train", 12), ("en/validation", 4), ("en/test", 6), ("en/hidden", 4), ("de/train", 20)):
        rows = {"review": [f"{path} {n}" for n in range(count)], "label": [1 - n % 2 for n in range(count)]}
        rows["label"] = [-1] * count if path == "en/hidden" else rows["label"]
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(rows, features).to_parquet(folder / f"{path}-00000-of-00001.parquet")
        config, split = path.split("/")
        files.setdefault(config, []).append(f"\n  - split: {split}\n    path: {path}-*")
    configs = "\n".join(f"- config_name: {config}\n  data_files:{''.join(of)}" for config, of in files.items())
    names = "".join(f"\n          '{n}': {name}" for n, name in enumerate(("neg", "pos")))
    dtype = f"\n      class_label:\n        names:{names}"
    columns = f"\n  - name: review\n    dtype: string\n  - name: label\n    dtype:{dtype}"
    info = "".join(f"\n- config_name: {config}\n  features:{columns}" for config in files)
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}\ndataset_info:{info}\n---\n")


def test_hub_datasets_have_splits_configurations_and_classes(tmp_path):
    write(tmp_path / "reviews")
    with Hub() as hub:
        hub.seed("user/reviews", tmp_path / "reviews", kind="dataset")
        environment = os.environ | hub.environment(tmp_path / "home")
        command = [sys.executable, "-c", SCRIPT, json.dumps(CASES)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rows, names, first, data = found["splits"]
    assert (rows, names) == ([12, 4, None], ["neg", "pos"])
    assert first == {"sentence1": "en/train 0", "sentence2": None, "label": 1}
    assert data == {"train": "user/reviews:en", "text": "review", "label": "label", "metric": "accuracy"}
    assert found["named"][0] == [12, 6, None] and found["test"][0] == [12, 4, 6]
    assert sum(found["shares"][0]) == 20 and min(found["shares"][0]) >= 2
    assert found["facts"] == {"neg": 8, "pos": 8}
    assert "user/reviews is neither a file nor a Hub dataset that can be read: " in found["config"]
    assert "['en', 'de']" in found["config"]  # the configurations that there are
    assert found["split"] == "user/reviews:en has no split 'dev', only train, validation, test, hidden"
    assert found["twice"] == "user/reviews:en: the split 'test' is validation and test: name another"
    assert found["hidden"].startswith("user/reviews:en, split hidden, row 1: the label is missing")
    assert found["absent"].startswith("user/nothing is neither a file nor a Hub dataset that can be read: ")
    assert "Generating" not in done.stderr
