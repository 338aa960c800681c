"""Merges, their statistics and features, on tiny adapters."""

import zlib

import torch

from osrm_peft import (
    DiagonalFisher,
    EMRAdapter,
    TaskFeatures,
    load_adapter,
    merge_adapters,
)
from osrm_peft.features.moments import FeatureMoments
from osrm_peft.merging import METHODS
from tests.helpers.lora import LAYERS


def statistic(needs, task, shapes):
    """Made-up statistics of a task: a well-conditioned Gram matrix, or positive Fisher information, a layer."""
    generator = torch.Generator().manual_seed(zlib.crc32(task.encode()))
    if needs == "fisher":
        layers = {name: torch.rand(o, n, generator=generator) for name, (o, _, n) in sorted(shapes.items())}
        return DiagonalFisher(task, "tiny", 1, "expected", layers=layers)
    moments = {}
    for name, (_, _, n) in sorted(shapes.items()):
        h = torch.randn(4 * n, n, generator=generator)
        moments[name] = FeatureMoments("token", n, 4 * n, h.sum(0), h.mT @ h)
    return TaskFeatures(task, "tiny", "", "token", of_finetuned_model=True, layers=moments)


def merge(adapters, method, **arguments):
    needs = METHODS[method].needs
    if needs:
        shapes = {}
        for source in adapters.values():
            shapes |= (source if hasattr(source, "shapes") else load_adapter(source)).shapes
        arguments["statistics"] = {task: statistic(needs, task, shapes) for task in adapters}
    return merge_adapters(adapters, method, **arguments)


def deltas(merged):
    if isinstance(merged, EMRAdapter):
        return {(task, name): delta for task in merged.tasks for name, delta in merged.deltas(task).items()}
    return merged.deltas()


def gram_of(task, seed, layers=LAYERS, count=50):
    found = {name: moments(inputs(n, count, seed).float()) for name, (_, n, _) in layers.items()}
    return TaskFeatures(task, "tiny", "", "token", of_finetuned_model=True, layers=found)


def features_of(tasks, statistic="token", layers=LAYERS, count=12):
    """{task: TaskFeatures}, {task: {layer: its vectors}}."""
    files, vectors = {}, {}
    for t, task in enumerate(tasks):
        both = {
            name: samples(n, 100 * t + i, statistic, count + t) for i, (name, (_, n, _)) in enumerate(layers.items())
        }
        files[task] = TaskFeatures(task, "tiny", "", statistic, layers={k: moments for k, (moments, _) in both.items()})
        vectors[task] = {name: h for name, (_, h) in both.items()}
    return files, vectors


def inputs(n, count, seed):
    """(count, n) float64 inputs of one layer, of unequal variances and correlated."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator, dtype=torch.float64) + torch.eye(n, dtype=torch.float64)
    return torch.randn(count, n, generator=generator, dtype=torch.float64) @ mix + 0.3


def moments(h):
    """Their sums in float64, so that only the method's own arithmetic is tested."""
    return FeatureMoments("token", h.shape[1], len(h), h.sum(0), h.mT @ h)


def samples(n, seed, statistic="token", count=12):
    """FeatureMoments, and the (N, n) vectors h that they are of; all sums are exact in float32 (multiples of 2⁻⁴)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-6, 7, (count, 4, n), generator=generator).float() / 4
    lengths = torch.tensor([1, 2, 4])[torch.randint(0, 3, (count,), generator=generator)]
    keep = torch.arange(4) < lengths[:, None]
    moments = FeatureMoments(statistic, n)
    moments.add_(torch.where(keep[..., None], x, torch.nan), keep)
    rows = [row[: int(length)].double() for row, length in zip(x, lengths, strict=True)]
    if statistic == "token":
        return moments, torch.cat(rows)
    means = torch.stack([row.mean(0) for row in rows])
    return moments, means if statistic == "sample" else means.mean(0)[None]
