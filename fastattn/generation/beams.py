"""Beam search: the most probable continuations, several prefixes (beams) at a time.

Shapes: B prompts, K beams of each, J candidates of each prompt, V vocabulary, n new tokens.

A step, for each prompt:

    the J best of the K * V continuations, by the sum of their tokens' log-probabilities
      of the best K, those that end   -> the finished ones, scored sum / length ** length_penalty,
                                         of which the best K stay
      the best K that do not end      -> the beams of the next step

J is K * (1 + the number of end tokens), so that K continuations go on even if all best ones end.
The rules, and so the tokens, are those of transformers. A prompt that is settled stays as it is,
whatever the others of its batch still do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.generation import decoding
from fastattn.generation.config import GenerationConfig
from fastattn.generation.decoding import Task
from fastattn.generation.sampling import warp

# The score of what is out, small against any sum of log-probabilities, and finite.
OUT = -1.0e9


@dataclass(frozen=True)
class BeamSearch:
    """Beam search, by the settings of transformers.

    Attributes:
        num_beams: K.
        length_penalty: the power of the length that a finished one's sum is divided by: above 0
            favours long ones, below 0 short ones.
        early_stopping: when a prompt is settled. True: as soon as K have finished. False: when no
            beam, divided by its present length, beats the worst of K finished ones. "never": when
            none can beat it at any length.
        num_return_sequences: how many of the finished ones to return, at most K.
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1

    @staticmethod
    def of(chosen: GenerationConfig) -> BeamSearch:
        penalty, returned = chosen.length_penalty, chosen.num_return_sequences
        return BeamSearch(
            chosen.num_beams or 1,
            1.0 if penalty is None else float(penalty),
            bool(chosen.early_stopping) if chosen.early_stopping != "never" else "never",
            returned or 1,
        )

    def check(self, task: Task) -> None:
        """Raise ValueError if the vocabulary is too small for so many beams."""
        vocab_size = task.model.config.vocab_size
        if self.candidates(task) > self.num_beams * vocab_size or self.num_beams > vocab_size:
            raise ValueError(
                f"num_beams = {self.num_beams} is too many for a vocabulary of {vocab_size} tokens"
            )

    def candidates(self, task: Task) -> int:
        """J."""
        return max(2, 1 + len(task.ends)) * self.num_beams

    @torch.inference_mode()
    def __call__(self, task: Task, generators: list[torch.Generator | None]) -> Tensor:
        """The new tokens (B * num_return_sequences, n) of a prompt's best ones, in order.

        ``generators``: for sampling, see `sampling.generators`.
        """
        beams, history = _Beams(self, task), decoding.History(task, self.num_beams)
        decoder, logits = decoding.start(task, self.num_beams)
        shortest, longest = (f(map(len, task.prompts)) for f in (min, max))
        every = decoding.check_every(task)
        for step in range(task.max_new_tokens):
            scores = logits.float().log_softmax(-1)
            scores = history.process(scores, beams.tokens.flatten(0, 1)[:, :step])
            if task.sampling.do_sample:
                scores = warp(scores, task.sampling, keep=max(2, 1 + len(task.ends)))
            rows, common = beams.advance(scores, generators)
            last, checked = step + 1 == task.max_new_tokens, (step + 1) % every == 0
            if last or (checked and not beams.open.any()):
                break
            decoder.cache.reorder(rows, shortest + common, longest + step)
            logits = decoder(beams.tokens[:, :, step].flatten())
        return beams.best()


