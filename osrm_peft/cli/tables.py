"""What adapters and features files hold, and what a merge would do: facts for JSON, and tables of them."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import HORIZONTALS
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from osrm_peft.adapters.experts import parameter_of
from osrm_peft.adapters.factors import Factors
from osrm_peft.adapters.keys import shape_of_name
from osrm_peft.adapters.lora_adapter import LoraAdapter, shape_in

if TYPE_CHECKING:
    from osrm_peft.checkpoints.baking import BakePlan
    from osrm_peft.checkpoints.extract import Extraction
    from osrm_peft.checkpoints.extracting import ExtractPlan
    from osrm_peft.checkpoints.forecast import Forecast
    from osrm_peft.checkpoints.plan import CheckpointPlan
    from osrm_peft.features.task_features import TaskFeatures
    from osrm_peft.merging.plan import MergePlan
    from osrm_peft.merging.serving import Served

_KINDS: dict[Any, str] = {None: "linear", (): "embedding"}


def adapter_facts(adapters: Mapping[str, LoraAdapter]) -> dict[str, Any]:
    """What adapters hold: each in a line, groups of like layers, and groups of like parameters that are saved whole."""
    return {
        "adapters": {
            name: {
                "base_model": adapter.base_model,
                "layers": len(adapter.shapes),
                "ranks": sorted({rank for _, rank, _ in adapter.shapes.values()}),
                "dtype": str(adapter.dtype).removeprefix("torch."),
                "heads": {head: tuple(tensor.shape) for head, tensor in adapter.heads.items()},
                "source": adapter.source,
            }
            for name, adapter in adapters.items()
        },
        "layers": [
            {
                "layers": module,
                "number": len(names),
                "shape": shape,
                "kind": kind,
                "adapters": {name: _of_layers(adapter, names) for name, adapter in adapters.items()},
            }
            for (module, shape, kind), names in _groups(adapters).items()
        ],
        "modules": list(_module_facts(adapters)),
    }


def adapter_tables(facts: Mapping[str, Any]) -> list[Table]:
    """One line an adapter, one line a group of like layers with each adapter's rank r and scale s, and modules."""
    summary = _table("Adapters", "adapter", "base model", "layers", "rank", "dtype", "heads", "source")
    for name, one in facts["adapters"].items():
        heads = ", ".join(f"{head} {shape}" for head, shape in one["heads"].items()) or "none"
        ranks = ", ".join(map(str, one["ranks"]))
        cells = [name, str(one["base_model"]), str(one["layers"]), ranks, one["dtype"], heads, one["source"]]
        summary.add_row(*map(escape, cells))
    named = [f"{escape(name)}: r, s, ‖τ‖" for name in facts["adapters"]]
    layers = _table("Layers", "layers", "number", "shape", "kind", *named)
    for group in facts["layers"]:
        cells = [_cell(one, group["number"]) for one in group["adapters"].values()]
        size = "×".join(map(str, group["shape"]))
        layers.add_row(escape(group["layers"]), str(group["number"]), size, group["kind"], *cells)
    modules = _table("Modules", "parameters", "number", *map(escape, facts["adapters"]))
    for group in facts["modules"]:
        cells = [", ".join(f"{kind} {'×'.join(map(str, shape))}" for kind, shape in one) or "absent"
                 for one in group["adapters"].values()]  # fmt: skip
        modules.add_row(escape(group["parameters"]), str(group["number"]), *cells)
    return [summary, layers, *([modules] if facts["modules"] else [])]


def plan_facts(plan: "MergePlan") -> dict[str, Any]:
    """A planned merge: its adapters, every choice made, and what it would write."""
    made = plan.manifest()
    return adapter_facts(plan.inputs.adapters) | {
        "merge": {name: made[name] for name in ("method", "paper", "options", "space", "weights", "base_model")}
        | {
            "scale": "features" if plan.chooses_scale else plan.scale,
            "layers": len(plan.inputs.shapes),
            "rank": None if plan.method.per_task else max(map(plan.output_rank, plan.inputs.shapes)),
            "bytes": plan.output_bytes(),
            "dtype": str(plan.dtype).removeprefix("torch."),
            "heads": [name for name, adapter in plan.inputs.adapters.items() if adapter.heads],
            "modules": plan.fates,
        }
    }


