"""From logits to the next tokens: penalty, temperature, top-k, top-p, and the draw.

Shapes: B batch, V vocabulary. The order is that of transformers, and so is each step's result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.nn.checks import check_seed

# In place of a token where the logits do not say one.
NO_TOKEN = -1


@dataclass(frozen=True)
class Sampling:
    """How the next token follows from the logits; the arguments are `generate`'s.

    Raises TypeError or ValueError, naming the argument, for a value that says nothing.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "repetition_penalty"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not 0 < value < math.inf:
                raise ValueError(
                    f"{name} must be positive and finite, got {value}"
                    + ("; for greedy decoding leave do_sample False" if value == 0 else "")
                )
        if self.top_k is not None:
            if isinstance(self.top_k, bool) or not isinstance(self.top_k, int):
                raise TypeError(f"top_k must be an integer or None, got {self.top_k!r}")
            if self.top_k < 1:
                raise ValueError(f"top_k must be at least 1, or None for all, got {self.top_k}")
        if self.top_p is not None:
            if isinstance(self.top_p, bool) or not isinstance(self.top_p, (int, float)):
                raise TypeError(f"top_p must be a number or None, got {self.top_p!r}")
            if not 0 < self.top_p <= 1:
                raise ValueError(f"top_p must be in (0, 1], or None, got {self.top_p}")
        if not self.do_sample:
            given = [
                name
                for name, off in (("temperature", 1.0), ("top_k", None), ("top_p", None))
                if getattr(self, name) != off
            ]
            if given:
                raise ValueError(
                    f"{' and '.join(given)} would have no effect: they shape the distribution that "
                    "do_sample=True draws from"
                )


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide a seen token's logit by ``penalty`` if positive, else multiply it.

    The repetition penalty of Keskar et al. 2019 (CTRL, arXiv:1909.05858). logits (B, V), seen
    (B, V) boolean.
    """
    penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, penalised, logits)


def warp(logits: Tensor, sampling: Sampling) -> Tensor:
    """The logits (B, V) of the distribution to draw from: what is not to be drawn is -inf."""
    if sampling.temperature != 1.0:
        logits = logits / sampling.temperature
    kept = logits.shape[-1]
    if sampling.top_k is not None and sampling.top_k < kept:
        least = logits.topk(sampling.top_k).values[:, -1:]
        removed = logits < least
        logits = logits.masked_fill(removed, -math.inf)
        if logits.is_cpu:  # only these need sorting; the number is cheap to read here
            kept -= int(removed.sum(-1).min())
    if sampling.top_p is not None and sampling.top_p < 1:
        logits = _nucleus(logits, sampling.top_p, kept)
    return logits


def _nucleus(logits: Tensor, top_p: float, kept: int) -> Tensor:
    """Keep the fewest tokens whose probabilities sum to ``top_p`` (Holtzman et al. 2019,
    arXiv:1904.09751); all but ``kept`` of a row's logits are -inf already.
    """
    if kept < logits.shape[-1]:
        order = logits.topk(kept).indices.flip(-1)
    else:
        order = logits.argsort(dim=-1)
    ascending = logits.gather(-1, order)
    # The probability of all up to a token: where it is at most 1 - top_p, the rest suffices.
    remove = _running_sum(ascending.softmax(-1), torch.float32) <= 1 - top_p
    remove[:, -1] = False
    return logits.masked_fill(
        torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, remove), -math.inf
    )


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """A token a row, by inverting the distribution function at ``uniform``.

    logits (B, V); uniform (B,) float64 in [0, 1) -> (B,) int64. The number decides the token, so a
    row's tokens depend on nothing but its own logits and its own numbers. `NO_TOKEN` where the
    logits are no distribution: one is NaN or +inf, or all are -inf.
    """
    cumulative = _running_sum(logits.softmax(-1), torch.float64)  # (B, V)
    # Of the tokens with equal sums, the first has the probability; the others are 0.
    point = uniform.unsqueeze(-1) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, point, right=True)
    return tokens.masked_fill(point.isnan(), NO_TOKEN).squeeze(-1)


def most_probable(logits: Tensor) -> Tensor:
    """The greedy token a row, (B, V) -> (B,) int64; `NO_TOKEN` where a logit is NaN."""
    best = logits.max(-1)
    return best.indices.masked_fill(best.values.isnan(), NO_TOKEN)


def _running_sum(probabilities: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, V) in ``dtype``."""
    if probabilities.is_cuda and torch.are_deterministic_algorithms_enabled():
        # CUDA's cumsum is not deterministic, and raises.
        return probabilities.cpu().cumsum(-1, dtype=dtype).to(probabilities.device)
    return probabilities.cumsum(-1, dtype=dtype)


def uniforms(
    seed: int | Sequence[int] | torch.Generator | None,
    batch_size: int,
    steps: int,
    device: torch.device,
) -> Tensor:
    """The numbers that `draw` uses: (steps, B) float64 in [0, 1) on ``device``.

    Drawn on the CPU for a seed, so that they are the same wherever the model is: row b's from a
    stream of its own, seeded ``seed[b]``, or ``seed + b`` for a single seed. A generator, or
    torch's default one for None, gives one stream for all rows.

    Raises TypeError or ValueError for seeds of another kind or number.
    """
    if seed is None or isinstance(seed, torch.Generator):
        where = torch.device("cpu") if seed is None else seed.device
        numbers = torch.rand(steps, batch_size, generator=seed, dtype=torch.float64, device=where)
    else:
        if isinstance(seed, int) and not isinstance(seed, bool):
            seeds = [seed + row for row in range(batch_size)]
        elif isinstance(seed, Sequence) and all(type(s) is int for s in seed):
            seeds = list(seed)
        else:
            raise TypeError(
                "seed must be an integer, one for each sequence, a torch.Generator or None, "
                f"got {seed!r}"
            )
        if len(seeds) != batch_size:
            raise ValueError(
                f"seed must have one entry for each of {batch_size} sequences, got {len(seeds)}"
            )
        for row, each in enumerate(seeds):
            check_seed(f"the seed of sequence {row}", each)
        numbers = torch.stack(
            [
                torch.rand(
                    steps,
                    generator=torch.Generator("cpu").manual_seed(s),
                    dtype=torch.float64,
                    device="cpu",
                )
                for s in seeds
            ],
            dim=1,
        )
    # A product with the largest number below 1 may round to the whole sum, past the last token.
    return numbers.clamp_(max=1 - 2.0**-50).to(device)
