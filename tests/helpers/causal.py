"""A tiny causal language model with a tokenizer of words, in a folder."""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = ["good", "bad", "very", "a", "film", "song", "the", "was", "is", "it", "yes", "no", "<user>", "<assistant>"]
SPECIAL = {"eos_token_id": 2, "pad_token_id": 1, "bos_token_id": None}
LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_tiny(folder, template=None, seed=0, words=WORDS):
    """Write the model and its tokenizer, and return them; the vocabulary is of these words."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<pad>", "<end>", *words])}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", eos_token="<end>", chat_template=template
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, **SPECIAL, vocab_size=len(vocabulary)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval(), tokenizer
