"""Pushing to and loading from a Hub on loopback, through the real client in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

from osrm_peft import TaskFeatures, merge_checkpoints, push_to_hub
from osrm_peft.features.collect import collect_features
from tests.helpers.hub import Hub
from tests.helpers.models import make_base, make_batch
from tests.helpers.pushing import card_of, run

ROUND_TRIP = """
found = {}
for task in ("t1", "t2"):
    push_to_hub(root / task, f"someone/{task}")
merged = merge_adapters({"t1": "someone/t1", "t2": "someone/t2@main"}, "lore", max_iterations=30)
found["inputs"] = [one["source"] for one in merged.manifest["inputs"].values()]
found["address"] = merged.push_to_hub("someone/merged")
pulled = {task: load_adapter("someone/merged", task=task) for task in ("t1", "t2")}
found["equal"] = [same(pulled[task], merged.for_task(task)) for task in pulled]
first = load_adapter("someone/merged").source
found["source"] = first
half = merged.at_scale(0.5)
half.push_to_hub("someone/merged", commit_message="half")
found["new"] = same(load_adapter("someone/merged"), half.for_task(None))
found["old"] = same(load_adapter(first), merged.for_task(None))
for branch in ("half", "third"):
    half.push_to_hub("someone/merged", revision=branch)
found["pr"] = merged.push_to_hub("someone/merged", create_pr=True)
alone = merge_adapters({"t1": "someone/t1"}, "average")
for branch in (None, "third"):  # of one task: the other's head goes, there
    alone.push_to_hub("someone/merged", revision=branch)
emr = merge_adapters({"t1": "someone/t1", "t2": "someone/t2"}, "emr")
emr.push_to_hub("someone/emr")
back = EMRAdapter.from_pretrained("someone/emr")
found["emr"] = all(torch.equal(a, b) for a, b in zip(emr.deltas("t2").values(), back.deltas("t2").values()))
for task in ("t1", "t2"):
    push_to_hub(root / f"{task}.features.safetensors", "someone/features")
loaded = TaskFeatures.load("someone/features:t2.features.safetensors")
found["features"] = [loaded.task, loaded.num_samples]
loaded.push_to_hub("someone/again")
push_to_hub(root / "t1.features.safetensors", "someone/features", revision="draft")
loaded.num_samples = 77
loaded.push_to_hub("someone/features")  # anew: it replaces what was told of the old one
push_to_hub(root / "t1.features.safetensors", "someone/features", revision="draft")  # where the old one is
from osrm_peft.evaluation.spectra import spectra
found["spectra"] = len(spectra({"t1": "someone/t1", "t2": "someone/t2@main"})["t2"])
rule = LeastSquares({"t1": "someone/features:t1.features.safetensors"})
merge_adapters({"t1": "someone/t1"}, "task_arithmetic", scale=rule).save_pretrained("guided")
merged = merge_adapters({"t1": "someone/t1"}, "fisher",
                        statistics={"t1": "someone/fisher:t1.fisher.safetensors"})
