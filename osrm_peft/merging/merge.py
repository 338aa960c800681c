"""merge_adapters: every check first, then layer by layer; the base model is never loaded."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from osrm_peft.adapters.experts import owners
from osrm_peft.adapters.factors import Factors
from osrm_peft.devices import computing, in_threads
from osrm_peft.distributed import ALONE, Processes
from osrm_peft.io.tensors import all_finite
from osrm_peft.merging import advice
from osrm_peft.merging.emr_adapter import EMRAdapter, EMRLayer
from osrm_peft.merging.engine import Engine, rescalers
from osrm_peft.merging.inputs import Adapters, HeadPolicy
from osrm_peft.merging.lowrank import SMALL, Compressed, compress, compress_matrix, compress_outputs, svd_errors
from osrm_peft.merging.merged_adapter import MergedAdapter, MergedLayer
from osrm_peft.merging.modules import merge_modules
from osrm_peft.merging.plan import MergePlan, plan_merge
from osrm_peft.merging.request import MergeRequest
from osrm_peft.merging.rules import LeastSquares, best_scale, normal_equations, solve
from osrm_peft.merging.spaces import Layer, Space, enter
from osrm_peft.merging.statistics import Statistics
from osrm_peft.merging.weights import Weights

logger = logging.getLogger(__name__)

_TOO_LARGE = (
    "the merged weights would be NaN or Inf in float32: an adapter's weights, the weights of the merge or its scale "
    "are too large; lower them, or leave that adapter out"
)


def merge_adapters(
    adapters: Adapters,
    method: str,
    *,
    weights: Weights | LeastSquares = None,
    scale: float | LeastSquares | None = None,
    space: Space = "auto",
    rank: int | Literal["serving"] | None = None,
    cut: LeastSquares | None = None,
    heads: HeadPolicy = "per_task",
    modules: str | None = None,
    base_model: str | None = None,
    statistics: Statistics | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: bool = False,
    distributed: bool = False,
    **options: Any,
) -> MergedAdapter | EMRAdapter:
    """Merge LoRA adapters of one base model into one, from their own files.

    Args:
        adapters: {task: folder, Hub id, live PeftModel or LoraAdapter}. Their order does not matter. Ranks, alphas and
            target layers may differ; a layer that an adapter lacks counts as 0.
        method: a name of `METHODS`, such as `"task_arithmetic"`, `"ties"` or `"lore"`.
        weights: one a task, by name or in the order of `adapters`; 1 each by default, negative ones too. By name, a
            weight may itself map layer name patterns to numbers, the first that matches counts:
            `{"cola": 1, "sst2": {"*.layer.0.*": 0.5, "*": 1}}`. Or the rule `LeastSquares(features)`.
        scale: λ, which multiplies the merged direction; None: the paper's, or 1 with a rule's weights. Or the rule.
        space: `"weight"`, `"core"`, `"knots"`, or `"auto"`: the core where that is exact, else as in the paper.
        rank: largest rank of the result, at least 1; None keeps it exact. `"serving"`: the least of vLLM's, 8 to 512,
            that holds the exact result, with zero directions up to it. The manifest tells the energy kept.
        cut: what a rank keeps: None, ΔW's largest singular values; or by the rule `LeastSquares(features)` what loses
            least of the outputs on the tasks' features, Σ_t E‖(ΔW − cut) h_t‖².
        heads: `"per_task"` keeps each trained head, `"error"` refuses them.
        modules: what becomes of modules of the pre-trained model that adapters trained whole (`lm_head`, embeddings,
            norms): `"average"` by weights, Σ w_t M_t / Σ w_t (λ does not touch them), `"per_task"`, a task's name (that
            one's), or `"error"`; copies of frozen base weights, too. None: the average (EMR: per task) of equal copies.
        base_model: the base model of all adapters, where their configs name it differently (a local copy, say).
        statistics: {task: file or object} for Fisher (`collect_fisher`) and RegMean (`collect_gram`).
        seed: of the methods that draw (DARE).
        device: `"cpu"`, `"cuda"` or `"cuda:1"`, equal to rounding. None: the GPU of all live models, else the CPU.
        progress: show a bar over the layers.
        distributed: all processes of torch.distributed call this and share the layers; each gets the whole result.
        **options: the method's own, such as TIES' `density` or LoRE's `mu_ratio`.

    Returns:
        A MergedAdapter; for EMR, whose result differs by task, an EMRAdapter.

    Raises:
        TypeError: an option that the method does not have.
        ValueError: an unknown method or space, a number out of range, other weights or statistics than adapters,
            different base models or vocabularies, or an adapter that is not plain LoRA. Nothing was computed then.
    """
    request = MergeRequest(
        adapters, method, options, weights, scale, space, rank, cut, heads, modules, base_model, statistics, seed,
        device,
    )  # fmt: skip
    return merge(request, Processes.of(distributed), progress=progress)


def merge(request: MergeRequest, processes: Processes = ALONE, *, progress: bool = False) -> MergedAdapter | EMRAdapter:
    """Do what the request says; see `merge_adapters` for errors."""
    return execute(plan_merge(request), processes, progress=progress)


def execute(plan: MergePlan, processes: Processes = ALONE, *, progress: bool = False) -> MergedAdapter | EMRAdapter:
    """Merge as planned; each process merges its share of layers.

    Besides the result one layer is in memory at a time; where task vectors are small, one for each of torch's threads.
    """
    with computing(plan.device):
        return _execute(plan, processes, progress)


def _execute(plan: MergePlan, processes: Processes, progress: bool) -> MergedAdapter | EMRAdapter:
    share = processes.share(list(plan.inputs.shapes))
    bar = partial(tqdm, desc=f"merge {plan.method.name}", disable=not progress or not processes.is_main_process)
    if processes.is_main_process:
        advice.warn(advice.of_plan(plan))
    engine = plan.engine()
    if plan.method.per_task:
        return _masked(plan, engine, bar(share), processes)
    stacks = _Stacks(plan, engine, share)
    if plan.method.summarise is not None:
        # in the core a layer is small: all of them are kept for the passes over the model, in float32
        engine.summarise(stacks.kept() if plan.space == "core" else stacks, processes.sum_)
    weights = _guided_weights(plan, share, processes)

    def merge_layers() -> dict[str, tuple[MergedLayer, dict[str, Any]]]:
        found = _each(plan, lambda name: _merge_layer(plan, engine, stacks, name, weights[name]), share)
        return dict(zip(bar(share), found, strict=True))

    merged = _gathered(plan, merge_layers, processes)
    layers, reports = ({name: found[place] for name, found in merged.items()} for place in (0, 1))
    stopped = [name for name, report in reports.items() if report.get("converged") is False]
    if stopped:
        logger.warning(
            "%s had not converged on %d of %d layers when it stopped", plan.method.name, len(stopped), len(layers)
        )
    if processes.is_main_process:
        advice.warn(advice.of_result(plan, layers))
    manifest = plan.manifest() | {"report": {name: report for name, report in reports.items() if report}}
    if plan.weights_rule is not None:
        tasks = list(plan.inputs.adapters)
        manifest["chosen_weights"] = {
            name: dict(zip(tasks, weight.tolist(), strict=True)) for name, weight in weights.items()
        }
    trained = merge_modules(plan.inputs.adapters, plan.task_weights, plan.modules, plan.fates)
    own = {
        task: replace(one, modules=trained.own[task], copies=trained.own_copies[task])
        for task, one in plan.inputs.templates().items()
    }
    whole = {name.rpartition(".")[0] for name in trained.shared}  # one task's: LoRA of others on it has no place
    bare = owners(plan.inputs.parameters)
    layers = {name: layer for name, layer in layers.items() if bare.get(name, name) not in whole}
    return MergedAdapter(
        layers, plan.scale, plan.rank, own, plan.dtype, manifest, plan.padded, trained.shared, trained.copies,
        plan.device,
    )  # fmt: skip


def _gathered(plan: MergePlan, merge: Callable[[], dict[str, Any]], processes: Processes) -> dict[str, Any]:
    """{layer: result} of all processes, in the order of the layers."""
    found = {name: value for part in processes.gather_results(merge) for name, value in part.items()}
    return {name: found[name] for name in plan.inputs.shapes}


def _each(plan: MergePlan, work: Callable[[str], Any], names: list[str]) -> Iterator[Any]:
    """work(name) of each layer; of several at a time where nothing of a layer is as large as its weight."""
    small = plan.space != "weight" and plan.statistics is None and plan.features is None
    small = small and not plan.method.full_rank(plan.options) and plan.device.type == "cpu"
    ranks = (plan.inputs.rank_sum(name) for name in names)
    return in_threads(work, names) if small and max(ranks, default=0) <= SMALL else map(work, names)


class _Stacks:
    """This process' layers of all adapters in the plan's space, made one at a time; can be iterated again and again."""

    def __init__(self, plan: MergePlan, engine: Engine, share: list[str]) -> None:
        self.plan, self.engine, self.share = plan, engine, share

    def layer(self, name: str) -> Layer:
        layer = enter(self.plan.space, self.plan.factors(name))
        # of a small core the bases are the device's work, and the method is the CPU's
        if layer.left is not None and max(layer.stack.shape[1:]) <= SMALL:
            layer = layer._replace(stack=layer.stack.cpu())
        return layer._replace(stack=self.engine.prepare(layer.stack, name))

    def kept(self) -> list[Tensor]:
        """All stacks at once, float32: for small ones."""
        if not self.share:
            return list(self)
        return list(_each(self.plan, lambda name: self.layer(name).stack.float(), self.share))

    def __iter__(self) -> Iterator[Tensor]:
        if not self.share:  # more processes than layers
            return iter([torch.zeros(len(self.plan.inputs.adapters), 0, 0)])
        return (self.layer(name).stack for name in self.share)


def _merge_layer(
    plan: MergePlan, engine: Engine, stacks: _Stacks, name: str, weights: Tensor
) -> tuple[MergedLayer, dict[str, Any]]:
    statistics = None if plan.statistics is None else plan.statistics(name)
    report: dict[str, Any] = {}
    offset: Factors | None = None
    rank = None if plan.cuts_by_features else plan.rank
    try:
        if plan.space == "factors":
            exact = engine(plan.factors(name), weights.to(plan.device), statistics)
            exact = Factors(exact.A, exact.s * exact.B)
            direction = Compressed(exact, 1.0) if rank is None else compress(exact.B, exact.A, rank)
        else:
            layer = stacks.layer(name)
            _check_finite(layer.stack)
            weights = weights.to(layer.stack.device)
            merged = engine.merged(layer.stack, weights.to(layer.stack.dtype), statistics)
            _check_finite(merged.direction)
            report = dict(merged.report)
            cut = rank if merged.offset is None else None  # with an offset, the rank is of their sum
            if merged.finish is not None:
                direction = compress_matrix(merged.finish(layer.dense(merged.direction)), cut)
            elif merged.offset is None or layer.left is None or layer.right is None:
                by = None if cut is None or plan.method.cut_by is None else plan.method.cut_by(layer.stack, weights)
                direction = layer.compress(merged.direction, cut, by)
            else:  # both in the same bases: A is shared
                A, left = layer.right.mT.float(), layer.left
                direction = Compressed(Factors(A, left @ merged.direction.to(left)), 1.0)
                offset = Factors(A, left @ merged.offset.to(left))
            if merged.offset is not None and offset is None:
                offset = layer.compress(merged.offset).factors
        if plan.cuts_by_features and plan.features is not None and plan.rank is not None:
            direction = compress_outputs(direction.factors, plan.features(name), plan.rank)
        _check_size(plan.scale, direction.factors, offset)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error
    except svd_errors() as error:
        raise ValueError(
            f"layer {name!r}: its singular values were not found ({error}): are all weights of a usual size? "
            "method='concat' needs none"
        ) from error
    if plan.chooses_scale and plan.features is not None:
        fixed = None if offset is None else (offset.B, offset.A)
        found = direction.factors
        scale = best_scale((found.s * found.B, found.A), fixed, plan.products(name), plan.features(name))
        direction = Compressed(Factors(found.A, scale * found.B, found.s), direction.energy_kept)
        report["scale"] = scale
    kept = _kept(direction.factors)
    if offset is not None:
        offset = replace(_kept(offset), A=kept.A) if offset.A is direction.factors.A else _kept(offset)
    return MergedLayer(direction._replace(factors=kept), offset), report


def _check_finite(tensor: Tensor) -> None:
    if not all_finite(tensor):
        raise ValueError(_TOO_LARGE)


def _check_size(scale: float, direction: Factors, offset: Factors | None) -> None:
    """The layer's entries, at most Σ ‖row of s·B‖ ‖column of A‖, must have a place in float32."""
    most = 0.0
    for factor, one in ((scale, direction), (1.0, offset)):
        if one is not None and one.rank:
            B, A = one.B.double().norm(dim=1).max(), one.A.double().norm(dim=0).max()
            most += abs(factor * one.s) * float(B * A)
    if not most <= torch.finfo(torch.float32).max:  # NaN, too
        raise ValueError(_TOO_LARGE)


