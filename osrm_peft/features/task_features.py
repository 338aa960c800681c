"""TaskFeatures: what one task shows the others, and its safetensors file."""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from osrm_peft.checks import integer, kind, task_name
from osrm_peft.features.file import SUFFIX, FileMoments, MomentsOnDemand, features_file, part_shapes, parts_of
from osrm_peft.features.moments import FeatureMoments
from osrm_peft.hub.push import push_to_hub
from osrm_peft.io.places import new_file
from osrm_peft.io.tensors import features_header, write_tensors
from osrm_peft.io.yaml import check_fields

_IN_FILES = {"num_samples": "k", "of_finetuned_model": "adapted"}  # fields that have other names there
_FORMAT = 4  # 2 has `adapted`; 3 the tokenizer, and second moments as triangles; 4 a hash of the embedding apart


@dataclass
class TaskFeatures:
    """What one task shows the others: {layer name: FeatureMoments}, and what they were made from.

    Layers that receive the very same tensor (query, key and value of one block) share one FeatureMoments object.

    Attributes:
        task: the task's name.
        base_model: name or path of the pre-trained model.
        weight_hash: `fingerprint.weight_hash` of that model over these layers.
        vocabulary, embedding_hash: how many rows its input embedding has, and `fingerprint.embedding_hash` of these; a
            model with more, new ones behind them is the same. None where it has none, and in files of earlier formats.
        statistic: `"mean"`, `"sample"` or `"token"`, see FeatureMoments.
        num_samples: how many samples were seen.
        seed: the seed that drew the samples, for the record.
        tokens: which tokens of a prompt with its completion were seen, `"all"`, `"prompt"` or `"completion"`.
        reference: padding was counted in, as the released OSRM code does.
        of_finetuned_model: the inputs of the fine-tuned model (`collect_gram`), not of the pre-trained one.
        adapter_sha256: of the weight file of the adapter that the fine-tuned model had, where it is known.
        tokenizer, tokenizer_hash: name of the tokenizer that made the samples, and `tokenizer_hash` of it, if known.
        layers: the moments, in model order; those of a file are read when they are used.
    """

    task: str
    base_model: str
    weight_hash: str
    statistic: str
    num_samples: int = 0
    seed: int | None = None
    reference: bool = False
    of_finetuned_model: bool = False
    adapter_sha256: str | None = None
    tokenizer: str | None = None
    tokenizer_hash: str | None = None
    vocabulary: int | None = None
    embedding_hash: str | None = None
    tokens: str = "all"
    layers: Mapping[str, FeatureMoments] = field(default_factory=dict)

    def same_input(self) -> dict[str, str]:
        """{layer: the first layer that receives the same tensor}, without reading a file's tensors."""
        if isinstance(self.layers, FileMoments):
            return self.layers.same_input
        leaders: dict[int, str] = {}
        return {name: leaders.setdefault(id(moments), name) for name, moments in self.layers.items()}

    def widths(self) -> dict[str, int]:
        """{layer: n, its input width}, without reading a file's tensors."""
        if isinstance(self.layers, FileMoments):
            return {name: self.layers.widths[leader] for name, leader in self.layers.same_input.items()}
        return {name: moments.width for name, moments in self.layers.items()}

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write one safetensors file, a layer at a time.

        Per distinct input: the mean and, as collected, the sample means, or the lower triangle of the second moment.

        Args:
            dtype: float32, or bfloat16 for half the size: 8 bits a number, so directions with less than about a
                thousandth of the strongest one's energy are lost in rounding.

        Raises:
            ValueError: another dtype.
        """
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype={dtype} of a features file must be torch.float32 or torch.bfloat16")
        same_input, counts = self.same_input(), {}
        shapes: dict[str, tuple[int, ...]] = {}
        leaders = list(dict.fromkeys(same_input.values()))
        for name in leaders:
            moments = self.layers[name]
            counts[name] = moments.count
            shapes |= {f"{name}.{part}": shape for part, shape in part_shapes(moments).items()}
        header = {_IN_FILES.get(key, key): value for key, value in vars(self).items() if key != "layers"}
        if self.tokens == "all":
            del header["tokens"]  # as in files of earlier versions, which these can read
        header |= {"format": _FORMAT, "counts": counts, "same_input": same_input}
        tensors = (
            (f"{name}.{part}", tensor) for name in leaders for part, tensor in parts_of(self.layers[name]).items()
        )
        with new_file(path) as partial:
            write_tensors(partial, shapes, dtype, tensors, {"format": "pt", "osrm_peft": json.dumps(header)})

    def push_to_hub(self, repo_id: str, **arguments: Any) -> str:
        """Push the file and a card, see `push.push_to_hub`; a repository may hold the files of several tasks."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{task_name(self.task)}{SUFFIX}"
            self.save(path)
            return push_to_hub(path, repo_id, **arguments)

    @classmethod
    def load(cls, source: str | Path) -> "TaskFeatures":
        """Read a file written by `save`, here or on the Hub; its tensors are read when they are used.

        Args:
            source: a file; or on the Hub `owner/name`, `owner/name@revision`, and where that repository holds
                several features files, `owner/name[@revision]:FILE`.

        Raises:
            FileNotFoundError: neither a file nor a Hub repository with one.
            ValueError: not a features file, or of a newer format.
        """
        path = features_file(source)
        try:
            header = features_header(path)
            if integer("format", header["format"], 1) > _FORMAT:
                raise ValueError(f"format {header['format']}, this osrm_peft reads up to {_FORMAT}: upgrade it")
            counts, same_input = header.pop("counts"), header.pop("same_input")
            del header["format"]
            if "layers" in header or not isinstance(counts, dict) or not isinstance(same_input, dict):
                raise ValueError("counts and same_input in its header must be mappings")
            for name, leader in same_input.items():
                kind(f"same_input of {name!r}", leader, str)
            integer("k", header["k"], 0)
            if set(_IN_FILES) & set(header):
                raise ValueError(f"its header has {sorted(set(_IN_FILES) & set(header))[0]!r}")
            header |= {name: header.pop(key) for name, key in _IN_FILES.items() if key in header}
            check_fields("its header", header, cls)
            if header.get("vocabulary") is not None:
                integer("vocabulary", header["vocabulary"], 1)
            return cls(**header, layers=MomentsOnDemand(path, header["statistic"], counts, same_input))
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{source} is not a features file, or damaged ({type(error).__name__}: {error}): "
                "write it with `osrm-peft features`"
            ) from error

    def rows(self) -> list[int]:
        """Numbers of rows of the input embedding whose hash is known."""
        return [] if self.vocabulary is None else [self.vocabulary]


def tokenizer_hash(tokenizer: Any) -> str | None:
    """16 hexadecimal digits over the vocabulary and special tokens; None for what is no tokenizer."""
    if not hasattr(tokenizer, "get_vocab"):
        return None
    content = [sorted(tokenizer.get_vocab().items()), sorted(map(str, tokenizer.all_special_tokens))]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
