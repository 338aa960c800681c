"""EMR-Merging: Algorithm 1 by its definition, the bits of the masks, and the folder."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from osrm_peft import EMRAdapter, LeastSquares, MergedAdapter, merge_adapters
from osrm_peft.merging.emr_adapter import MASKS, EMRLayer
from osrm_peft.merging.methods.emr import emr
from tests.helpers.adapters import kind_of, two_adapters
from tests.helpers.lora import close, dense, lora
from tests.helpers.models import make_base, make_batch


def elect(entries):
    """One entry of Algorithm 1: γ, then the largest magnitude among the tasks whose sign it is."""
    total = sum(entries)
    agreeing = [abs(x) for x in entries if x * total > 0]
    unified = (1 if total > 0 else -1) * max(agreeing) if agreeing else 0.0
    return unified, [x * unified > 0 for x in entries]


@settings(max_examples=25)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.integers(0, 999), st.booleans())
def test_the_shared_vector_and_the_masks_are_algorithm_1(T, o, n, seed, coarse):
    generator = torch.Generator().manual_seed(seed)
    tau = torch.randn(T, o, n, generator=generator, dtype=torch.float64)
    tau = tau.round() if coarse else tau  # zeros, ties and sums of exactly 0
    weights = torch.tensor([1.0, -0.5, 2.0, 0.0, 1.0])[:T].double()
    unified, masks = emr(tau, weights)
    for i in range(o):
        for j in range(n):
            u, m = elect([float(w) * float(x) for w, x in zip(weights, tau[:, i, j], strict=True)])
            assert float(unified[i, j]) == u and masks[:, i, j].tolist() == m


def test_opposite_vectors_elect_nothing():
    unified, masks = emr(torch.tensor([[[2.0]], [[-2.0]]]), torch.ones(2))
    assert unified.item() == 0 and not masks.any()
    unified, masks = emr(torch.tensor([[[2.0]], [[-2.0]]]), torch.tensor([1.0, -1.0]))
    assert unified.item() == 2 and masks.all()


SIZES = {"large": (8, 6, 2), "small": (2, 3, 1)}


def drawn(large=10.0):
    """Two adapters in memory, the larger layer with larger task vectors."""
    adapters = {"s": lora(1, SIZES), "t": lora(2, SIZES)}
    for adapter in adapters.values():
        adapter.factors["large"].B.mul_(large)
    return adapters


@pytest.mark.parametrize("weights", [[1.0, 1.0], [2.0, -0.5]])
def test_a_task_s_scale_is_a_ratio_of_sums_over_all_layers(weights):
    adapters = drawn()
    merged = merge_adapters(adapters, "emr", weights=weights)
    above, below = [0.0, 0.0], [0.0, 0.0]
    means_above, means_below = [0.0, 0.0], [0.0, 0.0]  # the published code sums up means of tensors instead
    vectors = {}
    for name in SIZES:
        theta = torch.tensor(weights)[:, None, None] * dense(adapters, name).float()
        o, n = theta.shape[1:]
        entries = [[elect(theta[:, i, j].tolist()) for j in range(n)] for i in range(o)]
        for t in range(2):
            masked = torch.tensor([[u * m[t] for u, m in row] for row in entries], dtype=torch.float64)
            vectors[t, name] = masked
            above[t] += float(theta[t].double().abs().sum())
            below[t] += float(masked.abs().sum())
            means_above[t] += float(theta[t].double().abs().mean())
            means_below[t] += float(masked.abs().mean())
    for t, task in enumerate(adapters):
        scale = above[t] / below[t]
        assert merged.scales[task] == pytest.approx(scale, rel=1e-6)
        assert abs(means_above[t] / means_below[t] / scale - 1) > 1e-3
        for name in SIZES:
            close(merged.deltas(task)[name], scale * vectors[t, name], 1e-6)
        assert sum(float(delta.abs().sum()) for delta in merged.deltas(task).values()) == pytest.approx(above[t], 1e-6)
    half = merged.at_scale(0.5)
    assert torch.equal(half.deltas("s")["small"], 0.5 * merged.deltas("s")["small"])


def test_a_lone_task_is_itself_and_copies_share_one_vector():
    adapters = drawn()
    for group in ({"s": adapters["s"]}, {"s": adapters["s"], "same": adapters["s"]}):
        merged = merge_adapters(group, "emr")
        assert all(scale == pytest.approx(1) for scale in merged.scales.values())
        for name in SIZES:
            close(merged.deltas("s")[name], dense(group, name)[0], 1e-6)


def test_a_task_that_never_agrees_gets_nothing_and_a_1x1_layer_one_entry():
    tiny = {"x": (1, 1, 1)}
    adapters = {"s": lora(1, tiny), "t": lora(1, tiny)}
    merged = merge_adapters(adapters, "emr", weights=[2, -1])
    assert merged.scales == {"s": pytest.approx(1), "t": 0}
    assert merged.deltas("t")["x"].item() == 0
    assert merged.deltas("s")["x"].item() == pytest.approx(2 * float(dense(adapters)[0]))


def test_a_mask_is_one_bit_an_entry_and_task():
    merged = merge_adapters(drawn() | {"u": lora(3, SIZES)}, "emr")
    for name, (o, n, _) in SIZES.items():
        layer = merged.layers[name]
        assert layer.masks.dtype == torch.uint8 and layer.masks.shape == (3, -(-o * n // 8))
        assert layer.unified.shape == (o, n)


@settings(max_examples=25)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_packed_bits_are_the_masks_row_by_row(T, o, n, seed):
    masks = torch.rand(T, o, n, generator=torch.Generator().manual_seed(seed)) < 0.5
    layer = EMRLayer.pack(torch.ones(o, n), masks)
    for t in range(T):
        assert torch.equal(layer.masked(t), masks[t].float())
        bits = [int(byte) >> (7 - bit) & 1 for byte in layer.masks[t] for bit in range(8)]
        assert bits[: o * n] == masks[t].flatten().int().tolist() and not any(bits[o * n :])


def test_one_lora_cannot_be_asked_of_it(folders):
    adapters = folders()
    for arguments, message in (
        ({"rank": 4}, r"emr gives a shared vector and masks, not one LoRA: no rank"),
        ({"scale": LeastSquares({})}, r"emr gives a shared vector and masks"),
        ({"space": "core"}, r"emr runs in space 'weight' only, not 'core'"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_adapters(adapters, "emr", **arguments)
    assert isinstance(merge_adapters(adapters, "ties"), MergedAdapter)


# ---- its folder


@pytest.fixture
def folders(tmp_path):
    """folders(variant) → {task: folder}."""
    return partial(two_adapters, tmp_path)


@pytest.mark.parametrize("variant", ["plain", "bfloat16", "embedding", "conv1d", "conv2d", "one_layer"])
def test_the_folder_gives_the_same_deltas_and_models(folders, variant, tmp_path):
    adapters, kind = folders(variant), kind_of(variant)
    merged = merge_adapters(adapters, "emr", scale=0.5)
    merged.save_pretrained(tmp_path / "out")
    again = EMRAdapter.from_pretrained(tmp_path / "out")
    assert again.scales == merged.scales and again.scale == 0.5 and list(again.tasks) == list(merged.tasks)
    assert again.manifest == json.loads((tmp_path / "out/osrm_peft.json").read_text())
    for task in adapters:
        assert again.deltas(task).keys() == merged.deltas(task).keys()
        assert all(torch.equal(delta, merged.deltas(task)[name]) for name, delta in again.deltas(task).items())
        model, other, batch = make_base(3, kind=kind), make_base(3, kind=kind), make_batch(kind=kind)
        with torch.no_grad(), again.applied_to(model, task), merged.applied_to(other, task):
            assert torch.equal(model(**batch).logits, other(**batch).logits)
        shapes = again.adapter(task, rank=2).attach(make_base(3, kind=kind))
        assert shapes(**batch).logits.shape == (4, 3)


def test_the_folder_holds_bits_heads_and_the_manifest(folders, tmp_path):
    merged = merge_adapters(folders(), "emr")
    merged.save_pretrained(tmp_path / "out")
    files = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert files == ["README.md", MASKS, "heads/t1.safetensors", "heads/t2.safetensors", "osrm_peft.json"]
    with safe_open(tmp_path / "out" / MASKS, "pt") as file:
        sizes = {key: np.prod(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert sum(size for key, size in sizes.items() if key.endswith(".masks")) == 4 * 2 * 16 * 16 / 8
    assert sizes["scales"] == 2
    manifest = json.loads((tmp_path / "out/osrm_peft.json").read_text())
    assert manifest["kind"] == "emr" and manifest["method"] == "emr" and "2405.17461" in manifest["paper"]


def test_adapters_without_heads_have_folders_too(tmp_path):
    merged = merge_adapters(drawn(), "emr")
    merged.save_pretrained(tmp_path / "out")
    again = EMRAdapter.from_pretrained(tmp_path / "out")
    assert torch.equal(again.deltas("t")["small"], merged.deltas("t")["small"]) and not again.tasks["t"].heads


def test_a_folder_of_ours_is_replaced_and_one_of_others_is_not(folders, tmp_path):
    adapters = folders()
    merged = merge_adapters(adapters, "emr")
    merged.save_pretrained(tmp_path / "out")
    merge_adapters({"t1": adapters["t1"]}, "emr").save_pretrained(tmp_path / "out", overwrite=True)
    assert list(EMRAdapter.from_pretrained(tmp_path / "out").tasks) == ["t1"]
    merge_adapters(adapters, "ties").save_pretrained(tmp_path / "ties")
    for taken in (tmp_path / "ties", adapters["t1"]):
        with pytest.raises(FileExistsError, match=r"is not a folder that osrm_peft wrote as 'emr'"):
            merged.save_pretrained(taken)


def edit(folder, change):
    tensors = load_file(folder / MASKS)
    with safe_open(folder / MASKS, "pt") as file:
        notes = file.metadata()
    change(tensors, notes)
    save_file(tensors, folder / MASKS, notes)


QUERY_0 = "bert.encoder.layer.0.attention.self.query"
DAMAGES = {
    "no weights of a head": lambda folder: (folder / "heads/t2.safetensors").unlink(),
    "no manifest": lambda folder: (folder / "osrm_peft.json").unlink(),
    "half a file": lambda folder: (folder / MASKS).write_bytes((folder / MASKS).read_bytes()[:200]),
    "junk in a head": lambda folder: (folder / "heads/t1.safetensors").write_bytes(b"junk"),
    "a manifest without scale": lambda folder: (folder / "osrm_peft.json").write_text("{}"),
    "a manifest that is no JSON": lambda folder: (folder / "osrm_peft.json").write_text("{"),
    "no notes": lambda folder: edit(folder, lambda tensors, notes: notes.pop("osrm_peft")),
    "no masks": lambda folder: edit(folder, lambda tensors, notes: tensors.pop(f"{QUERY_0}.masks")),
    "no shared vector": lambda folder: edit(folder, lambda tensors, notes: tensors.pop(f"{QUERY_0}.unified")),
    "no scales": lambda folder: edit(folder, lambda tensors, notes: tensors.pop("scales")),
}
UNSEEN = {
    "a scale too few": lambda tensors, notes: tensors.update(scales=tensors["scales"][:1].clone()),
    "masks of one task": lambda tensors, notes: tensors.update(
        {f"{QUERY_0}.masks": tensors[f"{QUERY_0}.masks"][:1].clone()}
    ),
    "masks cut short": lambda tensors, notes: tensors.update(
        {f"{QUERY_0}.masks": tensors[f"{QUERY_0}.masks"][:, :5].clone()}
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_with_its_name(folders, damage, tmp_path):
    merge_adapters(folders(), "emr").save_pretrained(tmp_path / "out")
    DAMAGES[damage](tmp_path / "out")
    with pytest.raises(ValueError, match=r"out(/osrm_peft.json)? is damaged: "):
        EMRAdapter.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("damage", UNSEEN)
def test_a_folder_whose_tensors_do_not_fit_each_other_is_refused(folders, damage, tmp_path):
    merge_adapters(folders(), "emr").save_pretrained(tmp_path / "out")
    edit(tmp_path / "out", UNSEEN[damage])
    with pytest.raises(ValueError, match=r"out is damaged: "):
        EMRAdapter.from_pretrained(tmp_path / "out")


def test_a_folder_that_is_no_emr_merge_says_so(folders, tmp_path):
    adapters = folders()
    merge_adapters(adapters, "ties").save_pretrained(tmp_path / "ties")
    with pytest.raises(FileNotFoundError, match=r"nothing' is neither a folder of an EMR merge nor a Hub repository"):
        EMRAdapter.from_pretrained(tmp_path / "nothing")
    for folder in (adapters["t1"], tmp_path / "ties"):
        with pytest.raises(FileNotFoundError, match=r"holds no emr.safetensors: it is not an EMR merge"):
            EMRAdapter.from_pretrained(folder)
    merge_adapters(adapters, "emr").save_pretrained(tmp_path / "emr")
    shutil.move(tmp_path / "emr", tmp_path / "moved")
    assert EMRAdapter.from_pretrained(tmp_path / "moved").tasks