class _Beams:
    """The beams and the finished sequences of each prompt.

    Attributes:
        tokens: (B, K, max_new_tokens) new tokens of the beams, best first.
        scores: (B, K) sums of their log-probabilities.
        open: (B,) whether a prompt is not yet settled.
    """

    def __init__(self, search: BeamSearch, task: Task) -> None:
        count, beams, device = len(task.prompts), search.num_beams, task.model.device
        self._search, self._task = search, task
        self._step = 0
        self.tokens = task.new_tokens(beams).unflatten(0, (count, beams))
        # All beams of a prompt are the same at first: only the first one counts.
        self.scores = torch.full((count, beams), OUT, dtype=torch.float32, device=device)
        self.scores[:, 0] = 0.0
        self.open = torch.ones(count, dtype=torch.bool, device=device)
        self._done = torch.zeros(count, beams, dtype=torch.bool, device=device)
        self._done_tokens = self.tokens.clone()
        self._done_scores = torch.full_like(self.scores, OUT)
        self._done_lengths = torch.zeros_like(self._done, dtype=torch.int64)

    def advance(
        self, scores: Tensor, generators: list[torch.Generator | None]
    ) -> tuple[Tensor, int]:
        """One step, by the log-probabilities (B * K, V) of the next token.

        Returns:
            (B * K,) of which row each beam continues the sequence, and how many new tokens each has
            in common with the one that was in its place.
        """
        (count, beams), step = self.scores.shape, self._step
        vocab_size = scores.shape[-1]
        scores = (scores.unflatten(0, (count, beams)) + self.scores.unsqueeze(-1)).flatten(1)
        if (scores.is_cpu or step + 1 == self._task.max_new_tokens) and scores.isnan().any():
            raise decoding.no_token(int(scores.isnan().any(1).int().argmax()), step)
        size = self._search.candidates(self._task)
        if self._task.sampling.do_sample:
            best, index = _sample(scores, size, generators)
        else:
            best, index = scores.topk(size)  # (B, J)
        parents = index // vocab_size
        tokens = _rows(self.tokens, parents)
        tokens[:, :, step] = index % vocab_size
        ended = self._ended(tokens[:, :, : step + 1])

        self._finish(best, tokens, ended)
        running, order = torch.where(ended, best + OUT, best).topk(beams)
        before, parents = self.tokens, parents.gather(1, order)
        self.tokens, self.scores = _rows(tokens, order), running
        self._step += 1
        self._settle(ended)
        offsets = torch.arange(count, device=scores.device).unsqueeze(1) * beams
        return (parents + offsets).flatten(), _common(before, self.tokens, step)

    def _ended(self, tokens: Tensor) -> Tensor:
        """(B, J), whether each candidate (B, J, n) ends with its last token."""
        task, (count, size, length) = self._task, tokens.shape
        ended = torch.full((count, size), length == task.max_new_tokens, device=tokens.device)
        if task.ends:
            ended = ended | torch.isin(tokens[:, :, -1], task.end_tokens)
        if task.texts is not None:
            prompts = [prompt for prompt in task.prompts for _ in range(size)]
            asked = (self.open.unsqueeze(1) & ~ended).flatten()
            found = task.texts.ended(prompts, tokens.flatten(0, 1), asked)
            ended = ended | found.unflatten(0, (count, size))
        return ended

    def _finish(self, best: Tensor, tokens: Tensor, ended: Tensor) -> None:
        """Put those of the best K candidates that end among the finished ones, of open prompts."""
        beams, length = self._search.num_beams, self._step + 1
        best, tokens = best[:, :beams], tokens[:, :beams]
        # A beam that is out already, for want of better ones, does not count either.
        counts = ended[:, :beams] & self.open.unsqueeze(1) & (best > OUT / 2)
        scores = torch.where(counts, best / length**self._search.length_penalty, OUT)
        lengths = torch.full_like(self._done_lengths, length)
        self._done_scores, order = torch.cat([self._done_scores, scores], 1).topk(beams)
        self._done_tokens = _rows(torch.cat([self._done_tokens, tokens], 1), order)
        self._done_lengths = torch.cat([self._done_lengths, lengths], 1).gather(1, order)
        self._done = torch.cat([self._done, counts], 1).gather(1, order)

    def _settle(self, ended: Tensor) -> None:
        """Close the prompts that nothing can improve, or none of whose candidates (B, J) go on."""
        search, length = self._search, self._step
        full = self._done.all(1)
        if search.early_stopping is True:
            settled = full
        else:
            if search.early_stopping == "never" and search.length_penalty > 0:
                length = self._task.max_new_tokens
            hoped = self.scores[:, 0] / length**search.length_penalty
            settled = full & (hoped <= self._done_scores[:, -1])
        self.open = self.open & ~settled & ~ended.all(1)

    def best(self) -> Tensor:
        """(B * num_return_sequences, n) of the finished ones, padded."""
        returned = self._search.num_return_sequences
        tokens, lengths = self._done_tokens[:, :returned], self._done_lengths[:, :returned]
        columns = torch.arange(tokens.shape[-1], device=tokens.device)
        tokens = torch.where(columns < lengths.unsqueeze(-1), tokens, self._task.pad)
        return tokens[:, :, : int(lengths.max())].flatten(0, 1)


def _rows(tokens: Tensor, index: Tensor) -> Tensor:
    """(B, X, n) tokens, (B, Y) -> (B, Y, n)."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def _common(before: Tensor, after: Tensor, step: int) -> int:
    """In how many first tokens, of ``step``, no beam differs from the one in its place before."""
    if not before.is_cpu:  # where it would be waited for
        return 0
    differs = (before[:, :, :step] != after[:, :, :step]).flatten(0, 1).any(0)
    return int(differs.int().argmax()) if differs.any() else step


def _sample(
    scores: Tensor, count: int, generators: list[torch.Generator | None]
) -> tuple[Tensor, Tensor]:
    """``count`` of each row's (B, N) continuations, drawn by their probabilities without putting
    back: their scores, best first, and indices (B, count).
    """
    probabilities = scores.softmax(-1)
    if len(generators) == 1:
        index = probabilities.multinomial(count, generator=generators[0])
    else:
        index = torch.stack(
            [
                row.to(g.device).multinomial(count, generator=g).to(row.device)
                for row, g in zip(probabilities, generators, strict=True)
                if g is not None
            ]
        )
    best, order = scores.gather(1, index).sort(-1, descending=True)
    return best, index.gather(1, order)
