"""Features, Gram matrices, Fisher information and A are made where the model is, and are the CPU's to rounding."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

from osrm_peft import (
    OSRMLoraConfig,
    collect_features,
    collect_fisher,
    collect_gram,
    initialize_osrm_weights,
    interference,
)
from osrm_peft.features import moments as module
from osrm_peft.features.moments import STATISTICS, FeatureMoments
from osrm_peft.models.layers import lora_layers
from osrm_peft.osrm import initialize
from osrm_peft.osrm.spectrum import PooledMoment, Spectrum
from osrm_peft.osrm.subspace import choose_directions
from tests.helpers.adapters import make_adapter, two_adapters
from tests.helpers.devices import CUDA, DEVICES, device_named
from tests.helpers.models import make_base, make_batch
from tests.helpers.osrm import LORA, features_of
from tests.helpers.subspace import FORMS, generator, tasks

TARGETS = ["query", "value", "dense"]
CHOICES = [
    {},
    {"null_space": "in_task", "protect_rank": 5},
    {"protect_energy": 0.8},
    {"objective": "difference"},
    {"objective": "difference", "in_task_weight": 0.0},
    {"objective": "ratio"},
    {"objective": "ratio", "protect_rank": 3},
]


@pytest.fixture(params=DEVICES)
def there(request, monkeypatch):
    with device_named(request.param, monkeypatch) as device:
        yield device


def same(found, expected, rtol=1e-5):
    """Sums of the same numbers in another order, float32."""
    assert found.count == expected.count
    for name in ("total", "second", "rows"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None)
        if one is not None:
            assert one.device == other.device
            torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * float(other.abs().max()))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("statistic", STATISTICS)
def test_sums_are_made_where_the_inputs_are_and_settle_on_the_cpu(there, statistic, masked):
    cpu, gpu = FeatureMoments(statistic, 6), FeatureMoments(statistic, 6)
    for seed in range(3):  # of 4 samples each, so that vectors become sums in between
        x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(seed))
        keep = torch.arange(5) < torch.tensor([5, 1, 3, 2])[:, None] if masked else None
        cpu.add_(x, keep)
        gpu.add_(x.to(there), None if keep is None else keep.to(there))
        assert gpu.total.device == there
    part = FeatureMoments(statistic, 6)
    part.add_(x)
    gpu.merge_(part)
    cpu.merge_(part)
    for moments in (cpu, gpu):
        moments.settle_()
    same(gpu, cpu)


@pytest.mark.parametrize("moved", [0, 1])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_a_spans_what_it_spans_on_the_cpu(there, choice, form, moved):
    """Up to the signs of its rows and rotations among equals, which a decomposition leaves open."""
    own, *others = tasks(4, 3 if moved else 30, 16)
    cpu = choose(others, own, choice, form, torch.device("cpu"))
    gpu = choose(others, own, choice, form, there)
    assert gpu.device == there
    gpu = gpu.cpu()
    torch.testing.assert_close(gpu @ gpu.mT, torch.eye(4, dtype=gpu.dtype), rtol=0, atol=1e-12)
    torch.testing.assert_close(gpu.mT @ gpu, cpu.mT @ cpu, rtol=0, atol=1e-7)


def choose(others, own, choice, form, device):
    others = [FORMS[form](one).to(device) for one in others]
    own = FORMS[form](own).to(device) if set(choice) & {"objective", "null_space"} else None
    return choose_directions(Spectrum.of(PooledMoment.of(others)), 4, generator=generator(), own=own, **choice)


def test_where_a_gpu_is_too_small_for_a_the_cpu_chooses_it(monkeypatch, caplog):
    """An error of a GPU's memory, planted in the first choice of each layer."""
    real, failed, others = initialize._choose, [], [features_of("a", 1)]
    expected, model = (get_peft_model(make_base(), OSRMLoraConfig(**LORA, objective="least_energy")) for _ in range(2))
    initialize_osrm_weights(expected, others)

    def choose_once_more(*arguments):
        if arguments[-2] not in failed:
            failed.append(arguments[-2])
            raise torch.OutOfMemoryError("no")
        return real(*arguments)

    monkeypatch.setattr(initialize, "_choose", choose_once_more)
    initialize_osrm_weights(model, others)
    assert len(failed) == 4 and "too little memory to choose A of layer" in caplog.text
    for name, layer in lora_layers(model, "default").items():
        assert torch.equal(
            layer.lora_A["default"].weight, lora_layers(expected, "default")[name].lora_A["default"].weight
        )


def test_too_little_memory_for_features_names_the_groups(monkeypatch, base):
    def no_room(*_):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(FeatureMoments, "_add_squares", no_room)
    with pytest.raises(
        ValueError, match=r"the memory of cpu is too small .* sums of 4 layers: give a smaller group_size"
    ):
        features_of("a", 1, base)
    assert not [1 for one in base.modules() if one._forward_pre_hooks]


# ---- models on a GPU


