"""Which servers take an adapter's folder as it is, and what to change where one does not."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from osrm_peft.adapters.config import CONFIG, check_fields, defaults, scale_of
from osrm_peft.adapters.keys import Part, part_of, saved_modules
from osrm_peft.adapters.load import config_in
from osrm_peft.adapters.lora_adapter import WEIGHTS
from osrm_peft.checks import integer
from osrm_peft.hub.sources import local_folder
from osrm_peft.io.manifest import read_manifest
from osrm_peft.io.tensors import Header, tensor_headers
from osrm_peft.merging.lowrank import SERVING

VLLM_DEFAULT_RANK = 16
_BAKE = "osrm-peft bake writes full weights, which every server takes"
_ALIKE = "osrm-peft merge TASK=FOLDER --method average --rank serving writes it with one rank, at scale 1"


@dataclass(frozen=True)
class Served:
    """Whether one server takes an adapter.

    Attributes:
        server: its name, and how it takes adapters.
        takes: as the folder is.
        notes: what to change where it does not, each with the remedy; else what to set.
    """

    server: str
    takes: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Files:
    """What an adapter's files say, whatever kind of LoRA it is.

    Attributes:
        source: for messages.
        config: `adapter_config.json`, with PEFT's defaults.
        headers: {tensor: shape and dtype}.
    """

    source: str
    config: Mapping[str, Any]
    headers: Mapping[str, Header]

    @classmethod
    def of(cls, source: str | Path) -> "Files":
        """Read an adapter's folder or Hub id.

        Raises:
            FileNotFoundError: no adapter there.
            ValueError: damaged, or no LoRA adapter.
        """
        folder = local_folder(str(source), [CONFIG, WEIGHTS, "*.json"])
        if read_manifest(folder).get("kind") == "emr":
            raise ValueError(
                f"{source} is an EMR merge, which needs a mask for each task: EMRAdapter.adapter(task, rank=16) in "
                "Python makes an ordinary adapter of it"
            )
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{source} has no {name}: servers take adapters in PEFT's files")
        config = config_in(folder)
        if not isinstance(config, Mapping) or config.get("peft_type") != "LORA":
            kind = config.get("peft_type") if isinstance(config, Mapping) else None
            raise ValueError(f"{source} is no LoRA adapter (peft_type={kind!r}): --serve is of LoRA adapters")
        check_fields(config, str(source))
        fields = defaults() | dict(config)
        integer(f"r in the {CONFIG} of {source}", fields["r"], 1)
        return cls(str(source), fields, tensor_headers(folder / WEIGHTS))

    @cached_property
    def parts(self) -> list[Part]:
        """What each tensor is."""
        saved = saved_modules(self.config)
        return [part_of(key, saved, bool(self.config.get("ensure_weight_tying"))) for key in self.headers]

    @cached_property
    def ranks(self) -> dict[str, int]:
        """{layer: rank}."""
        shapes = zip(self.parts, self.headers.values(), strict=True)
        return {part.name: header[0][0] for part, header in shapes if part.kind == "lora" and part.half == "A"}

    @cached_property
    def scales(self) -> dict[str, float]:
        """{layer: s of s·B·A}."""
        return {name: scale_of(self.config, name, rank, self.source) for name, rank in self.ranks.items()}

    @cached_property
    def beside(self) -> list[str]:
        """Names of the tensors that are no pair of LoRA's of a linear layer."""
        return sorted({part.name for part in self.parts if part.kind != "lora" or part.embedding})


def served(source: str | Path, others: Sequence[str | Path] = ()) -> list[Served]:
    """What vLLM, SGLang, transformers and PEFT's hotswap make of an adapter's folder.

    The rules for vLLM and SGLang are those of their sources in 2026 (`PEFTHelper`, `LoRAManager`); those for
    transformers and PEFT hold for the versions that this package is tested with.

    Args:
        others: adapters that are to be swapped with it, in the place of each other; without them only what no swap
            can do is said.

    Raises:
        FileNotFoundError, ValueError: see `Files.of`.
    """
    files, partners = Files.of(source), [Files.of(other) for other in others]
    found = []
    for server, rules in _SERVERS.items():
        refused = tuple(note for rule in rules for note in rule(files, partners))
        found.append(Served(server, not refused, refused or tuple(_settings(server, files))))
    return found


_Rule = Callable[[Files, Sequence[Files]], Iterator[str]]


def _dora(files: Files, partners: Sequence[Files]) -> Iterator[str]:
    if files.config.get("use_dora"):
        yield f"DoRA is not taken (transformers computes without its magnitudes, and says nothing): {_BAKE}"


def _whole_modules(files: Files, partners: Sequence[Files]) -> Iterator[str]:
    names = sorted({part.name.rpartition(".")[0] for part in files.parts if part.kind in ("saved", "duplicate")})
    names = names or [f"{name} (modules_to_save)" for name in saved_modules(files.config)]
    if names:
        yield f"modules that are saved whole are not taken ({', '.join(names[:3])}): {_BAKE}"


