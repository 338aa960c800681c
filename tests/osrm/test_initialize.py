"""What every registered merge method keeps, over every kind of plain LoRA adapter."""

import copy
import json
import warnings

import pytest
import scipy.linalg
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import config as lora

from osrm_peft import OSRMLoraConfig, initialize_osrm_weights, merge_adapters
from osrm_peft.adapters import config as adapter_config
from osrm_peft.models.layers import lora_layers
from osrm_peft.osrm.spectrum import PooledMoment
from tests.helpers.models import make_base, make_batch
from tests.helpers.osrm import LORA, PAPER, features_of

NOT_PLAIN = {"target_parameters": ["weight"], "trainable_token_indices": [1], "layer_replication": [[0, 1]]}
NOT_PLAIN |= {"alora_invocation_tokens": [1], "arrow_config": lora.ArrowConfig(), "kasa_config": lora.KasaConfig()}
NOT_PLAIN |= {"use_bdlora": lora.BdLoraConfig(), "monteclora_config": lora.MontecloraConfig()}


@pytest.fixture(scope="module")
def others():
    return [features_of(task, seed) for seed, task in enumerate(["a", "b"], start=1)]


def osrm_model(**options):
    return get_peft_model(make_base(), OSRMLoraConfig(**(LORA | PAPER | options)))


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_becomes_the_least_energy_frame_and_the_logits_stay(others):
    model = osrm_model(out_of_task=["unused"]).eval()
    batch = make_batch(seed=99)
    with torch.no_grad():
        before = model(**batch).logits
        shares = initialize_osrm_weights(model, others)
        after = model(**batch).logits
    assert torch.equal(before, after)
    layers = lora_layers(model, "default")
    assert set(shares) == set(layers) and len(layers) == 4
    for name, layer in layers.items():
        A = layer.lora_A["default"].weight.detach().double()
        torch.testing.assert_close(A @ A.T, torch.eye(4, dtype=A.dtype), rtol=0, atol=1e-6)
        S = PooledMoment.of([features.layers[name] for features in others]).second_moment()
        energy, least = float(torch.trace(A @ S @ A.T)), float(torch.linalg.eigvalsh(S)[:4].sum())
        assert energy <= least + 1e-6 * float(S.trace())
        assert shares[name] == pytest.approx(least / float(S.trace()), rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("name", ["second", "sst-2_größe", "lora_B"])
def test_only_the_named_adapter_is_touched(others, name):
    """Any adapter name, and everything on the CPU."""
    model = osrm_model()
    model.add_adapter(name, OSRMLoraConfig(**LORA, **PAPER))
    before = weights_of(model)
    initialize_osrm_weights(model, others, adapter_name=name)
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == {key for key in before if f"lora_A.{name}." in key} and len(changed) == 4
    alone = get_peft_model(make_base(), OSRMLoraConfig(**LORA, **PAPER), adapter_name=name)
    assert len(initialize_osrm_weights(alone, others, adapter_name=name)) == 4


def test_init_lora_weights_stays_peft_s():
    """B13: the field that PEFT's own documentation and checks read, and its other values."""
    field = OSRMLoraConfig.__dataclass_fields__["init_lora_weights"]
    assert field.metadata == LoraConfig.__dataclass_fields__["init_lora_weights"].metadata


@pytest.mark.parametrize("init", [True, "gaussian", False, "orthogonal", "pissa", "pissa_niter_2", "olora", "mica"])
def test_initializations_that_leave_b_0_are_replaced_others_refused(others, init):
    """B13: get_peft_model takes them all; where B is not 0, or the base weights have changed, A comes too late."""
    model = osrm_model(init_lora_weights=init)
    before = weights_of(model)
    if init in (True, "gaussian"):
        initialize_osrm_weights(model, others)
        expected = osrm_model()
        initialize_osrm_weights(expected, others)
        assert all(torch.equal(tensor, expected.state_dict()[key]) for key, tensor in model.state_dict().items())
        return
    with pytest.raises(ValueError, match=rf"init_lora_weights={init!r} sets B: leave it at its default, OSRM sets A"):
        initialize_osrm_weights(model, others)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("option", adapter_config.NOT_PLAIN)
def test_options_whose_adapter_no_merge_takes_are_refused_at_once(option):
    with pytest.raises(ValueError, match=rf"{option}=.*no merge takes such a one .*: leave {option} out"):
        OSRMLoraConfig(**LORA, **PAPER, **{option: NOT_PLAIN.get(option, True)})


def test_what_osrm_makes_with_the_other_options_can_be_merged(others, tmp_path):
    options = {"use_rslora": True, "rank_pattern": {"layer.0.attention.self.query": 2}, "modules_to_save": ["pooler"]}
    options |= {"alpha_pattern": {"layer.1.attention.self.value": 3}, "exclude_modules": ["layer.1.attention.self.key"]}
    model = osrm_model(**options)
    initialize_osrm_weights(model, others)
    model.save_pretrained(tmp_path)
    merged = merge_adapters({"a": tmp_path, "b": tmp_path}, "average")
    for name, delta in merged.deltas().items():
        torch.testing.assert_close(
            delta, lora_layers(model, "default")[name].get_delta_weight("default"), check_dtype=False
        )


def test_ranks_of_rank_pattern_and_other_dtypes(others):
    model = osrm_model(rank_pattern={"layer.0.attention.self.query": 2}).bfloat16()
    initialize_osrm_weights(model, [features_of("a", 1)])
    ranks = {name: layer.lora_A["default"].weight.shape[0] for name, layer in lora_layers(model, "default").items()}
    assert sorted(ranks.values()) == [2, 4, 4, 4]
    assert {layer.lora_A["default"].weight.dtype for layer in lora_layers(model, "default").values()} == {
        torch.bfloat16
    }


def test_protect_in_the_config_reaches_a(others):
    plain, model = osrm_model(), osrm_model(protect_rank=2)
    least, shares = initialize_osrm_weights(plain, others), initialize_osrm_weights(model, others)
    for name, layer in lora_layers(model, "default").items():
        S = PooledMoment.of([features.layers[name] for features in others]).second_moment()
        strongest = torch.linalg.eigh(S)[1][:, -2:]
        assert (layer.lora_A["default"].weight.double() @ strongest).norm() < 1e-6
        assert shares[name] > 2 * least[name]  # told of all directions, of which only two are avoided


def test_freeze_a_trains_b_only(others):
    model = osrm_model(freeze_a=True)
    initialize_osrm_weights(model, others)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any("lora_A" in name for name in trained) and any("lora_B" in name for name in trained)


def test_the_same_seed_gives_the_same_a_whatever_the_order_of_tasks():
    others = [features_of(task, seed, statistic="mean") for seed, task in enumerate("ab", start=1)]
    first, second, third = (osrm_model(statistic="mean", osrm_seed=seed) for seed in (0, 0, 1))
    initialize_osrm_weights(first, others)
    initialize_osrm_weights(second, others[::-1])
    initialize_osrm_weights(third, others)
    A, same, other = (weights_of(model) for model in (first, second, third))
    keys = [name for name in A if "lora_A" in name]
    assert all(torch.allclose(A[key], same[key], atol=1e-6) for key in keys)
    assert not any(torch.allclose(A[key], other[key], atol=0.1) for key in keys)
    query, value = (A[next(key for key in keys if f"0.attention.self.{name}" in key)] for name in ("query", "value"))
    assert not torch.allclose(query, value, atol=0.1)  # each layer draws from a stream of its own


@pytest.mark.parametrize(
    "options", [{"statistic": "mean"}, {"statistic": "sample", "protect_rank": 3}, {"protect_rank": 3}]
)
def test_two_tasks_share_no_more_of_a_than_chance_where_the_choice_is_free(options):
    features = {t: features_of(t, i, statistic=options.get("statistic", "token")) for i, t in enumerate("abcd")}
    adapters = []
    for task in "ab":
        model = osrm_model(**options)
        initialize_osrm_weights(model, [features[other] for other in "abcd" if other != task])
        adapters.append(weights_of(model))
    shared = [(A @ adapters[1][key].T).square().sum() / len(A) for key, A in adapters[0].items() if "lora_A" in key]
    assert len(shared) == 4
    assert max(shared) < 0.5  # mean squared cosine: 1 of equal spaces; r/n = 4/32 of random ones, more of fewer free


def test_own_features_are_used_and_checked(others):
    own = features_of("own", 3)
    plain, ratio = osrm_model(), osrm_model(objective="ratio", in_task="unused")
    low = initialize_osrm_weights(plain, others)
    high = initialize_osrm_weights(ratio, others, in_task=own)
    assert all(high[name] > low[name] for name in low)
    assert ratio.peft_config["default"].provenance["in_task"]["task"] == "own"
    with pytest.raises(ValueError, match="task 'a' is both in_task and out_of_task"):
        initialize_osrm_weights(osrm_model(objective="ratio", in_task="x"), others, in_task=others[0])


def test_a_saved_adapter_is_stock_peft_with_our_notes_beside_it(others, tmp_path, base_folder):
    model = osrm_model(out_of_task=["features/a.safetensors"])
    model.peft_config["default"].base_model_name_or_path = base_folder
    initialize_osrm_weights(model, others)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*OSRM has not chosen A")
        model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(saved) == set(LoraConfig().to_dict())
    manifest = json.loads((tmp_path / "osrm_peft.json").read_text())
    notes = manifest["osrm"]
    assert notes["initialized"] and notes["settings"]["statistic"] == "token"
    assert [given["task"] for given in notes["provenance"]["out_of_task"]] == ["a", "b"]
    assert notes["provenance"]["weight_hash"] and manifest["versions"]["peft"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # stock PEFT must not warn of unknown fields
        assert type(PeftConfig.from_pretrained(str(tmp_path))) is LoraConfig
    again = PeftModel.from_pretrained(make_base(), str(tmp_path))
    for name, tensor in weights_of(model).items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_an_adapter_that_was_never_initialised_says_so(tmp_path):
    with pytest.warns(UserWarning, match=r"OSRM has not chosen A, so this is a plain LoRA adapter: give the Trainer"):
        osrm_model().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "osrm_peft.json").read_text())["osrm"]["initialized"] is False


