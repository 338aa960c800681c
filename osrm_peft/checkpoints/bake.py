"""bake_adapter: an adapter written into its base model's weights, from disk to disk, some rows at a time."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osrm_peft.checkpoints.baking import ADAPTER, BakePlan, plan_bake
from osrm_peft.checkpoints.resumable import carry_out
from osrm_peft.checkpoints.shapes import BASE, OutputDtype
from osrm_peft.checkpoints.writing import write_rest
from osrm_peft.io.manifest import check_replaceable

_ENTRIES = 2**22  # of a tensor that are made at once


def bake_adapter(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    scale: float = 1.0,
    task: str | None = None,
    tokenizer: str | None = None,
    dtype: OutputDtype | None = None,
    resume: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    progress: bool = False,
) -> Path:
    """Write a LoRA adapter into its base model's weights: a full model, which `from_pretrained` loads without PEFT.

    It equals PEFT's `merge_and_unload` to rounding, and is rounded once, from float32. Neither model is in memory as a
    whole: plain LoRA is added some rows of a tensor at a time, and DoRA, `lora_bias`, `target_parameters`, trained
    tokens and trained biases are merged by PEFT's own layers, a layer at a time. Weight files are sharded as the
    base's are. An adapter that changes one of two tied weights unties them.

    Args:
        base: folder that `save_pretrained` wrote, or Hub id. Safetensors only.
        adapter: folder that PEFT or we wrote, or Hub id.
        out: the result's folder, which is returned.
        scale: λ, W + λ (W_baked − W); heads, and trained modules that the base lacks, stay whole.
        task: of a merged folder, the task whose head the result has.
        tokenizer: `"base"` or `"adapter"`: whose tokenizer the result has. None: the adapter's, if it has files of one.
        dtype: of the result; None: the base's.
        resume: go on with an interrupted work of the same inputs and options: finished weight files are kept.
        overwrite: replace another result, or what an interrupted work has finished.
        verify: compare the base's weight files with the checksums in its manifest, if one of our merges wrote it.
        progress: show a bar.

    Raises:
        TypeError, ValueError, FileNotFoundError: bad options, an adapter that does not fit the base or that cannot be
            baked, damaged or pickled files.
        FileExistsError, OSError: something else is in `out`, another process writes there, or the disk is full.
    """
    out = check_replaceable(out, "checkpoint")
    plan = plan_bake(base, adapter, scale=scale, task=task, tokenizer=tokenizer, dtype=dtype)
    return execute(plan, out, resume=resume, overwrite=overwrite, verify=verify, progress=progress)


def execute(
    plan: BakePlan,
    out: Path,
    **how: bool,
) -> Path:
    """Bake as planned; `how` has resume, overwrite, verify and progress, see `carry_out`."""
    return carry_out(plan, lambda: Baker(plan), partial(_finish, plan), out, **how)


def _finish(plan: BakePlan, folder: Path, sums: Mapping[str, list[str]]) -> dict[str, Any]:
    """Write what lies beside the weights; further fields of the manifest."""
    write_rest(plan, folder, plan.text, {BASE: plan.files.folder, ADAPTER: plan.adapter.folder}, plan.config)
    return {"crc32": {file: each[0] for file, each in sums.items()}}


class Baker:
    """The tensors of a baked model, made some rows at a time."""

    summary: list[Any] | None = None

    def __init__(self, plan: BakePlan) -> None:
        self.plan = plan

    def summarise(self, known: list[Any] | None) -> None:
        """Nothing: each tensor stands for itself."""

    def close(self) -> None:
        """Nothing is held."""

    def blocks(self, names: Sequence[str]) -> Iterator[list[Tensor]]:
        """Yield (rows, width) blocks of these tensors in the result's dtype, each alone in a list."""
        for name in names:
            yield from ([block] for block in self._blocks(name))

    def _blocks(self, name: str) -> Iterator[Tensor]:
        plan, shape = self.plan, self.plan.shapes[name]
        rows = shape[0] if len(shape) > 1 else 1
        width = torch.Size(shape).numel() // max(rows, 1)
        whole, product = self._value(name)
        step = max(1, _ENTRIES // max(width, 1))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            block = plan.files.read(plan.of_base[name], start, stop) if whole is None else whole[start:stop]
            if product is not None:
                left, right = product
                block = block + plan.scale * (left[start:stop] @ right)  # float32, or float64 if the base is
            yield self._rounded(name, block, changed=name in plan.changes)

    def _value(self, name: str) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
        """(rows, width) what takes the base's place, or None; and factors of what is added to it, or None."""
        plan = self.plan
        change = plan.changes.get(name)
        if change is None:
            return None, None
        whole = None
        if change.merged is not None:
            whole = change.merged(lambda parameter: self._base(plan.places[parameter]))
        elif change.value is not None:
            whole = change.value()
        if whole is not None:
            tensor = plan.of_base.get(name)
            if change.trained and plan.scale != 1 and tensor and plan.files.tensors[tensor].shape == whole.shape:
                under = _wide(self._base(tensor))
                whole = under + plan.scale * (_wide(whole) - under)
            whole = whole.reshape(len(whole) if whole.dim() > 1 else 1, -1)
        return whole, None if change.product is None else change.product()

    def _base(self, tensor: str) -> Tensor:
        return self.plan.files.read(tensor).view(self.plan.files.tensors[tensor].shape)

    def _rounded(self, name: str, block: Tensor, changed: bool) -> Tensor:
        """A block in the result's dtype; raises ValueError if it is too large for it."""
        dtype = self.plan.dtypes[name]
        if not changed and block.dtype == dtype:
            return block
        result = block.to(dtype)
        if dtype.is_floating_point and not bool(result.isfinite().all()):
            kind = str(dtype).removeprefix("torch.")
            what = f"too large for {kind}: give another dtype" if bool(block.isfinite().all()) else "NaN or Inf"
            raise ValueError(f"{name!r} of the result is {what}, or lower the scale")
        return result


def _wide(tensor: Tensor) -> Tensor:
    """In float32, or in float64 as it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
