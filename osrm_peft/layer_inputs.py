"""Batches run through a model while the inputs of its layers are summed up; the model is left as it was."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from osrm_peft.moments import FeatureMoments
from osrm_peft.positions import Positions, Sides, find_positions


@dataclass(frozen=True)
class Batch:
    """A batch as the model takes it, cut to the samples that are wanted.

    Attributes:
        inputs: without labels, on the model's device.
        labels: the batch's labels, if it has them.
        positions: where its samples are.
        count: how many they are.
    """

    inputs: dict[str, Any]
    labels: Tensor | None
    positions: Positions
    count: int


def samples(
    loader: Iterable[Mapping[str, Any]], k: int, device: torch.device, *, task: str, what: str, progress: bool
) -> Iterator[Batch]:
    """Batches of at most k samples together.

    Raises:
        ValueError: at the end, if there was none.
    """
    seen = 0
    with tqdm(total=k, desc=what, unit="sample", disable=not progress) as bar:
        for given in loader:
            batch = _cut(given, k - seen, device)
            if batch.count == 0:
                continue
            yield batch
            seen += batch.count
            bar.update(batch.count)
            if seen >= k:
                break
    if seen == 0:
        raise ValueError(f"the loader of task {task!r} gave no sample: is its dataset empty?")


def _cut(batch: Mapping[str, Any], most: int, device: torch.device) -> Batch:
    """The first `most` samples of a batch, on the device."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"the loader must give dicts as the model takes them, got a {type(batch).__name__}")
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor) and value.dim() > 0}
    # Other tensors may be longer: cu_seq_lens of packed rows, the patches of all images.
    main = [key for key in tensors if key in ("input_ids", "inputs_embeds", "attention_mask")] or list(tensors)
    rows = max((len(tensors[key]) for key in main), default=0)
    of_rows = {key for key, value in tensors.items() if len(value) == rows and not key.startswith("cu_seq_lens")}
    cut = {key: (value[:most] if key in of_rows else value).to(device) for key, value in tensors.items()}
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

    def start(self, inputs: Mapping[str, Any], positions: Positions) -> None:
        """A new forward pass."""
        if self.reference:
            positions = Positions(positions.rows)  # padding counts
        self.positions = positions
        two = self.sides.two and not self.reference
        self.in_decoder = self.sides.decoder_positions(inputs, positions) if two else positions
        self.encoded: Tensor | None = None
        # (tensor, its version, the layer that received it first), of the last input and of the encoder's output; the
        # tensors are kept alive, so `is` can be trusted
        self.received: dict[str, tuple[Tensor, int, str]] = {}

    def encode(self, encoded: Tensor) -> None:
        """The encoder's output in this pass."""
        self.encoded = encoded

    def see(self, name: str, x: Tensor) -> None:
        """One layer's input; counted if no other layer has received this very tensor.

        That is looked for in the input just before, and among those that are the encoder's output.
        """
        leader = name
        for tensor, version, first in self.received.values():
            if x is tensor and x._version == version:
                leader = first
        if self.leaders.setdefault(name, leader) != leader:
            raise RuntimeError(
                f"layer {name!r} shared its input with another layer in some batches and not in others: "
                "collect its features on its own (target_modules with this layer alone)"
            )
        if leader != name:
            self.moments[name] = self.moments[leader]
            return
        positions = self.in_decoder if self.sides.in_decoder(name, x, self.encoded) else self.positions
        if name not in self.moments:
            self.moments[name] = FeatureMoments(self.statistic, self.widths[name])
        self.moments[name].add_(*positions.of(name, x, self.whole_samples))
        self.received["encoded" if x is self.encoded else "last"] = (x, x._version, name)


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
            parameter.requires_grad_(grad)
