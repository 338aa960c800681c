"""collect_features, collect_gram: the inputs of the target layers, summed up; the model left as it was."""

import inspect
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule

from osrm_peft.checks import choice, integer
from osrm_peft.distributed import Processes, execution_device
from osrm_peft.features.batches import Batch, check_rereadable, samples
from osrm_peft.features.collector import Collector
from osrm_peft.features.file import JoinedMoments
from osrm_peft.features.hooks import preserve_state, watch_inputs
from osrm_peft.features.moments import STATISTICS
from osrm_peft.features.padding import EncoderDecoder
from osrm_peft.features.task_features import TaskFeatures, tokenizer_hash
from osrm_peft.hub.privacy import public_name
from osrm_peft.models.fingerprint import embedding_hash, hash_of, sampled_weights, weight_hash
from osrm_peft.models.layers import (
    all_lora_layers,
    base_name,
    base_of,
    check_unmerged,
    input_width,
    target_layers,
    unwrapped,
)


def collect_features(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    *,
    task: str,
    target_modules: list[str] | str | LoraConfig | None = None,
    statistic: str = "token",
    num_samples: int = 100,
    seed: int | None = None,
    tokenizer: Any = None,
    reference: bool = False,
    group_size: int | None = None,
    progress: bool = True,
    distributed: bool = False,
) -> TaskFeatures:
    """Run up to k samples through the pre-trained model and sum up the inputs of the target layers.

    Padding (0 in the batch's `attention_mask`) never enters; a tensor that several layers receive is counted once.
    In an encoder–decoder model each layer has the padding of what it reads: the decoder's self-attention that of
    `decoder_attention_mask` (or of the token labels, from which the decoder's inputs are made as its own forward makes
    them where the batch has none), its cross-attention the encoder's. The mask of an audio model is of samples of
    sound: its own method makes it one of frames. Images, and sound whose model masks none (Whisper), count everywhere;
    padding that is known, and in a layer of another length cannot be found, is an error. In packed rows
    (`position_ids` that start again at 0) each part is a sample. A PeftModel runs with its adapter off, a compiled
    model eagerly. The model is left as it was: hooks gone, train mode and gradients untouched. It may lie on several
    devices (`device_map`), or be split by ZeRO-3 or FSDP2.

    Args:
        model: the pre-trained model, or a PeftModel around it; runs on the device it is on.
        loader: batches as the model takes them (dicts of tensors, samples along the first axis); labels that are no
            token labels of an encoder–decoder model are ignored.
        task: the task's name, for the record.
        target_modules: which layers, see `layers.target_layers`.
        statistic: `"mean"`, `"sample"` or `"token"`, see FeatureMoments.
        num_samples: how many samples at most (the paper uses 100).
        seed: the seed that drew the samples, for the record.
        tokenizer: that which made the samples, for the record: features of another tokenizer are refused later.
        reference: count padding in and keep the mean only, as the released OSRM code does (it pads to a fixed length).
        group_size: of how many distinct inputs the sums are in memory at once; each group is a pass over the loader,
            which must give the same samples each time, and those that are done wait in a temporary folder. None: all,
            in one pass.
        distributed: all processes of torch.distributed call this with the same loader and share its samples; each
            gets the sums over all of them. A model that an engine has split needs it.

    Raises:
        ValueError: unknown statistic, k below 1, no target layer or one that never runs, a loader without a sample, or
            a layer whose padding cannot be told apart.
    """
    choice("statistic", statistic, STATISTICS)
    if reference and statistic != "mean":
        raise ValueError(f"reference=True keeps one mean a task: use statistic='mean', not {statistic!r}")
    return _collect(
        model, loader, task, target_modules, num_samples, seed, tokenizer, group_size, progress,
        Processes.of(distributed), statistic=statistic, reference=reference, of_finetuned_model=False,
    )  # fmt: skip


def collect_gram(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    *,
    task: str,
    target_modules: list[str] | str | LoraConfig | None = None,
    num_samples: int = 1000,
    seed: int | None = None,
    tokenizer: Any = None,
    group_size: int | None = None,
    progress: bool = True,
    distributed: bool = False,
) -> TaskFeatures:
    """The Gram matrices of RegMean: second moments of the target layers' inputs, on the *fine-tuned* model.

    The same object and file as `collect_features` gives, over every non-padding token, with the adapter on.

    Args:
        model: the fine-tuned model: a PeftModel with its adapter active, or full weights; runs on the device it is on.
        loader, task, target_modules, seed, tokenizer, group_size, progress, distributed: see `collect_features`.
        num_samples: how many samples at most (the paper uses up to 1,000).

    Raises:
        ValueError: k below 1, no target layer, or a loader without a sample.
    """
    return _collect(
        model, loader, task, target_modules, num_samples, seed, tokenizer, group_size, progress,
        Processes.of(distributed), statistic="token", reference=False, of_finetuned_model=True,
    )  # fmt: skip


