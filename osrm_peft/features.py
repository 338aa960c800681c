"""TaskFeatures: what one task shows the others, its safetensors file, and whether it fits a model."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from osrm_peft.checks import integer
from osrm_peft.files import new_file
from osrm_peft.layers import base_name, base_of, linear_layer, weight_hash
from osrm_peft.moments import FeatureMoments

_FORMAT = 2  # 2 has `adapted`


@dataclass
class TaskFeatures:
    """What one task shows the others: {layer name: FeatureMoments}, and what they were made from.

    Layers that receive the very same tensor (query, key and value of one block) share one FeatureMoments object.

    Attributes:
        task: the task's name.
        base_model: name or path of the pre-trained model.
        weight_hash: `layers.weight_hash` of that model over these layers.
        statistic: `"mean"`, `"sample"` or `"token"`, see FeatureMoments.
        k: how many samples were seen.
        seed: the seed that drew the samples, for the record.
        reference: padding was counted in, as the released OSRM code does.
        adapted: the inputs of the fine-tuned model (`collect_gram`), not of the pre-trained one.
        adapter_sha256: of the weight file of the adapter that the fine-tuned model had, where it is known.
        layers: the moments, in model order.
    """

    task: str
    base_model: str
    weight_hash: str
    statistic: str
    k: int = 0
    seed: int | None = None
    reference: bool = False
    adapted: bool = False
    adapter_sha256: str | None = None
    layers: dict[str, FeatureMoments] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: per distinct input its mean and, as collected, second moment or sample means."""
        tensors: dict[str, Tensor] = {}
        leaders: dict[int, str] = {}
        same_input: dict[str, str] = {}
        for name, moments in self.layers.items():
            leader = leaders.setdefault(id(moments), name)
            same_input[name] = leader
            if leader == name:
                tensors[f"{name}.mean"] = moments.mean().float()
                if moments.second is not None:
                    tensors[f"{name}.second_moment"] = moments.second / moments.count
                if moments.rows is not None:
                    tensors[f"{name}.samples"] = moments.rows
        header = {key: value for key, value in vars(self).items() if key != "layers"} | {
            "format": _FORMAT,
            "counts": {name: self.layers[name].count for name in leaders.values()},
            "same_input": same_input,
        }
        with new_file(path) as partial:
            save_file({key: value.contiguous() for key, value in tensors.items()}, partial, _metadata(header))

    @classmethod
    def load(cls, path: str | Path) -> "TaskFeatures":
        """Read a file written by `save`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a features file, or of a newer format.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no features file {path}: write it with `osrm-peft features`")
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("osrm_peft", "null"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
            if header["format"] > _FORMAT:
                raise ValueError(f"format {header['format']}, this osrm_peft reads up to {_FORMAT}: upgrade it")
            counts, same_input = header.pop("counts"), header.pop("same_input")
            del header["format"]
            moments = {
                leader: _moments(tensors, leader, header["statistic"], count) for leader, count in counts.items()
            }
            return cls(**header, layers={name: moments[leader] for name, leader in same_input.items()})
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is not a features file, or damaged ({type(error).__name__}: {error}): "
                "write it with `osrm-peft features`"
            ) from error

    def check_fits(self, model: nn.Module, layers: Iterable[str]) -> None:
        """Check that these features are of `model` and hold all of `layers`, at the right widths.

        Raises:
            ValueError: names the task, all layers that are missing or differ in width, or both base models.
        """
        layers = list(layers)
        base = base_of(model)
        if self.adapted:
            raise ValueError(
                f"the features of task {self.task!r} are of its fine-tuned model (collect_gram, for RegMean): "
                "collect them on the pre-trained model with collect_features"
            )
        missing = sorted(set(layers) - set(self.layers))
        if missing:
            raise ValueError(
                f"the features of task {self.task!r} (of {self.base_model}) lack {len(missing)} of the {len(layers)} "
                f"adapted layers: {', '.join(missing[:4])}{' …' if len(missing) > 4 else ''}; "
                "collect them again with the adapter's target_modules"
            )
        widths = {name: linear_layer(name, base.get_submodule(name)).in_features for name in layers}
        wrong = [name for name in layers if self.layers[name].width != widths[name]]
        if wrong:
            raise ValueError(
                f"the features of task {self.task!r} (of {self.base_model}) have width {self.layers[wrong[0]].width} "
                f"at {wrong[0]!r}, the model has {widths[wrong[0]]}: they are of another base model"
            )
        try:
            actual = weight_hash(model, self.layers)
        except AttributeError as error:  # a layer of the file that this model lacks
            raise ValueError(
                f"the features of task {self.task!r} are of {self.base_model}, another architecture: {error}"
            ) from error
        if actual != self.weight_hash:
            raise ValueError(
                f"the features of task {self.task!r} were collected on {self.base_model} (weights {self.weight_hash}), "
                f"but this model is {base_name(base)} (weights {actual}): collect them on the same pre-trained model"
            )


def _metadata(header: dict[str, Any]) -> dict[str, str]:
    return {"format": "pt", "osrm_peft": json.dumps(header)}


def _moments(tensors: Mapping[str, Tensor], layer: str, statistic: str, count: int) -> FeatureMoments:
    """One layer's moments from its tensors in the file, their shapes and signs checked."""
    integer(f"count of {layer!r}", count, 1)
    mean, second = tensors[f"{layer}.mean"], tensors.get(f"{layer}.second_moment")
    rows, n = tensors.get(f"{layer}.samples"), len(mean)
    kept = {"mean": None, "token": second, "sample": second if rows is None else rows}[statistic]
    shapes = {"mean": (n,), "second_moment": (n, n), "samples": (count, n)}
    for name, shape in shapes.items():
        tensor = tensors.get(f"{layer}.{name}")
        if tensor is not None and (tuple(tensor.shape) != shape or not tensor.isfinite().all()):
            raise ValueError(f"{layer}.{name} must be {shape} finite numbers, got shape {tuple(tensor.shape)}")
    if (statistic != "mean" and kept is None) or (second is not None and bool((second.diagonal() < 0).any())):
        raise ValueError(f"{layer} has no second moment of the statistic {statistic!r}")
    return FeatureMoments(statistic, n, count, mean * count, None if second is None else second * count, rows)
