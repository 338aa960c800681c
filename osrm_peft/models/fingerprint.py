"""Hashes of a base model's weights, by which two base models can be compared."""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from osrm_peft.distributed import gathered_weight
from osrm_peft.models.layers import base_of, linear_layer

HASHED_ENTRIES = 1024
_LAYERS_ONLY = "v2"  # begins a hash of layers alone; earlier hashes cover all rows of the input embedding, too


def weight_hash(model: nn.Module, names: Iterable[str]) -> str:
    """A hash of the named layers' pre-trained weights, which differs between base models.

    It covers each layer's name, shape and 1,024 evenly spaced entries rounded to bfloat16. So it is the same in float32
    and bfloat16, any training changes it, and it is quick on the largest models. The input embedding, which new tokens
    make longer, has a hash of its own: `embedding_hash`.

    Args:
        names: layers of the base model. Where an engine has split the model, all processes must give the same layers.

    Returns:
        "v2" and 14 hexadecimal digits. (16 digits are a hash of an earlier version, see `hash_of`: do not compare.)
    """
    names = list(names)
    return hash_of(sampled_weights(model, names), names)


def sampled_weights(model: nn.Module, names: Iterable[str], rows: Iterable[int] = ()) -> dict[str | int, bytes]:
    """The bytes to hash: {layer: its sample, V: a sample of the input embedding's first V rows, "": of all its rows}.

    Args:
        rows: the V to sample; a V larger than the embedding is left out.
    """
    base = base_of(model)
    found: dict[str | int, bytes] = {}
    for name in names:
        with gathered_weight(linear_layer(name, base.get_submodule(name))) as weight:
            found[name] = _sample(name, weight)
    embedding = input_embedding(base)
    if embedding is not None:
        with gathered_weight(embedding) as weight:
            found[""] = _sample("input_embeddings", weight)
            known = {len(weight), *(V for V in rows if len(weight) >= V)}
            found |= {V: _sample("input_embeddings", weight[:V]) for V in known}
    return found


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The module with the input embedding; None for a model without one (HuBERT, ConvNeXt, …)."""
    try:
        embedding = base_of(model).get_input_embeddings()
    except (AttributeError, NotImplementedError):  # not a transformers model, or a model of sound or images
        return None
    return embedding if isinstance(getattr(embedding, "weight", None), Tensor) else None


def _sample(name: str, weight: Tensor) -> bytes:
    entries = weight.detach().flatten()
    index = torch.linspace(0, entries.numel() - 1, HASHED_ENTRIES, dtype=torch.float64).long().unique()
    sampled = entries[index.to(entries.device)].to("cpu", torch.bfloat16).view(torch.int16)
    return f"{name}{tuple(weight.shape)}".encode() + sampled.numpy().tobytes()


def hash_of(sampled: Mapping[str | int, bytes], names: Iterable[str], like: str = _LAYERS_ONLY) -> str:
    """The `weight_hash` over some of the `sampled_weights`, in the version of the hash `like` (a file's)."""
    if like.startswith(_LAYERS_ONLY):
        return _LAYERS_ONLY + _digest(sampled[name] for name in sorted(names))[:14]
    every = sorted({*names, *({""} & set(sampled))}, key=lambda name: name or "input_embeddings")
    return _digest(sampled[name] for name in every)[:16]


def counts_all_rows(weight_hash: str) -> bool:
    """Whether the hash is of the earlier version, which a resized vocabulary changes."""
    return not weight_hash.startswith(_LAYERS_ONLY)


def embedding_hash(sampled: Mapping[str | int, bytes], rows: int) -> str | None:
    """16 hexadecimal digits over the first rows of the input embedding; None where `sampled` has fewer rows."""
    return _digest([sampled[rows]])[:16] if rows in sampled else None


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
