"""merge_checkpoints: merges from disk to disk, tensor by tensor; an interrupted merge can go on."""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from osrm_peft.checkpoints.blocks import Blocks
from osrm_peft.checkpoints.model_files import crc32_of
from osrm_peft.checkpoints.plan import STATE, CheckpointPlan, Vocab, plan_checkpoints
from osrm_peft.checkpoints.shapes import OutputDtype
from osrm_peft.checkpoints.skeleton import built_config
from osrm_peft.checkpoints.writing import write_heads, write_rest, write_shard
from osrm_peft.checks import printable
from osrm_peft.devices import computing
from osrm_peft.hub.card import write_manifest
from osrm_peft.hub.sources import local_folder
from osrm_peft.io.json import parse_json, read_object, write_json
from osrm_peft.io.manifest import MANIFEST, check_replaceable
from osrm_peft.io.places import FULL, alone_in, check_space, put_in_place
from osrm_peft.merging.weights import Weights


def merge_checkpoints(
    models: Mapping[str, str | Path],
    out: str | Path,
    method: str = "average",
    *,
    base: str | Path | None = None,
    weights: Weights = None,
    scale: float | None = None,
    heads: Sequence[str] = (),
    vocab: Vocab = "error",
    tokenizer: str | None = None,
    dtype: OutputDtype | None = None,
    shard_size: int | str = "5GB",
    seed: int = 0,
    device: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    progress: bool = False,
    **options: Any,
) -> Path:
    """Merge full checkpoints into one that `from_pretrained` loads, without holding one of them in memory.

    Element-wise methods see some rows of a tensor at a time; LoRE, TSV-M and Iso-C see a whole matrix (`device` is for
    these) and average what is no matrix (norms, biases, stacks of experts), W₀ + λ mean τ_t, LoRE mean θ_t: the
    manifest names it. Names are those that transformers loads. Computed in float32. EMR writes one for each input.

    Args:
        models: {name: folder that `save_pretrained` wrote, or Hub id}. Safetensors only.
        out: the result's folder, which is returned.
        method: `average`, `task_arithmetic`, `ties`, `dare`, `dare_ties`, `lore`, `tsv`, `iso` or `emr`.
        base: the model they were trained from; average and LoRE need none.
        weights: one a model, by name or in order, or by tensor name patterns, as in `merge_adapters`.
        scale: λ; None: the paper's default of the method.
        heads: name patterns of tensors that each model keeps (classification heads): `heads/<name>.safetensors`, see
            `load_merged_checkpoint`.
        vocab: `"error"`, or `"intersect"`: keep the rows of the tokens that all models have.
        tokenizer: the model (or `"base"`) whose tokenizer, chat template, special tokens (in config.json, too),
            generation and processor settings the result has. None: the models', where they agree; else the base's.
        dtype: of the result; None: the models' own, if it is the same.
        shard_size: of a weight file, at most: bytes, or `"5GB"` (5·10⁹), `"500MB"`, `"2GiB"` (2·2³⁰).
        seed: of the methods that draw.
        device: `"cpu"` (the default), `"cuda"` or `"cuda:1"`, equal to rounding; either may resume an interrupted one.
        resume: go on with an interrupted merge of the same inputs and options: finished weight files are kept.
        overwrite: replace another result, or what an interrupted merge has finished.
        verify: compare the weight files of earlier merges with the checksums in their manifests.
        progress: show a bar.
        **options: the method's own.

    Raises:
        TypeError, ValueError, FileNotFoundError: bad options, models that are not alike, damaged or pickled files.
        FileExistsError, OSError: something else is in `out`, another process writes there, or the disk is full.
    """
    out = check_replaceable(out, "checkpoint")
    plan = plan_checkpoints(
        models, method, base=base, weights=weights, scale=scale, heads=heads, vocab=vocab,
        tokenizer=tokenizer, dtype=dtype, shard_size=shard_size, seed=seed, device=device, **options,
    )  # fmt: skip
    return execute(plan, out, resume=resume, overwrite=overwrite, verify=verify, progress=progress)


def execute(
    plan: CheckpointPlan,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    progress: bool = False,
) -> Path:
    """Merge as planned, into a folder beside `out` that is renamed to it at the end."""
    check_replaceable(out, "checkpoint", plan.manifest(), overwrite)
    partial = out.with_name(f".{out.name}.merging")
    if not partial.exists():  # else a part of the result may be written already
        check_space(out, len(plan.folders) * plan.size_of(list(plan.shapes)))
    with alone_in(partial), computing(plan.device):
        state = _state(partial, plan, resume, overwrite)
        return _execute(plan, out, partial, state, overwrite, verify, progress)


