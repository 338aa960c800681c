"""collect_features, collect_gram: the inputs of the target layers, summed up; the model left as it was."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from osrm_peft.checks import choice, integer
from osrm_peft.features import TaskFeatures
from osrm_peft.layers import base_name, base_of, check_unmerged, linear_layer, target_layers, unwrapped, weight_hash
from osrm_peft.moments import STATISTICS, FeatureMoments


def collect_features(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    *,
    task: str,
    target_modules: list[str] | str | LoraConfig | None = None,
    statistic: str = "token",
    k: int = 100,
    seed: int | None = None,
    reference: bool = False,
    progress: bool = True,
) -> TaskFeatures:
    """Run up to k samples through the pre-trained model and sum up the inputs of the target layers.

    Padding (0 in the batch's `attention_mask`) never enters; a tensor that several layers receive is counted once. A
    PeftModel runs with its adapter off. The model is left as it was: hooks gone, train mode and gradients untouched.

    Args:
        model: the pre-trained model, or a PeftModel around it; runs on the device it is on.
        loader: batches as the model takes them (dicts of tensors, samples along the first axis); labels are ignored.
        task: the task's name, for the record.
        target_modules: which layers, see `layers.target_layers`.
        statistic: `"mean"`, `"sample"` or `"token"`, see FeatureMoments.
        k: how many samples at most (the paper uses 100).
        seed: the seed that drew the samples, for the record.
        reference: count padding in and keep the mean only, as the released OSRM code does (it pads to a fixed length).

    Raises:
        ValueError: unknown statistic, k below 1, no target layer, or a loader without a sample.
    """
    choice("statistic", statistic, STATISTICS)
    if reference and statistic != "mean":
        raise ValueError(f"reference=True keeps one mean a task: use statistic='mean', not {statistic!r}")
    return _collect(
        model, loader, task, target_modules, k, seed, progress, statistic=statistic, reference=reference, adapted=False
    )


def collect_gram(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    *,
    task: str,
    target_modules: list[str] | str | LoraConfig | None = None,
    k: int = 1000,
    seed: int | None = None,
    progress: bool = True,
) -> TaskFeatures:
    """The Gram matrices of RegMean: second moments of the target layers' inputs, on the *fine-tuned* model.

    The same object and file as `collect_features` gives, over every non-padding token, with the adapter on.

    Args:
        model: the fine-tuned model: a PeftModel with its adapter active, or full weights; runs on the device it is on.
        loader, task, target_modules, seed, progress: see `collect_features`.
        k: how many samples at most (the paper uses up to 1,000).

    Raises:
        ValueError: k below 1, no target layer, or a loader without a sample.
    """
    return _collect(
        model, loader, task, target_modules, k, seed, progress, statistic="token", reference=False, adapted=True
    )


def _collect(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    task: str,
    target_modules: list[str] | str | LoraConfig | None,
    k: int,
    seed: int | None,
    progress: bool,
    *,
    statistic: str,
    reference: bool,
    adapted: bool,
) -> TaskFeatures:
    k = integer("k", k, 1)
    model = unwrapped(model)
    layers = target_layers(model, target_modules)
    if not adapted:
        check_unmerged(layers)
    base = base_of(model)
    device = next(base.parameters()).device
    collector = _Collector({name: linear_layer(name, module).in_features for name, module in layers.items()}, statistic)
    seen = 0
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(undisturbed(base))
        if isinstance(model, PeftModel) and not adapted:
            stack.enter_context(model.disable_adapter())
        stack.enter_context(_watch_inputs(layers, collector.see))
        for inputs, rows, _ in samples(loader, k, device, task=task, what="features", progress=progress):
            collector.start(None if reference else inputs.get("attention_mask"))
            base(**inputs)
            seen += rows
    for name, moments in collector.moments.items():
        if not moments.mean().isfinite().all():
            raise ValueError(f"layer {name!r} receives NaN or Inf: is the model's checkpoint sound?")
    names = list(collector.moments)
    return TaskFeatures(
        task, base_name(base), weight_hash(model, names), statistic, seen, seed, reference, adapted,
        layers=collector.moments,
    )  # fmt: skip


def samples(
    loader: Iterable[Mapping[str, Any]], k: int, device: torch.device, *, task: str, what: str, progress: bool
) -> Iterator[tuple[dict[str, Any], int, Tensor | None]]:
    """Batches of at most k samples together: (inputs of the model on the device, how many, their labels).

    Raises:
        ValueError: at the end, if there was none.
    """
    seen = 0
    with tqdm(total=k, desc=f"{what} of {task}", unit="sample", disable=not progress) as bar:
        for batch in loader:
            inputs, rows, labels = _model_inputs(batch, k - seen, device)
            if rows == 0:
                continue
            yield inputs, rows, labels
            seen += rows
            bar.update(rows)
            if seen >= k:
                break
    if seen == 0:
        raise ValueError(f"the loader of task {task!r} gave no sample: is its dataset empty?")


def _model_inputs(
    batch: Mapping[str, Any], most: int, device: torch.device
) -> tuple[dict[str, Any], int, Tensor | None]:
    """The first `most` samples of a batch, without labels, on the device; how many they are; and their labels."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"the loader must give dicts as the model takes them, got a {type(batch).__name__}")
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor) and value.dim() > 0}
    rows = max(map(len, tensors.values()), default=0)
    cut = {key: value[:most].to(device) if len(value) == rows else value.to(device) for key, value in tensors.items()}
    inputs = {key: value for key, value in {**batch, **cut}.items() if key not in ("label", "labels")}
    return inputs, min(rows, most), cut.get("labels", cut.get("label"))


