"""LoRA adapters as data: {layer: Factors(A, B, s)} and heads, read from and written to what PEFT reads and writes."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from osrm_peft.packaged import resolve_model

CONFIG, WEIGHTS, HEADS = "adapter_config.json", "adapter_model.safetensors", "heads"
_PREFIX = "base_model.model."
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
TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_KEPT = ("base_model_name_or_path", "revision", "task_type", "fan_in_fan_out", *TARGETS)  # in the config that we write
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Factors:
    """LoRA on one linear layer: the task vector is τ = s·B·A of shape (o, n).

    Attributes:
        A: (r, n). B: (o, r). Both float32 or float64.
        s: the scale: alpha/r, or alpha/√r for rsLoRA, after rank_pattern and alpha_pattern.
    """

    A: Tensor
    B: Tensor
    s: float = 1.0

    @property
    def rank(self) -> int:
        """r, the number of rows of A."""
        return len(self.A)

    def delta(self) -> Tensor:
        """(o, n) the task vector τ."""
        return self.s * self.B @ self.A


@dataclass
class LoraAdapter:
    """A plain LoRA adapter on linear layers.

    Attributes:
        factors: {layer name in the base model: Factors}, float32.
        heads: {parameter name in the base model: tensor}: `modules_to_save`, such as a trained classifier.
        config: the fields of `adapter_config.json`.
        dtype: of the factors in the file; results are written in it.
        source: the folder, Hub id or model that it came from.
        sha256: of the weight file, None for a live model.
    """

    factors: dict[str, Factors]
    heads: dict[str, Tensor]
    config: dict[str, Any]
    dtype: torch.dtype = torch.float32
    source: str = ""
    sha256: str | None = None

    @property
    def base_model(self) -> str | None:
        """Name or path of the base model, as the adapter's config has it."""
        return self.config.get("base_model_name_or_path")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors` into `folder`: rank r everywhere, alpha = r.

        Layers of lower rank are padded with zero directions, so any loader and server that takes rank r takes it.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(self.peft_config().to_dict(), indent=2, sort_keys=True, default=list))
        save_file(self.state_dict(), folder / WEIGHTS, {"format": "pt"})

    def peft_config(self) -> LoraConfig:
        """The LoraConfig under which stock PEFT reproduces these factors."""
        rank = self.rank
        fields: dict[str, Any] = {name: self.config.get(name) for name in _KEPT}
        fields["fan_in_fan_out"] = bool(fields["fan_in_fan_out"])
        if not self.heads:  # PEFT would add (and re-initialise) a classifier of its own for these task types
            fields["task_type"] = None if fields["task_type"] in ("SEQ_CLS", "TOKEN_CLS") else fields["task_type"]
        saved = [module for module in self.config.get("modules_to_save") or [] if any(map(_below(module), self.heads))]
        return LoraConfig(r=rank, lora_alpha=rank, modules_to_save=saved or None, inference_mode=True, **fields)

    @property
    def rank(self) -> int:
        """The largest rank of any layer, at least 1."""
        return max([1, *(factors.rank for factors in self.factors.values())])

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors as PEFT names them, in the adapter's dtype; s is folded into B (alpha = r)."""
        tensors, rank = {}, self.rank
        for name, factors in self.factors.items():
            pad = rank - factors.rank
            A = torch.nn.functional.pad(factors.A, (0, 0, 0, pad))
            B = torch.nn.functional.pad(factors.s * factors.B, (0, pad))
            tensors[f"{_PREFIX}{name}.lora_A.weight"] = A.to(self.dtype).contiguous()
            tensors[f"{_PREFIX}{name}.lora_B.weight"] = B.to(self.dtype).contiguous()
        return tensors | {f"{_PREFIX}{name}": tensor.contiguous() for name, tensor in self.heads.items()}

    def attach(self, base: PreTrainedModel | str) -> PeftModel:
        """A PeftModel of `base` with this adapter and its head, in eval mode.

        Args:
            base: the base model (its layers get wrapped, as PEFT does), or its name: then it is loaded with a head
                of the right width (sequence classification or causal language models).

        Raises:
            ValueError: `base` lacks a layer, or its head has another shape.
        """
        model = self._load_base(base) if isinstance(base, str) else base
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        for name, tensor in self.heads.items():
            if shapes.get(name) != tuple(tensor.shape):
                raise ValueError(
                    f"the head {name!r} has shape {tuple(tensor.shape)}, the model's is {shapes.get(name)}: "
                    f"load the base model with num_labels={len(tensor)}"
                )
        peft_model = get_peft_model(model, self.peft_config())
        result: Any = set_peft_model_state_dict(peft_model, self.state_dict())
        lost = [key for key in result.missing_keys if "lora_" in key] + list(result.unexpected_keys)
        if lost:
            raise ValueError(f"{type(model).__name__} and the adapter do not fit: {', '.join(sorted(lost)[:6])}")
        return peft_model.eval()

    def _load_base(self, name: str) -> PreTrainedModel:
        if self.heads:
            num_labels = len(self.heads[max(self.heads)])  # the last layer: classifier, classifier.out_proj, score
            return AutoModelForSequenceClassification.from_pretrained(
                resolve_model(name),
                num_labels=num_labels,
                ignore_mismatched_sizes=True,  # ours replaces the head
            )
        if self.config.get("task_type") == "CAUSAL_LM":
            return AutoModelForCausalLM.from_pretrained(resolve_model(name))
        raise ValueError(
            f"cannot tell which model class {name!r} needs: pass the loaded base model instead of its name"
        )


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


def save_head(heads: Mapping[str, Tensor], config: Mapping[str, Any], path: Path) -> None:
    """Write one task's head, with what PEFT must know to load it."""
    notes = {key: config.get(key) for key in ("modules_to_save", "task_type")}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in heads.items()}, path, {"osrm_peft": json.dumps(notes)})


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
        name = key.removeprefix(_PREFIX)
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if match and tensor.dim() == 2:
            halves.setdefault(match[1], {})[match[2]] = tensor
        elif any(_below(module)(name) for module in saved):
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


def _below(module: str) -> Callable[[str], bool]:
    """Whether a parameter name lies in a module that PEFT knows as `module`."""
    return re.compile(rf"(.+\.)?{re.escape(module)}\..+").fullmatch  # type: ignore[return-value]


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
