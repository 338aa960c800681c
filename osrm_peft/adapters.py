"""LoRA adapters as data: {layer: Factors(A, B, s)} and heads, read from and written to what PEFT reads and writes."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from osrm_peft.files import new_file
from osrm_peft.packaged import resolve_model

CONFIG, WEIGHTS, HEADS = "adapter_config.json", "adapter_model.safetensors", "heads"
PREFIX = "base_model.model."

TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_KEPT = ("base_model_name_or_path", "revision", "task_type", "fan_in_fan_out", *TARGETS)  # in the config that we write


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
        tensors, config = self.state_dict(), self.peft_config().to_dict()
        with new_file(Path(folder) / WEIGHTS) as path:
            save_file(tensors, path, {"format": "pt"})
        with new_file(Path(folder) / CONFIG) as path:
            path.write_text(json.dumps(config, indent=2, sort_keys=True, default=list))

    def peft_config(self) -> LoraConfig:
        """The LoraConfig under which stock PEFT reproduces these factors."""
        rank = self.rank
        fields: dict[str, Any] = {name: self.config.get(name) for name in _KEPT}
        fields["fan_in_fan_out"] = bool(fields["fan_in_fan_out"])
        if not self.heads:  # PEFT would add (and re-initialise) a classifier of its own for these task types
            fields["task_type"] = None if fields["task_type"] in ("SEQ_CLS", "TOKEN_CLS") else fields["task_type"]
        saved = [module for module in self.config.get("modules_to_save") or [] if any(map(below(module), self.heads))]
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
            tensors[f"{PREFIX}{name}.lora_A.weight"] = A.to(self.dtype).contiguous()
            tensors[f"{PREFIX}{name}.lora_B.weight"] = B.to(self.dtype).contiguous()
            if not tensors[f"{PREFIX}{name}.lora_B.weight"].isfinite().all():
                raise ValueError(f"layer {name!r} overflows {self.dtype}: lower the scale, or set dtype=torch.float32")
        return tensors | {f"{PREFIX}{name}": tensor.clone().contiguous() for name, tensor in self.heads.items()}

    def attach(self, base: PreTrainedModel | str) -> PeftModel:
        """A PeftModel of `base` with this adapter and its head, in eval mode.

        Args:
            base: the base model (its layers get wrapped, as PEFT does), or its name: then it is loaded with a head
                of the right width (sequence classification or causal language models).

        Raises:
            ValueError: `base` lacks a layer, or its head has another shape.
        """
        model = self._load_base(base) if isinstance(base, str) else base
        self._check_fits(model)
        peft_model = get_peft_model(model, self.peft_config())
        result: Any = set_peft_model_state_dict(peft_model, self.state_dict())
        lost = [key for key in result.missing_keys if "lora_" in key] + list(result.unexpected_keys)
        if lost:
            raise ValueError(f"{type(model).__name__} and the adapter do not fit: {', '.join(sorted(lost)[:6])}")
        return peft_model.eval()

    def _check_fits(self, model: PreTrainedModel) -> None:
        """Before anything is wrapped: are the layers there, and have they and the head the right shapes?"""
        if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise TypeError("the base model carries an adapter already: pass the model without it (`.unload()`)")
        modules = dict(model.named_modules())
        missing = sorted(set(self.factors) - set(modules))
        if missing:
            raise ValueError(
                f"{type(model).__name__} lacks {len(missing)} of the {len(self.factors)} adapted layers: "
                f"{', '.join(missing[:4])}; the adapter is of {self.base_model}"
            )
        for name, factors in self.factors.items():
            layer, shape = modules[name], (len(factors.B), factors.A.shape[1])
            if isinstance(layer, nn.Linear) and (layer.out_features, layer.in_features) != shape:
                raise ValueError(
                    f"layer {name!r} is {layer.out_features}×{layer.in_features}, the adapter's is "
                    f"{shape[0]}×{shape[1]}; the adapter is of {self.base_model}"
                )
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        for name, tensor in self.heads.items():
            if shapes.get(name) != tuple(tensor.shape):
                raise ValueError(
                    f"the head {name!r} has shape {tuple(tensor.shape)}, the model's is {shapes.get(name)}: "
                    f"load the base model with num_labels={len(tensor)}"
                )

    def _load_base(self, name: str) -> PreTrainedModel:
        task_type = self.config.get("task_type")
        if self.heads and task_type == "SEQ_CLS":
            num_labels = len(self.heads[max(self.heads)])  # the last layer: classifier, classifier.out_proj, score
            return AutoModelForSequenceClassification.from_pretrained(
                resolve_model(name),
                num_labels=num_labels,
                ignore_mismatched_sizes=True,  # ours replaces the head
            )
        if task_type == "CAUSAL_LM":
            return AutoModelForCausalLM.from_pretrained(resolve_model(name))
        raise ValueError(
            f"cannot tell which model class {name!r} needs for task_type={task_type!r}: "
            "pass the loaded base model instead of its name"
        )


def save_head(heads: Mapping[str, Tensor], config: Mapping[str, Any], path: Path) -> None:
    """Write one task's head, with what PEFT must know to load it."""
    notes = {key: config.get(key) for key in ("modules_to_save", "task_type")}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.clone().contiguous() for key, value in heads.items()}, path, {"osrm_peft": json.dumps(notes)})


def below(module: str) -> Callable[[str], bool]:
    """Whether a parameter name lies in a module that PEFT knows as `module`."""
    return re.compile(rf"(.+\.)?{re.escape(module)}\..+").fullmatch  # type: ignore[return-value]