@pytest.mark.parametrize("marked", [pytest.param(None, marks=CUDA)])
class TestModelsOnAGPU:
    @pytest.fixture
    def models(self):
        model = make_base()
        return model, copy.deepcopy(model).cuda()

    def collect(self, model, function=collect_features, **options):
        loader = [make_batch(seed=seed) | {"labels": torch.tensor([0, 1, 2, 0])} for seed in range(3)]
        return function(model, loader, task="t", target_modules=TARGETS, progress=False, **options)

    @pytest.mark.parametrize("options", [*({"statistic": one} for one in STATISTICS), {"group_size": 2}], ids=str)
    def test_features(self, marked, models, options):
        state = {name: value.clone() for name, value in models[1].state_dict().items()}
        cpu, gpu = (self.collect(model, **options) for model in models)
        assert gpu.weight_hash == cpu.weight_hash and list(gpu.layers) == list(cpu.layers)
        for name in cpu.layers:
            same(gpu.layers[name], cpu.layers[name], rtol=1e-4)  # of inputs that a whole model has rounded
        assert all(torch.equal(value, state[name]) for name, value in models[1].state_dict().items())
        assert not [1 for one in models[1].modules() if one._forward_hooks or one._forward_pre_hooks]

    @pytest.mark.parametrize("labels", ["expected", "true"])
    def test_fisher(self, marked, models, labels):
        cpu, gpu = (self.collect(model, collect_fisher, labels=labels) for model in models)
        for name, value in cpu.layers.items():
            torch.testing.assert_close(gpu.layers[name], value, rtol=1e-3, atol=1e-4 * float(value.abs().max()))

    def test_gram_of_an_adapted_model(self, marked, tmp_path):
        make_adapter(tmp_path / "t")
        cpu, gpu = (PeftModel.from_pretrained(make_base(), tmp_path / "t").to(one).eval() for one in ("cpu", "cuda"))
        found, expected = (self.collect(model, collect_gram).layers for model in (gpu, cpu))
        for name in expected:
            same(found[name], expected[name], rtol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("count", [4096, 65536])
    def test_numbers_of_16_bits_are_summed_in_float32(self, marked, dtype, count):
        """The matrix units cut off up to 2⁻²⁴ of a sum at each of 2048 / 16 steps: 8e-6, where rounding leaves 1e-6."""
        n = 384
        a, b = torch.randint(-127, 128, (2, count, n // 3)) / 128
        h = torch.cat([a, b, a + b], 1).to(dtype)  # exact in 8 bits: the direction (1, 1, −1) is never used
        assert module._SUMS_WIDER and torch.equal(h[:, -1].float(), a[:, -1] + b[:, -1])
        moments = FeatureMoments("token", n)
        for rows in h.split(8192):
            moments.add_(rows[None].cuda())
        moments.settle_()
        exact = (h.double().cuda().mT @ h.double().cuda()).cpu() / count
        found = moments.second_moment()
        assert float((found - exact).norm()) <= 1e-5 * float(exact.norm())
        eye = torch.eye(n // 3, dtype=torch.float64)
        V = torch.cat([eye, eye, -eye]) / 3**0.5
        energies = (V * (found @ V)).sum(0).abs()
        assert bool((energies <= moments.rounding() @ V.square()).all())  # as `rounding` says of sums in float32
        assert Spectrum.of(PooledMoment.of([moments])).rank == 2 * n // 3

    @pytest.mark.parametrize("allow", [False, True])
    def test_features_are_summed_in_float32_where_the_program_allows_tf32(self, marked, allow):
        h = torch.randn(1, 2000, 64)
        torch.backends.cuda.matmul.allow_tf32 = allow
        try:
            found, expected = FeatureMoments("token", 64), FeatureMoments("token", 64)
            found.add_(h.cuda())
            expected.add_(h)
            assert torch.backends.cuda.matmul.allow_tf32 == allow
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
        for moments in (found, expected):
            moments.settle_()
        same(found, expected)

    @pytest.mark.parametrize("options", CHOICES, ids=str)
    def test_a_is_chosen_where_the_layer_is(self, marked, options):
        config = LORA | {"objective": "least_energy"} | options
        own, others = features_of("own", 5), [features_of(task, seed) for seed, task in enumerate("ab", 1)]
        if set(options) & {"objective", "null_space"}:
            config["in_task"] = "unused"
        models = [get_peft_model(make_base(), OSRMLoraConfig(**config)).to(one) for one in ("cpu", "cuda")]
        own = {"in_task": own} if "in_task" in config else {}
        cpu, gpu = (initialize_osrm_weights(model, others, **own) for model in models)
        assert gpu == pytest.approx(cpu, rel=1e-4, abs=1e-7)
        for name, layer in lora_layers(models[1], "default").items():
            A, there = lora_layers(models[0], "default")[name].lora_A["default"].weight, layer.lora_A["default"].weight
            assert there.is_cuda
            torch.testing.assert_close((there.mT @ there).cpu(), A.mT @ A, rtol=0, atol=1e-4)

    def test_interference_with_a_base_on_a_gpu(self, marked, tmp_path):
        adapters = two_adapters(tmp_path)
        features = {task: features_of(task, seed) for seed, task in enumerate(adapters, 1)}
        cpu, gpu = (interference(adapters, features, base=make_base().to(one)) for one in ("cpu", "cuda"))
        assert {n: v.tolist() for n, v in gpu.layers.items()} == {n: v.tolist() for n, v in cpu.layers.items()}
