"""One GPU beside the CPUs of its machine, and the library beside torch on the same card, in one run.

    python benchmarks/gpu.py --out gpu.json      # all of it; sizes are meant for 8 minutes on one card
    python benchmarks/gpu.py --only lore         # one part: features, quantised, choose, lore, adapters, weights
    python benchmarks/gpu.py --small             # sizes for a CPU, to try the program: no numbers to go by

Models and adapters are made up. The table is Markdown. Ratios matter, not seconds.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from merging import METHODS, write_adapters
from torch import Tensor
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from osrm_peft import collect_features, merge_adapters
from osrm_peft.features import moments as moments_module
from osrm_peft.features.moments import FeatureMoments
from osrm_peft.merging.methods.lore import lore
from osrm_peft.osrm.spectrum import PooledMoment, Spectrum
from osrm_peft.osrm.subspace import choose_directions

RANK, OTHERS, T, ITERATIONS, MU_RATIO = 16, 3, 3, 2, 0.1
QV = ["q_proj", "v_proj"]
OBJECTIVES: dict[str, dict[str, Any]] = {
    "least_energy": {},
    "difference": {"objective": "difference"},
    "ratio": {"objective": "ratio"},
}
CPU = torch.device("cpu")


def main() -> None:
    """Run the parts that are asked for."""
    parts = {
        "features": features,
        "quantised": quantised,
        "choose": choose,
        "lore": full_matrices,
        "adapters": adapters,
        "weights": in_weights,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(parts), action="append")
    parser.add_argument("--out", type=Path, help="JSON file of all numbers")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.small:
        sys.exit("no CUDA device: nothing is measured (--small tries the program on a CPU)")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU: both columns are the CPU's"
    print(f"{card}, torch {torch.__version__}, transformers {transformers.__version__}, "
          f"{torch.get_num_threads()} CPU threads")  # fmt: skip
    found: dict[str, Any] = {"card": card, "torch": torch.__version__, "small": arguments.small}
    for name in arguments.only or parts:
        found[name] = parts[name](device, arguments.small)
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(found, indent=1))


# --- features --------------------------------------------------------------------------------------------------------


def features(device: torch.device, small: bool) -> list[dict[str, Any]]:
    """The same padded batches through the bare model and through collect_features, by turns."""
    model = _random_model(_llama(small, layers=16), device)
    loader = _batches(small)
    rows = _overheads(model, loader, device, [
        ("token, q and v", {"target_modules": QV}, True),
        ("token, q and v, products in float32", {"target_modules": QV}, False),
        ("token, all linear layers", {"target_modules": "all-linear"}, True),
        ("mean, q and v", {"target_modules": QV, "statistic": "mean"}, True),
        ("sample, q and v", {"target_modules": QV, "statistic": "sample"}, True),
    ])  # fmt: skip
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    return _show(
        f"Features of a made-up Llama of {size:.2f} B parameters in bfloat16, {_tokens(loader)} tokens a batch", rows
    )


def quantised(device: torch.device, small: bool) -> list[dict[str, Any]]:
    """The same on a base of 4 bits."""
    title = "Features of a base that bitsandbytes holds in 4 bits"
    if importlib.util.find_spec("bitsandbytes") is None or device.type != "cuda":
        return _show(title, [{"what": "not measured: it takes a GPU and bitsandbytes (pip install bitsandbytes)"}])
    with tempfile.TemporaryDirectory() as folder:
        _random_model(_llama(small, layers=4), device).save_pretrained(folder)
        bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        model = LlamaForCausalLM.from_pretrained(folder, quantization_config=bits, device_map=0).eval()
    kinds = {type(module).__name__ for name, module in model.named_modules() if name.endswith("q_proj")}
    what = f"token, q and v ({', '.join(kinds)}), 4 layers"
    return _show(title, _overheads(model, _batches(small), device, [(what, {"target_modules": QV}, True)]))


def _overheads(
    model: Any, loader: list[dict[str, Tensor]], device: torch.device, cases: list[tuple[str, dict[str, Any], bool]]
) -> list[dict[str, Any]]:
    """What a batch costs, from runs of one and of three times the batches; and what a run costs besides."""

    def bare(batches: list[dict[str, Tensor]]) -> None:
        with torch.no_grad():
            for batch in batches:
                model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False)

    def collected(options: dict[str, Any], wider: bool) -> Callable[[list[dict[str, Tensor]]], Any]:
        def work(batches: list[dict[str, Tensor]]) -> None:
            known, moments_module._SUMS_WIDER = moments_module._SUMS_WIDER, moments_module._SUMS_WIDER and wider
            try:
                count = sum(len(batch["input_ids"]) for batch in batches)
                collect_features(model, batches, task="t", num_samples=count, progress=False, **options)
            finally:
                moments_module._SUMS_WIDER = known

        return work

    ways = {"bare": bare} | {what: collected(options, wider) for what, options, wider in cases}
    times: dict[tuple[str, int], list[float]] = {}
    for turn in range(4):  # by turns, so that drift hits all alike; the first warms up
        for what, work in ways.items():
            for size in (1, 3):
                seconds = _timed(lambda work=work, size=size: work(size * loader), device)[0]
                times.setdefault((what, size), []).extend([seconds] if turn else [])
    best = {key: min(found) for key, found in times.items()}
    batch = {what: (best[what, 3] - best[what, 1]) / (2 * len(loader)) for what in ways}
    return [
        {
            "what": what,
            "a batch: bare forward (ms)": f"{1e3 * batch['bare']:.1f}",
            "collecting (ms)": f"{1e3 * batch[what]:.1f}",
            "overhead": f"{100 * (batch[what] / batch['bare'] - 1):.0f} %",
            "once (s)": f"{best[what, 1] - len(loader) * batch[what]:.2f}",
        }
        for what in list(ways)[1:]
    ]


def _llama(small: bool, layers: int) -> LlamaConfig:
    torch.manual_seed(0)
    width, inner = (64, 96) if small else (2048, 8192)
    heads, groups = (4, 2) if small else (32, 8)
    return LlamaConfig(
        vocab_size=100 if small else 32000, hidden_size=width, intermediate_size=inner, pad_token_id=0,
        num_hidden_layers=2 if small else layers, num_attention_heads=heads, num_key_value_heads=groups,
    )  # fmt: skip


def _random_model(config: LlamaConfig, device: torch.device) -> Any:
    with device:
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def _batches(small: bool) -> list[dict[str, Tensor]]:
    """Padded on the right, up to half of a row."""
    count, rows, length = (2, 4, 16) if small else (10, 16, 512)
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        lengths = torch.randint(length // 2, length + 1, (rows, 1), generator=generator)
        ids = torch.randint(1, 100, (rows, length), generator=generator)
        found.append({"input_ids": ids, "attention_mask": (torch.arange(length) < lengths).long()})
    return found


def _tokens(loader: list[dict[str, Tensor]]) -> int:
    return round(float(sum(batch["attention_mask"].sum() for batch in loader)) / len(loader))


# --- A ---------------------------------------------------------------------------------------------------------------


def choose(device: torch.device, small: bool) -> list[dict[str, Any]]:
    """A of one layer from the second moments of tasks, each objective on the GPU and on the CPU."""
    rows = []
    for n in (32, 64) if small else (4096, 8192):
        moments = [_moments(n, seed, device) for seed in range(OTHERS + 1)]
        kept = [one.to(CPU) for one in moments]
        for name, options in OBJECTIVES.items():
            fast, A = _timed(lambda given=moments, options=options: _choose(given, options), device, repeat=2)
            row = {"what": f"{name}, n = {n}", "GPU (s)": f"{fast:.2f}", "CPU (s)": "", "times faster": ""}
            if n <= 4096 or not options:  # the other objectives take the CPU minutes
                slow, same = _timed(lambda given=kept, options=options: _choose(given, options), CPU)
                apart = float((A.cpu().mT @ A.cpu() - same.mT @ same).norm()) / RANK**0.5
                row |= {"CPU (s)": f"{slow:.1f}", "times faster": f"{slow / fast:.0f}", "spans apart": f"{apart:.0e}"}
            rows.append(row)
    return _show(f"OSRM's A (r = {RANK}) of one layer, from {OTHERS} other tasks and the own one", rows)


def _moments(n: int, seed: int, device: torch.device) -> FeatureMoments:
    """Σhhᵀ of 2 n made-up inputs with a falling spectrum."""
    torch.manual_seed(seed)
    mix = torch.randn(n, n, device=device) * (torch.arange(1, n + 1, device=device) ** -0.5)
    found = FeatureMoments("token", n)
    found.add_(torch.randn(1, 2 * n, n, device=device) @ mix.mT)
    return found


def _choose(moments: list[FeatureMoments], options: dict[str, Any]) -> Tensor:
    own, *others = moments
    spectrum = Spectrum.of(PooledMoment.of(others))
    return choose_directions(
        spectrum, RANK, generator=torch.Generator().manual_seed(0), own=own if options else None, **options
    )


# --- LoRE on full matrices -------------------------------------------------------------------------------------------


def full_matrices(device: torch.device, small: bool) -> list[dict[str, Any]]:
    """LoRE's iterations here, and as many full SVDs of the same matrices, of which one is timed."""
    rows = []
    for o, n in ((288, 320),) if small else ((4096, 4096), (4096, 11008)):
        tau = torch.stack([_decaying(o, n, seed, device) for seed in range(T)])
        ones = torch.ones(T, device=device)
        ours, found = _timed(
            lambda tau=tau, ones=ones: lore(tau, ones, mu_ratio=MU_RATIO, max_iterations=ITERATIONS, tolerance=0),
            device,
            repeat=2,
        )
        first = tau[0] - tau.mean(0)
        one, svd = _timed(lambda X=first: torch.linalg.svd(X, full_matrices=False), device)
        mu = found.report["mu"]
        rows.append({
            "what": f"{o}×{n}, μ = {mu:.3f}, {int((mu < svd.S).sum())} of {min(o, n)} values above",
            "here (s)": f"{ours:.2f}",
            f"{T * ITERATIONS} × torch.linalg.svd (s)": f"{T * ITERATIONS * one:.1f}",
            "times faster": f"{T * ITERATIONS * one / ours:.0f}",
        })  # fmt: skip
    return _show(f"LoRE, {ITERATIONS} iterations over {T} full matrices in float32, on the device", rows)


