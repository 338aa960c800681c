"""How wide a saved head is: asked of transformers, whatever its layers are called."""

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from osrm_peft import load_adapter
from osrm_peft.hub.push import last_layer
from osrm_peft.models.loading import head_width
from tests.helpers.models import GPT2, IDS, T5, TEXT, TWO

DISTILBERT = {"vocab_size": 50, "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 40}
ALBERT = TEXT | {"embedding_size": 8}
MODERNBERT = TEXT | {"cls_token_id": 1, "sep_token_id": 2}
# class, sizes, target, what PEFT saves beside classifier and score, for which it knows the names
CLASSES = {
    "bert": ("Bert", TEXT, "query", []),
    "bert pooler": ("Bert", TEXT, "query", ["pooler"]),
    "modernbert": ("ModernBert", MODERNBERT, "Wqkv", ["head"]),
    "modernbert both": ("ModernBert", MODERNBERT, "Wqkv", ["head", "classifier"]),
    "roberta embeddings": ("Roberta", TEXT, "query", ["word_embeddings"]),
    "distilbert": ("DistilBert", DISTILBERT, "q_lin", ["pre_classifier", "classifier"]),
    "deberta": ("DebertaV2", TEXT, "query_proj", ["pooler"]),
    "electra": ("Electra", ALBERT, "query", []),
    "albert": ("Albert", ALBERT, "query", ["pooler"]),
    "llama": ("Llama", TEXT, "q_proj", ["norm"]),
    "llama embeddings": ("Llama", TEXT, "q_proj", ["embed_tokens", "score"]),
    "gpt2": ("GPT2", GPT2, "c_attn", ["wte"]),
    "bart": ("Bart", TWO, "q_proj", ["classification_head"]),
    "t5": ("T5", T5, "q", ["classification_head"]),
}


def make(name, labels, seed=0):
    kind, sizes, _, _ = CLASSES[name]
    model = getattr(transformers, f"{kind}ForSequenceClassification")
    torch.manual_seed(seed)
    return model(model.config_class(**(IDS | sizes | {"num_labels": labels}))).eval()


def adapter_of(name, base, folder):
    _, _, target, saved = CLASSES[name]
    config = LoraConfig(
        r=2, target_modules=[target], task_type="SEQ_CLS", modules_to_save=saved, init_lora_weights=False
    )
    model = get_peft_model(base, config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "modules_to_save" in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder)
    return model


@pytest.mark.parametrize("labels", [1, 4, 7])
@pytest.mark.parametrize("name", CLASSES)
def test_an_adapter_s_head_tells_of_how_many_labels_it_is(name, labels, tmp_path):
    base = make(name, labels)
    base.save_pretrained(tmp_path / "base")
    theirs = adapter_of(name, base, tmp_path / "adapter")
    heads = {key: tuple(tensor.shape) for key, tensor in load_adapter(tmp_path / "adapter").heads.items()}
    make(name, 3, seed=1).save_pretrained(tmp_path / "other")  # a base with another head, as pre-trained ones have
    assert head_width(str(tmp_path / "other"), heads) == head_width(make(name, 3), heads) == labels
    ids = torch.tensor([[5, 6, 7, 8, 2]])
    with torch.no_grad():
        ours = load_adapter(tmp_path / "adapter").attach(str(tmp_path / "base"))(input_ids=ids).logits
        stock = PeftModel.from_pretrained(make(name, labels), tmp_path / "adapter").eval()(input_ids=ids).logits
        assert torch.equal(ours, stock) and ours.shape == (1, labels)
    assert torch.equal(theirs.eval()(input_ids=ids).logits, ours)


def test_head_width_is_none_where_no_saved_parameter_depends_on_labels(tmp_path):
    make("modernbert", 5).save_pretrained(tmp_path / "base")
    model = make("modernbert", 5)
    heads = {name: tuple(p.shape) for name, p in model.named_parameters() if name.startswith("head.")}
    assert heads and head_width(str(tmp_path / "base"), heads) is None is head_width(model, {})


class Several(transformers.BertForSequenceClassification):
    """A head of other models than transformers': two rows a label, and three more."""

    def __init__(self, config):
        super().__init__(config)
        self.classifier = torch.nn.Linear(config.hidden_size, 2 * config.num_labels + 3)


@pytest.mark.parametrize("labels", [1, 2, 3, 9])
def test_a_head_may_have_several_rows_a_label_and_more(labels):
    model = Several(transformers.BertConfig(**TEXT))
    assert head_width(model, {"classifier.weight": (2 * labels + 3, 16)}) == labels
    assert head_width(model, {"classifier.bias": (2 * labels + 3,)}) == labels


def test_a_head_that_does_not_fit_names_the_labels(tmp_path):
    adapter_of("modernbert", make("modernbert", 4), tmp_path)
    with pytest.raises(ValueError, match=r"the head 'classifier\..*load the base model with num_labels=4"):
        load_adapter(tmp_path).attach(make("modernbert", 3))


@pytest.mark.parametrize("name", CLASSES)
def test_without_the_model_names_tell_which_tensor_has_a_row_a_label(name):
    """For the card of an adapter whose base model may not be there."""
    saved = [*CLASSES[name][3], "classifier", "score"]
    shapes = {key: p.shape for key, p in make(name, 7).named_parameters() if any(part in key for part in saved)}
    assert shapes[last_layer(shapes)][0] == 7
