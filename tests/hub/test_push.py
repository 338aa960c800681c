"""Pushing to and loading from a Hub on loopback, through the real client in a process of its own."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from osrm_peft import (
    LoraAdapter,
    TaskFeatures,
    load_adapter,
    merge_adapters,
    merge_checkpoints,
    push_to_hub,
)
from osrm_peft.adapters.factors import Factors
from osrm_peft.features.collect import collect_features
from osrm_peft.features.fisher import collect_fisher
from osrm_peft.merging.lowrank import Compressed, least_energy
from osrm_peft.merging.plan import plan_merge
from osrm_peft.models.packaged import packaged_model
from tests.helpers.adapters import make_adapter
from tests.helpers.hub import Hub
from tests.helpers.models import make_base, make_batch

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


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two adapters of a base model in a local folder, and their tasks' features."""
    root = tmp_path_factory.mktemp("secret_home")
    make_base().save_pretrained(root / "base")
    for seed, task in enumerate(("t1", "t2"), 1):
        make_adapter(root / task, seed=seed)
        config = json.loads((root / task / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(root / "base")  # as PEFT writes it of a model from a folder
        (root / task / "adapter_config.json").write_text(json.dumps(config))
        features = collect_features(
            make_base(), [make_batch(seed=seed)], task=task, target_modules=["query", "value"], progress=False
        )
        features.save(root / f"{task}.features.safetensors")
        model = load_adapter(root / task).attach(make_base())
        fisher = collect_fisher(model, [make_batch(seed=seed)], task=task, progress=False)
        fisher.save(root / f"fisher/{task}.fisher.safetensors")
    return root


def run(hub, root, home, script, **environment):
    command = [sys.executable, "-c", START + script + "\nprint(json.dumps(found))", str(root)]
    environment = os.environ | hub.environment(home) | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"} | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert hub.token not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


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
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def found(hub, root, tmp_path_factory):
    hub.seed("someone/fisher", root / "fisher")
    alone = tmp_path_factory.mktemp("fisher1")
    (alone / "t1.fisher.safetensors").write_bytes((root / "fisher/t1.fisher.safetensors").read_bytes())
    hub.seed("someone/fisher1", alone)
    return run(hub, root, tmp_path_factory.mktemp("home"), ROUND_TRIP)


def card_of(hub, repo, revision="main"):
    return ModelCard(hub.files(repo, revision)["README.md"].decode())


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


# Loads elsewhere


def test_stock_peft_alone_loads_a_merged_adapter(root, tmp_path):
    """In a process that finds what the registry installed, and not this package."""
    merged = merge_adapters({"t1": root / "t1", "t2": root / "t2"}, "ties")
    merged.save_pretrained(tmp_path / "merged")
    batch, model = make_batch(), merged.load(make_base())
    save_file(
        {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}, tmp_path / "batch.safetensors"
    )
    script = """
import sys
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
try:
    import osrm_peft
    raise SystemExit("osrm_peft is there")
except ModuleNotFoundError:
    pass
base = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
model = PeftModel.from_pretrained(base, sys.argv[2] + "/merged")
batch = load_file(sys.argv[2] + "/batch.safetensors")
save_file({"logits": model(**batch).logits.detach()}, sys.argv[2] + "/logits.safetensors")
"""
    site = next(path for path in sys.path if path.endswith("site-packages"))
    command = [sys.executable, "-S", "-c", f"import sys; sys.path.append({site!r})\n{script}", root / "base", tmp_path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model(**batch).logits
    torch.testing.assert_close(load_file(tmp_path / "logits.safetensors")["logits"], expected, rtol=0, atol=1e-6)


def test_adapters_of_the_serving_rank_are_swapped_under_a_running_model(root, tmp_path):
    from peft import PeftModel
    from peft.utils.hotswap import hotswap_adapter

    adapters = {"t1": root / "t1", "t2": root / "t2"}
    for name, given in (("one", {"t1": root / "t1"}), ("both", adapters)):
        merged = merge_adapters(given, "task_arithmetic", scale=1.0, rank="serving", heads="per_task")
        merged.save_pretrained(tmp_path / name)
    shapes = [
        {k: v.shape for k, v in load_file(tmp_path / name / "adapter_model.safetensors").items()}
        for name in ("one", "both")
    ]
    assert shapes[0] == shapes[1] and {shape[0] for key, shape in shapes[0].items() if "lora_A" in key} == {8}
    batch = make_batch()
    model = PeftModel.from_pretrained(make_base(), tmp_path / "one").eval()
    with torch.no_grad():
        before = model(**batch).logits
        hotswap_adapter(model, str(tmp_path / "both"), adapter_name="default", torch_device="cpu")
        after = model(**batch).logits
        expected = load_adapter(tmp_path / "both").attach(make_base())(**batch).logits
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-6)
    assert (after - before).abs().max() > 1e-4


def test_the_serving_rank_is_the_least_that_holds_the_result(root, tmp_path):
    adapters = {}
    for seed, rank in enumerate((2, 3, 6), 1):
        make_adapter(tmp_path / f"r{seed}", seed=seed, r=rank)
        adapters[f"r{seed}"] = tmp_path / f"r{seed}"
    exact = merge_adapters(adapters, "task_arithmetic")
    served = merge_adapters(adapters, "task_arithmetic", rank="serving")
    served.save_pretrained(tmp_path / "served")
    manifest = json.loads((tmp_path / "served/osrm_peft.json").read_text())
    assert manifest["written_rank"] == 16 and list(manifest["serving"]) == ["8", "16"]  # 2 + 3 + 6 = 11
    for name, delta in load_adapter(tmp_path / "served").factors.items():
        torch.testing.assert_close(delta.delta().double(), exact.deltas()[name], rtol=0, atol=1e-6)
    exact.save_pretrained(tmp_path / "exact")
    assert "serving" not in json.loads((tmp_path / "exact/osrm_peft.json").read_text())
    cut = merge_adapters(adapters, "task_arithmetic", rank=8)
    assert manifest["serving"]["8"] == pytest.approx(min(cut.energy_kept().values()), rel=1e-6)
    assert manifest["serving"]["16"] == 1.0
    with pytest.raises(ValueError, match=r"rank='eight' must be a whole number"):
        merge_adapters(adapters, "ties", rank="eight")
    with pytest.raises(ValueError, match=r"emr gives a shared vector and masks"):
        merge_adapters(adapters, "emr", rank="serving")


def test_what_does_not_fit_into_the_largest_serving_rank_is_cut_to_it():
    config = {"base_model_name_or_path": "base", "target_modules": ["q"]}
    factors = Factors(torch.ones(2, 600), torch.ones(600, 2))
    adapters = {task: LoraAdapter({"q": factors}, {}, config) for task in "ab"}
    plan = plan_merge(adapters, "ties", rank="serving")  # of dense matrices: any rank up to 600
    assert (plan.padded, plan.rank) == (512, 512)
    plan = plan_merge(adapters, "task_arithmetic", rank="serving")
    assert (plan.padded, plan.rank) == (8, None) and plan.output_bytes() == 4 * 8 * 1200


def test_the_least_energy_is_of_the_worst_layer_and_counts_what_was_cut():
    one = Compressed(Factors(torch.eye(2, 3), torch.diag(torch.tensor([3.0, 1.0]))), 1.0)  # 9 and 1 of 10
    other = Compressed(Factors(torch.eye(2, 3), torch.diag(torch.tensor([4.0, 3.0]))), 0.5)  # 16 and 9 of 25
    nothing = Compressed(Factors(torch.zeros(2, 3), torch.zeros(2, 2)), 1.0)
    assert least_energy([one, other, nothing], [1, 2]) == pytest.approx({1: 0.5 * 16 / 25, 2: 0.5})
    assert least_energy([one, nothing], [1]) == pytest.approx({1: 0.9})
    assert least_energy([nothing], [1]) == {1: 1.0}


def test_attaching_an_adapter_warns_of_nothing(root):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*base_model_name_or_path.*")
        load_adapter(root / "t1").attach(make_base())


def test_features_files_do_not_tell_where_the_model_lies(root):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(root / "base")
    features = collect_features(model, [make_batch()], task="t", target_modules=["query"], progress=False)
    features.save(root / "local.features.safetensors")
    assert features.base_model == "base"
    assert b"secret_home" not in (root / "local.features.safetensors").read_bytes()
    assert TaskFeatures.load(root / "local.features.safetensors").base_model == "base"


# The Trainer's own pushes


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
paper = {"null_space": "random", "protect_energy": None, "statistic": "token"}
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
