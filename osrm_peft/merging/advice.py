"""What a user should know of a merge that is no error: each text has a remedy, and none is of the usual merge."""

import warnings
from collections.abc import Iterable, Mapping

from osrm_peft.merging.lowrank import squared_values, svd_errors
from osrm_peft.merging.merged_adapter import MergedLayer
from osrm_peft.merging.methods.registry import Method
from osrm_peft.merging.overlap import ALIKE, overlaps, sharing
from osrm_peft.merging.plan import MergePlan

_FAR = 4.0  # times the default scale, or a part of it
_LOOKED_AT = 5  # layers
_RANK = 16  # of the remedy for full rank


def warn(texts: Iterable[str]) -> None:
    """One warning a text, which Python shows once."""
    for text in texts:
        warnings.warn(text, stacklevel=2)


def of_plan(plan: MergePlan) -> list[str]:
    """What a planned merge of adapters shows before any work."""
    adapters = plan.inputs.adapters
    found = of_method(plan.method, len(adapters), None if plan.chooses_scale or plan.weights_rule else plan.scale)
    unset = [task for task, adapter in adapters.items() if adapter.initialized is False]
    if unset:
        found.append(
            f"{listed(unset)}: made with OSRMLoraConfig, but OSRM never chose A, so OSRM does nothing for this merge: "
            "train anew with OSRMCallback() among the Trainer's callbacks"
        )
    return [*found, *_shared_a(plan)]


def of_method(method: Method, inputs: int, scale: float | None) -> list[str]:
    """What a method says of so many inputs and of a scale that was given."""
    found = [method.note(inputs)]
    if scale is not None and not method.scale / _FAR <= scale <= method.scale * _FAR:
        found.append(
            f"scale={scale:g} is far from {method.scale:g}, the default of {method.name}: leave it out if that is not "
            "meant"
        )
    return [text for text in found if text]


def of_result(plan: MergePlan, layers: Mapping[str, MergedLayer] | None = None) -> list[str]:
    """What the size of a result shows; with its layers, also what a lower rank would keep."""
    shapes = plan.inputs.shapes
    widest, summed = max(map(plan.output_rank, shapes)), max(map(plan.inputs.rank_sum, shapes))
    if plan.method.per_task or plan.rank is not None or plan.padded > 1 or widest <= max(_RANK, summed):
        return []
    kept = [_kept(layer) for layer in (layers or {}).values()]
    known = [share for share in kept if share is not None]
    energy = f" and keeps at least {min(known):.1%} of a layer's energy" if known and len(known) == len(kept) else ""
    small = plan.output_bytes() * _RANK / widest
    return [
        f"the result has rank {widest}, {plan.output_bytes() / 1e6:.1f} MB (the adapters' ranks sum to {summed}): "
        f"rank={_RANK} writes {small / 1e6:.1f} MB{energy}"
    ]


def _kept(layer: MergedLayer) -> float | None:
    """The share of its squared norm that a layer keeps at rank 16; None where that is not known without an SVD."""
    values = squared_values(layer.direction.factors) if layer.offset is None else None
    if values is None:
        return None
    return float(values[:_RANK].sum() / values.sum()) if values.sum() > 0 else 1.0


def _shared_a(plan: MergePlan) -> list[str]:
    """Which adapters have A that span the same directions, judged by a few layers."""
    names = list(plan.inputs.shapes)
    layers = names[:: max(1, -(-len(names) // _LOOKED_AT))]
    try:
        alike = sharing(list(plan.inputs.adapters), [overlaps(plan.inputs.products(layer))[0] for layer in layers])
    except svd_errors():  # the merge itself stops there, and names the layer
        return []
    if not alike:
        return []
    return [
        f"{listed(alike)} share A: their A span the same directions of the inputs (at least {ALIKE:g} of each in the "
        f"other, in most of {len(layers)} layers), so nothing keeps the tasks apart. Sums and averages are safe: they "
        "sum B. To keep tasks apart, train each with OSRM, or with a seed of its own"
    ]


def listed(tasks: list[str]) -> str:
    """Their names, eight at most."""
    shown = ", ".join(map(repr, tasks[:8]))
    return shown if len(tasks) <= 8 else f"{shown} and {len(tasks) - 8} more"
