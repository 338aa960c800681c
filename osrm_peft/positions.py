"""Which positions of a batch are real, and to which sample each belongs: padding masks, packed rows, decoders."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from osrm_peft.layers import base_of


@dataclass(frozen=True)
class Positions:
    """The positions of one batch's sequences.

    Attributes:
        rows: b.
        keep: (b, s) bool, False at padding and beyond the samples that are wanted; None: all are real.
        samples: (b, s) which sample a position belongs to; None: each row is one.
    """

    rows: int
    keep: Tensor | None = None
    samples: Tensor | None = None

    def of(self, name: str, x: Tensor, whole_samples: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(x, keep, samples) for one layer's input: (b, s, n) with (b, s) masks, or (b, n), one vector a sample.

        Args:
            whole_samples: samples must be told apart, not just positions.

        Raises:
            ValueError: the layer's input has another shape than the batch, so padding or samples cannot be told apart.
        """
        if x.dim() > 3:  # images: (b, h, w, n)
            x = x.flatten(1, -2)
        if self.keep is None:
            if whole_samples and len(x) != self.rows:
                raise ValueError(
                    f"layer {name!r} receives inputs of shape {tuple(x.shape)} for {self.rows} samples: they cannot "
                    "be told apart; use statistic='token', or leave the layer out of target_modules"
                )
            return x, None, None
        keep = self.keep.to(x.device)  # a device_map puts layers on several
        samples = None if self.samples is None else self.samples.to(x.device)
        if x.dim() == 2 and len(x) == self.keep.numel() != self.rows:
            x = x.view(*self.keep.shape, -1)  # tokens of all samples in one row
        if x.shape[:2] != self.keep.shape if x.dim() == 3 else len(x) != self.rows or self.samples is not None:
            raise ValueError(
                f"layer {name!r} receives inputs of shape {tuple(x.shape)}, but the attention_mask is "
                f"{tuple(self.keep.shape)}: padding cannot be told apart; leave the layer out of target_modules"
            )
        return x, keep, samples


def find_positions(inputs: Mapping[str, Any], rows: int, most: int) -> tuple[Positions, int]:
    """The positions of a batch, and how many samples it holds.

    Padding is 0 in `attention_mask`. Rows are packed with several samples where `position_ids` start again at 0 within
    a row (transformers' DataCollatorWithFlattening, TRL's packing); samples beyond the first `most` are left out.

    Raises:
        ValueError: an attention_mask that is no (b, s) tensor.
    """
    mask, position_ids = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        found = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
        raise ValueError(f"the attention_mask has {found}: give the (samples, positions) padding mask")
    keep = None if mask is None else mask.bool()
    if not isinstance(position_ids, Tensor) or position_ids.dim() != 2 or len(position_ids) != rows:
        return Positions(rows, keep), rows
    real = _without_trailing_zeros(position_ids) if keep is None else keep
    starts = real & ((position_ids == 0) | (real.cumsum(1) == 1))
    if int(starts.sum()) == int(real.any(1).sum()):
        return Positions(rows, keep if bool(real.all()) else real), rows
    samples = starts.flatten().cumsum(0).view(starts.shape) - 1
    return Positions(rows, real & (samples < most), samples), min(int(starts.sum()), most)


def _without_trailing_zeros(position_ids: Tensor) -> Tensor:
    """(b, s) bool: False where several zeros end a row: padding (TRL's pad_to_multiple_of). One zero is a sample."""
    trailing = (position_ids == 0).flip(1).cumprod(1).flip(1).bool()
    return ~(trailing & (trailing.sum(1, keepdim=True) > 1))


class Sides:
    """Which layers of a model see the decoder's positions, and which tensor in a pass is the encoder's output.

    A model without an encoder has one side.
    """

    def __init__(self, model: nn.Module) -> None:
        base = base_of(model)
        config = getattr(base, "config", None)
        self.two = bool(getattr(config, "is_encoder_decoder", False))
        self.encoder = base.get_encoder() if self.two else None
        self.prefix = next((f"{name}." for name, module in base.named_modules() if module is self.encoder), "")
        self._base = base

    def in_decoder(self, name: str, x: Tensor, encoded: Tensor | None) -> bool:
        """Whether this layer's input x has the decoder's positions: cross-attention reads the encoder's output."""
        return self.two and not name.startswith(self.prefix) and not same_tensor(x, encoded)

    def with_decoder(self, inputs: dict[str, Any], labels: Tensor | None) -> dict[str, Any]:
        """The inputs with those of the decoder, from token labels (−100 is padding) where the batch has none."""
        if not self.two or labels is None or labels.dim() != 2 or labels.is_floating_point():
            return inputs
        if "decoder_input_ids" not in inputs and "decoder_inputs_embeds" not in inputs:
            inputs = inputs | {"decoder_input_ids": self._base.prepare_decoder_input_ids_from_labels(labels)}
        return {"decoder_attention_mask": (labels != -100).long()} | inputs

    def decoder_positions(self, inputs: Mapping[str, Any], main: Positions) -> Positions:
        """The decoder's positions; where the model makes its inputs from the encoder's, these are the same."""
        if "decoder_attention_mask" in inputs:
            return Positions(main.rows, inputs["decoder_attention_mask"].bool())
        made = "decoder_input_ids" not in inputs and "decoder_inputs_embeds" not in inputs
        return main if made else Positions(main.rows)


def same_tensor(x: Tensor, other: Tensor | None) -> bool:
    """Whether x is the other tensor, or a view of all of it (as ZeRO-3 hands to each layer)."""
    return other is not None and (x.data_ptr(), x.shape, x.stride()) == (other.data_ptr(), other.shape, other.stride())
