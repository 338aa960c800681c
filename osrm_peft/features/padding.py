"""Which positions of a batch are real, and to which sample each belongs: padding masks, packed rows, decoders."""

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from osrm_peft.models.fingerprint import input_embedding
from osrm_peft.models.layers import base_of

# of modules between a tower and the text, by the ends of their names; InstructBLIP's qformer reads a text, too
_BETWEEN = ("projector", "connector", "aligner", "qformer", "language_projection", "vision_projection",
            "image_to_text_projection", "perceiver_resampler", "embed_vision")  # fmt: skip
# of DETR, SigLIP 2 and Idefics 3, Mllama, VisualBERT, LUKE, Qwen2-Audio, Gemma 3n, …
_OTHER_MASKS = ("pixel_mask", "pixel_attention_mask", "aspect_ratio_mask", "visual_attention_mask",
                "entity_attention_mask", "feature_attention_mask", "input_features_mask")  # fmt: skip


@dataclass(frozen=True)
class TokenMask:
    """The positions of one batch's sequences.

    Attributes:
        rows: b.
        keep: (b, s) bool, False at padding and beyond the samples that are wanted; None: all are real.
        samples: (b, s) which sample a position belongs to; None: each row is one.
        frames: {f: (b, f) bool}, the same at other lengths: of audio models, whose mask is of samples of sound.
        padded: a mask of images or sound that tells of padding: it is of pixels, and no layer's.
    """

    rows: int
    keep: Tensor | None = None
    samples: Tensor | None = None
    frames: Mapping[int, Tensor] = field(default_factory=dict)
    padded: str | None = None

    def of(self, name: str, x: Tensor, whole_samples: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(x, keep, samples) for one layer's input: (b, s, n) with (b, s) masks, or (b, n), one vector a sample.

        Inputs of other shapes are brought to these: images (b, h, w, n), heads, all tokens in one row.
        A mask without any padding says nothing of a layer with fewer positions (frames, an expert's tokens): all real.

        Args:
            whole_samples: samples must be told apart, not just positions.

        Raises:
            ValueError: the layer's input has another shape than the batch, so padding or samples cannot be told apart.
        """
        if self.keep is None:
            return self._all_of(name, x, whole_samples), None, None
        for mask in (*self.frames.values(), self.keep):
            found = _in_rows(x, mask)
            if found is not None and len(mask) == self.rows:
                x, each = found  # a device_map puts layers on several devices
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
        """x, all of whose positions are real."""
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
    """x as (b, s·m, n), and m, how many vectors it has at each of the mask's (b, s) positions; None if it fits not."""
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
        found = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
        raise ValueError(f"the attention_mask has {found}: give the (samples, positions) padding mask")
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

    * An encoder–decoder model has two sides; the encoder's output in a pass tells which layers of the decoder read it.
    * The mask of an audio model is of samples of sound: the model's own method makes it one of its frames.
    * Images have no mask, nor has sound whose model hands its encoder none (Whisper), nor what is beside a text
      (LLaVA): all positions count.
    """

    def __init__(self, model: nn.Module) -> None:
        base = base_of(model)
        kind = getattr(getattr(base, "config", None), "model_type", None)
        self.turned = kind in ("xlnet", "fsmt")  # inside, positions come before samples
        self.two = bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
        self.encoder = base.get_encoder() if self.two else None
        decoder = base.get_decoder() if self.two and isinstance(base, PreTrainedModel) else None
        self.decoder = None if decoder is base else decoder
        names = {module: f"{name}." for name, module in base.named_modules()}
        self._prefix = names.get(self.encoder, "")
        seen = ("image", "video") if self.two else ("image", "video", "audio")  # else sound is what the mask is of
        self._accepts = set(inspect.signature(base.forward).parameters)
        text = {self.encoder, input_embedding(base)}  # some classes name their encoder of text whatever they are asked
        found = [one for one in _towers(base, seen) if names.get(one, ".") != "." and text.isdisjoint(one.modules())]
        between = tuple(f"{end}." for end in _BETWEEN if end != "qformer" or "qformer_input_ids" not in self._accepts)
        found += [one for one, name in names.items() if found and name.endswith(between)]
        self.towers, self._towers = found, tuple(names[one] for one in found)
        self._audio = next((one for one in names if hasattr(one, "_get_feature_vector_attention_mask")), None)
        self._base = base

    def in_decoder(self, name: str, x: Tensor, encoded: Tensor | None) -> bool:
        """Whether this layer's input x has the decoder's positions: cross-attention reads the encoder's output."""
        return self.two and not name.startswith(self._prefix) and not same_tensor(x, encoded)

    def in_tower(self, name: str) -> bool:
        """Whether the layer lies in the part of a model of text that sees images or sound, and not the text's mask."""
        return name.startswith(self._towers)

    def with_decoder(self, inputs: dict[str, Any], labels: Tensor | None) -> dict[str, Any]:
        """The inputs with those of the decoder, from token labels (−100 is padding) where the batch has none.

        Where the model has no method that makes these, it is given the labels: its forward makes them from these.

        Raises:
            ValueError: nor does its forward.
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
        """The batch's positions, and where they are in an audio model's frames."""
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
        """The decoder's positions; where the model makes its inputs from the encoder's, these are the same."""
        if "decoder_attention_mask" in inputs:
            return TokenMask(main.rows, inputs["decoder_attention_mask"].bool())
        real = self._real(labels)
        if real is not None:
            return TokenMask(main.rows, real)
        made = "decoder_input_ids" not in inputs and "decoder_inputs_embeds" not in inputs
        return main if made else TokenMask(main.rows)

    def _real(self, labels: Tensor | None) -> Tensor | None:
        """(b, s) bool: the positions that labels of tokens have, also of several at each (MusicGen); None: others."""
        if not self.two or labels is None or labels.dim() not in (2, 3) or labels.is_floating_point():
            return None
        return (labels != -100).view(*labels.shape[:2], -1).any(2)


def _towers(base: Any, modalities: tuple[str, ...]) -> Iterator[nn.Module]:
    for modality in modalities if isinstance(base, PreTrainedModel) else ():
        try:
            yield base.get_encoder(modality=modality)
        except (TypeError, ValueError, AttributeError):  # the model's own method knows no modalities
            continue


def tensors_in(output: Any) -> list[Tensor]:
    """The tensors of what a module returns: one, or those of a tuple or ModelOutput."""
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else (output,)
    return [one for one in values if isinstance(one, Tensor)]


def same_tensor(x: Tensor, other: Tensor | None) -> bool:
    """Whether x is the other tensor, or a view of all of it (as ZeRO-3 hands to each layer)."""
    return other is not None and (x.data_ptr(), x.shape, x.stride()) == (other.data_ptr(), other.shape, other.stride())
