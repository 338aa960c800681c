"""A loader's batches, cut to the wanted number of samples and shared among processes."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler, RandomSampler
from tqdm.auto import tqdm

from osrm_peft.distributed import Processes
from osrm_peft.features.padding import TokenMask, find_token_mask


@dataclass(frozen=True)
class Batch:
    """A batch as the model takes it, cut to the wanted number of samples.

    Attributes:
        inputs: the model's inputs without labels.
        labels: the batch's labels, if it has them.
        positions: which positions are real, and to which sample each belongs.
        count: how many samples it has.
        is_filler: True for a repeated batch that only keeps this process in step; its inputs are not summed up.
    """

    inputs: dict[str, Any]
    labels: Tensor | None
    positions: TokenMask
    count: int
    is_filler: bool = False

    def to(self, device: torch.device) -> "Batch":
        """The same batch on the device, as tensors whose changes are counted (inference mode counts none)."""

        def moved(value: Any) -> Any:
            value = value.clone() if isinstance(value, Tensor) and value.is_inference() else value
            return value.to(device) if isinstance(value, Tensor) else value

        positions = replace(self.positions, keep=moved(self.positions.keep), samples=moved(self.positions.samples))
        inputs = {key: moved(value) for key, value in self.inputs.items()}
        return replace(self, inputs=inputs, labels=moved(self.labels), positions=positions)

    def only(self, tokens: str) -> "Batch":
        """The same batch with the positions of its prompts, of its completions (label not −100), or with all.

        Raises:
            ValueError: labels that are not one a token.
        """
        if tokens == "all":
            return self
        ids = self.inputs.get("input_ids")
        if self.labels is None or ids is None or self.labels.shape != ids.shape:
            shape = "no labels" if self.labels is None else f"labels of shape {tuple(self.labels.shape)}"
            raise ValueError(
                f"tokens={tokens!r} needs a label for each token, −100 in the prompt, and the batch has {shape}: give "
                "batches as for training a causal language model, or leave tokens out"
            )
        wanted = (self.labels != -100) == (tokens == "completion")
        keep = self.positions.keep
        return replace(self, positions=replace(self.positions, keep=wanted if keep is None else keep & wanted))


TOKENS = ("all", "prompt", "completion")


def check_rereadable(loader: Any, why: str) -> None:
    """Raise ValueError if the loader gives other samples each time it is read."""
    if isinstance(loader, Iterator) or isinstance(getattr(loader, "sampler", None), RandomSampler):
        raise ValueError(f"{why}: give a DataLoader without shuffle, or a list of batches")


def samples(
    loader: Iterable[Mapping[str, Any]], k: int, processes: Processes, *, task: str, what: str, progress: bool
) -> Iterator[Batch]:
    """This process' batches, with at most k samples over all processes; each process gets equally many batches.

    Raises:
        ValueError: the loader is split over processes already; or, at the end: it gave no sample, or processes read
            different samples.
    """
    if processes.num_processes > 1:
        check_rereadable(loader, "several processes share the samples of one loader, which must be the same everywhere")
        from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard

        if isinstance(loader, (DataLoaderShard, DataLoaderDispatcher)) or isinstance(
            getattr(loader, "sampler", None), DistributedSampler
        ):
            raise ValueError(
                f"the loader of task {task!r} is split over the processes already (accelerator.prepare, or a "
                "DistributedSampler), which may repeat samples: give the loader as it was before, it is shared out here"
            )
    seen, waiting, digest = 0, [], hashlib.sha256()
    with tqdm(total=k, desc=what, unit="sample", disable=not progress or not processes.is_main_process) as bar:
        for given in loader:
            batch = _cut(given, k - seen)
            if batch.count == 0:
                continue
            seen += batch.count
            if processes.num_processes > 1:
                sums = {
                    key: float(value.double().sum()) for key, value in batch.inputs.items() if isinstance(value, Tensor)
                }
                digest.update(repr((batch.count, sums)).encode())
            waiting.append(batch)
            if len(waiting) == processes.num_processes or seen >= k:
                yield _mine(waiting, processes)
                waiting = []
            bar.update(batch.count)
            if seen >= k:
                break
        if waiting:
            yield _mine(waiting, processes)
    everyone = processes.gather((seen, digest.hexdigest()))
    if len(set(everyone)) > 1:
        counts = [count for count, _ in everyone]
        raise ValueError(
            f"the processes' loaders of task {task!r} gave {counts} samples, or other ones: all must read the same"
        )
    if seen == 0:
        raise ValueError(f"the loader of task {task!r} gave no sample: is its dataset empty?")


def _mine(batches: list[Batch], processes: Processes) -> Batch:
    """This process' batch, of at most one for each; a filler (the last batch again) where there are too few."""
    return batches[processes.rank] if processes.rank < len(batches) else replace(batches[-1], is_filler=True)


def _cut(batch: Mapping[str, Any], most: int) -> Batch:
    """The first `most` samples of a batch."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"the loader must give dicts as the model takes them, got a {type(batch).__name__}")
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor) and value.dim() > 0}
    # Other tensors may be longer: cu_seq_lens of packed rows, the patches of all images.
    main = [key for key in tensors if key in ("input_ids", "inputs_embeds", "attention_mask")] or list(tensors)
    rows = max((len(tensors[key]) for key in main), default=0)
    of_rows = {key for key, value in tensors.items() if len(value) == rows and not key.startswith("cu_seq_lens")}
    cut = {key: value[:most] if key in of_rows else value for key, value in tensors.items()}
    inputs = {key: value for key, value in {**batch, **cut}.items() if key not in ("label", "labels")}
    positions, count = find_token_mask(inputs, min(rows, most), most)
    return Batch(inputs, cut.get("labels", cut.get("label")), positions, count)
