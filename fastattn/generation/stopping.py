"""Texts that end a sequence."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Tokens decoded before those that can hold a stop string, so that none of the latter is the first:
# some tokenizers drop a space there.
MARGIN = 8


class StopStrings:
    """`generate`'s stop_strings and tokenizer."""

    def __init__(self, strings: list[str], tokenizer: Any) -> None:
        self._strings = strings
        self._tokenizer = tokenizer
        # A token has at least one byte of text.
        self._longest = max(len(string.encode()) for string in strings)

    @staticmethod
    def of(strings: str | Sequence[str] | None, tokenizer: Any) -> StopStrings | None:
        """The checked arguments of `generate`; None without stop strings."""
        if strings is None:
            return None
        given = [strings] if isinstance(strings, str) else strings
        if not isinstance(given, Sequence) or not all(isinstance(s, str) for s in given):
            raise TypeError(f"stop_strings must be a string or a list of them, got {strings!r}")
        if not given or not all(given):
            raise ValueError(
                f"stop_strings must have at least one string, and no empty one, got {strings!r}"
            )
        if not hasattr(tokenizer, "decode"):
            raise ValueError(
                "stop_strings are looked for in the decoded text: give tokenizer=, an object with "
                f"decode(token_ids) -> str; got {tokenizer!r}"
            )
        return StopStrings(list(given), tokenizer)

    def ended(self, prompts: list[list[int]], new: Tensor, asked: Tensor) -> Tensor:
        """(B,), whether the last token of ``new`` (B, n) completes a stop string.

        Only rows that are ``asked`` about (B,) are decoded; the others are False.
        """
        count = self._longest + MARGIN
        rows = zip(prompts, new[:, -count:].tolist(), asked.tolist(), strict=True)
        answers = [wanted and self.completed(prompt, tokens) for prompt, tokens, wanted in rows]
        return torch.tensor(answers, device=new.device)

    def completed(self, prompt: list[int], new: list[int]) -> bool:
        """`ended` of one sequence."""
        tokens = (prompt + new)[-(self._longest + MARGIN) :]
        text = self._tokenizer.decode(tokens)
        # Not its length: half a character, which the last token completes, decodes as another one.
        pairs = zip(text, self._tokenizer.decode(tokens[:-1]))
        before = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        return any(s in text[max(0, before - len(s) + 1) :] for s in self._strings)
