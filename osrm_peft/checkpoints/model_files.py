"""ModelFiles: a folder that `save_pretrained` wrote, its tensors read from disk some rows at a time."""

import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from osrm_peft.checkpoints.config_checks import (
    FOUR_BIT,
    check_config,
    check_not_packed,
    check_not_quantised,
    four_bit_reader,
    is_four_bit,
    refusal,
    shown,
)
from osrm_peft.hub.sources import local_folder, pinned
from osrm_peft.io.json import read_object
from osrm_peft.io.manifest import MANIFEST, read_manifest
from osrm_peft.io.tensors import DTYPES, read_at
from osrm_peft.models.packaged import MODEL, packaged_model

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# files of a model besides weights and configuration
TOKENIZERS = ("*tokenizer*", "special_tokens_map.json", "added_tokens.json", "*vocab*", "merges.txt", "*.model",
              "*.spm", "*.tiktoken", "tekken.json", "bpe.codes", "dict.txt", "emoji.json", "normalizer.json",
              "byte_maps.json", "word_shape.json", "word_pronunciation.json", "chat_template*",
              "additional_chat_templates/*")  # fmt: skip
GENERATION = ("generation_config.json",)
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
BESIDE = ("config.json", *GENERATION, *TOKENIZERS, *PROCESSORS)
_MOST_HEADER = 100 * 2**20  # the format's own bound


class _NotMergedError(Exception):
    """The file is sound, but cannot be merged."""


