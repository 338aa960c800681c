"""Merging full checkpoints: throughput beside `cp` and mergekit, peak memory, and LoRE beside full SVDs, in one run.

    python -m venv mergekit-env && mergekit-env/bin/pip install mergekit      # an environment of its own
    python benchmarks/checkpoints.py --mergekit mergekit-env/bin/mergekit-yaml     # minutes; 8 GB of disk and of memory
    python benchmarks/checkpoints.py --part lore     # one part: throughput, memory, lore, forecast

Models are made up (Llama's layout, width 2048). Each throughput is the better of two, the ways by turns; the page cache
holds the inputs. Ratios matter, not seconds: machines differ and drift.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from processes import in_process, peak
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from osrm_peft import merge_checkpoints
from osrm_peft.checkpoints.forecast import Forecast, forecast
from osrm_peft.checkpoints.plan import plan_checkpoints
from osrm_peft.io.tensors import file_head
from osrm_peft.merging.methods.lore import lore

T, WIDTH, VOCABULARY, SEED = 3, 2048, 32000, 0
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MERGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # name: (mergekit's, ours)
    "average": ({"merge_method": "linear", "parameters": {"normalize": True}}, {"method": "average"}),
    "task_arithmetic": (
        {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.3, "normalize": False}},
        {"method": "task_arithmetic", "scale": 0.3},
    ),
    "ties": (
        {"merge_method": "ties", "parameters": {"density": 0.2, "normalize": True}},
        {"method": "ties", "density": 0.2},
    ),
}
SHAPES = {  # Llama's: width, of the MLP, layers, of keys and values, vocabulary
    "7B": (4096, 11008, 32, 4096, 32000),
    "70B": (8192, 28672, 80, 1024, 128256),
    "405B": (16384, 53248, 126, 1024, 128256),
}
ITERATIONS, MU_RATIO = 2, 0.1
PARTS = ["throughput", "memory", "lore", "forecast"]
console = Console(width=None if sys.stdout.isatty() else 120)


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path, help="path of mergekit-yaml, for the part throughput")
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(_one(*arguments.one)))
        return
    parts = arguments.part or PARTS
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if "throughput" in parts:
        throughput(arguments.mergekit)
    if "memory" in parts:
        memory()
    if "lore" in parts:
        speed_of_lore()
    if "forecast" in parts:
        forecasts()


# --- throughput ------------------------------------------------------------------------------------------------------


def throughput(mergekit: Path | None) -> None:
    """Bytes of the inputs a second: beside `cp` of the same files, and as commands beside mergekit's."""
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            models, base = write_models(root, layers=2 if dtype == torch.float32 else 8, dtype=dtype)
            os.sync()  # else the first ways would share the disk with these models
            size = sum(path.stat().st_size for path in root.glob("model*/*.safetensors"))
            name = str(dtype).removeprefix("torch.")
            table = _table(
                f"{T} models of {size / T / 1e9:.2f} GB in {name}: GB of models a second",
                "merge", "here", "cp", "here / cp", "our command", "mergekit", "ours / mergekit", "largest difference",
            )  # fmt: skip
            for merge in MERGES:
                table.add_row(merge, *_row(merge, root, models, base, name, size, mergekit))
            console.print(table)


def _row(
    merge: str, root: Path, models: dict[str, Path], base: Path, dtype: str, size: int, mergekit: Path | None
) -> list[str]:
    theirs, ours = MERGES[merge]
    ways: dict[str, Callable[[], Any]] = {
        "cp": lambda: _run("cp", "-r", *models.values(), root / "copied"),
        "here": lambda: merge_checkpoints(models, root / "ours", base=_base(base, ours), overwrite=True, **ours),
        "command": lambda: _run(*_command(models, base, root / "command", ours)),
    }
    if mergekit is not None:
        (root / "config.yaml").write_text(yaml.safe_dump(_mergekit_config(theirs, models, base, dtype)))
        ways["mergekit"] = lambda: _run(mergekit, root / "config.yaml", root / "theirs")
    best = {way: size / 1e9 / seconds for way, seconds in _by_turns(ways, root).items()}
    row = [f"{best['here']:.2f}", f"{best['cp']:.2f}", f"{best['here'] / best['cp']:.2f}", f"{best['command']:.2f}"]
    if mergekit is not None:
        differs = "another trim" if merge == "ties" else _difference(root)  # mergekit trims tensors, not the model
        row += [f"{best['mergekit']:.2f}", f"{best['command'] / best['mergekit']:.1f}", differs]
    return row


