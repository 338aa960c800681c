"""The same merges by mergekit and here, in one run: times and the difference of the results.

    python -m venv mergekit-env && mergekit-env/bin/pip install mergekit      # an environment of its own
    python benchmarks/beside_mergekit.py --mergekit mergekit-env/bin/mergekit-yaml     # minutes, 2 GB of disk

mergekit merges checkpoints: 8 adapters (r = 16, alpha = 32) on q and v of one made-up Llama block of width 4096 are
baked into full weights first, which is not timed. Here the adapters themselves are read, merged, and written.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from merging import T, write_adapters
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from osrm_peft import load_adapter, merge_adapters

# {name: (mergekit's configuration, ours)}: trims are by tensor there
MERGES: dict[str, tuple[dict[str, Any], tuple[str, dict[str, Any]]]] = {
    "task_arithmetic": (
        {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.3, "normalize": False}},
        ("task_arithmetic", {"scale": 0.3}),
    ),
    "linear": ({"merge_method": "linear", "parameters": {"normalize": True}}, ("average", {})),
    "ties": (
        {"merge_method": "ties", "parameters": {"density": 0.25, "normalize": True}},
        ("ties", {"density": 0.25, "trim": "layer"}),
    ),
}


def main() -> None:
    """Bake, run both on each merge, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", required=True, help="path of mergekit-yaml")
    mergekit = Path(parser.parse_args().mergekit).absolute()
    if not mergekit.is_file():
        parser.error(f"--mergekit {mergekit} is not a file: install mergekit in an environment of its own")
    table = Table("merge", "here (s)", "mergekit (s)", "ratio", "relative difference",
                  title=f"Beside mergekit: {T} adapters, q and v of one block of width 4096")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_adapters(root, 1)
        adapters = {path.name: str(path) for path in sorted(root.glob("adapter*"))}
        base = _bake(root, adapters)
        for name, (config, (method, options)) in MERGES.items():
            start = time.perf_counter()
            ours = merge_adapters(adapters, method, **options)
            ours.save_pretrained(root / f"ours_{name}")
            here = time.perf_counter() - start
            models = [{"model": f"baked_{task}", "parameters": {"weight": 1.0}} for task in adapters]
            based = {} if name == "linear" else {"base_model": "base"}
            content = config | based | {"models": models, "dtype": "float32"}
            (root / "merge.yaml").write_text(yaml.safe_dump(content))
            command = [
                mergekit,
                "merge.yaml",
                f"theirs_{name}",
                "--no-copy-tokenizer",
                "--no-write-model-card",
                "--quiet",
            ]
            start = time.perf_counter()
            done = subprocess.run(command, cwd=root, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True)
            there = time.perf_counter() - start
            if done.returncode:
                sys.exit(done.stderr.decode()[-2000:])
            merged = load_file(root / f"theirs_{name}/model.safetensors")
            squares = [0.0, 0.0]
            for layer, delta in ours.deltas().items():
                theirs = (merged[f"{layer}.weight"] - base[f"{layer}.weight"]).double()
                squares[0] += float((delta - theirs).square().sum())
                squares[1] += float(theirs.square().sum())
            apart = (squares[0] / squares[1]) ** 0.5
            table.add_row(name, f"{here:.2f}", f"{there:.1f}", f"{there / here:.0f}×", f"{apart:.1e}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _bake(root: Path, adapters: dict[str, str]) -> dict[str, torch.Tensor]:
    """Write the base and, an adapter each, W + s·B·A as checkpoints; the base's weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 4096, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 32}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=32, num_key_value_heads=8))
    model.save_pretrained(root / "base")
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for task, folder in adapters.items():
        model.load_state_dict(base)
        with torch.no_grad():
            for layer, factors in load_adapter(folder).factors.items():
                model.get_submodule(layer).weight += factors.delta()
        model.save_pretrained(root / f"baked_{task}")
    return base


if __name__ == "__main__":
    main()
