"""The forecast of a merge: a sample of the work, extended to all of it; checked on work of known cost."""

import pytest
import torch

from osrm_peft.checkpoints import blocks, forecast
from osrm_peft.checkpoints.plan import CHECKPOINT_METHODS, CheckpointPlan, plan_checkpoints
from tests.helpers.checkpoints import QUICK, write


def planned(models, method="average", base=None, **options) -> CheckpointPlan:
    given = {"weights": None, "scale": None, "heads": (), "vocab": "error", "tokenizer": None, "dtype": None}
    return plan_checkpoints(models, method, base=base, shard_size="5GB", seed=0, **given, **options)


class Clock:
    """Seconds that pass by what is done, and by nothing else."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(forecast, "time", found)
    return found


@pytest.mark.parametrize("method", CHECKPOINT_METHODS)
def test_every_method_has_a_forecast_and_nothing_is_written(three, base, tmp_path, method, threads):
    threads(2)
    before = sorted(tmp_path.rglob("*"))
    found = forecast.forecast(planned(three, method, base, **QUICK.get(method, {})))
    assert 0 < found.seconds < 60 and 2**25 < found.memory < 2**31
    assert sorted(tmp_path.rglob("*")) == before and torch.get_num_threads() == 2


@pytest.mark.parametrize("shape", [(64, 7), (1000, 3), (5, 11, 2), (401,)])
def test_the_sample_lies_in_blocks_over_all_entries(tmp_path, monkeypatch, shape):
    for module in (blocks, forecast):
        monkeypatch.setattr(module, "BLOCK", 100)
    models = {
        name: write(tmp_path / name, {"first": torch.zeros(2, 3), "large": torch.zeros(shape), "last": torch.ones(30)})
        for name in "ab"
    }
    plan = planned(models)
    sample, all_blocks = forecast._spread(plan), list(blocks.Blocks(plan).places())
    assert set(sample) <= set(all_blocks) and len(sample) == len(set(sample)) <= forecast._SAMPLES
    assert len(sample) >= min(len(all_blocks), 2) and "large" in {name for name, *_ in sample}


def test_blocks_count_by_their_entries(tmp_path, monkeypatch, clock):
    """A nanosecond an entry: the forecast is the number of entries, whatever the sample is."""
    monkeypatch.setattr(forecast, "_SAMPLES", 5)
    for module in (blocks, forecast):
        monkeypatch.setattr(module, "BLOCK", 100)
    models = {name: write(tmp_path / name, {"a": torch.zeros(77, 10), "b": torch.zeros(333)}) for name in "xy"}
    merge = blocks.Blocks.block

    def timed(self, name, start, stop):
        (result,) = merge(self, name, start, stop)
        clock.now += result.numel() * 1e-9
        return [result]

    monkeypatch.setattr(blocks.Blocks, "block", timed)
    assert forecast.forecast(planned(models)).seconds == pytest.approx(1103e-9)


@pytest.mark.parametrize(("method", "power"), [("lore", 1.0), ("iso", 1.5), ("tsv", 1.5)])
def test_matrices_count_by_a_power_of_their_entries(tmp_path, monkeypatch, clock, method, power):
    """Work of that power: the forecast of whole matrices is right, though only corners are done."""
    monkeypatch.setattr(forecast, "_CORNERS", {"lore": (16, 1.0)})
    monkeypatch.setattr(forecast, "_SVD", (8, 1.5))
    shapes = {"square": (32, 32), "again": (32, 32), "wide": (24, 40), "tall": (160, 20), "small": (4, 6), "bias": (9,)}
    models = {name: write(tmp_path / name, {key: torch.zeros(one) for key, one in shapes.items()}) for name in "xyz"}
    plan = planned(models, method, models["x"])

    def cost(o, n):
        short, long = sorted((o, n))
        wide = min(long, 2 * short)
        return (short * wide) ** power * long / wide * 1e-6

    class Engine:
        def __init__(self, *_):
            pass

        def merged(self, stack, weights):
            clock.now += cost(*stack.shape[1:])
            return type("Merged", (), {"direction": stack[0], "report": {}})

    monkeypatch.setattr(blocks, "Engine", Engine)
    expected = sum(cost(*shape) for shape in shapes.values() if len(shape) == 2)
    assert forecast.forecast(plan).seconds == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_iterations": 7}, 7),
        ({"max_iterations": 500, "tolerance": 0.0}, 500),
        ({"max_iterations": 500, "tolerance": 1e-9}, 52),  # ln 10⁻⁹ / ln ⅔: a third of the way is made at each
    ],
)
def test_lore_makes_forty_steps_at_most_and_counts_all(tmp_path, monkeypatch, clock, options, steps):
    models = {name: write(tmp_path / name, {"w": torch.zeros(30, 30)}) for name in "xyz"}
    made = []

    class Engine:
        def __init__(self, method, options, *_):
            self.steps = options["max_iterations"]

        def merged(self, stack, weights):
            clock.now += self.steps * 1e-3
            made.append(self.steps)
            report = {"iterations": self.steps, "converged": False}
            return type("Merged", (), {"direction": stack[0], "report": report})

    monkeypatch.setattr(blocks, "Engine", Engine)
    assert forecast.forecast(planned(models, "lore", **options)).seconds == pytest.approx(steps * 1e-3)
    assert max(made) == min(steps, 40)


def test_a_matrix_that_no_model_trained_is_not_the_measure(tmp_path):
    """LoRE of task vectors that are 0 takes one step: embeddings, which come first in a file, often are."""
    generator = torch.Generator().manual_seed(0)
    models = {}
    for name in "xyz":
        trained = {f"w{number}": torch.randn(300, 300, generator=generator) for number in range(3)}
        models[name] = write(tmp_path / name, {"embed": torch.zeros(300, 300)} | trained)
    plan = planned(models, "lore")
    seen = []
    timed = forecast._seconds_of_corner

    def watched(made, name, *rest):
        seen.append(name)
        return timed(made, name, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forecast, "_seconds_of_corner", watched)
        forecast.forecast(plan)
    assert len(seen) == 2 and "embed" not in seen


@pytest.mark.parametrize(
    ("method", "options"), [("ties", {"trim": "layer"}), ("dare_ties", {"trim": "layer"}), ("average", {}), ("emr", {})]
)
def test_stacks_of_experts_have_a_forecast(tmp_path, method, options):
    config = {"num_experts": 4, "model_type": "mixtral"}
    shapes = {"mlp.experts.gate_up_proj": (4, 6, 5), "norm": (7,), "nothing": (0, 3)}
    models = {
        name: write(tmp_path / name, {key: torch.randn(one) for key, one in shapes.items()}, config) for name in "xyz"
    }
    plan = planned(models, method, models["x"], **options)
    assert bool(plan.stacks) == ("trim" in options) and forecast.forecast(plan).seconds > 0


def test_the_memory_is_of_the_largest_block(tmp_path, monkeypatch):
    """A whole tensor where each has its own threshold, and one row at least; one worker where draws are in order."""
    monkeypatch.setattr(blocks, "BLOCK", 100)
    monkeypatch.setattr(blocks.os, "cpu_count", lambda: 2)
    shapes = {"w": torch.zeros(40, 30), "wide": torch.zeros(2, 500)}
    models = {name: write(tmp_path / name, shapes) for name in "xy"}

    def entries(method, **options):
        plan = planned(models, method, models["x"], **options)
        return (forecast.forecast(plan).memory - 2**25) / (5 * 4 * 4)

    assert entries("ties") == 2 * 500
    assert entries("ties", trim="layer") == 2 * 1200
    assert entries("dare") == 500


def test_a_forecast_of_what_cannot_be_decomposed_names_the_tensor(tmp_path, monkeypatch):
    models = {name: write(tmp_path / name, {"w": torch.randn(40, 30)}) for name in "xyz"}

    def failing(*_):
        raise RuntimeError("linalg.svd: failed to converge")

    monkeypatch.setattr(blocks.Engine, "merged", failing)
    with pytest.raises(ValueError, match=r"'w' \(40×30\) cannot be merged by iso .+ take an element-wise method"):
        forecast.forecast(planned(models, "iso", models["x"]))


def test_the_memory_is_of_the_largest_matrix_or_of_the_blocks(tmp_path):
    small, large = ({"w": torch.zeros(o, 50), "b": torch.zeros(o)} for o in (60, 600))
    models = [
        {name: write(tmp_path / f"{size}{name}", tensors) for name in "xyz"}
        for size, tensors in (("small", small), ("large", large))
    ]
    of_blocks = [forecast.forecast(planned(one)).memory for one in models]
    of_matrices = [forecast.forecast(planned(one, "lore")).memory - 2**25 for one in models]
    assert of_blocks[1] == of_blocks[0] + (of_blocks[0] - 2**25) * 9  # less than a block's entries
    assert of_matrices == [8 * o * 50 * 4 + 5 * 50**2 * 8 for o in (60, 600)]
