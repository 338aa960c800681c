"""The pictures of the documentation that no experiment writes: `make pictures`, half a minute.

    python docs/pictures.py [--out docs/pictures]

choosing_a.png: what OSRM does to A, from features of the packaged model. report.png: the page of `osrm-peft report
docs/results/minilm/scales`, in a browser (chromium or google-chrome).
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from osrm_peft import (
    OSRMLoraConfig,
    TaskFeatures,
    collect_features,
    initialize_osrm_weights,
    list_tasks,
    load_adapter,
    load_base,
    load_task,
    load_tokenizer,
    tokenize,
)
from osrm_peft.io.places import new_file
from osrm_peft.osrm.others import OtherTasks

ROOT = Path(__file__).parent.parent
TASK, BLOCK = "tweets", 4
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["query"], "task_type": "SEQ_CLS"}
KINDS: dict[str, dict[str, Any] | None] = {
    "plain LoRA's random A": None,
    "OSRM's A, our default": {},
    "OSRM's A, the paper's choice": {"objective": "least_energy"},
}


@dataclass(frozen=True)
class Choice:
    """What the first picture shows.

    Attributes:
        energy: (n,) of one layer, the other tasks' energy along each principal direction; shares, largest first.
        protected: how many of these hold 90 % of it.
        passed: {A: {layer: share of the other tasks' energy that A's rows let through}}.
    """

    energy: list[float]
    protected: int
    passed: dict[str, dict[str, float]]


def packaged_features(names: list[str], num_samples: int) -> dict[str, TaskFeatures]:
    """Features of the packaged tasks on the packaged model, of so many texts each."""
    tokenizer, base = load_tokenizer("packaged"), load_base("packaged", num_labels=2)
    found = {}
    for name in names:
        texts = load_task("packaged", name).sample(train=num_samples).train
        rows = tokenize(texts, tokenizer, 128).remove_columns("labels")
        loader = DataLoader(rows, batch_size=16, collate_fn=DataCollatorWithPadding(tokenizer))
        found[name] = collect_features(
            base,
            loader,
            task=name,
            target_modules=LORA["target_modules"],
            num_samples=num_samples,
            tokenizer=tokenizer,
            progress=False,
        )
    return found


def choice_of_a(features: dict[str, TaskFeatures], task: str, block: int) -> Choice:
    """A of `task`'s adapter, chosen in each way of `KINDS`, against the features of the other tasks.

    The spectrum is of one block's query; its value reads the same. What a linear layer reads through A depends on
    the space of A's rows alone: the shares are of an orthonormal basis.
    """
    others = [one for name, one in features.items() if name != task]
    out, passed = OtherTasks(others), {}
    for kind, fields in KINDS.items():
        torch.manual_seed(0)
        config = LoraConfig(**LORA) if fields is None else OSRMLoraConfig(**LORA, **fields)
        model = get_peft_model(load_base("packaged", num_labels=2), config)
        if isinstance(config, OSRMLoraConfig):
            initialize_osrm_weights(model, others, in_task=features[task] if config.needs_own_features else None)
        passed[kind] = {
            name: out.pool(name).share(torch.linalg.qr(factors.A.double().mT).Q.mT)
            for name, factors in load_adapter(model).factors.items()
        }
    _, pool, spectrum = out.at(list(others[0].layers)[block - 1])
    energy = torch.linalg.eigvalsh(pool.second_moment()).flip(0).clamp_min(0) / pool.trace()
    return Choice(energy.tolist(), spectrum.strongest(energy=0.9).rank, passed)


def plot_choice(choice: Choice, title: str, path: Path) -> None:
    """The spectrum at the left, each layer's shares at the right; write a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    places = range(1, len(choice.energy) + 1)
    left.plot(places, [100 * share for share in choice.energy], color="black")
    left.axvspan(1, choice.protected, alpha=0.2, color="tab:red", label=f"{choice.protected} directions hold 90 %")
    left.set(title=title, xlabel="principal direction", ylabel="other tasks' energy [%]", yscale="log")
    left.set(xlim=(1, len(places)), ylim=(5e-3, None))  # of the layer norm, one direction has none
    left.legend()
    for kind, shares in choice.passed.items():
        right.plot(range(1, len(shares) + 1), [100 * share for share in shares.values()], marker="o", label=kind)
    right.set(title="what A lets through", xlabel="block", ylabel="other tasks' energy [%]", yscale="log")
    right.set_xticks(range(1, len(shares) + 1))
    right.set_ylim(top=10)
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    with new_file(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def screenshot(results: str, path: Path, width: int = 1120, height: int = 1500) -> None:
    """The top of the page of a results folder as a browser draws it, in 64 colours; write a PNG.

    Raises:
        FileNotFoundError: no browser.
    """
    from PIL import Image

    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise FileNotFoundError("neither chromium nor google-chrome is installed: install one, or keep the picture")
    with tempfile.TemporaryDirectory() as folder:
        page, shot = Path(folder, "page.html"), Path(folder, "shot.png")
        report = [sys.executable, "-m", "osrm_peft", "report", results, "--out", str(page)]
        subprocess.run(report, cwd=ROOT, check=True, capture_output=True)
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
                   "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--virtual-time-budget=3000",
                   "--blink-settings=preferredColorScheme=1"]  # light  # fmt: skip
        options += [f"--user-data-dir={folder}/profile", f"--screenshot={shot}", f"--window-size={width},{height}"]
        subprocess.run([browser, *options, page.as_uri()], check=True, capture_output=True, timeout=120)
        image = Image.open(shot).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    with new_file(path) as partial:
        image.save(partial, format="png", optimize=True)


def main() -> None:
    """Make both pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/pictures")
    out = parser.parse_args().out
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    choice = choice_of_a(packaged_features(list_tasks("packaged"), num_samples=100), TASK, BLOCK)
    plot_choice(choice, f"what query and value of block {BLOCK} read", out / "choosing_a.png")
    for kind, shares in choice.passed.items():
        print(f"{kind}: {', '.join(f'{100 * share:.3f}' for share in shares.values())} % of the others' energy")
    screenshot("docs/results/minilm/scales", out / "report.png")


if __name__ == "__main__":
    main()
