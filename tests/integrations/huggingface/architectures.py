"""Small random models of many architectures, and inputs of each: what `accelerate` is tried on.

Nothing is downloaded. Those of transformers are named by class and by the settings of its config,
the rest by a function that builds it. One that the installed packages do not have is skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

Inputs = dict[str, torch.Tensor]

DECODER = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "eos_token_id": 0,
}
ENCODER = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}
T5 = {
    "vocab_size": 97, "d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 6,
    "decoder_start_token_id": 0,
}  # fmt: skip
SPEECH = {
    "vocab_size": 97, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 6, "decoder_attention_heads": 6, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0,
    "decoder_start_token_id": 0,
}  # fmt: skip
MIXTURE = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
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
LEFT, RIGHT, ENCODED = "padded left", "padded right", "encoder and decoder"
WHOLE, PACKED, SPOKEN = "whole", "packed", "sound"
WAVE, PICTURE, PAIR = "waveform", "image", "image and text"
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], str]] = {
    # of test_attention_families.py
    "llama": ("LlamaForCausalLM", DECODER, LEFT),
    "llama, packed": ("LlamaForCausalLM", DECODER, PACKED),
    "qwen2": ("Qwen2ForCausalLM", DENSE, LEFT),
    "mistral": ("MistralForCausalLM", {**DECODER, "sliding_window": 6}, LEFT),
    # names a window to layers that have none
    "olmoe": ("OlmoeForCausalLM",
              {**DENSE, "num_experts": 4,
               "num_experts_per_tok": 2, "sliding_window": 6}, WHOLE),
    "gemma2": ("Gemma2ForCausalLM",
               {**DECODER, "sliding_window": 6, "attn_logit_softcapping": 0.5}, LEFT),
    "gemma3": ("Gemma3ForCausalLM", {**DECODER, "sliding_window": 6}, LEFT),
    "gemma4": ("Gemma4ForCausalLM", {**DECODER, "global_head_dim": 16, "sliding_window": 6,
                "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97,
                "num_hidden_layers": 4, "num_kv_shared_layers": 2,
                "layer_types": ["sliding_attention", "full_attention"] * 2}, LEFT),
    "llama4": ("Llama4ForCausalLM",
               {**DECODER, "intermediate_size_mlp": 64, "attention_chunk_size": 6,
                "num_local_experts": 2}, LEFT),
    "gpt_oss": ("GptOssForCausalLM",
                {**DECODER, "sliding_window": 6, "num_local_experts": 2, "num_experts_per_tok": 1,
                 "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, LEFT),
    # head_dim of v differs; sinks only in the layers with a window
    "mimo_v2_flash": ("MiMoV2FlashForCausalLM",
                      {**DECODER, **MIXTURE, "num_attention_heads": 4, "v_head_dim": 4,
                       "sliding_window": 6}, LEFT),
    # sinks that are made again for each query, and a relative bias
    "inkling2": ("Inkling2TextModel", DECODER, LEFT),
    # the keys that a query sees, by index
    "deepseek_v32": ("DeepseekV32ForCausalLM",
                     {**DECODER, **MIXTURE, "num_attention_heads": 4, "num_key_value_heads": 4,
                      "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
                      "qk_nope_head_dim": 8, "v_head_dim": 12, "index_n_heads": 2,
                      "index_head_dim": 16, "index_topk": 5, "n_group": 1, "topk_group": 1,
                      "first_k_dense_replace": 1}, LEFT),
    # writes compressed keys into an additive mask; sinks
    "deepseek_v4": ("DeepseekV4ForCausalLM",
                    {**DECODER, **MIXTURE, "head_dim": 16, "num_attention_heads": 4,
                     "q_lora_rank": 16, "o_lora_rank": 16, "o_groups": 2, "index_n_heads": 2,
                     "index_head_dim": 16, "index_topk": 2, "sliding_window": 6},
                    LEFT),
    "doge": ("DogeForCausalLM", {**DECODER, "keep_window_size": 64}, LEFT),
    "gpt2": ("GPT2LMHeadModel",
             {"vocab_size": 97, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 3,
              "bos_token_id": 0, "eos_token_id": 0}, LEFT),
    "bert": ("BertModel", ENCODER, RIGHT),
    "roberta": ("RobertaModel", ENCODER, RIGHT),
    # a window to both sides
    "modernbert": ("ModernBertModel",
                   {**ENCODER, "local_attention": 8, "global_attn_every_n_layers": 2,
                    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0, "cls_token_id": 0,
                    "sep_token_id": 0}, RIGHT),
    "opt": ("OPTForCausalLM",
            {"vocab_size": 97, "hidden_size": 48, "ffn_dim": 64, "num_hidden_layers": 2,
             "num_attention_heads": 6, "max_position_embeddings": 64, "word_embed_proj_dim": 48},
            LEFT),
    # dispatch, and count on the masks of "eager": no module says whether it is causal
    "splinter": ("SplinterModel", ENCODER, WHOLE),
    "pegasus_x": ("PegasusXForConditionalGeneration",
                  {**SPEECH, "vocab_size": 97, "num_global_tokens": 4, "block_size": 4,
                   "max_position_embeddings": 64}, ENCODED),
    # the decoder dispatches, the encoder adds the mask to its own scores
    "bigbird_pegasus": ("BigBirdPegasusForConditionalGeneration",
                        {**SPEECH, "vocab_size": 97, "attention_type": "original_full",
                         "max_position_embeddings": 64}, ENCODED),
    "vit": ("ViTModel", {**{k: v for k, v in ENCODER.items() if k not in ("vocab_size",
                                                              "max_position_embeddings")},
             "image_size": 16, "patch_size": 4}, PICTURE),
    "t5": ("T5ForConditionalGeneration", T5, ENCODED),
    "mt5": ("MT5ForConditionalGeneration", T5, ENCODED),
    "bart": ("BartForConditionalGeneration",
             {**SPEECH, "max_position_embeddings": 64, "forced_eos_token_id": 0}, ENCODED),
    "whisper": ("WhisperForConditionalGeneration",
                {**SPEECH, "num_mel_bins": 8, "max_source_positions": 20,
                 "max_target_positions": 32, "suppress_tokens": None,
                 "begin_suppress_tokens": None}, SPOKEN),
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


class _Block(torch.nn.Module):
    """As nanoGPT has it: plain PyTorch, with a causal buffer where there is no fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(48), torch.nn.LayerNorm(48)
        self.attn = _CausalSelfAttention()
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(48, 96), torch.nn.GELU(approximate="tanh"), torch.nn.Linear(96, 48)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class _CausalSelfAttention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = torch.nn.Linear(48, 144), torch.nn.Linear(48, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (3, 16)).transpose(1, 2) for y in self.c_attn(x).split(48, -1))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