def _only_pairs(files: Files, partners: Sequence[Files]) -> Iterator[str]:
    kinds = {"target_parameters": "LoRA on bare parameters (experts)", "lora_bias": "the bias of lora_B",
             "trainable_token_indices": "trained tokens", "alora_invocation_tokens": "activated LoRA",
             "use_qalora": "QALoRA", "use_bdlora": "block-diagonal LoRA"}  # fmt: skip
    for name, what in kinds.items():
        if files.config.get(name):
            yield f"{what} ({name}) is not taken: {_BAKE}"
    if files.config.get("bias", "none") != "none":
        yield f"trained biases (bias={files.config['bias']!r}) are not taken: {_BAKE}"


def _one_scale(files: Files, partners: Sequence[Files]) -> Iterator[str]:
    return _of_scale(files, bool(files.config.get("use_rslora")))


def _without_rslora(files: Files, partners: Sequence[Files]) -> Iterator[str]:
    """SGLang takes lora_alpha/r, whatever use_rslora says."""
    return _of_scale(files, False)


def _of_scale(files: Files, rslora: bool) -> Iterator[str]:
    r = files.config["r"]
    own = files.config["lora_alpha"] / (math.sqrt(r) if rslora else r)
    odd = [name for name, scale in files.scales.items() if not math.isclose(scale, own, rel_tol=1e-6)]
    if odd:
        yield (
            f"{odd[0]} has the scale {files.scales[odd[0]]:g}, and this server takes {own:g} for all layers "
            f"(alpha_pattern and rank_pattern are not read, by SGLang nor is use_rslora): {_ALIKE}"
        )


def _one_rank(files: Files, partners: Sequence[Files]) -> Iterator[str]:
    ranks = set(files.ranks.values())
    if len(ranks) > 1:
        yield f"layers have ranks from {min(ranks)} to {max(ranks)}, one is taken: {_ALIKE}"


def _legal_rank(files: Files, partners: Sequence[Files]) -> Iterator[str]:
    if max(files.ranks.values(), default=0) > SERVING[-1]:
        yield f"rank {max(files.ranks.values())} is above {SERVING[-1]}: osrm-peft merge … --rank {SERVING[-1]}"


def _linear_pairs(files: Files, partners: Sequence[Files]) -> Iterator[str]:
    if files.beside:
        yield f"{files.beside[0]} is no pair of a linear layer, and nothing else is swapped: {_BAKE}"


def _swapped(files: Files, partners: Sequence[Files]) -> Iterator[str]:
    """What `hotswap_adapter` of PEFT refuses; layers of another scale than lora_alpha/r it gets wrong, silently."""
    for other in partners:
        for name in ("use_rslora", "lora_dropout", "alpha_pattern", "use_dora"):
            if (files.config.get(name) or None) != (other.config.get(name) or None):
                mine, theirs = files.config.get(name), other.config.get(name)
                yield f"{name}={mine!r} here and {theirs!r} in {other.source}: write both by osrm-peft merge"
        more = sorted(other.ranks.keys() - files.ranks.keys())
        if more:
            yield f"{other.source} adapts {more[0]}, too: load the adapter with the most layers first"


def _swapped_in_transformers(files: Files, partners: Sequence[Files]) -> Iterator[str]:
    """`load_adapter(…, hotswap=True)` writes weights alone: scales stay those of the first adapter.

    Modules that are saved whole are written over the base model's own, and stay there after the next swap.
    """
    for other in partners:
        if other.ranks.keys() != files.ranks.keys():
            yield f"{other.source} adapts other layers: no error is raised, and the answers are wrong"
        elif other.ranks != files.ranks:
            yield f"{other.source} has other ranks: write both by osrm-peft merge … --rank serving"
        elif any(not math.isclose(other.scales[name], scale, rel_tol=1e-6) for name, scale in files.scales.items()):
            yield f"{other.source} has other scales, and the first adapter's stay: write both by osrm-peft merge"


def _settings(server: str, files: Files) -> Iterator[str]:
    """What to set where a server takes the adapter."""
    rank = max(files.ranks.values(), default=0)
    if server == "vLLM" and rank > VLLM_DEFAULT_RANK:
        yield f"--max-lora-rank {next(one for one in SERVING if one >= rank)}"
    if server == "SGLang" and rank:
        yield f"adapters loaded later need --max-lora-rank {rank} or more at the start"


_SERVERS: dict[str, tuple[_Rule, ...]] = {
    "vLLM": (_dora, _whole_modules, _only_pairs, _one_scale, _legal_rank),
    "SGLang": (_dora, _whole_modules, _only_pairs, _without_rslora, _one_rank),
    "transformers, load_adapter": (_dora,),
    "transformers, load_adapter(hotswap=True)": (_linear_pairs, _swapped_in_transformers),
    "PEFT, hotswap_adapter": (_linear_pairs, _swapped, _one_scale),
}
