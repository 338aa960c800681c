import json
import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import HPSearchBackend

from osrm_peft import OSRMCallback, OSRMLoraConfig, initialize_osrm_weights
from osrm_peft.models.layers import lora_layers
from osrm_peft.osrm.subspace import procrustes_drift
from tests.helpers.models import make_base, make_batch
from tests.helpers.osrm import LORA, PAPER, features_of


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    paths = []
    for seed, task in enumerate("ab", start=1):
        paths.append(str(folder / f"{task}.safetensors"))
        features_of(task, seed).save(paths[-1])
    return paths


def make_model(files):
    torch.manual_seed(0)
    return get_peft_model(make_base(), OSRMLoraConfig(**LORA, **PAPER, out_of_task=files))


def make_trainer(tmp_path, files, callbacks=None, model_init=None, **arguments):
    model = make_model(files) if model_init is None else None
    batch = make_batch(rows=16, pads=[0] * 16)
    rows = Dataset.from_dict({**{key: value.tolist() for key, value in batch.items()}, "labels": [0, 1, 2, 1] * 4})
    arguments = {"max_steps": 6, "learning_rate": 1e-2, "logging_steps": 2, "save_strategy": "no"} | arguments
    args = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    callbacks = [OSRMCallback()] if callbacks is None else callbacks
    more = {"train_dataset": rows, "eval_dataset": rows, "callbacks": callbacks, "model_init": model_init}
    return Trainer(model, args, **more)


def a_of(trainer):
    return {
        name: layer.lora_A["default"].weight.detach().clone()
        for name, layer in lora_layers(trainer.model, "default").items()
    }


def test_the_trainer_sets_a_when_built_and_logs_its_drift(tmp_path, files):
    trainer = make_trainer(tmp_path, files)
    before = a_of(trainer)
    for A in before.values():
        torch.testing.assert_close(A @ A.T, torch.eye(4), rtol=0, atol=1e-6)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3
    drift = {name: procrustes_drift(A, before[name]) for name, A in a_of(trainer).items()}
    for name, value in drift.items():
        assert logs[-1][f"osrm/drift/{name}"] == pytest.approx(value, rel=1e-5)
    assert logs[-1]["osrm/drift"] == pytest.approx(sum(drift.values()) / 4, rel=1e-5)
    assert 0 < logs[0]["osrm/drift"] < logs[-1]["osrm/drift"]


def test_frozen_a_does_not_drift(tmp_path, files):
    trainer = make_trainer(tmp_path, files)
    for layer in lora_layers(trainer.model, "default").values():
        layer.lora_A["default"].weight.requires_grad_(False)
    trainer.train()
    assert trainer.state.log_history[-2]["osrm/drift"] == pytest.approx(0, abs=1e-7)


def test_an_overwritten_a_stops_the_run(tmp_path, files):
    trainer = make_trainer(tmp_path, files)
    with torch.no_grad():
        next(iter(lora_layers(trainer.model, "default").values())).lora_A["default"].weight.mul_(0.5)
    with pytest.raises(RuntimeError, match=r"A of layer '.*' is not the one that OSRM wrote \(largest difference"):
        trainer.train()


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 4


