"""Whole checkpoints: each method against the same method applied to whole tensors."""

import warnings

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from osrm_peft import merge_checkpoints
from osrm_peft.checkpoints import blocks
from osrm_peft.checkpoints.model_files import ModelFiles
from osrm_peft.checkpoints.plan import CHECKPOINT_METHODS
from osrm_peft.checkpoints.rooms import Rooms
from osrm_peft.merging.engine import Engine
from osrm_peft.merging.methods.registry import Merged
from tests.helpers.checkpoints import CASES, QUICK, WEIGHTS, by_hand, hashes, same, tensors_of, write

ONE_RESULT = [name for name in CASES if name != "emr"]


def test_every_method_has_a_case():
    assert set(CASES) == set(CHECKPOINT_METHODS)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("method", ONE_RESULT)
def test_the_result_is_the_method_on_whole_tensors(three, base, tmp_path, method, weights):
    options = QUICK.get(method, {})
    out = merge_checkpoints(three, tmp_path / "out", method, base=base, weights=weights, **options)
    expected = by_hand(three, base, method, weights=weights, **options)
    same(tensors_of(out), expected, rtol=1e-5, atol=1e-6)
    same(AutoModelForSequenceClassification.from_pretrained(out).state_dict(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("task_arithmetic", {"scale": -1.5}),
        ("ties", {"density": 0.6, "scale": 0.7}),
        ("ties", {"trim": "layer"}),
        ("dare", {"drop_rate": 0.9, "seed": 7}),
        ("dare_ties", {"drop_rate": 0.3, "density": 0.5, "trim": "layer"}),
        ("lore", {"mu_ratio": 0.5, "combine": "average", "max_iterations": 5}),
        ("lore", {"combine": "ties", "density": 0.4, "max_iterations": 4}),
        ("lore", {"rank_ratio": 0.2, "max_iterations": 3}),
        ("tsv", {"rank_share": 0.4}),
        ("iso", {"scale": 0.5}),
    ],
)
def test_options_scale_and_seed_are_the_methods(three, base, tmp_path, method, options):
    out = merge_checkpoints(three, tmp_path / "out", method, base=base, **options)
    same(tensors_of(out), by_hand(three, base, method, **options), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["average", "lore"])
