"""Contrastive search (Su et al. 2022, A Contrastive Framework for Neural Text Generation,
arXiv:2202.06417).

Shapes: B prompts, k candidates of each, C hidden size, V vocabulary, n tokens so far.

Of the k most probable tokens, the next is the one with the largest (equation 5 there)

    (1 - alpha) * p(v) - alpha * max over all tokens j before of cos(h_v, h_j)

h being the hidden states before the head: probable, and not a repetition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.generation import decoding, sampling
from fastattn.generation.decoding import Task


def check(task: Task, top_k: int) -> None:
    """Raise ValueError if there are not so many candidates."""
    if top_k > task.model.config.vocab_size:
        raise ValueError(
            f"top_k must be at most the vocabulary's {task.model.config.vocab_size} tokens in "
            f"contrastive search, got {top_k}"
        )


def search(task: Task, alpha: float, top_k: int) -> Tensor:
    """The new tokens (B, n); ``alpha`` is transformers' penalty_alpha."""
    model, new = task.model, task.new_tokens()
    (count, steps), history = new.shape, decoding.History(task)
    lengths = torch.tensor(list(map(len, task.prompts)), device=new.device)
    shortest, longest = (f(map(len, task.prompts)) for f in (min, max))
    each, last = torch.arange(count, device=new.device), lengths - 1

    prompts = model.new_cache(count, longest, **task.encoder, **task.stored)
    hidden = decoding.read_prompts(model, task.prompts, prompts)  # (B, T, C)
    encoder = {k: v.repeat_interleave(top_k, 0) for k, v in task.encoder.items()}
    cache = model.new_cache(count * top_k, longest + steps, **encoder, **task.stored)
    cache.fill(prompts, each.repeat_interleave(top_k))
    logits = model.lm_head(hidden[each, last])
    before = _directions(hidden)  # (B, n, C)
    columns = torch.arange(longest + steps, device=new.device)
    padding = (columns >= lengths.unsqueeze(1)) & (columns < longest)
    unfinished = torch.ones(count, dtype=torch.bool, device=new.device)

    for step in range(steps):
        logits = history.process(logits, new[:, :step])
        decoding.check_tokens(sampling.most_probable(logits), step)
        best = logits.float().softmax(-1).topk(top_k)  # (B, k)
        hidden = model.features(best.indices.reshape(-1, 1), cache).view(count, top_k, -1)
        directions = _directions(hidden)
        with torch.autocast(new.device.type, enabled=False):
            similar = directions @ before.mT  # (B, k, n)
        similar = similar.masked_fill(padding[:, None, : longest + step], -1.0).amax(-1)
        chosen = ((1 - alpha) * best.values - alpha * similar).argmax(-1)  # (B,)

        tokens = torch.where(unfinished, best.indices[each, chosen], task.pad)
        new[:, step] = tokens
        unfinished = task.going_on(unfinished, new[:, : step + 1])
        if task.on_token is not None:
            task.on_token(tokens)
        if not unfinished.any():
            return new[:, : step + 1]
        rows = (each * top_k + chosen).repeat_interleave(top_k)
        cache.reorder(rows, shortest + step, longest + step + 1)  # only the candidates differ
        before = torch.cat([before, directions[each, chosen].unsqueeze(1)], dim=1)
        logits = model.lm_head(hidden[each, chosen])
    return new


def _directions(hidden: Tensor) -> Tensor:
    """Hidden states (..., C) of length 1, float32 or wider."""
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    return torch.nn.functional.normalize(hidden, dim=-1)
