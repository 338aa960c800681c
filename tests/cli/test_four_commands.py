"""A new user with three CSV files: the four commands of the README, each in a process of its own."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.hub import Hub
from tests.helpers.suites import csv_tasks, tiny_model

README = Path(__file__).parents[2] / "README.md"
SERVE = """
import sys
from peft import PeftModel
from transformers import AutoModel, AutoTokenizer, pipeline
from osrm_peft import load_adapter
base, repo = sys.argv[1:]
shared = PeftModel.from_pretrained(AutoModel.from_pretrained(base), repo)  # stock PEFT: the merged layers
assert any("lora_A" in name and bool(one.any()) for name, one in shared.named_parameters())
model = load_adapter(repo, task="sizes").attach(base).merge_and_unload()
answer = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(base))("w1 w2 w3")
print(answer[0]["label"])
"""


def the_four_commands():
    """The README's lines between `init` and `push`."""
    block = next(
        text for text in re.findall(r"```bash\n(.*?)```", README.read_text(), re.S) if "osrm-peft init" in text
    )
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    return [words[1:] for words in lines if words and words[0] == "osrm-peft"]


@pytest.fixture(scope="module")
def hub():
    with Hub() as running:
        yield running


def test_from_three_files_to_a_served_adapter_and_a_report(tmp_path, hub):
    commands = the_four_commands()
    assert [words[0] for words in commands] == ["init", "check", "run", "push"]
    csv_tasks(tmp_path / "data", rows=200)
    tiny_model(tmp_path / "model")
    environment = os.environ | hub.environment(tmp_path / "home") | {"COLUMNS": "200"}

    def run(*words):
        done = subprocess.run(list(map(str, words)), cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done

    for words in commands:
        more = ["--base-model", "model"] if words[0] == "init" else []
        done = run(sys.executable, "-m", "osrm_peft", *words, *more)
        if words[0] == "init":  # as its comment says, fewer epochs may do
            recipe = tmp_path / "recipe.yaml"
            recipe.write_text(recipe.read_text().replace("num_train_epochs: 6", "num_train_epochs: 1"))
        for noise in ("LOAD REPORT", "MISSING", "FutureWarning", "Traceback"):
            assert noise not in done.stdout + done.stderr, words
    answer = json.loads((tmp_path / "results/selection/selection.json").read_text())
    page = (tmp_path / "results/report.html").read_text()
    assert answer["ranked"][0]["name"] in page and "http://" not in page.replace("http://www.w3.org", "")
    repo = commands[-1][2]
    assert "adapter_model.safetensors" in hub.files(repo)
    served = run(sys.executable, "-c", SERVE, tmp_path / "model", repo)
    assert served.stdout.strip().splitlines()[-1] in ("sizes-even", "sizes-odd")
    assert str(tmp_path) not in hub.files(repo)["osrm_peft.json"].decode()
