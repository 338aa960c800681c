"""Tables for a terminal of what lies in adapters, and of what a merge would do."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.box import HORIZONTALS
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from osrm_peft.adapters.keys import shape_of_name
from osrm_peft.adapters.lora_adapter import LoraAdapter, shape_in
from osrm_peft.features.task_features import TaskFeatures
from osrm_peft.merging.plan import MergePlan
from osrm_peft.osrm.spectrum import PooledMoment

_KINDS: dict[Any, str] = {None: "linear", (): "embedding"}


def adapter_tables(adapters: Mapping[str, LoraAdapter]) -> list[Table]:
    """One line an adapter, one line a group of like layers with each adapter's rank r and scale s, and modules."""
    summary = _table("Adapters", "adapter", "base model", "layers", "rank", "dtype", "heads", "source")
    for name, adapter in adapters.items():
        ranks = sorted({rank for _, rank, _ in adapter.shapes.values()})
        heads = ", ".join(f"{head} {tuple(tensor.shape)}" for head, tensor in adapter.heads.items()) or "none"
        dtype = str(adapter.dtype).removeprefix("torch.")
        listed = ", ".join(map(str, ranks))
        cells = [name, str(adapter.base_model), str(len(adapter.shapes)), listed, dtype, heads, adapter.source]
        summary.add_row(*map(escape, cells))
    layers = _table("Layers", "layers", "number", "shape", "kind", *(f"{escape(name)}: r, s, ‖τ‖" for name in adapters))
    for (module, shape, kind), names in _groups(adapters).items():
        cells = [_cell(adapter, names) for adapter in adapters.values()]
        layers.add_row(escape(module), str(len(names)), f"{shape[0]}×{shape[1]}", kind, *cells)
    return [summary, layers, *_module_tables(adapters)]


def plan_tables(plan: MergePlan) -> list[Table]:
    """The adapters of a planned merge, and what it would write."""
    shapes = plan.inputs.shapes
    result = _table("The merge", "", "")
    largest = max(map(plan.output_rank, shapes))
    rank = "dense vector and 1-bit masks" if plan.method.per_task else f"at most {largest}"
    scale = "chosen by features, a layer" if plan.chooses_scale else f"{plan.scale:g}"
    weights = plan.weights_rule and f"chosen by {plan.weights_rule.word}"
    options = ", ".join(f"{name}={value}" for name, value in plan.options.items()) or "none"
    heads = [name for name, adapter in plan.inputs.adapters.items() if adapter.heads]
    manifest_weights = plan.manifest()["weights"]
    for name, value in {
        "method": f"{plan.method.name} ({plan.method.paper})",
        "options": options,
        "space": plan.space,
        "weights": weights or ", ".join(f"{task} {_weight(value)}" for task, value in manifest_weights.items()),
        "scale λ": scale,
        "base model": str(plan.inputs.base),
        "layers": str(len(shapes)),
        "rank": rank,
        "weights written": f"{decimal(plan.output_bytes())} in {str(plan.dtype).removeprefix('torch.')}",
        "heads": f"one a task: {', '.join(heads)}" if heads else "none",
        "modules": "; ".join(_of_each_fate(plan.fates)) or "none",
    }.items():
        result.add_row(name, escape(value))
    return [*adapter_tables(plan.inputs.adapters), result]


REVEALS = {
    "mean": "one vector an input, the average over all samples: no sample",
    "sample": "one vector an input and sample (its average over tokens), or, once these are as many as the input is "
    "wide, their second moment only",
    "token": "the second moment of an input over all tokens: their principal directions, no token",
}