def test_without_a_base_the_same_comes_out(three, base, tmp_path, method):
    options = QUICK.get(method, {})
    lone = merge_checkpoints(three, tmp_path / "lone", method, **options)
    based = merge_checkpoints(three, tmp_path / "based", method, base=base, **options)
    same(tensors_of(lone), tensors_of(based), rtol=1e-5, atol=1e-5)
    same(tensors_of(lone), by_hand(three, None, method, **options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", sorted(set(CASES) - {"average", "lore"}))
def test_other_methods_ask_for_a_base(three, tmp_path, method):
    with pytest.raises(ValueError, match=f"{method} merges differences from a base model: give base="):
        merge_checkpoints(three, tmp_path / "out", method)
    assert not list(tmp_path.iterdir())


def test_lore_has_no_weights_without_a_base(three, base, tmp_path):
    with pytest.raises(ValueError, match=r"lore has only with base=: leave weights out"):
        merge_checkpoints(three, tmp_path / "out", "lore", weights=WEIGHTS)
    assert merge_checkpoints(three, tmp_path / "out", "lore", weights=[1, 1, 1], max_iterations=1)
    assert merge_checkpoints(
        three, tmp_path / "out", "lore", weights=WEIGHTS, base=base, overwrite=True, max_iterations=1
    )


@pytest.mark.parametrize("method", CASES)
def test_the_order_of_models_does_not_matter(three, base, tmp_path, method):
    turned, options = dict(reversed(three.items())), QUICK.get(method, {})
    one = merge_checkpoints(three, tmp_path / "one", method, base=base, weights=WEIGHTS, **options)
    two = merge_checkpoints(turned, tmp_path / "two", method, base=base, weights=WEIGHTS, **options)
    for folder in three if method == "emr" else [""]:
        same(tensors_of(one / folder), tensors_of(two / folder), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [name for name in ONE_RESULT if name != "iso"])
def test_one_model_is_returned_as_it_is(three, base, tmp_path, method):
    out = merge_checkpoints({"a": three["a"]}, tmp_path / "out", method, base=base, scale=1, **CASES[method])
    same(tensors_of(out), tensors_of(three["a"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ONE_RESULT)
def test_models_that_are_the_base_merge_to_it(base, tmp_path, method):
    out = merge_checkpoints({"a": base, "b": base}, tmp_path / "out", method, base=base)
    same(tensors_of(out), tensors_of(base), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scale", [0.3, 1.0])
@pytest.mark.parametrize("method", ["average", "task_arithmetic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_linear_merges_are_rounded_once(tmp_path, method, dtype, scale):
    draw, alike = torch.Generator().manual_seed(0), {}
    base = torch.randn(500, 60, generator=draw).to(dtype)
    models = {name: (base + 0.1 * torch.randn(500, 60, generator=draw)).to(dtype) for name in "abcdefgh"}
    folders = {name: write(tmp_path / name, {"weight": one}) for name, one in (models | {"base": base}).items()}
    under = folders.pop("base")
    out = merge_checkpoints(folders, tmp_path / "out", method, base=under, scale=scale)
    steps = torch.stack([one.double() - base.double() for one in models.values()])
    exact = base.double() + scale * (steps.mean(0) if method == "average" else steps.sum(0))
    # half a unit of the dtype, and float32 sums of nine products of entries below 8
    torch.testing.assert_close(tensors_of(out)["weight"].double(), exact, rtol=torch.finfo(dtype).eps / 2, atol=1e-5)
    for name in "abcdefgh":
        alike[name] = write(tmp_path / f"alike-{name}", {"weight": base})
    same(tensors_of(merge_checkpoints(alike, tmp_path / "all", method, base=under, scale=scale)), {"weight": base})


@pytest.mark.parametrize(
    ("method", "options"),
    [(name, {}) for name in sorted(set(CASES) - {"lore", "tsv"})]
    + [("ties", {"trim": "layer"}), ("dare_ties", {"trim": "layer"}), ("lore", QUICK["lore"])],
)
def test_the_size_of_blocks_does_not_change_a_bit(three, base, tmp_path, monkeypatch, method, options):
    folders = three if method == "emr" else [""]
    whole = merge_checkpoints(three, tmp_path / "whole", method, base=base, weights=WEIGHTS, seed=3, **options)
    monkeypatch.setattr(blocks, "BLOCK", 100)
    parts = merge_checkpoints(three, tmp_path / "parts", method, base=base, weights=WEIGHTS, seed=3, **options)
    tolerance = 1e-6 if method == "emr" else 0  # its rescalers are sums over all blocks
    for folder in folders:
        same(tensors_of(parts / folder), tensors_of(whole / folder), rtol=tolerance)


def test_a_method_may_return_a_part_of_what_it_is_given(three, base, tmp_path, monkeypatch, threads):
    """Blocks share their memory: a result in it is not written over by the next block."""
    monkeypatch.setattr(blocks, "BLOCK", 100)
    monkeypatch.setattr(Engine, "merged", lambda self, stack, weights, statistics=None: Merged(stack[1]))
    threads(2)
    out = merge_checkpoints(three, tmp_path / "out", "ties", base=base, scale=1.0)
    second = tensors_of(list(three.values())[1])
    same({name: one for name, one in tensors_of(out).items() if one.is_floating_point()},
         {name: one for name, one in second.items() if one.is_floating_point()}, rtol=1e-5, atol=1e-6)  # fmt: skip


def test_dare_drops_by_seed_task_and_tensor(three, base, tmp_path):
    one = merge_checkpoints(three, tmp_path / "one", "dare", base=base, scale=1.0, seed=1)
    again = merge_checkpoints(three, tmp_path / "again", "dare", base=base, scale=1.0, seed=1)
    other = merge_checkpoints(three, tmp_path / "other", "dare", base=base, scale=1.0, seed=2)
    assert hashes(one).keys() != hashes(again).keys()
    same(tensors_of(one), tensors_of(again))
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    assert not torch.equal(tensors_of(one)[name], tensors_of(other)[name])


def test_the_threshold_of_ties_is_over_the_whole_model(tmp_path):
    base = write(tmp_path / "base", {"large": torch.zeros(4, 5), "small": torch.zeros(20)})
    a = write(tmp_path / "a", {"large": torch.arange(20.0).view(4, 5) + 100, "small": torch.arange(20.0)})
    out = tensors_of(merge_checkpoints({"a": a}, tmp_path / "out", "ties", base=base, density=0.5))
    assert torch.equal(out["large"], torch.arange(20.0).view(4, 5) + 100) and not out["small"].any()
    layer = tensors_of(
        merge_checkpoints({"a": a}, tmp_path / "out", "ties", base=base, density=0.5, overwrite=True, trim="layer")
    )
    assert (layer["large"] > 0).sum() == 10 and (layer["small"] > 0).sum() == 10


def test_weights_are_by_name_in_order_or_by_pattern(three, base, tmp_path):
    def merged(weights):
        return tensors_of(
            merge_checkpoints(three, tmp_path / "out", "task_arithmetic", base=base, overwrite=True, weights=weights)
        )

    named = merged(WEIGHTS)
    same(named, merged(list(WEIGHTS.values())))
    same(named, merged(dict(reversed(WEIGHTS.items()))))
    mixed = merged({"a": {"*layer.0*": 0.0, "*": 1.0}, "b": -0.5, "c": 2.0})
    without_a = merged({"a": 0.0, "b": -0.5, "c": 2.0})
    for name, tensor in mixed.items():
        assert torch.equal(tensor, (without_a if "layer.0" in name else named)[name])
    with pytest.raises(ValueError, match=r"no pattern of task 'a' .* matches layer 'bert\.embeddings"):
        merged({"a": {"*layer.0*": 1.0}, "b": 1.0, "c": 1.0})
    with pytest.raises(ValueError, match="sum to 0"):
        merge_checkpoints(three, tmp_path / "out", "average", weights=[1, -1, 0])


def test_tensors_of_every_shape_are_merged(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = {"scalar": (), "one": (1,), "vector": (7,), "row": (1, 5), "column": (5, 1), "matrix": (6, 4),
              "kernel": (3, 2, 2, 2), "empty": (0, 4), "no_width": (3, 0)}  # fmt: skip
    folders = {
        name: write(tmp_path / name, {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()})
        for name in ("base", "a", "b")
    }
    states = {name: tensors_of(folder) for name, folder in folders.items()}
    models = {"a": folders["a"], "b": folders["b"]}
    layer = {"trim": "layer"}
    for method, options in [*((name, CASES[name]) for name in ONE_RESULT), ("ties", layer), ("dare_ties", layer)]:
        out = tensors_of(
            merge_checkpoints(models, tmp_path / "out", method, base=folders["base"], overwrite=True, **options)
        )
        assert {name: tuple(tensor.shape) for name, tensor in out.items()} == shapes
        if method in ("average", "lore", "tsv", "iso"):
            for name in shapes if method == "average" else {"scalar", "one", "vector", "row", "column", "kernel"}:
                torch.testing.assert_close(out[name], (states["a"][name] + states["b"][name]) / 2)
    emr = merge_checkpoints(models, tmp_path / "emr", "emr", base=folders["base"])
    assert {name: tuple(tensor.shape) for name, tensor in tensors_of(emr / "b").items()} == shapes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [-0.3, 0.3, 1.0])
def test_equal_models_give_themselves_however_large(tmp_path, dtype, scale):
    mask = torch.tensor([[torch.finfo(dtype).min, torch.finfo(dtype).max, 0.0, 1.0]]).to(dtype)
    folders = {name: write(tmp_path / name, {"mask": mask}) for name in ("base", *"abcdefgh")}
    under = folders.pop("base")
    out = merge_checkpoints(folders, tmp_path / "out", "task_arithmetic", base=under, scale=scale)
    same(tensors_of(out), {"mask": mask})


def test_layers_that_are_trimmed_whole_are_in_memory_one_at_a_time(three, base, tmp_path, monkeypatch):
    block, begun, seen = blocks.Blocks.block, [], []
    monkeypatch.setattr(blocks.Blocks, "block", lambda *place: (begun.append(place), block(*place))[1])
    made = blocks.Blocks.made

    def watched(self, places):
        for results in made(self, places):
            seen.append(len(begun))
            yield results

    monkeypatch.setattr(blocks.Blocks, "made", watched)
    merge_checkpoints(three, tmp_path / "out", "ties", base=base, trim="layer")
    assert seen == list(range(1, len(seen) + 1)) and len(seen) > 20


def test_lore_of_two_models_and_a_far_scale_are_said(three, base, tmp_path):
    two = {name: three[name] for name in ("a", "b")}
    with pytest.warns(UserWarning, match="LoRE of two inputs is their average"):
        merge_checkpoints(two, tmp_path / "two", "lore", max_iterations=2)
    with pytest.warns(UserWarning, match="scale=9 is far from 1, the default of ties: leave it out"):
        merge_checkpoints(three, tmp_path / "far", "ties", base=base, scale=9)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module=r"osrm_peft\.")
        merge_checkpoints(three, tmp_path / "usual", "lore", max_iterations=2)


@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties", "dare", "tsv"])
def test_the_default_dtype_of_the_program_does_not_matter(three, base, tmp_path, method):
    expected = merge_checkpoints(three, tmp_path / "expected", method, base=base)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        out = merge_checkpoints(three, tmp_path / "out", method, base=base)
    finally:
        torch.set_default_dtype(before)
    same(tensors_of(out), tensors_of(expected), rtol=1e-5, atol=1e-6)


def test_a_matrix_that_is_decomposed_leaves_no_memory_behind(three, base):
    rooms = Rooms(reused=False)
    models = [ModelFiles(str(three["a"])), ModelFiles(str(base))]
    name = next(name for name, entry in models[0].tensors.items() if len(entry.shape) == 2)
    stack = rooms.stack(models, name, 0, 4, models[0].tensors[name].width)
    assert not rooms.holds(stack) and stack.data_ptr() != rooms.stack(models, name, 0, 4, stack.shape[2]).data_ptr()
    assert torch.equal(stack[0], models[0].read(name, 0, 4).float())
