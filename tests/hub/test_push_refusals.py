"""Pushes that fail or are refused: the Hub as it was, and nothing of others pushed or lost."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from osrm_peft import merge_adapters, push_to_hub
from tests.helpers.adapters import make_adapter
from tests.helpers.hub import Hub
from tests.helpers.pushing import card_of, run

FAULTS = """
found = {}
merged = merge_adapters({"t1": root / "t1", "t2": root / "t2"}, "ties")
found["push"] = refused(merged.push_to_hub, "someone/faulty")
"""


WRONG_TOKEN = """
import os
os.environ["HF_TOKEN"] = "hf_wrong"
found["wrong"] = refused(merged.push_to_hub, "someone/faulty")
"""


@pytest.mark.parametrize(
    ("match", "how", "times", "fails"),
    [
        ("POST /api/models/someone/faulty/commit", 503, 1, "HfHubHTTPError"),
        ("PUT", "drop", 99, "Error"),
        ("PUT", 500, 99, "Error"),
        ("PUT", 503, 1, None),
    ],
)
def test_a_push_that_fails_changes_nothing_and_is_made_again(match, how, times, fails, root, tmp_path):
    with Hub() as hub:
        hub.fail(match, how, times)
        found = run(hub, root, tmp_path, FAULTS)["push"]
        if fails is not None:
            assert fails in found
            assert set(hub.files("someone/faulty")) == {".gitattributes"}
            hub.faults.clear()
            assert (
                "someone/faulty/commit"
                in run(hub, root, tmp_path, FAULTS.replace("refused(merged.push_to_hub, ", "merged.push_to_hub("))[
                    "push"
                ]
            )
        assert "heads/t2.safetensors" in hub.files("someone/faulty")


def test_without_a_token_nothing_is_made(root, tmp_path):
    with Hub() as hub:
        found = run(hub, root, tmp_path, FAULTS + WRONG_TOKEN, HF_TOKEN="")
        assert "401" in found["push"] and "Invalid username" in found["push"]
        assert "401" in found["wrong"] and "Invalid credentials" in found["wrong"]
        assert not hub.repos and "hf_wrong" not in str(found)


@pytest.mark.parametrize("names", ["../t1/adapter_model.safetensors", "/etc/hostname", "sub/../../x", "../../y"])
def test_a_manifest_cannot_name_files_outside_its_folder(names, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/osrm_peft.json").write_text(json.dumps({"kind": "checkpoint", "files": [names]}))
    with pytest.raises(ValueError, match=r"is no file in its folder, but leads out of it"):
        push_to_hub(tmp_path / "model", "someone/model")


def test_a_link_out_of_the_folder_is_not_pushed(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "private.txt").write_text("mine")
    (tmp_path / "model/config.json").symlink_to(tmp_path / "private.txt")
    (tmp_path / "model/osrm_peft.json").write_text(json.dumps({"kind": "checkpoint", "files": ["config.json"]}))
    with pytest.raises(ValueError, match=r"is no file in its folder, but leads out of it"):
        push_to_hub(tmp_path / "model", "someone/model")
    make_adapter(tmp_path / "adapter")
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    (tmp_path / "adapter/adapter_model.safetensors").symlink_to(tmp_path / "private.txt")
    with pytest.raises(ValueError, match=r"is no file in its folder, but leads out of it"):
        push_to_hub(tmp_path / "adapter", "someone/adapter")


@pytest.mark.parametrize(
    ("what", "repo", "arguments", "error", "message"),
    [
        ("t1", "no spaces", {}, ValueError, r"repo_id='no spaces' is no name of a repository, such as user/name"),
        ("t1", "u/n", {"create_pr": True, "revision": "x"}, ValueError, r"a pull request has a branch of its own"),
        ("none", "u/n", {}, FileNotFoundError, r"no folder or features file .*none"),
        ("base", "u/n", {}, ValueError, r"base is nothing that osrm_peft or PEFT wrote"),
        ("base/model.safetensors", "u/n", {}, ValueError, r"is no features file, or damaged"),
    ],
)
def test_bad_pushes_are_refused_before_the_hub_is_asked(what, repo, arguments, error, message, root):
    with pytest.raises(error, match=message):
        push_to_hub(root / what, repo, **arguments)


OTHERS = """
found = {}
push_to_hub(root / "t1", "someone/mixed")
found["kinds"] = refused(push_to_hub, root / "t1.features.safetensors", "someone/mixed")
push_to_hub(root / "t1", "someone/theirs")  # beside what is not ours
loaded = TaskFeatures.load(root / "t1.features.safetensors")
loaded.task = "../escaped"
found["task"] = refused(loaded.push_to_hub, "someone/none")
"""


def test_what_is_not_ours_stays(root, tmp_path):
    theirs = tmp_path / "theirs"
    for name in ("french/adapter_model.safetensors", "optimizer.safetensors", "heads/x.safetensors"):
        (theirs / name).parent.mkdir(parents=True, exist_ok=True)
        (theirs / name).write_bytes(b"theirs")
    with Hub() as hub:
        hub.seed("someone/theirs", theirs)
        found = run(hub, root, tmp_path / "home", OTHERS)
        kept = {"french/adapter_model.safetensors", "optimizer.safetensors", "heads/x.safetensors"}
        assert kept < set(hub.files("someone/theirs"))
        assert "someone/mixed holds adapter, this is features: name another repository" in found["kinds"]
        assert "the task name '../escaped' cannot be a file name" in found["task"] and "someone/none" not in hub.repos
        card = card_of(hub, "someone/mixed")
        assert "num_labels=3)" in card.text  # as wide as the head that the adapter has


def test_no_hub_is_one_error(root, tmp_path):
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "osrm_peft", "push", str(root / "t1"), "someone/t1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "error: the Hub cannot be reached" in done.stderr and "Traceback" not in done.stderr


def test_only_lora_is_pushed_as_lora(tmp_path):
    make_adapter(tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "IA3"}))
    with pytest.raises(ValueError, match=r"is a IA3 adapter: only LoRA adapters are pushed"):
        push_to_hub(tmp_path / "adapter", "someone/adapter")


def test_a_damaged_manifest_is_refused_before_the_hub_is_asked(root, tmp_path):
    merge_adapters({"t1": root / "t1"}, "average").save_pretrained(tmp_path / "out")
    manifest = json.loads((tmp_path / "out/osrm_peft.json").read_text())
    (tmp_path / "out/osrm_peft.json").write_text(json.dumps(manifest | {"inputs": [1, 2]}))
    with pytest.raises(ValueError, match=r"the manifest osrm_peft.json is damaged"):
        push_to_hub(tmp_path / "out", "someone/out")


@pytest.mark.parametrize("lost", ["adapter_model.safetensors", "emr.safetensors"])
def test_what_has_lost_its_weights_is_refused(lost, root, tmp_path):
    if lost == "emr.safetensors":
        merge_adapters({"t1": root / "t1"}, "emr").save_pretrained(tmp_path / "out")
    else:
        make_adapter(tmp_path / "out")
    (tmp_path / "out" / lost).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {lost}: write it again"):
        push_to_hub(tmp_path / "out", "someone/out")


def test_heads_of_an_emr_folder_cannot_lie_outside(root, tmp_path):
    from osrm_peft import EMRAdapter

    adapters = {"t1": root / "t1", "t2": root / "t2"}
    merge_adapters(adapters, "emr").save_pretrained(tmp_path / "emr")
    path = tmp_path / "emr/emr.safetensors"
    tensors = load_file(path)
    notes = {"tasks": ["../../t1", "t2"], "layouts": {}}
    save_file(tensors, path, {"format": "pt", "osrm_peft": json.dumps(notes)})
    with pytest.raises(ValueError, match=r"the task name '../../t1' cannot be a file name"):
        EMRAdapter.from_pretrained(tmp_path / "emr")
