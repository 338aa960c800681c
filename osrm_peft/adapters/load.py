"""load_adapter: reads a PEFT adapter and checks that it is plain LoRA; refuses everything else by name."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from osrm_peft.adapters.config import BAKE, BAKE_BY_PEFT, CONFIG, TARGETS, checked_config, scale_of
from osrm_peft.adapters.experts import Bare, bare_parameters, expert, targets_of
from osrm_peft.adapters.factors import Factors, FactorsOnDemand, TensorsOnDemand
from osrm_peft.adapters.foreign import check_folder, describe_file, foreign_config
from osrm_peft.adapters.keys import (
    PREFIX,
    Part,
    is_doubtful,
    is_embedding,
    is_head,
    part_of,
    saved_modules,
)
from osrm_peft.adapters.layouts import model_of
from osrm_peft.adapters.lora_adapter import HEADS, WEIGHTS, LoraAdapter, load_head
from osrm_peft.hub.sources import local_folder, pinned
from osrm_peft.io.manifest import MANIFEST, label_names_in, read_manifest
from osrm_peft.io.tensors import DTYPES, Header, all_finite, tensor_headers, tensor_reader
from osrm_peft.libraries import is_peft_model
from osrm_peft.models.layers import all_lora_layers, base_of, check_unmerged, unwrapped

if TYPE_CHECKING:
    from peft import PeftModel


def load_adapter(
    source: str | Path | nn.Module,
    *,
    task: str | None = None,
    adapter_name: str | None = None,
    require_single_task: bool = False,
) -> LoraAdapter:
    """Read an adapter that PEFT or we wrote: a folder, a Hub id (`user/name`, `user/name@revision`) or a live model.

    Args:
        task: a merged folder's task, whose head (and modules) the adapter gets.
        require_single_task: refuse a merged folder whose heads would be left behind.
        adapter_name: the adapter of a live PeftModel; None: its only or active adapter.

    Raises:
        FileNotFoundError: neither a folder nor a Hub repository that can be reached, or no PEFT adapter (says what).
        TypeError: a live model that is no PeftModel.
        ValueError: not plain LoRA (names what it is, and the way out), NaN or Inf in a layer, or no such head; a live
            model with several active adapters, or with adapted embeddings and an adapter merged into its weights.
    """
    if isinstance(source, nn.Module):
        model = unwrapped(source)
        if not is_peft_model(model):
            raise TypeError(
                f"a {type(model).__name__} is no PeftModel: give the model that get_peft_model returns, or the folder "
                "that the adapter was saved to (save_pretrained of PEFT, or of transformers after add_adapter)"
            )
        return _of_model(model, adapter_name)
    if Path(source).is_file():
        raise FileNotFoundError(f"{source} is no adapter's folder: {describe_file(Path(source))}")
    folder = local_folder(str(source), [CONFIG, WEIGHTS, f"{HEADS}/*.safetensors", "*.json"])
    check_folder(folder, str(source))
    head = _head_file(folder, str(source), task, require_single_task)
    config = config_in(folder)
    foreign = foreign_config(config, folder)
    if foreign is not None:
        raise ValueError(f"{source} cannot be read: {foreign}")
    try:
        weights = folder / WEIGHTS
        adapter = _parse(config, tensor_headers(weights), tensor_reader(weights), str(source), _sha256(weights))
        if head is not None:
            adapter = load_head(adapter, head, adapter.factors)
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, KeyError) as error:
        raise ValueError(f"{source} is damaged: {type(error).__name__}: {error}") from error
    adapter.source, adapter.folder = pinned(str(source), folder), folder
    manifest = read_manifest(folder)
    osrm = manifest.get("osrm")
    adapter.weight_hash = _weight_hash(osrm, str(folder / MANIFEST))
    adapter.label_names = label_names_in(manifest, task)
    adapter.initialized = bool(osrm["initialized"]) if isinstance(osrm, Mapping) and "initialized" in osrm else None
    return adapter


def _head_file(folder: Path, source: str, task: str | None, require_single_task: bool) -> Path | None:
    """The file of the task's head in a merged folder; None where no task is named.

    Raises:
        ValueError: no such head; or no task is named, and `require_single_task` wants one.
    """
    names = _heads_in(folder)
    if task is None:
        files = [folder / HEADS / f"{name}.safetensors" for name in names]
        if require_single_task and any(map(_holds_tensors, files)):
            raise ValueError(
                f"{source} is a merge of several tasks: say whose head to take along with "
                f"load_adapter({source!r}, task=…), one of {', '.join(names)}"
            )
        return None
    file = folder / HEADS / f"{task}.safetensors"
    if not isinstance(task, str) or task != Path(task).name or not file.is_file():
        raise ValueError(f"{source} has no head {task!r}, only {', '.join(names) or 'none'}")
    return file


def config_in(folder: Path) -> Any:
    """The content of `adapter_config.json`."""
    try:
        return json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{folder / CONFIG} is damaged: {type(error).__name__}: {error}; it must be JSON in UTF-8 (without a BOM)"
        ) from error


def _of_model(model: "PeftModel", adapter_name: str | None) -> LoraAdapter:
    from peft import get_peft_model_state_dict

    if adapter_name is None:
        if len(model.active_adapters) > 1:
            raise ValueError(
                f"the model has several active adapters, {', '.join(model.active_adapters)}: say which with "
                "load_adapter(model, adapter_name=…)"
            )
        adapter_name = next(iter(model.peft_config)) if len(model.peft_config) == 1 else model.active_adapter
    if adapter_name not in model.peft_config:
        raise ValueError(f"the model has no adapter {adapter_name!r}, only {', '.join(model.peft_config)}")
    tensors = {
        key: value.detach().to("cpu", copy=True)  # a copy: the model may be trained on
        for key, value in get_peft_model_state_dict(model, adapter_name=adapter_name).items()
    }
    config, base = model.peft_config[adapter_name], base_of(model)
    fields = config.to_dict()
    if fields.get("task_type") is None:  # as PEFT writes it: the class of the model
        fields["auto_mapping"] = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    headers: dict[str, Header] = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    adapter = _parse(fields, headers, tensors.__getitem__, f"live {type(model).__name__}", model=model)
    if adapter.copies:  # they would hold the merged weights
        check_unmerged(all_lora_layers(model))
    adapter.factors = dict(adapter.factors)
    provenance = getattr(config, "provenance", None)  # of an OSRMLoraConfig
    adapter.weight_hash = _weight_hash({"provenance": provenance}, adapter.source)
    adapter.initialized = None if provenance is None else bool(provenance)
    return adapter


def _heads_in(folder: Path) -> list[str]:
    return sorted(file.stem for file in (folder / HEADS).glob("*.safetensors"))


def _holds_tensors(path: Path) -> bool:
    try:
        return bool(tensor_headers(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _parse(
    config: Any,
    headers: Mapping[str, Header],
    read: Callable[[str], Tensor],
    source: str,
    sha256: str | None = None,
    model: "PeftModel | None" = None,
) -> LoraAdapter:
    config = checked_config(config, source)
    own = any(map(is_doubtful, headers)) and _has_own_wrappers(config, model)
    halves, saved, copies, duplicates = _sorted_out(config, headers, source, own)
    for name, key in duplicates.items():
        if not torch.equal(read(key), read(saved[name])):  # nested modules_to_save, which PEFT cannot load either
            raise ValueError(
                f"{source} has two values of {name!r}, {saved[name]!r} and {key!r}: train it with modules_to_save of "
                "which none is inside of another"
            )
    _check_factors(halves, headers, read, source)
    layers = _Layers(config, halves, headers, read, source, model)
    for name, key in {**saved, **copies}.items():
        if headers[key][1] not in DTYPES.values() and headers[key][1] not in DTYPES:  # whole numbers: of buffers
            raise ValueError(f"{source} has {headers[key][1]} entries in {name!r}: floating-point ones can be merged")
        if not all_finite(read(key)):
            what = "its head" if name in saved and is_head(name, config, halves) else "its module"
            raise ValueError(f"{source} has NaN or Inf in {what} {name!r}: the training run diverged; train it again")
    if config.get("ensure_weight_tying"):  # PEFT then adapts or saves a layer besides those that its config names
        config |= dict.fromkeys(TARGETS) | targets_of(layers.shapes, layers.parameters)

    def on_demand(keys: dict[str, str]) -> TensorsOnDemand:
        return TensorsOnDemand({name: headers[key][0] for name, key in keys.items()}, lambda name: read(keys[name]))

    kernels = {name: headers[half["A"]][0][1:] for name, half in halves.items()}
    layouts = {name: kernel for name, kernel in kernels.items() if len(kernel) > 1}
    layouts |= {name: () for name, half in halves.items() if "lora_embedding_" in half["A"]}
    dtype: Any = headers[next(iter(halves.values()))["A"]][1]
    heads = {name: read(key) for name, key in saved.items() if is_head(name, config, halves)}
    modules = on_demand({name: key for name, key in saved.items() if name not in heads})
    factors = FactorsOnDemand(layers.shapes, layers.factors)
    return LoraAdapter(
        factors, heads, config, dtype, source, sha256, layouts, layers.parameters, modules=modules,
        copies=on_demand(copies),
    )  # fmt: skip


def _check_factors(
    halves: Mapping[str, Mapping[str, str]], headers: Mapping[str, Header], read: Callable[[str], Tensor], source: str
) -> None:
    """Raise ValueError for factors that hold no numbers."""
    for name, half in halves.items():
        rank = headers[half["A"]][0][0]
        for key in half.values():
            if isinstance(headers[key][1], str) or rank == 0:
                raise ValueError(
                    f"{source} has {headers[key][1]} factors of rank {rank} in layer {name!r}: "
                    "adapters hold float16, bfloat16 or float32 factors of rank 1 or more"
                )
            if not all_finite(read(key)):
                raise ValueError(
                    f"{source} has NaN or Inf in layer {name!r}: the training run diverged; train it again"
                )


class _Layers:
    """The layers of a file: each pair of factors is one, but that of a stack of experts, which is one for each expert.

    Attributes:
        shapes: {layer: (o, r, n)}.
        parameters: see `LoraAdapter`.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        halves: Mapping[str, Mapping[str, str]],
        headers: Mapping[str, Header],
        read: Callable[[str], Tensor],
        source: str,
        model: "PeftModel | None",
    ) -> None:
        self._halves, self._read = halves, read
        sizes = {name: (headers[half["B"]][0], headers[half["A"]][0]) for name, half in halves.items()}
        pairs = {name: (B[0], A[0], math.prod(A[1:])) for name, (B, A) in sizes.items()}
        bare = bare_parameters(config, pairs, source, None if model is None else base_of(model))
        self.shapes: dict[str, tuple[int, int, int]] = {}
        self.parameters = {one.name: one.experts for pair, one in sorted(bare.items(), key=lambda item: -len(item[0]))}
        self._places: dict[str, tuple[str, int, int]] = {}  # {layer: (pair, expert, experts)}
        self._scales: dict[str, float] = {}
        for pair, (o, rows, n) in pairs.items():
            one = bare.get(pair, Bare(pair, 0, rows))
            self._scales[pair] = scale_of(config, one.name, one.rank, source)
            for number, layer in enumerate(one.layers):
                self.shapes[layer], self._places[layer] = (o, one.rank, n), (pair, number, one.experts)
        self._pair = lru_cache(maxsize=1)(self._pair_of)  # the experts of a stack are read one after another

    def factors(self, layer: str) -> Factors:
        pair, number, experts = self._places[layer]
        if not experts:
            return Factors(*self._pair_of(pair), self._scales[pair])
        A, B = (one.clone() for one in expert(*self._pair(pair), number, experts))
        return Factors(A, B, self._scales[pair])

    def _pair_of(self, pair: str) -> tuple[Tensor, Tensor]:
        A, B = (self._read(self._halves[pair][half]).float().flatten(1) for half in "AB")
        return A, B


