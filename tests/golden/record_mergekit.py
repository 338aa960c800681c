"""Record what mergekit makes of known LoRA adapters: `mergekit.safetensors`, which test_mergekit.py reads.

    python -m venv mergekit-env && mergekit-env/bin/pip install mergekit     # an environment of its own
    mergekit-env/bin/python tests/golden/record_mergekit.py                  # about a minute

Nothing of osrm_peft or PEFT takes part. The adapters' A and B and the base weights are drawn here. As mergekit merges
checkpoints, each adapter is baked into full weights, W + s·B·A in float32. Recorded are A, B and the merged deltas,
merged − W; and in the metadata the versions, the command and every configuration. No network, no tokenizer.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

OUT = Path(__file__).with_name("mergekit.safetensors")
FLAGS = ["--no-copy-tokenizer", "--no-write-model-card", "--quiet"]
RANK, ALPHA = 4, 8
CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,  # v_proj is 8×16, q_proj 16×16: layers of two sizes
    max_position_embeddings=32,
    tie_word_embeddings=False,
)
LAYERS = {
    f"model.layers.{i}.self_attn.{name}": (o, 16) for i in range(2) for name, o in (("q_proj", 16), ("v_proj", 8))
}


def ties(weights: list[float], density: float, adapters: str = "a b c") -> dict:
    models = zip(adapters.split(), weights, strict=True)
    return {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": name, "parameters": {"weight": w, "density": density}} for name, w in models],
        "parameters": {"normalize": True},
    }


CONFIGS = {
    "task_arithmetic": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": name, "parameters": {"weight": w}} for name, w in (("a", 1.0), ("b", -0.5), ("c", 0.7))],
        "parameters": {"lambda": 0.3, "normalize": False},
    },
    "linear": {
        "merge_method": "linear",
        "models": [{"model": name, "parameters": {"weight": w}} for name, w in (("a", 1.0), ("b", 2.0), ("c", 0.5))],
        "parameters": {"normalize": True},
    },
    "ties": ties([1.0, 1.0, 1.0], 0.25),
    "ties_alone": ties([1.0], 0.2, "a"),
    "ties_weighted": ties([1.0, 3.0, 0.5], 1.0),
    "ties_equal_entries": ties([1.0], 0.25, "signs"),
    "ties_opposite": ties([1.0, 1.0], 1.0, "signs opposite"),
}


def draw_adapters() -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """{adapter: {layer: (A, B)}}: a, b and c are random; every entry of s·B·A is ±2 in signs, and ∓2 in opposite."""
    generator = torch.Generator().manual_seed(0)
    adapters: dict[str, dict[str, tuple[Tensor, Tensor]]] = {name: {} for name in ("a", "b", "c", "signs", "opposite")}
    for layer, (o, n) in LAYERS.items():
        spread = 0.02 if ".1." in layer else 0.01  # trimmed over the model, the second block keeps more
        for name in "abc":
            B = spread * torch.randn(o, RANK, generator=generator)
            adapters[name][layer] = torch.randn(RANK, n, generator=generator), B
        A, B = torch.zeros(RANK, n), torch.zeros(o, RANK)
        A[0] = torch.randn(n, generator=generator).sign()
        B[:, 0] = torch.randn(o, generator=generator).sign()
        adapters["signs"][layer], adapters["opposite"][layer] = (A, B), (A.clone(), -B)
    return adapters


def draw_base() -> LlamaForCausalLM:
    """Random weights, multiples of 2⁻⁸: W ± 2 is exact, so that equal entries of a delta stay equal when baked in."""
    generator = torch.Generator().manual_seed(1)
    model = LlamaForCausalLM(CONFIG).float()
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.copy_((0.2 * 2**8 * torch.randn(parameter.shape, generator=generator)).round() / 2**8)
    return model


def run_mergekit(folder: Path, case: str) -> dict[str, Tensor]:
    """The merged weights."""
    (folder / f"{case}.yml").write_text(json.dumps(CONFIGS[case] | {"dtype": "float32", "out_dtype": "float32"}))
    command = [sys.executable, "-m", "mergekit.scripts.run_yaml", f"{case}.yml", f"out-{case}", *FLAGS]
    subprocess.run(command, cwd=folder, check=True)  # JSON is YAML
    return load_file(folder / f"out-{case}" / "model.safetensors")


def main() -> None:
    adapters, model = draw_adapters(), draw_base()
    base = {layer: model.get_submodule(layer).weight.detach().clone() for layer in LAYERS}
    record, largest = {}, 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder / "base")
        for adapter, factors in adapters.items():
            for layer, (A, B) in factors.items():
                baked = base[layer] + ALPHA / RANK * B @ A
                model.get_submodule(layer).weight.data.copy_(baked)
                record |= {f"{adapter}:{layer}:A": A, f"{adapter}:{layer}:B": B}
                largest = max(largest, float(baked.abs().max())) if adapter in ("a", "b", "c") else largest
            model.save_pretrained(folder / adapter)
        for case in CONFIGS:
            merged = run_mergekit(folder, case)
            for layer, W in base.items():
                assert merged[f"{layer}.weight"].dtype == torch.float32
                record[f"{case}:{layer}"] = merged[f"{layer}.weight"] - W
    about = {
        "mergekit": importlib.metadata.version("mergekit"),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "command": " ".join(["mergekit-yaml", "CONFIG", "OUT", *FLAGS]),
        "dtype": "float32",
        "configs": CONFIGS,
        "scale": ALPHA / RANK,
        "largest_weight": largest,  # |W + s·B·A| of a, b and c
    }
    save_file(record, OUT, {"about": json.dumps(about)})
    print(f"{OUT.name}: {OUT.stat().st_size} bytes, mergekit {about['mergekit']}")


if __name__ == "__main__":
    main()
