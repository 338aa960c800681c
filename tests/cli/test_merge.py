"""The commands around merging, in this process, on tiny adapters."""

import html
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from osrm_peft import LeastSquares, load_adapter, merge_adapters
from osrm_peft.merging.plan import plan_merge
from osrm_peft.merging.request import MergeRequest
from tests.helpers.adapters import make_adapter
from tests.helpers.merging import statistic

EXAMPLE = Path(__file__).parents[2] / "recipes/configs/merge_packaged.yaml"


@pytest.fixture
def adapters(tmp_path):
    for seed, name in ((1, "tweets"), (2, "sms_spam")):
        make_adapter(tmp_path / name, seed=seed, num_labels=seed)
    return {name: str(tmp_path / name) for name in ("tweets", "sms_spam")}


def close(folder, deltas):
    found = load_adapter(folder).factors
    assert set(found) == set(deltas)
    return all(float((found[name].delta() - delta).abs().max()) < 1e-5 for name, delta in deltas.items())


def recipe_file(tmp_path, text):
    path = tmp_path / "merge.yaml"
    path.write_text(text)
    return path


def test_flags_merge_as_the_function_does(adapters, tmp_path, call):
    out = tmp_path / "out"
    call("merge", *adapters.values(), "--out", out, "-m", "ties", "-o", "density=0.3", "--space", "knots", "--rank", 3)
    assert close(out, merge_adapters(adapters, "ties", density=0.3, space="knots", rank=3).deltas())


def test_the_example_recipe_is_a_recipe_and_its_header_names_it(adapters):
    recipe = MergeRequest.from_yaml(EXAMPLE)
    assert recipe.scales() == [0.6, 1.0] and recipe.options == {"density": 0.3}
    assert f"--config recipes/configs/{EXAMPLE.name}" in EXAMPLE.read_text().splitlines()[1]
    plan = plan_merge(replace(recipe, adapters=adapters).at_first_scale())
    assert {tuple(weight.tolist()) for weight in plan.weights.values()} == {(1.0, 0.5), (1.0, 1.0)}


def test_a_recipe_is_a_sweep_from_one_merge_and_flags_go_before_it(adapters, tmp_path, call):
    config = recipe_file(tmp_path, f"adapters: {adapters}\nmethod: ties\noptions: {{density: 0.5}}\nscale: [0.3, 1]\n")
    call("merge", "-c", config, "--out", tmp_path / "sweep")
    for scale in (0.3, 1.0):
        expected = merge_adapters(adapters, "ties", density=0.5, scale=scale).deltas()
        assert close(tmp_path / f"sweep/scale_{scale!r}", expected)
    call("merge", "-c", config, "--out", tmp_path / "flags", "--scale", "0.7", "-o", "trim=layer", "--weight",
         "tweets=2", "--weight", "sms_spam=1")  # fmt: skip
    ours = merge_adapters(adapters, "ties", density=0.5, trim="layer", scale=0.7, weights={"tweets": 2, "sms_spam": 1})
    assert close(tmp_path / "flags", ours.deltas())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adaptors: {}", "a merge recipe knows ['adapters',"),
        ("- 1", "found list"),
        ("options: 3", "options=3 in the merge recipe must map names to values"),
        ("options: {scale: 3}", "scale in the merge recipe's options: write it beside them"),
        ("scale: []", "a sweep needs different numbers"),
        ("method: best", "unknown merge method 'best'"),
    ],
)
def test_a_wrong_recipe_is_one_clear_error(tmp_path, call, text, message):
    assert message in call("merge", "-c", recipe_file(tmp_path, text), "--out", tmp_path / "out", code=2)


def test_a_dry_run_says_what_would_be_merged_and_writes_nothing(adapters, tmp_path, call):
    out = tmp_path / "out"
    printed = call("merge", *adapters.values(), "--out", out, "-m", "lore", "--dry-run")
    assert not out.exists()
    for part in ("LoRE-Merging", "mu_ratio=None", "space core", "tweets 1, sms_spam 1", "rank at most 8",
                 "one a task: tweets, sms_spam", "query 2 16×16 linear 4, 2,", "float32"):  # fmt: skip
        assert part in printed, part
    call("merge", *adapters.values(), "--out", out, "-m", "lore")
    written = (out / "adapter_model.safetensors").stat().st_size
    assert "weights written 4.1 kB in float32" in printed  # 4 layers, rank 8, 16 + 16 wide, 4 bytes
    assert 4 * 8 * (16 + 16) * 4 < written < 2 * 4 * 8 * (16 + 16) * 4  # and safetensors' header
    assert "dense vector and 1-bit masks" in call(
        "merge", *adapters.values(), "--out", tmp_path / "emr", "-m", "emr", "--dry-run"
    )
    text = call("merge", "a=no/such", "--dry-run", code=2)
    assert "neither a folder nor a Hub repository" in text


