"""The commands of the guide to language models, each in a process of its own, with a tiny model."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from glob import glob
from pathlib import Path

import pytest

from osrm_peft import load_task
from osrm_peft.io.yaml import parse_yaml
from tests.helpers.causal import save_tiny
from tests.helpers.hub import Hub

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs/guides/language_models.md"
STOCK = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, repo = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), repo)
tokens = AutoTokenizer.from_pretrained(base)("is it good", return_tensors="pt")
with model.disable_adapter():
    before = model(**tokens).logits
assert not torch.equal(before, model(**tokens).logits)
print("served")
"""


@pytest.fixture(scope="module")
def hub():
    with Hub() as running:
        yield running


def test_from_rows_to_a_merge_on_the_hub(tmp_path, hub):
    block = next(text for text in re.findall(r"```bash\n(.*?)```", GUIDE.read_text(), re.S) if "train_sft" in text)
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert [words[1] for words in commands] == [
        "recipes/smollm2.py", "features", "launch", "select", "evaluate", "evaluate", "push"
    ]  # fmt: skip
    data = load_task("packaged-text", "questions"), load_task("packaged-text", "tweets")
    known = Counter(word for task in data for row in task.train for word in (row["prompt"] + row["completion"]).split())
    save_tiny(tmp_path / "results/models/smollm2-135m", words=[word for word, _ in known.most_common(60)])
    recipe = parse_yaml((ROOT / "recipes/configs/smollm2_text.yaml").read_text())
    recipe |= {"tasks": ["questions", "tweets"], "train_rows": 24, "validation_rows": 24, "num_samples": 8}
    recipe["training"] |= {"max_steps": 2, "use_cpu": True}
    (tmp_path / "recipes/configs").mkdir(parents=True)
    (tmp_path / "recipes/configs/smollm2_text.yaml").write_text(json.dumps(recipe))
    for name in ("train_sft.py", "train_adapter.py"):
        shutil.copy(ROOT / "recipes" / name, tmp_path / "recipes")
    environment = os.environ | hub.environment(tmp_path / "home") | {"COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    programs = {"osrm-peft": ["-m", "osrm_peft"], "accelerate": ["-m", "accelerate.commands.accelerate_cli"]}

    def run(*words):
        done = subprocess.run(
            [sys.executable, *map(str, words)], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    for name, *words in commands[1:]:
        found = [
            str(path) for word in words for path in (sorted(glob(word, root_dir=tmp_path)) if "*" in word else [word])
        ]
        if name == "accelerate":
            found[1:1] = ["--config_file", str(ROOT / "accelerate_configs/single.yaml")]
        run(*programs[name], *found)
    out = tmp_path / "results/smollm2_text"
    assert {path.name for path in (out / "adapters").iterdir()} == {"questions", "tweets"}
    provenance = json.loads((out / "adapters/tweets/osrm_peft.json").read_text())
    assert provenance["task_type"] == "CAUSAL_LM" and provenance["label_names"] == ["negative", "neutral", "positive"]
    written = json.loads((out / "written.json").read_text())["tasks"]["tweets"]
    assert written["metric"] == "exact_match" and written["generation"] == {"do_sample": False, "max_new_tokens": 3}
    winner = json.loads((out / "selection/winner/osrm_peft.json").read_text())
    assert {score["task"] for score in winner["scores"]} == {"questions", "tweets"}
    repo = commands[-1][-1]
    assert run("-c", STOCK, out.parent / "models/smollm2-135m", repo).strip().endswith("served")
