"""Batches run through a model while the inputs of its layers are summed up; the model is left as it was."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from torch import Tensor, nn
from torch.utils.data import DistributedSampler, RandomSampler
from tqdm.auto import tqdm

from osrm_peft.distributed import Processes
from osrm_peft.moments import FeatureMoments
from osrm_peft.positions import Positions, Sides, find_positions, same_tensor, tensors_in


@dataclass(frozen=True)
class Batch:
    """A batch as the model takes it, cut to the samples that are wanted.

    Attributes:
        inputs: without labels.
        labels: the batch's labels, if it has them.
        positions: where its samples are.
        count: how many they are.
        counts: False where it only keeps this process in step with the others, who have samples left.
    """

    inputs: dict[str, Any]
    labels: Tensor | None
    positions: Positions
    count: int
    counts: bool = True

    def to(self, device: torch.device) -> "Batch":
        """The same batch there, as tensors whose changes are counted (those of inference mode are not)."""

        def moved(value: Any) -> Any:
            value = value.clone() if isinstance(value, Tensor) and value.is_inference() else value
            return value.to(device) if isinstance(value, Tensor) else value

        positions = replace(self.positions, keep=moved(self.positions.keep), samples=moved(self.positions.samples))
        inputs = {key: moved(value) for key, value in self.inputs.items()}
        return replace(self, inputs=inputs, labels=moved(self.labels), positions=positions)


def check_rereadable(loader: Any, why: str) -> None:
    """Raise ValueError if the loader gives other samples each time it is read."""
    if isinstance(loader, Iterator) or isinstance(getattr(loader, "sampler", None), RandomSampler):
        raise ValueError(f"{why}: give a DataLoader without shuffle, or a list of batches")


def samples(
    loader: Iterable[Mapping[str, Any]], k: int, processes: Processes, *, task: str, what: str, progress: bool
) -> Iterator[Batch]:
    """This process' batches, of at most k samples over all processes; each gets equally many batches.

    Raises:
        ValueError: the loader is split over processes already; or at the end, if there was no sample, or processes had
            different ones.
    """
    if processes.count > 1:
        check_rereadable(loader, "several processes share the samples of one loader, which must be the same everywhere")
        if isinstance(loader, (DataLoaderShard, DataLoaderDispatcher)) or isinstance(
            getattr(loader, "sampler", None), DistributedSampler
        ):
            raise ValueError(
                f"the loader of task {task!r} is split over the processes already (accelerator.prepare, or a "
                "DistributedSampler), which may repeat samples: give the loader as it was before, it is shared out here"
            )
    seen, waiting, digest = 0, [], hashlib.sha256()
    with tqdm(total=k, desc=what, unit="sample", disable=not progress or not processes.main) as bar:
        for given in loader:
            batch = _cut(given, k - seen)
            if batch.count == 0:
                continue
            seen += batch.count
            if processes.count > 1:
                sums = {
                    key: float(value.double().sum()) for key, value in batch.inputs.items() if isinstance(value, Tensor)
                }
                digest.update(repr((batch.count, sums)).encode())
            waiting.append(batch)
            if len(waiting) == processes.count or seen >= k:
                yield _mine(waiting, processes)
                waiting = []
            bar.update(batch.count)
            if seen >= k:
                break
        if waiting:
            yield _mine(waiting, processes)
    everyone = processes.gather((seen, digest.hexdigest()))
    if len(set(everyone)) > 1:
        counts = [count for count, _ in everyone]
        raise ValueError(
            f"the processes' loaders of task {task!r} gave {counts} samples, or other ones: all must read the same"
        )
    if seen == 0:
        raise ValueError(f"the loader of task {task!r} gave no sample: is its dataset empty?")


def _mine(batches: list[Batch], processes: Processes) -> Batch:
    """This process' batch of at most one each; the last again, not to be counted, where there are too few."""
    return batches[processes.rank] if processes.rank < len(batches) else replace(batches[-1], counts=False)


