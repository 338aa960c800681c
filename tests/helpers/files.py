"""Small input files."""

import json

import yaml


def task_folder(tmp_path, *lines):
    for split in ("train", "validation"):
        (tmp_path / "suite/t").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"suite/t/{split}.jsonl").write_bytes(b"\n".join([json.dumps(GOOD).encode(), *lines]) + b"\n")
    return f"jsonl:{tmp_path}/suite"


def write(folder, **changes):
    content = SMALL | {"features": str(folder / "features")} | changes
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


GOOD = {"sentence1": "one", "sentence2": None, "label": 1}
SMALL = {
    "model": "packaged",
    "suite": "packaged",
    "tasks": ["tweets", "sms_spam", "questions"],
    "lora": {"target_modules": ["query", "value"]},
    "training": {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "logging_steps": 1},
    "max_length": 16,
    "train_rows": 16,
    "validation_rows": 8,
    "num_samples": 6,
}
