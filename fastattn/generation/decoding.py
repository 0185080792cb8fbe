"""Decoding one token at a time, greedily or by sampling, and the parts that all methods share.

Shapes: B batch, T the longest prompt, V vocabulary.

Prompts of unequal lengths are moved to the left, so that each sequence lies from position 0 on,
exactly as it would alone; what is padding then comes after a prompt, where no causal query sees
it, and the cache lets the first new token overwrite it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastattn.generation import graphs, processors, sampling
from fastattn.generation.contract import LanguageModel, is_encoder_decoder
from fastattn.generation.prompts import right_padded
from fastattn.generation.sampling import Sampling
from fastattn.generation.stopping import StopStrings
from fastattn.nn.stored_cache import FIRST

if TYPE_CHECKING:
    from fastattn.models.cache import KVCache

# On a GPU the host asks only every so many steps whether all sequences have ended, since it has to
# wait for the answer. The steps in between cost time and leave no trace.
STEPS_BETWEEN_CHECKS = 16

# On a CPU, tokens of padding that another pass over the prompts has to spare: it reads all weights
# again, which takes as long as 16 to 32 tokens more in a pass.
LEAST_SPARED = 64


@dataclass(frozen=True)
class Task:
    """A call of `generate`, checked: what a decoding method works from.

    Attributes:
        prompts: of the decoder, without padding.
        ends, pad: the tokens that end a sequence, and what fills it after that.
        texts: the texts that end a sequence.
        on_token: is told the new tokens (B,) of each step.
        encoder: what an encoder-decoder's cache is made from.
        stored: what else a cache is made from: ``dtype``, where it has 8-bit numbers.
    """

    model: LanguageModel
    prompts: list[list[int]]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    ends: list[int] = field(default_factory=list)
    pad: int = 0
    texts: StopStrings | None = None
    on_token: Callable[[Tensor], None] | None = None
    encoder: dict[str, Tensor] = field(default_factory=dict)
    stored: dict[str, Any] = field(default_factory=dict)

    def new_tokens(self, copies: int = 1) -> Tensor:
        """(B * copies, max_new_tokens) of padding."""
        shape = (len(self.prompts) * copies, self.max_new_tokens)
        return torch.full(shape, self.pad, device=self.model.device)

    @functools.cached_property
    def end_tokens(self) -> Tensor:
        return torch.tensor(self.ends, dtype=torch.int64, device=self.model.device)

    def going_on(self, rows: Tensor, new: Tensor) -> Tensor:
        """Which of ``rows`` (B,) the last of the new tokens (B, n) does not end."""
        if self.ends:
            rows = rows & ~torch.isin(new[:, -1], self.end_tokens)
        if self.texts is not None:
            rows = rows & ~self.texts.ended(self.prompts, new, rows)
        return rows


def one_by_one(task: Task, numbers: Tensor | None) -> Tensor:
    """The new tokens (B, n), greedy, or drawn by ``numbers`` (max_new_tokens, B)."""
    new = task.new_tokens()
    batch_size, max_new_tokens = new.shape
    decoder, logits = start(task)
    history = History(task)
    stops = bool(task.ends) or task.texts is not None
    unfinished = torch.ones(batch_size, dtype=torch.bool, device=new.device)
    needed = torch.zeros((), dtype=torch.int64, device=new.device)  # steps until all had ended
    found = torch.zeros_like(needed).expand(batch_size)  # a row's token, NO_TOKEN from the first on
    every = check_every(task)

    for step in range(max_new_tokens):
        logits = history.process(logits, new[:, :step])
        tokens = sampling.choose(logits, task.sampling, None if numbers is None else numbers[step])
        if stops:
            tokens = torch.where(unfinished, tokens, task.pad)
            needed += unfinished.any()
        last, checked = step + 1 == max_new_tokens, (step + 1) % every == 0
        if every > 1:  # no step is waited for
            found = torch.where(found < 0, found, tokens)
            tokens = tokens.clamp(min=0)
        if last or checked:
            check_tokens(tokens if every == 1 else found, step)
        new[:, step] = tokens
        unfinished = task.going_on(unfinished, new[:, : step + 1])
        if task.on_token is not None:
            task.on_token(new[:, step])
        if last or (stops and checked and not unfinished.any()):
            break
        logits = decoder(tokens)
    return new[:, : int(needed)] if stops else new


def check_every(task: Task) -> int:
    """After how many steps to ask whether all have ended; 1 where each is waited for anyway."""
    on_cpu = task.model.device.type == "cpu"
    waited_for = on_cpu or task.on_token is not None or task.texts is not None
    return 1 if waited_for else STEPS_BETWEEN_CHECKS


def check_tokens(tokens: Tensor, step: int) -> None:
    """Raise where the logits said no token."""
    listed = tokens.tolist()
    if sampling.NO_TOKEN in listed:
        raise no_token(listed.index(sampling.NO_TOKEN), step)


def no_token(prompt: int, step: int) -> ValueError:
    return ValueError(
        f"the logits of prompt {prompt} are NaN or infinite by new token {step}, and say no token: "
        "look for NaN in the weights, or for a dtype that is too narrow (float16 overflows where "
        "bfloat16 does not)"
    )


class History:
    """The tokens of each sequence, for what asks for them: prompts, then new tokens."""

    def __init__(self, task: Task, copies: int = 1) -> None:
        self._task = task
        self._prompts = [prompt for prompt in task.prompts for _ in range(copies)]
        self._ids: Tensor | None = None

    def process(self, logits: Tensor, new: Tensor) -> Tensor:
        """The logits (B, V) of the next token, after the new ones (B, n)."""
        task, step = self._task, new.shape[1]
        if not task.sampling.asks_for_history:
            return logits
        if self._ids is None:
            self._ids = processors.padded(self._prompts, logits.shape[-1], logits.device)
        ids, size = torch.cat([self._ids, new], dim=1), (len(new),)
        counts = torch.full(size, step, device=ids.device)
        last = torch.full(size, step + 1 == task.max_new_tokens, device=ids.device)
        return processors.process(logits, ids, counts, last, task.sampling, task.ends)


def start(task: Task, copies: int = 1) -> tuple[graphs.GraphDecoder, Tensor]:
    """A decoder that has read each prompt ``copies`` times, and the logits after it: (B * copies,
    V), a prompt's copies one after another.
    """
    prompts, model = task.prompts, task.model
    longest = max(map(len, prompts))
    encoder = {k: v.repeat_interleave(copies, 0) for k, v in task.encoder.items()}
    size, capacity = len(prompts) * copies, longest + task.max_new_tokens
    decoder = _decoder(model, size, capacity, **encoder, **task.stored)
    if copies == 1:
        return decoder, prefill(model, prompts, decoder.cache)
    cache = model.new_cache(len(prompts), longest, **task.encoder, **task.stored)
    logits = prefill(model, prompts, cache)
    rows = torch.arange(len(prompts), device=model.device).repeat_interleave(copies)
    decoder.cache.fill(cache, rows)
    return decoder, logits[rows]


def decode(model: LanguageModel, tokens: Tensor, cache: KVCache) -> Tensor:
    """One step: (B,) the last tokens -> (B, V) the logits of the next."""
    logits: Tensor = model.lm_head(model.features(tokens.unsqueeze(1), cache)[:, -1])
    return logits


def prefill(model: LanguageModel, prompts: list[list[int]], cache: KVCache) -> Tensor:
    """Read the prompts into the empty cache; (B, V) the logits after each prompt's last token."""
    hidden = read_prompts(model, prompts, cache)
    rows = torch.arange(len(prompts), device=hidden.device)
    last = torch.tensor(list(map(len, prompts)), device=hidden.device) - 1
    logits: Tensor = model.lm_head(hidden[rows, last])
    return logits