found["fisher"] = merged.manifest["statistics"]["t1"]
merged = merge_adapters({"t1": "someone/t1"}, "fisher", statistics={"t1": "someone/fisher1"})
found["fisher1"] = merged.manifest["statistics"]["t1"]
found["kept"] = json.loads(Path("guided/osrm_peft.json").read_text())["features"]
"""


@pytest.fixture(scope="module")
def found(hub, root, tmp_path_factory):
    hub.seed("someone/fisher", root / "fisher")
    alone = tmp_path_factory.mktemp("fisher1")
    (alone / "t1.fisher.safetensors").write_bytes((root / "fisher/t1.fisher.safetensors").read_bytes())
    hub.seed("someone/fisher1", alone)
    return run(hub, root, tmp_path_factory.mktemp("home"), ROUND_TRIP)


def test_what_was_pushed_is_what_is_pulled(found, hub):
    assert found["equal"] == [True, True] and found["new"] and found["old"] and found["emr"]
    assert all(repo.private for name, repo in hub.repos.items() if not name.startswith("someone/fisher"))
    assert found["address"].startswith(f"{hub.url}/someone/merged/commit/")
    assert found["features"] == ["t2", 4] and found["spectra"] == 4


def test_inputs_from_the_hub_are_recorded_with_their_commit(found, hub):
    heads = [next(iter(reversed(hub.repos[f"someone/{task}"].commits))) for task in ("t1", "t2")]
    assert found["inputs"] == [f"someone/t1@{heads[0]}", f"someone/t2@{heads[1]}"]
    assert found["source"].startswith("someone/merged@") and len(found["source"]) == len("someone/merged@") + 40
    fisher, fisher1 = (hub.repos[f"someone/{name}"].heads["main"].oid for name in ("fisher", "fisher1"))
    assert found["fisher"] == f"someone/fisher@{fisher}:t1.fisher.safetensors"
    assert found["fisher1"] == f"someone/fisher1@{fisher1}"
    features = hub.repos["someone/features"].heads["main"].oid
    assert found["kept"] == {"t1": f"someone/features@{features}:t1.features.safetensors"}


def test_branches_and_pull_requests(found, hub):
    repo = hub.repos["someone/merged"]
    assert set(repo.heads) == {"main", "half", "third", "refs/pr/1"} and found["pr"] == f"{repo.url}/discussions/1"
    scales = {
        branch: json.loads(hub.files("someone/merged", branch)["osrm_peft.json"])["scale"] for branch in repo.heads
    }
    assert scales == {"main": 1.0, "half": 0.5, "third": 1.0, "refs/pr/1": 1.0}


def test_a_push_replaces_what_was_there(found, hub):
    weights = {"adapter_config.json", "adapter_model.safetensors", "osrm_peft.json", "README.md", ".gitattributes"}
    for branch in ("main", "third"):
        assert set(hub.files("someone/merged", branch)) == weights | {"heads/t1.safetensors"}
    assert set(hub.files("someone/merged", "half")) == weights | {"heads/t1.safetensors", "heads/t2.safetensors"}
    both = {"t1.features.safetensors", "t2.features.safetensors", "osrm_peft.json", "README.md", ".gitattributes"}
    assert set(hub.files("someone/features")) == both
    for branch, k in (("main", 77), ("draft", 4)):
        told = json.loads(hub.files("someone/features", branch)["osrm_peft.json"])["files"]
        assert {name: one["k"] for name, one in told.items()} == {
            "t1.features.safetensors": 4,
            "t2.features.safetensors": k,
        }


def test_no_local_folder_and_no_token_reaches_the_hub(found, hub, root):
    for repo in hub.repos.values():
        for commit in repo.commits.values():
            for name, file in commit.files.items():
                assert b"secret_home" not in file.content and hub.token.encode() not in file.content, name
    assert json.loads(hub.files("someone/t1")["adapter_config.json"])["base_model_name_or_path"] == "base"
    assert json.loads(hub.files("someone/emr")["osrm_peft.json"])["base_model"] == "base"


def test_every_card_is_one_that_the_hub_reads(found, hub):
    """The real Hub would also check these fields; loopback has no such check, so they are compared one by one."""
    for repo, library, tags in (
        ("someone/t1", "peft", ["osrm_peft", "lora"]),
        ("someone/merged", "peft", ["osrm_peft", "lora", "merge", "average"]),
        ("someone/emr", "osrm_peft", ["osrm_peft", "lora", "merge", "emr"]),
        ("someone/features", "osrm_peft", ["osrm_peft", "features"]),
    ):
        card = card_of(hub, repo)
        assert card.data.library_name == library and card.data.tags == tags
        assert card.data.get("base_model") is None  # it has no name on the Hub
        assert repo in card.text and "USER/NAME" not in card.text
    assert card_of(hub, "someone/t1").data.pipeline_tag == "text-classification"


def test_the_command_pushes_and_reads(root, tmp_path, hub, found):
    environment = os.environ | hub.environment(tmp_path)
    command = [sys.executable, "-m", "osrm_peft"]
    merge = [*command, "merge", "t1=someone/t1", "t2=someone/t2", "--rank", "serving", "--out", tmp_path / "merged"]
    for step in (merge, [*command, "push", tmp_path / "merged", "someone/cli", "--public", "--message", "mine"]):
        done = subprocess.run(list(map(str, step)), env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "someone/cli/commit/" in done.stdout and hub.token not in done.stdout + done.stderr
    manifest = json.loads(hub.files("someone/cli")["osrm_peft.json"])
    assert manifest["rank"] == "serving" and manifest["written_rank"] == 8 and manifest["serving"] == {"8": 1.0}
    assert manifest["command"] == "osrm-peft merge t1=someone/t1 t2=someone/t2 --rank serving --out merged"
    assert not hub.repos["someone/cli"].private
    assert next(reversed(hub.repos["someone/cli"].commits.values())).title == "mine"


def test_a_model_merged_from_the_hub_names_its_parents(hub, root, tmp_path):
    for seed in (1, 2):
        make_base(seed=seed).save_pretrained(tmp_path / f"m{seed}")
        hub.seed(f"someone/m{seed}", tmp_path / f"m{seed}")
    script = """
