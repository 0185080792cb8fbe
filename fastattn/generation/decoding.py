"""Generating text: prompts in, tokens out, one at a time, with the keys and values kept.

Shapes: B batch, T the longest prompt, V vocabulary.

Prompts of unequal lengths are moved to the left, so that each sequence lies from position 0 on,
exactly as it would alone; what is padding then comes after a prompt, where no causal query sees
it, and the cache lets the first new token overwrite it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastattn.generation import graphs, sampling
from fastattn.generation.prompts import read_prompts, special_tokens
from fastattn.generation.sampling import Sampling
from fastattn.generation.stopping import StopStrings
from fastattn.nn.mode import in_mode

if TYPE_CHECKING:
    from fastattn.models.cache import KVCache
    from fastattn.models.gpt import GPT

# On a GPU the host asks only every so many steps whether all sequences have ended, since it has to
# wait for the answer. The steps in between cost time and leave no trace.
STEPS_BETWEEN_CHECKS = 16


def generate(
    model: GPT,
    input_ids: Tensor | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    seed: int | Sequence[int] | torch.Generator | None = None,
    on_token: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continue each prompt, greedily or by sampling, until ``max_new_tokens`` or its end.

        model.generate(tokens, max_new_tokens=50)
        model.generate([[1, 2, 3], [4]], max_new_tokens=50, do_sample=True, top_p=0.9, seed=0)

    Each sequence gets the tokens that it would get alone. Dropout is off meanwhile. On a CUDA GPU
    the steps replay a CUDA graph (`fastattn.generation.graphs`).

    Args:
        input_ids: the prompts: (B, T) token ids, on any device, or lists of token ids, of any
            lengths.
        max_new_tokens: how many tokens to add at most; prompt and new tokens together must fit
            into the model's ``n_positions``.
        attention_mask: (B, T), 1 for tokens and 0 for padding, which must come before the tokens
            (left padding). Without it every id of a tensor is a token.
        do_sample: draw from the distribution; else take the most probable token.
        temperature, top_k, top_p: divide the logits; keep the k most probable tokens (and those
            as probable as the k-th); keep the fewest that have the probability p together. In this
            order. None keeps all. (transformers keeps 50 unless told otherwise.)
        repetition_penalty: see `fastattn.generation.sampling.penalise`; of the prompt and all new
            tokens. Padding does not count, so that a sequence is continued as it would be alone.
        eos_token_id: the tokens that end a sequence; None means the config's, ``()`` none.
        pad_token_id: what fills a sequence after its end, and before a prompt given as a list;
            None means the config's, else the first eos token, else 0.
        stop_strings: texts that end a sequence, as in transformers: with the token that completes
            one of them, even if that token goes on after it or the prompt began it. Each step is
            then decoded on the host.
        tokenizer: for ``stop_strings``: what has ``decode(token_ids) -> str``, as
            `fastattn.training.Tokenizer` and the tokenizers of transformers have it.
        seed: for ``do_sample``. An integer gives row b a stream of its own, seeded ``seed + b``;
            several integers seed the rows one by one: so a row's tokens are those of its prompt
            alone with its seed. A generator, or torch's default one for None, is drawn from for all
            rows together. The same seed, model, prompts and arguments give the same tokens on the
            same machine and version of torch.
        on_token: called after every step with the new tokens, (B,) on the model's device, pad where
            a sequence has ended.

    Returns:
        (B, T + n) int64 on the model's device, n <= max_new_tokens: the prompts, padded on the left
        as they were given (lists: to the longest), and the new tokens.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. Nothing was computed.
        ValueError: the model's logits are NaN, or none can be drawn from.
    """
    config, device = model.config, model.device
    how = Sampling(do_sample, temperature, top_k, top_p, repetition_penalty)
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int):
        raise TypeError(f"max_new_tokens must be an integer, got {max_new_tokens!r}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    eos, pad = special_tokens(config, eos_token_id, pad_token_id)
    texts = StopStrings.of(stop_strings, tokenizer)
    ends = torch.tensor(eos, device=device) if eos else None
    prompts = read_prompts(config, input_ids, attention_mask)
    longest = max(map(len, prompts))
    if longest + max_new_tokens > config.n_positions:
        raise ValueError(
            f"the longest prompt of input_ids has {longest} tokens; with max_new_tokens = "
            f"{max_new_tokens} that is {longest + max_new_tokens}, more than the model's "
            f"n_positions = {config.n_positions}"
        )
    if seed is not None and not do_sample:
        raise ValueError("seed would have no effect: give do_sample=True too")
    numbers = sampling.uniforms(seed, len(prompts), max_new_tokens, device) if do_sample else None

    width = input_ids.shape[1] if isinstance(input_ids, Tensor) else longest
    out = torch.full((len(prompts), width + max_new_tokens), pad, device=device)
    if isinstance(input_ids, Tensor):
        out[:, :width] = input_ids
    else:
        for row, prompt in zip(out, prompts, strict=True):
            row[width - len(prompt) : width] = torch.tensor(prompt, device=device)

    with torch.inference_mode(), in_mode(model, training=False):
        new = out[:, width:]
        steps = _run(model, prompts, new, how, numbers, ends, texts, pad, on_token)
    return out[:, : width + steps]


def _run(
    model: GPT,
    prompts: list[list[int]],
    new: Tensor,
    how: Sampling,
    numbers: Tensor | None,
    ends: Tensor | None,
    texts: StopStrings | None,
    pad: int,
    on_token: Callable[[Tensor], None] | None,
) -> int:
    """Fill ``new`` (B, max_new_tokens) step by step; the number of steps until all have ended."""
    batch_size, max_new_tokens = new.shape
    decoder = _decoder(model, batch_size, max(map(len, prompts)) + max_new_tokens)
    logits = _prefill(model, prompts, decoder.cache)
    seen = _seen(prompts, logits) if how.repetition_penalty != 1.0 else None
    stops = ends is not None or texts is not None
    unfinished = torch.ones(batch_size, dtype=torch.bool, device=new.device)
    needed = torch.zeros((), dtype=torch.int64, device=new.device)  # steps until all had ended
    found = torch.zeros_like(needed).expand(batch_size)  # a row's token, NO_TOKEN from the first on
    check_every = _check_every(new, on_token, texts)

    for step in range(max_new_tokens):
        if seen is not None:
            logits = sampling.penalise(logits.float(), seen, how.repetition_penalty)
        if numbers is not None:
            tokens = sampling.draw(sampling.warp(logits.float(), how), numbers[step])
        else:
            tokens = sampling.most_probable(logits)
        if stops:
            tokens = torch.where(unfinished, tokens, pad)
            needed += unfinished.any()
        last, checked = step + 1 == max_new_tokens, (step + 1) % check_every == 0
        if check_every > 1:  # no step is waited for
            found = torch.where(found < 0, found, tokens)
            tokens = tokens.clamp(min=0)
        if last or checked:
            _check_tokens(tokens if check_every == 1 else found, step)
        new[:, step] = tokens
        if ends is not None:
            unfinished = unfinished & ~torch.isin(tokens, ends)
        if texts is not None:
            unfinished = unfinished & ~texts.ended(prompts, new[:, : step + 1], unfinished)
        if seen is not None:
            seen.scatter_(1, tokens.unsqueeze(1), True)
        if on_token is not None:
            on_token(new[:, step])
        if last or (stops and checked and not unfinished.any()):
            break
        logits = decoder(tokens)
    return int(needed) if stops else max_new_tokens


def _check_every(
    new: Tensor, on_token: Callable[[Tensor], None] | None, texts: StopStrings | None
) -> int:
    """After how many steps to ask whether all have ended; 1 where each is waited for anyway."""
    waited_for = new.is_cpu or on_token is not None or texts is not None
    return 1 if waited_for else STEPS_BETWEEN_CHECKS


def _check_tokens(tokens: Tensor, step: int) -> None:
    """Raise where the logits said no token."""
    listed = tokens.tolist()
    if sampling.NO_TOKEN in listed:
        raise ValueError(
            f"the logits of prompt {listed.index(sampling.NO_TOKEN)} are NaN or infinite by new "
            f"token {step}, and say no token: look for NaN in the weights, or for a dtype that is "
            "too narrow (float16 overflows where bfloat16 does not)"
        )


def decode(model: GPT, tokens: Tensor, cache: KVCache) -> Tensor:
    """One step: (B,) the last tokens -> (B, V) the logits of the next."""
    return model.lm_head(model.features(tokens.unsqueeze(1), cache)[:, -1])


def _prefill(model: GPT, prompts: list[list[int]], cache: KVCache) -> Tensor:
    """Read the prompts into the empty cache; (B, V) the logits after each prompt's last token."""
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    # Any id does as padding on the right: nothing that counts sees it.
    ids = torch.tensor(
        [prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=model.device
    )
    hidden = model.features(ids, cache)  # (B, T, C)
    if min(lengths) < longest:
        cache.set_lengths(lengths)
    rows = torch.arange(len(lengths), device=ids.device)
    last = torch.tensor(lengths, device=ids.device) - 1
    return model.lm_head(hidden[rows, last])


class EagerDecoder:
    """`decode` with a cache of its own."""

    def __init__(self, model: GPT, batch_size: int, capacity: int) -> None:
        self.model = model
        self.cache = model.new_cache(batch_size, capacity)

    def __call__(self, tokens: Tensor) -> Tensor:
        return decode(self.model, tokens, self.cache)


def _decoder(model: GPT, batch_size: int, capacity: int) -> EagerDecoder | graphs.GraphDecoder:
    if _decodes_by_graph(model):
        return graphs.decoder(decode, model, batch_size, capacity)
    return EagerDecoder(model, batch_size, capacity)


def _decodes_by_graph(model: GPT) -> bool:
    return model.device.type == "cuda"


def _seen(prompts: list[list[int]], logits: Tensor) -> Tensor:
    """(B, V), True for the tokens of each prompt."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row, prompt in zip(seen, prompts, strict=True):
        row[torch.tensor(prompt, device=row.device)] = True
    return seen