def read_prompts(model: LanguageModel, prompts: list[list[int]], cache: KVCache) -> Tensor:
    """Read the prompts into the empty cache; (B, T, C) their hidden states, padded on the right.

    On a CPU a decoder reads prompts of very unequal lengths in several passes, with less padding.
    Where the first tokens decide on the scales of 8-bit numbers, there is no padding among them.
    """
    lengths = list(map(len, prompts))
    stored = {"dtype": cache.layers[0].keys.dtype} if cache.layers[0].k_scale is not None else {}
    spares = model.device.type == "cpu" and not is_encoder_decoder(model)
    batches = _batches(lengths, LEAST_SPARED if spares else None, FIRST if stored else 0)
    if len(batches) == 1:
        return _read_padded(model, prompts, cache)
    hidden = None
    for rows in batches:
        some = [prompts[row] for row in rows]
        own = model.new_cache(len(rows), len(some[0]), **stored)
        states = _read_padded(model, some, own)
        cache.place(own, torch.tensor(rows, device=model.device))
        if hidden is None:  # of the longest prompt
            hidden = states.new_zeros(len(prompts), *states.shape[1:])
        hidden[rows, : states.shape[1]] = states
    assert hidden is not None
    return hidden


def _batches(lengths: list[int], spared: int | None, first: int) -> list[list[int]]:
    """The prompts that are read together, the longest first.

    A further pass spares at least so many tokens of padding (None: none does), or keeps padding out
    of the ``first`` tokens of a prompt.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    batches: list[list[int]] = [[]]
    for place, row in enumerate(order):
        padding = lengths[batches[-1][0]] - lengths[row] if batches[-1] else 0
        worth = spared is not None and padding * (len(order) - place) >= spared
        if worth or (padding and lengths[row] < first):
            batches.append([])
        batches[-1].append(row)
    return batches


def _read_padded(model: LanguageModel, prompts: list[list[int]], cache: KVCache) -> Tensor:
    lengths = list(map(len, prompts))
    hidden = model.features(right_padded(prompts, model.device), cache)
    if min(lengths) < max(lengths):
        cache.set_lengths(lengths)
    return hidden


def _decoder(
    model: LanguageModel, batch_size: int, capacity: int, **options: Any
) -> graphs.GraphDecoder:
    captures = graphs.captures(model)
    if captures and "encoded" not in options:  # whose keys and values are this call's
        return graphs.decoder(decode, model, batch_size, capacity, **options)
    cache = model.new_cache(batch_size, capacity, **options)
    decoder = graphs.GraphDecoder(decode, model, cache)
    return decoder.capture() if captures else decoder
