"""Small models and prompts for the methods of generation, and a tokenizer of a letter a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastattn import GPT, GPTConfig


def make_model(seed: int = 0, device: str = "cpu", **changes: Any) -> GPT:
    """A GPT with weights so large that no rounding changes the order of its logits."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 61, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    special = {"bos_token_id": None, "eos_token_id": None}
    config = GPTConfig(**{**sizes, **special, "initializer_range": 0.3, **changes})
    return GPT(config, device=device).eval()


def make_prompts(lengths: Sequence[int], vocab_size: int = 61, seed: int = 0) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=draw).tolist() for n in lengths]


def padded(prompts: list[list[int]], pad: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask), padded on the left."""
    longest = max(map(len, prompts))
    ids = [[pad] * (longest - len(p)) + p for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


class Letters:
    def decode(self, ids: list[int]) -> str:
        return "".join(chr(0x4E00 + i) for i in ids)
