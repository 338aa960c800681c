"""load_adapter: what PEFT wrote, checked to be plain LoRA; everything else refused by name."""

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from torch import Tensor

from osrm_peft.adapters import (
    CONFIG,
    HEADS,
    PREFIX,
    TARGETS,
    WEIGHTS,
    Factors,
    FactorsOnDemand,
    LoraAdapter,
    below,
    load_head,
)
from osrm_peft.checks import number
from osrm_peft.hub import local_folder, pinned
from osrm_peft.tensor_files import Header, tensor_headers, tensor_reader

logger = logging.getLogger(__name__)

_BAKE = "bake it into full weights with PEFT's merge_and_unload and merge the checkpoints"

# LoraConfig fields under which an adapter is not just s·B·A: {field: what to do}
_NOT_PLAIN = {
    "use_dora": f"DoRA rescales whole weight columns: {_BAKE}",
    "lora_bias": f"lora_B has a bias: {_BAKE}",
    "target_parameters": f"LoRA on bare parameters: {_BAKE}",
    "trainable_token_indices": f"trained token embeddings: {_BAKE}",
    "layer_replication": "layers are replicated: merge adapters trained without layer_replication",
    "alora_invocation_tokens": "activated LoRA acts on some tokens only: it has no single task vector",
    "use_qalora": f"QALoRA pools its inputs: {_BAKE}",
    "use_bdlora": f"block-diagonal LoRA: {_BAKE}",
    "arrow_config": "Arrow routes between adapters: merge the single adapters",
    "kasa_config": f"KaSA changed the base weights: {_BAKE}",
    "monteclora_config": f"MonteCLoRA draws its weights: {_BAKE}",
}
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def load_adapter(
    source: str | Path | PeftModel, *, head: str | None = None, adapter_name: str | None = None, whole: bool = False
) -> LoraAdapter:
    """Read an adapter that PEFT or we wrote: a folder, a Hub id (`user/name`, `user/name@revision`) or a live model.

    Args:
        head: for a merged folder: the task whose head to take along.
        whole: refuse a merged folder whose heads would be left behind.
        adapter_name: for a live PeftModel: which of its adapters; None: the only one, or the active one.

    Raises:
        FileNotFoundError: neither a folder nor a Hub repository that can be reached.
        ValueError: not plain LoRA (names what it is, and the way out), NaN or Inf in a layer, or no such head.
    """
    if isinstance(source, PeftModel):
        if adapter_name is None:
            adapter_name = next(iter(source.peft_config)) if len(source.peft_config) == 1 else source.active_adapter
        if adapter_name not in source.peft_config:
            raise ValueError(f"the model has no adapter {adapter_name!r}, only {', '.join(source.peft_config)}")
        tensors = {
            key: value.detach().to("cpu", copy=True)  # a copy: the model may be trained on
            for key, value in get_peft_model_state_dict(source, adapter_name=adapter_name).items()
        }
        config, name = source.peft_config[adapter_name].to_dict(), f"live {type(source).__name__}"
        headers: dict[str, Header] = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
        adapter = _parse(config, headers, tensors.__getitem__, name)
        adapter.factors = dict(adapter.factors)
        return adapter
    folder = local_folder(str(source), [CONFIG, WEIGHTS, f"{HEADS}/*.safetensors", "*.json"])
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{source} holds no {CONFIG}: it is not a PEFT adapter")
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(
            f"{source} holds no {WEIGHTS} (pickled .bin files are never read): save the adapter again with PEFT"
        )
    path = folder / HEADS / f"{head}.safetensors"
    if whole and head is None and _heads_in(folder):
        raise ValueError(
            f"{source} is a merge of several tasks: say whose head to take along with "
            f"load_adapter({str(source)!r}, head=…), one of {', '.join(_heads_in(folder))}"
        )
    if head is not None and (not isinstance(head, str) or head != Path(head).name or not path.is_file()):
        raise ValueError(f"{source} has no head {head!r}, only {', '.join(_heads_in(folder)) or 'none'}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        weights = folder / WEIGHTS
        adapter = _parse(config, tensor_headers(weights), tensor_reader(weights), str(source), _sha256(weights))
        adapter.source = pinned(str(source), folder)
        if head is not None:
            adapter.heads, notes = load_head(path)
            adapter.config |= notes
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, KeyError) as error:
        raise ValueError(f"{source} is damaged: {type(error).__name__}: {error}") from error
    return adapter


def _heads_in(folder: Path) -> list[str]:
    return sorted(file.stem for file in (folder / HEADS).glob("*.safetensors"))


