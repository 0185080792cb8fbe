"""Speculative decoding: guess some tokens ahead, and let the model read them all at once.

Shapes: B sequences, V vocabulary. Guesses come from a draft model (Leviathan et al. 2023, Fast
Inference from Transformers via Speculative Decoding, arXiv:2211.17192), or from the sequence itself
(prompt lookup): what followed its last tokens where they were before.

A round reads each sequence's last token and its guesses, which gives the model's distribution p at
each of them. A guess is kept while it is what the model says:

    greedy           the model's most probable token
    prompt lookup    the token drawn from p, by the number that would draw it without speculation
    draft model      with the probability min(1, p / q), q being the draft's distribution that it
                     was drawn from; else the token is drawn from max(0, p - q), made to sum to 1

and the first token that is no guess ends the round. So greedy tokens and those of prompt lookup are
those without speculation; with a draft model their distribution is. A round gives from 1 to
1 + guesses tokens, of each sequence its own number.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.generation import decoding, processors, sampling
from fastattn.generation.config import GenerationConfig
from fastattn.generation.contract import LanguageModel, is_encoder_decoder
from fastattn.generation.decoding import Task

# Guesses in a round of a draft model. More are read for nothing where they are often wrong.
AHEAD = 5
# The longest run of last tokens that prompt lookup looks for.
NGRAM = 2


@dataclass(frozen=True)
class Speculation:
    """Where guesses come from: ``draft_model``, or else the sequence itself.

    Attributes:
        ahead: guesses in a round: num_assistant_tokens or prompt_lookup_num_tokens.
        ngram: max_matching_ngram_size; shorter runs are looked for where it is not found.
    """

    draft_model: LanguageModel | None
    ahead: int
    ngram: int = NGRAM

    @staticmethod
    def of(chosen: GenerationConfig, draft_model: LanguageModel | None) -> Speculation:
        if draft_model is not None:
            return Speculation(draft_model, chosen.num_assistant_tokens or AHEAD)
        ahead = chosen.prompt_lookup_num_tokens or AHEAD
        return Speculation(None, ahead, chosen.max_matching_ngram_size or NGRAM)

    def check(self, task: Task) -> None:
        """Raise ValueError if the draft model does not fit."""
        model, draft = task.model, self.draft_model
        if is_encoder_decoder(model) or (draft is not None and is_encoder_decoder(draft)):
            raise ValueError(
                "speculation is for decoders: an encoder-decoder generates without draft_model and "
                "prompt_lookup_num_tokens"
            )
        longest = max(map(len, task.prompts)) + task.max_new_tokens
        for one in (model, draft or model):
            short = getattr(one.config, "short_positions", None)
            if short is not None and longest > short:
                raise ValueError(
                    f"speculation takes back tokens, and beyond {short} the rotary frequencies "
                    f"change: prompt and new tokens, {longest} together, must stay within; or "
                    "generate without draft_model and prompt_lookup_num_tokens"
                )
        if draft is None:
            return
        ours, theirs = model.config.vocab_size, draft.config.vocab_size
        if ours != theirs:
            raise ValueError(
                f"draft_model must have the model's vocabulary of {ours} tokens, got {theirs}: "
                "give a model of the same tokenizer"
            )
        if draft.device != model.device:
            raise ValueError(f"draft_model must be on {model.device}, got {draft.device}")
        if draft.config.n_positions is not None and longest > draft.config.n_positions:
            raise ValueError(
                f"draft_model must take prompt and new tokens, {longest} together, and has "
                f"n_positions = {draft.config.n_positions}"
            )

    @property
    def numbers_per_token(self) -> int:
        """How many uniform numbers a drawn token takes: for draft, test and draw."""
        return 1 if self.draft_model is None else 3

    def __call__(self, task: Task, numbers: Tensor | None) -> Tensor:
        """The new tokens (B, n), greedy, or drawn by ``numbers`` (max_new_tokens *
        numbers_per_token, B)."""
        if numbers is not None:
            numbers = numbers.unflatten(0, (task.max_new_tokens, self.numbers_per_token))
        sequences = _Sequences(task, numbers)
        capacity = max(map(len, task.prompts)) + task.max_new_tokens
        target = _Reader(task.model, task.prompts, capacity, task.stored)
        guesser = (
            _Lookup(self.ngram)
            if self.draft_model is None
            else _Draft(self.draft_model, sequences, capacity, task.stored)
        )
        nothing: list[list[int]] = [[] for _ in task.prompts]
        sequences.extend(nothing, target.first, [])
        while sequences.open:
            guesses, drawn_from = guesser(sequences, self.ahead)
            texts = [text + more for text, more in zip(sequences.texts, guesses, strict=True)]
            logits = target(
                texts,
                [
                    1 + len(guesses[row]) if row in sequences.open else 0
                    for row in range(len(texts))
                ],
            )
            sequences.extend(guesses, logits, drawn_from)
        return sequences.new_tokens()


class _Sequences:
    """The sequences as lists, each with its own number of new tokens, and how a token is chosen.

    Attributes:
        texts: prompts and new tokens.
        open: the rows that have not ended.
    """

    def __init__(self, task: Task, numbers: Tensor | None) -> None:
        self._task, self._numbers = task, numbers
        self.texts = [list(prompt) for prompt in task.prompts]
        self.open = list(range(len(self.texts)))

    @property
    def draws(self) -> bool:
        return self._numbers is not None

    def added(self, row: int) -> int:
        return len(self.texts[row]) - len(self._task.prompts[row])

    def remaining(self, row: int) -> int:
        return self._task.max_new_tokens - self.added(row)

    def extend(self, guesses: list[list[int]], logits: Tensor, drawn_from: list[Tensor]) -> None:
        """Go on by the guesses of each row that the model agrees to, and by one more token.

        logits: (N, V) at each open row's last token and guesses, row after row; ``drawn_from``:
        (V,) the draft's distribution of each guess, in the same order, if it drew them.
        """
        places = [(row, i) for row in self.open for i in range(1 + len(guesses[row]))]
        logits = self.shaped(
            logits, [(row, self.texts[row] + guesses[row][:i]) for row, i in places]
        )
        chosen = self._choose(logits, places, guesses, drawn_from)
        still_open = []
        for row, tokens in itertools.groupby(
            zip(places, chosen, strict=True), key=lambda item: item[0][0]
        ):
            if self._extend_row(row, guesses[row], [token for _, token in tokens]):
                still_open.append(row)
        self.open = still_open

    def shaped(self, logits: Tensor, before: list[tuple[int, list[int]]]) -> Tensor:
        """The logits (N, V), each after a row's text, as its next token is chosen by."""
        task, device = self._task, logits.device
        if task.sampling.asks_for_history:
            ids = processors.padded([text for _, text in before], logits.shape[-1], device)
            new = [len(text) - len(task.prompts[row]) for row, text in before]
            counts = torch.tensor(new, device=device)
            last = counts + 1 == task.max_new_tokens
            logits = processors.process(logits, ids, counts, last, task.sampling, task.ends)
        return logits if self._numbers is None else sampling.warp(logits.float(), task.sampling)

    def draw(self, logits: Tensor, places: list[tuple[int, int]], number: int = -1) -> list[int]:
        """A token for each (row, i), the new token i after the row's text; greedy or drawn."""
        if self._numbers is None:
            tokens: list[int] = sampling.most_probable(logits).tolist()
            return tokens
        drawn: list[int] = sampling.draw(logits, self._uniform(places, number)).tolist()
        return drawn

    def _uniform(self, places: list[tuple[int, int]], number: int) -> Tensor:
        assert self._numbers is not None
        last = self._task.max_new_tokens - 1
        steps = [min(self.added(row) + i, last) for row, i in places]
        return self._numbers[steps, number, [row for row, _ in places]]

    def _choose(
        self,
        logits: Tensor,
        places: list[tuple[int, int]],
        guesses: list[list[int]],
        drawn_from: list[Tensor],
    ) -> list[int]:
        """The model's token at each place, which is the guess there if it agrees."""
        if not drawn_from:
            return self.draw(logits, places)
        guessed = [at for at, (row, i) in enumerate(places) if i < len(guesses[row])]
        tokens = torch.tensor(
            [guesses[row][i] for row, i in places if i < len(guesses[row])], device=logits.device
        ).unsqueeze(1)
        p, q = logits.softmax(-1), torch.stack(drawn_from)
        keep = self._uniform([places[at] for at in guessed], 1)
        kept = keep * q.gather(1, tokens).squeeze(1) < p[guessed].gather(1, tokens).squeeze(1)
        rest = (p[guessed] - q).clamp(min=0)
        # Nothing remains only where rounding made p a little smaller than q everywhere.
        rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p[guessed])
        others = logits.index_copy(0, torch.tensor(guessed, device=logits.device), rest.log())
        chosen = self.draw(others, places)
        for at, keeps, token in zip(guessed, kept.tolist(), tokens.tolist(), strict=True):
            if keeps:
                chosen[at] = token[0]
        return chosen

    def _extend_row(self, row: int, guesses: list[int], tokens: list[int]) -> bool:
        """Add the tokens as far as they are guesses, and one more; whether the row goes on."""
        task, text = self._task, self.texts[row]
        for i, token in enumerate(tokens):
            if token == sampling.NO_TOKEN:
                raise decoding.no_token(row, self.added(row))
            text.append(token)
            if task.on_token is not None:
                task.on_token(torch.tensor([token], device=task.model.device))
            prompt = task.prompts[row]
            said = task.texts is not None and task.texts.completed(prompt, text[len(prompt) :])
            if said or token in task.ends or self.remaining(row) == 0:
                return False
            if i == len(guesses) or token != guesses[i]:
                return True
        raise AssertionError("the last token is no guess")

    def new_tokens(self) -> Tensor:
        """(B, n), padded."""
        task = self._task
        new = [t[len(prompt) :] for t, prompt in zip(self.texts, task.prompts, strict=True)]
        longest = max(map(len, new))
        rows = [tokens + [task.pad] * (longest - len(tokens)) for tokens in new]
        return torch.tensor(rows, device=task.model.device)