class _Collector:
    """Feeds layer inputs to FeatureMoments, each distinct tensor once."""

    def __init__(self, widths: dict[str, int], statistic: str) -> None:
        self.widths, self.statistic = widths, statistic
        self.moments: dict[str, FeatureMoments] = {}
        self.leaders: dict[str, str] = {}  # {layer: the first layer that receives the same tensor}
        self.start(None)

    def start(self, attention_mask: Tensor | None) -> None:
        """A new forward pass with this padding mask."""
        self.keep = None if attention_mask is None else attention_mask.bool()
        self.last: tuple[Tensor, int, str] | None = None  # kept alive, so `is` can be trusted

    def see(self, name: str, x: Tensor) -> None:
        """One layer's input; counted if no other layer has received this very tensor just before."""
        shared = self.last is not None and x is self.last[0] and x._version == self.last[1]
        leader = self.last[2] if shared and self.last is not None else name
        if self.leaders.setdefault(name, leader) != leader:
            raise RuntimeError(
                f"layer {name!r} shared its input with another layer in some batches and not in others: "
                "collect its features on its own (target_modules with this layer alone)"
            )
        if leader != name:
            self.moments[name] = self.moments[leader]
            return
        keep = self.keep
        if keep is not None and x.dim() == 2 and len(x) == keep.numel() != len(keep):
            x = x.view(*keep.shape, -1)  # tokens of all samples in one row
        if keep is not None and (x.shape[:2] != keep.shape if x.dim() == 3 else len(x) != len(keep)):
            raise ValueError(
                f"layer {name!r} receives inputs of shape {tuple(x.shape)}, but the attention_mask is "
                f"{tuple(keep.shape)}: padding cannot be told apart; leave the layer out of target_modules"
            )
        if name not in self.moments:
            self.moments[name] = FeatureMoments(self.statistic, self.widths[name])
        self.moments[name].add_(x, keep)
        self.last = (x, x._version, name)


@contextmanager
def _watch_inputs(layers: Mapping[str, nn.Module], on_input) -> Iterator[None]:
    """Call on_input(name, x) before each forward of `layers`; the hooks are gone when the block ends."""

    def hook_for(name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            on_input(name, (args[0] if args else next(iter(kwargs.values()))))

        return hook

    handles = [module.register_forward_pre_hook(hook_for(name), with_kwargs=True) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each submodule has its mode, and each parameter its requires_grad, again.

    (PEFT's disable_adapter switches requires_grad of an adapter's parameters back on when it ends.)
    """
    modes = {module: module.training for module in model.modules()}
    grads = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, grad in grads.items():
            parameter.requires_grad_(grad)