def _timm_vit() -> torch.nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=2, num_heads=3, num_classes=7
    )


def _diffusers_block() -> torch.nn.Module:
    attention = pytest.importorskip("diffusers.models.attention")
    return attention.BasicTransformerBlock(48, 3, 16, cross_attention_dim=32, activation_fn="geglu")


# What is no model of transformers -> (model, inputs)
OTHERS: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[], Inputs]]] = {
    "nanoGPT": (lambda: torch.nn.Sequential(_Block(), _Block()),
                lambda: {"input": torch.randn(2, 21, 48)}),
    "torch.nn.Transformer": (
        lambda: torch.nn.Transformer(48, 3, 2, 2, 64, dropout=0.0, batch_first=True),
        lambda: {"src": torch.randn(2, 21, 48), "tgt": torch.randn(2, 9, 48)}),
    "timm ViT": (_timm_vit, lambda: {"x": torch.randn(2, 3, 32, 32)}),
    "diffusers block": (_diffusers_block,
                        lambda: {"hidden_states": torch.randn(2, 21, 48),
                                 "encoder_hidden_states": torch.randn(2, 9, 32)}),
}  # fmt: skip


def make(name: str, implementation: str, device: str) -> torch.nn.Module:
    """A random model, far from uniform attention, in eval mode."""
    if name in OTHERS:
        model = OTHERS[name][0]()
    else:
        cls, settings, _ = ARCHITECTURES[name]
        if not hasattr(transformers, cls):
            pytest.skip(f"transformers {transformers.__version__} has no {cls}")
        made = getattr(transformers, cls)
        config = made.config_class(**settings)
        model = made._from_config(config, attn_implementation=implementation)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.to(device).eval()


def build(name: str, device: str) -> torch.nn.Module:
    """`make` of the architecture's own best implementation."""
    try:
        return make(name, "sdpa", device)
    except ValueError:  # it has no other
        return make(name, "eager", device)


def inputs(name: str, device: str) -> tuple[Inputs, torch.Tensor | None]:
    """Arguments of the model, and which positions of its output are defined, None for all."""
    torch.manual_seed(1)
    tokens = torch.randint(2, 97, (3, 21))
    kind = "" if name in OTHERS else ARCHITECTURES[name][2]
    given, defined = {"input_ids": tokens}, None
    if name in OTHERS:
        given = OTHERS[name][1]()
    elif kind == WAVE:
        given = {"input_values": torch.randn(2, 400)}
    elif kind == PICTURE:
        given = {"pixel_values": torch.randn(3, 3, 16, 16)}
    elif kind == PAIR:
        given["pixel_values"] = torch.randn(3, 3, 16, 16)
    elif kind == SPOKEN:
        given = {"input_features": torch.randn(3, 8, 40), "decoder_input_ids": tokens[:, :9]}
    elif kind == PACKED:
        places = torch.cat([torch.arange(9), torch.arange(tokens.shape[1] - 9)])
        given = {"input_ids": tokens[:1], "position_ids": places[None]}
    elif kind != WHOLE:
        padding = torch.ones_like(tokens)
        padding[0, :5] = 0
        given["attention_mask"] = padding = padding if kind == LEFT else padding.flip(1)
        if kind == ENCODED:
            given["decoder_input_ids"] = tokens[:, :9]
        else:
            defined = padding.bool().to(device)
    return {n: x.to(device) for n, x in given.items()}, defined
