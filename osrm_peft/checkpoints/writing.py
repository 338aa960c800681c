"""Writing a merged checkpoint: weight files, complete or absent, and the files beside them."""

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from osrm_peft.checkpoints.model_files import INDEX
from osrm_peft.checkpoints.plan import CheckpointPlan
from osrm_peft.checkpoints.settings import files_of, vocabulary_size, with_rows
from osrm_peft.checkpoints.text import KINDS, Text
from osrm_peft.checkpoints.work import Maker, Work
from osrm_peft.io.json import write_json
from osrm_peft.io.places import FULL, new_file
from osrm_peft.io.tensors import file_head


def write_shard(work: Work, maker: Maker, paths: list[Path], names: list[str], bar: tqdm) -> list[str]:
    """Write one weight file in each folder, complete or absent; returns their checksums."""
    text = file_head({name: work.shapes[name] for name in names}, work.dtypes, {"format": "pt"})
    sums = [zlib.crc32(text)] * len(paths)
    with ExitStack() as stack:
        files = [stack.enter_context(stack.enter_context(new_file(path)).open("wb")) for path in paths]
        for file in files:
            file.write(text)
        for blocks in maker.blocks(names):
            for place, (file, block) in enumerate(zip(files, blocks, strict=False)):
                data = block.contiguous().view(-1).view(torch.uint8).numpy().data
                sums[place] = zlib.crc32(data, sums[place])
                file.write(data)
            bar.update(blocks[0].nbytes)
    return [f"{one:08x}" for one in sums]


def write_rest(work: Work, folder: Path, text: Text, beside: Mapping[str, Path], config: Mapping[str, Any]) -> None:
    """Write configuration, tokenizer and index beside the weights.

    Args:
        beside: {input: its folder}, for the files that `text` takes from them.
        config: the content of config.json, without the dtype of the weights.
    """
    for kind, patterns in KINDS.items():
        if kind in text.sources:
            source = beside[text.sources[kind]]
            for path in files_of(source, patterns):
                place = folder / path.relative_to(source)
                place.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, place)
    kinds = {dtype for dtype in work.dtypes.values() if dtype.is_floating_point}
    config = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}
    if len(kinds) == 1:
        config["dtype"] = str(next(iter(kinds))).removeprefix("torch.")
    write_json(folder / "config.json", config)
    if len(work.shards) > 1:
        weight_map = {name: file for file, names in work.shards for name in names}
        total = work.size_of(list(work.shapes))
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_heads(plan: CheckpointPlan, folder: Path) -> None:
    """Write the tensors that each model keeps, with its configuration."""
    folder.mkdir(exist_ok=True)
    for name, one in plan.models.items():
        kept = [tensor for tensor, owners in plan.heads.items() if name in owners]
        tensors = {tensor: one.read(tensor).view(one.tensors[tensor].shape) for tensor in kept}
        config, path = with_rows(one.config, vocabulary_size(plan.config)), folder / f"{name}.safetensors"
        try:
            with new_file(path) as partial:
                save_file(tensors, partial, {"format": "pt", "config": json.dumps(config)})
        except OSError as error:
            if error.errno not in FULL:
                raise
            reason = f"{path} could not be written ({os.strerror(error.errno)})"
            raise OSError(error.errno, f"{reason}: make room, and go on with resume (--resume)") from error