def features_tables(features: TaskFeatures, path: Path) -> list[Table]:
    """Facts about a features file, and one line for each distinct input in it."""
    result = _table(escape(f"Features of {features.task}"), "", "")
    second = next(iter(features.layers.values())).second is not None
    of = "the fine-tuned model (for RegMean)" if features.of_finetuned_model else "the pre-trained model"
    for name, value in {
        "file": f"{path} ({decimal(path.stat().st_size)})",
        "base model": f"{features.base_model} (weights {features.weight_hash}); inputs of {of}",
        "tokenizer": f"{features.tokenizer} ({features.tokenizer_hash})" if features.tokenizer_hash else "not recorded",
        "statistic": features.statistic + (", padding counted in (reference)" if features.reference else ""),
        "samples": f"{features.num_samples}, drawn with seed {features.seed}",
        "reveals": REVEALS["token" if features.statistic == "sample" and second else features.statistic],
    }.items():
        result.add_row(name, escape(value))
    inputs = _table("Inputs", "of layers", "width", "vectors", "E‖h‖²", "‖E h‖² of it")
    names: dict[str, list[str]] = {}
    for name, leader in features.same_input().items():
        names.setdefault(leader, []).append(name)
    for leader, sharing in names.items():
        moments = features.layers[leader]
        energy, mean = float(PooledMoment.of([moments]).trace()), float(moments.mean().square().sum())
        share = f"{mean / energy:.1%}" if energy else "–"
        rest = [name.rpartition(".")[2] for name in sharing[1:]]
        inputs.add_row(
            escape(", ".join([leader, *rest])), str(moments.width), str(moments.count), f"{energy:.4g}", share
        )
    return [result, inputs]


def _module_tables(adapters: Mapping[str, LoraAdapter]) -> list[Table]:
    """One line a group of like parameters that are trained whole, or copies of base weights; no table without any."""
    table = _table("Modules", "parameters", "number", *map(escape, adapters))
    names: dict[str, list[str]] = {}
    for name in sorted({name for one in adapters.values() for name in (*one.modules, *one.copies)}):
        names.setdefault(shape_of_name(name), []).append(name)
    for group, alike in names.items():
        cells = []
        for adapter in adapters.values():
            parts = {"trained": adapter.modules, "copy": adapter.copies}
            found = {
                f"{kind} {'×'.join(map(str, shape_in(part, name)))}"
                for kind, part in parts.items() for name in alike if name in part
            }  # fmt: skip
            cells.append(", ".join(sorted(found)) or "absent")
        table.add_row(escape(group), str(len(alike)), *cells)
    return [table] if names else []


def _of_each_fate(fates: Mapping[str, str]) -> Iterator[str]:
    """Each fate of trained modules, with its parameters; names that differ in depth only are joined."""
    for fate in dict.fromkeys(fates.values()):
        groups = dict.fromkeys(shape_of_name(name) for name, one in fates.items() if one == fate)
        yield f"{', '.join(groups)}: {fate}"


def _weight(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else "by layer"


def _groups(adapters: Mapping[str, LoraAdapter]) -> dict[tuple[str, tuple[int, int], str], list[str]]:
    """{(last part of the name, shape, kind): layer names}."""
    groups: dict[tuple[str, tuple[int, int], str], list[str]] = {}
    known = {name: (adapter, shape) for adapter in adapters.values() for name, shape in adapter.shapes.items()}
    for name in sorted(known):
        adapter, (o, _, n) = known[name]
        kind = _KINDS.get(adapter.layouts.get(name), "convolution")
        groups.setdefault((name.rpartition(".")[2], (o, n), kind), []).append(name)
    return groups


def _cell(adapter: LoraAdapter, names: list[str]) -> str:
    """Ranks, scales and norms of one adapter over like layers, one number where they agree."""
    present = [adapter.factors[name] for name in names if name in adapter.shapes]
    if not present:
        return "absent"
    ranks, scales = {factors.rank for factors in present}, {round(factors.s, 4) for factors in present}
    squares = [f.s**2 * float(((f.B.mT @ f.B) * (f.A @ f.A.mT)).sum()) for f in present]  # ‖s·B·A‖_F²
    norm = sum(squares) ** 0.5
    missing = "" if len(present) == len(names) else f" ({len(present)} of {len(names)})"
    return f"{_span(ranks)}, {_span(scales)}, {norm:.3g}{missing}"


def _span(values: set) -> str:
    return f"{min(values):g}" if len(values) == 1 else f"{min(values):g}…{max(values):g}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=HORIZONTALS, show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
