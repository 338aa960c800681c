"""Adapters that stock PEFT writes, of the zoo's models: trained by noise, and edited as other versions wrote them."""

import json
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from tests.zoo.models import ZOO, noisy

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def task_type(name):
    return next((task for end, task in TASK_TYPES.items() if ZOO[name][0].endswith(end)), None)


def adapted(name, seed=1, resize=0, **config):
    """A PeftModel with random B, A and saved modules, as if trained."""
    base = resized(noisy(name, 0), resize, seed=7)
    fields = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "task_type": task_type(name)} | config
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, LoraConfig(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model.eval()


def resized(model, more, seed):
    """The model with some tokens more, their rows drawn by this seed."""
    if more:
        old = model.config.get_text_config().vocab_size
        model.resize_token_embeddings(old + more, mean_resizing=False)
        with torch.no_grad():
            for layer in {model.get_input_embeddings(), model.get_output_embeddings()} - {None}:
                rows = layer.weight[old:]
                rows.copy_(0.5 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed)))
    return model.eval()


def write(model, folder, base_model="tiny/base", **options):
    """Stock PEFT's folder of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder), **options)
    edit(folder, base_model_name_or_path=base_model)
    return folder


def stock(name, folder, resize=0, complain=True):
    """Stock PEFT's model of a folder, on the zoo's base resized anew; a missing key is an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(resized(noisy(name, 0), resize, seed=99), str(folder)).eval()
    lost = [str(one.message) for one in caught if "missing" in str(one.message).lower()]
    assert not (lost and complain), lost[0][:300]
    return model


# what other versions and tools wrote: each changes a folder in place


def edit(folder, drop=(), only=None, **fields):
    path = folder / CONFIG
    config = json.loads(path.read_text()) | fields
    kept = config if only is None else only
    path.write_text(json.dumps({key: value for key, value in config.items() if key in kept and key not in drop}))


def keys(rename):
    """An edit that renames the tensors."""

    def change(folder):
        tensors = load_file(folder / WEIGHTS)
        save_file({rename(key): value for key, value in tensors.items()}, folder / WEIGHTS, {"format": "pt"})

    return change


def config(drop=(), only=None, **fields):
    """An edit of the configuration."""
    return lambda folder: edit(folder, drop, only, **fields)
