"""Random LoRA problems of two small layers."""

import torch
from hypothesis import strategies as st

from osrm_peft import LoraAdapter
from osrm_peft.adapters.factors import Factors

# shared by the tests of the other methods: adapters in memory, drawn from few numbers
LAYERS = {"a": (6, 5, 2), "b": (4, 7, 3)}  # {layer: (o, n, r)}
problems = st.tuples(
    st.integers(1, 6),
    st.integers(1, 6),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),  # a rank a task, above o and n too
    st.integers(0, 999),
)


def lora(seed, layers=None, s=0.7):
    """An adapter in memory, {layer: (o, n, r)}."""
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: Factors(torch.randn(r, n, generator=generator), torch.randn(o, r, generator=generator), s)
        for name, (o, n, r) in (layers or LAYERS).items()
    }
    return LoraAdapter(factors, {}, {"base_model_name_or_path": "tiny"})


def draw(problem):
    """{task: adapter} of one layer "x", and weights that are never 0, some negative."""
    o, n, ranks, seed = problem
    adapters = {f"t{i}": lora(seed + i, {"x": (o, n, r)}, s=0.5 + i) for i, r in enumerate(ranks)}
    sizes = torch.rand(len(ranks), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return adapters, [float(w) for w in (0.25 + sizes) * torch.tensor([1.0, -1.0, 1.0, 1.0])[: len(ranks)]]


def dense(adapters, layer="x"):
    """(T, o, n) float64 task vectors, 0 where an adapter lacks the layer."""
    found = [adapter.factors.get(layer) for adapter in adapters.values()]
    o, n = next((len(f.B), f.A.shape[1]) for f in found if f is not None)
    zero = torch.zeros(o, n, dtype=torch.float64)
    return torch.stack([zero if f is None else f.s * (f.B.double() @ f.A.double()) for f in found])


def close(actual, expected, tolerance, scale=None):
    """‖actual − expected‖ ≤ tolerance · scale, by default of ‖expected‖."""
    scale = float(expected.norm()) if scale is None else scale
    assert actual.shape == expected.shape
    assert float((actual.double() - expected.double()).norm()) <= tolerance * scale