@torch.inference_mode(False)  # whose tensors do not tell of changes in place, and can be changed nowhere else
def _collect(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    task: str,
    target_modules: list[str] | str | LoraConfig | None,
    num_samples: int,
    seed: int | None,
    tokenizer: Any,
    group_size: int | None,
    progress: bool,
    processes: Processes,
    *,
    statistic: str,
    reference: bool,
    of_finetuned_model: bool,
) -> TaskFeatures:
    num_samples, device = integer("num_samples", num_samples, 1), execution_device(model)
    model = unwrapped(model)
    layers = target_layers(model, target_modules)
    if not of_finetuned_model:
        carried = all_lora_layers(model)
        check_unmerged(carried)
        if not isinstance(model, PeftModel) and not all(layer.disable_adapters for layer in carried.values()):
            raise ValueError("the model carries an adapter (its own add_adapter): call model.disable_adapters() first")

    def run(names: Iterable[str], most: int, what: str, *, scout: bool = False) -> tuple[Collector, int]:
        watched = {name: input_width(name, layers[name]) for name in names}
        whole_samples = statistic != "token"  # a scout keeps little, but sees positions as the real run does
        collector = Collector(
            watched, "mean" if scout else statistic, EncoderDecoder(base_of(model)), whole_samples, reference
        )
        batches = samples(loader, most, processes, task=task, what=what, progress=progress)
        seen = _run(model, layers, collector, batches, device, of_finetuned_model=of_finetuned_model)
        return collector, _sum_up(collector, seen, processes)

    def features(collector: Collector, seen: int) -> TaskFeatures:
        moments = {name: collector.moments[name] for name in collector.widths}
        sampled = sampled_weights(model, moments)
        rows = next((key for key in sampled if isinstance(key, int)), None)
        return TaskFeatures(
            task, base_name(model), hash_of(sampled, moments), statistic, seen, seed, reference,
            of_finetuned_model,
            vocabulary=rows,
            embedding_hash=None if rows is None else embedding_hash(sampled, rows),
            tokenizer=public_name(getattr(tokenizer, "name_or_path", None)),
            tokenizer_hash=None if tokenizer is None else tokenizer_hash(tokenizer),
            layers=moments,
        )  # fmt: skip

    if group_size is None:
        return features(*run(layers, num_samples, f"features of {task}"))
    check_rereadable(loader, "group_size reads the loader several times, and needs the same samples each time")
    size, (shared, _) = integer("group_size", group_size, 1), run(layers, 1, f"layers of {task}", scout=True)
    leaders = list(dict.fromkeys(shared.leaders[name] for name in layers))
    groups = [leaders[start : start + size] for start in range(0, len(leaders), size)]
    folder = tempfile.TemporaryDirectory()
    parts: list[TaskFeatures] = []
    for place, group in enumerate(groups, start=1):
        names = [name for name in layers if shared.leaders[name] in group]
        part = features(*run(names, num_samples, f"features of {task}, {place}/{len(groups)}"))
        part.save(f"{folder.name}/{place}.safetensors")
        parts.append(replace(part, layers=TaskFeatures.load(f"{folder.name}/{place}.safetensors").layers))
        del part
    joined = JoinedMoments([part.layers for part in parts], list(layers), folder)  # type: ignore[misc]
    return replace(parts[0], weight_hash=weight_hash(model, layers), layers=joined)


def _run(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    collector: Collector,
    batches: Iterable[Batch],
    device: torch.device,
    *,
    of_finetuned_model: bool,
) -> int:
    """One pass over the batches into the collector; from how many samples."""
    base, seen, sides = base_of(model), 0, collector.sides
    root = model if isinstance(model, FSDPModule) else base  # FSDP2 gathers what its root holds in the root's forward
    watched = {name: layers[name] for name in collector.widths}
    # With a cache, transformers takes a packed row for one sample, whose parts see one another.
    uncached = {"use_cache": False} if "use_cache" in inspect.signature(base.forward).parameters else {}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(preserve_state(base))
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code would not see the hooks
        if isinstance(model, PeftModel) and not of_finetuned_model:
            stack.enter_context(model.disable_adapter())
        stack.enter_context(watch_inputs(watched, collector.see))
        if sides.encoder is not None:
            enter = collector.enter_encoder
            for handle in (
                sides.encoder.register_forward_pre_hook(lambda _, *called: enter(*called), with_kwargs=True),
                sides.encoder.register_forward_hook(lambda module, args, output: collector.encode(output[0])),
            ):
                stack.callback(handle.remove)
        if sides.decoder is not None:
            handle = sides.decoder.register_forward_pre_hook(
                lambda _, args, keywords: collector.encode(keywords.get("encoder_hidden_states")), with_kwargs=True
            )
            stack.callback(handle.remove)
        for tower in sides.towers:
            handle = tower.register_forward_hook(lambda module, args, output: collector.leave_tower(output))
            stack.callback(handle.remove)
        for given in batches:
            batch = given.to(device)
            inputs = sides.with_decoder(batch.inputs, batch.labels)
            collector.start(inputs, batch)
            root(**inputs | uncached)
            seen += 0 if batch.is_filler else batch.count
    return seen


def _sum_up(collector: Collector, seen: int, processes: Processes) -> int:
    """The collector's moments become those of all processes; from how many samples."""
    for leaders in processes.gather(collector.leaders):  # an expert may have run in some processes only
        for name, leader in leaders.items():
            collector.follow(name, leader)
    idle = [name for name in collector.widths if name not in collector.moments]
    if idle:
        raise ValueError(
            f"{len(idle)} of the {len(collector.widths)} target layers never ran, {idle[0]!r} the first of them: "
            "list them in exclude_modules, or narrow target_modules"
        )
    own = {name: collector.moments[name] for name in collector.widths if collector.leaders[name] == name}
    everyone = processes.gather((seen, {name: moments.count for name, moments in own.items()}))
    if processes.num_processes > 1:
        for name, moments in own.items():
            moments.sum_over_([counts[name] for _, counts in everyone], processes.rank, processes.sum_)
    for name, moments in own.items():
        moments.settle_()
        if not moments.mean().isfinite().all():
            raise ValueError(f"layer {name!r} receives NaN or Inf: is the model's checkpoint sound?")
    return sum(count for count, _ in everyone)