def write_models(root: Path, layers: int, dtype: torch.dtype) -> tuple[dict[str, Path], Path]:
    """A base and T models near it."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=WIDTH * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=16,
    )  # fmt: skip
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(root / "base")
    with torch.no_grad():
        for place in range(T):
            for parameter in model.parameters():
                parameter.add_(_step(parameter))
            model.save_pretrained(root / f"model{place}")
    return {f"model{place}": root / f"model{place}" for place in range(T)}, root / "base"


def _step(parameter: Tensor) -> Tensor:
    """What fine-tuning may do: few strong directions (a matrix of full rank has no use for LoRE)."""
    if parameter.dim() < 2:
        return 1e-3 * torch.randn_like(parameter)
    o, n = parameter.shape
    falling = torch.arange(1, 65) ** -0.8
    return ((torch.randn(o, 64) * falling) @ torch.randn(64, n) * 1e-3).to(parameter.dtype)


def _run(*command: object) -> None:
    if command[0] == "cp":
        Path(str(command[-1])).mkdir()
    subprocess.run([str(part) for part in command], check=True, capture_output=True)


def _command(models: dict[str, Path], base: Path, out: Path, ours: dict[str, Any]) -> list[object]:
    scale = ["--scale", ours["scale"]] if "scale" in ours else []
    under = [] if _base(base, ours) is None else ["--base-model", base]
    command = [sys.executable, "-m", "osrm_peft", "merge-checkpoints", *models.values(), *under]
    return [*command, "--out", out, "--overwrite", "--method", ours["method"], *scale]


def _base(base: Path, ours: dict[str, Any]) -> Path | None:
    """An average reads no base, here as in mergekit."""
    return None if ours["method"] == "average" else base


def _mergekit_config(theirs: dict[str, Any], models: dict[str, Path], base: Path, dtype: str) -> dict[str, Any]:
    density = {name: value for name, value in theirs["parameters"].items() if name == "density"}
    weighted = [{"model": str(path), "parameters": {"weight": 1.0, **density}} for path in models.values()]
    under = {} if theirs["merge_method"] == "linear" else {"base_model": str(base)}
    return {**theirs, **under, "models": weighted, "dtype": dtype}


def _by_turns(ways: dict[str, Callable[[], Any]], root: Path) -> dict[str, float]:
    """Seconds of each, the better of two; each writes into an empty place."""
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(2):
        for way, run in ways.items():
            written = {"cp": "copied", "here": "ours", "command": "command", "mergekit": "theirs"}[way]
            shutil.rmtree(root / written, ignore_errors=True)
            start = time.perf_counter()
            run()
            found[way].append(time.perf_counter() - start)
    return {way: min(seconds) for way, seconds in found.items()}


def _difference(root: Path) -> str:
    """Largest difference of our result and mergekit's, in the dtype's rounding of the largest that was added."""
    ours, theirs, *added = (
        _tensors(root / name) for name in ("ours", "theirs", "base", *(f"model{t}" for t in range(T)))
    )
    assert set(ours) == set(theirs)
    most = 0.0
    for name, tensor in ours.items():
        unit = torch.stack([one[name].float().abs() for one in added]).amax(0) * torch.finfo(tensor.dtype).eps
        differs = (tensor.float() - theirs[name].float()).abs()
        most = max(most, float((differs / unit.clamp_min(1e-30)).max()))
    return f"{most:.1f} ulp"


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


# --- memory ----------------------------------------------------------------------------------------------------------


def memory() -> None:
    """Peak memory of a process that merges, over that of one that only imports, at two sizes of model."""
    table = _table(
        f"Peak memory of merging {T} float32 models (MiB)",
        "method", "model", "largest tensor", "allowed", "peak",
    )  # fmt: skip
    for layers in (1, 4):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            write_models(root, layers, torch.float32)
            files = list((root / "base").glob("*.safetensors"))
            model, largest = (sum(path.stat().st_size for path in files) / 2**20, VOCABULARY * WIDTH * 4 / 2**20)
            for method in ("average", "task_arithmetic", "ties", "lore"):
                peak = in_process(__file__, method, folder)["peak"]
                allowed = (T + 2) * largest + 500
                table.add_row(method, f"{model:.0f}", f"{largest:.0f}", f"{allowed:.0f}", f"{peak:.0f}")
    console.print(table)


def _one(method: str, folder: str) -> dict[str, float]:
    """The peak memory of this process, which merges."""
    root, options = Path(folder), {"max_iterations": 2} if method == "lore" else {}
    models = {f"model{place}": root / f"model{place}" for place in range(T)}
    base = None if method in ("average", "lore") else root / "base"
    before = peak()
    merge_checkpoints(models, root / f"out_{method}", method, base=base, **options)
    shutil.rmtree(root / f"out_{method}")
    return {"peak": peak() - before}


# --- LoRE ------------------------------------------------------------------------------------------------------------


def speed_of_lore() -> None:
    """The same iterations with full SVDs, and here."""
    table = _table(
        f"LoRE, {ITERATIONS} iterations over {T} matrices, μ = {MU_RATIO} of the top singular value",
        "matrix", "full SVDs (s)", "here (s)", "times faster", "difference of θ*",
    )  # fmt: skip
    for o, n in ((WIDTH, WIDTH), (WIDTH, 4 * WIDTH)):
        tau = decaying(o, n)
        start = time.perf_counter()
        found = lore(tau, torch.ones(T), mu_ratio=MU_RATIO, max_iterations=ITERATIONS, tolerance=0)
        ours = time.perf_counter() - start
        start = time.perf_counter()
        expected = plain_lore(tau)
        plain = time.perf_counter() - start
        assert found.offset is not None
        error = (found.offset + found.direction - expected).norm() / expected.norm()
        table.add_row(f"{o}×{n}", f"{plain:.1f}", f"{ours:.2f}", f"{plain / ours:.0f}", f"{error:.1e}")
    console.print(table)


def decaying(o: int, n: int) -> Tensor:
    """(T, o, n) made-up task vectors: singular values that fall as i^−0.8 over a flat floor."""
    generator = torch.Generator().manual_seed(SEED)
    found = []
    for _ in range(T):
        U = torch.linalg.qr(torch.randn(o, min(o, n), generator=generator)).Q
        V = torch.linalg.qr(torch.randn(n, min(o, n), generator=generator)).Q
        S = torch.arange(1, min(o, n) + 1) ** -0.8 + 0.01
        found.append((U * S) @ V.mT)
    return torch.stack(found)


def plain_lore(theta: Tensor) -> Tensor:
    """θ₀ + Σ δ by Algorithm 1 as printed, in float32."""
    mu = MU_RATIO * float(torch.linalg.matrix_norm(theta - theta.mean(0), ord=2).mean())
    delta = torch.zeros_like(theta)
    for _ in range(ITERATIONS):
        base = (theta - delta).mean(0)
        for place in range(len(theta)):
            U, S, Vh = torch.linalg.svd(theta[place] - base, full_matrices=False)
            delta[place] = (U * (S - mu).clamp_min(0)) @ Vh
    return base + delta.sum(0)


# --- forecasts -------------------------------------------------------------------------------------------------------


def forecasts() -> None:
    """What a dry run says beside what the merge took, at two sizes; and what it says of large models."""
    table = _table(f"{T} float32 models: forecast and merge", "method", "model (GB)", "forecast (s)", "merge (s)")
    for layers in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            models, base = write_models(root, layers, torch.float32)
            size = sum(path.stat().st_size for path in base.glob("*.safetensors")) / 1e9
            for method in ("average", "ties", "lore"):
                said = _forecast(models, base, method)
                start = time.perf_counter()
                merge_checkpoints(models, root / method, base=base, method=method)
                table.add_row(method, f"{size:.2f}", f"{said.seconds:.1f}", f"{time.perf_counter() - start:.1f}")
                shutil.rmtree(root / method)
    console.print(table)
    table = _table("Forecasts for bfloat16 models", "model", "method", "time", "memory (GiB)")
    for name in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            models, base = write_outlines(Path(folder), *SHAPES[name])
            for method in ("average", "ties"):  # LoRE's time is the spectra's
                said = _forecast(models, base, method)
                table.add_row(name, method, f"{said.seconds / 3600:.1f} h", f"{said.memory / 2**30:.1f}")
    console.print(table)


def _forecast(models: dict[str, Path], base: Path, method: str) -> Forecast:
    given: dict[str, Any] = {"weights": None, "scale": None, "heads": (), "vocab": "error", "tokenizer": None}
    plan = plan_checkpoints(models, method, base=base, dtype=None, shard_size="5GB", seed=SEED, **given)
    return forecast(plan)


def write_outlines(
    root: Path, width: int, inner: int, layers: int, narrow: int, words: int
) -> tuple[dict[str, Path], Path]:
    """Models whose files are holes: zeros that take no room."""
    config = LlamaConfig(
        vocab_size=words, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=width // 128, num_key_value_heads=narrow // 128, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: tuple(one.shape) for name, one in LlamaForCausalLM(config).state_dict().items()}
    names = ["base", *(f"model{place}" for place in range(T))]
    places = {name: root / name for name in names}
    for folder in places.values():
        folder.mkdir()
        config.save_pretrained(folder)
        with (folder / "model.safetensors").open("wb") as file:
            file.write(file_head(shapes, dict.fromkeys(shapes, torch.bfloat16), {"format": "pt"}))
            file.truncate(file.tell() + 2 * sum(torch.Size(shape).numel() for shape in shapes.values()))
    return {name: places[name] for name in names[1:]}, places["base"]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    return table


if __name__ == "__main__":
    main()
