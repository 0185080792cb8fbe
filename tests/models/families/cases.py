"""Small random models of transformers, of every family that is read, in every option of theirs."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Far from uniform, so that no mistake drowns and no two tokens tie.
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# GPT-2 has names of its own.
GPT2 = {
    "vocab_size": 97, "n_embd": 48, "n_inner": 80, "n_layer": 3, "n_head": 4, "n_positions": 64,
    "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GEMMA = {
    "head_dim": 16,
    "sliding_window": 9,
    "query_pre_attn_scalar": 25,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 24,
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5], "long_factor": [1.5, 2.0, 4.0, 5.5, 7.0, 9.0],
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}

# (model_type, the changes that differ from SMALL); the first of each family is its usual form.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2, scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2, not scaled": ("gpt2", {"scale_attn_weights": False}),
    "gpt2, untied": ("gpt2", {"tie_word_embeddings": False}),
    "gpt2, inner of the usual size": ("gpt2", {"n_inner": None}),
    "gpt2, gelu by erf": ("gpt2", {"activation_function": "gelu"}),
    "gpt2, relu": ("gpt2", {"activation_function": "relu"}),
    "gpt2, silu": ("gpt2", {"activation_function": "silu"}),
    "gpt2, epsilon": ("gpt2", {"layer_norm_epsilon": 0.1}),
    "gpt2, upcast": ("gpt2", {"reorder_and_upcast_attn": True, "attn_implementation": "eager"}),
    "llama": ("llama", {}),
    "llama, head_dim 16, tied": ("llama", {"head_dim": 16, "tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "llama, longrope": ("llama", {"rope_parameters": {**LONGROPE, "factor": 3.0}}),
    "llama, linear": ("llama", {"rope_parameters": LINEAR, "hidden_act": "gelu_pytorch_tanh"}),
    "mistral": ("mistral", {"sliding_window": 9}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2, windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3, biases": ("qwen3", {"head_dim": 16, "attention_bias": True, "rope_parameters": YARN}),
    "gemma2": ("gemma2", GEMMA),
    "gemma2, no caps": (
        "gemma2",
        {**GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": ("gemma3_text", GEMMA),
    "gemma3, scaled": (
        "gemma3_text",
        {
            **GEMMA,
            "final_logit_softcapping": 3.0,
            "rope_parameters": {
                "full_attention": LINEAR,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
        },
    ),
    "phi3": ("phi3", {}),
    "phi3, half of a head, window": (
        "phi3",
        {
            "sliding_window": 9,
            "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    "phi3, longrope": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 24},
    ),
    "phi3, longrope, a part of a head": (
        "phi3",
        {
            "original_max_position_embeddings": 24,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "rope_parameters": {
                **LONGROPE,
                "partial_rotary_factor": 0.75,
                "attention_factor": 1.3,
            },
        },
    ),
    "olmo2": ("olmo2", {}),
    "olmo2, biases, all heads": ("olmo2", {"attention_bias": True, "num_key_value_heads": 4}),
}
USUAL = [name for name, (_, _) in CASES.items() if "," not in name]


def their_config(name: str, **changes: Any) -> Any:
    kind, own = CASES[name]
    cls: Any = type(transformers.AutoConfig.for_model(kind))
    # Gemma's caps are computed by eager attention only.
    eager = {"attn_implementation": "eager"} if kind == "gemma2" else {}
    return cls(**{**(GPT2 if kind == "gpt2" else SMALL), **eager, **own, **changes})


def theirs(name: str, seed: int = 0, **changes: Any) -> Any:
    """A random model of transformers, in eval mode; norms and biases random too."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(their_config(name, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model
