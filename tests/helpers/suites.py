"""A tiny model with a tokenizer, and tasks that it can learn, as CSV files."""

import csv

import yaml
from transformers import BertTokenizerFast

from tests.helpers.models import make_base

WORDS = [f"w{n}" for n in range(45)]


def tiny_model(folder):
    """A folder with a tiny model and its tokenizer, whose words are w0 … w44."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "words.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    make_base(2).save_pretrained(folder)
    BertTokenizerFast(str(vocabulary), model_max_length=32).save_pretrained(folder)
    return folder


def csv_tasks(folder, rows=80, tasks=("colours", "shapes", "sizes")):
    """`<task>.csv` with the columns `text` and `label` (texts as classes), 2 classes a task."""
    folder.mkdir(parents=True, exist_ok=True)
    for place, task in enumerate(tasks):
        with (folder / f"{task}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for n in range(rows):
                words = f"w{n % 45} w{(n * 7 + place) % 45} w{(n * n + place) % 45} w{n // 45 + 40}"
                writer.writerow([words, f"{task}-{'even' if (n + place) % 2 else 'odd'}"])
    return folder


def tiny_recipe(folder, **changes):
    """A recipe that runs in seconds, beside its model and data; written to `recipe.yaml`."""
    tiny_model(folder / "model")
    tasks = sorted(path.stem for path in csv_tasks(folder / "data").glob("*.csv"))
    content = {
        "model": "model",
        "tasks": {task: {"train": f"data/{task}.csv", "text": "text", "label": "label"} for task in tasks},
        "lora": {"r": 2, "target_modules": ["query", "value"]},
        "osrm": {},
        "num_samples": 6,
        "training": {"max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-2},
        "max_length": 8,
        "statistics_rows": 8,
        "select": {"rows": 16, "candidates": [{"method": "regmean"}, {"method": "tsv", "scale": [0.5, 1.0]}]},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return folder / "recipe.yaml"
