"""Generating text: prompts in, tokens out, by one of the decoding methods.

`generate` checks the whole call, settles what the caller, the model's generation config and the
defaults say, and hands a `Task` to the method: `decoding` (greedy and sampling), `beams`,
`contrastive`, `speculative`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fastattn.generation import beams, contrastive, decoding, sampling, speculative
from fastattn.generation.config import GenerationConfig, settle
from fastattn.generation.contract import LanguageModel, is_encoder_decoder
from fastattn.generation.decoding import Task
from fastattn.generation.processors import padded
from fastattn.generation.prompts import (
    read_prompts,
    right_padded,
    special_tokens,
    start_token,
)
from fastattn.generation.stopping import StopStrings
from fastattn.nn.mode import in_mode
from fastattn.nn.stored_cache import cache_options

Seed = int | Sequence[int] | torch.Generator | None


def generate(
    model: LanguageModel,
    input_ids: Tensor | Sequence[Sequence[int]],
    *,
    attention_mask: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    draft_model: LanguageModel | None = None,
    tokenizer: Any = None,
    seed: Seed = None,
    on_token: Callable[[Tensor], None] | None = None,
    streamer: Any = None,
    cache_dtype: str | None = None,
    **settings: Any,
) -> Tensor:
    """Continue each prompt, until ``max_new_tokens`` or its end.

        model.generate(tokens, max_new_tokens=50)
        model.generate([[1, 2, 3], [4]], max_new_tokens=50, do_sample=True, top_p=0.9, seed=0)
        model.generate(tokens, max_new_tokens=50, num_beams=4, length_penalty=2.0)

    The method follows from the settings: greedy; sampling (``do_sample``); beam search
    (``num_beams``), also by sampling; contrastive search (``penalty_alpha`` and ``top_k``); greedy
    or sampling with speculation (``draft_model`` or ``prompt_lookup_num_tokens``).

    Each sequence gets the tokens that it would get alone. Dropout is off meanwhile. On a CUDA GPU
    the steps replay a CUDA graph (`fastattn.generation.graphs`), but for contrastive search and
    speculation.

    Args:
        input_ids: the prompts: (B, T) token ids, on any device, or lists of token ids, of any
            lengths. An encoder-decoder's go to the encoder.
        attention_mask: (B, T), 1 for tokens and 0 for padding, which must come before the tokens
            (left padding; for an encoder before or after). Without it every id of a tensor is a
            token.
        generation_config: settings for the ones not given here; where it is silent too, those of
            ``model.generation_config`` hold, if the model has one.
        draft_model: a smaller model of the same vocabulary, which guesses tokens ahead.
        tokenizer: for ``stop_strings``: what has ``decode(token_ids) -> str``, as
            `fastattn.training.Tokenizer` and the tokenizers of transformers have it.
        seed: for ``do_sample``. An integer gives row b a stream of its own, seeded ``seed + b``;
            several integers seed the rows one by one: so a row's tokens are those of its prompt
            alone with its seed. A generator, or torch's default one for None, is drawn from for all
            rows together. The same seed, model, prompts and arguments give the same tokens on the
            same machine and version of torch.
        on_token: called after every step with the new tokens, (B,) on the model's device, pad where
            a sequence has ended.
        streamer: the same as transformers has it: ``put`` gets the prompts (B, T), then the new
            tokens of each step (B,), on the CPU; ``end()`` comes last.
        cache_dtype: "int8" or "float8" keeps keys and values in 8 bits, with a scale for each
            sequence and key head (`fastattn/nn/stored_cache.py`): half of the memory of 16 bits,
            and other tokens where the rounding matters. None keeps the model's dtype. For decoders,
            with a draft model for both.
        settings: the fields of `GenerationConfig`. ``max_new_tokens`` (or ``max_length``) must be
            said here or in a config; prompt and new tokens together must fit into the model's
            ``n_positions``. ``eos_token_id`` and ``pad_token_id`` default to the model's config's,
            pad else to the first eos token, else to 0; eos ``()`` ends no sequence.

    Returns:
        (B, T + n) int64 on the model's device, n <= max_new_tokens: the prompts, padded on the left
        as they were given (lists: to the longest), and the new tokens; of an encoder-decoder
        (B, 1 + n), the decoder's. With ``num_return_sequences`` R: (B * R, T + n), the R answers to
        a prompt one after another, of beams the best first.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. Nothing was computed.
        ValueError: the model's logits are NaN, or none can be drawn from.
    """
    models, drafted = getattr(model, "generation_config", None), draft_model is not None
    chosen = settle(settings, generation_config, models, drafted=drafted)
    method = _method(chosen, draft_model)
    how = chosen.sampling()
    how.check_vocabulary(model.config.vocab_size)
    special = settings.get("eos_token_id"), settings.get("pad_token_id")
    ends, pad = special_tokens(model.config, *special, chosen)
    texts = StopStrings.of(chosen.stop_strings, tokenizer)
    stored = cache_options(cache_dtype)
    encoded = is_encoder_decoder(model)
    if encoded and stored:
        raise ValueError(
            f"cache_dtype={cache_dtype!r} is for decoders, and the model has an encoder"
        )
    sources = read_prompts(model.config, input_ids, attention_mask)
    prompts = [[start_token(model.config, chosen)]] * len(sources) if encoded else sources
    steps = _room(model, prompts, chosen, settings)
    task = Task(model, prompts, steps, how, ends, pad, texts, stored=stored)
    returned = _check_returned(chosen, method)
    if seed is not None and not how.do_sample:
        raise ValueError("seed would have no effect: give do_sample=True too")
    copies = returned if method == "one by one" else 1
    tell = _listeners(on_token, streamer, method, len(prompts) * copies)
    run = _runner(method, chosen, draft_model, task, seed, copies)

    if isinstance(input_ids, Tensor) and not encoded:
        before = input_ids.to(model.device, torch.int64)
    else:
        before = padded(prompts, pad, model.device)
    width = before.shape[1]
    if streamer is not None:
        streamer.put(before.cpu())
    with torch.inference_mode(), in_mode(cast(torch.nn.Module, model), training=False):
        encoder = _encode(model, sources, copies) if encoded else {}
        repeated = [prompt for prompt in prompts for _ in range(copies)]
        new = run(dataclasses.replace(task, prompts=repeated, on_token=tell, encoder=encoder))
    if streamer is not None:
        streamer.end()
    out = torch.empty(len(new), width + new.shape[1], dtype=torch.int64, device=model.device)
    out[:, :width] = before.repeat_interleave(returned, 0)
    out[:, width:] = new
    return out


def _method(chosen: GenerationConfig, draft_model: LanguageModel | None) -> str:
    """The decoding method that the settings ask for; ValueError where they exclude each other."""
    wanted = [
        name
        for name, said in (
            (f"num_beams={chosen.num_beams}", (chosen.num_beams or 1) > 1),
            (f"penalty_alpha={chosen.penalty_alpha}", bool(chosen.penalty_alpha)),
            ("draft_model", draft_model is not None),
            (
                f"prompt_lookup_num_tokens={chosen.prompt_lookup_num_tokens}",
                chosen.prompt_lookup_num_tokens is not None,
            ),
        )
        if said
    ]
    if len(wanted) > 1:
        raise ValueError(
            f"{' and '.join(wanted)} exclude each other: each is a decoding method of its own"
        )
    if not wanted:
        return "one by one"
    name = wanted[0].split("=")[0]
    if name == "penalty_alpha":
        if chosen.do_sample:
            raise ValueError("penalty_alpha excludes do_sample=True: contrastive search is greedy")
        if not chosen.top_k or chosen.top_k < 2:
            raise ValueError(
                f"penalty_alpha needs top_k, at least 2 candidates a step, got {chosen.top_k}"
            )
    return {"num_beams": "beams", "penalty_alpha": "contrastive"}.get(name, "speculative")


def _runner(
    method: str,
    chosen: GenerationConfig,
    draft_model: LanguageModel | None,
    task: Task,
    seed: Seed,
    copies: int,
) -> Callable[[Task], Tensor]:
    """The method with its own arguments checked."""
    rows, steps, device = len(task.prompts) * copies, task.max_new_tokens, task.model.device
    if method == "beams":
        search = beams.BeamSearch.of(chosen)
        search.check(task)
        generators = sampling.generators(seed, rows) if chosen.do_sample else []
        return lambda task: search(task, generators)
    if method == "contrastive":
        alpha, top_k = float(chosen.penalty_alpha or 0), int(chosen.top_k or 0)
        contrastive.check(task, top_k)
        return lambda task: contrastive.search(task, alpha, top_k)
    if method == "speculative":
        speculation = speculative.Speculation.of(chosen, draft_model)
        speculation.check(task)
        count = steps * speculation.numbers_per_token
        drawn = sampling.uniforms(seed, rows, count, device) if chosen.do_sample else None
        return lambda task: speculation(task, drawn)
    numbers = sampling.uniforms(seed, rows, steps, device) if chosen.do_sample else None
    return lambda task: decoding.one_by_one(task, numbers)


def _check_returned(chosen: GenerationConfig, method: str) -> int:
    """num_return_sequences; ValueError unless the method gives so many answers."""
    returned, beams = chosen.num_return_sequences or 1, chosen.num_beams or 1
    if method == "beams":
        if returned > beams:
            raise ValueError(
                f"num_return_sequences must be at most num_beams = {beams}, got {returned}"
            )
    elif returned > 1 and (method != "one by one" or not chosen.do_sample):
        raise ValueError(
            f"num_return_sequences = {returned} needs do_sample=True or num_beams: there is only "
            "one answer otherwise"
            if not chosen.do_sample
            else f"num_return_sequences = {returned} does not go with speculation: repeat the "
            "prompts, with a seed for each"
        )
    return returned


def _room(
    model: LanguageModel,
    prompts: list[list[int]],
    chosen: GenerationConfig,
    given: Mapping[str, Any],
) -> int:
    """max_new_tokens; ValueError if nothing says it, or prompt and new tokens do not fit."""
    longest = max(map(len, prompts))
    steps = chosen.max_new_tokens
    if steps is None:
        if chosen.max_length is None:
            raise ValueError(
                "max_new_tokens must be given: no generation config of the model says how long to "
                "go on"
            )
        steps = chosen.max_length - longest
        if steps < 1:
            raise ValueError(
                f"max_length must be more than the {longest} tokens of the longest prompt, got "
                f"{chosen.max_length}"
            )
    for name in ("min_new_tokens", "min_length"):
        least = given.get(name) or 0  # a config's may be more: then only the number of tokens ends
        if least - (longest if name == "min_length" else 0) > steps:
            raise ValueError(
                f"{name} must be at most what max_new_tokens = {steps} allows, got {least}"
            )
    n_positions = model.config.n_positions
    if n_positions is not None and longest + steps > n_positions:
        raise ValueError(
            f"the longest prompt of input_ids has {longest} tokens; with max_new_tokens = {steps} "
            f"that is {longest + steps}, more than the model's n_positions = {n_positions}"
        )
    short, shortest = getattr(model.config, "short_positions", None), min(map(len, prompts))
    if short is not None and shortest <= short < longest + steps:
        raise ValueError(
            f"the prompts of input_ids have {shortest} to {longest} tokens; with max_new_tokens = "
            f"{steps} some pass {short}, beyond which the rotary frequencies are others than those "
            "that turned the keys in the cache: all must stay within, or all prompts be longer"
        )
    return steps


def _listeners(
    on_token: Callable[[Tensor], None] | None, streamer: Any, method: str, rows: int
) -> Callable[[Tensor], None] | None:
    """on_token and the streamer as one function; ValueError where steps give no tokens in order."""
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise TypeError(
            "streamer must have put(tokens) and end(), as transformers.TextStreamer has, got "
            f"{type(streamer).__name__}"
        )
    name = "streamer" if streamer is not None else "on_token"
    if on_token is None and streamer is None:
        return None
    if method == "beams":
        raise ValueError(
            f"{name} does not go with num_beams: the answer is known only when the search ends"
        )
    if method == "speculative" and rows > 1:
        raise ValueError(
            f"{name} goes with speculation only for a single prompt, got {rows}: sequences advance "
            "by unequal numbers of tokens"
        )

    def tell(tokens: Tensor) -> None:
        if on_token is not None:
            on_token(tokens)
        if streamer is not None:
            streamer.put(tokens.cpu())

    return tell


def _encode(model: LanguageModel, sources: list[list[int]], copies: int) -> dict[str, Tensor]:
    """What an encoder-decoder's cache is made from, each source ``copies`` times."""
    lengths = torch.tensor(list(map(len, sources)), device=model.device)
    ids = right_padded(sources, model.device)
    mask = torch.arange(ids.shape[1], device=model.device) < lengths.unsqueeze(1)
    hidden: Tensor = cast(Any, model).encode(ids, mask.long())
    return {
        "encoded": hidden.repeat_interleave(copies, 0),
        "encoded_lengths": lengths.repeat_interleave(copies, 0),
    }
