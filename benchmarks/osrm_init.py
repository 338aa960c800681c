"""OSRM's initialisation against the released way of doing it: times, memory and energies in one run.

    python benchmarks/osrm_init.py                  # all of it, about 12 minutes on 2 quiet cores, under 4 GB
    python benchmarks/osrm_init.py --part choose    # A for one layer of width 4096
    python benchmarks/osrm_init.py --part collect   # features of MiniLM, against the bare forward pass
    python benchmarks/osrm_init.py --part wide      # features and Fisher of a made-up Llama of width 2048
    python benchmarks/osrm_init.py --part suite     # the whole init of six tasks, against the released procedure
    python benchmarks/osrm_init.py --part memory    # token statistics of q and v in 32 layers of width 4096
    python benchmarks/osrm_init.py --part sizes     # of features, by arithmetic, for models of several sizes

Ratios matter, not seconds: machines differ and drift, so each pair is measured side by side.
"""

import argparse
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
from peft import LoraConfig, get_peft_model
from processes import in_process, peak
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, LlamaConfig, LlamaForSequenceClassification

from osrm_peft import (
    OSRMLoraConfig,
    TaskFeatures,
    collect_features,
    collect_fisher,
    initialize_osrm_weights,
    list_tasks,
    load_task,
)
from osrm_peft.features.moments import FeatureMoments
from osrm_peft.models.layers import target_layers
from osrm_peft.models.loading import load_base, load_tokenizer
from osrm_peft.osrm.spectrum import PooledMoment, Spectrum
from osrm_peft.osrm.subspace import choose_directions
from osrm_peft.tasks.task import tokenize

WIDTH, RANK, OTHERS, K = 4096, 16, 7, 100
WIDE, ROUNDS = 2048, 5  # of the made-up Llama, and how often each way runs
MODELS = (  # name, layers, width
    ("roberta-large", 24, 1024),
    ("Llama-3.2-1B", 16, 2048),
    ("Llama-3.2-3B", 28, 3072),
    ("Llama-3-8B", 32, 4096),
    ("Llama-3-70B", 80, 8192),
)
TARGETS, MAX_LENGTH = ["query", "value"], 128
PARTS = ["choose", "collect", "wide", "suite", "memory", "sizes"]  # functions of these names
console = Console(width=None if sys.stdout.isatty() else 120)


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(_one(*arguments.one)))
        return
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for part in arguments.part or PARTS:
        globals()[part]()


# --- A for one layer -------------------------------------------------------------------------------------------------


def choose() -> None:
    """Each way in a process of its own, so that its peak memory is its own."""
    table = _table(
        f"A (r = {RANK}) for a layer of width {WIDTH} from {OTHERS} other tasks",
        "from", "ours (s)", "memory (MiB)", "other way (s)", "memory (MiB)", "times faster", "energies of A",
    )  # fmt: skip
    for source, other in (("mean", "SVD with full V"), ("sample", "eigh of n×n")):
        ours, theirs = in_process(__file__, "choose", source, "ours"), in_process(__file__, "choose", source, "theirs")
        what = f"{OTHERS if source == 'mean' else OTHERS * K} vectors, against {other}"
        table.add_row(
            what, f"{ours['seconds']:.3f}", f"{ours['mib']:.0f}", f"{theirs['seconds']:.2f}", f"{theirs['mib']:.0f}",
            f"{theirs['seconds'] / ours['seconds']:.0f}", f"{ours['energy']:.1e}, {theirs['energy']:.1e}",
        )  # fmt: skip
    console.print(table)


def _choose_one(source: str, way: str) -> dict[str, float]:
    h = torch.randn(OTHERS, K, WIDTH, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 3, WIDTH)
    moments = [FeatureMoments(source, WIDTH) for _ in range(OTHERS)]
    for task, rows in zip(moments, h, strict=True):
        task.add_(rows)
    stacked = torch.stack([task.mean() for task in moments]).float()

    def ours() -> Tensor:
        return choose_directions(
            Spectrum.of(PooledMoment.of(moments)), RANK, generator=torch.Generator().manual_seed(0)
        )

    def theirs() -> Tensor:
        if source == "mean":
            return torch.linalg.svd(stacked, full_matrices=True).Vh[-RANK:]
        return torch.linalg.eigh(h.flatten(0, 1).double().mT @ h.flatten(0, 1).double()).eigenvectors[:, :RANK].mT

    repeats, before = (5 if way == "ours" else 1), peak()
    seconds, A = _time(ours if way == "ours" else theirs, repeats)
    return {"seconds": seconds, "mib": peak() - before, "energy": PooledMoment.of(moments).share(A)}


# --- features of a real model ----------------------------------------------------------------------------------------