def _has_own_wrappers(config: Mapping[str, Any], model: "PeftModel | None") -> bool:
    """Whether the base model has modules of its own with a wrapper's name (LeViT's `module`).

    Without a task type PEFT writes the model's class. If transformers cannot build it and it is none of torch's
    wrappers, the class is the user's, and such names are its own. If no class is known they are a wrapper's.
    """
    base = base_of(model) if model is not None else model_of(config, config.get("base_model_name_or_path"))
    if base is not None:
        return not is_peft_model(base) and any(is_doubtful(PREFIX + name) for name, _ in base.named_parameters())
    auto = config.get("auto_mapping") or {}
    library = str(auto.get("parent_library")).partition(".")[0]
    return bool(auto.get("base_model_class")) and library not in ("torch", "deepspeed", "peft", "transformers")


def _sorted_out(
    config: Mapping[str, Any], headers: Mapping[str, Header], source: str, own: bool
) -> tuple[dict[str, dict[str, str]], dict[str, str], dict[str, str], dict[str, str]]:
    """{layer: {"A" or "B": key}}, and {parameter: key} of trained parameters, frozen ones, and trained duplicates."""
    modules, tied = saved_modules(config), bool(config.get("ensure_weight_tying"))
    parts = {key: part_of(key, modules, tied, own) for key in headers}
    halves: dict[str, dict[str, str]] = {}
    for key, part in parts.items():
        if part.kind == "lora" and len(headers[key][0]) >= 2:
            _put(halves.setdefault(part.name, {}), part.half, key, source, f"layer {part.name!r}")
    names = {part.adapter or "default" for part in parts.values() if part.kind == "lora"}
    if len(names) > 1:
        raise ValueError(f"{source} holds several adapters ({', '.join(sorted(names))}): save each into its own folder")
    saved: dict[str, str] = {}
    copies: dict[str, str] = {}
    for key, part in parts.items():
        if part.kind == "saved":
            _put(saved, part.name, key, source, f"{part.name!r}")
        elif part.kind == "base" or (part.kind == "bias" and _frozen(part, config, halves)):
            _put(copies, part.name, key, source, f"{part.name!r}")
    # PEFT writes a saved module three times where it saves embeddings, too; very old versions only in this place
    duplicates = {part.name: key for key, part in parts.items() if part.kind == "duplicate" and part.name in saved}
    saved |= {part.name: key for key, part in parts.items() if part.kind == "duplicate" and part.name not in saved}
    biases = {name for name in copies if name.endswith(".bias")}
    trains_biases = config.get("bias") in ("all", "lora_only")
    if trains_biases and any(part.kind == "bias" or part.name in biases for part in parts.values()):
        raise ValueError(f"{source} trained biases (bias={config['bias']!r}): {BAKE}")
    known = set(copies) | set(saved)
    unknown = [
        f"{part.name} {headers[key][0]}"
        for key, part in parts.items()
        if part.kind == "unknown"
        or (part.kind == "lora" and part.name not in halves)
        or (part.kind == "bias" and part.name not in copies)
    ]
    strange = [name for name in copies if name.rpartition(".")[0] not in halves and not is_embedding(name)]
    broken = [name for name, half in halves.items() if len(half) < 2 or not _fits(*(headers[half[h]][0] for h in "BA"))]
    if unknown or broken or strange:
        raise ValueError(
            f"{source} is not plain LoRA; not understood: {', '.join(sorted(unknown + broken + strange)[:6])}"
            f": merge plain LoRA adapters, or {BAKE_BY_PEFT}"
        )
    if not halves:
        held = f" (it holds {', '.join(sorted(known)[:3])})" if known else ""
        raise ValueError(f"{source} holds no lora_A and lora_B: it is empty{held}")
    return halves, saved, copies, duplicates


