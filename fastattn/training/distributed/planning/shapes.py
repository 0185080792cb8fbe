"""The sizes of a GPT as a plan counts them, and a GPT for a number of parameters."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from fastattn.models import GPTConfig

LLAMA: dict[str, Any] = {
    "n_positions": 4096, "norm": "rms_norm", "positions": "rotary", "gated": True,
    "activation_function": "silu", "qkv_bias": False, "out_bias": False, "mlp_bias": False,
    "tie_word_embeddings": False, "vocab_size": 32000,
}  # fmt: skip

# GPT-2 XL (Radford et al. 2019); Llama 2 7B and 70B (Touvron et al. 2023, arXiv:2307.09288).
PUBLISHED: dict[str, dict[str, Any]] = {
    "1.5B": {"n_layer": 48, "n_embd": 1600, "n_head": 25},
    "7B": {**LLAMA, "n_layer": 32, "n_embd": 4096, "n_head": 32, "n_inner": 11008},
    "70B": {
        **LLAMA, "n_layer": 80, "n_embd": 8192, "n_head": 64, "n_kv_head": 8, "n_inner": 28672,
    },
}  # fmt: skip
HEAD = 128  # elements
ASPECT = 128  # width by layers, as of the published ones
UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Weights:
    """How many weights there are.

    Attributes:
        divided: those that tensor parallelism divides: matrices, and biases of their columns.
        whole: those that each process of "tensor" has: norms, positions, biases of the stream.
    """

    divided: int
    whole: int

    def of_rank(self, tensor: int) -> float:
        """How many a process of `tensor` has."""
        return self.divided / tensor + self.whole


@dataclass(frozen=True)
class Shape:
    """A GPT's sizes, all as numbers of elements."""

    config: GPTConfig

    @property
    def query_width(self) -> int:
        return self.config.n_head * self.config.head_dim

    @property
    def key_width(self) -> int:
        return self.config.kv_heads * self.config.head_dim

    @property
    def matrices(self) -> int:
        """Weights in the matrices of a block."""
        c = self.config
        feedforward = (3 if c.gated else 2) * c.feedforward_dim
        return c.n_embd * (2 * self.query_width + 2 * self.key_width + feedforward)

    @property
    def block(self) -> Weights:
        """Of one of the `n_layer` blocks."""
        c = self.config
        columns = c.qkv_bias * (self.query_width + 2 * self.key_width)
        columns += c.mlp_bias * (2 if c.gated else 1) * c.feedforward_dim
        norms = (4 if c.norm_placement == "both" else 2) * self._norm
        heads = {None: 0, "head": 2 * c.head_dim, "all": self.query_width + self.key_width}
        whole = norms + (c.out_bias + c.mlp_bias) * c.n_embd + heads[c.qk_norm]
        return Weights(self.matrices + columns, whole)

    @property
    def rest(self) -> Weights:
        """Of embeddings, last norm and head."""
        c = self.config
        embeddings = (1 if c.tie_word_embeddings else 2) * c.vocab_size * c.n_embd
        positions = c.n_positions * c.n_embd if c.positions == "learned" else 0
        return Weights(embeddings + c.head_bias * c.vocab_size, positions + self._norm)

    @property
    def parameters(self) -> int:
        blocks, rest = self.config.n_layer * self.block.of_rank(1), self.rest.of_rank(1)
        return round(blocks + rest)

    @property
    def _norm(self) -> int:
        return self.config.n_embd * (2 if self.config.norm == "layer_norm" else 1)

    def flops(self, length: int) -> float:
        """Operations of a token's forward and backward in sequences of `length` tokens.

        6 N + 12 L W T (Chowdhery et al. 2022, appendix B), as `fastattn train` counts them.
        """
        c = self.config
        weights = c.n_layer * self.matrices + c.vocab_size * c.n_embd
        return 6.0 * weights + 12.0 * c.n_layer * self.query_width * length


def number(text: str) -> float:
    """The number of "7B", "4M", "1.5e9" or "4096".

    Raises:
        ValueError: another text, or a number that is not positive and finite.
    """
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)([KMBT]?)", text.strip(), re.IGNORECASE)
    try:
        value = float(match[1]) * UNITS.get(match[2].upper(), 1) if match else 0.0
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise ValueError(
            f"{text!r} is no number: write digits and perhaps K, M, B or T, as in 350M, 7B, 1.5e9"
        )
    return value


def config_for(parameters: str, **changes: Any) -> GPTConfig:
    """A GPT with about so many parameters: a published one, or Llama 2's proportions.

    Args:
        parameters: "1.5B" is GPT-2 XL, "7B" and "70B" are Llama 2; others as `number` reads them.
        changes: fields of `GPTConfig`.

    Raises:
        ValueError: no number, or one that no GPT of these proportions has.
    """
    asked = number(parameters)
    for name, sizes in PUBLISHED.items():
        if asked == number(name):
            return GPTConfig(**{**sizes, **changes})
    if not 5e7 <= asked <= 1e13:
        raise ValueError(
            f"--params {parameters}: a number of parameters from 50M to 10T was expected; "
            "--layers, --width and --heads describe other models"
        )
    vocabulary = changes.get("vocab_size", LLAMA["vocab_size"])
    widths = range(HEAD, 1 << 17, HEAD)

    def layers(width: int) -> int:
        """As many as come nearest, of 12 width^2 weights each."""
        return max(1, round((asked - 2 * vocabulary * width) / (12 * width * width)))

    width = min(widths, key=lambda w: abs(math.log(w / layers(w) / ASPECT)))
    inner = 256 * max(1, round(8 * width / 3 / 256))
    sizes = {"n_embd": width, "n_layer": layers(width), "n_head": width // HEAD, "n_inner": inner}
    return GPTConfig(**{**LLAMA, **sizes, **changes})
