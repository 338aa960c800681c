"""LoRA adapters as data: read from what PEFT wrote, written so that PEFT loads them."""