def plan_tables(facts: Mapping[str, Any]) -> list[Table]:
    """The adapters of a planned merge, and what it would write."""
    result, one = _table("The merge", "", ""), facts["merge"]
    weights = one["weights"]
    if isinstance(weights, str):
        weights = f"chosen by {weights}"
    else:
        weights = ", ".join(f"{task} {_weight(value)}" for task, value in weights.items())
    for name, value in {
        "method": f"{one['method']} ({one['paper']})",
        "options": ", ".join(f"{option}={value}" for option, value in one["options"].items()) or "none",
        "space": one["space"],
        "weights": weights,
        "scale λ": "chosen by features, a layer" if one["scale"] == "features" else f"{one['scale']:g}",
        "base model": str(one["base_model"]),
        "layers": str(one["layers"]),
        "rank": "dense vector and 1-bit masks" if one["rank"] is None else f"at most {one['rank']}",
        "weights written": f"{decimal(one['bytes'])} in {one['dtype']}",
        "heads": f"one a task: {', '.join(one['heads'])}" if one["heads"] else "none",
        "modules": "; ".join(_of_each_fate(one["modules"])) or "none",
    }.items():
        result.add_row(name, escape(value))
    return [*adapter_tables(facts), result]


def checkpoint_facts(plan: "CheckpointPlan", out: Path, forecast: "Forecast | None") -> dict[str, Any]:
    """A planned merge of full models: every choice made, what it would write, and, if known, what it will take."""
    made = plan.manifest()
    takes = {} if forecast is None else {"seconds": forecast.seconds, "memory": forecast.memory}
    return {name: made[name] for name in ("method", "paper", "options", "scale", "weights", "seed", "text")} | {
        "folder": str(out),
        "tensors": len(plan.shapes),
        "bytes": plan.size_of(list(plan.shapes)),
        "files": len(plan.shards),
        "settings_of": plan.text.line(),
        **takes,
    }


def checkpoint_lines(facts: Mapping[str, Any]) -> list[str]:
    """Whose tokenizer and settings the result has, if any; what the merge will take, if that is known; its size."""
    size = f"{facts['tensors']} tensors, {facts['bytes'] / 2**30:.2f} GiB in {facts['files']} files"
    takes = (
        f"about {_time(facts['seconds'])} on this machine, {decimal(facts['memory'])} of memory"
        if "seconds" in facts
        else None
    )
    return [*filter(None, [facts["settings_of"], takes]), size]


def _time(seconds: float) -> str:
    """A time as people say it, to two digits."""
    unit, length = ("h", 3600) if seconds >= 5400 else ("min", 60) if seconds >= 90 else ("s", 1)
    number = seconds / length
    return f"{number:.2g} {unit}" if number < 99 else f"{number:,.0f} {unit}"


def bake_facts(plan: "BakePlan", out: Path) -> dict[str, Any]:
    """An adapter that is to be baked: what it changes, and what would be written."""
    made = plan.manifest()
    return {name: made[name] for name in ("inputs", "scale", "task", "dtype", "by", "left_out", "untied", "text")} | {
        "folder": str(out),
        "changed": len(plan.changes),
        "tensors": len(plan.shapes),
        "bytes": plan.size_of(list(plan.shapes)),
        "files": len(plan.shards),
        "settings_of": plan.text.line(),
    }


def bake_lines(facts: Mapping[str, Any]) -> list[str]:
    """What is changed, whose tokenizer the result has, and its size."""
    by = " by PEFT's layers" if facts["by"] == "PEFT" else ""
    changed = f"{facts['changed']} of {facts['tensors']} tensors are changed{by}"
    return [changed, *checkpoint_lines(facts)]


def extract_facts(plan: "ExtractPlan", out: Path) -> dict[str, Any]:
    """An adapter that is to be extracted: what gets LoRA, what is kept whole, and what is lost."""
    made = plan.manifest()
    kept = {plan.kept[name]: plan.tuned.tensors[plan.kept[name]] for name in plan.kept}
    return {name: made[name] for name in ("inputs", "base_model", "rank", "keep", "dtype", "left_out")} | {
        "folder": str(out),
        "layers": len(plan.layers),
        "kept": list(plan.kept),
        "bytes_kept": sum(entry.entries * entry.dtype.itemsize for entry in kept.values()),
        "lost": list(plan.lost),
    }


def extract_lines(facts: Mapping[str, Any]) -> list[str]:
    """How many layers get LoRA, what is kept whole, and what is lost."""
    lines = [f"{facts['layers']} linear layers at rank {facts['rank']}"]
    if facts["kept"]:
        lines.append(f"kept whole, {decimal(facts['bytes_kept'])}: {_some(facts['kept'])}")
    if facts["lost"]:
        lines.append(f"changed and lost: {_some(facts['lost'])}")
    return lines


