import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from osrm_peft import TaskFeatures, list_tasks
from osrm_peft.io.tensors import tensor_headers
from osrm_peft.models.loading import load_base
from osrm_peft.training.recipe import Recipe
from tests.helpers.files import write

COMMAND = [str(Path(sys.executable).with_name("osrm-peft"))]


def run(*arguments, code=0):
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else " ".join(done.stderr.split())


def test_features_train_merge_evaluate(tmp_path, call):
    """The commands one after the other, on the packaged model and two of its tasks."""
    recipe = write(tmp_path, tasks=["tweets", "sms_spam"], osrm={"statistic": "sample"})
    assert "tweets.features.safetensors" in run("features", "-c", recipe)
    assert "is there already" in call("features", "-c", recipe, "-t", "tweets")
    run("train", "-c", recipe, "--out", tmp_path / "ad")
    assert "is there already (--overwrite" in call("train", "-c", recipe, "--out", tmp_path / "ad", "-t", "tweets")
    text = call("merge", tmp_path / "ad/tweets", "--out", tmp_path / "ad/tweets", code=2)
    assert "is not a folder that osrm_peft wrote as 'merged'" in text  # an input is not an output
    out = tmp_path / "merged"
    printed = call(
        "merge", f"tweets={tmp_path}/ad/tweets", tmp_path / "ad/sms_spam", "--out", out,
        "-m", "lore", "-o", "mu_ratio=0.2", "--weight", "tweets=1", "--weight", "sms_spam=2", "--scale", "0.5",
    )  # fmt: skip
    assert "rank 16, energy kept per layer at least 1.0000" in printed.replace("\n", " ")
    manifest = json.loads((out / "osrm_peft.json").read_text())
    assert manifest["options"]["mu_ratio"] == 0.2 and manifest["scale"] == 0.5
    assert manifest["weights"] == {"tweets": 1, "sms_spam": 2}
    scores = tmp_path / "scores.json"
    assert "tweets" in call("evaluate", out, "--rows", 8, "--max-length", 16, "--out", scores)
    found = json.loads(scores.read_text())
    assert set(found["scores"]) == {"tweets", "sms_spam"} and found["settings"]["rows"] == 8
    assert found["tasks"]["tweets"] == {"metric": "pearson_spearman", "rows": 8, "split": "validation"}
    assert "individual" in call("evaluate", tmp_path / "ad/tweets", "--rows", 8, "--max-length", 16)
    for kind, method in (("gram", "regmean"), ("fisher", "fisher")):
        printed = call(
            "statistics", "-c", recipe, "--kind", kind, "--adapters", tmp_path / "ad", "--out", tmp_path, "--rows", 8
        )
        assert f"tweets.{kind}.safetensors" in printed
        given = [f"--statistics={name}={tmp_path}/{name}.{kind}.safetensors" for name in ("tweets", "sms_spam")]
        call(
            "merge", tmp_path / "ad/tweets", tmp_path / "ad/sms_spam", "--out", tmp_path / method, "-m", method, *given
        )
        assert json.loads((tmp_path / method / "osrm_peft.json").read_text())["method"] == method
    call("merge", tmp_path / "ad/tweets", tmp_path / "ad/sms_spam", "--out", tmp_path / "emr", "-m", "emr")
    assert "emr 1" in call("evaluate", tmp_path / "emr", "--rows", 8, "--max-length", 16)


@pytest.mark.parametrize("flags", [[], ["--modules", "per_task"], ["--modules", "tweets"], ["-m", "emr"]])
def test_a_merge_with_trained_modules_is_evaluated(flags, tmp_path, call):
    for seed, (name, labels) in enumerate((("tweets", 1), ("questions", 6))):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", modules_to_save=["pooler"])
        get_peft_model(load_base("packaged", labels), config).save_pretrained(tmp_path / name)
    call("merge", tmp_path / "tweets", tmp_path / "questions", "--out", tmp_path / "out", *flags)
    printed = call("evaluate", tmp_path / "out", "--rows", 4, "--max-length", 8, "--save")
    assert "tweets" in printed and "questions" in printed
    assert len(json.loads((tmp_path / "out/osrm_peft.json").read_text())["scores"]) == 2


