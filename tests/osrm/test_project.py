"""project_adapter against dense formulas, and what it leaves of an adapter."""

import copy
import json
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import PeftModel

from osrm_peft import collect_features, load_adapter, merge_adapters
from osrm_peft.adapters.factors import Factors
from osrm_peft.adapters.lora_adapter import LoraAdapter
from osrm_peft.features.moments import FeatureMoments
from osrm_peft.features.task_features import TaskFeatures
from osrm_peft.models.layers import lora_layers
from osrm_peft.osrm.project import project_adapter
from osrm_peft.osrm.spectrum import PooledMoment, Spectrum
from osrm_peft.osrm.subspace import choose_directions
from osrm_peft.seeding import task_generator
from tests.helpers.adapters import make_adapter, tensors_of
from tests.helpers.models import make_base, make_batch
from tests.helpers.subspace import FORMS, tasks, top

TARGETS = ["query", "value"]


def features(task, moments, **fields):
    fields = {"base_model": "tiny", "weight_hash": "hash", "statistic": "token"} | fields
    return TaskFeatures(task, **fields, layers={"layer": moments})


def adapter_of(o, r, n, s=2.0, seed=0):
    """One layer in float64, so that nothing is rounded below the tests' tolerances."""
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((r, n), (o, r)))
    return LoraAdapter({"layer": Factors(A, B, s)}, {}, {"r": r})


def exactly(rows):
    """Moments of these very rows, in float64."""
    return FeatureMoments("sample", rows.shape[1], len(rows), total=rows.sum(0), rows=rows)


def project(adapter, others, own=None, **options):
    """The projection of a one-layer adapter: its ΔŴ, and its LayerProjection."""
    out = [features(f"other{i}", moments) for i, moments in enumerate(others)]
    found = project_adapter(adapter, out, in_task=None if own is None else features("own", own), **options)
    assert set(found.adapter.factors) == set(found.layers) == {"layer"}
    return found.adapter.factors["layer"].delta(), found.layers["layer"]


def effect(delta, S):
    """E‖ΔW h‖² = tr(ΔW S ΔWᵀ)."""
    return float(torch.trace(delta @ S @ delta.T))


def assert_reports(layer, before, after, S, S_own):
    """The shares that a LayerProjection tells, against dense numbers."""
    identity = torch.eye(len(S), dtype=S.dtype)
    for told, moment in ((layer.energy_kept, identity), (layer.out_of_task_kept, S), (layer.in_task_kept, S_own)):
        if moment is None:
            assert told is None
        else:
            scale = 1e-12 * float(before.square().sum() * torch.linalg.matrix_norm(moment, 2))
            assert told * effect(before, moment) == pytest.approx(effect(after, moment), abs=scale)


settings_of_a_task = {
    "o": st.integers(1, 8), "r": st.integers(1, 4), "n": st.integers(4, 12), "k": st.integers(1, 14),
    "T": st.integers(1, 3), "statistic": st.sampled_from(["mean", "sample", "token"]),
}  # fmt: skip


@settings(max_examples=40)
@given(**settings_of_a_task, seed=st.integers(0, 3), with_own=st.booleans(), s=st.sampled_from([0.5, 2.0]))
def test_the_paper_s_projection_is_the_dense_formula(o, r, n, k, T, statistic, seed, with_own, s):
    others, own = tasks(T, k, n, statistic), tasks(1, k, n, statistic, seed=5)[0] if with_own else None
    adapter = adapter_of(o, r, n, s)
    A, B = adapter.factors["layer"].A, adapter.factors["layer"].B
    after, layer = project(adapter, others, own, seed=seed)
    pool = PooledMoment.of(others)
    task = "own" if with_own else "not " + ", ".join(f"other{i}" for i in range(T))
    frame = choose_directions(Spectrum.of(pool), r, generator=task_generator(seed, task, "layer"))
    torch.testing.assert_close(after, (s * B @ A @ frame.T) @ frame, rtol=0, atol=1e-12)
    assert layer.protected is None
    assert_reports(layer, s * B @ A, after, pool.second_moment(), None if own is None else own.second_moment())