def collect() -> None:
    """The same batches through the bare model and through collect_features, in turn."""
    tokenizer, model = load_tokenizer("packaged"), load_base("packaged", 2).eval()
    table = _table(
        f"Features of MiniLM ({', '.join(TARGETS)} of 6 layers), {2 * K} samples in batches of 16",
        "task", "bare forward (s)", *(f"{statistic}: overhead" for statistic in ("mean", "sample", "token")),
    )  # fmt: skip
    for name in ("questions", "movie_reviews", "editorials"):
        batches = list(_loader(name, tokenizer, 2 * K, 16, "longest"))

        def bare(batches: list = batches) -> None:
            with torch.no_grad():
                for batch in batches:
                    model(**{key: value for key, value in batch.items() if key != "labels"})

        def with_features(statistic: str, name: str = name, batches: list = batches) -> Callable[[], Any]:
            return lambda: _features(model, batches, name, statistic, 2 * K)

        runs: dict[str, list[float]] = {}
        for _ in range(ROUNDS):  # in turn, so that drift hits all alike
            runs.setdefault("bare", []).append(_time(bare)[0])
            for statistic in ("mean", "sample", "token"):
                runs.setdefault(statistic, []).append(_time(with_features(statistic))[0])
        low = {key: min(values) for key, values in runs.items()}
        table.add_row(
            name,
            f"{low['bare']:.2f}",
            *(f"{100 * (low[key] / low['bare'] - 1):.1f} %" for key in ("mean", "sample", "token")),
        )
    console.print(table)


# --- features and Fisher of a wide model -----------------------------------------------------------------------------


