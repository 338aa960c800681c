"""collect_fisher: the exact diagonal Fisher information of the target layers' weights, and its file."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from osrm_peft.checks import choice, integer
from osrm_peft.devices import full_float32
from osrm_peft.distributed import ALONE, execution_device
from osrm_peft.features.batches import Batch, samples
from osrm_peft.features.hooks import preserve_state
from osrm_peft.hub.sources import local_file
from osrm_peft.io.json import parse_json
from osrm_peft.io.places import new_file
from osrm_peft.io.yaml import check_fields
from osrm_peft.models.layers import base_name, base_of, target_layers, unwrapped

if TYPE_CHECKING:
    from peft import LoraConfig

Labels = Literal["expected", "true"]
_FORMAT = 1


@dataclass
class DiagonalFisher:
    """Diagonal Fisher information of one task's fine-tuned model.

    Attributes:
        task: the task's name.
        base_model: name or path of the pre-trained model.
        num_samples: how many samples the mean is over.
        labels: `"expected"` or `"true"`, see `collect_fisher`.
        seed: the seed that drew the samples, for the record.
        adapter_sha256: sha256 of the adapter's weight file, where it is known.
        layers: {layer name in the base model: (o, n) float32, ≥ 0}.
    """

    task: str
    base_model: str
    num_samples: int
    labels: str
    seed: int | None = None
    adapter_sha256: str | None = None
    layers: dict[str, Tensor] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        header: dict[str, Any] = {"task": self.task, "base_model": self.base_model, "k": self.num_samples}
        header |= {"labels": self.labels, "seed": self.seed, "adapter_sha256": self.adapter_sha256, "format": _FORMAT}
        with new_file(path) as partial:
            save_file(self.layers, partial, {"format": "pt", "osrm_peft_fisher": json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path) -> "DiagonalFisher":
        """Read a file written by `save`, here or on the Hub (`owner/name[@revision][:FILE]`).

        Raises:
            FileNotFoundError: neither a file nor a Hub repository with one.
            ValueError: not a Fisher file, damaged, or of a newer format.
        """
        remedy = "write it with `osrm-peft statistics --kind fisher`"
        path = local_file(str(path), ".fisher.safetensors", "Fisher file", remedy)
        try:
            with safe_open(path, framework="pt") as file:
                header = parse_json((file.metadata() or {}).get("osrm_peft_fisher", "null"))
                layers = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            if integer("format", header.pop("format"), 1) > _FORMAT:
                raise ValueError("of a newer format: upgrade osrm_peft")
            header["num_samples"] = header.pop("k")
            check_fields("its header", header, cls, ("layers",))
            flat = [name for name, F in layers.items() if F.dim() != 2 or not F.is_floating_point()]
            if flat or "layers" in header:
                raise ValueError(f"{(flat or ['layers'])[0]} must be a matrix of floats")
            bad = [name for name, F in layers.items() if not (F.isfinite().all() and bool((F >= 0).all()))]
            if bad:
                raise ValueError(f"{bad[0]} must hold finite numbers of at least 0")
            return cls(**header, layers=layers)
        except (SafetensorError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(
                f"{path} is not a Fisher file, or damaged ({type(error).__name__}: {error}): "
                "write it with `osrm-peft statistics --kind fisher`"
            ) from error


def collect_fisher(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    *,
    task: str,
    target_modules: "list[str] | str | LoraConfig | None" = None,
    labels: Labels = "expected",
    num_samples: int = 1000,
    seed: int | None = None,
    progress: bool = True,
) -> DiagonalFisher:
    r"""The exact diagonal Fisher information of each target layer's weights W₀ + τ, on the fine-tuned model.

        F = 1/N Σ_x E_y (∂ log p(y|x) / ∂W)²,   entry by entry (Matena & Raffel 2022, Eq. 3–4)

    The gradient of each example is squared on its own, so the batch size does not matter. For classification p is the
    softmax of the logits; for one logit (regression) a normal distribution of unit variance around it. Costs one
    backward pass a class. The model is left as it was: hooks gone, train mode and gradients untouched.

    Args:
        model: the fine-tuned model with `.logits` of shape (b, classes): a PeftModel with its adapter on, or full
            weights; runs on the device it is on.
        loader: batches as the model takes them; `labels` are needed for labels="true" only.
        task: the task's name, for the record.
        target_modules: which `nn.Linear` layers, see `layers.target_layers`.
        labels: `"expected"`, over the model's own prediction as in the paper, or `"true"`, the batch's labels.
        num_samples: how many samples at most.
        seed: the seed that drew the samples, for the record.

    Raises:
        ValueError: unknown `labels`, none in the batch, no target layer, no sample, or logits of another shape.
    """
    choice("labels", labels, get_args(Labels))
    num_samples = integer("num_samples", num_samples, 1)
    model = unwrapped(model)
    layers = target_layers(model, target_modules)
    base = base_of(model)
    device = execution_device(base)
    squares: dict[str, Tensor] = {}
    seen = 0
    if labels == "true":
        _check_known_labels(loader, base, task)
    with _watch(base, layers) as passes:
        for given in samples(loader, num_samples, ALONE, task=task, what=f"Fisher of {task}", progress=progress):
            batch = given.to(device)
            passes.clear()
            _add_squares(squares, _scores_of(base, batch, labels, task), passes)
            seen += batch.count
    return DiagonalFisher(task, base_name(base), seen, labels, seed, layers=_mean(squares, seen))


def _mean(squares: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """{layer: F} of the sums over `count` samples."""
    means = {name: (total / count).cpu() for name, total in squares.items()}
    for name, F in means.items():
        if not F.isfinite().all():
            raise ValueError(f"the Fisher information of layer {name!r} has NaN or Inf: is the adapter sound?")
    return means


def _check_known_labels(loader: Any, base: nn.Module, task: str) -> None:
    """Check the labels before the first pass: those of a list of batches, or of a column of the loader's data set."""
    rows, classes = getattr(loader, "dataset", None), getattr(getattr(base, "config", None), "num_labels", None)
    columns = [name for name in ("labels", "label") if name in (getattr(rows, "column_names", None) or ())]
    known = [rows[columns[0]][:]] if rows is not None and columns else []
    if isinstance(loader, (list, tuple)):
        known = [batch.get("labels", batch.get("label", [])) for batch in loader if isinstance(batch, Mapping)]
    for labels in known:
        try:
            values = torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError):  # texts, which the loader turns into numbers
            return
        _check_labels(values, classes if isinstance(classes, int) else None, task)