def _put(place: dict[str, str], name: str, key: str, source: str, what: str) -> None:
    if name in place:
        raise ValueError(f"{source} has {what} twice, as {place[name]!r} and as {key!r}: save the adapter again")
    place[name] = key


def _frozen(part: Part, config: Mapping[str, Any], halves: Mapping[str, Any]) -> bool:
    """Whether a bias is a copy of the base model's, not a trained bias."""
    return config.get("bias") in (None, "none") and part.name.rpartition(".")[0] in halves


def _fits(B: tuple[int, ...], A: tuple[int, ...]) -> bool:
    """Whether B (o, r) or (o, r, 1, …) and A (r, n) or (r, channels, …) have a product."""
    return B[1] == A[0] and math.prod(B[2:]) == 1 and len(B) == len(A)


def _weight_hash(osrm: Any, source: str) -> str | None:
    """The base weights' hash in a manifest's `osrm` entry; None without a hash."""
    provenance = osrm.get("provenance") if isinstance(osrm, Mapping) else None
    weight_hash = provenance.get("weight_hash") if isinstance(provenance, Mapping) else None
    if weight_hash is not None and not isinstance(weight_hash, str):
        raise ValueError(f"{source} is damaged: weight_hash={weight_hash!r} must be text")
    return weight_hash


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
