"""What the Trainer pushes itself, and a merge of trained adapters pushed, pulled and scored."""

import json
import os
import subprocess
import sys

from huggingface_hub import ModelCard

from osrm_peft.models.packaged import packaged_model
from tests.helpers.hub import Hub
from tests.helpers.pushing import card_of, run

TRAINER = """
import json, sys
from pathlib import Path
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments
from osrm_peft import OSRMCallback, OSRMLoraConfig
root = Path(sys.argv[1])
base = AutoModelForSequenceClassification.from_pretrained(root / "base")
files = [str(root / f"{task}.features.safetensors") for task in ("t1", "t2")]
paper = {"objective": "least_energy", "statistic": "token"}
config = OSRMLoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS", out_of_task=files, **paper)
rows = Dataset.from_dict({"input_ids": [[1, 2, 3, 4]] * 8, "attention_mask": [[1] * 4] * 8, "labels": [0, 1] * 4})
args = TrainingArguments("trained", max_steps=4, save_steps=2, eval_strategy="steps", eval_steps=2, push_to_hub=True,
                         hub_model_id="user/trained", hub_private_repo=True, hub_always_push=True, report_to="none",
                         use_cpu=True, disable_tqdm=True)
def measure(given):
    return {"accuracy": float((given.predictions.argmax(1) == given.label_ids).mean())}
trainer = Trainer(get_peft_model(base, config), args, train_dataset=rows, eval_dataset=rows, compute_metrics=measure,
                  callbacks=[OSRMCallback()])
trainer.train()
trainer.push_to_hub()
scores = [log for log in trainer.state.log_history if "eval_loss" in log]
found = {"first": scores[0]["eval_loss"], "last": scores[-1]["eval_loss"], "accuracy": scores[-1]["eval_accuracy"]}
"""


def test_the_trainer_s_own_push_has_our_card(root, tmp_path):
    with Hub() as hub:
        environment = os.environ | hub.environment(tmp_path / "home") | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        command = [sys.executable, "-c", TRAINER + "\nprint(json.dumps(found))", str(root)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        measured = json.loads(done.stdout.splitlines()[-1])
        assert measured["first"] != measured["last"]
        commits = [one for one in hub.repos["user/trained"].commits.values() if "README.md" in one.files]
        assert len(commits) >= 2  # while it trains, too
        for commit in commits:
            card = ModelCard(commit.files["README.md"].content.decode())
            assert card.data.library_name == "peft" and card.data.tags == ["osrm_peft", "lora", "osrm"]
            for name, file in commit.files.items():
                if name != "training_args.bin":  # the Trainer's own, pickled: it has the output folder
                    assert b"secret_home" not in file.content, name
        manifest = json.loads(commits[-1].files["osrm_peft.json"].content)
        assert manifest["osrm"]["initialized"] and manifest["repo_id"] == "user/trained"
        results = {one.metric_type: one.metric_value for one in card.data.eval_results}
        assert results == {"accuracy": measured["accuracy"], "loss": measured["last"]}
        assert "user/trained" in card.text


TRAIN = """
from osrm_peft import load_task, train_task
from peft import LoraConfig
for name in ("questions", "sms_spam"):
    lora = LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
    training = {"max_steps": 3, "learning_rate": 2e-3, "per_device_train_batch_size": 8, "disable_tqdm": True}
    train_task(load_task("packaged", name).sample(train=24), root / name, lora=lora, training=training, max_length=32)
merge_adapters({name: root / name for name in ("questions", "sms_spam")}, "average").save_pretrained(root / "merged")
found = {}
"""


def test_the_pulled_copy_scores_what_the_pushed_one_did(tmp_path):
    """On the packaged model and tasks, by the commands: evaluate, push, evaluate what the Hub has."""
    with Hub() as hub:
        run(hub, tmp_path, tmp_path / "home", TRAIN)
        environment = os.environ | hub.environment(tmp_path / "other_home")
        rows = ["--rows", "40", "--max-length", "32"]
        for words in (
            ["evaluate", tmp_path / "merged", *rows, "--save", "--out", tmp_path / "local.json"],
            ["push", tmp_path / "merged", "someone/scored"],
            ["evaluate", "someone/scored", *rows, "--out", tmp_path / "pulled.json"],
        ):
            command = [sys.executable, "-m", "osrm_peft", *map(str, words)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
        local, pulled = (json.loads((tmp_path / f"{name}.json").read_text())["scores"] for name in ("local", "pulled"))
        assert local == pulled and set(local) == {"questions", "sms_spam"}
        results = card_of(hub, "someone/scored").data.eval_results
        assert {one.dataset_name: one.metric_value for one in results} == local
        config = json.loads(hub.files("someone/scored")["adapter_config.json"])
        assert config["base_model_name_or_path"] == "packaged"
        trained = json.loads((tmp_path / "questions/adapter_config.json").read_text())
        assert trained["base_model_name_or_path"] == str(packaged_model())  # shortened only where it is pushed
