"""Tiny models of many architectures, and what they give for inputs of their kind."""

import torch
import transformers as T

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
LLAMA = SIZES | {"num_key_value_heads": 1, "max_position_embeddings": 32}
BERT = SIZES | {"max_position_embeddings": 32}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 8, "patch_size": 4}  # fmt: skip
SEQ2SEQ = {"vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
           "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32,
           "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}  # fmt: skip
MOE = LLAMA | {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8,
               "shared_expert_intermediate_size": 8}  # fmt: skip
CLIP = {"text_config": BERT | {"projection_dim": 8}, "vision_config": VISION | {"projection_dim": 8},
        "projection_dim": 8}  # fmt: skip
LLAVA = {"text_config": LLAMA | {"model_type": "llama"}, "vision_config": VISION | {"model_type": "clip_vision_model"},
         "image_token_id": 39, "vision_feature_layer": -1}  # fmt: skip
SPEECH = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
          "conv_dim": (8, 8), "conv_kernel": (3, 3), "conv_stride": (2, 2), "num_conv_pos_embeddings": 4,
          "num_conv_pos_embedding_groups": 2, "vocab_size": 12, "num_feat_extract_layers": 2}  # fmt: skip

ZOO = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama_tied": ("LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True}),
    "llama_classifier": ("LlamaForSequenceClassification", LLAMA | {"num_labels": 3}),
    "mistral": ("MistralForCausalLM", LLAMA),
    "qwen2": ("Qwen2ForCausalLM", LLAMA | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", LLAMA | {"head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", LLAMA | {"head_dim": 8}),
    "phi": ("PhiForCausalLM", LLAMA | {"num_key_value_heads": 2}),
    "phi3": ("Phi3ForCausalLM", LLAMA),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32,
                                 "bos_token_id": 1, "eos_token_id": 2}),
    "gpt_neox": ("GPTNeoXForCausalLM", BERT),
    "opt": ("OPTForCausalLM", BERT | {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    "bloom": ("BloomForCausalLM", {"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "mpt": ("MptForCausalLM", {"vocab_size": 40, "d_model": 16, "n_heads": 2, "n_layers": 2, "expansion_ratio": 2,
                               "max_seq_len": 32}),
    "falcon": ("FalconForCausalLM", BERT),
    "mamba": ("MambaForCausalLM", {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4,
                                   "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    "mixtral": ("MixtralForCausalLM", MOE),
    "qwen2_moe": ("Qwen2MoeForCausalLM", MOE),
    "qwen3_moe": ("Qwen3MoeForCausalLM", MOE | {"head_dim": 8}),
    "gpt_oss": ("GptOssForCausalLM", MOE | {"head_dim": 8, "num_hidden_layers": 1}),
    "bert": ("BertForSequenceClassification", BERT | {"num_labels": 3}),
    "bert_mlm": ("BertForMaskedLM", BERT),
    "roberta": ("RobertaForMaskedLM", BERT),
    "distilbert": ("DistilBertForSequenceClassification", {"vocab_size": 40, "dim": 16, "hidden_dim": 24, "n_layers": 2,
                                                           "n_heads": 2, "max_position_embeddings": 32}),
    "deberta": ("DebertaV2ForTokenClassification", BERT),
    "electra": ("ElectraForSequenceClassification", BERT | {"embedding_size": 16}),
    "modernbert": ("ModernBertForMaskedLM", BERT | {"cls_token_id": 1, "sep_token_id": 2}),
    "t5": ("T5ForConditionalGeneration", {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1,
                                          "num_heads": 2, "decoder_start_token_id": 0}),
    "t5gemma": ("T5GemmaForConditionalGeneration", {
        part: LLAMA | {"head_dim": 8, "num_hidden_layers": 1} for part in ("encoder", "decoder")
    } | {"vocab_size": 40}),
    "bart": ("BartForConditionalGeneration", SEQ2SEQ),
    "whisper": ("WhisperForConditionalGeneration", SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 8,
                                                              "max_target_positions": 16}),
    "wav2vec2": ("Wav2Vec2ForCTC", SPEECH),
    "hubert": ("HubertModel", SPEECH),
    "vit": ("ViTForImageClassification", VISION | {"num_labels": 3}),
    "clip": ("CLIPModel", CLIP),
    "roberta_classifier": ("RobertaForSequenceClassification", BERT | {"num_labels": 3}),
    "modernbert_classifier": ("ModernBertForSequenceClassification", BERT | {"cls_token_id": 1, "sep_token_id": 2,
                                                                             "num_labels": 3}),
    "bert_questions": ("BertForQuestionAnswering", BERT),
    "resnet": ("ResNetForImageClassification", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
                                                "layer_type": "basic", "num_labels": 3}),
    "levit": ("LevitForImageClassification", {
        "image_size": 16, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1],
        "key_dim": [4, 4, 4], "num_labels": 3}),
    "distilbert_mlm": ("DistilBertForMaskedLM", {"vocab_size": 40, "dim": 16, "hidden_dim": 24, "n_layers": 1,
                                                 "n_heads": 2, "max_position_embeddings": 32}),
    "xlnet": ("XLNetLMHeadModel", {"vocab_size": 40, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24}),
    "llava": ("LlavaForConditionalGeneration", LLAVA),
    "paligemma": ("PaliGemmaForConditionalGeneration", {
        "text_config": LLAMA | {"model_type": "gemma", "head_dim": 8}, "projection_dim": 16, "image_token_id": 39,
        "vision_config": VISION | {"model_type": "siglip_vision_model", "projection_dim": 16}}),
    "gemma3": ("Gemma3ForConditionalGeneration", {
        "text_config": LLAMA | {"model_type": "gemma3_text", "head_dim": 8}, "image_token_id": 39,
        "vision_config": VISION | {"model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4}),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", {
        "text_config": LLAMA | {"model_type": "qwen2_vl_text", "rope_parameters": {
            "rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}},
        "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4},
        "image_token_id": 39, "video_token_id": 38, "vision_start_token_id": 37, "vision_end_token_id": 36}),
}  # fmt: skip


def noisy(name, seed):
    """A tiny model of the zoo with weights of its own."""
    class_name, options = ZOO[name]
    cls = getattr(T, class_name)
    torch.manual_seed(seed)
    model = cls(cls.config_class(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model


def outputs(model):
    """The first tensor that a model gives for inputs of its kind."""
    seed = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": lambda: torch.randint(3, 38, (1, 6), generator=seed),
        "input_values": lambda: torch.randn(1, 64, generator=seed),
        "input_features": lambda: torch.randn(1, 8, 16, generator=seed),
        "pixel_values": lambda: torch.randn(1, 3, 8, 8, generator=seed),
    }
    inputs = {model.main_input_name: inputs[model.main_input_name]()}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if isinstance(base, T.CLIPModel):
        inputs["pixel_values"] = torch.randn(1, 3, 8, 8, generator=seed)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, 38, (1, 4), generator=seed)
    return model(**inputs)[0]
