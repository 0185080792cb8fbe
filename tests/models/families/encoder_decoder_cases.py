"""Small random encoder-decoders of transformers, of every family that is read."""

from __future__ import annotations

from typing import Any

import torch
import transformers

T5: dict[str, Any] = {
    "vocab_size": 97, "d_model": 48, "d_kv": 10, "d_ff": 60, "num_layers": 3,
    "num_decoder_layers": 2, "num_heads": 4, "dropout_rate": 0.0, "decoder_start_token_id": 0,
    # So that sentences of some twenty tokens reach every bucket.
    "relative_attention_num_buckets": 12, "relative_attention_max_distance": 20,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": 97, "d_model": 48, "encoder_layers": 3, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 60,
    "decoder_ffn_dim": 60, "max_position_embeddings": 40, "dropout": 0.0, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "init_std": 0.15,
    "forced_eos_token_id": None,
}  # fmt: skip

# The first of each family is its usual form.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", {}),
    "t5, gated silu, one layer": (
        "t5", {"feed_forward_proj": "gated-silu", "num_layers": 1, "num_decoder_layers": 1}
    ),
    "t5 1.1": ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "bart": ("bart", {}),
    "bart, asymmetric, scaled": (
        "bart",
        {
            "decoder_attention_heads": 2, "decoder_ffn_dim": 28, "scale_embedding": True,
            "activation_function": "relu",
        },
    ),
    "marian": ("marian", {"scale_embedding": True, "activation_function": "swish"}),
    "marian, relu": ("marian", {"activation_function": "relu", "decoder_start_token_id": 0}),
}  # fmt: skip
USUAL = ["t5", "t5 1.1", "bart", "marian"]


def theirs(name: str, seed: int = 0, **changes: Any) -> Any:
    """A random model of transformers, in eval mode; norms and biases random too."""
    torch.manual_seed(seed)
    kind, own = CASES[name]
    cls: Any = type(transformers.AutoConfig.for_model(kind))
    config = cls(**{**(T5 if kind == "t5" else BART), **own, **changes})
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    if own.get("tie_word_embeddings") is False:  # transformers ties T5's until a file has the head
        model.lm_head.weight = torch.nn.Parameter(0.15 * torch.randn(97, 48))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "layers" in key or "block" in key:  # else the embedding outweighs them all
                parameter.mul_(2.0)
        if kind != "t5":
            model.final_logits_bias.normal_(std=0.1)
    return model


def batch_of_padded() -> dict[str, torch.Tensor]:
    """Source and labels, with padding before and after the source's tokens."""
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(3, 97, (3, 33), generator=generator)
    labels = torch.randint(3, 97, (3, 25), generator=generator)
    labels[:, ::4] = -100
    mask = torch.ones_like(source)
    mask[0, :4] = mask[1, 20:] = mask[2, :2] = mask[2, 30:] = 0
    return {"input_ids": source, "labels": labels, "attention_mask": mask}