class _Reader:
    """A model that reads sequences which grow, and of which the last tokens may change.

    Attributes:
        first: (B, V) the logits after the prompts.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: list[list[int]],
        capacity: int,
        stored: dict[str, Any],
    ) -> None:
        self._model, self._cache = model, model.new_cache(len(prompts), capacity, **stored)
        self.first = decoding.prefill(model, prompts, self._cache)

    def __call__(self, texts: list[list[int]], wanted: list[int], width: int = 0) -> Tensor:
        """(N, V) the logits at each text's last ``wanted`` tokens, row after row.

        All before a text's last max(wanted, width) tokens must have been read before.
        """
        width = max(*wanted, width)
        # All rows read as many tokens; a row with fewer new ones reads some again.
        starts = [max(0, len(text) - width) for text in texts]
        windows = [text[start : start + width] for text, start in zip(texts, starts, strict=True)]
        ids = [window + [0] * (width - len(window)) for window in windows]
        self._cache.set_lengths(starts)
        hidden = self._model.features(torch.tensor(ids, device=self._model.device), self._cache)
        places = [
            (row, len(window) - count + i)
            for row, (window, count) in enumerate(zip(windows, wanted, strict=True))
            for i in range(count)
        ]
        rows, columns = zip(*places, strict=True)
        logits: Tensor = self._model.lm_head(hidden[list(rows), list(columns)])
        return logits


class _Lookup:
    """Guesses from the sequences themselves."""

    def __init__(self, ngram: int) -> None:
        self._ngram = ngram

    def __call__(self, sequences: _Sequences, ahead: int) -> tuple[list[list[int]], list[Tensor]]:
        guesses: list[list[int]] = [[] for _ in sequences.texts]
        for row in sequences.open:
            count = min(ahead, sequences.remaining(row) - 1)
            guesses[row] = look_up(sequences.texts[row], self._ngram, count)
        return guesses, []


def look_up(text: list[int], ngram: int, count: int) -> list[int]:
    """``count`` tokens that followed where the last tokens of ``text`` were the last time before.

    The longest run of last tokens that was there counts, up to ``ngram`` of them. Where the text
    ends before ``count`` tokens, the guess goes on with itself, so that a loop goes on.
    """
    for size in range(min(ngram, len(text) - 1), 0, -1):
        run = text[-size:]
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == run:
                followed = list(text)
                for i in range(count):
                    followed.append(followed[start + size + i])
                return followed[len(text) :]
    return []


class _Draft:
    """Guesses from a smaller model."""

    def __init__(
        self,
        model: LanguageModel,
        sequences: _Sequences,
        capacity: int,
        stored: dict[str, Any],
    ) -> None:
        self._read = _Reader(model, sequences.texts, capacity, stored)

    def __call__(self, sequences: _Sequences, ahead: int) -> tuple[list[list[int]], list[Tensor]]:
        counts = [0] * len(sequences.texts)
        for row in sequences.open:
            counts[row] = min(ahead, sequences.remaining(row) - 1)
        guesses: list[list[int]] = [[] for _ in counts]
        drawn_from: list[list[Tensor]] = [[] for _ in counts]
        for i in range(max(counts)):
            rows = [row for row, count in enumerate(counts) if i < count]
            texts = [text + more for text, more in zip(sequences.texts, guesses, strict=True)]
            # At first the last two: the one before was perhaps a guess that was never read.
            logits = self._read(texts, [int(row in rows) for row in range(len(texts))], 2 - (i > 0))
            logits = sequences.shaped(logits, [(row, texts[row]) for row in rows])
            tokens = sequences.draw(logits, [(row, i) for row in rows], 0)
            if sampling.NO_TOKEN in tokens:
                raise ValueError("the logits of draft_model are NaN or infinite, and say no token")
            for row, token, one in zip(rows, tokens, logits, strict=True):
                guesses[row].append(token)
                drawn_from[row].append(one.softmax(-1))
        if not sequences.draws:
            return guesses, []
        return guesses, [one for row in sequences.open for one in drawn_from[row]]
