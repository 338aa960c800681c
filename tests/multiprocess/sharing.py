"""Work that processes share: `sharing.py ADAPTERS OUT` does it in each of them; the test does the same alone."""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoTokenizer

from osrm_peft import EMRAdapter, LeastSquares, collect_features, collect_gram, load_task
from osrm_peft.distributed import Processes, start
from osrm_peft.evaluation.evaluate import predict
from osrm_peft.merging import METHODS
from osrm_peft.models.loading import load_base
from osrm_peft.models.packaged import resolve_model
from osrm_peft.tasks.task import tokenize
from tests.helpers.merging import deltas, merge
from tests.helpers.models import make_base, make_batch

COLLECTS = {  # the tiny model's layers are 16 wide, the batches 4 rows
    "uneven": {"num_samples": 9},
    "no sample for one": {"num_samples": 3},
    "cut": {"num_samples": 6},
    "groups": {"num_samples": 9, "group_size": 1},
    "vectors become sums": {"num_samples": 40},
    "on one process only": {"num_samples": 20},  # it has 12, the other 8: together more than 16
}
MERGES = {method: {} for method in METHODS} | {
    "knots ties": {"method": "ties", "space": "knots"},
    "core ties": {"method": "ties", "space": "core"},
    "ties by layer": {"method": "ties", "trim": "layer"},
    "lore of rank 3": {"method": "lore", "rank": 3},
    "weights by layer": {"method": "task_arithmetic", "weights": LeastSquares},
    "weights for all": {"method": "task_arithmetic", "weights": partial(LeastSquares, shared=True)},
    "scales by layer": {"method": "ties", "scale": LeastSquares},
}
TASKS = ("a", "b")


def loader(seed=0):
    batch = make_batch(rows=48, pads=[0, 2, 3, 1] * 12, seed=seed)
    return [{key: value[start : start + 4] for key, value in batch.items()} for start in range(0, 48, 4)]


def collect(task="a", seed=0, **options):
    model, options = make_base(), {"target_modules": ["query", "value"], "progress": False} | options
    return collect_features(model, loader(seed), task=task, **options)


def features(distributed):
    """{name: tensor}: the moments of every case and statistic, and RegMean's."""
    found = {
        f"{case} {statistic}": collect(statistic=statistic, distributed=distributed, **options)
        for case, options in COLLECTS.items()
        for statistic in ("mean", "sample", "token")
    }
    found["gram"] = collect_gram(
        make_base(),
        loader(),
        task="a",
        target_modules=["value"],
        num_samples=9,
        progress=False,
        distributed=distributed,
    )
    tensors = {}
    for case, one in found.items():
        tensors[f"{case} k"] = torch.tensor(one.num_samples)
        for name, moments in one.layers.items():
            tensors[f"{case} {name} N"] = torch.tensor(moments.count)
            tensors[f"{case} {name} mean"] = moments.mean()
            tensors[f"{case} {name} S"] = moments.second_moment()
    return tensors


def merges(folder, distributed):
    """{name: tensor}: the task vectors of every merge; "one" has fewer layers than there are processes."""
    seen = {task: collect(task, seed) for seed, task in enumerate(TASKS)}
    tensors = {}
    for kind in ("adapter", "one"):
        adapters = {task: f"{folder}/{kind}_{task}" for task in TASKS}
        for case, options in MERGES.items():
            arguments = {"method": case, "distributed": distributed} | options
            arguments |= {name: rule(seen) for name, rule in arguments.items() if callable(rule)}
            merged = merge(adapters, **arguments)
            for name, delta in deltas(merged).items():
                tensors[f"{kind} {case} {name}"] = delta
            if isinstance(merged, EMRAdapter):
                tensors[f"{kind} {case} scales"] = torch.tensor(list(merged.scales.values()), dtype=torch.float64)
    return tensors


def logits(processes):
    """(N, C) of 9 rows, and of 1: fewer than processes."""
    tokenizer, model = AutoTokenizer.from_pretrained(resolve_model("packaged")), load_base("packaged", 2)
    rows = tokenize(load_task("packaged", "sms_spam").sample(validation=9).validation, tokenizer, 32)
    with torch.no_grad():  # a head that tells rows apart, the same everywhere
        model.classifier.weight.copy_(torch.linspace(-1, 1, 768).view(2, 384))
    return {
        "logits": predict(model, rows, tokenizer, processes, batch_size=2),
        "logits of one row": predict(model, rows.select([0]), tokenizer, processes),
    }


def errors(rank):
    """What is said, in each process, of what cannot be shared out; and of an error in the main process alone."""
    processes = Processes.of(True)
    rows = [{"input_ids": torch.arange(4)} for _ in range(8)]

    def only_main():
        raise FileNotFoundError("no file on the main process")

    def unsendable():
        raise type("Local", (Exception,), {})("cannot be pickled")

    attempts = {
        "shuffled": lambda: collect_of(DataLoader(rows, batch_size=2, shuffle=True)),
        "sampler": lambda: collect_of(DataLoader(rows, sampler=DistributedSampler(rows))),
        "prepared": lambda: collect_of(Accelerator(cpu=True).prepare(DataLoader(rows, batch_size=2))),
        "fewer": lambda: collect_of(loader()[: 1 + rank]),
        "others": lambda: collect_of(loader(seed=rank)),
        "one layer": lambda: processes.gather_results(lambda: [1.0, 0.0][rank] / [1.0, 0.0][rank]),
        "empty": lambda: collect_of([]),
        "main": lambda: processes.broadcast_from_main(only_main),
        "unsendable": lambda: processes.broadcast_from_main(unsendable),
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            found[name] = "nothing"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def collect_of(batches):
    return collect_features(make_base(), batches, task="t", target_modules=["query"], progress=False, distributed=True)


def main():
    adapters, out = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    processes = start()
    found = features(True) | merges(adapters, True) | logits(processes)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, out / f"{processes.rank}.safetensors")
    about = errors(processes.rank) | {"count": processes.num_processes}
    (out / f"{processes.rank}.json").write_text(json.dumps(about))


if __name__ == "__main__":
    main()