def projected_brute_force(delta, others, S_own, keep):
    """ΔŴ with the largest p, of all of them, that keeps the share; None if rounding may decide."""
    V = Spectrum.of(PooledMoment.of(others)).vectors
    candidates = [delta - delta @ V[:, :p] @ V[:, :p].T for p in range(V.shape[1] + 1)]
    shares = [effect(candidate, S_own) / effect(delta, S_own) for candidate in candidates]
    if any(abs(share - keep) < 1e-9 for share in shares[1:]):
        return None, None
    p = max(p for p, share in enumerate(shares) if share >= keep - 1e-9)
    return candidates[p], p


@settings(max_examples=80)
@given(
    **settings_of_a_task, keep=st.one_of(st.floats(0.01, 1), st.just(1.0)),
    own_form=st.sampled_from(list(FORMS)), form=st.sampled_from(list(FORMS)),
)  # fmt: skip
def test_keep_protects_as_many_of_the_strongest_directions_as_it_can(o, r, n, k, T, statistic, keep, own_form, form):
    others, own = tasks(T, k, n, statistic), tasks(1, k, n, statistic, seed=5)[0]
    adapter = adapter_of(o, r, n)
    before, S_own = adapter.factors["layer"].delta(), own.second_moment()
    expected, p = projected_brute_force(before, others, S_own, keep)
    assume(p is not None)
    after, layer = project(adapter, list(map(FORMS[form], others)), FORMS[own_form](own), min_effect_kept=keep)
    assert layer.protected == p
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-9)
    assert_reports(layer, before, after, PooledMoment.of(others).second_moment(), S_own)
    assert layer.in_task_kept >= keep - 1e-9


def test_keep_everything_gives_up_what_the_own_features_never_meet():
    """Own features along the weakest of three orthogonal out-of-task directions: the two others are free to go."""
    n = 6
    Q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    others = [exactly(torch.tensor([[3.0], [2.0], [1.0]]) * Q[:3])]
    for own, p in ((Q[2:3], 2), (Q[1:3], 1), (Q[3:5], 3), (Q[:1], 0)):
        after, layer = project(adapter_of(4, 2, n), others, exactly(own), min_effect_kept=1.0)
        assert layer.protected == p and layer.in_task_kept == pytest.approx(1, abs=1e-12)
        assert (after @ Q[:p].T).norm() < 1e-12


@pytest.mark.parametrize("keep", [0.5, 1.0])
@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_without_effect_on_its_own_features_has_nothing_to_lose(form, keep):
    """E‖ΔW h_t‖² = 0 up to rounding of either sign, so every direction may be protected."""
    for seed in range(8):
        adapter, others = adapter_of(4, 2, 8, seed=seed), tasks(2, 2, 8, "sample", seed=seed)
        A, V = adapter.factors["layer"].A, Spectrum.of(PooledMoment.of(others)).vectors
        own = exactly(torch.linalg.svd(torch.cat([A, V.T]))[2][6:])  # beside A's 2 rows and the others' 4 directions
        _, layer = project(adapter, others, FORMS[form](own), min_effect_kept=keep)
        assert (layer.protected, layer.in_task_kept) == (4, 1.0)
        zero = replace(adapter, factors={"layer": Factors(A, torch.zeros(4, 2, dtype=A.dtype))})
        _, layer = project(zero, others, FORMS[form](own), min_effect_kept=keep)
        assert (layer.energy_kept, layer.out_of_task_kept, layer.protected) == (1.0, 1.0, 4)


def test_the_scale_is_kept():
    """With r = 8, alpha = 16 a frame that spans A's rows gives ΔW itself, not 2ΔW or ΔW/2."""
    adapter = adapter_of(12, 8, 16, s=16 / 8)
    before = adapter.factors["layer"].delta()
    spanned = torch.linalg.qr(adapter.factors["layer"].A.T)[0]
    rest = torch.eye(16, dtype=torch.float64) - spanned @ spanned.T
    others = FeatureMoments("token", 16, count=8, total=torch.zeros(16), second=8 * rest)  # leaves A's span free
    after, layer = project(adapter, [others])
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)
    assert layer.energy_kept == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("null_space", ["random", "in_task"])
