"""load_adapter: what PEFT wrote, checked to be plain LoRA on linear layers; everything else refused by name."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftModel, get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from osrm_peft.adapters import CONFIG, HEADS, PREFIX, WEIGHTS, Factors, LoraAdapter, below

_BAKE = "bake it into full weights with PEFT's merge_and_unload and merge the checkpoints"

# LoraConfig fields under which an adapter is not just s·B·A on linear layers: {field: what to do}
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
    source: str | Path | PeftModel, *, head: str | None = None, adapter_name: str = "default"
) -> LoraAdapter:
    """Read an adapter that PEFT or we wrote: a folder, a Hub id (`user/name`, `user/name@revision`) or a live model.

    Args:
        head: for a merged folder: the task whose head to take along.
        adapter_name: for a live PeftModel: which of its adapters.

    Raises:
        FileNotFoundError: neither a folder nor a Hub repository that can be reached.
        ValueError: not plain LoRA on linear layers (names what it is, and the way out), NaN or Inf in a layer, or no
            such head.
    """
    if isinstance(source, PeftModel):
        tensors = {
            key: value.detach().cpu()
            for key, value in get_peft_model_state_dict(source, adapter_name=adapter_name).items()
        }
        return _parse(source.peft_config[adapter_name].to_dict(), tensors, f"live {type(source).__name__}", None)
    folder = _folder_of(str(source))
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{source} holds no {CONFIG}: it is not a PEFT adapter")
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(
            f"{source} holds no {WEIGHTS} (pickled .bin files are never read): save the adapter again with PEFT"
        )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        adapter = _parse(config, load_file(folder / WEIGHTS), str(source), _sha256(folder / WEIGHTS))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{source} is damaged: {error}") from error
    if head is not None:
        path = folder / HEADS / f"{head}.safetensors"
        if head != Path(head).name or not path.is_file():
            known = sorted(file.stem for file in (folder / HEADS).glob("*.safetensors"))
            raise ValueError(f"{source} has no head {head!r}, only {', '.join(known) or 'none'}")
        with safe_open(path, framework="pt") as file:
            adapter.heads = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            adapter.config |= json.loads(file.metadata()["osrm_peft"])
    return adapter


def _folder_of(source: str) -> Path:
    if Path(source).is_dir():
        return Path(source)
    repo, _, revision = source.partition("@")
    try:
        patterns = [CONFIG, WEIGHTS, f"{HEADS}/*.safetensors", "*.json"]
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"{source!r} is neither a folder nor a Hub repository that can be reached ({reason})"
        ) from error


def _parse(config: dict[str, Any], tensors: Mapping[str, Tensor], source: str, sha256: str | None) -> LoraAdapter:
    _check_plain(config, source)
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    halves: dict[str, dict[str, Tensor]] = {}
    heads, unknown = {}, []
    saved = config.get("modules_to_save") or []
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if match and tensor.dim() == 2:
            halves.setdefault(match[1], {})[match[2]] = tensor
        elif any(below(module)(name) for module in saved):
            heads[name] = tensor
        else:
            unknown.append(f"{name} {tuple(tensor.shape)}")
    broken = sorted(name for name, half in halves.items() if len(half) != 2 or len(half["A"]) != half["B"].shape[1])
    if unknown or broken:
        raise ValueError(
            f"{source} is not plain LoRA on linear layers; not understood: {', '.join(sorted(unknown + broken)[:6])}"
            f": merge adapters of linear layers, or {_BAKE}"
        )
    if not halves:
        raise ValueError(f"{source} holds no lora_A and lora_B: it is empty")
    factors = {}
    for name, half in halves.items():
        if not (half["A"].isfinite().all() and half["B"].isfinite().all()):
            raise ValueError(f"{source} has NaN or Inf in layer {name!r}: the training run diverged; train it again")
        factors[name] = Factors(half["A"].float(), half["B"].float(), _scale_of(config, name, len(half["A"])))
    dtype = next(iter(halves.values()))["A"].dtype
    return LoraAdapter(factors, heads, config, dtype, source, sha256)


def _check_plain(config: Mapping[str, Any], source: str) -> None:
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
    alpha = pattern.get(get_pattern_key(list(pattern), name), config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
