"""Names of classes from the user's file to the answers of a pipeline: model, manifest, card, merge."""

import json
import re

import pytest
from peft import LoraConfig, PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel, pipeline

from osrm_peft import EMRAdapter, load_adapter, merge_adapters, project_adapter, train_task
from osrm_peft.hub.privacy import public
from osrm_peft.io.manifest import read_manifest
from osrm_peft.models.packaged import resolve_model
from osrm_peft.tasks.files import TaskData
from tests.helpers.models import TINY

LORA = LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
NAMES = {"mail": ("ham", "spam"), "reddit": ("*odd*", "/r/news", "it's"), "stars": None}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tiny model with a tokenizer, and three adapters trained on the user's files."""
    root = tmp_path_factory.mktemp("labels")
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("packaged"))
    tokenizer.save_pretrained(root / "base")
    BertModel(BertConfig(**TINY | {"vocab_size": len(tokenizer)})).save_pretrained(root / "base")
    for name, names in NAMES.items():
        rows = [
            json.dumps({"text": f"text {n}", "label": (names or (0, 1))[n % len(names or "ab")]}) for n in range(30)
        ]
        (root / f"{name}.jsonl").write_text("\n".join(rows))
        task = TaskData(str(root / f"{name}.jsonl")).load(name)
        training = {"max_steps": 1, "use_cpu": True, "per_device_train_batch_size": 4}
        train_task(task, root / name, lora=LORA, model=str(root / "base"), training=training, max_length=16)
    return root


def test_the_manifest_holds_names_and_data(root):
    manifest = read_manifest(root / "reddit")
    assert manifest["label_names"] == list(NAMES["reddit"])
    assert manifest["data"] == {
        "train": str(root / "reddit.jsonl"), "text": "text", "label": "label", "metric": "accuracy",
    }  # fmt: skip
    shown = public(manifest)
    assert shown["data"]["train"] == "reddit.jsonl" and shown["label_names"] == list(NAMES["reddit"])
    assert "label_names" not in read_manifest(root / "stars") and "data" in read_manifest(root / "stars")


def test_a_pipeline_answers_with_names(root):
    tokenizer = AutoTokenizer.from_pretrained(root / "base")
    model = load_adapter(root / "mail").attach(str(root / "base"))
    assert model.config.id2label == {0: "ham", 1: "spam"} and model.config.label2id == {"ham": 0, "spam": 1}
    answer = pipeline("text-classification", model=model.merge_and_unload(), tokenizer=tokenizer)("text", top_k=None)
    assert {one["label"] for one in answer} == {"ham", "spam"}
    plain = load_adapter(root / "stars").attach(str(root / "base"))
    assert plain.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}


def test_the_card_s_own_code_loads_a_model_with_names(root):
    card = (root / "reddit/README.md").read_text(encoding="utf-8")
    assert r"* labels: 0 \*odd\*, 1 /r/news, 2 it's" in card
    code = re.search(r"```python\n(from peft .*?)```", card, re.DOTALL)[1]
    assert """num_labels=3, id2label={0: '*odd*', 1: '/r/news', 2: "it's"})""" in code
    code = code.replace("'base'", repr(str(root / "base"))).replace("'USER/NAME'", repr(str(root / "reddit")))
    names: dict = {"AutoModelForSequenceClassification": AutoModelForSequenceClassification}
    exec(code, names)
    assert isinstance(names["model"], PeftModel)
    assert names["base"].config.id2label == dict(enumerate(NAMES["reddit"]))


@pytest.mark.parametrize("method", ["average", "emr"])
def test_a_merge_keeps_each_task_s_names(root, tmp_path, method):
    merged = merge_adapters({name: root / name for name in NAMES}, method)
    merged.save_pretrained(tmp_path / "out")
    kept = {name: list(names) for name, names in NAMES.items() if names}
    assert read_manifest(tmp_path / "out")["label_names"] == kept
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert "* labels of mail: 0 ham, 1 spam\n" in card and "labels of stars" not in card
    again = EMRAdapter.from_pretrained(tmp_path / "out") if method == "emr" else merged
    for task, names in NAMES.items():
        expected = dict(enumerate(names or ("LABEL_0", "LABEL_1")))
        assert again.load(str(root / "base"), task).config.id2label == expected
        if method != "emr":
            assert merged.for_task(task).label_names == names and merged.for_task(None).label_names is None
            loaded = load_adapter(tmp_path / "out", task=task)
            assert loaded.label_names == names and load_adapter(tmp_path / "out").label_names is None
            assert loaded.attach(str(root / "base")).config.id2label == expected


def test_names_that_do_not_fit_the_head_are_left_out(root):
    adapter = load_adapter(root / "mail")
    adapter.label_names = ("a", "b", "c")
    assert adapter.attach(str(root / "base")).config.id2label == {0: "LABEL_0", 1: "LABEL_1"}


def test_a_projected_adapter_keeps_them(root, tmp_path):
    from osrm_peft import TaskFeatures, collect_features, load_base, load_tokenizer

    rows = TaskData(str(root / "stars.jsonl")).load("stars").train
    tokenizer, base = load_tokenizer(str(root / "base")), load_base(str(root / "base"), 2)
    batches = [tokenizer(rows["sentence1"][:4], return_tensors="pt", padding=True)]
    features: TaskFeatures = collect_features(base, batches, task="stars", target_modules=LORA, progress=False)
    project_adapter(root / "mail", [features]).save_pretrained(tmp_path / "out")
    assert read_manifest(tmp_path / "out")["label_names"] == ["ham", "spam"]
