"""merge_checkpoints: tensor by tensor from disk to disk; interrupted, it goes on where it stopped."""

import json
import os
import shutil
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from osrm_peft.checkpoints.model_files import BESIDE, INDEX
from osrm_peft.checkpoints.plan import SAFE_NAMES, CheckpointPlan, check_space, plan_checkpoints
from osrm_peft.files import MANIFEST, check_replaceable, new_file, put_in_place, write_json
from osrm_peft.hub import local_folder
from osrm_peft.merging.average import average
from osrm_peft.merging.inputs import Weights
from osrm_peft.merging.merge import generator_of
from osrm_peft.merging.registry import Merged, taken

BLOCK = 2**16  # entries of a tensor that an element-wise method sees at once: they fit a processor's cache
STATE = "merge_state.json"


def merge_checkpoints(
    models: Mapping[str, str | Path],
    out: str | Path,
    method: str = "average",
    *,
    base: str | Path | None = None,
    weights: Weights = None,
    scale: float | None = None,
    heads: Sequence[str] = (),
    vocab: str = "error",
    dtype: str | None = None,
    shard_size: int = 5 * 10**9,
    seed: int = 0,
    resume: bool = False,
    verify: bool = True,
    progress: bool = False,
    **options: Any,
) -> Path:
    """Merge full checkpoints into one that `from_pretrained` loads, without holding one of them in memory.

    Element-wise methods see some rows of a tensor at a time, LoRE, TSV-M and Iso-C a whole matrix (on the GPU if there
    is one); there, what is no matrix (norms, biases) is averaged. Computed in float32. EMR, whose result differs by
    model, writes a whole model for each, `out/<name>`.

    Args:
        models: {name: folder that `save_pretrained` wrote, or Hub id}. Safetensors only.
        out: the result's folder; an earlier result there is replaced.
        method: `average`, `task_arithmetic`, `ties`, `dare`, `dare_ties`, `lore`, `tsv`, `iso` or `emr`.
        base: the model they were trained from; average and LoRE need none.
        weights: one a model, by name or in order, or by tensor name patterns, as in `merge_adapters`.
        scale: λ; None: the paper's default of the method.
        heads: name patterns of tensors that each model keeps (classification heads): `heads/<name>.safetensors`, see
            `load_merged`.
        vocab: `"error"`, or `"intersect"`: of models with more tokens than another the rows of those that all have.
        dtype: of the result; None: the models' own, if it is the same.
        shard_size: bytes of a weight file, at most.
        seed: of the methods that draw.
        resume: go on with an interrupted merge of the same inputs and options: finished weight files are kept.
        verify: compare the weight files of earlier merges with the checksums in their manifests.
        progress: show a bar.
        **options: the method's own.

    Returns:
        The folder.

    Raises:
        TypeError, ValueError, FileNotFoundError, FileExistsError, OSError: bad options; models that are not alike
            (named, with the way out); damaged or pickled files; a full disk. Known before a byte is written, if at all.
    """
    out = Path(out).resolve()
    check_replaceable(out, "checkpoint")
    plan = plan_checkpoints(
        models, method, base=base, weights=weights, scale=scale, heads=heads, vocab=vocab, dtype=dtype,
        shard_size=shard_size, seed=seed, **options,
    )  # fmt: skip
    return execute(plan, out, resume=resume, verify=verify, progress=progress)


