"""Small random models of many architectures, and inputs of each: what `accelerate` is tried on.

Nothing is downloaded. Those of transformers are named by class and by the settings of its config;
the rest is built by a function. A model that the installed packages do not have is skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from integrations.huggingface.test_attention_families import (
    DECODER,
    ENCODED,
    ENCODER,
    FAMILIES,
    LEFT,
    MIXTURE,
    RIGHT,
    SPEECH,
    inputs_of,
)

Inputs = dict[str, torch.Tensor]

DENSE = {k: v for k, v in DECODER.items() if k != "head_dim"}
GPT = {"vocab_size": 97, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 3,
       "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
VISION = {
    "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip
ROBERTA = {**ENCODER, "pad_token_id": 1, "max_position_embeddings": 66}
TALK = {**SPEECH, "max_position_embeddings": 64, "forced_eos_token_id": 0}
SOUND = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 6, "conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0, "feat_extract_norm": "layer",
}  # fmt: skip
TWO_TOWERS = {
    "text_config": {**ENCODER, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
                    "projection_size": 48},
    "vision_config": {**VISION},
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

# architecture -> (model, settings of its config, inputs)
TEXT, WAVE, PICTURE, PAIR = "text", "waveform", "image", "image and text"
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], str]] = {
    **{name: (cls, settings, kind) for name, (cls, _, settings, kind, _) in FAMILIES.items()},
    # generators
    "gpt_neo": ("GPTNeoForCausalLM",
                {"vocab_size": 97, "hidden_size": 48, "num_layers": 2, "num_heads": 6,
                 "attention_types": [[["global", "local"], 1]], "window_size": 6,
                 "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0}, LEFT),
    "gptj": ("GPTJForCausalLM", {**GPT, "rotary_dim": 8}, LEFT),
    "gpt_neox": ("GPTNeoXForCausalLM", {**ENCODER, "eos_token_id": 0}, LEFT),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", GPT, LEFT),
    "codegen": ("CodeGenForCausalLM",
                {**GPT, "n_embd": 64, "n_head": 4, "rotary_dim": 8, "n_ctx": 64}, LEFT),
    "biogpt": ("BioGptForCausalLM", {**ENCODER, "pad_token_id": 1}, LEFT),
    "bloom": ("BloomForCausalLM",
              {"vocab_size": 97, "hidden_size": 48, "n_layer": 2, "n_head": 6, "eos_token_id": 0},
              LEFT),
    "mpt": ("MptForCausalLM",
            {"vocab_size": 97, "d_model": 48, "n_heads": 6, "n_layers": 2, "max_seq_len": 64},
            LEFT),
    "falcon": ("FalconForCausalLM",
               {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 6, "eos_token_id": 0, "bos_token_id": 0}, LEFT),
    "gemma": ("GemmaForCausalLM", DECODER, LEFT),
    "mixtral": ("MixtralForCausalLM", {**DECODER, **EXPERTS}, LEFT),
    "qwen3": ("Qwen3ForCausalLM", DECODER, LEFT),
    "qwen3_moe": ("Qwen3MoeForCausalLM",
                  {**DECODER, "num_experts": 4, "num_experts_per_tok": 2,
                   "moe_intermediate_size": 16}, LEFT),
    "phi": ("PhiForCausalLM", DENSE, LEFT),
    "phi3": ("Phi3ForCausalLM", {**DENSE, "pad_token_id": 1, "bos_token_id": 0}, LEFT),
    "phi4_multimodal": ("Phi4MultimodalForCausalLM",
                        {**DENSE, "pad_token_id": 1, "bos_token_id": 0,
                         "vision_config": {**VISION, "crop_size": 16},
                         "audio_config": {"hidden_size": 48, "intermediate_size": 64,
                                          "num_blocks": 1, "num_attention_heads": 6,
                                          "nemo_conv_channels": 16, "ext_pw_out_channel": 48,
                                          "input_size": 16}}, LEFT),
    "stablelm": ("StableLmForCausalLM", DENSE, LEFT),
    "persimmon": ("PersimmonForCausalLM", DENSE, LEFT),
    "olmo": ("OlmoForCausalLM", DENSE, LEFT),
    "olmo2": ("Olmo2ForCausalLM", DENSE, LEFT),
    "olmo3": ("Olmo3ForCausalLM", {**DENSE, "sliding_window": 6}, LEFT),
    "cohere": ("CohereForCausalLM", {**DENSE, "pad_token_id": 1}, LEFT),
    "cohere2": ("Cohere2ForCausalLM", {**DECODER, "sliding_window": 6, "pad_token_id": 1}, LEFT),
    "granite": ("GraniteForCausalLM", DENSE, LEFT),
    "granitemoe": ("GraniteMoeForCausalLM", {**DENSE, **EXPERTS}, LEFT),
    "glm": ("GlmForCausalLM", {**DECODER, "pad_token_id": 1}, LEFT),
    "glm4": ("Glm4ForCausalLM", {**DECODER, "pad_token_id": 1}, LEFT),
    "starcoder2": ("Starcoder2ForCausalLM", {**DENSE, "sliding_window": 6}, LEFT),
    "nemotron": ("NemotronForCausalLM", DECODER, LEFT),
    "smollm3": ("SmolLM3ForCausalLM", {**DENSE, "pad_token_id": 1}, LEFT),
    "ministral": ("MinistralForCausalLM", {**DECODER, "sliding_window": 6}, LEFT),
    "apertus": ("ApertusForCausalLM", {**DENSE, "pad_token_id": 1}, LEFT),
    "arcee": ("ArceeForCausalLM", DECODER, LEFT),
    "ernie4_5": ("Ernie4_5ForCausalLM", DECODER, LEFT),
    "exaone4": ("Exaone4ForCausalLM", {**DECODER, "sliding_window": 6}, LEFT),
    "helium": ("HeliumForCausalLM", DECODER, LEFT),
    "seed_oss": ("SeedOssForCausalLM", DECODER, LEFT),
    "lfm2": ("Lfm2ForCausalLM",
             {**DENSE, "layer_types": ["conv", "full_attention"], "block_ff_dim": 64}, LEFT),
    # encoders
    "xlm_roberta": ("XLMRobertaModel", ROBERTA, RIGHT),
    "distilbert": ("DistilBertModel",
                   {"vocab_size": 97, "dim": 48, "hidden_dim": 64, "n_layers": 2, "n_heads": 6,
                    "max_position_embeddings": 64}, RIGHT),
    "electra": ("ElectraModel", {**ENCODER, "embedding_size": 32}, RIGHT),
    "albert": ("AlbertModel", {**ENCODER, "embedding_size": 32}, RIGHT),
    "deberta": ("DebertaModel",
                {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, RIGHT),
    "deberta_v2": ("DebertaV2Model",
                   {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"],
                    "position_buckets": 8}, RIGHT),
    "mpnet": ("MPNetModel", ROBERTA, RIGHT),
    "convbert": ("ConvBertModel", {**ENCODER, "embedding_size": 48, "head_ratio": 2}, RIGHT),
    "roformer": ("RoFormerModel", {**ENCODER, "embedding_size": 48}, RIGHT),
    "xlnet": ("XLNetModel",
              {"vocab_size": 97, "d_model": 48, "n_layer": 2, "n_head": 6, "d_inner": 64}, RIGHT),
    "layoutlm": ("LayoutLMModel", ENCODER, RIGHT),
    "esm": ("EsmModel", {**ENCODER, "position_embedding_type": "rotary", "pad_token_id": 1}, RIGHT),
    # encoders with a decoder
    "pegasus": ("PegasusForConditionalGeneration", TALK, ENCODED),
    "marian": ("MarianMTModel", {**TALK, "decoder_vocab_size": 97}, ENCODED),
    "mbart": ("MBartForConditionalGeneration", TALK, ENCODED),
    "m2m_100": ("M2M100ForConditionalGeneration", TALK, ENCODED),
    "blenderbot": ("BlenderbotForConditionalGeneration", TALK, ENCODED),
    "led": ("LEDForConditionalGeneration",
            {**TALK, "attention_window": 4, "max_encoder_position_embeddings": 64,
             "max_decoder_position_embeddings": 64}, ENCODED),
    # images and sound
    "deit": ("DeiTModel", VISION, PICTURE),
    "beit": ("BeitModel", VISION, PICTURE),
    "dinov2": ("Dinov2Model", {**VISION, "mlp_ratio": 2}, PICTURE),
    "dinov3_vit": ("DINOv3ViTModel", VISION, PICTURE),
    "ijepa": ("IJepaModel", VISION, PICTURE),
    "swin": ("SwinModel",
             {"image_size": 16, "patch_size": 2, "embed_dim": 24, "depths": [1, 2],
              "num_heads": [2, 4], "window_size": 4}, PICTURE),
    "clip": ("CLIPModel", {**TWO_TOWERS, "projection_dim": 48}, PAIR),
    "siglip": ("SiglipModel", TWO_TOWERS, PAIR),
    "wav2vec2": ("Wav2Vec2Model", SOUND, WAVE),
    "hubert": ("HubertModel", SOUND, WAVE),
}  # fmt: skip
