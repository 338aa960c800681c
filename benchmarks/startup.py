"""How long commands on small files take beside the import of torch and safetensors, which they need.

    python benchmarks/startup.py               # about 2 minutes on 2 cores
    python benchmarks/startup.py --rounds 3    # fewer rounds

Each line is a process of its own. The lines take turns, and the least time of all rounds counts: other programs on the
machine only add to it. Two adapters of MiniLM's shape (q and v, r = 16) and two models of three matrices are made up.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

WIDTH, BLOCKS, RANK = 384, 6, 16
IMPORT = "python -c 'import torch, safetensors.torch'"
LINES = {
    IMPORT: [sys.executable, "-c", "import torch, safetensors.torch"],
    "osrm-peft merge": ["merge", "a", "b", "--out", "merged", "--overwrite"],
    "osrm-peft merge --dry-run": ["merge", "a", "b", "--out", "dry", "--dry-run"],
    "osrm-peft inspect": ["inspect", "a", "b"],
    "osrm-peft interference": ["interference", "a", "b", "--out", "interference"],
    "osrm-peft merge-checkpoints": ["merge-checkpoints", "m", "n", "--out", "model", "--overwrite"],
    "python -c 'from osrm_peft import merge_adapters'": [sys.executable, "-c", "from osrm_peft import merge_adapters"],
    "python -c 'import peft'": [sys.executable, "-c", "import peft"],
}
console = Console(width=None if sys.stdout.isatty() else 120)


def main() -> None:
    """Run all lines in turns, and print the least time of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    least = dict.fromkeys(LINES, (float("inf"), float("inf")))
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder))
        for _ in range(arguments.rounds):
            for line, words in LINES.items():
                least[line] = tuple(map(min, least[line], _times(words, folder)))  # type: ignore[assignment]
    table = Table(
        "process", "seconds", "times the import", "of the processor", "times the import",
        title=f"The least of {arguments.rounds} rounds, {torch.get_num_threads()} threads, torch {torch.__version__}",
    )  # fmt: skip
    for line, times in least.items():
        cells = [
            text for one, of in zip(times, least[IMPORT], strict=True) for text in (f"{one:.2f}", f"{one / of:.2f}")
        ]
        table.add_row(line, *cells)
    console.print(table)


def _times(words: list[str], folder: str) -> tuple[float, float]:
    """Seconds, and seconds of the processor, of one process."""
    command = words if words[0] == sys.executable else [sys.executable, "-m", "osrm_peft", "--quiet", *words]
    before = os.times()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    used = sum(after[2:4]) - sum(before[2:4])  # of children: user and system
    return after.elapsed - before.elapsed, used


def _write(folder: Path) -> None:
    """Two adapters and two models."""
    for seed, (adapter, model) in enumerate(("am", "bn")):
        generator = torch.Generator().manual_seed(seed)
        factors = {
            f"base_model.model.bert.encoder.layer.{block}.attention.self.{layer}.lora_{half}.weight": torch.randn(
                *((RANK, WIDTH) if half == "A" else (WIDTH, RANK)), generator=generator
            )
            for block in range(BLOCKS)
            for layer in ("query", "value")
            for half in "AB"
        }
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "target_modules": ["query", "value"]}
        weights = {
            f"model.layers.0.mlp.{name}_proj.weight": torch.randn(WIDTH, WIDTH, generator=generator)
            for name in ("up", "gate", "down")
        }
        for place, tensors, file, fields in (
            (adapter, factors, "adapter_model.safetensors", config | {"base_model_name_or_path": "user/base"}),
            (model, weights, "model.safetensors", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}),
        ):
            (folder / place).mkdir()
            save_file(tensors, folder / place / file, {"format": "pt"})
            name = "adapter_config.json" if place == adapter else "config.json"
            (folder / place / name).write_text(json.dumps(fields))


if __name__ == "__main__":
    main()