def extraction_facts(found: "Extraction") -> dict[str, Any]:
    """What an extracted adapter holds."""
    return {"written_rank": found.rank, "energy": found.energy, "energy_kept": found.energy_kept,
            "lost": found.lost, "serving": found.serving}  # fmt: skip


def extraction_tables(facts: Mapping[str, Any]) -> list[Table | str]:
    """One line a group of like layers with the energy that their LoRA keeps, and what is lost."""
    groups: dict[str, list[float]] = {}
    for layer, kept in facts["energy_kept"].items():
        groups.setdefault(shape_of_name(layer), []).append(kept)
    result = _table("Energy kept", "layers", "number", "least", "mean")
    for name, kept in groups.items():
        result.add_row(escape(name), str(len(kept)), f"{min(kept):.4f}", f"{sum(kept) / len(kept):.4f}")
    lost = [f"lost: {name}, {share:.2g} of all that changed" for name, share in facts["lost"].items()]
    smaller = [f"rank {rank} would keep {kept:.4f} in the worst layer" for rank, kept in facts["serving"].items()]
    return [result, *smaller, *lost]


def _some(names: Collection[str]) -> str:
    """Names, like ones once."""
    groups = Counter(map(shape_of_name, names))
    return ", ".join(f"{name}{f' ({count})' if count > 1 else ''}" for name, count in groups.items())


REVEALS = {
    "mean": "one vector an input, the average over all samples: no sample",
    "sample": "one vector an input and sample (its average over tokens), or, once these are as many as the input is "
    "wide, their second moment only",
    "token": "the second moment of an input over all tokens: their principal directions, no token",
}


def features_facts(features: "TaskFeatures", path: Path) -> dict[str, Any]:
    """What a features file is of, and what it holds of each distinct input."""
    from osrm_peft.osrm.spectrum import PooledMoment

    names: dict[str, list[str]] = {}
    for name, leader in features.same_input().items():
        names.setdefault(leader, []).append(name)
    inputs = []
    for leader, sharing in names.items():
        moments = features.layers[leader]
        inputs.append(
            {
                "layers": sharing,
                "width": moments.width,
                "vectors": moments.count,
                "energy": float(PooledMoment.of([moments]).trace()),
                "energy_of_mean": float(moments.mean().square().sum()),
            }
        )
    second = next(iter(features.layers.values())).second is not None
    known = ("task", "base_model", "weight_hash", "of_finetuned_model", "tokenizer", "tokenizer_hash", "statistic",
             "reference", "num_samples", "seed")  # fmt: skip
    return {name: getattr(features, name) for name in known} | {
        "file": str(path),
        "bytes": path.stat().st_size,
        "reveals": REVEALS["token" if features.statistic == "sample" and second else features.statistic],
        "inputs": inputs,
    }


def features_tables(facts: Mapping[str, Any]) -> list[Table]:
    """Facts about a features file, and one line for each distinct input in it."""
    result = _table(escape(f"Features of {facts['task']}"), "", "")
    of = "the fine-tuned model (for RegMean)" if facts["of_finetuned_model"] else "the pre-trained model"
    tokenizer = f"{facts['tokenizer']} ({facts['tokenizer_hash']})" if facts["tokenizer_hash"] else "not recorded"
    for name, value in {
        "file": f"{facts['file']} ({decimal(facts['bytes'])})",
        "base model": f"{facts['base_model']} (weights {facts['weight_hash']}); inputs of {of}",
        "tokenizer": tokenizer,
        "statistic": facts["statistic"] + (", padding counted in (reference)" if facts["reference"] else ""),
        "samples": f"{facts['num_samples']}, drawn with seed {facts['seed']}",
        "reveals": facts["reveals"],
    }.items():
        result.add_row(name, escape(value))
    inputs = _table("Inputs", "of layers", "width", "vectors", "E‖h‖²", "‖E h‖² of it")
    for one in facts["inputs"]:
        share = f"{one['energy_of_mean'] / one['energy']:.1%}" if one["energy"] else "–"
        first, *rest = one["layers"]
        layers = ", ".join([first, *(name.rpartition(".")[2] for name in rest)])
        inputs.add_row(escape(layers), str(one["width"]), str(one["vectors"]), f"{one['energy']:.4g}", share)
    return [result, inputs]


