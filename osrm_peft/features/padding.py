"""Which positions of a batch are real, and to which sample each belongs: padding masks, packed rows, decoders."""

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from osrm_peft.libraries import is_pretrained_model
from osrm_peft.models.fingerprint import input_embedding
from osrm_peft.models.layers import base_of

# ends of the names of modules between a tower and the text; InstructBLIP's qformer reads a text, too
_BETWEEN = ("projector", "connector", "aligner", "qformer", "language_projection", "vision_projection",
            "image_to_text_projection", "perceiver_resampler", "embed_vision")  # fmt: skip
# masks that are not of text: DETR's, SigLIP 2's and Idefics 3's, Mllama's, VisualBERT's, LUKE's, Qwen2-Audio's, …
_OTHER_MASKS = ("pixel_mask", "pixel_attention_mask", "aspect_ratio_mask", "visual_attention_mask",
                "entity_attention_mask", "feature_attention_mask", "input_features_mask")  # fmt: skip


@dataclass(frozen=True)
class TokenMask:
    """The positions of one batch's sequences.

    Attributes:
        rows: b.
        keep: (b, s) bool, False at padding and beyond the wanted samples; None: all positions are real.
        samples: (b, s) which sample a position belongs to; None: each row is one.
        frames: {f: (b, f) bool}, `keep` at the other lengths of an audio model, whose own mask counts samples of sound.
        padded: the input that masks padding in pixels or sound, which no layer's positions match.
    """

    rows: int
    keep: Tensor | None = None
    samples: Tensor | None = None
    frames: Mapping[int, Tensor] = field(default_factory=dict)
    padded: str | None = None

    def of(self, name: str, x: Tensor, whole_samples: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(x, keep, samples) for one layer's input: (b, s, n) with (b, s) masks, or (b, n), one vector a sample.

        Inputs of other shapes are reshaped: images (b, h, w, n), heads, all tokens in one row.
        Without padding in the mask, a layer may have fewer positions (frames, an expert's tokens): all are real.

        Args:
            whole_samples: samples must be told apart, not just positions.

        Raises:
            ValueError: the layer's input has another shape than the batch, so padding or samples cannot be told apart.
        """
        if self.keep is None:
            return self._all_of(name, x, whole_samples), None, None
        for mask in (*self.frames.values(), self.keep):
            rows = _in_rows(x, mask)
            if rows is not None and len(mask) == self.rows:
                x, each = rows  # with a device_map on another device than the masks
                masks = [None if one is None else one.to(x.device) for one in (mask, self.samples)]
                keep, samples = (None if one is None else one.repeat_interleave(each, 1) for one in masks)
                return x, keep, samples
        if self.samples is None and x.dim() == 2 and len(x) == self.rows:
            return x, self.keep.to(x.device), None
        # More positions than the batch has are the model's own padding: Longformer's, of whole windows.
        longer = x[..., 0].numel() > self.keep.numel()
        if self.samples is None and not longer and bool(self.keep.all()):
            return self._all_of(name, x, whole_samples), None, None
        way_out = "of a length that the model does not pad" if longer else "without padding (of one sample each)"
        raise ValueError(
            f"layer {name!r} receives inputs of shape {tuple(x.shape)}, but the attention_mask is "
            f"{tuple(self.keep.shape)}: padding cannot be told apart; leave the layer out of target_modules, or "
            f"give batches {way_out}"
        )

    def _all_of(self, name: str, x: Tensor, whole_samples: bool) -> Tensor:
        """x with all its positions, in one of the two shapes."""
        if self.padded and x.dim() > 2:
            raise ValueError(
                f"{self.padded} tells of padding, which cannot be told apart in layer {name!r} (inputs of shape "
                f"{tuple(x.shape)}): give batches of one sample each, without padding, or leave the layer out of "
                "target_modules"
            )
        x = x.flatten(1, -2) if x.dim() > 3 else x  # images: (b, h, w, n)
        if whole_samples and len(x) != self.rows:
            raise ValueError(
                f"layer {name!r} receives inputs of shape {tuple(x.shape)} for {self.rows} samples: they cannot "
                "be told apart; use statistic='token', or leave the layer out of target_modules"
            )
        return x


def _in_rows(x: Tensor, mask: Tensor) -> tuple[Tensor, int] | None:
    """(x as (b, s·m, n), m): it has m vectors at each of the mask's (b, s) positions; None if it does not fit."""
    b, s = mask.shape
    if x.dim() == 2:  # tokens of all samples in one row; (b, n) is one vector a sample
        return (x.view(b, s, -1), 1) if len(x) == b * s != b else None
    between = list(x.shape[1:-1])
    if len(x) == b and between.count(s) == 1:  # heads: (b, h, s, n) or (b, s, h, n)
        return x.movedim(1 + between.index(s), 1).flatten(1, -2), math.prod(between) // s
    return (x.flatten(1, -2), 1) if len(x) == b and math.prod(between) == s else None


def find_token_mask(inputs: Mapping[str, Any], rows: int, most: int) -> tuple[TokenMask, int]:
    """The positions of a batch, and how many samples it holds.

    Padding is 0 in `attention_mask`. Rows are packed with several samples where `position_ids` start again at 0 within
    a row (transformers' DataCollatorWithFlattening, TRL's packing); samples beyond the first `most` are left out.

    Raises:
        ValueError: an attention_mask that is no (b, s) tensor.
    """
    mask, position_ids = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        actual = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
        raise ValueError(f"the attention_mask has {actual}: give the (samples, positions) padding mask")
    keep = None if mask is None else mask.bool()
    other = next((key for key in _OTHER_MASKS if isinstance(inputs.get(key), Tensor) and not inputs[key].all()), None)
    if not isinstance(position_ids, Tensor) or position_ids.dim() != 2 or len(position_ids) != rows:
        return TokenMask(rows, keep, padded=other), rows
    real = _without_trailing_zeros(position_ids) if keep is None else keep
    starts = real & ((position_ids == 0) | (real.cumsum(1) == 1))
    if int(starts.sum()) == int(real.any(1).sum()):
        return TokenMask(rows, keep if bool(real.all()) else real, padded=other), rows
    samples = starts.flatten().cumsum(0).view(starts.shape) - 1
    return TokenMask(rows, real & (samples < most), samples, padded=other), min(int(starts.sum()), most)


def _without_trailing_zeros(position_ids: Tensor) -> Tensor:
    """(b, s) bool: False where several zeros end a row: padding (TRL's pad_to_multiple_of). One zero is a sample."""
    trailing = (position_ids == 0).flip(1).cumprod(1).flip(1).bool()
    return ~(trailing & (trailing.sum(1, keepdim=True) > 1))


class EncoderDecoder:
    """Which layers of a model see which positions: the batch's, the decoder's, or all.

    * An encoder–decoder model has two sides. A layer of the decoder that receives the encoder's output has its
      positions.
    * An audio model's mask counts samples of sound; the model's own method turns it into a mask of frames.
    * All positions count where there is no mask: in images, in sound whose encoder gets none (Whisper), and in images
      or sound beside a text (LLaVA).
    """

    def __init__(self, model: nn.Module) -> None:
        base = base_of(model)
        kind = getattr(getattr(base, "config", None), "model_type", None)
        self.turned = kind in ("xlnet", "fsmt")  # inside, positions come before samples
        self.two = bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
        self.encoder = base.get_encoder() if self.two else None
        decoder = base.get_decoder() if self.two and is_pretrained_model(base) else None
        self.decoder = None if decoder is base else decoder
        names = {module: f"{name}." for name, module in base.named_modules()}
        self._prefix = names.get(self.encoder, "")
        seen = ("image", "video") if self.two else ("image", "video", "audio")  # else sound is what the mask is of
        self._accepts = set(inspect.signature(base.forward).parameters)
        text = {self.encoder, input_embedding(base)}  # some classes return their text encoder for any modality
        towers = [one for one in _towers(base, seen) if names.get(one, ".") != "." and text.isdisjoint(one.modules())]
        between = tuple(f"{end}." for end in _BETWEEN if end != "qformer" or "qformer_input_ids" not in self._accepts)
        towers += [module for module, name in names.items() if towers and name.endswith(between)]
        self.towers, self._tower_prefixes = towers, tuple(names[tower] for tower in towers)
        self._audio = next((one for one in names if hasattr(one, "_get_feature_vector_attention_mask")), None)
        self._base = base

    def in_decoder(self, name: str, x: Tensor, encoded: Tensor | None) -> bool:
        """Whether this layer's input x has the decoder's positions: cross-attention reads the encoder's output."""
        return self.two and not name.startswith(self._prefix) and not same_tensor(x, encoded)

    def in_tower(self, name: str) -> bool:
        """Whether the layer lies in a part of a text model that sees images or sound, and so no text's mask."""
        return name.startswith(self._tower_prefixes)

    def with_decoder(self, inputs: dict[str, Any], labels: Tensor | None) -> dict[str, Any]:
        """The inputs and those of the decoder, made from token labels (−100 is padding) where the batch has none.

        A model without a method that makes them gets the labels: its forward makes them.

        Raises:
            ValueError: its forward takes no labels either.
        """
        real = self._real(labels)
        if real is None:
            return inputs
        if "decoder_input_ids" not in inputs and "decoder_inputs_embeds" not in inputs:
            make: Any = getattr(self._base, "prepare_decoder_input_ids_from_labels", None)
            if make is not None:
                inputs = inputs | {"decoder_input_ids": make(labels)}
            elif "labels" in self._accepts:
                inputs = inputs | {"labels": labels}
            else:
                raise ValueError(
                    f"{type(self._base).__name__} makes no inputs of its decoder from labels: give decoder_input_ids "
                    "in each batch, or take the model class that is trained on labels (…ForConditionalGeneration)"
                )
        mask = {"decoder_attention_mask": real.long()}
        return mask | inputs if "decoder_attention_mask" in self._accepts else inputs

    def positions(self, inputs: Mapping[str, Any], main: TokenMask) -> TokenMask:
        """The batch's positions, also at the lengths of an audio model's frames."""
        sound = "input_values" in inputs or "input_features" in inputs
        if self._audio is None or main.keep is None or not sound:
            return main
        frames, length = {}, torch.tensor([main.keep.shape[1]], device=main.keep.device)
        audio: Any = self._audio
        method = audio._get_feature_vector_attention_mask
        adapted = "add_adapter" in inspect.signature(method).parameters  # layers before and after those that shorten
        each: list[dict[str, Any]] = [{"add_adapter": False}, {"add_adapter": None}] if adapted else [{}]
        for options in each:
            f = int(audio._get_feat_extract_output_lengths(length, **options))
            frames[f] = method(f, main.keep.long(), **options).bool()
        return replace(main, frames=frames)

    def decoder_positions(self, inputs: Mapping[str, Any], labels: Tensor | None, main: TokenMask) -> TokenMask:
        """The decoder's positions; the encoder's where the model makes the decoder's inputs from them."""
        if "decoder_attention_mask" in inputs:
            return TokenMask(main.rows, inputs["decoder_attention_mask"].bool())
        real = self._real(labels)
        if real is not None:
            return TokenMask(main.rows, real)
        made = "decoder_input_ids" not in inputs and "decoder_inputs_embeds" not in inputs
        return main if made else TokenMask(main.rows)

    def _real(self, labels: Tensor | None) -> Tensor | None:
        """(b, s) bool: the positions with a token label, or with any of several (MusicGen); None: no token labels."""
        if not self.two or labels is None or labels.dim() not in (2, 3) or labels.is_floating_point():
            return None
        return (labels != -100).view(*labels.shape[:2], -1).any(2)


def _towers(base: Any, modalities: tuple[str, ...]) -> Iterator[nn.Module]:
    for modality in modalities if is_pretrained_model(base) else ():
        try:
            yield base.get_encoder(modality=modality)
        except (TypeError, ValueError, AttributeError):  # the model's own method knows no modalities
            continue


def tensors_in(output: Any) -> list[Tensor]:
    """The tensors that a module returns: its output, or those in a tuple or ModelOutput."""
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else (output,)
    return [one for one in values if isinstance(one, Tensor)]


def same_tensor(x: Tensor, other: Tensor | None) -> bool:
    """Whether x is the other tensor or a view of all of it (ZeRO-3 hands views to layers)."""
    return other is not None and (x.data_ptr(), x.shape, x.stride()) == (other.data_ptr(), other.shape, other.stride())
