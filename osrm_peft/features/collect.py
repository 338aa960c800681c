"""collect_features, collect_gram: sum up the inputs of the target layers and leave the model as it was."""

import inspect
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule

from osrm_peft.checks import choice, integer
from osrm_peft.distributed import Processes, execution_device
from osrm_peft.features.batches import TOKENS, Batch, check_rereadable, samples
from osrm_peft.features.collector import Collector
from osrm_peft.features.file import JoinedMoments
from osrm_peft.features.hooks import preserve_state, watch_inputs
from osrm_peft.features.moments import STATISTICS, FeatureStatistic
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
    statistic: FeatureStatistic = "token",
    num_samples: int = 100,
    seed: int | None = None,
    tokenizer: Any = None,
    tokens: Literal["all", "prompt", "completion"] = "all",
    reference: bool = False,
    group_size: int | None = None,
    progress: bool = True,
    distributed: bool = False,
) -> TaskFeatures:
    """Run up to k samples through the pre-trained model and sum up the inputs of the target layers.

    Padding (0 in the batch's `attention_mask`) never enters; a tensor that several layers receive is counted once.
    In an encoder–decoder model the decoder's self-attention has the padding of `decoder_attention_mask`, or of the
    token labels (where the batch has no inputs for the decoder, they are made from these); its cross-attention has the
    encoder's. An audio model's mask counts samples of sound; the model's own method turns it into a mask of frames.
    Images, and sound without a mask (Whisper), count everywhere. It is an error if there is padding and a layer of
    another length does not show where. In packed rows (`position_ids` that start again at 0) each part is a sample.
    A PeftModel runs with its adapter off, a compiled model eagerly. The model is left as it was: hooks gone, train mode
    and gradients untouched. It may lie on several devices (`device_map`), or be split by ZeRO-3 or FSDP2.

    Args:
        model: the pre-trained model, or a PeftModel around it; runs on the device it is on.
        loader: batches as the model takes them (dicts of tensors, samples along the first axis). Labels are ignored,
            except token labels of an encoder–decoder model.
        task: the task's name, for the record.
        target_modules: which layers, see `layers.target_layers`.
        statistic: `"mean"`, `"sample"` or `"token"`, see FeatureMoments.
        num_samples: how many samples at most (the paper uses 100).
        seed: the seed that drew the samples, for the record.
        tokenizer: the samples' tokenizer, for the record: features of another tokenizer are refused later.
        tokens: of a causal language model: all tokens of a sample, or those of its prompt or of its completion alone. A
            token is of the completion where the batch's label is not −100, as for training; packed rows may have both.
        reference: count padding in and keep the mean only, as the released OSRM code does (it pads to a fixed length).
        group_size: how many distinct inputs have their sums in memory at once. Each group is a pass over the loader,
            which must give the same samples each time; finished groups wait in a temporary folder. None: one pass.
        distributed: all processes of torch.distributed call this with the same loader and share its samples; each
            gets the sums over all of them. A model that an engine has split needs it.

    Raises:
        ValueError: unknown statistic, k below 1, no target layer or one that never runs, a loader without a sample, or
            a layer whose padding is unknown.
    """
    choice("statistic", statistic, STATISTICS)
    choice("tokens", tokens, TOKENS)
    if reference and tokens != "all":
        raise ValueError(f"reference=True counts all positions: leave tokens={tokens!r} out")
    if reference and statistic != "mean":
        raise ValueError(f"reference=True keeps one mean a task: use statistic='mean', not {statistic!r}")
    return _Collection(
        model, loader, task, target_modules, num_samples, seed, tokenizer, progress, Processes.of(distributed),
        statistic=statistic, reference=reference, tokens=tokens,
    ).features(group_size)  # fmt: skip


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
    return _Collection(
        model, loader, task, target_modules, num_samples, seed, tokenizer, progress, Processes.of(distributed),
        statistic="token", of_finetuned_model=True,
    ).features(group_size)  # fmt: skip


