"""A merged adapter elsewhere: in stock PEFT alone, and of the rank that a server swaps adapters at."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from osrm_peft import LoraAdapter, load_adapter, merge_adapters
from osrm_peft.adapters.factors import Factors
from osrm_peft.merging.lowrank import Compressed, least_energy
from osrm_peft.merging.plan import plan_merge
from osrm_peft.merging.request import MergeRequest
from tests.helpers.adapters import make_adapter
from tests.helpers.models import make_base, make_batch


def test_stock_peft_alone_loads_a_merged_adapter(root, tmp_path):
    """In a process that finds what the registry installed, and not this package."""
    merged = merge_adapters({"t1": root / "t1", "t2": root / "t2"}, "ties")
    merged.save_pretrained(tmp_path / "merged")
    batch, model = make_batch(), merged.load(make_base())
    save_file(
        {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}, tmp_path / "batch.safetensors"
    )
    script = """
import sys
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
try:
    import osrm_peft
    raise SystemExit("osrm_peft is there")
except ModuleNotFoundError:
    pass
base = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
model = PeftModel.from_pretrained(base, sys.argv[2] + "/merged")
batch = load_file(sys.argv[2] + "/batch.safetensors")
save_file({"logits": model(**batch).logits.detach()}, sys.argv[2] + "/logits.safetensors")
"""
    site = next(path for path in sys.path if path.endswith("site-packages"))
    command = [sys.executable, "-S", "-c", f"import sys; sys.path.append({site!r})\n{script}", root / "base", tmp_path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model(**batch).logits
    torch.testing.assert_close(load_file(tmp_path / "logits.safetensors")["logits"], expected, rtol=0, atol=1e-6)


def test_adapters_of_the_serving_rank_are_swapped_under_a_running_model(root, tmp_path):
    from peft import PeftModel
    from peft.utils.hotswap import hotswap_adapter

    adapters = {"t1": root / "t1", "t2": root / "t2"}
    for name, given in (("one", {"t1": root / "t1"}), ("both", adapters)):
        merged = merge_adapters(given, "task_arithmetic", scale=1.0, rank="serving", heads="per_task")
        merged.save_pretrained(tmp_path / name)
    shapes = [
        {k: v.shape for k, v in load_file(tmp_path / name / "adapter_model.safetensors").items()}
        for name in ("one", "both")
    ]
    assert shapes[0] == shapes[1] and {shape[0] for key, shape in shapes[0].items() if "lora_A" in key} == {8}
    batch = make_batch()
    model = PeftModel.from_pretrained(make_base(), tmp_path / "one").eval()
    with torch.no_grad():
        before = model(**batch).logits
        hotswap_adapter(model, str(tmp_path / "both"), adapter_name="default", torch_device="cpu")
        after = model(**batch).logits
        expected = load_adapter(tmp_path / "both").attach(make_base())(**batch).logits
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-6)
    assert (after - before).abs().max() > 1e-4


def test_the_serving_rank_is_the_least_that_holds_the_result(root, tmp_path):
    adapters = {}
    for seed, rank in enumerate((2, 3, 6), 1):
        make_adapter(tmp_path / f"r{seed}", seed=seed, r=rank)
        adapters[f"r{seed}"] = tmp_path / f"r{seed}"
    exact = merge_adapters(adapters, "task_arithmetic")
    served = merge_adapters(adapters, "task_arithmetic", rank="serving")
    served.save_pretrained(tmp_path / "served")
    manifest = json.loads((tmp_path / "served/osrm_peft.json").read_text())
    assert manifest["written_rank"] == 16 and list(manifest["serving"]) == ["8", "16"]  # 2 + 3 + 6 = 11
    for name, delta in load_adapter(tmp_path / "served").factors.items():
        torch.testing.assert_close(delta.delta().double(), exact.deltas()[name], rtol=0, atol=1e-6)
    exact.save_pretrained(tmp_path / "exact")
    assert "serving" not in json.loads((tmp_path / "exact/osrm_peft.json").read_text())
    cut = merge_adapters(adapters, "task_arithmetic", rank=8)
    assert manifest["serving"]["8"] == pytest.approx(min(cut.energy_kept().values()), rel=1e-6)
    assert manifest["serving"]["16"] == 1.0
    with pytest.raises(ValueError, match=r"rank='eight' must be a whole number"):
        merge_adapters(adapters, "ties", rank="eight")
    with pytest.raises(ValueError, match=r"emr gives a shared vector and masks"):
        merge_adapters(adapters, "emr", rank="serving")


def test_what_does_not_fit_into_the_largest_serving_rank_is_cut_to_it():
    config = {"base_model_name_or_path": "base", "target_modules": ["q"]}
    factors = Factors(torch.ones(2, 600), torch.ones(600, 2))
    adapters = {task: LoraAdapter({"q": factors}, {}, config) for task in "ab"}
    plan = plan_merge(MergeRequest(adapters, "ties", rank="serving"))  # of dense matrices: any rank up to 600
    assert (plan.padded, plan.rank) == (512, 512)
    plan = plan_merge(MergeRequest(adapters, "task_arithmetic", rank="serving"))
    assert (plan.padded, plan.rank) == (8, None) and plan.output_bytes() == 4 * 8 * 1200


def test_the_least_energy_is_of_the_worst_layer_and_counts_what_was_cut():
    one = Compressed(Factors(torch.eye(2, 3), torch.diag(torch.tensor([3.0, 1.0]))), 1.0)  # 9 and 1 of 10
    other = Compressed(Factors(torch.eye(2, 3), torch.diag(torch.tensor([4.0, 3.0]))), 0.5)  # 16 and 9 of 25
    nothing = Compressed(Factors(torch.zeros(2, 3), torch.zeros(2, 2)), 1.0)
    assert least_energy([one, other, nothing], [1, 2]) == pytest.approx({1: 0.5 * 16 / 25, 2: 0.5})
    assert least_energy([one, nothing], [1]) == pytest.approx({1: 0.9})
    assert least_energy([nothing], [1]) == {1: 1.0}


def test_attaching_an_adapter_warns_of_nothing(root):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*base_model_name_or_path.*")
        load_adapter(root / "t1").attach(make_base())