def test_inspect_shows_layers_ranks_scales_and_heads(adapters, tmp_path, call):
    make_adapter(tmp_path / "mixed", rank_pattern={"value": 2}, use_rslora=True, layers_to_transform=[1])
    printed = call("inspect", adapters["tweets"], f"other={tmp_path / 'mixed'}")
    norm = sum(
        float(f.delta().square().sum()) for n, f in load_adapter(adapters["tweets"]).factors.items() if "query" in n
    )
    assert f"query 2 16×16 linear 4, 2, {norm**0.5:.3g} 4, 4," in printed and "(1 of 2)" in printed
    assert "2, 4" in printed and "classifier.bias (1,)" in printed and "float32" in printed


@pytest.fixture
def with_modules(tmp_path):
    """Two tasks that trained their pooler whole, and have copies of the embeddings."""
    for seed, name in ((1, "tweets"), (2, "sms_spam")):
        model = make_adapter(tmp_path / name, seed=seed, num_labels=seed, modules_to_save=["pooler"])
        model.save_pretrained(tmp_path / name, save_embedding_layers=True)
    return {name: str(tmp_path / name) for name in ("tweets", "sms_spam")}


POOLER = "bert.pooler.dense.weight"


def test_a_policy_for_modules_is_a_flag_and_a_field_of_recipes(with_modules, tmp_path, call):
    own = {task: load_adapter(folder).modules[POOLER] for task, folder in with_modules.items()}
    out, config = tmp_path / "out", recipe_file(tmp_path, f"adapters: {with_modules}\nmodules: tweets\n")
    call("merge", *with_modules.values(), "--out", out)
    assert torch.allclose(load_adapter(out).modules[POOLER], sum(own.values()) / 2)
    call("merge", "-c", config, "--out", out, "--overwrite")
    assert torch.equal(load_adapter(out).modules[POOLER], own["tweets"])
    assert "modules: tweets" in (out / "README.md").read_text()  # the recipe in the card makes it again
    call("merge", "-c", config, "--out", out, "--overwrite", "--modules", "per_task")
    assert not load_adapter(out).modules
    assert torch.equal(load_adapter(out, task="sms_spam").modules[POOLER], own["sms_spam"])
    text = call("merge", "-c", config, "--out", out, "--modules", "error", code=2)
    assert f"tweets, sms_spam trained bert.pooler.dense.bias, {POOLER} and --modules error" in text
    text = call("merge", *with_modules.values(), "--out", out, "--modules", "mean", code=2)
    assert "unknown modules policy 'mean': choose from average, per_task, error, tweets, sms_spam" in text


def test_inspect_and_a_dry_run_show_modules_and_copies(with_modules, tmp_path, call):
    printed = call("inspect", *with_modules.values())
    assert f"{POOLER} 1 trained 16×16 trained 16×16" in printed
    assert "bert.embeddings.word_embeddings.weight 1 copy 50×16 copy 50×16" in printed
    make_adapter(tmp_path / "norms", modules_to_save=["output.LayerNorm"])
    printed = call("inspect", with_modules["tweets"], tmp_path / "norms")
    assert "bert.encoder.layer.#.output.LayerNorm.weight 2 absent trained 16" in printed
    for flags, fate in (
        ([], "average"),
        (["--modules", "per_task"], "each task's own"),
        (["--modules", "sms_spam"], "that of sms_spam"),
        (["-m", "emr"], "each task's own"),
    ):
        printed = call("merge", *with_modules.values(), "--out", tmp_path / "out", "--dry-run", *flags)
        assert re.search(rf"{POOLER}(, bert.embeddings.word_embeddings.weight)?: {fate}", printed)
        assert "that of" in fate or "word_embeddings.weight: copy of the base model's" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["average", "emr"])
def test_manifest_and_card_say_what_became_of_modules(method, with_modules, tmp_path, call):
    out = tmp_path / "out"
    call("merge", *with_modules.values(), "--out", out, "-m", method)
    fate = {"average": "average", "emr": "each task's own"}[method]
    assert json.loads((out / "osrm_peft.json").read_text())["modules"][POOLER] == fate
    card = (out / "README.md").read_text()
    assert f"* modules: {fate}: bert.pooler.dense.bias, {POOLER}" in card.replace("\\", "")
    assert "modules: copy of the base model's: bert.embeddings.word_embeddings.weight" in card.replace("\\", "")


