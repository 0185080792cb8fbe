"""What the processes of tests/training/distributed/test_tensor.py do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import fastattn
from fastattn.models import (
    Encoder,
    EncoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    EncoderForMaskedLM,
)
from fastattn.training.distributed.layout import DistributedConfig, mesh_of
from fastattn.training.distributed.tensor import canonical, parallelize

SIZES: dict[str, Any] = {
    "vocab_size": 37, "n_positions": 24, "n_embd": 24, "n_layer": 2, "n_head": 4,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "norm": "rms_norm", "positions": "rotary", "gated": True, "activation_function": "silu",
    "n_inner": 20, "qkv_bias": False, "out_bias": False, "mlp_bias": False,
    "tie_word_embeddings": False,
}  # fmt: skip
# Each with its reason: together they have every kind of module and every way of reading it.
GPTS: dict[str, dict[str, Any]] = {
    "gpt2": {},  # biases everywhere, a tied head, as many key heads as query heads
    "llama": {**LLAMA, "n_head": 8, "head_size": 6, "n_kv_head": 4},  # groups of two heads
    "qwen3": {**LLAMA, "qk_norm": "head", "qkv_bias": True, "head_bias": True},
    "gemma2": {
        **LLAMA, "norm": "offset_rms_norm", "norm_placement": "both", "embedding_scale": 4.9,
        "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "tie_word_embeddings": True,
        "sliding_window": 5, "layer_types": ("sliding_attention", "full_attention"),
    },
    "olmo2": {**LLAMA, "norm_placement": "output", "qk_norm": "all"},  # a norm over all heads
    "qk_norm_without_rotation": {"qk_norm": "head", "norm": "rms_norm"},
}  # fmt: skip


def gpt(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> fastattn.GPT:
    torch.manual_seed(3)
    config = fastattn.GPTConfig(**{**SIZES, **GPTS[name], **changes})
    model = fastattn.GPT(config, dtype=torch.float64)
    for parameter in model.parameters():  # no norm or bias as it is at first
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.to(torch.float32).to(dtype)  # the same rounded weights in each dtype


def batch(rows: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens and targets, some of which do not count."""
    generator = torch.Generator().manual_seed(seed)
    ids, targets = torch.randint(37, (2, rows, 11), generator=generator)
    return ids, targets.masked_fill(torch.rand(targets.shape, generator=generator) < 0.2, -100)


def results(model: torch.nn.Module, loss: Tensor, **others: Tensor) -> dict[str, Tensor]:
    """The loss and the gradients of one process or of all together."""
    loss.backward()
    found = {"loss": loss.detach(), **others}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name] = whole(canonical(model, name, parameter.grad))
    return found


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def tensor_mesh(count: int) -> Any:
    return mesh_of(DistributedConfig(tensor=count), "cpu")["tensor"]


def gpt_results(model: fastattn.GPT, rows: int = 3, seed: int = 0) -> dict[str, Tensor]:
    ids, targets = batch(rows, seed)
    with torch.no_grad():
        logits = model(ids)
        both, kept = model(ids, targets)
        assert torch.equal(both, logits)
    _, loss = model(ids, targets, keep_logits=False)
    return results(model, loss, logits=logits, kept=kept)


def sent(found: dict[str, Tensor]) -> dict[str, Any]:
    """As arrays: a tensor's memory goes with its process."""
    return {name: tensor.detach().numpy() for name, tensor in found.items()}


def gpts(rank: int, count: int, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    return {name: sent(gpt_results(parallelize(gpt(name), tensor_mesh(count)))) for name in names}


SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 37, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20, "dropout": 0.0, "pad_token_id": 0, "decoder_start_token_id": 0,
}  # fmt: skip
