import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LongformerConfig,
    LongformerModel,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetModel,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from osrm_peft import collect_features
from osrm_peft.features.padding import TokenMask, find_token_mask
from tests.helpers.models import TINY, make_base, make_batch

TEXTS = [[5, 6, 7, 8, 9], [11, 12, 13], [21, 22, 23, 24]]
TARGETS = ["q_proj", "v_proj"]


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY, num_key_value_heads=1)).eval()


def collect(model, loader, statistic="token", targets=TARGETS, **options):
    return collect_features(
        model, loader, task="t", target_modules=targets, statistic=statistic, progress=False, **options
    )


@pytest.mark.parametrize("statistic", ["mean", "sample", "token"])
@pytest.mark.parametrize("k", [100, 2])
def test_trl_s_packed_rows_with_their_padding_and_lengths_are_told_apart(statistic, k):
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True, pad_to_multiple_of=16)
    batch = collator([{"input_ids": ids} for ids in TEXTS])
    assert batch["input_ids"].shape == (1, 16) and "attention_mask" not in batch  # 12 tokens, 4 of padding
    packed = collect(llama(), [dict(batch)], statistic, num_samples=k)
    alone = collect(llama(), [{"input_ids": torch.tensor([ids])} for ids in TEXTS[:k]], statistic)
    assert packed.num_samples == alone.num_samples == min(k, 3)
    for name, moments in alone.layers.items():
        assert packed.layers[name].count == moments.count
        torch.testing.assert_close(packed.layers[name].second_moment(), moments.second_moment(), rtol=1e-4, atol=1e-6)


def test_zeros_that_end_a_row_are_padding_unless_there_is_one_or_a_mask():
    ids = torch.tensor([[0, 1, 2, 0, 0, 0], [0, 1, 0, 1, 2, 0]])
    positions, count = find_token_mask({"position_ids": ids}, 2, 10)
    assert positions.keep.tolist() == [[True] * 3 + [False] * 3, [True] * 6] and count == 4
    mask = torch.ones_like(ids)
    positions, count = find_token_mask({"position_ids": ids, "attention_mask": mask}, 2, 10)
    assert positions.keep.all() and count == 7


class Patches(nn.Module):
    """Takes the patches of all images as one long tensor, as vision–language models do."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.config = nn.Linear(4, 4), None

    def forward(self, input_ids, pixel_values):
        assert len(pixel_values) == 50
        return self.q_proj(nn.functional.one_hot(input_ids, 4).float())


class InPlace(nn.Module):
    """Its second layer receives the tensor of the first one, changed in place in between."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj, self.config = nn.Linear(4, 4), nn.Linear(4, 4), None

    def forward(self, x):
        self.q_proj(x)
        return self.v_proj(x.mul_(3))


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("made_there", [False, True])
def test_a_tensor_that_was_changed_in_place_is_another_input(inference, made_there):
    with torch.inference_mode(inference and made_there):
        x = torch.randn(2, 5, 4)
    with torch.inference_mode(inference):
        found = collect(InPlace(), [{"x": x.clone() if not made_there else x}]).layers
    assert found["q_proj"].count == found["v_proj"].count == 10
    torch.testing.assert_close(
        found["v_proj"].second_moment(), 9 * found["q_proj"].second_moment(), rtol=1e-5, atol=1e-6
    )


def test_longer_tensors_than_the_samples_do_not_count_as_samples():
    batches = [{"input_ids": torch.tensor([[0, 1], [2, 3]]), "pixel_values": torch.randn(50, 3)} for _ in range(3)]
    assert collect(Patches(), batches, targets=["q_proj"]).num_samples == 6


@pytest.mark.parametrize("mask", [{"full": torch.ones(4, 7)}, torch.ones(4, 1, 7, 7)])
def test_a_mask_that_tells_no_padding_is_refused(mask):
    with pytest.raises(ValueError, match=r"the attention_mask has (type dict|shape \(4, 1, 7, 7\)): give the"):
        find_token_mask({"attention_mask": mask}, 4, 4)


def test_reference_counts_the_decoder_s_padding_too():
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)).eval()
    labels = torch.tensor([[5, 6, 1, -100], [7, 8, 9, 1]])
    batch = make_batch(rows=2, length=4) | {"labels": labels}
    counted, real = (collect(model, [batch], "mean", ["q"], reference=reference) for reference in (True, False))
    for name in real.layers:
        assert not torch.allclose(counted.layers[name].mean(), real.layers[name].mean(), atol=1e-3), name


class Unmasked(T5ForConditionalGeneration):
    """Its decoder takes no mask, and its class has no method for the decoder's inputs."""

    prepare_decoder_input_ids_from_labels = None

    def forward(self, input_ids, attention_mask=None, decoder_input_ids=None, labels=None):
        return super().forward(input_ids, attention_mask, decoder_input_ids, labels=labels)


