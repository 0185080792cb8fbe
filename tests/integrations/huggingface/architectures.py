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
from integrations.huggingface.test_attention_families import (
    DECODER,
    ENCODED,
    ENCODER,
    FAMILIES,
    LEFT,
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
WAVE, PICTURE, PAIR = "waveform", "image", "image and text"
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


def build(name: str, device: str) -> torch.nn.Module:
    """A random model on its own best implementation, far from uniform attention, in eval mode."""
    if name in OTHERS:
        model = OTHERS[name][0]()
    else:
        cls, settings, _ = ARCHITECTURES[name]
        if not hasattr(transformers, cls):
            pytest.skip(f"transformers {transformers.__version__} has no {cls}")
        made = getattr(transformers, cls)
        try:
            model = made._from_config(made.config_class(**settings), attn_implementation="sdpa")
        except ValueError:  # it has no other
            model = made._from_config(made.config_class(**settings), attn_implementation="eager")
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.to(device).eval()


def inputs(name: str, device: str) -> tuple[Inputs, torch.Tensor | None]:
    """Arguments of the model, and which positions of its output are defined, None for all."""
    torch.manual_seed(1)
    tokens = torch.randint(2, 97, (3, 21))
    if name in OTHERS:
        given, defined = OTHERS[name][1](), None
    elif ARCHITECTURES[name][2] == WAVE:
        given, defined = {"input_values": torch.randn(2, 400)}, None
    elif ARCHITECTURES[name][2] == PICTURE:
        given, defined = {"pixel_values": torch.randn(3, 3, 16, 16)}, None
    elif ARCHITECTURES[name][2] == PAIR:
        given = {"input_ids": tokens, "pixel_values": torch.randn(3, 3, 16, 16)}
        defined = None
    else:
        given, defined = inputs_of(ARCHITECTURES[name][2], tokens)
    return {n: x.to(device) for n, x in given.items()}, defined
