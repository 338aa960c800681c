"""The GLUE suite through the real `datasets` and `huggingface_hub` clients, from a Hub server on loopback."""

import json
import os
import subprocess
import sys

from datasets import Dataset

from osrm_peft import list_tasks
from tests.helpers.hub import Hub

# GLUE's own columns, labels and split names on the Hub
COLUMNS = {
    "cola": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
    "stsb": ("sentence1", "sentence2"),
}
METRICS = {name: "accuracy" for name in COLUMNS} | {"cola": "matthews", "stsb": "pearson_spearman"}
CLASSES = {name: 2 for name in COLUMNS} | {"mnli": 3, "stsb": 1}

SCRIPT = """
import json
from osrm_peft import list_tasks, load_task
found = {}
for name in list_tasks("glue"):
    task = load_task("glue", name)
    found[name] = [task.num_labels, task.metric, task.train[0], task.validation[0]]
print(json.dumps(found))
"""


def write_glue(folder):
    configs = []
    for name, columns in COLUMNS.items():
        matched = "_matched" if name == "mnli" else ""
        for split in ("train", f"validation{matched}", f"test{matched}"):
            label = [1.5, 4.0] if name == "stsb" else [1, 0]
            rows = {column: [f"{name} {column} {split}", "b"] for column in columns} | {"label": label, "idx": [0, 1]}
            (folder / name).mkdir(parents=True, exist_ok=True)
            Dataset.from_dict(rows).to_parquet(folder / name / f"{split}-00000-of-00001.parquet")
        files = "".join(f"\n  - split: {s}\n    path: {name}/{s}-*" for s in ("train", f"validation{matched}"))
        configs.append(f"- config_name: {name}\n  data_files:{files}")
    (folder / "README.md").write_text("---\nconfigs:\n" + "\n".join(configs) + "\n---\n")


def test_the_paper_s_eight_tasks_come_from_the_hub_with_its_metrics(tmp_path):
    write_glue(tmp_path / "glue")
    with Hub() as hub:
        hub.seed("nyu-mll/glue", tmp_path / "glue", kind="dataset")
        environment = os.environ | hub.environment(tmp_path / "home")
        done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == list_tasks("glue") == list(COLUMNS)
    for name, (num_labels, metric, train, validation) in found.items():
        assert (num_labels, metric) == (CLASSES[name], METRICS[name])
        texts = [f"{name} {column} train" for column in COLUMNS[name]] + [None]
        assert [train["sentence1"], train["sentence2"]] == texts[:2]
        assert train["label"] == (1.5 if name == "stsb" else 1)
        assert validation["sentence1"].endswith("validation_matched" if name == "mnli" else "validation")