def _execute(
    plan: CheckpointPlan,
    out: Path,
    partial: Path,
    state: dict[str, Any],
    overwrite: bool,
    verify: bool,
    progress: bool,
) -> Path:
    folders = plan.folders
    missing = [name for file, names in plan.shards if file not in state["crc32"] for name in names]
    _clear(partial, {partial / STATE, *(partial / folder / file for file in state["crc32"] for folder in folders)})
    check_space(out, len(folders) * plan.size_of(missing))
    write_json(partial / STATE, state)
    with ExitStack() as stack:
        for files in [*plan.models.values(), *([plan.base] if plan.base else [])]:
            stack.callback(files.close)
            if verify:
                files.verify()
        merge = Blocks(plan)
        stack.callback(merge.close)
        merge.summarise(state["summary"])
        if merge.summary is not None:
            state["summary"] = merge.summary
            write_json(partial / STATE, state)
        total = plan.size_of([name for _, names in plan.shards for name in names])
        with tqdm(
            total=total, desc=f"merge {plan.method.name}", unit="B", unit_scale=True, disable=not progress
        ) as bar:
            for file, names in plan.shards:
                if file not in state["crc32"]:
                    paths = [partial / folder / file for folder in folders]
                    try:
                        state["crc32"][file] = write_shard(merge, paths, names, bar)
                    except OSError as error:
                        if error.errno not in FULL:
                            raise
                        reason = f"{os.strerror(error.errno)}: {paths[0]} could not be written"
                        raise OSError(error.errno, f"{reason}; make room, and go on with resume (--resume)") from error
                    write_json(partial / STATE, state)
                else:
                    bar.update(plan.size_of(names))
        plan.check_unchanged()
        for number, folder in enumerate(folders):
            write_rest(plan, partial / folder, {file: sums[number] for file, sums in state["crc32"].items()})
        if plan.heads:
            write_heads(plan, partial / "heads")
    checksums = {file: sums[0] for file, sums in state["crc32"].items()} if folders == [""] else {}
    written = {path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file()} - {STATE}
    written |= {MANIFEST, "README.md"}
    made = plan.manifest()
    write_manifest(partial, made | {"crc32": checksums, "files": sorted(written)})
    check_replaceable(out, "checkpoint", made, overwrite)  # the place may have changed meanwhile
    (partial / STATE).unlink()
    with alone_in(out) if out.is_dir() else nullcontext():  # the earlier result, until it is removed
        put_in_place(partial, out)
    return out


def load_merged_checkpoint(
    folder: str | Path, name: str, auto_class: Any = AutoModelForSequenceClassification
) -> PreTrainedModel:
    """A merged model with the head that the model `name` kept, in eval mode.

    Args:
        folder: the result of `merge_checkpoints(…, heads=…)`, or a Hub id.
        auto_class: transformers' class for the task.

    Raises:
        FileNotFoundError: no head of this name; lists the heads.
    """
    path = local_folder(str(folder), ["*"], "merged checkpoint")
    file = path / "heads" / f"{name}.safetensors"
    known = sorted(head.stem for head in (path / "heads").glob("*.safetensors"))
    if name not in known:
        raise FileNotFoundError(f"{folder} has no head {name!r}: it has {', '.join(known) or 'none'}")
    try:
        with safe_open(file, framework="pt") as opened:
            config = built_config(parse_json((opened.metadata() or {})["config"]))
    except Exception as error:  # any kind, from safetensors and transformers
        reason = printable(" ".join(str(error).split()))[:200]
        raise ValueError(f"{file} is damaged ({type(error).__name__}: {reason}): merge again") from error
    model = auto_class.from_pretrained(path, config=config)
    left = model.load_state_dict(load_file(file), strict=False).unexpected_keys
    if left:
        raise ValueError(f"{file} holds {left[0]!r}, which {type(model).__name__} has not: give another auto_class")
    return model.eval()


def _state(partial: Path, plan: CheckpointPlan, resume: bool, overwrite: bool) -> dict[str, Any]:
    """The state of an interrupted merge, without files that are damaged, to go on with; or a new state."""
    state: dict[str, Any] = {"fingerprint": plan.fingerprint(), "summary": None, "crc32": {}}
    if not (partial / STATE).is_file() or (overwrite and not resume):
        return state
    try:
        earlier = read_object(partial / STATE)
        done = {file: sums for file, sums in earlier["crc32"].items() if _sound(partial, file, plan.folders, sums)}
        same = earlier.get("fingerprint") == state["fingerprint"]
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        if not resume:
            return state  # nothing that could be gone on with
        raise ValueError(f"{partial / STATE} is damaged ({error}): begin anew, without resume") from error
    if resume and not same:
        raise ValueError(
            f"{partial} is of another merge (other inputs or options): begin anew with overwrite=True (--overwrite), "
            "without resume"
        )
    finished = done if same else earlier["crc32"]
    if finished and not resume:
        what = "this merge" if same else "another merge"
        way = "go on with resume=True (--resume), or begin anew" if same else "begin anew"
        raise FileExistsError(
            f"{partial} holds {len(finished)} finished weight files of {what}, which was interrupted: {way} with "
            "overwrite=True (--overwrite)"
        )
    return state | {"summary": earlier.get("summary"), "crc32": done} if resume else state


def _sound(partial: Path, file: str, folders: list[str], sums: list[str]) -> bool:
    """Whether each folder has this weight file as it was written."""
    paths = [partial / folder / file for folder in folders]
    return all(path.is_file() and crc32_of(path) == one for path, one in zip(paths, sums, strict=True))


def _clear(partial: Path, kept: set[Path]) -> None:
    """Remove all but these files from the folder: what a killed process had half written."""
    for path in sorted(partial.rglob("*"), reverse=True):  # a folder comes after its content
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path not in kept:
            path.unlink()
