"""From logits to the next tokens: temperature, top-k, top-p, min-p, and the draw.

Shapes: B batch, V vocabulary. The order is that of transformers, and so is each step's result.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.nn.checks import check_integer, check_number, check_seed

Processor = Callable[[Tensor, Tensor], Tensor]

# In place of a token where the logits do not say one.
NO_TOKEN = -1


@dataclass(frozen=True)
class Sampling:
    """How the next token follows from the logits.

    The fields have transformers' names and meaning and are `generate`'s arguments; those that only
    vLLM has (presence_penalty, frequency_penalty) have its. `processors.process` applies what asks
    for the tokens before, `warp` the rest.

    Attributes:
        do_sample: draw from the distribution; else take the most probable token.
        temperature: divides the logits.
        top_k: keep the k most probable tokens, and those as probable as the k-th; None or 0: all.
        top_p: keep the fewest tokens that have the probability p together; None or 1: all.
        min_p: keep the tokens at least min_p times as probable as the most probable one
            (Nguyen et al. 2024, arXiv:2407.01082).
        repetition_penalty: divide the logit of a token that was there if positive, else multiply it
            (Keskar et al. 2019, arXiv:1909.05858); of the prompt and all new tokens.
        presence_penalty: subtracted from the logit of a new token that was there.
        frequency_penalty: subtracted once for each time that it was there.
        no_repeat_ngram_size: no n tokens in a row come twice; 0: they may.
        bad_words_ids: sequences of tokens that must not come up.
        suppress_tokens, begin_suppress_tokens: tokens that must not, at all or as the first new.
        min_length, min_new_tokens: no end before so many tokens, the prompt's included or not.
        forced_bos_token_id: the token after the first one of all (encoder-decoders' languages).
        forced_eos_token_id: the last of ``max_new_tokens``, one or several to choose from.
        logits_processor: functions ``(ids (B, n), logits (B, V)) -> logits (B, V)``, in order, as
            transformers' `LogitsProcessor`. Sequences of unequal lengths come in separate calls:
            ids are prompt and new tokens, never padding. The logits are float32.

    Raises TypeError or ValueError, naming the argument, for a value that says nothing.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] = ()
    suppress_tokens: Sequence[int] = ()
    begin_suppress_tokens: Sequence[int] = ()
    min_length: int = 0
    min_new_tokens: int = 0
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | Sequence[int] | None = None
    logits_processor: Processor | Sequence[Processor] = ()

    def __post_init__(self) -> None:
        def settle(name: str, value: object) -> None:
            object.__setattr__(self, name, value)  # the class is frozen

        for name in ("temperature", "repetition_penalty"):
            if not 0 < (value := check_number(name, getattr(self, name))) < math.inf:
                raise ValueError(
                    f"{name} must be positive and finite, got {getattr(self, name)}"
                    + ("; for greedy decoding leave do_sample False" if value == 0 else "")
                )
            settle(name, value)
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(value := check_number(name, getattr(self, name))):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")
            settle(name, value)  # torch subtracts no integer beyond 64 bits
        for name in ("no_repeat_ngram_size", "min_length", "min_new_tokens"):
            check_integer(name, getattr(self, name), at_least=0)
        if self.top_k is not None and check_integer("top_k", self.top_k, otherwise=" or None") < 0:
            raise ValueError(f"top_k must be at least 1, or 0 or None for all, got {self.top_k}")
        for name, least in (("top_p", "("), ("min_p", "[")):
            if (value := getattr(self, name)) is not None:
                number = check_number(name, value)
                if not 0 <= number <= 1 or (least == "(" and number == 0):
                    raise ValueError(f"{name} must be in {least}0, 1], or None, got {value}")
        if not isinstance(self.bad_words_ids, Sequence):
            raise TypeError(f"bad_words_ids must be lists of ids, got {self.bad_words_ids!r}")
        settle("bad_words_ids", tuple(check_ids("bad_words_ids", w) for w in self.bad_words_ids))
        if not all(self.bad_words_ids):
            raise ValueError("bad_words_ids must have no empty sequence")
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            settle(name, check_ids(name, getattr(self, name)))
        if self.forced_eos_token_id is not None:
            ends = check_ids("forced_eos_token_id", self.forced_eos_token_id)
            settle("forced_eos_token_id", ends or None)
        if self.forced_bos_token_id is not None:
            check_integer("forced_bos_token_id", self.forced_bos_token_id, at_least=0)
        given = self.logits_processor
        processors = tuple(given) if isinstance(given, Sequence) else (given,)
        if not all(map(callable, processors)):
            raise TypeError(f"logits_processor must be a function or several, got {given!r}")
        settle("logits_processor", processors)
        if not self.do_sample:
            shaping = [name for name in SHAPING if getattr(self, name) not in (SHAPING[name], None)]
            if shaping:
                raise ValueError(
                    f"{' and '.join(shaping)} would have no effect: they shape the distribution "
                    "that do_sample=True draws from"
                )

    @property
    def asks_for_history(self) -> bool:
        """Whether `processors.process` has anything to do."""
        return any(getattr(self, field.name) != field.default for field in HISTORY)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError if a field names a token outside of the vocabulary."""
        for name in (
            "bad_words_ids",
            "suppress_tokens",
            "begin_suppress_tokens",
            "forced_bos_token_id",
            "forced_eos_token_id",
        ):
            value = getattr(self, name)
            tokens = [value] if isinstance(value, int) else value or ()
            flat = [
                t for token in tokens for t in (token if isinstance(token, tuple) else (token,))
            ]
            if flat and max(flat) >= vocab_size:
                raise ValueError(
                    f"{name} must be from 0 to vocab_size - 1 = {vocab_size - 1}, got {max(flat)}"
                )


# What shapes the distribution, and the value that shapes nothing.
SHAPING: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
HISTORY = [
    field for field in dataclasses.fields(Sampling) if field.name not in {"do_sample", *SHAPING}
]


def check_ids(name: str, ids: object) -> tuple[int, ...]:
    """One or several token ids as a tuple; TypeError or ValueError naming ``name``."""
    several = [ids] if isinstance(ids, int) else ids
    if not isinstance(several, Sequence) or isinstance(several, str):
        raise TypeError(f"{name} must be token ids, got {ids!r}")
    return tuple(check_integer(f"each of {name}", token, at_least=0) for token in several)


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide a seen token's logit by ``penalty`` if positive, else multiply it.

    The repetition penalty of Keskar et al. 2019 (CTRL, arXiv:1909.05858). logits (B, V), seen
    (B, V) boolean.
    """
    penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, penalised, logits)


