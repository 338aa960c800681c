"""Merging against the same result computed the usual way, and against PEFT: times and differences in one run.

    python benchmarks/merging.py                 # all of it, about 15 minutes on 2 cores, under 12 GB
    python benchmarks/merging.py --part layer    # one 4096×4096 layer, against dense algorithms
    python benchmarks/merging.py --part llama    # 8 adapters of Llama-3-8B's q and v on disk, read, merged, written
    python benchmarks/merging.py --part memory   # peak memory at 8 and 32 layers

Adapters are made up (random factors, r = 16, alpha = 32). Ratios matter, not seconds: machines differ and drift.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from processes import in_process, peak
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from osrm_peft import load_adapter, merge_adapters
from osrm_peft.adapters.factors import Factors
from osrm_peft.merging.lowrank import compress
from osrm_peft.merging.spaces import enter

T, R, WIDTH = 8, 16, 4096
METHODS: dict[str, dict[str, Any]] = {
    "average": {},
    "task_arithmetic": {},
    "concat": {},
    "ties (core)": {"space": "core"},
    "tsv": {},
    "iso": {},
    "task_arithmetic (knots)": {"space": "knots"},
    "lore": {},
}
PARTS = ["layer", "llama", "memory"]
console = Console(width=None if sys.stdout.isatty() else 120)


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--layers", type=int, default=32, help="blocks of the made-up Llama")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(_one(*arguments.one)))
        return
    parts = arguments.part or PARTS
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {T} adapters, r = {R}")
    if "layer" in parts:
        layer()
    if "llama" in parts:
        llama(arguments.layers)
    if "memory" in parts:
        memory()


def layer() -> None:
    """One 4096×4096 layer: the core against the dense algorithm of each paper."""
    table = Table("what", "here (s)", "the usual way (s)", "ratio", "relative difference", title="One 4096×4096 layer")
    adapters = [_random_factors(WIDTH, WIDTH, seed) for seed in range(T)]
    dense = torch.stack([factors.delta() for factors in adapters])

    core = enter("core", adapters)
    mean = core.stack.mean(0)
    mu = float(0.1 * torch.linalg.matrix_norm(core.stack - mean, ord=2).mean())
    # one iteration: θ₀ = mean(θ − δ), δ_t = SVT(θ_t − θ₀); dense, one of the 8 alike SVTs is timed and counted 8 times
    ours = _timed(lambda: _svt(core.stack - core.stack.mean(0), mu), repeat=3)
    one = _timed(lambda: _svt(dense[0] - dense.mean(0), mu))
    here = core.left @ ours.value[0] @ core.right.mT  # type: ignore[operator, union-attr]
    _row(table, "one LoRE iteration", ours.seconds, T * one.seconds, here, one.value)

    knots = _timed(lambda: enter("knots", adapters))
    published = _timed(lambda: _published_knots(dense))
    U, SV = published.value
    rank = knots.value.stack.shape[1]
    here = torch.stack([knots.value.left @ one for one in knots.value.stack]).float()
    there = torch.stack([U[:, :rank] @ one[:rank] for one in SV])
    _row(table, "KnOTS' decomposition", knots.seconds, published.seconds, here, there)
    # the bases themselves agree up to the sign of each vector
    signs = (knots.value.left * U[:, :rank].double()).sum(0).sign()
    apart = (knots.value.left * signs - U[:, :rank].double()).abs().max()
    console.print(f"KnOTS' basis: largest entry-wise difference {float(apart):.1e}")
    del U, SV, published, here, there

    stacked = torch.cat([f.s * f.B for f in adapters], dim=1), torch.cat([f.A for f in adapters])
    ours = _timed(lambda: compress(*stacked, rank=R), repeat=3)
    total = dense.sum(0)
    usual = _timed(lambda: torch.linalg.svd(total, full_matrices=False))
    U, S, Vh = usual.value
    _row(table, f"recompression to r = {R}", ours.seconds, usual.seconds,
         ours.value.factors.delta(), (U[:, :R] * S[:R]) @ Vh[:R])  # fmt: skip
    console.print(table)


def llama(blocks: int) -> None:
    """8 adapters on disk → one adapter of rank 16 on disk; a process a method; PEFT beside it on one layer."""
    table = Table("method", "read, merge, write (s)", "of it merge (s)", "peak memory (GiB)",
                  title=f"{T} adapters of Llama-3-8B's q and v, {blocks} blocks, to rank {R}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        write_adapters(Path(folder), blocks)
        for method in METHODS:
            done = in_process(__file__, method, folder)
            table.add_row(method, f"{done['seconds']:.2f}", f"{done['merge']:.2f}", f"{done['peak'] / 2**30:.2f}")
        copied, decomposed = _limits(Path(folder))
        table.add_row("the bytes read, an eighth of them written", f"{copied:.2f}", "", "")
        table.add_row("a QR of all stacked factors, float64", f"{decomposed:.2f}", "", "")
        console.print(table)
    _beside_peft()


def memory() -> None:
    """Peak memory of one merge at 8 and at 32 blocks."""
    table = Table("method", "8 blocks (GiB)", "32 blocks (GiB)", "growth", "of it the result",
                  title="Peak memory, adapters of 16 and of 64 layers")  # fmt: skip
    with tempfile.TemporaryDirectory() as few, tempfile.TemporaryDirectory() as many:
        write_adapters(Path(few), 8)
        write_adapters(Path(many), 32)
        for method in ("task_arithmetic", "ties (core)"):
            small, large = (in_process(__file__, method, folder) for folder in (few, many))
            growth = large["peak"] - small["peak"]
            # held once as merged, once as the tensors that are being written
            result = 2 * (large["written"] - small["written"])
            table.add_row(method, f"{small['peak'] / 2**30:.3f}", f"{large['peak'] / 2**30:.3f}",
                          f"{growth / 2**20:.0f} MiB", f"{result / 2**20:.0f} MiB")  # fmt: skip
    console.print(table)


def _beside_peft() -> None:
    """PEFT's add_weighted_adapter on one 4096×4096 layer, and ours on the same adapters."""
    table = Table("merge of one layer", "here (s)", "PEFT (s)", "ratio", "relative difference",
                  title="Beside PEFT's add_weighted_adapter")  # fmt: skip
    model = nn.ModuleDict({"q_proj": nn.Linear(WIDTH, WIDTH, bias=False)})
    config = LoraConfig(r=R, lora_alpha=2 * R, target_modules=["q_proj"])
    peft_model = get_peft_model(model, config, adapter_name="t0")  # type: ignore[arg-type]
    for seed in range(1, T):
        peft_model.add_adapter(f"t{seed}", config)
    wrapped: Any = peft_model.base_model.model["q_proj"]
    for seed in range(T):
        factors = _random_factors(WIDTH, WIDTH, seed)
        wrapped.lora_A[f"t{seed}"].weight.data.copy_(factors.A)
        wrapped.lora_B[f"t{seed}"].weight.data.copy_(factors.B)
    names = [f"t{seed}" for seed in range(T)]
    adapters = {name: load_adapter(peft_model, adapter_name=name) for name in names}
    for combination, method, arguments in (
        ("svd", "task_arithmetic", {"scale": 1.0, "rank": R}),
        ("cat", "concat", {}),
    ):
        options = {"svd_rank": R} if combination == "svd" else {}
        theirs = _timed(
            lambda combination=combination, options=options: peft_model.add_weighted_adapter(
                names, [1.0] * T, combination, combination_type=combination, **options
            )
        )
        ours = _timed(lambda method=method, arguments=arguments: merge_adapters(adapters, method, **arguments))
        here, there = ours.value.deltas()["q_proj"], wrapped.get_delta_weight(combination).detach()
        _row(table, f"{combination}: {method}", ours.seconds, theirs.seconds, here, there)
    console.print(table)


