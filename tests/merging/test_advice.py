"""What a merge warns of, each with its remedy; and that the usual merge says nothing."""

import json
import warnings
from dataclasses import replace

import pytest
import torch

from osrm_peft import LeastSquares, load_adapter, merge_adapters
from osrm_peft.adapters.factors import Factors
from osrm_peft.merging import METHODS
from tests.helpers.adapters import make_adapter
from tests.helpers.lora import lora
from tests.helpers.merging import features_of, merge, statistic

WIDE = {"a": (40, 50, 2), "b": (60, 45, 2)}


def adapters(number=3, layers=WIDE):
    return {f"t{seed}": lora(seed, layers) for seed in range(number)}


def said(*arguments, **named):
    """The warnings of a merge."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merge(*arguments, **named)
    return [str(one.message) for one in caught]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_usual_merge_does_not_warn(method):
    rank = {} if METHODS[method].per_task or method in ("concat", "regmean") else {"rank": 4}
    assert said(adapters(), method, **rank) == []


def test_lore_of_two_inputs_is_said_to_be_their_average():
    assert said(adapters(2), "lore") == [
        "LoRE of two inputs is their average, whatever λ and the options: take a third input, or method='average'"
    ]
    for options in ({}, {"rank_ratio": 0.5}, {"combine": "ties"}, {"mu": 0.0}):  # and it is
        lore, average = (merge_adapters(adapters(2), name, **one).deltas()
                         for name, one in (("lore", options), ("average", {})))  # fmt: skip
        assert all(float((lore[name] - average[name]).abs().max()) < 1e-5 for name in average)


def test_full_rank_without_a_rank_says_its_size_and_what_rank_16_keeps():
    (text,) = said(adapters(), "ties")
    full, small = 4 * 45 * (40 + 50 + 60 + 45) / 1e6, 4 * 16 * (40 + 50 + 60 + 45) / 1e6
    merged = merge_adapters(adapters(), "ties")
    squares = [torch.linalg.svdvals(delta).square() for delta in merged.deltas().values()]
    share = min(float(one[:16].sum() / one.sum()) for one in squares)
    assert text == (
        f"the result has rank 45, {full:.1f} MB (the adapters' ranks sum to 6): rank=16 writes {small:.1f} MB and "
        f"keeps at least {share:.1%} of a layer's energy"
    )
    for arguments in ({"rank": 16}, {"rank": "serving"}, {"space": "core"}):
        assert said(adapters(), "ties", **arguments) == []
    assert said({"t": lora(0, {"a": (16, 16, 2)})}, "ties") == []  # no rank 16 is smaller


def test_adapters_that_share_a_are_named():
    one, other, third = (lora(seed, WIDE) for seed in range(3))
    turned = {}
    for name, f in other.factors.items():  # the same rows in another basis
        shared = one.factors[name].A
        turned[name] = Factors(torch.tensor([[1.0, 2.0], [-1.0, 1.0]]) @ shared, f.B, f.s)
    (text,) = said({"x": one, "y": replace(other, factors=turned), "z": third}, "average")
    assert text.startswith("'x', 'y' share A: their A span the same directions") and "'z'" not in text
    assert text.endswith("Sums and averages are safe: they sum B. To keep tasks apart, train each with OSRM, or with a "
                         "seed of its own")  # fmt: skip
    half = {name: f if name == "a" else other.factors[name] for name, f in turned.items()}
    assert said({"x": one, "y": replace(other, factors=half)}, "average") == []  # not in most layers
    half = {n: replace(f, A=torch.cat([one.factors[n].A[:1], f.A[1:]])) for n, f in other.factors.items()}
    assert said({"x": one, "y": replace(other, factors=half)}, "average") == []  # one direction of two
    assert said({f"t{seed}": lora(seed, {"a": (6, 5, 5)}) for seed in range(2)}, "average") == []  # they must overlap


@pytest.mark.parametrize(
    ("method", "scale", "warns"),
    [("task_arithmetic", 1, False), ("task_arithmetic", 0.1, False), ("task_arithmetic", 1.5, True),
     ("tsv", 0.3, False), ("tsv", 0.2, True), ("tsv", -1, True), ("tsv", 5, True), ("average", 0, True)],
)  # fmt: skip
def test_a_scale_far_from_the_default_is_said(method, scale, warns):
    default = METHODS[method].scale
    text = f"scale={scale:g} is far from {default:g}, the default of {method}: leave it out if that is not meant"
    assert said(adapters(), method, scale=scale) == ([text] if warns else [])


def test_a_scale_that_a_rule_chooses_is_not_far():
    files, _ = features_of(["t0", "t1", "t2"], layers=WIDE)
    for rule in ({"weights": LeastSquares(files)}, {"scale": LeastSquares(files)}):
        assert said(adapters(), "task_arithmetic", **rule) == []


def test_an_adapter_that_osrm_never_initialised_is_named(tmp_path):
    for seed, name in enumerate(("set", "unset", "plain")):
        make_adapter(tmp_path / name, seed=seed)
        if name != "plain":
            (tmp_path / name / "osrm_peft.json").write_text(json.dumps({"osrm": {"initialized": name == "set"}}))
    found = {name: load_adapter(tmp_path / name) for name in ("set", "unset", "plain")}
    assert {name: one.initialized for name, one in found.items()} == {"set": True, "unset": False, "plain": None}
    (text,) = said(found, "average")
    assert text == (
        "'unset': made with OSRMLoraConfig, but OSRM never chose A, so OSRM does nothing for this merge: train anew "
        "with OSRMCallback() among the Trainer's callbacks"
    )


def test_a_warning_is_shown_once_however_often_the_merge_is_made():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            merge_adapters(adapters(2), "lore")
    assert len(caught) == 1


def test_features_on_another_base_model_are_refused_or_said(caplog):
    files, _ = features_of(["t0", "t1", "t2"], layers=WIDE)
    given = {task: replace(one, weight_hash="v2:1") for task, one in adapters().items()}
    good = {task: replace(one, weight_hash="v2:1") for task, one in files.items()}
    merge_adapters(given, "task_arithmetic", weights=LeastSquares(good))
    assert not caplog.text
    bad = {task: replace(one, weight_hash="v2:2", base_model="other") for task, one in files.items()}
    with pytest.raises(
        ValueError, match=r"features of 't0' are of other \(v2:2\), its adapter is of tiny \(v2:1\): coll"
    ):
        merge_adapters(given, "task_arithmetic", weights=LeastSquares(bad))
    merge_adapters(adapters(), "task_arithmetic", weights=LeastSquares(bad))  # the adapters' weights are not known
    assert "features of 't0' are of other, the adapters of tiny: if that is another model, collect them" in caplog.text


def test_regmean_says_that_it_has_statistics_of_the_pretrained_model(caplog):
    shapes = lora(0, WIDE).shapes
    made = {task: statistic("gram", task, shapes) for task in adapters()}
    merge_adapters(adapters(), "regmean", statistics=made)
    assert not caplog.text
    made["t1"] = replace(made["t1"], of_finetuned_model=False)
    merge_adapters(adapters(), "regmean", statistics=made)
    assert caplog.text.count("features of the pre-trained model") == 1 and "statistics of 't1'" in caplog.text