@dataclass
class _Collection:
    """One call of `collect_features` or `collect_gram`: what it asks for, and what it reads from the model.

    Attributes:
        model … reference: as for `collect_features`; the model without its wrappers.
        of_finetuned_model: whether the adapter is on.
        device: where the model takes its inputs.
        layers: {name in the base model: target layer}.

    Raises:
        ValueError: no sample is asked for, no layer is a target, or the adapter cannot be switched off.
    """

    model: nn.Module
    loader: Iterable[Mapping[str, Any]]
    task: str
    target_modules: list[str] | str | LoraConfig | None
    num_samples: int
    seed: int | None
    tokenizer: Any
    progress: bool
    processes: Processes
    statistic: str
    tokens: str = "all"
    reference: bool = False
    of_finetuned_model: bool = False
    device: torch.device = field(init=False)
    layers: dict[str, nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        self.num_samples, self.device = integer("num_samples", self.num_samples, 1), execution_device(self.model)
        self.model = unwrapped(self.model)
        self.layers = target_layers(self.model, self.target_modules)
        if self.of_finetuned_model:
            return
        carried = all_lora_layers(self.model)
        check_unmerged(carried)
        if not isinstance(self.model, PeftModel) and not all(layer.disable_adapters for layer in carried.values()):
            raise ValueError("the model carries an adapter (its own add_adapter): call model.disable_adapters() first")

    @torch.inference_mode(False)  # its tensors count no changes, and cannot be changed outside of it
    def features(self, group_size: int | None) -> TaskFeatures:
        """The features of all target layers, in one pass or in one pass a group of distinct inputs."""
        try:
            return self._in_groups(group_size)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"the memory of {self.device} is too small for the model, a batch and the sums of {len(self.layers)} "
                "layers: give a smaller group_size (--group-size), which collects some layers at a time, or smaller "
                "batches"
            ) from error

    def _in_groups(self, group_size: int | None) -> TaskFeatures:
        if group_size is None:
            return self._features(self.layers, self.num_samples, f"features of {self.task}")
        check_rereadable(self.loader, "group_size reads the loader several times, and needs the same samples each time")
        size = integer("group_size", group_size, 1)
        scout, _ = self._run(self.layers, 1, f"layers of {self.task}", statistic="mean")  # it keeps little
        leaders = list(dict.fromkeys(scout.leaders[name] for name in self.layers))
        groups = [leaders[start : start + size] for start in range(0, len(leaders), size)]
        folder = tempfile.TemporaryDirectory()
        parts: list[TaskFeatures] = []
        for number, group in enumerate(groups, start=1):
            names = [name for name in self.layers if scout.leaders[name] in group]
            part = self._features(names, self.num_samples, f"features of {self.task}, {number}/{len(groups)}")
            part.save(f"{folder.name}/{number}.safetensors")
            parts.append(replace(part, layers=TaskFeatures.load(f"{folder.name}/{number}.safetensors").layers))
            del part
        joined = JoinedMoments([part.layers for part in parts], list(self.layers), folder)  # type: ignore[misc]
        return replace(parts[0], weight_hash=weight_hash(self.model, self.layers), layers=joined)

    def _features(self, names: Iterable[str], most: int, what: str) -> TaskFeatures:
        """The features of these layers."""
        collector, seen = self._run(names, most, what, statistic=self.statistic)
        moments = {name: collector.moments[name] for name in collector.widths}
        sampled = sampled_weights(self.model, moments)
        rows = next((key for key in sampled if isinstance(key, int)), None)
        return TaskFeatures(
            self.task, base_name(self.model), hash_of(sampled, moments), self.statistic, seen, self.seed,
            self.reference, self.of_finetuned_model,
            vocabulary=rows,
            embedding_hash=None if rows is None else embedding_hash(sampled, rows),
            tokenizer=public_name(getattr(self.tokenizer, "name_or_path", None)),
            tokenizer_hash=None if self.tokenizer is None else tokenizer_hash(self.tokenizer),
            tokens=self.tokens,
            layers=moments,
        )  # fmt: skip

    def _run(self, names: Iterable[str], most: int, what: str, *, statistic: str) -> tuple[Collector, int]:
        """Read at most this many samples; the moments over all processes, and how many samples they had."""
        widths = {name: input_width(name, self.layers[name]) for name in names}
        whole_samples = self.statistic != "token"  # also where `statistic` is a scout's: it sees the same positions
        collector = Collector(widths, statistic, EncoderDecoder(base_of(self.model)), whole_samples, self.reference)
        batches = samples(self.loader, most, self.processes, task=self.task, what=what, progress=self.progress)
        return collector, _sum_up(collector, self._pass(collector, batches), self.processes)

    def _pass(self, collector: Collector, batches: Iterable[Batch]) -> int:
        """One pass over the batches into the collector; how many samples they had."""
        base, seen = base_of(self.model), 0
        # FSDP2 gathers what its root holds in the root's forward
        root = self.model if isinstance(self.model, FSDPModule) else base
        # With a cache, transformers takes a packed row for one sample, whose parts see one another.
        uncached = {"use_cache": False} if "use_cache" in inspect.signature(base.forward).parameters else {}
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(preserve_state(base))
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code would not see the hooks
            if isinstance(self.model, PeftModel) and not self.of_finetuned_model:
                stack.enter_context(self.model.disable_adapter())
            stack.enter_context(watch_inputs({name: self.layers[name] for name in collector.widths}, collector.see))
            stack.enter_context(_watch_sides(collector))
            for given in batches:
                batch = given.to(self.device)
                inputs = collector.sides.with_decoder(batch.inputs, batch.labels)
                collector.start(inputs, batch.only(self.tokens))
                root(**inputs | uncached)
                seen += 0 if batch.is_filler else batch.count
        return seen


@contextmanager
def _watch_sides(collector: Collector) -> Iterator[None]:
    """Show the collector what the encoder, the decoder and towers receive and return; the hooks are gone at the end."""
    sides, handles = collector.sides, []
    if sides.encoder is not None:
        handles += [
            sides.encoder.register_forward_pre_hook(
                lambda _, args, keywords: collector.enter_encoder(args, keywords), with_kwargs=True
            ),
            sides.encoder.register_forward_hook(lambda module, args, output: collector.encode(output[0])),
        ]
    if sides.decoder is not None:
        handles.append(
            sides.decoder.register_forward_pre_hook(
                lambda _, args, keywords: collector.encode(keywords.get("encoder_hidden_states")), with_kwargs=True
            )
        )
    for tower in sides.towers:
        handles.append(tower.register_forward_hook(lambda module, args, output: collector.leave_tower(output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sum_up(collector: Collector, seen: int, processes: Processes) -> int:
    """Sum the collector's moments over all processes, in place; how many samples they had."""
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
    totals = processes.gather((seen, {name: moments.count for name, moments in own.items()}))
    if processes.num_processes > 1:
        for name, moments in own.items():
            moments.sum_over_([counts[name] for _, counts in totals], processes.rank, processes.sum_)
    for name, moments in own.items():
        moments.settle_()
        if not moments.mean().isfinite().all():
            raise ValueError(f"layer {name!r} receives NaN or Inf: is the model's checkpoint sound?")
    return sum(count for count, _ in totals)