def _one(method: str, folder: str) -> dict[str, float]:
    """Read, merge and write in this process; its times and its peak memory."""
    start = time.perf_counter()
    adapters = {path.name: str(path) for path in sorted(Path(folder).glob("adapter*"))}
    before = time.perf_counter()
    merged = merge_adapters(adapters, method.split(" (")[0], rank=R, **METHODS[method])
    merge = time.perf_counter() - before
    with tempfile.TemporaryDirectory() as out:
        merged.save_pretrained(Path(out) / "merged")
        seconds = time.perf_counter() - start
        written = (Path(out) / "merged/adapter_model.safetensors").stat().st_size
    return {"seconds": seconds, "merge": merge, "peak": peak() * 2**20, "written": written}


def _limits(folder: Path) -> tuple[float, float]:
    """Seconds to read the adapters' bytes and write as many as one has; and for LAPACK's QR of each layer's stacks."""
    files = sorted(folder.glob("adapter*/adapter_model.safetensors"))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        for number, file in enumerate(files):
            content = file.read_bytes()
            if number == 0:
                Path(out, "written").write_bytes(content)
    copied = time.perf_counter() - start
    stacks: dict[str, list[Tensor]] = {}
    for file in files:
        for name, tensor in load_file(file).items():
            stacks.setdefault(name, []).append(tensor if len(tensor) > R else tensor.mT)
    start = time.perf_counter()
    for parts in stacks.values():
        torch.linalg.qr(torch.cat(parts, 1).double())
    return copied, time.perf_counter() - start


