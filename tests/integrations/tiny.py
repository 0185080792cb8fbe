"""Small random models of each kind that `accelerate` meets, and how to judge them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fastattn.integrations import Entry, Report

VOCABULARY = 97
HIDDEN = 24  # of modules by themselves
DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 3,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip
BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 6, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


class Plain(torch.nn.Module):
    """A causal language model that knows nothing of any library."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, 48)
        self.norm1 = torch.nn.LayerNorm(48)
        self.qkv = torch.nn.Linear(48, 144)
        self.out = torch.nn.Linear(48, 48)
        self.norm2 = torch.nn.RMSNorm(48)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(48, 96), torch.nn.GELU(), torch.nn.Linear(96, 48)
        )
        self.head = torch.nn.Linear(48, VOCABULARY, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return self.head(x + self.mlp(self.norm2(x)))


def _of_transformers(model: str, config: str, settings: dict[str, Any]) -> torch.nn.Module:
    import transformers

    made = getattr(transformers, config)(**settings)
    return getattr(transformers, model)._from_config(made, attn_implementation="sdpa")


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "plain": Plain,
    "gpt2": lambda: _of_transformers("GPT2LMHeadModel", "GPT2Config", GPT2),
    "llama": lambda: _of_transformers("LlamaForCausalLM", "LlamaConfig", DECODER),
    "bert": lambda: _of_transformers("BertForMaskedLM", "BertConfig", BERT),
}


def make(name: str, device: str = "cpu") -> torch.nn.Module:
    """In eval mode, with weights far from uniform attention and from norms that do nothing."""
    model = MODELS[name]().to(device).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    if hasattr(model, "config"):
        model.config.use_cache = False
    return model


class Logits(torch.nn.Module):
    """A model as a function of a tensor to a tensor, which is what tools that export ask for."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        out = self.model(input_ids)
        return out if isinstance(out, torch.Tensor) else out[0]


def tokens(batch: int, seqlen: int, device: str = "cpu") -> torch.Tensor:
    """Neither eos nor padding."""
    generator = torch.Generator().manual_seed(batch + seqlen)
    return torch.randint(2, VOCABULARY, (batch, seqlen), generator=generator).to(device)


def exact(model: torch.nn.Module) -> torch.nn.Module:
    """A copy in float64."""
    return copy.deepcopy(model).double()


def random_(model: torch.nn.Module, std: float = 1.0) -> torch.nn.Module:
    """Weights that let no mistake hide behind ones and zeros."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std)
    return model


def names(entries: tuple[Entry, ...]) -> list[str]:
    return [entry.name for entry in entries]


def swapped(report: Report) -> Counter[str]:
    """How many modules of each class."""
    return Counter(entry.class_name for entry in report.swapped)


def classes(model: torch.nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def fresh(module: torch.nn.Module, device: str) -> torch.nn.Module:
    return copy.deepcopy(module).to(device).eval()


def decoder(family: str, settings: dict[str, Any]) -> Any:
    """A random model of transformers that dispatches."""
    import transformers

    config = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config"))
    torch.manual_seed(0)
    cls = getattr(transformers, f"{family}ForCausalLM")
    return cls._from_config(config(**settings), attn_implementation="sdpa").eval()


def logits_and_gradients(
    model: torch.nn.Module, ids: torch.Tensor, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model).to(dtype)
    logits = model(input_ids=ids, use_cache=False).logits
    logits.double().softmax(-1).square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}