def _kept(factors: Factors) -> Factors:
    """Solved in float64 on the device, kept on the CPU as it will be written at most."""
    return Factors(factors.A.to("cpu", torch.float32), factors.B.to("cpu", torch.float32), factors.s)


def _guided_weights(plan: MergePlan, share: list[str], processes: Processes) -> dict[str, Tensor]:
    """{layer: (T,) weights}: as given, or solved from the features."""
    if plan.weights_rule is None or plan.features is None:
        return plan.weights
    features = plan.features

    def equation(name: str) -> tuple[Tensor, Tensor]:
        normal, right = normal_equations(plan.products(name), features(name))
        return normal.cpu(), right.cpu()

    equations = _gathered(plan, lambda: {name: equation(name) for name in share}, processes)
    if not plan.weights_rule.shared:
        return {name: solve(*equation) for name, equation in equations.items()}
    normals, rights = zip(*equations.values(), strict=True)
    shared = solve(sum(normals[1:], normals[0]), sum(rights[1:], rights[0]))
    return dict.fromkeys(plan.inputs.shapes, shared)


def _masked(plan: MergePlan, engine: Engine, names: Iterable[str], processes: Processes) -> EMRAdapter:
    """A method whose result differs by task: shared vector and masks a layer, and the rescalers over all layers."""

    def one(name: str) -> tuple[EMRLayer, Tensor, Tensor]:
        stack, weights = enter(plan.space, plan.factors(name)).stack, plan.weights[name].to(plan.device)
        unified, masks, full, kept = engine.masked(stack, weights)
        try:
            _check_finite(stack)
            _check_finite(plan.scale * unified)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        return EMRLayer.pack(unified.to("cpu", plan.dtype), masks.cpu()), full.cpu(), kept.cpu()

    found = _gathered(plan, lambda: {name: one(name) for name in names}, processes)
    layers = {name: layer for name, (layer, _, _) in found.items()}
    full, kept = (torch.stack([sums[place] for sums in found.values()]).sum(0) for place in (1, 2))
    scales = rescalers(full, kept)
    trained = merge_modules(plan.inputs.adapters, plan.task_weights, plan.modules, plan.fates)
    tasks = {
        task: replace(
            one,
            modules={**trained.shared, **trained.own[task]},
            copies={**trained.copies, **trained.own_copies[task]},
        )
        for task, one in plan.inputs.templates().items()
    }
    return EMRAdapter(layers, dict(zip(tasks, scales, strict=True)), plan.scale, tasks, plan.manifest())
