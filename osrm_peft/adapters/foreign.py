"""Folders that are no PEFT adapter: what they are, and the command that helps."""

import shlex
from pathlib import Path
from typing import Any

from osrm_peft.adapters.config import CONFIG

WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
_LFS = b"version https://git-lfs"
_DIFFUSION = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_transformer_", "unet.", "text_encoder.")


def check_folder(folder: Path, source: str) -> None:
    """Check that the folder holds the two files of a PEFT adapter.

    Raises:
        FileNotFoundError: a file is missing; says what the folder holds instead, and the way out.
        ValueError: a file is a Git LFS pointer.
    """
    config, weights = folder / CONFIG, folder / WEIGHTS
    for path in (config, weights):
        if is_pointer(path):
            raise ValueError(
                f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in {folder} "
                "(after `git lfs install`), or download the repository with huggingface_hub"
            )
    if config.is_file() and weights.is_file():
        return
    missing = CONFIG if not config.is_file() else WEIGHTS
    raise FileNotFoundError(f"{source} holds no {missing}: {_instead(folder)}")


def is_pointer(path: Path) -> bool:
    """Whether a file is a Git LFS pointer, which `git clone` leaves without git-lfs."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_LFS)) == _LFS


def foreign_config(config: Any, folder: Path) -> str | None:
    """The program that wrote this adapter_config.json, for an error; None if PEFT may have written it."""
    if not isinstance(config, dict) or config.get("peft_type") is not None:
        return None
    if "fine_tune_type" in config or "lora_parameters" in config or (folder / "adapters.safetensors").is_file():
        return _MLX
    if "model_type" in config and "config" in config:
        return _ADAPTERHUB
    return f"its {CONFIG} has no peft_type, so PEFT did not write it: give a folder that PEFT's save_pretrained wrote"


_MLX = (
    "it is an adapter of MLX, whose names and layouts are its own: fuse it into full weights with `mlx_lm.fuse` and "
    "merge the checkpoints with `osrm-peft merge-checkpoints`"
)
_ADAPTERHUB = (
    "it is an adapter of AdapterHub (the `adapters` library), not of PEFT: merge it into its model there "
    "(`model.merge_adapter`), save the model, and merge the checkpoints with `osrm-peft merge-checkpoints`"
)


def describe_file(path: Path) -> str:
    """What a file is that was given instead of an adapter's folder, for an error."""
    if path.name in (WEIGHTS, CONFIG, PICKLED):
        return f"it is a file of an adapter: give its folder, {path.parent}"
    if is_pointer(path):
        return f"it is a Git LFS pointer: run `git lfs pull` in {path.parent}"
    if path.suffix == ".safetensors" and _is_diffusion([path]):
        return _DIFFUSERS
    return "it is a file: give the folder that PEFT's save_pretrained wrote"


_DIFFUSERS = (
    "it is a LoRA file of kohya or diffusers, whose names are not PEFT's: load it with diffusers "
    "(`pipe.load_lora_weights`) and save its parts with `pipe.unet.save_lora_adapter` or PEFT's save_pretrained"
)


def _instead(folder: Path) -> str:
    if (folder / CONFIG).is_file() and (folder / "adapters.safetensors").is_file():
        return _MLX
    if (folder / PICKLED).is_file():
        return (
            f"its weights are in {PICKLED} (pickled .bin files are never read: they can run code); write them as "
            f"safetensors, torch reads tensors only: {convert_command(folder)}"
        )
    if (folder / "pytorch_adapter.bin").is_file() or (folder / "head_config.json").is_file():
        return _ADAPTERHUB
    below = sorted(str(path.parent.relative_to(folder)) for path in folder.glob("*/" + CONFIG))
    if below:
        return f"but its folders {', '.join(below[:8])}{' …' if len(below) > 8 else ''} do: give one of them"
    files = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    if _is_diffusion([folder / name for name in files if name.endswith(".safetensors")]):
        return _DIFFUSERS
    if "config.json" in files:
        return "it is a full model, not an adapter: merge it with `osrm-peft merge-checkpoints`"
    if (folder / CONFIG).is_file():
        return f"its weights are missing (it holds {', '.join(files)}): download or save the adapter again"
    listed = f"it holds {', '.join(files[:6])}" if files else "it holds no files"
    return f"it is not a PEFT adapter ({listed}): give the folder that PEFT's save_pretrained wrote"


def convert_command(folder: Path) -> str:
    """A command that writes an adapter's pickled weights as safetensors; torch loads tensors only."""
    code = (
        "import sys, torch, safetensors.torch as s; f = sys.argv[1]; "
        f"s.save_file({{k: v.clone() for k, v in torch.load(f + '/{PICKLED}', map_location='cpu', "
        f"weights_only=True).items()}}, f + '/{WEIGHTS}')"
    )
    return f'python -c "{code}" {shlex.quote(str(folder))}'


def _is_diffusion(files: list[Path]) -> bool:
    for path in files:
        if path.name == "pytorch_lora_weights.safetensors":
            return True
        try:
            with path.open("rb") as file:
                head = file.read(1 << 16).decode("utf-8", "replace")
        except OSError:
            continue
        if ".lora_down." in head or any(f'"{name}' in head for name in _DIFFUSION):
            return True
    return False