def test_protect_and_null_space_choose_the_frame(null_space):
    others, own, adapter = tasks(2, 6, 12, "sample"), tasks(1, 9, 12, "sample", seed=5)[0], adapter_of(5, 3, 12)
    before = adapter.factors["layer"].delta()
    after, _ = project(adapter, others, own, null_space=null_space, protect_rank=2, seed=4)
    strong = top(PooledMoment.of(others).second_moment(), 2)
    P = torch.eye(12, dtype=torch.float64) - strong.T @ strong
    frame = top(P @ own.second_moment() @ P, 3)
    if null_space == "random":
        stream = task_generator(4, "own", "layer")
        frame = choose_directions(Spectrum.of(PooledMoment.of(others)), 3, protect_rank=2, generator=stream)
    torch.testing.assert_close(after, before @ frame.T @ frame, rtol=0, atol=1e-9)
    assert (after @ strong.T).norm() < 1e-9


def collected(task, seed, targets=TARGETS, base=None, **options):
    loader = [make_batch(seed=seed)]
    return collect_features(base or make_base(), loader, task=task, target_modules=targets, progress=False, **options)


CONFIGS = {
    "rslora": {"use_rslora": True, "lora_alpha": 16},
    "rank_pattern": {"rank_pattern": {"value": 2}, "alpha_pattern": {"layer.1.attention.self.query": 3}},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("keep", [None, 0.6])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_projected_adapter_is_a_stock_adapter(tmp_path, config, keep):
    make_adapter(tmp_path / "theirs", **CONFIGS[config])
    source = load_adapter(tmp_path / "theirs")
    files = {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    others, own = [collected("a", 1), collected("b", 2)], collected("own", 3)
    projection = project_adapter(source, others, in_task=own, min_effect_kept=keep, seed=1)
    projection.save_pretrained(tmp_path / "ours")
    projection.save_pretrained(tmp_path / "ours")  # ours, so it may be replaced
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    dtype = CONFIGS[config].get("dtype", torch.float32)
    saved, was = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "theirs")
    assert {tensor.dtype for name, tensor in saved.items() if "lora_" in name} == {dtype}
    heads = [name for name in was if "classifier" in name]
    assert len(heads) == 2 and all(torch.equal(saved[name], was[name]) for name in heads)
    model = PeftModel.from_pretrained(make_base(), str(tmp_path / "ours")).float()
    layers = lora_layers(model, "default")
    assert set(layers) == set(projection.layers) == set(source.shapes)
    unit = 2**-8 if dtype == torch.bfloat16 else 2**-24  # of rounding A and s·B into the file; products are float32
    for name, layer in layers.items():
        found = projection.adapter.factors[name]
        bound = (2.1 * unit + 8 * 2**-24) * (found.s * found.B.abs() @ found.A.abs())
        assert found.rank == source.shapes[name][1]
        assert ((layer.get_delta_weight("default") - found.delta()).abs() <= bound).all()
        before, S = source.factors[name].delta().double(), own.layers[name].second_moment()
        if keep is None:
            torch.testing.assert_close(found.A @ found.A.T, torch.eye(found.rank), rtol=0, atol=1e-6)
            projected = before @ found.A.double().T @ found.A.double()
        else:
            moments = [one.layers[name] for one in others]
            projected, p = projected_brute_force(before, moments, S, keep)
            assert projection.layers[name].protected == p
        torch.testing.assert_close(found.delta().double(), projected, rtol=0, atol=1e-6 * float(before.norm()))
        kept = effect(projected, S) / effect(before, S)
        assert projection.layers[name].in_task_kept == pytest.approx(kept, rel=1e-5)
    merged = merge_adapters({"own": tmp_path / "ours", "other": tmp_path / "theirs"}, "average")
    merged.save_pretrained(tmp_path / "merged")
    mean = (load_adapter(tmp_path / "ours").factors[name].delta() + source.factors[name].delta()) / 2
    assert (load_adapter(tmp_path / "merged").factors[name].delta() - mean).norm() <= 4 * unit * mean.norm() + 1e-6


def test_the_manifest_says_how_it_was_made(tmp_path):
    make_adapter(tmp_path / "theirs")
    origin = {"kind": "adapter", "task": "own", "num_labels": 3, "metric": "accuracy", "seed": 7, "more": 1}
    (tmp_path / "theirs/osrm_peft.json").write_text(json.dumps(origin))
    for seed, name in enumerate("ab"):
        collected(name, seed).save(tmp_path / f"{name}.safetensors")
    given = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    projection = project_adapter(tmp_path / "theirs", given, in_task=collected("own", 3), min_effect_kept=0.5)
    projection.save_pretrained(tmp_path / "ours")
    manifest = json.loads((tmp_path / "ours/osrm_peft.json").read_text())
    assert {key: manifest[key] for key in origin if key != "more"} == {k: v for k, v in origin.items() if k != "more"}
    assert "more" not in manifest and manifest["base_model"] == "tiny" and manifest["versions"]["peft"]
    settings_of = {"adapter": str(tmp_path / "theirs"), "sha256": load_adapter(tmp_path / "theirs").sha256}
    settings_of |= {
        "min_effect_kept": 0.5,
        "null_space": "random",
        "protect_rank": None,
        "protect_energy": None,
        "seed": 0,
    }
    used = [manifest["projected"].pop("in_task"), *manifest["projected"].pop("out_of_task")]
    assert [(one["task"], one["statistic"], len(one["weight_hash"])) for one in used] == [
        (task, "token", 16) for task in ("own", "a", "b")
    ]
    assert manifest["projected"] == settings_of
    assert list(manifest["layers"]) == list(projection.layers)
    for layer in manifest["layers"].values():
        assert set(layer) == {"energy_kept", "out_of_task_kept", "in_task_kept", "protected"}
    means = projection.mean()
    for key, value in means.items():
        assert value == pytest.approx(sum(layer[key] for layer in manifest["layers"].values()) / 4)
    paper = project_adapter(tmp_path / "theirs", given)
    assert set(paper.mean()) == {"energy_kept", "out_of_task_kept"} and paper.settings["in_task"] is None


def test_a_live_model_and_its_weights_stay_as_they_are(tmp_path):
    """Any adapter name, and everything on the CPU."""
    model = make_adapter(tmp_path)
    model.add_adapter("größte-2", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("größte-2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for layer in lora_layers(model, "größte-2").values():
            layer.lora_B["größte-2"].weight.normal_()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    projection = project_adapter(model, [collected("a", 1)])
    for name, layer in lora_layers(model, "größte-2").items():
        frame = projection.adapter.factors[name].A
        expected = layer.get_delta_weight("größte-2").detach() @ frame.T @ frame
        torch.testing.assert_close(projection.adapter.factors[name].delta(), expected, rtol=0, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("others", "own", "options", "message"),
    [
        ([], None, {}, "no out-of-task features"),
        ("ab", None, {"min_effect_kept": 0.5}, "look at the task's own features: give in_task=FILE"),
        ("ab", None, {"null_space": "in_task"}, "look at the task's own features: give in_task=FILE"),
        ("ab", "own", {"min_effect_kept": 0}, "min_effect_kept=0 must lie in (0, 1]"),
        ("ab", "own", {"min_effect_kept": 1.5}, "min_effect_kept=1.5 must lie in (0, 1]"),
        ("ab", "own", {"min_effect_kept": True}, "min_effect_kept=True must lie in (0, 1]"),
        (
            "ab",
            "own",
            {"min_effect_kept": 0.5, "null_space": "in_task"},
            "leave null_space, protect_rank and protect_energy out",
        ),
        (
            "ab",
            "own",
            {"min_effect_kept": 0.5, "protect_rank": 0},
            "leave null_space, protect_rank and protect_energy out",
        ),
        ("ab", None, {"protect_rank": -1}, "protect_rank=-1 must be a whole number of at least 0"),
        ("ab", None, {"null_space": "x"}, "unknown null_space 'x': choose from random, in_task"),
        ("aa", None, {}, "out_of_task names a more than once"),
        ("ab", "a", {}, "task 'a' is both in_task and out_of_task"),
        (["a", {"statistic": "mean"}], None, {}, "those of 'b' 'mean': collect them alike"),
        (["a", {"adapted": True}], None, {}, "the statistics of task 'b' are of its fine-tuned model (collect_gram"),
        (["a", {"targets": ["query"]}], None, {}, "the features of task 'b' (of tiny) lack 2 of the 4 layers of"),
        (["a", {"base": {"hidden_size": 8}}], None, {}, "task 'b' have width 8 at 'bert.encoder.layer.0.attention"),
        (["a", {"base": {"seed": 1}}], None, {}, "the features of task 'a' are of tiny ("),
        ("ab", {"base": {"seed": 1}}, {}, "the features of task 'a' are of tiny ("),
        ("ab", {"targets": ["value"]}, {}, "the features of task 'b' (of tiny) lack 2 of the 4 layers of"),
        (["no/such.safetensors"], None, {}, "no features file no/such.safetensors"),
    ],
)
def test_features_and_options_that_do_not_fit(tmp_path, others, own, options, message):
    make_adapter(tmp_path)

    def made(what):
        if isinstance(what, dict):
            adapted, base = what.get("adapted", False), what.get("base")
            rest = {key: value for key, value in what.items() if key not in ("adapted", "base")}
            return replace(collected("b", 2, base=base and make_base(**base), **rest), of_finetuned_model=adapted)
        return collected(what, 1) if what and len(what) < 4 else what

    given_own = made(own) if not isinstance(own, dict) else replace(made(own), task="b")
    others = ["a"] if isinstance(own, dict) else others
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        project_adapter(tmp_path, [made(other) for other in others], in_task=given_own, **options)


def test_a_layer_without_features_is_not_passed_over(tmp_path):
    make_adapter(tmp_path, target_modules=["word_embeddings", "query"])
    with pytest.raises(ValueError, match=r"lack 1 of the 3 layers of .*: bert.embeddings.word_embeddings; collect"):
        project_adapter(tmp_path, [collected("a", 1)])


def test_a_folder_that_is_not_ours_is_refused(tmp_path):
    make_adapter(tmp_path / "theirs")
    projection = project_adapter(tmp_path / "theirs", [collected("a", 1)])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    for folder in ("mine", "theirs"):
        with pytest.raises(FileExistsError, match="is not a folder that osrm_peft wrote as 'adapter'"):
            projection.save_pretrained(tmp_path / folder)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_features_of_another_model_or_made_otherwise_are_refused(tmp_path):
    adapter = load_adapter_of(tmp_path)
    one, two = collected("a", 0), collected("b", 1)
    other = replace(one, base_model="another/model")
    with pytest.raises(ValueError, match=r"of task 'a' are of another/model, the adapter .* is of tiny: .*base_model="):
        project_adapter(adapter, [other])
    assert project_adapter(adapter, [other], base_model="tiny").layers.keys() == adapter.shapes.keys()
    with pytest.raises(ValueError, match="'a' were collected with reference=False, those of 'b' with reference=True"):
        project_adapter(adapter, [one, replace(two, reference=True)])
    wider = replace(two, weight_hash="0" * 16, layers={**two.layers, "more": next(iter(two.layers.values()))})
    project_adapter(adapter, [one, wider])  # hashes are over a file's own layers: these cannot be compared


def load_adapter_of(tmp_path):
    make_adapter(tmp_path / "ad")
    return load_adapter(tmp_path / "ad")