def test_labels_tell_the_decoder_s_padding_where_forward_takes_no_mask():
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(0)
    model = Unmasked(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)).eval()
    batch = make_batch(rows=2, length=4) | {"labels": torch.tensor([[5, 6, 1, -100, -100], [7, 8, 9, 1, -100]])}
    usual = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)).eval()
    usual.load_state_dict(model.state_dict())
    found, expected = (collect(one, [batch], targets=["q", "v"]) for one in (model, usual))
    for name, moments in expected.layers.items():
        assert found.layers[name].count == moments.count
        torch.testing.assert_close(found.layers[name].second_moment(), moments.second_moment(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("statistic", ["token", "sample"])
def test_models_with_positions_first_need_another_number_of_samples(statistic):
    model = XLNetModel(XLNetConfig(vocab_size=50, d_model=16, n_layer=1, n_head=2, d_inner=24)).eval()
    with pytest.raises(ValueError, match=r"where there are 7 of either: give batches of another number of samples"):
        collect(model, [make_batch(rows=7, length=7, pads=[0, 3])], statistic, ["layer_1"])
    assert collect(model, [make_batch(rows=6, length=7, pads=[0])], "token", ["layer_1"]).layers


@pytest.mark.parametrize(("shape", "m"), [((2, 5, 7, 3), 5), ((2, 7, 5, 3), 5), ((14, 3), 1), ((2, 7, 3), 1)])
def test_positions_are_found_in_inputs_of_every_shape(shape, m):
    """Heads before or behind the positions, tokens in one row."""
    generator = torch.Generator().manual_seed(0)
    keep, x = torch.rand(2, 7, generator=generator) < 0.6, torch.randn(shape, generator=generator)
    vectors, mask, _ = TokenMask(2, keep).of("layer", x, True)
    placed = x.view(2, 7, 3) if len(shape) == 2 else x.movedim(shape.index(7), 1)
    assert mask.sum() == m * keep.sum() and torch.equal(vectors[mask], placed[keep].flatten(0, -2))


@pytest.mark.parametrize("shape", [(2, 6, 3), (5, 3), (2, 2, 3, 3)])
def test_padded_inputs_without_known_positions_are_refused(shape):
    x, keep = torch.randn(shape), torch.ones(2, 7, dtype=torch.bool)
    every, mask, _ = TokenMask(2, keep).of("layer", x, False)
    assert mask is None or bool(mask.all())
    assert every.numel() == x.numel()
    keep[1, -1] = False
    with pytest.raises(ValueError, match=r"but the attention_mask is \(2, 7\): padding cannot be told apart"):
        TokenMask(2, keep).of("layer", x, False)


def test_a_mask_of_other_rows_than_the_samples_tells_nothing():
    keep = torch.ones(3, 7, dtype=torch.bool)
    keep[1, 4:] = False
    with pytest.raises(ValueError, match=r"but the attention_mask is \(3, 7\): padding cannot be told apart"):
        TokenMask(2, keep).of("layer", torch.randn(3, 7, 5), False)


MASKS = ["pixel_mask", "pixel_attention_mask", "aspect_ratio_mask", "visual_attention_mask", "entity_attention_mask",
         "feature_attention_mask", "input_features_mask"]  # fmt: skip


@pytest.mark.parametrize("mask", MASKS)
def test_padded_pixels_and_sound_are_refused_where_no_layer_has_their_mask(mask):
    x, text = torch.randn(2, 9, 3), {"attention_mask": torch.ones(2, 7)}
    for given, seen, refused in (({}, x, True), (text, x[:, :5], True), (text, x[:, :7], False), ({}, x[:, 0], False)):
        padding = torch.ones(2, 4, 4)
        assert find_token_mask(given | {mask: padding}, 2, 9)[0].of("tower", seen, True)[0] is not None
        padding[1, 3] = 0
        positions, _ = find_token_mask(given | {mask: padding}, 2, 9)
        if refused:
            with pytest.raises(ValueError, match=rf"{mask} tells of padding, which cannot be told apart in layer 'tow"):
                positions.of("tower", seen, True)
        else:
            assert positions.of("tower", seen, True)[0] is not None


@pytest.mark.parametrize("padding", [0, 3])
def test_what_a_model_pads_by_itself_is_refused(padding):
    """Longformer fills its last window; with whole windows there is nothing to tell apart."""
    sizes = TINY | {"attention_window": 8, "max_position_embeddings": 64}
    model = LongformerModel(LongformerConfig(**sizes)).eval()
    batch = make_batch(length=13, pads=[padding] * 4)
    message = r"inputs of shape \(16, 4, 16\), but the attention_mask is \(4, 13\): .*a length that the model does not"
    with pytest.raises(ValueError, match=message):
        collect(model, [batch], targets=["query"])
    for moments in collect(model, [make_batch(length=16, pads=[0])], targets=["query"]).layers.values():
        assert moments.count == 4 * 16


def test_an_adapter_is_off_wherever_it_sits_and_stays_merged():
    plain = collect(llama(), [make_batch()])
    config = LoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights=False)  # B is not 0
    compiled = get_peft_model(torch.compile(llama(), backend="eager"), config)
    for name, moments in collect(compiled, [make_batch()]).layers.items():
        torch.testing.assert_close(moments.second_moment(), plain.layers[name].second_moment())
    own = llama()
    own.add_adapter(config)
    with pytest.raises(ValueError, match=r"its own add_adapter\): call model.disable_adapters\(\) first"):
        collect(own, [make_batch()])
    own.disable_adapters()
    last = list(plain.layers)[-1]
    torch.testing.assert_close(collect(own, [make_batch()]).layers[last].mean(), plain.layers[last].mean())
    merged = get_peft_model(llama(), config)
    merged.merge_adapter()
    with pytest.raises(ValueError, match="an adapter is merged into"):
        collect(merged, [make_batch()], targets=["o_proj"])


def test_groups_need_the_same_samples_each_time():
    rows = [{key: value[0] for key, value in make_batch(seed=seed).items()} for seed in range(4)]
    options = {"targets": ["query"], "group_size": 1}
    with pytest.raises(ValueError, match="give a DataLoader without shuffle"):
        collect(make_base(), torch.utils.data.DataLoader(rows, batch_size=2, shuffle=True), **options)
    assert collect(make_base(), torch.utils.data.DataLoader(rows, batch_size=2), **options).num_samples == 4
