"""Importing the package is quick, and leaves its heavy parts for when they are used."""

import json
import subprocess
import sys

import torch
from safetensors.torch import save_file

import osrm_peft
from tests.helpers.checkpoints import noisy

HEAVY = ("torch", "transformers", "peft", "numpy", "datasets", "matplotlib")


def loaded_after(statement):
    """Which of the heavy packages a fresh interpreter has imported after the statement."""
    program = f"{statement}\nimport sys\nprint(*(name for name in {HEAVY} if name in sys.modules))"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()


def test_importing_the_package_imports_nothing_heavy():
    assert loaded_after("import osrm_peft; dir(osrm_peft); osrm_peft.__version__") == []


def test_the_command_s_help_needs_nothing_heavy():
    assert loaded_after("import osrm_peft.cli.main") == []


def test_a_public_name_is_imported_when_it_is_used():
    assert "torch" in loaded_after("import osrm_peft; osrm_peft.TaskFeatures")
    assert {"merge_adapters", "OSRMLoraConfig", "LeastSquares", "register"} <= set(osrm_peft.__all__)


def test_what_torch_leaves_in_memory_is_not_looked_through_again():
    program = "import gc; from osrm_peft.cli.app import load_torch; load_torch(); print(gc.get_freeze_count())"
    done = subprocess.run([sys.executable, "-c", f"{program}; assert gc.isenabled()"], capture_output=True, check=True)
    assert int(done.stdout) > 10**5


# What commands on files may import besides torch and safetensors, with what these import themselves.
COMMAND = "typer click rich markdown_it mdurl pygments shellingham annotated_doc"
OF_TYPER = "pydantic pydantic_core annotated_types typing_inspection typing_extensions"
CARD = "jinja2 markupsafe huggingface_hub filelock httpx2 httpcore2 httpx httpcore idna certifi h11 anyio"
PICTURE = "matplotlib mpl_toolkits PIL contourpy cycler dateutil fontTools kiwisolver packaging pyparsing six"
NAMES = None  # transformers, asked for the names of a model's tensors, with what it imports itself
NEVER = {"peft", "datasets", "evaluate", "sklearn", "pandas"}
# [what is done, the libraries that it may import besides those of the lines before], from few to many
STAGES = [
    ["inspect a b", f"{COMMAND} {OF_TYPER} lazy_loader regex tqdm yaml"],
    ["merge a b --out dry --dry-run", ""],
    ["merge a b --method ties --rank 2 --out merged", CARD],
    ["merge a b --method emr --out emr", ""],
    ["inspect a=merged", ""],
    [
        "python: from osrm_peft import load_adapter, merge_adapters\n"
        "merge_adapters({'a': load_adapter('a'), 'b': 'b'}, 'tsv').save_pretrained('by_python')",
        "",
    ],
    ["interference a b --out interference", PICTURE],
    ["inspect a b --spectrum --out spectrum", ""],
    ["merge-checkpoints m1 m2 --base-model m0 --method ties --out models", ""],
    ["merge-checkpoints m1 m2 --heads classifier* --out with_heads", NAMES],
    ["bake m0 a --out baked", NAMES],
    ["extract m0 m1 --out extracted", NAMES],
]

PROGRAM = """
import json, sys
import torch, safetensors.torch

def libraries():
    places = {name.partition(".")[0]: getattr(module, "__file__", None) or "" for name, module in sys.modules.items()}
    return {name for name, place in places.items() if "-packages" in place}

seen, told = libraries(), []
for stage, _ in json.load(sys.stdin):
    if stage.startswith("python: "):
        exec(stage.removeprefix("python: "))
    else:
        from osrm_peft.cli.main import app
        app(["--quiet", *stage.split()], standalone_mode=False)
    told.append([stage, sorted(libraries() - seen), "huggingface_hub.hf_api" in sys.modules])
    seen |= libraries()
print("told:", json.dumps(told))
"""


def write_adapter(folder, seed, base):
    """A LoRA adapter of a tiny BERT with a head, as PEFT writes it."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"classifier.weight": (3, 16), "classifier.bias": (3,)}
    for layer in ("query", "value"):
        name = f"bert.encoder.layer.0.attention.self.{layer}"
        tensors |= {f"{name}.lora_A.weight": (2, 16), f"{name}.lora_B.weight": (16, 2)}
    folder.mkdir()
    drawn = {f"base_model.model.{name}": torch.randn(*shape, generator=generator) for name, shape in tensors.items()}
    save_file(drawn, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "SEQ_CLS", "r": 2, "lora_alpha": 4, "base_model_name_or_path": base}
    config |= {"target_modules": ["query", "value"], "modules_to_save": ["classifier", "score"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_commands_on_files_import_what_they_need(tmp_path):
    """One after another in one process; none asks the network, trains, or imports what trains."""
    for seed, name in enumerate("ab", 1):
        write_adapter(tmp_path / name, seed, "m0")
    for seed in range(3):
        noisy(tmp_path / f"m{seed}", seed)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(STAGES), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.rpartition("told: ")[2])
    for (stage, new, asks_the_hub), (_, may) in zip(told, STAGES, strict=True):
        assert not NEVER & set(new), stage
        if may is not NAMES:
            assert set(new) <= set(may.split()) and not asks_the_hub, stage
