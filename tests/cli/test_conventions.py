"""What people expect of any command: versions, completion, JSON, silence, exit codes, and messages in its own words."""

import json
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import typer
from peft import LoraConfig, get_peft_model

from osrm_peft.checkpoints.plan import CHECKPOINT_METHODS
from osrm_peft.checks import size_in_bytes
from osrm_peft.cli import main as cli
from osrm_peft.cli.app import PANELS, session, show
from osrm_peft.cli.methods import FULL_MODELS, OPTIONS
from osrm_peft.cli.words import in_words
from osrm_peft.features.task_features import TaskFeatures
from osrm_peft.merging import METHODS
from osrm_peft.models.loading import load_base
from osrm_peft.training.recipe import Recipe
from tests.helpers.adapters import make_adapter
from tests.helpers.checkpoints import noisy
from tests.helpers.files import write
from tests.helpers.merging import features_of
from tests.helpers.models import make_base

# A light start: the command without torch, whose import takes seconds.
LIGHT = """
import sys
sys.argv = ["osrm-peft", *sys.argv[1:]]
from osrm_peft.cli.main import main
try:
    main()
finally:
    assert "torch" not in sys.modules
"""


def light(*arguments, **environment):
    done = subprocess.run([sys.executable, "-c", LIGHT, *arguments], capture_output=True, text=True, check=False,
                          env=os.environ | {"COLUMNS": "100"} | environment)  # fmt: skip
    assert "AssertionError" not in done.stderr
    return done