def execute(
    plan: CheckpointPlan, out: Path, *, resume: bool = False, verify: bool = True, progress: bool = False
) -> Path:
    """Merge as planned: into a folder beside `out`, which takes its name at the end."""
    folders = [f"{name}/" for name in plan.models] if plan.method.per_task else [""]
    partial = out.with_name(f".{out.name}.merging")
    state = _state(partial, plan, resume)
    check_space(plan, out, len(folders))
    every = [*plan.models.values(), *([plan.base] if plan.base else [])]
    with ExitStack() as stack:
        for one in every:
            stack.callback(one.close)
            if verify:
                one.verify()
        merge = _Merge(plan)
        stack.callback(merge.close)
        merge.summarise(state["summary"])
        if merge.summary is not None:
            state["summary"] = merge.summary
            write_json(partial / STATE, state)
        total = plan.size_of([name for _, names in plan.shards for name in names])
        with tqdm(total=total, desc=f"merge {plan.name}", unit="B", unit_scale=True, disable=not progress) as bar:
            for file, names in plan.shards:
                if file not in state["crc32"]:
                    sums = _write_shard(merge, [partial / folder / file for folder in folders], names, bar)
                    state["crc32"][file] = sums
                    write_json(partial / STATE, state)
                else:
                    bar.update(plan.size_of(names))
        plan.check_unchanged()
        for place, folder in enumerate(folders):
            _write_rest(plan, partial / folder, {file: sums[place] for file, sums in state["crc32"].items()})
        if plan.heads:
            _write_heads(plan, partial / "heads")
        files = sorted({path.relative_to(partial).parts[0] for path in partial.rglob("*")} - {STATE})
        whole = {file: found[0] for file, found in state["crc32"].items()} if folders == [""] else {}
        write_json(partial / MANIFEST, plan.manifest() | {"crc32": whole, "files": sorted({*files, MANIFEST})})
        (partial / STATE).unlink()
    put_in_place(partial, out)
    return out


def load_merged(folder: str | Path, name: str, auto_class: Any = AutoModelForSequenceClassification) -> PreTrainedModel:
    """A merged model with the head that the model `name` kept, in eval mode.

    Args:
        folder: of `merge_checkpoints(…, heads=…)`, or a Hub id.
        auto_class: transformers' class for the task.

    Raises:
        FileNotFoundError: no head of this name; lists those there are.
    """
    place = local_folder(str(folder), ["*"], "merged checkpoint")
    file = place / "heads" / f"{name}.safetensors"
    known = sorted(path.stem for path in (place / "heads").glob("*.safetensors"))
    if name not in known:
        raise FileNotFoundError(f"{folder} has no head {name!r}: it has {', '.join(known) or 'none'}")
    with safe_open(file, framework="pt") as opened:
        config = json.loads(opened.metadata()["config"])
    model = auto_class.from_pretrained(place, config=AutoConfig.for_model(**config))
    left = model.load_state_dict(load_file(file), strict=False).unexpected_keys
    if left:
        raise ValueError(f"{file} holds {left[0]!r}, which {type(model).__name__} has not: give another auto_class")
    return model.eval()


