"""Collector: sums up the inputs of a model's layers, each distinct tensor once."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from osrm_peft.devices import CPU, device_of
from osrm_peft.features.batches import Batch
from osrm_peft.features.moments import FeatureMoments
from osrm_peft.features.padding import EncoderDecoder, TokenMask, same_tensor, tensors_in


class Collector:
    """Feeds layer inputs to FeatureMoments, each distinct tensor once.

    Attributes:
        widths: {layer: n} of the layers that it watches.
        sides: which positions each layer sees.
        whole_samples: samples must be told apart, not just positions.
        reference: padding counts, as in the released code.
        moments: {layer: the moments of its input}.
        leaders: {layer: the first layer that receives the same tensor}.
    """

    def __init__(
        self, widths: dict[str, int], statistic: str, sides: EncoderDecoder, whole_samples: bool, reference: bool
    ) -> None:
        self.widths, self.statistic, self.sides = widths, statistic, sides
        self.whole_samples, self.reference = whole_samples, reference
        self.moments: dict[str, FeatureMoments] = {}
        self.leaders: dict[str, str] = {}

    def start(self, inputs: Mapping[str, Any], batch: Batch) -> None:
        """Begin a forward pass on these inputs; those of a filler are not summed up."""
        rows, self.is_filler = batch.positions.rows, batch.is_filler
        self.unmasked = TokenMask(rows, padded=batch.positions.padded)
        self.positions = TokenMask(rows) if self.reference else self.sides.positions(inputs, batch.positions)
        two = self.sides.two and not self.reference  # with `reference`, padding counts
        self.in_decoder = self.sides.decoder_positions(inputs, batch.labels, self.positions) if two else self.positions
        self.text = "input_ids" in inputs or "inputs_embeds" in inputs
        self.encoded: Tensor | None = None
        self.images: list[Tensor] = []  # what towers and the modules between them and the text have returned
        # {"last" (the last input) or "encoded" (the encoder's output): (tensor, its version, the layer that received it
        # first)}; this keeps the tensors alive, so that no other can take their memory
        self.received: dict[str, tuple[Tensor, int, str]] = {}

    def leave_tower(self, output: Any) -> None:
        """Note what a tower returns: layers of the text may read it, and it has none of the text's positions."""
        self.images += tensors_in(output)

    def encode(self, encoded: Tensor | None) -> None:
        """Note the encoder's output in this pass, or what the model makes of it for the decoder."""
        self.encoded = self.encoded if encoded is None else encoded

    def enter_encoder(self, arguments: tuple, keywords: Mapping[str, Any]) -> None:
        """Note the encoder's arguments: without a mask among them it has none. (Text models find theirs elsewhere.)"""
        masked = keywords.get("attention_mask") is not None or any(one is not None for one in arguments[1:])
        if not masked and not self.text:
            self.positions = self.unmasked

    def see(self, name: str, x: Tensor) -> None:
        """Add one layer's input, unless another layer has received this very tensor.

        It is compared with the input just before, and with the encoder's output.
        """
        leader = name
        for tensor, version, first in self.received.values():
            if same_tensor(x, tensor) and x._version == version:
                leader = first
        self.follow(name, leader, device_of(x))
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
        if not self.is_filler:
            self.moments[name].add_(*positions.of(name, x, self.whole_samples))
        self.received["encoded" if same_tensor(x, self.encoded) else "last"] = (x, x._version, name)

    def follow(self, name: str, leader: str, device: torch.device = CPU) -> None:
        """Note that the layer receives the leader's input, here on this device, or in another process."""
        if self.leaders.setdefault(name, leader) != leader:
            raise RuntimeError(
                f"layer {name!r} shared its input with another layer in some batches and not in others: "
                "collect its features on its own (target_modules with this layer alone)"
            )
        if leader not in self.moments:
            self.moments[leader] = FeatureMoments(self.statistic, self.widths[leader], made_on=device)
        self.moments[name] = self.moments[leader]