def test_a_resumed_run_keeps_its_a_and_ends_as_if_never_stopped(tmp_path, files):
    whole = make_trainer(tmp_path / "whole", files)
    whole.train()
    cut = make_trainer(tmp_path / "cut", files, [OSRMCallback(), Stop()], save_strategy="steps", save_steps=2)
    cut.train()
    resumed = make_trainer(tmp_path / "cut", files, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    for name, A in a_of(whole).items():
        torch.testing.assert_close(a_of(resumed)[name], A, rtol=0, atol=1e-6)
    assert resumed.state.log_history[-2]["osrm/drift"] == pytest.approx(
        whole.state.log_history[-2]["osrm/drift"], rel=1e-4
    )
    checkpoint = tmp_path / "cut/checkpoint-4"  # a Trainer's checkpoint is a stock adapter with our notes, too
    assert set(json.loads((checkpoint / "adapter_config.json").read_text())) == set(LoraConfig().to_dict())
    assert json.loads((checkpoint / "osrm_peft.json").read_text())["osrm"]["initialized"]


def test_a_model_without_lora_is_an_error_at_once(tmp_path):
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(TypeError, match="got a BertForSequenceClassification: call get_peft_model first"):
        Trainer(make_base(), args, callbacks=[OSRMCallback()])


def test_a_second_train_goes_on_from_the_trained_a(tmp_path, files):
    trainer = make_trainer(tmp_path, files, max_steps=2)
    trainer.train()
    trainer.train()


def test_a_callback_that_comes_too_late_says_so(tmp_path, files):
    trainer = make_trainer(tmp_path, files, callbacks=[])
    trainer.add_callback(OSRMCallback())
    with pytest.raises(RuntimeError, match=r"came too late to set A: pass it to Trainer"):
        trainer.train()


def test_a_run_goes_on_from_a_checkpoint_without_the_features(tmp_path, files):
    cut = make_trainer(tmp_path, files, [OSRMCallback(), Stop()], save_strategy="steps", save_steps=2)
    cut.train()
    gone = [str(tmp_path / "gone.safetensors")]
    resumed = make_trainer(tmp_path, gone, save_strategy="steps", save_steps=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*OSRM has not chosen A")  # it had, before the checkpoint
        resumed.train(resume_from_checkpoint=True)
        resumed.save_model(str(tmp_path / "saved"))
    notes = json.loads((tmp_path / "saved/osrm_peft.json").read_text())["osrm"]
    assert notes["initialized"] and [one["task"] for one in notes["provenance"]["out_of_task"]] == ["a", "b"]
    assert resumed.state.global_step == 6 and "osrm/drift" not in resumed.state.log_history[-2]
    with pytest.raises(FileNotFoundError, match=r"no features file .*gone.safetensors"):
        make_trainer(tmp_path / "fresh", gone).train()


class Restores(TrainerCallback):
    """An engine that goes on from the A that it found before OSRM's was written."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            for layer in lora_layers(model, "default").values():
                layer.lora_A["default"].weight.copy_(layer.lora_A["default"].weight.flip(0))


def test_an_a_that_moves_in_the_first_step_was_restored_by_an_engine(tmp_path, files):
    trainer = make_trainer(tmp_path, files, callbacks=[OSRMCallback(), Restores()])
    with pytest.raises(RuntimeError, match=r"moved by 1.* of its length in the first step.*accelerator\.prepare"):
        trainer.train()


@pytest.mark.parametrize("arguments", [{"weight_decay": 0.5, "learning_rate": 0.1}, {"gradient_accumulation_steps": 2}])
def test_what_a_first_step_may_do_is_no_alarm(tmp_path, files, arguments):
    trainer = make_trainer(tmp_path, files, max_steps=2, **arguments)
    before = a_of(trainer)
    trainer.train()
    assert any(not torch.equal(A, before[name]) for name, A in a_of(trainer).items())


class Starts(TrainerCallback):
    """Keeps each A and learning rate with which a first step begins."""

    def __init__(self):
        self.seen, self.rates = [], []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            layers = lora_layers(model, "default").items()
            self.seen.append({name: layer.lora_A["default"].weight.detach().clone() for name, layer in layers})
            self.rates.append(args.learning_rate)


def check_fresh(starts, expected):
    for seen in starts.seen:
        assert all(torch.equal(A, expected[name]) for name, A in seen.items()) and set(seen) == set(expected)


def test_each_train_of_a_trainer_with_model_init_begins_with_osrm_s_a(tmp_path, files):
    expected, starts = a_of(make_trainer(tmp_path, files)), Starts()
    trainer = make_trainer(tmp_path, files, [OSRMCallback(), starts], lambda: make_model(files))
    first = trainer.model
    for turn in (1, 2):
        trainer.train()
        assert trainer.model is not first and len(starts.seen) == turn
        drift = {name: procrustes_drift(A, expected[name]) for name, A in a_of(trainer).items()}
        log = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
        assert log["osrm/drift"] == pytest.approx(sum(drift.values()) / 4, rel=1e-5) and log["osrm/drift"] > 1e-4
    check_fresh(starts, expected)


def test_an_overwritten_a_stops_a_run_with_model_init_too(tmp_path, files):
    trainer = make_trainer(tmp_path, files, model_init=lambda: make_model(files))
    trainer.train()
    callback = next(one for one in trainer.callback_handler.callbacks if isinstance(one, OSRMCallback))
    make = trainer.call_model_init

    def spoilt(trial=None):
        model = make(trial)
        with torch.no_grad():
            next(iter(lora_layers(model, "default").values())).lora_A["default"].weight.mul_(0.5)
        return model

    trainer.call_model_init = spoilt
    with pytest.raises(RuntimeError, match=r"A of layer '.*' is not the one that OSRM wrote"):
        trainer.train()
    assert callback.initial


def test_a_run_with_model_init_goes_on_from_a_checkpoint(tmp_path, files):
    options = {"model_init": lambda: make_model(files), "save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, files, [OSRMCallback(), Stop()], **options).train()
    trainer = make_trainer(tmp_path, files, **options)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6 and trainer.state.log_history[-2]["osrm/drift"] > 1e-4


class Sweep:
    """A backend of hyperparameter_search that does what transformers' own for optuna does, without that package."""

    default_hp_space = staticmethod(lambda trial: {"learning_rate": trial.params["learning_rate"]})

    def ensure_available(self):
        pass

    def run(self, trainer, n_trials, direction, **kwargs):
        scores = []
        for number, (rate, r) in enumerate([(1e-2, 4), (1e-3, 2)][:n_trials]):
            trainer.train(trial=SimpleNamespace(number=number, params={"learning_rate": rate, "r": r}))
            scores.append(trainer.compute_objective(trainer.evaluate()))
            trainer.model = trainer.model_wrapped = None
        return scores


def test_each_trial_of_a_hyperparameter_search_begins_with_osrm_s_a(tmp_path, files, monkeypatch):
    monkeypatch.setattr(transformers.trainer, "ALL_HYPERPARAMETER_SEARCH_BACKENDS", {HPSearchBackend.OPTUNA: Sweep})
    monkeypatch.setattr(transformers.integrations, "hp_params", lambda trial: trial.params)
    ranks = []

    def model_init(trial=None):
        ranks.append(4 if trial is None else trial.params["r"])
        config = OSRMLoraConfig(**(LORA | {"r": ranks[-1]}), **PAPER, out_of_task=files)
        return get_peft_model(make_base(), config)

    starts = Starts()
    trainer = make_trainer(tmp_path, files, [OSRMCallback(), starts], model_init)
    assert len(trainer.hyperparameter_search(n_trials=2, backend="optuna")) == 2
    assert ranks == [4, 4, 2] and starts.rates == [1e-2, 1e-3]
    for rank, seen in zip(ranks[1:], starts.seen, strict=True):
        model = get_peft_model(make_base(), OSRMLoraConfig(**(LORA | {"r": rank}), **PAPER, out_of_task=files))
        initialize_osrm_weights(model)
        layers = lora_layers(model, "default")
        assert all(torch.equal(layers[name].lora_A["default"].weight, A) for name, A in seen.items())