def test_interference_and_weights_from_features(adapters, tmp_path, call):
    given = []
    for task, folder in adapters.items():
        features = statistic("gram", task, load_adapter(folder).shapes)
        replace(features, of_finetuned_model=False).save(tmp_path / f"{task}.safetensors")
        given.append(f"--features={task}={tmp_path / task}.safetensors")
    printed = call("interference", *adapters.values(), *given, "--out", tmp_path / "found")
    assert "E‖τ_j h_t‖² / E‖τ_t h_t‖²" in printed and "on sms_spam" in printed
    found = json.loads((tmp_path / "found/interference.json").read_text())
    assert found["mean"][0][0] == pytest.approx(1) and found["settings"]["adapters"] == adapters and found["versions"]
    assert (tmp_path / "found/interference.png").read_bytes().startswith(b"\x89PNG")

    out = tmp_path / "out"
    call("merge", *adapters.values(), "--out", out, "-m", "task_arithmetic", "--weights", "features", *given)
    files = {task: tmp_path / f"{task}.safetensors" for task in adapters}
    assert close(out, merge_adapters(adapters, "task_arithmetic", weights=LeastSquares(files)).deltas())
    call("merge", *adapters.values(), "--out", out, "--overwrite", "-m", "ties", "--scale", "features", *given)
    assert "scale" in next(iter(json.loads((out / "osrm_peft.json").read_text())["report"].values()))
    call(
        "merge", *adapters.values(), "--out", out, "--overwrite", "-m", "tsv", "--rank", 2, "--cut", "features", *given
    )
    assert close(out, merge_adapters(adapters, "tsv", rank=2, cut=LeastSquares(files)).deltas())
    assert not close(out, merge_adapters(adapters, "tsv", rank=2).deltas())
    printed = call("merge", *adapters.values(), "--cut", "features", *given, code=2)
    assert "without rank nothing is cut: give rank" in printed
    assert "missing sms_spam" in call(
        "merge", *adapters.values(), "--weights", "features", "-m", "concat", given[0], code=2
    )


def test_interference_without_features_says_what_adapters_share(adapters, tmp_path, call):
    out = tmp_path / "found"
    printed = call("interference", *adapters.values(), "--out", out)
    found = json.loads((out / "interference.json").read_text())
    assert (
        found["verdict"]
        and found["verdict"] in printed
        and found["layers"] == {}
        and found["settings"]["features"] is None
    )
    assert "Share of A and B in common" in printed and "E‖τ_j" not in printed
    tasks, shared = list(adapters), [found["overlap"][side]["mean"]["shared"][0][1] for side in "AB"]
    assert re.search(rf"{tasks[0]}, {tasks[1]} {shared[0]:.3f} \(.*\) {shared[1]:.3f} \(", printed)
    assert (out / "interference.png").read_bytes().startswith(b"\x89PNG")
    call("report", out, "--out", tmp_path / "page.html")
    assert found["verdict"] in html.unescape((tmp_path / "page.html").read_text())
    said = call("interference", *adapters.values(), "--base-model", "no/such", code=2)
    assert "--base-model is compared with on features: give --features TASK=FILE of every task, too" in said
    lone = call("interference", next(iter(adapters.values())), code=2)
    assert "one adapter shares nothing with another: give a second one, or --features TASK=FILE" in lone


def test_a_sweep_is_not_written_into_a_folder_with_anything_else(adapters, tmp_path, call):
    out = tmp_path / "out"
    sweep = ["merge", *adapters.values(), "--out", out, "--scale", "0.1234567", "--scale", "0.1234568"]
    printed = call(*sweep, "--dry-run")
    assert f"would write {out}/scale_0.1234567 at λ = 0.1234567" in printed and not out.exists()
    call(*sweep)
    call(*sweep)  # over itself
    assert sorted(folder.name for folder in out.iterdir()) == ["scale_0.1234567", "scale_0.1234568"]
    before = sorted(Path(adapters["tweets"]).rglob("*"))
    text = call("merge", *adapters.values(), "--out", adapters["tweets"], "--scale", "0.5", "--scale", "1", code=2)
    assert "so no sweep is written into it: name a new folder" in text
    assert sorted(Path(adapters["tweets"]).rglob("*")) == before


def test_brackets_and_equal_signs_in_names(tmp_path, call):
    make_adapter(tmp_path / "lr=0.1[ok]")
    assert "lr=0.1[ok]" in call("inspect", tmp_path / "lr=0.1[ok]")
    assert "'runs/lr=0.1/x' is neither a folder nor a Hub repository" in call("inspect", "runs/lr=0.1/x", code=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "[1]", "--scale", "2"], "--scale [1] must be a finite number"),
        (["-o", "method=ties"], "method in the merge recipe's options: write it beside them"),
        (["--features", "tweets=x", "--features", "tweets=y"], "a name is given twice"),
    ],
)
def test_odd_flags_are_one_clear_error(adapters, tmp_path, call, arguments, message):
    assert message in call("merge", *adapters.values(), "--out", tmp_path / "out", *arguments, code=2)