def choose(logits: Tensor, sampling: Sampling, uniform: Tensor | None) -> Tensor:
    """The next token a row: (B, V) logits, and (B,) numbers where it is drawn -> (B,) int64."""
    if uniform is None:
        return most_probable(logits)
    return draw(warp(logits.float(), sampling), uniform)


def warp(logits: Tensor, sampling: Sampling, keep: int = 1) -> Tensor:
    """The logits (B, V) of the distribution to draw from: what is not to be drawn is -inf.

    At least the ``keep`` most probable tokens remain.
    """
    if sampling.temperature != 1.0:
        logits = logits / sampling.temperature
    kept = logits.shape[-1]
    if sampling.top_k and (top_k := max(sampling.top_k, keep)) < kept:
        least = logits.topk(top_k).values[:, -1:]
        removed = logits < least
        logits = logits.masked_fill(removed, -math.inf)
        if logits.is_cpu:  # only these need sorting; the number is cheap to read here
            kept -= int(removed.sum(-1).min())
    if sampling.top_p is not None and sampling.top_p < 1:
        logits = _nucleus(logits, sampling.top_p, kept, keep)
    if sampling.min_p:
        probabilities = logits.softmax(-1)
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        best = probabilities.topk(min(keep, logits.shape[-1])).indices
        logits = logits.masked_fill((probabilities < least).scatter(-1, best, False), -math.inf)
    return logits


def _nucleus(logits: Tensor, top_p: float, kept: int, keep: int) -> Tensor:
    """Keep the fewest tokens whose probabilities sum to ``top_p`` (Holtzman et al. 2019,
    arXiv:1904.09751), at least ``keep``; all but ``kept`` of a row's logits are -inf already.
    """
    if kept < logits.shape[-1]:
        order = logits.topk(kept).indices.flip(-1)
    else:
        order = logits.argsort(dim=-1)
    ascending = logits.gather(-1, order)
    # The probability of all up to a token: where it is at most 1 - top_p, the rest suffices.
    remove = _running_sum(ascending.softmax(-1), torch.float32) <= 1 - top_p
    remove[:, -keep:] = False
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
    streams = generators(seed, batch_size)
    if seed is None or isinstance(seed, torch.Generator):
        (stream,) = streams
        where = torch.device("cpu") if stream is None else stream.device
        numbers = torch.rand(steps, batch_size, generator=stream, dtype=torch.float64, device=where)
    else:
        rows = [
            torch.rand(steps, generator=stream, dtype=torch.float64, device="cpu")
            for stream in streams
        ]
        numbers = torch.stack(rows, dim=1)
    # A product with the largest number below 1 may round to the whole sum, past the last token.
    return numbers.clamp_(max=1 - 2.0**-50).to(device)


def generators(
    seed: int | Sequence[int] | torch.Generator | None, batch_size: int
) -> list[torch.Generator | None]:
    """The streams that a seed stands for: one a row on the CPU, or one for all rows together.

    The latter for a generator, or None, which is torch's default one. Raises as `uniforms` does.
    """
    if seed is None or isinstance(seed, torch.Generator):
        return [seed]
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
    return [torch.Generator("cpu").manual_seed(s) for s in seeds]