def _decaying(o: int, n: int, seed: int, device: torch.device) -> Tensor:
    """(o, n) with singular values that fall as i^−0.8 over a flat floor."""
    torch.manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(size, min(o, n), device=device)).Q for size in (o, n))
    return (U * (torch.arange(1, min(o, n) + 1, device=device) ** -0.8 + 0.01)) @ V.mT


# --- adapters --------------------------------------------------------------------------------------------------------


def adapters(device: torch.device, small: bool) -> list[dict[str, Any]]:
    """Eight adapters from disk to one of rank 16 on disk, on the CPU and on the GPU."""
    chosen = {name: options for name, options in METHODS.items() if name not in ("task_arithmetic", "concat")}
    return _beside(device, 1 if small else 32, {"average": {}} if small else chosen)


def in_weights(device: torch.device, small: bool) -> list[dict[str, Any]]:
    """The same where a method sees the layers' own entries; of one block, as the CPU takes long."""
    chosen: dict[str, dict[str, Any]] = {"ties": {}, "dare": {}, "emr": {}, "lore (ties)": {"combine": "ties"}}
    return _beside(device, 1, {"emr": {}} if small else chosen)


def _beside(device: torch.device, blocks: int, methods: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_adapters(Path(folder), blocks)
        named = {path.name: str(path) for path in sorted(Path(folder).glob("adapter*"))}
        merge_adapters(dict(list(named.items())[:2]), "lore", device=device.type)  # what the first merge on a GPU loads
        for name, options in methods.items():
            (slow, cpu), (fast, gpu) = (_merged(named, name, options, one) for one in (CPU, device))
            some = list(cpu)[:: max(1, blocks // 4)]
            apart = max(float((gpu[layer] - cpu[layer]).norm() / cpu[layer].norm()) for layer in some)
            rows.append({"what": name, "CPU (s)": f"{slow:.2f}", "GPU (s)": f"{fast:.2f}",
                         "times faster": f"{slow / fast:.1f}", "largest difference": f"{apart:.0e}"})  # fmt: skip
    return _show(f"8 adapters of Llama-3-8B's q and v, blocks: {blocks}; read, merged to rank {RANK}, written", rows)


def _merged(named: dict[str, str], name: str, options: dict[str, Any], device: torch.device) -> tuple[float, Any]:
    def work() -> Any:
        rank = None if name == "emr" else RANK
        merged = merge_adapters(named, name.split(" (")[0], rank=rank, device=device.type, **options)
        with tempfile.TemporaryDirectory() as out:
            merged.save_pretrained(Path(out) / "merged")
        return merged

    seconds, merged = _timed(work, device)
    return seconds, merged.deltas("adapter0") if name == "emr" else merged.deltas()


# ---------------------------------------------------------------------------------------------------------------------


def _timed(work: Callable[[], Any], device: torch.device, repeat: int = 1) -> tuple[float, Any]:
    """The median of the times until the device was done, and the last value; with `repeat`, after one to warm up."""
    times, value = [], work() if repeat > 1 else None
    for _ in range(repeat):
        _wait(device)
        start = time.perf_counter()
        value = work()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times), value


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _show(title: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns), *([str(row.get(column, "")) for column in columns] for row in rows)]
    print(f"\n{title}:\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines), flush=True)
    return rows


if __name__ == "__main__":
    main()