class _Timed:
    def __init__(self, seconds: float, value: Any) -> None:
        self.seconds, self.value = seconds, value


def _timed(work: Callable[[], Any], repeat: int = 1) -> _Timed:
    """The median of the times, and the last value."""
    times, value = [], None
    for _ in range(repeat):
        start = time.perf_counter()
        value = work()
        times.append(time.perf_counter() - start)
    return _Timed(sorted(times)[len(times) // 2], value)


def _row(table: Table, what: str, here: float, usual: float, ours: Tensor, theirs: Tensor) -> None:
    apart = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
    table.add_row(what, f"{here:.3f}", f"{usual:.1f}", f"{usual / here:.0f}×", f"{apart:.1e}")


def _published_knots(dense: Tensor) -> tuple[Tensor, list[Tensor]]:
    """[τ_1 … τ_T] = U Σ [V_1ᵀ … V_Tᵀ] in float64, as KnOTS is published: U and the Σ V_tᵀ."""
    U, S, Vh = torch.linalg.svd(torch.cat(list(dense), dim=1).double(), full_matrices=False)
    return U.float(), [(S[:, None] * V).float() for V in Vh.split(dense.shape[2], dim=1)]


def _random_factors(o: int, n: int, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(R, n, generator=generator) / n**0.5
    return Factors(A, torch.randn(o, R, generator=generator) / 100, 2.0)


def write_adapters(folder: Path, blocks: int) -> None:
    """8 adapters as PEFT would have saved them for Llama-3-8B (q: 4096×4096, v: 1024×4096)."""
    config = LoraConfig(r=R, lora_alpha=2 * R, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    config.base_model_name_or_path = "made-up/Llama-3-8B"
    for t in range(T):
        tensors = {}
        for block in range(blocks):
            for place, (name, o) in enumerate((("q_proj", WIDTH), ("v_proj", 1024))):
                factors = _random_factors(o, WIDTH, seed=1000 * t + 2 * block + place)
                layer = f"base_model.model.model.layers.{block}.self_attn.{name}"
                tensors |= {f"{layer}.lora_A.weight": factors.A, f"{layer}.lora_B.weight": factors.B}
        (folder / f"adapter{t}").mkdir(parents=True)
        save_file(tensors, folder / f"adapter{t}/adapter_model.safetensors", {"format": "pt"})
        config.save_pretrained(str(folder / f"adapter{t}"))


def _svt(X: Tensor, mu: float) -> Tensor:
    """(…, o, n) singular value thresholding by full SVDs."""
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    return (U * (S - mu).clamp_min(0)[..., None, :]) @ Vh


if __name__ == "__main__":
    main()