found = {"push": None}
from osrm_peft import merge_checkpoints
merge_checkpoints({"a": "someone/m1", "b": "someone/m2@main"}, root / "model_out", "average")
from osrm_peft.models.loading import load_base
load_base("someone/m1@main", 3)
found["push"] = push_to_hub(root / "model_out", "someone/model")
"""
    run(hub, root, tmp_path / "home", script)
    card = card_of(hub, "someone/model")
    assert card.data.base_model == ["someone/m1", "someone/m2"] and card.data.base_model_relation == "merge"
    assert card.data.library_name == "transformers"
    assert {"config.json", "model.safetensors"} <= set(hub.files("someone/model"))
    assert b"secret_home" not in hub.files("someone/model")["osrm_peft.json"]


def test_configurations_of_a_model_tell_no_folder(root, tmp_path):
    make_base().save_pretrained(tmp_path / "model")
    merge_checkpoints({"a": tmp_path / "model"}, tmp_path / "out", "average")
    config = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "out/config.json").write_text(json.dumps(config | {"_name_or_path": "/secret_home/base", "x": "/"}))
    with Hub() as hub:
        run(hub, tmp_path, tmp_path / "home", "found = push_to_hub(root / 'out', 'someone/model')")
        pushed = json.loads(hub.files("someone/model")["config.json"])
    assert pushed == config | {"_name_or_path": "base", "x": "/"}


def test_a_model_for_each_task_is_pushed_whole(tmp_path):
    for seed in (0, 1, 2):
        make_base(seed=seed).save_pretrained(tmp_path / f"m{seed}")
    config = json.loads((tmp_path / "m0/config.json").read_text()) | {"_name_or_path": "/secret_home/base"}
    (tmp_path / "m0/config.json").write_text(json.dumps(config))
    models = {name: tmp_path / f"m{name}" for name in "12"}
    merge_checkpoints(models, tmp_path / "out", "emr", base=tmp_path / "m0")
    with Hub() as hub:
        run(hub, tmp_path, tmp_path / "home", "found = push_to_hub(root / 'out', 'someone/emr')")
        pushed = hub.files("someone/emr")
    assert {f"{name}/{file}" for name in "12" for file in ("config.json", "model.safetensors")} < set(pushed)
    assert all(b"secret_home" not in content for content in pushed.values())
    (tmp_path / "out/osrm_peft.json").write_text(json.dumps({"kind": "checkpoint", "method": "emr", "files": []}))
    with pytest.raises(ValueError, match=r"osrm_peft.json names no files: write the model again"):
        push_to_hub(tmp_path / "out", "someone/emr")


def test_features_files_do_not_tell_where_the_model_lies(root):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(root / "base")
    features = collect_features(model, [make_batch()], task="t", target_modules=["query"], progress=False)
    features.save(root / "local.features.safetensors")
    assert features.base_model == "base"
    assert b"secret_home" not in (root / "local.features.safetensors").read_bytes()
    assert TaskFeatures.load(root / "local.features.safetensors").base_model == "base"