def test_scores_take_the_place_of_no_others_unless_told_to(tmp_path, call):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    get_peft_model(load_base("packaged", 1), config).save_pretrained(tmp_path / "tweets")
    call("merge", tmp_path / "tweets", "--out", tmp_path / "out")
    given = ["evaluate", tmp_path / "out", "--max-length", 8, "--out", tmp_path / "scores.json", "--save"]
    for _ in range(2):  # the same again is no loss
        call(*given, "--rows", 4)
    before = (tmp_path / "out/osrm_peft.json").read_bytes(), (tmp_path / "scores.json").read_bytes()
    assert "scores.json holds scores of another evaluation" in call(*given, "--rows", 6, code=2)
    printed = call(*given[:-3], "--save", "--rows", 6, code=2)
    assert "has a score of 'tweets' with --rows 4, this one has 6: --overwrite puts it in its place" in printed
    (tmp_path / "theirs.json").write_text("{}")
    printed = call(*given[:4], "--out", tmp_path / "theirs.json", "--rows", 4, code=2)
    assert "theirs.json holds no scores of ours: name another file" in printed
    assert before == ((tmp_path / "out/osrm_peft.json").read_bytes(), (tmp_path / "scores.json").read_bytes())
    call(*given, "--rows", 6, "--overwrite")
    assert json.loads((tmp_path / "out/osrm_peft.json").read_text())["scores"][0]["rows"] == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge", "a=x", "--out", "o", "-m", "best"], "error: unknown merge method 'best': choose from"),
        (["merge", "no/such", "--out", "o"], "error: 'no/such' is neither a folder nor a Hub repository"),
        (["merge", "x/a", "y/a", "--out", "o"], "two adapters have the same name"),
        (["merge", "a=x", "--out", "o", "-o", "mu"], "'mu': expected NAME=VALUE"),
        (["merge", "a=x", "--out", "o", "-o", "mu=1"], "average has no option mu; its options are none"),
        (["merge", "a=x", "--out", "o", "--weight", "a=much"], "weight of 'a'='much' must be a finite number"),
        (["merge", "a=x", "--out", "o", "--weight", "a=1", "--weight", "a=2"], "a name is given twice"),
        (["merge", "a=x", "--out", "o", "--weight", "a=1", "--weights", "features"], "give --weight TASK=NUMBER or"),
        (["merge", "a=x", "--out", "o", "--scale", "1", "--scale", "1"], "a sweep needs different numbers"),
        (["merge", "a=x", "--out", "o", "--scale", "1", "--scale", "x"], "--scale x must be a finite number"),
        (["merge", "--out", "o"], "no adapters to merge"),
        (["merge", "-c", "none.yaml", "--out", "o"], "no merge recipe none.yaml"),
        (["inspect", "none"], "'none' is neither a folder nor a Hub repository"),
        (["merge", "[/red]zz", "--out", "o"], "error: '[/red]zz' is neither a folder"),
        (["train", "-c", "none.yaml"], "no recipe none.yaml"),
        (["evaluate", "none", "--suite", "x"], "'none' is neither a folder nor a Hub repository"),
        (["features"], "error: give a recipe (--config), or --base-model and --suite"),
        (["features", "--base-model", "packaged"], "error: give a recipe (--config), or --base-model and --suite"),
        (
            ["features", "--base-model", "m", "--suite", "s", "--dtype", "float16"],
            "error: unknown dtype 'float16': choose",
        ),
        (
            ["features", "--base-model", "packaged", "--suite", "packaged", "-t", "x"],
            "error: unknown task x: the recipe has",
        ),
        (["features", "-c", "none.yaml"], "no recipe none.yaml"),
        (["features", "show", "none"], "error: no features file none: write it with `osrm-peft features`"),
        (["project", "none", "--features", "f", "--out", "o"], "error: 'none' is neither a folder nor a Hub"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(arguments, message, call):
    assert message in call(*arguments, code=2)


def test_a_damaged_manifest_is_not_evaluated(tmp_path, call):
    (tmp_path / "osrm_peft.json").write_text(json.dumps({"kind": "adapter", "task": "tweets", "base_model": ["x"]}))
    assert "the manifest osrm_peft.json is damaged" in call("evaluate", tmp_path, code=2)


def test_an_output_that_is_not_ours_is_refused_before_any_work(tmp_path, call):
    (tmp_path / "thesis.txt").touch()
    assert "is not a folder that osrm_peft wrote" in run("merge", "a=no/such", "--out", tmp_path, code=2)
    assert "osrm_peft wrote" in call("project", "no/such", "--features", "no/such", "--out", tmp_path, code=2)


def test_help_names_every_command():
    printed = run("--help")
    assert all(
        name in printed
        for name in (
            "features",
            "train",
            "merge",
            "project",
            "evaluate",
            "demo",
            "inspect",
            "interference",
            "statistics",
        )
    )


def test_recipe_tasks_default_to_the_suite(tmp_path):
    assert Recipe.from_yaml(write(tmp_path, tasks=None)).task_names() == list_tasks("packaged")


def test_features_from_flags_and_a_trained_adapter_projected_with_them(tmp_path, call):
    flags = [
        "--base-model",
        "packaged",
        "--suite",
        "packaged",
        "--target",
        "key",
        "--target",
        "value",
    ]  # not PEFT's default
    flags += ["--statistic", "mean", "-k", 4, "--max-length", 16, "--out", tmp_path]
    printed = call("features", *flags, "--task", "tweets", "--dtype", "bfloat16")
    assert printed == f"wrote {tmp_path}/tweets.features.safetensors"
    tweets = tmp_path / "tweets.features.safetensors"
    features = TaskFeatures.load(tweets)
    assert (features.task, features.statistic, features.num_samples, features.seed) == ("tweets", "mean", 4, 42)
    assert {dtype for _, dtype in tensor_headers(tweets).values()} == {torch.bfloat16}
    assert {name.rpartition(".")[2] for name in features.layers} == {"key", "value"}
    assert "is there already (--overwrite" in call("features", *flags, "--task", "tweets")
    assert {dtype for _, dtype in tensor_headers(tweets).values()} == {torch.bfloat16}
    asked = call("features", *flags, "--task", "tweets", "--statistic", "token", code=2)
    assert "is there already, with --statistic mean and not 'token': --overwrite makes it anew" in asked
    call("features", *flags, "--task", "tweets", "--task", "sms_spam", "--overwrite", "--seed", 1)
    assert {dtype for _, dtype in tensor_headers(tweets).values()} == {torch.float32}
    features = TaskFeatures.load(tweets)
    assert features.seed == 1

    printed = call("features", "show", tweets)
    assert "Features of tweets" in printed and "4, drawn with seed 1" in printed
    for shown in (features.base_model, features.weight_hash, features.tokenizer, features.tokenizer_hash):
        assert shown and shown in printed.replace(" ", "")
    assert "statistic mean" in printed and "one vector an input, the average over all samples: no sample" in printed
    assert f"{next(iter(features.layers))}, value" in printed  # one input of both

    config = LoraConfig(r=4, target_modules=["key", "value"], task_type="SEQ_CLS", init_lora_weights=False)
    get_peft_model(load_base("packaged", 2), config).save_pretrained(tmp_path / "adapter")
    given = ["project", tmp_path / "adapter", "--features", tweets, "--out", tmp_path / "out"]
    own = ["--in-task", tmp_path / "sms_spam.features.safetensors", "--min-effect-kept", 0.9]
    means = r"energy kept [\d.]+, out of task kept [\d.e-]+"
    for options, more in (([], ""), ([*own, "--overwrite"], r", in task kept ([\d.]+), protected [\d.]+")):
        printed = call(*given, *options)
        line = (
            rf"wrote {tmp_path}/out: means over {len(features.layers)} layers: {means}{more}; least energy kept [\d.]+"
        )
        found = re.fullmatch(line, printed)
        assert found, printed
        manifest = json.loads((tmp_path / "out/osrm_peft.json").read_text())
        assert manifest["projected"]["min_effect_kept"] == (0.9 if options else None)
        assert "holds another result (projected {" in call(*given, "--seed", 1, code=2)
    assert float(found[1]) >= 0.9
    assert [one["task"] for one in manifest["projected"]["out_of_task"]] == ["tweets"]
    assert manifest["projected"]["in_task"]["task"] == "sms_spam"
    PeftModel.from_pretrained(load_base("packaged", 2), str(tmp_path / "out"))
    given[-1] = tmp_path / "adapter"
    assert "is not a folder that osrm_peft wrote as 'adapter'" in call(*given, code=2)
