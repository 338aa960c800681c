"""merge_checkpoints: merges from disk to disk, some rows at a time; an interrupted merge can go on."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import load_file

from osrm_peft.checkpoints.blocks import Blocks
from osrm_peft.checkpoints.plan import CheckpointPlan, Vocab, plan_checkpoints
from osrm_peft.checkpoints.resumable import carry_out, carry_out_part
from osrm_peft.checkpoints.shapes import OutputDtype
from osrm_peft.checkpoints.skeleton import built_config
from osrm_peft.checkpoints.writing import write_heads, write_rest
from osrm_peft.checks import integer, printable
from osrm_peft.devices import computing
from osrm_peft.hub.card import write_manifest
from osrm_peft.hub.sources import local_folder
from osrm_peft.io.json import parse_json
from osrm_peft.io.manifest import check_replaceable
from osrm_peft.merging.weights import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    part: tuple[int, int] | None = None,
    **options: Any,
) -> Path:
    """Merge full checkpoints into one that `from_pretrained` loads, without holding one of them in memory.

    Element-wise methods see some rows of a tensor at a time; LoRE, TSV-M and Iso-C see a matrix, of a stack an expert's
    (`device` is for these), and average what is none (norms, biases, convolutions), W₀ + λ mean τ_t, LoRE mean θ_t: the
    manifest names it. Names are those that transformers loads. Computed in float32. EMR writes one for each input.

    Args:
        models: {name: folder that `save_pretrained` wrote, or Hub id}. Safetensors only.
        out: the result's folder, which is returned.
        method: `average`, `task_arithmetic`, `ties`, `dare`, `dare_ties`, `lore`, `tsv`, `iso` or `emr`.
        base: the model they were trained from; average and LoRE need none.
        weights: one a model, by name or in order, or by tensor name patterns, as in `merge_adapters`.
        scale: λ; None: the paper's default of the method.
        heads: name patterns of tensors that each model keeps: `heads/<name>.safetensors`, see `load_merged_checkpoint`.
        vocab: `"error"`, or `"intersect"`: keep the rows of the tokens that all models have.
        tokenizer: the model (or `"base"`) whose tokenizer and settings the result has; None: the models' or the base's.
        dtype: of the result; None: the models' own, if it is the same.
        shard_size: of a weight file, at most: bytes, or `"5GB"` (5·10⁹), `"500MB"`, `"2GiB"` (2·2³⁰).
        seed: of the methods that draw.
        device: `"cpu"` (the default), `"cuda"` or `"cuda:1"`, equal to rounding; either may resume an interrupted one.
        resume: go on with an interrupted merge of the same inputs and options: finished weight files are kept.
        overwrite: replace another result, or what an interrupted merge has finished.
        verify: compare the weight files of earlier merges with the checksums in their manifests.
        progress: show a bar.
        part: (i, n): only every n-th weight file, from the i-th on, see `carry_out_part`; `resume` finishes.
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
    return execute(plan, out, part, resume=resume, overwrite=overwrite, verify=verify, progress=progress)


def execute(
    plan: CheckpointPlan,
    out: Path,
    part: tuple[int, int] | None = None,
    *,
    resume: bool = False,
    **how: bool,
) -> Path:
    """Merge as planned, or a part of it; `how` has overwrite, verify and progress, see `carry_out`."""
    if part is not None:
        check_part(plan, part, resume)
        with computing(plan.device):
            carry_out_part(plan, lambda: Blocks(plan), out, part, **how)
        return out
    with computing(plan.device):
        how["resume"] = resume
        return carry_out(plan, lambda: Blocks(plan), partial(_finish, plan), out, **how)


def check_part(plan: CheckpointPlan, part: tuple[int, int], resume: bool) -> None:
    """Raise ValueError for a part that there is not."""
    if not isinstance(part, Sequence) or isinstance(part, str) or len(part) != 2:
        raise ValueError(f"part={part!r} must be (i, n), such as (2, 8)")
    i, n, files = integer("part", part[0], 1), integer("number of parts", part[1], 1), len(plan.shards)
    if i > n:
        raise ValueError(f"part={i} of {n}: there are parts 1 to {n}")
    if n > files:
        raise ValueError(
            f"{n} parts of {files} weight file{'s' * (files > 1)}: give {files} at most, or a smaller shard_size "
            "(--shard-size), which makes more files"
        )
    if resume:
        raise ValueError("a part goes on by itself where it was interrupted: leave resume (--resume) out")


def _finish(plan: CheckpointPlan, folder: Path, sums: Mapping[str, list[str]]) -> dict[str, Any]:
    """Write what lies beside the weights; further fields of the manifest."""
    beside = {name: files.folder for name, files in plan.inputs.items()}
    for number, name in enumerate(plan.folders):
        write_rest(plan, folder / name, plan.text, beside, plan.config)
        if plan.method.per_task:
            own = {file: each[number] for file, each in sums.items()}
            write_manifest(folder / name, plan.manifest() | {"model": name.rstrip("/"), "crc32": own})
    if plan.heads:
        write_heads(plan, folder / "heads")
    return {"crc32": {file: each[0] for file, each in sums.items()} if plan.folders == [""] else {}}


def load_merged_checkpoint(folder: str | Path, name: str, auto_class: Any = None) -> "PreTrainedModel":
    """A merged model with the head that the model `name` kept, in eval mode.

    Args:
        folder: the result of `merge_checkpoints(…, heads=…)`, or a Hub id.
        auto_class: transformers' class for the task. None: `AutoModelForSequenceClassification`.

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
    if auto_class is None:
        from transformers import AutoModelForSequenceClassification

        auto_class = AutoModelForSequenceClassification
    model = auto_class.from_pretrained(path, config=config)
    left = model.load_state_dict(load_file(file), strict=False).unexpected_keys
    if left:
        raise ValueError(f"{file} holds {left[0]!r}, which {type(model).__name__} has not: give another auto_class")
    return model.eval()