def wide() -> None:
    """A made-up Llama of width `WIDE` with 2 layers and 2 classes: features of q and v, and Fisher of all layers."""
    config = LlamaConfig(
        vocab_size=1000, hidden_size=WIDE, intermediate_size=WIDE * 11 // 4, num_hidden_layers=2,
        num_attention_heads=16, num_labels=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval()
    ids = torch.randint(1, 1000, (12, 8, MAX_LENGTH), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": one, "attention_mask": torch.ones_like(one), "labels": one[:, 0] % 2} for one in ids]
    few = batches[:2]

    def bare() -> None:
        with torch.no_grad():
            for batch in batches:
                model(**batch)

    def both_passes() -> None:
        for batch in few:
            model(**batch).loss.backward()
            model.zero_grad()

    def features(statistic: str) -> Callable[[], Any]:
        config = LoraConfig(target_modules=["q_proj", "v_proj"])
        options: dict[str, Any] = {"target_modules": config, "num_samples": 96, "progress": False}
        return lambda: collect_features(model, batches, task="made up", statistic=statistic, **options)

    def fisher(labels: str) -> Callable[[], Any]:
        options: dict[str, Any] = {"target_modules": "all-linear", "num_samples": 16, "progress": False}
        return lambda: collect_fisher(model, few, task="made up", labels=labels, **options)

    ways: dict[str, tuple[Callable[[], Any], str]] = {  # what it is compared with
        "forward, 96 samples": (bare, "forward, 96 samples"),
        **{
            f"features ({statistic}) of q and v": (features(statistic), "forward, 96 samples")
            for statistic in ("mean", "sample", "token")
        },
        "forward and backward, 16 samples": (both_passes, "forward and backward, 16 samples"),
        "Fisher of all layers, true labels": (fisher("true"), "forward and backward, 16 samples"),
        "Fisher of all layers, expected": (fisher("expected"), "forward and backward, 16 samples"),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(ROUNDS):  # in turn, so that drift hits all alike
        for way, (run, _) in ways.items():
            seconds[way].append(_time(run)[0])
    low = {way: min(times) for way, times in seconds.items()}
    table = _table(
        f"A Llama of width {WIDE}, 2 layers, samples of {MAX_LENGTH} tokens", "pass", "seconds", "times the pass"
    )
    for way, (_, whole) in ways.items():
        table.add_row(way, f"{low[way]:.2f}", f"{low[way] / low[whole]:.2f}")
    console.print(table)


# --- six tasks -------------------------------------------------------------------------------------------------------


def suite() -> None:
    """From tokenised rows to every task's A; models are loaded beforehand, in both ways."""
    names, tokenizer, model = list_tasks("packaged"), load_tokenizer("packaged"), load_base("packaged", 2).eval()
    table = _table(
        f"OSRM's init of six tasks on MiniLM, {K} samples a task",
        "way", "features (s)", "A (s)", "together (s)", "times faster",
    )  # fmt: skip
    theirs = _released(model, names, tokenizer)
    for statistic in ("mean", "sample", "token"):
        ours = _ours(model, names, tokenizer, statistic)
        table.add_row(
            f"ours, {statistic}", *(f"{value:.2f}" for value in (*ours, sum(ours))), f"{sum(theirs) / sum(ours):.0f}"
        )
    table.add_row("released procedure", *(f"{value:.2f}" for value in (*theirs, sum(theirs))), "1")
    console.print(table)


def _ours(model: nn.Module, names: list[str], tokenizer: Any, statistic: str) -> tuple[float, float]:
    """One pass for each task's features, then each task's A from the others'."""
    loaders = {name: _loader(name, tokenizer, K, 16, "longest") for name in names}
    collecting, features = _time(
        lambda: {name: _features(model, loader, name, statistic, K) for name, loader in loaders.items()}
    )
    fields: dict[str, Any] = {"r": 8, "target_modules": TARGETS, "statistic": statistic, "task_type": "SEQ_CLS"}
    # the paper's choice, as the released code makes it
    fields |= {"objective": "least_energy", "null_space": "random", "protect_energy": None}
    peft_models = {name: get_peft_model(load_base("packaged", 2), OSRMLoraConfig(**fields)) for name in names}

    def initialise() -> None:
        for name, peft_model in peft_models.items():
            initialize_osrm_weights(peft_model, [features[other] for other in names if other != name])

    return collecting, _time(initialise)[0]


def _released(model: nn.Module, names: list[str], tokenizer: Any) -> tuple[float, float]:
    """The released procedure written out: for each task all other tasks again, one sample a batch, padded to 128."""
    layers = target_layers(model, TARGETS)
    loaders = {name: _loader(name, tokenizer, K, 1, "max_length") for name in names}

    def means(name: str) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}

        def hook_for(layer: str) -> Callable:
            def hook(module: nn.Module, args: tuple) -> None:
                sums[layer] = sums.get(layer, 0) + args[0].mean(1).sum(0) / K

            return hook

        handles = [module.register_forward_pre_hook(hook_for(layer)) for layer, module in layers.items()]
        with torch.no_grad():
            for batch in loaders[name]:
                model(**{key: value for key, value in batch.items() if key != "labels"})
        for handle in handles:
            handle.remove()
        return sums

    collecting = choosing = 0.0
    for name in names:
        seconds, others = _time(lambda name=name: [means(other) for other in names if other != name])  # type: ignore[misc]
        collecting += seconds
        choosing += _time(
            lambda others=others: [  # type: ignore[misc]
                torch.linalg.svd(torch.stack([one[layer] for one in others]), full_matrices=True).Vh[-8:]
                for layer in layers
            ]
        )[0]
    return collecting, choosing


# --- memory ----------------------------------------------------------------------------------------------------------


def memory() -> None:
    """Peak memory over the model's, of collecting and of saving."""
    title = f"Token statistics of q and v in 32 layers, width {WIDTH}"
    table = _table(title, "way", "collecting (GiB)", "and saved (GiB)", "file (GiB)")
    for label, group in (("all at once", "0"), ("8 inputs at once (group_size=8)", "8")):
        found = in_process(__file__, "memory", group, "ours")
        table.add_row(label, *(f"{found[key] / 1024:.2f}" for key in ("collecting", "saved", "file")))
    console.print(table)


def sizes() -> None:
    """What q and v of a model need: one input of width n a layer, as they share it."""
    table = _table(
        "Features of q and v, float32", "model", "layers", "n", "mean", "sample, k = 100", "token", "token, collecting"
    )
    for name, layers, n in MODELS:
        entries = (n, 100 * n, n * (n + 1) // 2, n * n)
        table.add_row(name, f"{layers}", f"{n}", *(_bytes(4 * layers * one) for one in entries))
    console.print(table)


def _bytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"


class Blocks(nn.Module):
    """32 blocks whose q and v read one tensor; narrow outputs, so that the weights take no memory to speak of."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.ModuleList(nn.Linear(WIDTH, 1, bias=False) for _ in range(32))
        self.v_proj = nn.ModuleList(nn.Linear(WIDTH, 1, bias=False) for _ in range(32))

    def forward(self, x: Tensor) -> Tensor:
        """Each block's input differs."""
        for place, (q, v) in enumerate(zip(self.q_proj, self.v_proj, strict=True)):
            h = x + place
            x = x + 1e-3 * (q(h) + v(h))
        return x


def _memory_one(group: str) -> dict[str, float]:
    model = Blocks()
    batches = [{"x": torch.randn(4, 16, WIDTH, generator=torch.Generator().manual_seed(seed))} for seed in range(4)]
    before = peak()
    features = collect_features(
        model,
        batches,
        task="t",
        target_modules=r".*_proj\.\d+",
        num_samples=16,
        group_size=int(group) or None,
        progress=False,
    )
    collecting = peak() - before
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.safetensors"
        features.save(path)
        return {"collecting": collecting, "saved": peak() - before, "file": path.stat().st_size / 2**20}


# --- shared ----------------------------------------------------------------------------------------------------------


def _one(part: str, what: str, way: str) -> dict[str, float]:
    return _choose_one(what, way) if part == "choose" else _memory_one(what)


def _features(model: nn.Module, batches: Any, name: str, statistic: str, k: int) -> TaskFeatures:
    config = LoraConfig(target_modules=TARGETS)
    return collect_features(
        model, batches, task=name, target_modules=config, statistic=statistic, num_samples=k, progress=False
    )


def _loader(name: str, tokenizer: Any, rows: int, size: int, padding: str) -> DataLoader:
    task = load_task("packaged", name).sample(train=rows, seed=0)
    collator = DataCollatorWithPadding(tokenizer, padding=padding, max_length=MAX_LENGTH)
    return DataLoader(tokenize(task.train, tokenizer, MAX_LENGTH), batch_size=size, collate_fn=collator)


def _time(function: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right")
    return table


if __name__ == "__main__":
    main()