def _check_labels(truth: Tensor, classes: int | None, task: str) -> None:
    """Raise ValueError for a label that is no class, or in a regression no number; `classes` is None if unknown."""
    way_out = "correct the labels or the model's head, or take labels='expected', which needs none"
    values = truth.detach().reshape(-1).double()
    wrong = values[~values.isfinite()]
    bounds = "a finite number"
    if not len(wrong) and classes is not None and classes > 1:
        wrong = values[(values != values.round()) | (values < 0) | (values >= classes)]
        bounds = f"a class, 0 … {classes - 1}"
    if len(wrong):
        raise ValueError(f"labels='true': label {wrong[0].item():g} of task {task!r} must be {bounds}: {way_out}")


def _scores_of(base: nn.Module, batch: Batch, labels: str, task: str) -> list[tuple[Tensor, Tensor]]:
    """Run the model on a batch; its scores, see `_scores`."""
    if batch.positions.samples is not None:
        raise ValueError("Fisher squares the gradient of each sample: give rows of one sample, not packed ones")
    truth = batch.labels if labels == "true" else None
    if truth is not None:
        _check_labels(truth, None, task)
    return _scores(base(**batch.inputs).logits, truth, labels, task)


def _scores(logits: Tensor, truth: Tensor | None, labels: str, task: str) -> list[tuple[Tensor, Tensor]]:
    """[(log p(y|x) up to a constant (b,), weight of its squared gradient (b,))], one for each y."""
    if logits.dim() != 2:
        raise ValueError(f"logits must be (samples, classes), got {tuple(logits.shape)}: classification or regression")
    if labels == "true" and truth is None:
        raise ValueError("labels='true' needs labels in the batches: give them, or labels='expected'")
    logits = logits.float()
    if truth is not None:
        if truth.numel() != len(logits):
            raise ValueError(f"labels='true': {tuple(truth.shape)} labels of {len(logits)} samples: give one each")
        _check_labels(truth, logits.shape[1], task)
    if logits.shape[1] == 1:  # ∂ log N(y; f, 1) = (y − f) ∂f, and E(y − f)² = 1
        f = logits[:, 0]
        return [(f, torch.ones_like(f) if truth is None else (truth.to(f).reshape(len(f)) - f).detach().square())]
    log_p = logits.log_softmax(1)
    if truth is not None:
        return [(log_p.gather(1, truth.long().reshape(-1, 1))[:, 0], torch.ones(len(log_p), device=log_p.device))]
    return [(log_p[:, y], log_p[:, y].detach().exp()) for y in range(log_p.shape[1])]


def _add_squares(total: dict[str, Tensor], scores: list[tuple[Tensor, Tensor]], passes: dict) -> None:
    """Add Σ_b weight_b (Σ_s δ_bs h_bsᵀ)² of each layer, δ the gradient at its outputs, h its inputs."""
    outputs = [output for _, output in passes.values()]
    for place, (score, weight) in enumerate(scores):
        weights = weight.tolist()  # a GPU waits once
        gradients = torch.autograd.grad(
            score.sum(), outputs, retain_graph=place + 1 < len(scores), materialize_grads=True
        )
        for (name, (h, _)), delta in zip(passes.items(), gradients, strict=True):
            b = len(weights)
            h, delta = h.reshape(b, -1, h.shape[-1]).float(), delta.reshape(b, -1, delta.shape[-1]).float()
            if name not in total:
                total[name] = torch.zeros(delta.shape[2], h.shape[2], device=h.device)
            with full_float32(h.device):
                for w, d, x in zip(weights, delta, h, strict=True):  # one at a time: one o×n matrix in memory
                    total[name].addcmul_(gradient := d.mT @ x, gradient, value=w)


@contextmanager
def _watch(base: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """{layer: (its input, its output)} of the last forward pass; outputs take gradients even if no parameter does.

    The model is in eval mode, and as it was when the block ends.
    """
    passes: dict[str, tuple[Tensor, Tensor]] = {}

    def hook_for(name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
            if name in passes:
                raise ValueError(f"layer {name!r} runs twice in one pass: leave it out of target_modules")
            output = output if output.requires_grad else output.requires_grad_()
            passes[name] = ((args[0] if args else next(iter(kwargs.values()))).detach(), output)
            return output

        return hook

    with ExitStack() as stack:
        stack.enter_context(preserve_state(base))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code would not see the hooks
        for name, module in layers.items():
            stack.callback(module.register_forward_hook(hook_for(name), with_kwargs=True).remove)
        yield passes
