"""Scripts that push to and pull from a Hub on loopback, in a process of their own, and the cards that they push."""

import json
import os
import subprocess
import sys

from huggingface_hub import ModelCard

START = """
import json, sys, time
from pathlib import Path
import torch
import osrm_peft
from osrm_peft import EMRAdapter, LeastSquares, TaskFeatures, load_adapter, merge_adapters, push_to_hub
root = Path(sys.argv[1])
slept = []
time.sleep = slept.append  # the client waits between its tries

def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

def refused(function, *arguments, **named):
    try:
        function(*arguments, **named)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
"""


def run(hub, root, home, script, **environment):
    command = [sys.executable, "-c", START + script + "\nprint(json.dumps(found))", str(root)]
    environment = os.environ | hub.environment(home) | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"} | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert hub.token not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def card_of(hub, repo, revision="main"):
    return ModelCard(hub.files(repo, revision)["README.md"].decode())