def typed(monkeypatch, capfd, *arguments):
    """(exit code, stdout, stderr) of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["osrm-peft", *map(str, arguments)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out, err = capfd.readouterr()
    return stopped.value.code or 0, out, err


@pytest.fixture(autouse=True)
def _no_trace(monkeypatch):
    """What `--quiet` sets is taken back."""
    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)


@pytest.fixture
def places(tmp_path):
    """Three adapters, two models and a base, and features, by name."""
    found = {}
    for seed, name in enumerate(("a", "b", "c")):
        make_adapter(tmp_path / name, seed=seed)
        found[name] = f"{name}={tmp_path}/{name}"
    for seed, name in enumerate(("base", "one", "two")):
        make_base(base_seed=seed).save_pretrained(tmp_path / name)
        found[name] = tmp_path / name
    found["tuned"] = noisy(tmp_path / "tuned", 1)
    shapes = {name: (16, 16, 4) for name in (f"bert.encoder.layer.{i}.attention.self.{part}"
              for i in range(2) for part in ("query", "value"))}  # fmt: skip
    for name, features in features_of(["a", "b"], layers=shapes)[0].items():
        features.save(tmp_path / f"{name}.safetensors")
        found[f"features of {name}"] = f"--features={name}={tmp_path}/{name}.safetensors"
    return found | {"out": tmp_path / "out", "adapter": tmp_path / "a", "file": tmp_path / "a.safetensors"}


# --- help, versions, completion --------------------------------------------------------------------------------------


def test_versions_are_one_line():
    assert re.fullmatch(r"osrm_peft [\d.]+, torch \S+, transformers \S+, peft \S+\n", light("--version").stdout)


def test_commands_are_grouped_in_the_order_of_use():
    commands = typer.main.get_command(cli.app).commands
    known = [name for names in PANELS.values() for name in names if name in commands]
    assert list(commands) == known  # none is left over
    printed = light("--help").stdout
    places = [printed.index(f"─ {panel} ─") for panel in PANELS]
    assert places == sorted(places) and len(printed.splitlines()) < 70


def test_the_shell_completes_commands_and_options():
    given = {"_OSRM_PEFT_COMPLETE": "complete_bash", "COMP_CWORD": "1", "COMP_WORDS": "osrm-peft mer"}
    assert light(**given).stdout.split() == ["merge", "merge-checkpoints"]
    given |= {"COMP_CWORD": "2", "COMP_WORDS": "osrm-peft merge --base"}
    assert light(**given).stdout.split() == ["--base-model"]
    assert "--install-completion" in light("--help").stdout


def test_the_help_of_merge_lists_each_method_with_its_options():
    assert {
        name: ", ".join(f"{option}={value}" for option, value in method.options.items())
        for name, method in METHODS.items()
    } == OPTIONS
    assert set(FULL_MODELS) == set(CHECKPOINT_METHODS)
    printed = " ".join(light("merge", "--help").stdout.split())
    assert all((f"{name} ({options})" if options else name) in printed for name, options in OPTIONS.items())
    printed = " ".join(light("merge-checkpoints", "--help").stdout.split())
    assert "lore (mu=None" in printed and "regmean" not in printed


def test_methods_are_listed_and_explained(call):
    printed = call("methods")
    for name, method in METHODS.items():
        assert f" {name} " in f" {printed} " and f"arXiv:{method.paper.rpartition(':')[2]}" in printed
    assert "off_diagonal=0.9" in printed and " gram " in printed and "without base" in printed
    printed = call("methods", "regmean")
    for part in ("regmean: RegMean (Jin et al.", "default λ: 1", "spaces: factors (factors by default)",
                 "needs: --statistics TASK=FILE of every task (osrm-peft statistics --kind gram)", "full models: none",
                 "option: ridge=0.0", "ridge: ρ, for Gram matrices that are singular even so."):  # fmt: skip
        assert part in printed, part
    assert "error: unknown merge method 'tie': choose from" in call("methods", "tie", code=2)
    assert "'dare'" in call("methods", "dare_linear", code=2)


# --- one JSON document, silence --------------------------------------------------------------------------------------

JSON = {
    "inspect": (["inspect", "a", "b"], lambda found: found["adapters"]["a"]["ranks"] == [4] and found["layers"]),
    "spectrum": (["inspect", "--spectrum", "a", "--out", "out"], lambda found: found["singular_values"]["a"]),
    "interference": (["interference", "a", "b", "features of a", "features of b", "--out", "out"],
                     lambda found: found["mean"][0][1] != round(found["mean"][0][1], 6)),
    "merge": (["merge", "a", "b", "c", "--out", "out", "--scale", "0.5", "--scale", "1"],
              lambda found: [one["scale"] for one in found["written"]] == [0.5, 1.0]),
    "dry run": (["merge", "a", "b", "c", "--out", "out", "-m", "lore", "--dry-run"],
                lambda found: found["merge"]["bytes"] == 4 * 12 * 32 * 4 and found["merge"]["options"]["density"] == 0.2
                and found["would_write"][0]["scale"] == 1),
    "models": (["merge-checkpoints", "one", "two", "--out", "out", "--dry-run", "--shard-size", "2MiB"],
               lambda found: found["files"] == 1 and found["weights"] == {"one": {"*": 1.0}, "two": {"*": 1.0}}),
    "models merged": (["merge-checkpoints", "one", "two", "--out", "out"], lambda found: found["tensors"] > 10),
    "bake": (["bake", "base", "adapter", "--out", "out"], lambda found: found["changed"] >= 4 and found["bytes"]),
    "extract": (["extract", "base", "tuned", "--out", "out", "--rank", "2"],
                lambda found: found["written_rank"] == 2 and found["energy"] != round(found["energy"], 6)),
    "features": (["features", "show", "file"], lambda found: found["statistic"] == "token"
                 and found["inputs"][0]["energy"] != round(found["inputs"][0]["energy"], 6)),
    "env": (["env"], lambda found: found["torch"] and found["CPUs"]),
    "methods": (["methods"], lambda found: {one["name"] for one in found} == set(METHODS)),
    "a method": (["methods", "ties"], lambda found: found["options"] == {"density": 0.2, "trim": "model"}),
}  # fmt: skip


@pytest.mark.parametrize("name", JSON)
def test_json_is_one_document_and_nothing_else(name, places, monkeypatch, capfd):
    arguments, holds = JSON[name]
    code, out, err = typed(monkeypatch, capfd, *(places.get(one, one) for one in arguments), "--json")
    assert code == 0, err
    assert holds(json.loads(out, parse_constant=pytest.fail)), out
    assert not {"wrote", "merge a"} & set(out.split())
    writes = {"--out"} & set(arguments) and "--dry-run" not in arguments
    assert bool(writes) == ("wrote " in err)


def test_what_json_lacks_is_null_a_list_or_text(monkeypatch, capsys):
    monkeypatch.setattr(session, "json", True)
    show({"n": [math.nan, math.inf, 0.1], "t": (1, True, None), 3: Path("[x]:bug:")}, pytest.fail)
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found == {"n": [None, None, 0.1], "t": [1, True, None], "3": "[x]:bug:"}


def test_an_error_beside_json_leaves_stdout_empty(monkeypatch, capfd):
    code, out, err = typed(monkeypatch, capfd, "inspect", "no/such", "--json")
    assert (code, out) == (2, "") and err.startswith("error: 'no/such' is neither")


@pytest.mark.parametrize("before", [True, False])
def test_quiet_prints_nothing_but_errors_and_what_was_asked_for(before, places, tmp_path, monkeypatch, capfd):
    def quiet(*arguments):
        given = ["--quiet", *arguments] if before else [*arguments, "--quiet"]
        return typed(monkeypatch, capfd, *given)

    merge = ["merge", places["a"], places["b"], "--out", places["out"]]
    assert quiet(*merge) == (0, "", "")
    assert (places["out"] / "adapter_model.safetensors").is_file()
    assert quiet("merge-checkpoints", places["one"], places["two"], "--out", tmp_path / "model") == (0, "", "")
    assert quiet("extract", places["base"], places["tuned"], "--out", tmp_path / "adapter") == (0, "", "")
    assert "error: " in quiet(*merge, "-m", "best")[2]
    assert "Adapters" in quiet("inspect", places["a"])[1]
    assert os.environ["TQDM_DISABLE"] == "1"
    assert "wrote " in typed(monkeypatch, capfd, *merge)[1]  # the next command is heard again


def test_training_and_features_can_be_quiet_and_bars_name_the_task(tmp_path, monkeypatch, capfd):
    recipe = write(tmp_path, tasks=["tweets", "sms_spam"])
    for command in (["features", "-c", recipe, "-t", "tweets"], ["train", "-c", recipe, "-t", "tweets"]):
        out = [] if command[0] == "features" else ["--out", tmp_path / "ad"]
        code, printed, err = typed(monkeypatch, capfd, *command, *out)
        assert code == 0 and printed.startswith("wrote ") and len(printed.splitlines()) == 1
        bar = r"features of tweets: " if command[0] == "features" else r"train tweets: .*2/2.*, loss=\d\.\d{4}\]"
        assert re.search(bar, err), err
        code, printed, err = typed(monkeypatch, capfd, *command, *out, "--overwrite", "--quiet")
        assert (code, printed) == (0, "") and "features of" not in err and "train tweets" not in err
    made = json.loads((tmp_path / "ad/tweets/osrm_peft.json").read_text())
    assert "disable_tqdm" not in made["training"]


# --- the base model, sizes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "old"),
    [("features", "--model"), ("evaluate", "--model"), ("interference", "--base"), ("merge-checkpoints", "--base"),
     ("inspect", "--base")],
)  # fmt: skip
def test_the_base_model_has_one_name_and_the_old_ones_lead_to_it(command, old, call):
    assert re.search(f"No such option: {old} .*--base-model", call(command, old, "y", code=2))


def test_base_model_is_an_option_wherever_there_is_one():
    commands = typer.main.get_command(cli.app).commands
    having = {name for name, one in commands.items() if any("--base-model" in option.opts for option in one.params)}
    assert having >= {"features", "inspect", "interference", "merge", "merge-checkpoints", "evaluate"}
    assert not [
        name for name, one in commands.items() for option in one.params if {"--base", "--model"} & {*option.opts}
    ]


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("2GiB", 2 * 2**30), ("1.5 GB", 15 * 10**8), ("3MiB", 3 * 2**20),
     ("7kB", 7000), ("7KiB", 7 * 1024), ("123", 123), ("12B", 12), (123, 123), ("1TB", 10**12)],
)  # fmt: skip
def test_sizes_are_read_as_people_write_them(text, size):
    assert size_in_bytes("shard_size", text) == size


@pytest.mark.parametrize(
    "text", ["5Gb", "5 gigabytes", "GB", "-5GB", "1e9", "", "5GB ", "9" * 5000, None, 1.5, True, "٣GB"]
)
def test_a_wrong_size_is_refused_with_examples(text):
    with pytest.raises(ValueError, match=r"^shard_size=.* must be a size: 5GB, 500MB, 2GiB, or a number of bytes"):
        size_in_bytes("shard_size", text)


def test_a_size_decides_the_number_of_files(places, call):
    given = ["merge-checkpoints", places["one"], places["two"], "--out", places["out"], "--dry-run", "--shard-size"]
    assert "in 1 files" in call(*given, "5GB")
    assert "error: --shard-size 5Gb must be a size: 5GB, 500MB, 2GiB" in call(*given, "5Gb", code=2)
    assert "error: --shard-size 500 must be a whole number of at least 1048576" in call(*given, "500", code=2)


# --- errors in the words of the command, exit codes ------------------------------------------------------------------

WORDS = [
    (["merge-checkpoints", "one", "two", "-m", "ties", "--out", "out"], "give --base-model, or use average or lore"),
    (["merge-checkpoints", "one", "two", "-m", "lore", "--weight", "one=2", "--weight", "two=1", "--out", "out"],
     "which lore has only with --base-model: leave weights out"),
    (["merge-checkpoints", "one", "two", "--heads", "zz*", "--out", "out"], "--heads 'zz*' matches no tensor"),
    (["merge-checkpoints", "one", "two", "--tokenizer", "x", "--out", "out"], "--tokenizer x names no input: choose"),
    (["merge", "a", "b", "--scale", "x", "--out", "out"], "--scale x must be a finite number"),
    (["merge", "a", "b", "--rank", "0", "--out", "out"], "--rank 0 must be a whole number of at least 1"),
    (["merge", "a", "b", "-m", "regmean", "--out", "out"], "needs --statistics TASK=FILE of every task, missing a, b"),
    (["merge", "a", "b", "-m", "concat", "--weights", "features", "--out", "out"],
     "needs --features TASK=FILE of every task"),
    (["merge", "a", "b", "features of a", "--out", "out"],
     "are for --weights features, --scale features and --cut features: give"),
    (["merge", "a", "b", "-m", "ties", "--weights", "features", "--out", "out"], "give the rule to --scale, which"),
    (["merge", "a", "b", "-m", "svd", "--out", "out"], "'task_arithmetic' with --rank, which is the same"),
    (["merge", "a", "b", "-m", "concat", "--space", "core", "--out", "out"], "not 'core': leave --space auto"),
    (["merge", "a", "b", "-m", "ties", "-o", "density=2", "--out", "out"], "error: density=2 must lie in (0, 1]"),
    (["merge", "a", "elsewhere", "--out", "out"], "say so with --base-model NAME"),
    (["merge", "a", "b", "-m", "tsv", "--out", "made"], "or replace it with --overwrite"),
    (["inspect", "--spectrum", "a", "--layer", "zz", "--out", "out"], "--layer zz matches no matrix"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), WORDS, ids=lambda one: one[:40] if isinstance(one, str) else one[0])
def test_an_error_names_the_flags_that_were_typed(arguments, message, places, tmp_path, call):
    if "elsewhere" in arguments:
        make_adapter(tmp_path / "elsewhere")
        config = tmp_path / "elsewhere/adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "another"}))
    if "made" in arguments:
        call("merge", places["a"], places["b"], "--out", tmp_path / "made")
    known = places | {"elsewhere": tmp_path / "elsewhere", "made": tmp_path / "made"}
    said = call(*(known.get(one, one) for one in arguments), code=2)
    assert message in said and "=True" not in said


def test_keys_of_a_recipe_and_python_code_keep_their_words(tmp_path, call):
    recipe = tmp_path / "merge.yaml"
    recipe.write_text("adapters: {a: x}\nscale: x\n")
    assert "scale='x' must be a finite number" in call("merge", "-c", recipe, code=2)
    assert "--scale y must be a finite number" in call("merge", "-c", recipe, "--scale", "y", code=2)
    program = typer.main.get_command(cli.app)
    for text in ("save it with from_pretrained('x', dtype='bfloat16')", "runs/seed=3/x is gone", "num_labels=3",
                 "'seed=3' is no folder", "resume=False"):  # fmt: skip
        assert in_words(text, program, ["merge-checkpoints", "x"]) == text
    text = "name a new folder, or replace it with overwrite=True (--overwrite)"
    assert in_words(text, program, ["--quiet", "merge", "x"]) == "name a new folder, or replace it with --overwrite"
    assert in_words("pass overwrite=True to go on", program, ["train"]) == "pass --overwrite to go on"
    assert in_words(text, program, ["push", "x"]) == text  # which has no such flag
    given = ["features", "show", "x"]
    assert in_words("seed=3", program, given) == "seed=3" and in_words("seed=3", program, given[:1]) == "--seed 3"


def test_warnings_are_one_line_in_the_words_of_the_command(tmp_path):
    for seed, name in enumerate(("tweets", "sms_spam")):
        config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
        get_peft_model(load_base("packaged", seed + 1), config).save_pretrained(tmp_path / name)
    command = [sys.executable, "-m", "osrm_peft", "--quiet", "merge", tmp_path / "tweets", tmp_path / "sms_spam"]
    command += ["--out", tmp_path / "out"]
    for flags, expected in (
        (["-m", "lore"], ["warning: LoRE of two inputs is their average, whatever λ and the options: take a third "
                          "input, or --method average"]),
        (["-m", "ties", "--overwrite"], [r"warning: the result has rank 384, .* MB \(the adapters' ranks sum to 4\): "
                                         r"--rank 16 writes .* MB and keeps at least .*% of a layer's energy"]),
        (["--overwrite"], []),
    ):  # fmt: skip
        done = subprocess.run([*command, *flags], capture_output=True, text=True, check=True)
        lines = done.stderr.splitlines()
        assert len(lines) == len(expected), done.stderr
        assert all(re.fullmatch(text, line) for text, line in zip(expected, lines, strict=True)), done.stderr


def test_exit_codes(monkeypatch, capfd, places):
    assert typed(monkeypatch, capfd, "env")[0] == 0
    assert typed(monkeypatch, capfd, "merge", "no/such", "--out", places["out"])[0] == 2
    assert typed(monkeypatch, capfd, "merge", "--no-such-flag")[0] == 2

    def fails(*arguments, **named):
        raise KeyError("x")

    monkeypatch.setattr("osrm_peft.merging.merge.execute", fails)
    code, _, err = typed(monkeypatch, capfd, "merge", places["a"], "--out", places["out"])
    assert code == 1 and "please report it, with what `osrm-peft env` prints" in err and len(err.splitlines()) == 1


def interrupted(*arguments, **named):
    raise KeyboardInterrupt


INTERRUPTED = {
    "merge": ("osrm_peft.merging.merge.execute", ["a", "b", "--out", "out"], "interrupted"),
    "inspect": ("osrm_peft.adapters.load.load_adapter", ["a"], "interrupted"),
    "merge-checkpoints": ("osrm_peft.checkpoints.merge.execute", ["one", "two", "--out", "out"],
                          "interrupted; finished weight files are kept, --resume goes on with them"),
    "bake": ("osrm_peft.checkpoints.baking.plan_bake", ["base", "adapter", "--out", "out"], "interrupted"),
    "extract": ("osrm_peft.checkpoints.extracting.plan_extract", ["base", "tuned", "--out", "out"], "interrupted"),
    "interference": ("osrm_peft.evaluation.interference.interference", ["a", "features of a"], "interrupted"),
    "report": ("osrm_peft.evaluation.page.write_report", ["out"], "interrupted"),
    "env": ("osrm_peft.io.manifest.versions", [], "interrupted"),
}  # fmt: skip


@pytest.mark.parametrize("command", INTERRUPTED)
def test_an_interrupt_of_any_command_is_one_line(command, places, monkeypatch, capfd):
    function, arguments, line = INTERRUPTED[command]
    monkeypatch.setattr(function, interrupted)
    code, out, err = typed(monkeypatch, capfd, command, *(places.get(one, one) for one in arguments))
    assert (code, out, err) == (130, "", f"{line}\n")


def test_an_interrupt_says_what_was_finished(tmp_path, monkeypatch, capfd):
    recipe = write(tmp_path, tasks=["tweets", "sms_spam"])
    saved = TaskFeatures("x", "packaged", "", "mean", layers={})

    def collect(self, name, **named):
        return saved if name == "tweets" else interrupted()

    monkeypatch.setattr(Recipe, "collect", collect)
    monkeypatch.setattr(Recipe, "base", lambda *arguments, **named: None)
    monkeypatch.setattr(TaskFeatures, "save", lambda *arguments, **named: None)
    code, _, err = typed(monkeypatch, capfd, "features", "-c", recipe)
    assert code == 130 and err == f"interrupted; finished: {tmp_path}/features/tweets.features.safetensors\n"
    assert session.written and typed(monkeypatch, capfd, "env")[0] == 0 and not session.written