class _Merge:
    """The tensors of the result, made some rows at a time.

    Blocks are small, so that each is one thread's work: as many at once as there are cores. DARE draws in order, and a
    whole matrix takes all threads: these run one after the other.
    """

    def __init__(self, plan: CheckpointPlan) -> None:
        self.plan, self.floats = plan, [name for name in plan.shapes if plan.dtypes[name].is_floating_point]
        self.summary: list[Any] | None = None
        self._arguments = taken(plan.method.fn, plan.options)
        self._workers, self._threads = os.cpu_count() or 1, torch.get_num_threads()
        alone = plan.method.spectral or plan.method.prepare is not None
        self._pool = None if alone else ThreadPoolExecutor(self._workers)
        if self._pool is not None:
            torch.set_num_threads(1)

    def summarise(self, known: list[Any] | None) -> None:
        """What the method needs of the whole model: as an interrupted merge had found it, or anew."""
        method = self.plan.method
        if method.per_task:
            self.summary = self._rescalers() if known is None else known
        elif method.summarise is not None:
            if known is None:
                found = method.summarise(_Stacks(self), **taken(method.summarise, self.plan.options))
                known = [None if found is None else found.tolist()]
            self.summary = known
            self._arguments["summary"] = None if known[0] is None else torch.tensor(known[0])

    def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self._threads)

    def blocks(self, name: str) -> Iterator[list[Tensor]]:
        """The result's rows, (rows, width) in its dtype, one tensor for each folder that is written."""
        dtype = self.plan.dtypes[name]
        if not dtype.is_floating_point:
            yield [self._same(name)]
            return
        if self._pool is None:
            for rows in self._rows(name):
                yield self._block(name, *rows)
            return
        waiting: deque[Future[list[Tensor]]] = deque()  # each worker has one in hand and one to come
        for rows in self._rows(name):
            waiting.append(self._pool.submit(self._block, name, *rows))
            if len(waiting) > 2 * self._workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _block(self, name: str, start: int, stop: int) -> list[Tensor]:
        found, dtype = self._merge(name, *self._stack(name, start, stop)), self.plan.dtypes[name]
        for one in found:
            if not bool(one.sum().isfinite()) and not bool(one.isfinite().all()):  # a sum may overflow
                raise ValueError(f"{name!r} of the result has NaN or Inf: is it sound in every model?")
        return [one.to(dtype) for one in found]

    def _merge(self, name: str, stack: Tensor, under: Tensor | None) -> list[Tensor]:
        """Results of one block: one, or one a model."""
        plan, weights = self.plan, self.plan.weights[name].to(stack.dtype)
        if plan.method.spectral and not self._is_matrix(name):
            return [_sum(under, average(stack, weights))]
        if plan.method.per_task:
            unified, masks = plan.method.fn(stack, weights, **self._arguments)
            scales = [plan.scale * one for one in self.summary or []]
            return [_sum(under, scale * mask * unified) for scale, mask in zip(scales, masks, strict=True)]
        device = torch.device("cuda" if plan.method.spectral and torch.cuda.is_available() else "cpu")
        out = plan.method.fn(stack.to(device), weights.to(device), **self._arguments)
        merged = out if isinstance(out, Merged) else Merged(out)
        direction = merged.direction if merged.finish is None else merged.finish(merged.direction)
        direction = direction.mul_(plan.scale).cpu()
        return [_sum(under, direction if merged.offset is None else direction.add_(merged.offset.cpu()))]

    def _rows(self, name: str) -> Iterator[tuple[int, int]]:
        rows, width = self._shape(name)
        whole = self.plan.method.spectral and self._is_matrix(name)
        size = rows if whole else max(1, BLOCK // max(width, 1))
        return ((start, min(start + size, rows)) for start in range(0, rows, size))

    def _stack(self, name: str, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """(T, rows, width) task vectors, or whole weights without a base; and the base's rows; float32."""
        plan, (_, width) = self.plan, self._shape(name)
        stack = torch.empty(len(plan.models), stop - start, width)
        for place, one in zip(stack, plan.models.values(), strict=True):
            entry = one.tensors[name]
            if entry.dtype == place.dtype and entry.width == width:
                one.read(name, start, stop, out=place)
            else:
                place.copy_(one.read(name, start, stop)[:, :width])
        under = None if plan.base is None else plan.base.read(name, start, stop)[:, :width].float()
        if under is not None:
            stack -= under
        if plan.method.prepare is not None:
            key = (name, start)
            if start == 0 or key != self._drawing:
                self._generators = [generator_of(plan.seed, task, name) for task in plan.models]
            stack = plan.method.prepare(stack, self._generators, **taken(plan.method.prepare, plan.options))
            self._drawing = (name, stop)
        return stack, under

    _drawing: tuple[str, int] = ("", 0)

    def _shape(self, name: str) -> tuple[int, int]:
        """(rows, width) in which a tensor is read."""
        shape = self.plan.shapes[name]
        rows = shape[0] if len(shape) > 1 else 1
        return rows, torch.Size(shape).numel() // max(rows, 1)

    def _is_matrix(self, name: str) -> bool:
        return len(self.plan.shapes[name]) == 2 and min(self.plan.shapes[name]) > 1

    def _same(self, name: str) -> Tensor:
        """A tensor of whole numbers, which all models must have alike."""
        (first, one), *others = ((model, files.read(name)) for model, files in self.plan.models.items())
        for model, other in others:
            if not torch.equal(one, other):
                raise ValueError(f"{name!r} holds whole numbers, and other ones in {model!r} than in {first!r}")
        return one

    def _rescalers(self) -> list[float]:
        """EMR's λ_t = Σ|w_t τ_t| / Σ|M_t ⊙ τ_uni| over the whole model."""
        full = torch.zeros(len(self.plan.models), dtype=torch.float64)
        kept = torch.zeros_like(full)
        for name in self.floats:
            weights = self.plan.weights[name]
            for start, stop in self._rows(name):
                stack, _ = self._stack(name, start, stop)
                unified, masks = self.plan.method.fn(stack, weights.to(stack.dtype), **self._arguments)
                full += weights.abs() * stack.abs().sum((1, 2), dtype=torch.float64)
                kept += (masks * unified.abs()).sum((1, 2), dtype=torch.float64)
        return torch.where(kept > 0, full / kept.clamp_min(1e-300), 0).tolist()


class _Stacks:
    """All task vectors, block by block; can be iterated again and again."""

    def __init__(self, merge: _Merge) -> None:
        self.merge = merge

    def __iter__(self) -> Iterator[Tensor]:
        for name in self.merge.floats:
            for start, stop in self.merge._rows(name):
                yield self.merge._stack(name, start, stop)[0]


def _sum(under: Tensor | None, direction: Tensor) -> Tensor:
    return direction if under is None else direction.add_(under)


def _state(partial: Path, plan: CheckpointPlan, resume: bool) -> dict[str, Any]:
    """What an interrupted merge has finished; nothing, in a new folder, without `resume`."""
    state: dict[str, Any] = {"fingerprint": plan.fingerprint(), "summary": None, "crc32": {}}
    if resume and (partial / STATE).is_file():
        found = json.loads((partial / STATE).read_text(encoding="utf-8"))
        if found["fingerprint"] != state["fingerprint"]:
            raise ValueError(f"{partial} is of another merge (other inputs or options): merge without resume")
        return found
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_json(partial / STATE, state)
    return state


def _write_shard(merge: _Merge, paths: list[Path], names: list[str], bar: tqdm) -> list[str]:
    """One weight file in each folder, complete or absent; their checksums."""
    plan, end = merge.plan, 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name in names:
        start, end = end, end + plan.size_of([name])
        header[name] = {
            "dtype": SAFE_NAMES[plan.dtypes[name]], "shape": list(plan.shapes[name]), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(header).encode()
    text = len(text + b" " * (-len(text) % 8)).to_bytes(8, "little") + text + b" " * (-len(text) % 8)
    sums = [zlib.crc32(text)] * len(paths)
    with ExitStack() as stack:
        files = [stack.enter_context(stack.enter_context(new_file(path)).open("wb")) for path in paths]
        for file in files:
            file.write(text)
        for name in names:
            for blocks in merge.blocks(name):
                for place, (file, block) in enumerate(zip(files, blocks, strict=False)):
                    data = block.contiguous().view(-1).view(torch.uint8).numpy().data
                    sums[place] = zlib.crc32(data, sums[place])
                    file.write(data)
                bar.update(blocks[0].nbytes)
    return [f"{one:08x}" for one in sums]


def _write_rest(plan: CheckpointPlan, folder: Path, sums: dict[str, str]) -> None:
    """Configuration, tokenizer and index beside the weights."""
    for path in sorted(plan.like.folder.iterdir()):
        if path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in BESIDE):
            shutil.copyfile(path, folder / path.name)
    kinds = {dtype for dtype in plan.dtypes.values() if dtype.is_floating_point}
    config = {name: value for name, value in plan.like.config.items() if name not in ("dtype", "torch_dtype")}
    if len(kinds) == 1:
        config["dtype"] = str(next(iter(kinds))).removeprefix("torch.")
    write_json(folder / "config.json", config)
    if len(plan.shards) > 1:
        weight_map = {name: file for file, names in plan.shards for name in names}
        total = plan.size_of(list(plan.shapes))
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    if plan.method.per_task:
        write_json(folder / MANIFEST, plan.manifest() | {"model": folder.name, "crc32": sums})


def _write_heads(plan: CheckpointPlan, folder: Path) -> None:
    """What each model keeps, with its configuration."""
    folder.mkdir(exist_ok=True)
    for name, one in plan.models.items():
        kept = [tensor for tensor, owners in plan.heads.items() if name in owners]
        tensors = {tensor: one.read(tensor).view(one.tensors[tensor].shape) for tensor in kept}
        with new_file(folder / f"{name}.safetensors") as partial:
            save_file(tensors, partial, {"format": "pt", "config": json.dumps(one.config)})