@dataclass(frozen=True)
class Entry:
    """The place of a tensor: its bytes start at `start` in `path`."""

    path: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        """Its first axis; 1 for a vector or a scalar."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def width(self) -> int:
        """Entries a row: all axes but the first."""
        return self.entries // max(self.rows, 1)

    @property
    def entries(self) -> int:
        """The number of its entries."""
        return math.prod(self.shape)


class ModelFiles:
    """A model's folder.

    Args:
        dequantise: take 4-bit weights of bitsandbytes, too, as what they stand for.

    Attributes:
        source: folder, Hub id or `"packaged"`; a Hub id with the commit that was read.
        folder: the folder on this machine.
        config: its config.json.
        tensors: {name: Entry} of all its tensors.
        paths: the weight files.

    Raises:
        FileNotFoundError: no such folder or Hub repository, no config.json, or a shard is missing.
        ValueError: pickled or quantised weights; a file is damaged; or a field of config.json is of the wrong type.
    """

    def __init__(self, source: str | Path, dequantise: bool = False) -> None:
        self.source = str(source)
        self.folder = local_folder(
            str(packaged_model()) if self.source == MODEL else self.source,
            ["*.safetensors", INDEX, MANIFEST, *BESIDE],
            "model folder",
        )
        self.source = MODEL if self.source == MODEL else pinned(self.source, self.folder)
        if not (self.folder / "config.json").is_file():
            raise FileNotFoundError(f"{source} holds no config.json: {self._instead()}")
        self.config: dict[str, Any] = read_object(self.folder / "config.json")
        packed = dequantise and is_four_bit(self.config)
        if packed:
            four_bit_reader(self.folder / "config.json")
            self.config.pop("quantization_config")
        check_not_quantised(self.folder / "config.json", self.config)
        self.tensors: dict[str, Entry] = {}
        self._packed: dict[Entry, dict[str, Entry]] = {}
        self._last: tuple[Entry, Tensor] | None = None
        self._open: dict[Path, BinaryIO] = {}
        weight_map = self._weight_map()
        for file in dict.fromkeys(weight_map.values()) if weight_map else [WEIGHTS]:
            entries = read_header(self.folder / file)
            expected = {name for name, shard in weight_map.items() if shard == file} if weight_map else set(entries)
            if set(entries) != expected:
                wrong = sorted(expected ^ set(entries))[0]
                raise ValueError(f"{self.folder / file} and {INDEX} disagree about {wrong!r}: download the model again")
            self.tensors |= entries
        self.paths: list[Path] = list(dict.fromkeys(entry.path for entry in self.tensors.values()))
        if packed:
            self._unpack()
        check_config(self.folder / "config.json", self.config, len(self.tensors))
        check_not_packed(self.paths[0] if self.paths else self.folder, self.tensors)

    def _unpack(self) -> None:
        """Put one tensor in the place of the parts of each 4-bit weight; it is made when it is read."""
        marks = [name for name in self.tensors if FOUR_BIT in name]
        for mark in marks:
            weight = mark.partition(FOUR_BIT)[0]
            inside = [name for name in self.tensors if name.startswith(f"{weight}.")]
            parts = {name.removeprefix(f"{weight}."): self.tensors[name] for name in inside}
            try:
                state = json.loads(bytes(self.read(mark).flatten().tolist()))
                codes = self.tensors[weight]
                entry = Entry(codes.path, codes.start, tuple(state["shape"]), getattr(torch, state["dtype"]))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{self.tensors[mark].path} is damaged: {mark!r} ({error})") from error
            self._packed[entry] = {"": codes, **parts}
            self.tensors = {name: one for name, one in self.tensors.items() if name not in inside} | {weight: entry}

    def _dequantised(self, entry: Entry) -> Tensor:
        """(rows, width) of a 4-bit weight, kept until another is asked for."""
        if self._last is None or self._last[0] != entry:
            packed = self._packed[entry].items()
            parts = {name: self._rows(name, one, 0, one.rows).view(one.shape) for name, one in packed}
            codes = parts.pop("")
            whole = four_bit_reader(self.folder / "config.json")(codes, parts)
            self._last = entry, whole.to(entry.dtype).reshape(entry.rows, entry.width)
        return self._last[1]

    def _instead(self) -> str:
        """What to give instead of a folder without config.json, for the error."""
        if (self.folder / "adapter_config.json").is_file():
            return "it is an adapter, which merge_adapters (osrm-peft merge) merges"
        below = sorted(path.parent.name for path in self.folder.glob("*/config.json"))
        if below:
            return f"give one of the models in it, {', '.join(map(shown, below[:6]))}"
        return "give a folder that save_pretrained wrote"

    def _weight_map(self) -> dict[str, str]:
        if (self.folder / WEIGHTS).is_file():
            return {}
        if (self.folder / INDEX).is_file():
            weight_map = read_object(self.folder / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{self.folder / INDEX} is damaged: it has no weight_map")
            for file in sorted(set(map(str, weight_map.values()))):
                if Path(file).name != file or not file.endswith(".safetensors"):
                    raise ValueError(f"{self.folder / INDEX} names {file!r}, which is no shard in its folder")
                if not (self.folder / file).is_file():
                    raise FileNotFoundError(f"{self.folder} lacks its shard {shown(file)}: download the model again")
            return weight_map
        if any(self.folder.glob("*.bin")) or any(self.folder.glob("*.pt*")):
            raise ValueError(
                f"{self.source} holds pickled weights, which can run code when loaded, and are not read: save it anew, "
                "AutoModel.from_pretrained(…).save_pretrained(folder)"
            )
        if any(self.folder.glob("*.gguf")):
            raise ValueError(
                f"{self.source} holds GGUF weights, which are not merged: save them anew, "
                "AutoModelForCausalLM.from_pretrained(folder, gguf_file=…).save_pretrained(folder)"
            )
        raise FileNotFoundError(f"{self.source} holds neither {WEIGHTS} nor {INDEX}: give a save_pretrained folder")

    def identity(self) -> dict[str, list[int]]:
        """{weight file: [size, time of change]}, by which a changed file is noticed."""
        stats = {path.name: path.stat() for path in self.paths}
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start … stop of a tensor, (rows, width) in its own dtype; copied, so nothing stays mapped."""
        entry = self.tensors[name]
        stop = entry.rows if stop is None else min(stop, entry.rows)
        if entry in self._packed:
            return self._dequantised(entry)[start:stop].clone()
        return self._rows(name, entry, start, stop)

    def read_into(self, memory: memoryview, name: str, start: int) -> None:
        """Fill memory with the bytes of a tensor as they are in its file, from row `start` on."""
        entry = self.tensors[name]
        assert entry not in self._packed  # whose bytes are no numbers
        self._bytes(memory, name, entry, start)

    def _rows(self, name: str, entry: Entry, start: int, stop: int) -> Tensor:
        out = torch.empty(stop - start, entry.width, dtype=entry.dtype)
        self._bytes(out.view(-1).view(torch.uint8).numpy().data, name, entry, start)
        return out

    def _bytes(self, memory: memoryview, name: str, entry: Entry, start: int) -> None:
        """Fill memory with the bytes of a tensor from this row on."""
        file = self._open.get(entry.path)
        if file is None:
            opened = entry.path.open("rb", buffering=0)
            file = self._open.setdefault(entry.path, opened)
            if file is not opened:  # another thread was first
                opened.close()
        place = entry.start + start * entry.width * entry.dtype.itemsize
        read_at(file, place, memory, f"{entry.path} ended within {name!r}")

    def close(self) -> None:
        """Close the files."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def verify(self) -> None:
        """Compare each weight file with the checksum in the manifest, if one of our merges wrote it.

        Raises:
            ValueError: a checksum differs.
        """
        known = read_manifest(self.folder).get("crc32", {})
        for path in self.paths:
            if path.name in known and crc32_of(path) != known[path.name]:
                raise ValueError(f"{path} is damaged: its checksum is not that in {MANIFEST}; merge it again")


def crc32_of(path: Path) -> str:
    """Hexadecimal checksum of a file."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


def read_header(path: Path) -> dict[str, Entry]:
    """{name: Entry} of a safetensors file, checked to the last byte.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, or its header is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            first = file.read(8)
            if first == b"version ":
                raise _NotMergedError("a Git LFS pointer, not the weights: run `git lfs pull` in its folder")
            length = int.from_bytes(first, "little")
            if not 0 < length <= min(_MOST_HEADER, size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries, end = {}, 0
        for name, fields in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = fields["data_offsets"]
            if fields["dtype"] not in DTYPES:
                other = f"{name!r} has the dtype {fields['dtype']}, which cannot be merged"
                why = refusal(fields["dtype"])
                raise ValueError(other) if why is None else _NotMergedError(f"{other}: {why}")
            entry = Entry(path, 8 + length + start, tuple(fields["shape"]), DTYPES[fields["dtype"]])
            if any(not isinstance(axis, int) or axis < 0 for axis in entry.shape):
                raise ValueError(f"{name!r} has the shape {entry.shape}")
            if start != end or stop - start != entry.entries * entry.dtype.itemsize:
                raise ValueError(f"{name!r} lies at {start} … {stop}, and should at {end}")
            entries[name], end = entry, stop
        if 8 + length + end != size:
            raise ValueError(f"it has {size} bytes, its header tells of {8 + length + end}")
    except _NotMergedError as error:
        raise ValueError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or cut short ({error}): download it again") from error
    return entries