def _parse(
    config: dict[str, Any],
    headers: Mapping[str, Header],
    read: Callable[[str], Tensor],
    source: str,
    sha256: str | None = None,
) -> LoraAdapter:
    _check_plain(config, source)
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    halves: dict[str, dict[str, str]] = {}  # {layer: {"A" or "B": its name in the file}}
    heads, unknown, copies = {}, [], []
    saved = config.get("modules_to_save") or []
    for key, (shape, _) in headers.items():
        name = key.removeprefix(PREFIX).replace("_orig_mod.", "")  # torch.compile's wrapping
        match = re.fullmatch(r"(.+)\.lora_(?:([AB])\.weight|embedding_([AB]))", name)
        if match and len(shape) >= 2:
            halves.setdefault(match[1], {})[match[2] or match[3]] = key
        elif any(below(module)(name) for module in saved):
            heads[name] = read(key)
        elif name.endswith(".base_layer.weight"):
            copies.append(name)
        else:
            unknown.append(f"{name} {shape}")
    shapes = {name: (headers[half["B"]][0], headers[half["A"]][0]) for name, half in halves.items() if len(half) == 2}
    broken = sorted(name for name in halves if name not in shapes or not _fits(*shapes[name]))
    unknown += [name for name in copies if name.removesuffix(".base_layer.weight") not in halves]
    if unknown or broken:
        raise ValueError(
            f"{source} is not plain LoRA; not understood: {', '.join(sorted(unknown + broken)[:6])}"
            f": merge plain LoRA adapters, or {_BAKE}"
        )
    if not halves:
        raise ValueError(f"{source} holds no lora_A and lora_B: it is empty")
    if copies:  # PEFT saves the frozen weights of adapted embeddings along
        logger.info("%s: the copies of base weights (%s) are left out, the base model has them", source, copies[0])
    bad_heads = [name for name, tensor in heads.items() if not tensor.isfinite().all()]
    if bad_heads:
        raise ValueError(f"{source} has NaN or Inf in its head {bad_heads[0]!r}: the training run diverged")
    scales = {}
    for name, half in halves.items():
        rank = shapes[name][1][0]
        for key in half.values():
            if isinstance(headers[key][1], str) or rank == 0:
                raise ValueError(
                    f"{source} has {headers[key][1]} factors of rank {rank} in layer {name!r}: "
                    "adapters hold float16, bfloat16 or float32 factors of rank 1 or more"
                )
            if not read(key).isfinite().all():
                raise ValueError(
                    f"{source} has NaN or Inf in layer {name!r}: the training run diverged; train it again"
                )
        scales[name] = _scale_of(config, name, rank)

    if config.get("ensure_weight_tying"):  # PEFT then adapts a layer besides those that its config names
        config |= dict.fromkeys(TARGETS) | {"target_modules": sorted(halves)}

    def factors_of(name: str) -> Factors:
        A, B = (read(halves[name][half]).float().flatten(1) for half in "AB")
        return Factors(A, B, scales[name])

    sizes = {name: (B[0], A[0], math.prod(A[1:])) for name, (B, A) in shapes.items()}
    layouts = {name: A[1:] for name, (_, A) in shapes.items() if len(A) > 2}
    layouts |= {name: () for name, half in halves.items() if "lora_embedding_" in half["A"]}
    dtype: Any = headers[next(iter(halves.values()))["A"]][1]
    return LoraAdapter(FactorsOnDemand(sizes, factors_of), heads, config, dtype, source, sha256, layouts)


def _fits(B: tuple[int, ...], A: tuple[int, ...]) -> bool:
    """Whether B (o, r) or (o, r, 1, …) and A (r, n) or (r, channels, …) have a product."""
    return B[1] == A[0] and math.prod(B[2:]) == 1 and len(B) == len(A)


def _check_plain(config: Mapping[str, Any], source: str) -> None:
    if not isinstance(config, Mapping):
        raise ValueError(f"{source} is damaged: its {CONFIG} is not a JSON object")
    if str(getattr(config.get("peft_type"), "value", config.get("peft_type"))) != "LORA":
        raise ValueError(f"{source} is a {config.get('peft_type')} adapter: only LoRA adapters can be merged")
    for option, remedy in _NOT_PLAIN.items():
        if config.get(option):
            raise ValueError(f"{source} has {option}={config[option]!r}; {remedy}")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{source} trained biases (bias={config['bias']!r}): {_BAKE}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_BASE_CHANGING_INITS):
        raise ValueError(
            f"{source} has init_lora_weights={init!r}, which changed the base model's weights: save it as a plain "
            "adapter with PEFT's save_pretrained(…, path_initial_model_for_weight_conversion=…)"
        )


def _scale_of(config: Mapping[str, Any], name: str, rank: int) -> float:
    pattern = config.get("alpha_pattern") or {}
    alpha = number("lora_alpha", pattern.get(get_pattern_key(list(pattern), name), config["lora_alpha"]))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
