"""A run as its user sees it: a bar on a terminal, lines elsewhere, and samples of the model."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from fastattn.nn.mode import in_mode
from fastattn.training.history import History
from fastattn.training.tokenizer import Tokenizer

BAR = 20  # characters
RECENT = 20  # steps over which the speed is taken
LINE_SECONDS = 10.0  # between two lines where there is no terminal
CLEAR = "\r\033[K"
SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}


class Progress:
    """A callback of `train`: the steps' loss, speed and remaining time, and each validation.

    Args:
        steps: of the run.
        samples: called after each validation, for what is to be written below it.
        flops_per_token, peak_flops: of the model, and of the chip; None where unknown. Where both
            are known, the share of the peak is shown (model FLOPs utilisation).
    """

    def __init__(
        self,
        steps: int,
        samples: Callable[[], Iterable[str]],
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
    ) -> None:
        self._steps, self._samples = steps, samples
        self._flops, self._peak = flops_per_token, peak_flops
        self._terminal = sys.stdout.isatty()
        self._evaluations: int | None = None
        self._written = time.perf_counter()

    def __call__(self, history: History) -> None:
        if self._evaluations is None:
            # The first call brings the whole record of a run that goes on.
            self._evaluations = len(history.evaluations) if history.steps else 0
            if len(history.steps) > 1:
                print(f"going on after step {history.steps[-1].step}", flush=True)
        if self._terminal:
            print(f"{CLEAR}{self.line(history)}", end="", flush=True)
        elif history.steps and time.perf_counter() - self._written >= LINE_SECONDS:
            self._written = time.perf_counter()
            print(self.line(history), flush=True)
        for evaluation in history.evaluations[self._evaluations :]:
            scores = {"loss": evaluation.loss, **evaluation.scores}
            said = "  ".join(f"{name} {score:.4f}" for name, score in scores.items())
            lines = [f"step {evaluation.step}  validation: {said}", *self._samples()]
            print((CLEAR if self._terminal else "") + "\n".join(lines), flush=True)
        self._evaluations = len(history.evaluations)

    def line(self, history: History) -> str:
        """The state of the run in one line."""
        if not history.steps:
            return f"step 0/{self._steps}"
        last, recent = history.steps[-1], history.steps[-RECENT:]
        seconds = sum(step.seconds for step in recent)
        speed = sum(step.tokens for step in recent) / seconds
        full = BAR * last.step // self._steps
        parts = [
            f"step {last.step}/{self._steps} [{'#' * full}{'-' * (BAR - full)}]",
            f"loss {last.loss:.4f}",
            f"{speed:,.0f} tokens/s",
        ]
        if self._flops is not None and self._peak is not None:
            parts.append(f"MFU {speed * self._flops / self._peak:.1%}")
        remaining = (self._steps - last.step) * seconds / len(recent)
        parts.append(f"{duration(remaining)} left")
        return "  ".join(parts)

    def close(self) -> None:
        """Remove the bar."""
        if self._terminal:
            print(CLEAR, end="", flush=True)


class Samples:
    """Prompts that a model which generates goes on with.

    Args:
        model: with `generate`, of this package or of transformers.
        tokens: how many are added to each prompt at most.
        longest: how many tokens a sequence may have; None for no limit.

    Raises:
        ValueError: the model does not generate, or a prompt has no token or too many.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        prompts: Sequence[str],
        tokens: int,
        longest: int | None,
    ) -> None:
        generates = hasattr(model, "generate") and getattr(model, "can_generate", lambda: True)()
        if prompts and not generates:
            raise ValueError(
                f"[output] samples need a model that generates, and a {type(model).__name__} does "
                "not: leave them out"
            )
        self._model, self._tokenizer = model, tokenizer
        self._prompts = {prompt: tokenizer.encode(prompt) for prompt in prompts}
        self._tokens, self._longest = tokens, longest
        for prompt, ids in self._prompts.items():
            if not ids or (longest is not None and len(ids) >= longest):
                raise ValueError(
                    f"[output] samples: {prompt!r} has {len(ids)} tokens, and a prompt has at "
                    f"least 1 and fewer than the model's {longest} positions"
                )

    def __call__(self) -> Iterator[str]:
        """A line for each prompt; the text is drawn with a seed of its own."""
        with in_mode(self._model, training=False), torch.random.fork_rng():
            torch.manual_seed(0)
            for prompt, ids in self._prompts.items():
                yield f"    [{prompt}]{self._continued(ids)}"

    def _continued(self, ids: list[int]) -> str:
        decoder_only = not getattr(self._model.config, "is_encoder_decoder", False)
        used = len(ids) if decoder_only else 0
        room = self._tokens if self._longest is None else min(self._tokens, self._longest - used)
        device = next(self._model.parameters()).device
        out = self._model.generate(
            torch.tensor([ids], device=device), max_new_tokens=room, **SAMPLING
        )
        special = self._tokenizer.special_ids
        text = self._tokenizer.decode([i for i in out[0, used:].tolist() if i not in special])
        # The last character may be cut in the middle of its bytes.
        return " / ".join(text.rstrip("\N{REPLACEMENT CHARACTER}").splitlines())


def reading(records: int, values: int) -> None:
    """A callback of `prepare`, which says on a terminal how far it has read."""
    if sys.stdout.isatty():
        print(f"{CLEAR}data      {records:,} records, {values:,} tokens so far", end="", flush=True)


def duration(seconds: float) -> str:
    """A time for a reader: "42 s", "3 min 20 s", "5 h 2 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"
