"""Train the adapters of a causal language model on tasks in words (prompt and completion), by TRL's SFTTrainer.

    accelerate launch recipes/train_sft.py --config recipes/configs/smollm2_text.yaml --task tweets

The loss is of the completions alone. The recipe's keys are those of every recipe: `training` takes bf16 and
gradient_checkpointing, `packing: true` packs rows, `osrm` sets A. An OSRM recipe needs the features of its tasks first,
once: `osrm-peft features --config recipes/configs/smollm2_text.yaml`.
"""

from train_adapter import main

if __name__ == "__main__":
    main(__doc__)