def other_model():
    return [features_of("a", 1, make_base(seed=5))]


def twice():
    return [features_of("a", 1), features_of("a", 2)]


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({}, None, r"no out-of-task features: give OSRMLoraConfig\(out_of_task="),
        ({}, ["no/such.safetensors"], r"no features file no/such.safetensors"),
        ({}, other_model, r"collected on tiny"),
        ({}, twice, r"out_of_task names a more than once"),
        ({"statistic": "mean"}, "others", r"hold the statistic 'token', the config asks for 'mean'"),
        ({"reference": True, "statistic": "mean"}, "mean", r"reference=False, the config has reference=True"),
        ({"target_modules": ["query", "key"]}, "others", r"lack 2 of the 4 adapted layers"),
        ({"r": 20}, "others", r"rank r=20 must lie in 1 … 16"),
    ],
)
def test_bad_input_changes_nothing(others, options, given, message):
    model = osrm_model(**options)
    before, grads = weights_of(model), [p.requires_grad for p in model.parameters()]
    if given == "others":
        given = others
    elif given == "mean":
        given = [features_of("a", 1, statistic="mean")]
    elif callable(given):
        given = given()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        initialize_osrm_weights(model, given)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert grads == [p.requires_grad for p in model.parameters()]


def test_only_untrained_lora_models_with_our_config(others):
    with pytest.raises(TypeError, match="got a BertForSequenceClassification: call get_peft_model first"):
        initialize_osrm_weights(make_base(), others)
    with pytest.raises(TypeError, match="has a LoraConfig: use an OSRMLoraConfig"):
        initialize_osrm_weights(get_peft_model(make_base(), LoraConfig(**LORA)), others)
    with pytest.raises(ValueError, match="no adapter 'x', only 'default'"):
        initialize_osrm_weights(osrm_model(), others, adapter_name="x")
    trained = osrm_model()
    with torch.no_grad():
        next(iter(lora_layers(trained, "default").values())).lora_B["default"].weight[0, 0] = 0.5
    with pytest.raises(ValueError, match=r"lora_B of layer '.*' is not 0 \(largest entry 5.00e-01\)"):
        initialize_osrm_weights(trained, others)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"statistic": "median"}, r"unknown statistic 'median': choose from mean, sample, token"),
        ({"null_space": "x"}, r"unknown null_space 'x': choose from random, in_task"),
        ({"objective": "x"}, r"unknown objective 'x': choose from least_energy, difference, ratio"),
        ({"in_task_weight": 1.5}, r"in_task_weight=1.5 must lie in \[0, 1\]"),
        ({"null_space": "in_task"}, r"null_space='in_task' is a choice of objective='least_energy'; objective='ratio'"),
        ({"ridge": 0}, r"ridge=0 must be a finite number above 0"),
        ({"reference": True, "statistic": "sample"}, r"reference=True is the released code: it needs statistic='mean'"),
        (
            {"reference": True, "statistic": "mean", "protect_rank": 3},
            r"it needs statistic='mean'.*and protect_energy=None",
        ),
        ({"protect_rank": True}, r"protect_rank=True must be a whole number of at least 0"),
        ({"protect_rank": -1}, r"protect_rank=-1 must be a whole number of at least 0"),
        ({"protect_energy": 1.5}, r"protect_energy=1.5 must lie in \[0, 1\]"),
        ({"protect_rank": "x"}, r"protect_rank='x' must be a whole number of at least 0"),
        ({"out_of_task": "file"}, r"out_of_task='file': give a list"),
    ],
)
def test_the_config_checks_itself(options, message):
    with pytest.raises(ValueError, match=message):
        OSRMLoraConfig(**options)