def _cut(batch: Mapping[str, Any], most: int) -> Batch:
    """The first `most` samples of a batch."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"the loader must give dicts as the model takes them, got a {type(batch).__name__}")
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor) and value.dim() > 0}
    # Other tensors may be longer: cu_seq_lens of packed rows, the patches of all images.
    main = [key for key in tensors if key in ("input_ids", "inputs_embeds", "attention_mask")] or list(tensors)
    rows = max((len(tensors[key]) for key in main), default=0)
    of_rows = {key for key, value in tensors.items() if len(value) == rows and not key.startswith("cu_seq_lens")}
    cut = {key: value[:most] if key in of_rows else value for key, value in tensors.items()}
    inputs = {key: value for key, value in {**batch, **cut}.items() if key not in ("label", "labels")}
    positions, count = find_positions(inputs, min(rows, most), most)
    return Batch(inputs, cut.get("labels", cut.get("label")), positions, count)


class Collector:
    """Feeds layer inputs to FeatureMoments, each distinct tensor once."""

    def __init__(
        self, widths: dict[str, int], statistic: str, sides: Sides, whole_samples: bool, reference: bool
    ) -> None:
        self.widths, self.statistic, self.sides = widths, statistic, sides
        self.whole_samples, self.reference = whole_samples, reference
        self.moments: dict[str, FeatureMoments] = {}
        self.leaders: dict[str, str] = {}  # {layer: the first layer that receives the same tensor}

    def start(self, inputs: Mapping[str, Any], batch: Batch) -> None:
        """A new forward pass on these inputs; the batch may count for nothing."""
        rows, self.counts = batch.positions.rows, batch.counts
        self.unmasked = Positions(rows, padded=batch.positions.padded)
        self.positions = Positions(rows) if self.reference else self.sides.positions(inputs, batch.positions)
        two = self.sides.two and not self.reference  # with `reference`, padding counts
        self.in_decoder = self.sides.decoder_positions(inputs, batch.labels, self.positions) if two else self.positions
        self.text = "input_ids" in inputs or "inputs_embeds" in inputs
        self.encoded: Tensor | None = None
        self.images: list[Tensor] = []  # what towers and the modules between them and the text have returned
        # (tensor, its version, the layer that received it first), of the last input and of the encoder's output; the
        # tensors are kept alive, so that no other can lie at the same place
        self.received: dict[str, tuple[Tensor, int, str]] = {}

    def leave_tower(self, output: Any) -> None:
        """What a tower returns, which layers of the text may read: it has none of the text's positions."""
        self.images += tensors_in(output)

    def encode(self, encoded: Tensor | None) -> None:
        """The encoder's output in this pass, or what is made of it for the decoder."""
        self.encoded = self.encoded if encoded is None else encoded

    def enter_encoder(self, arguments: tuple, keywords: Mapping[str, Any]) -> None:
        """What the encoder is called with; where it is handed no mask, it has none. (Text models find it elsewhere.)"""
        masked = keywords.get("attention_mask") is not None or any(one is not None for one in arguments[1:])
        if not masked and not self.text:
            self.positions = self.unmasked

    def see(self, name: str, x: Tensor) -> None:
        """One layer's input; counted if no other layer has received this very tensor.

        That is looked for in the input just before, and among those that are the encoder's output.
        """
        leader = name
        for tensor, version, first in self.received.values():
            if same_tensor(x, tensor) and x._version == version:
                leader = first
        self.follow(name, leader)
        if leader != name:
            return
        positions = self.in_decoder if self.sides.in_decoder(name, x, self.encoded) else self.positions
        place = x.data_ptr(), x.numel()
        of_images = self.sides.in_tower(name) or any(place == (one.data_ptr(), one.numel()) for one in self.images)
        positions = self.unmasked if of_images else positions
        if self.sides.turned and x.dim() == 3 and len(x) == x.shape[1] > 1:
            raise ValueError(
                f"layer {name!r} has positions before samples, which cannot be told apart where there are {len(x)} of "
                "either: give batches of another number of samples"
            )
        if self.counts:
            self.moments[name].add_(*positions.of(name, x, self.whole_samples))
        self.received["encoded" if same_tensor(x, self.encoded) else "last"] = (x, x._version, name)

    def follow(self, name: str, leader: str) -> None:
        """Note that the layer receives the leader's input, here or in another process."""
        if self.leaders.setdefault(name, leader) != leader:
            raise RuntimeError(
                f"layer {name!r} shared its input with another layer in some batches and not in others: "
                "collect its features on its own (target_modules with this layer alone)"
            )
        if leader not in self.moments:
            self.moments[leader] = FeatureMoments(self.statistic, self.widths[leader])
        self.moments[name] = self.moments[leader]


@contextmanager
def watch_inputs(layers: Mapping[str, nn.Module], on_input) -> Iterator[None]:
    """Call on_input(name, x) before each forward of `layers`; the hooks are gone when the block ends."""

    def hook_for(name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            on_input(name, (args[0] if args else next(iter(kwargs.values()))))

        return hook

    handles = [module.register_forward_pre_hook(hook_for(name), with_kwargs=True) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each submodule has its mode, and each parameter its requires_grad, again.

    (PEFT's disable_adapter switches requires_grad of an adapter's parameters back on when it ends.)
    """
    modes = {module: module.training for module in model.modules()}
    grads = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, grad in grads.items():
            if parameter.requires_grad != grad:  # PEFT's tensors only: those of inference mode take no setting
                parameter.requires_grad_(grad)