def _module_facts(adapters: Mapping[str, LoraAdapter]) -> Iterator[dict[str, Any]]:
    """One group of like parameters that are trained whole, or copies of base weights, after another."""
    names: dict[str, list[str]] = {}
    for name in sorted({name for one in adapters.values() for name in (*one.modules, *one.copies)}):
        names.setdefault(shape_of_name(name), []).append(name)
    for group, alike in names.items():
        found = {}
        for task, adapter in adapters.items():
            parts = {"trained": adapter.modules, "copy": adapter.copies}
            found[task] = sorted(
                {(kind, shape_in(part, name)) for kind, part in parts.items() for name in alike if name in part}
            )
        yield {"parameters": group, "number": len(alike), "adapters": found}


def _of_each_fate(fates: Mapping[str, str]) -> Iterator[str]:
    """Each fate of trained modules, with its parameters; names that differ in depth only are joined."""
    for fate in dict.fromkeys(fates.values()):
        groups = dict.fromkeys(shape_of_name(name) for name, one in fates.items() if one == fate)
        yield f"{', '.join(groups)}: {fate}"


def _weight(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else "by layer"


def _groups(adapters: Mapping[str, LoraAdapter]) -> dict[tuple[str, tuple[int, int], str], list[str]]:
    """{(last part of the name, shape, kind): layer names}; of bare parameters the name is the parameter's."""
    groups: dict[tuple[str, tuple[int, int], str], list[str]] = {}
    known = {name: (adapter, shape) for adapter in adapters.values() for name, shape in adapter.shapes.items()}
    for name in sorted(known):
        adapter, (o, _, n) = known[name]
        kind, last = _KINDS.get(adapter.layouts.get(name), "convolution"), name.rpartition(".")[2]
        parameter = parameter_of(name, adapter.parameters)
        if parameter == name:
            kind, last = "parameter", ".".join(name.split(".")[-2:])
        elif parameter is not None:
            kind, last = "expert", parameter.rpartition(".")[2]
        groups.setdefault((last, (o, n), kind), []).append(name)
    return groups


def _of_layers(adapter: LoraAdapter, names: list[str]) -> dict[str, Any] | None:
    """Ranks, scales and norm of one adapter over like layers; None if it has none of them."""
    shapes = adapter.shapes
    found = [_of_layer(adapter.factors[name]) for name in names if name in shapes]
    if not found:
        return None
    ranks, scales, squares = zip(*found, strict=True)
    norm = sum(squares) ** 0.5
    return {"number": len(found), "ranks": sorted({*ranks}), "scales": sorted({*scales}), "norm": norm}


def _of_layer(f: Factors) -> tuple[int, float, float]:
    """r, s and ‖s·B·A‖_F² of a layer, whose factors are not kept."""
    return f.rank, f.s, f.s**2 * float(((f.B.mT @ f.B) * (f.A @ f.A.mT)).sum())


def _cell(one: Mapping[str, Any] | None, number: int) -> str:
    """The same as text, one number where they agree."""
    if one is None:
        return "absent"
    missing = "" if one["number"] == number else f" ({one['number']} of {number})"
    scales = {round(scale, 4) for scale in one["scales"]}
    return f"{_span(one['ranks'])}, {_span(scales)}, {one['norm']:.3g}{missing}"


def _span(values: Collection[float]) -> str:
    return f"{min(values):g}" if len(values) == 1 else f"{min(values):g}…{max(values):g}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=HORIZONTALS, show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def task_table(facts: Mapping[str, Mapping[str, Any]]) -> Table:
    """One line a task: its files and columns, rows, labels, metric and lengths as they were guessed."""
    table = _table("Tasks", "task", "text", "label", "rows", "labels", "metric", "words: median, 95 %, most")
    for name, fact in facts.items():
        data, text = fact["data"], fact["data"]["text"]
        rows = ", ".join(f"{count} {split}" for split, count in fact["rows"].items())
        labels = ", ".join(f"{label} {count}" for label, count in fact["labels"].items()) or "numbers"
        words = ", ".join(map(str, fact["words"]))
        columns = text if isinstance(text, str) else " + ".join(text)
        table.add_row(*map(escape, (name, columns, str(data["label"]), rows, labels[:200], fact["metric"], words)))
    return table


def served_facts(found: "Mapping[str, Sequence[Served]]") -> dict[str, Any]:
    """{adapter: {server: whether it takes the adapter, and what to change or set}}."""
    return {
        name: {one.server: {"takes": one.takes, "notes": list(one.notes)} for one in servers}
        for name, servers in found.items()
    }


def served_tables(facts: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """A line for each adapter and server."""
    table = _table("Servers", "adapter", "server", "takes it", "what to change or set")
    for name, servers in facts.items():
        for server, one in servers.items():
            table.add_row(escape(name), server, "yes" if one["takes"] else "no", escape("; ".join(one["notes"])))
    return [table]