def test_the_config_survives_peft_s_copies(others):
    config = OSRMLoraConfig(**LORA, statistic="mean")
    assert copy.deepcopy(config).statistic == "mean" and config.to_dict()["r"] == 4
    assert "statistic" not in config.to_dict()


def test_the_defaults_look_at_the_task_s_own_features_and_say_so(others):
    config = OSRMLoraConfig(**LORA)
    assert (config.statistic, config.objective, config.protect_energy, config.ridge) == ("token", "ratio", None, 0.1)
    model = get_peft_model(make_base(), config)
    with pytest.raises(ValueError, match=r"give OSRMLoraConfig\(in_task=FILE\), or objective='least_energy'"):
        initialize_osrm_weights(model, others)
    own = features_of("own", 3)
    initialize_osrm_weights(model, others, in_task=own)
    for name, layer in lora_layers(model, "default").items():
        A = layer.lora_A["default"].weight.detach().double()
        S = PooledMoment.of([features.layers[name] for features in others]).second_moment()
        M = S + 0.1 * S.trace() / len(S) * torch.eye(len(S), dtype=S.dtype)
        _, best = scipy.linalg.eigh(own.layers[name].second_moment().numpy(), M.numpy())
        frame = torch.linalg.qr(torch.from_numpy(best[:, -4:].copy())).Q
        torch.testing.assert_close(A.T @ A, frame @ frame.T, rtol=0, atol=1e-5)
    released = OSRMLoraConfig(**LORA, reference=True)
    assert (released.statistic, released.objective, released.protect_energy) == ("mean", "least_energy", None)
