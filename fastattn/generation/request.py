"""A request to an `Engine`: a prompt, what is wanted of it, and the tokens so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from fastattn.generation.paging import page_name
from fastattn.generation.sampling import Sampling
from fastattn.generation.stopping import StopStrings

if TYPE_CHECKING:
    from fastattn.generation.engine import Engine


class Request:
    """What `Engine.submit` returns.

        for token in request: ...       # as they come; other requests go on meanwhile
        request.cancel()                # from any thread

    Attributes:
        prompt: the token ids given.
        tokens: the new ones so far, the one that ended the sequence included.
        max_new_tokens: how many there may be.
        finish_reason: None while it goes on; "stop": an eos token or a stop string; "length":
            ``max_new_tokens`` are there; "cancelled"; "error": see ``error``.
        error: the exception that ended it. Iterating raises it, after the last token.
        cancelled: whether `cancel` was called; the engine's next step ends it, if nothing else did.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: list[int],
        max_new_tokens: int,
        sampling: Sampling,
        numbers: Tensor | None,
        ends: list[int],
        texts: StopStrings | None,
        on_token: Callable[[int], None] | None,
        on_finish: Callable[[Request], None] | None,
        first: int = 0,
    ) -> None:
        """``first``: how many tokens of a prompt decide on the scales of 8-bit numbers."""
        self.prompt = prompt
        self.tokens: list[int] = []
        self.max_new_tokens = max_new_tokens
        self.finish_reason: str | None = None
        self.error: BaseException | None = None
        self._engine = engine
        self.cancelled = False
        self._texts = texts
        self._on_token, self._on_finish = on_token, on_finish
        # What the engine keeps of it. The first `length` of `known` are in the pages.
        self.sampling = sampling
        self.ends = ends
        self.numbers = numbers  # (max_new_tokens,), what each token is drawn by
        self.known = list(prompt)
        self.length = 0
        self.pages: list[int] = []
        self.row = -1  # of the engine's block table
        # A prompt that has fewer of them is read first, on its own: no other token decides.
        self.fixing = len(prompt[:first])
        self.reads_on = len(prompt) >= first
        self._root = page_name(b"", prompt[:first]) if first else b""
        self._names: list[bytes] = []

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def pending(self) -> int:
        """Tokens that the model has not read yet."""
        return len(self.known) - self.length

    def cancel(self) -> None:
        """End it at the engine's next step and free its pages; nothing if it has ended."""
        self.cancelled = True

    def __iter__(self) -> Iterator[int]:
        """The new tokens from the first on; steps the engine while there is none."""
        given = 0
        while True:
            ended = self.finished  # asked first: no token comes after it
            while given < len(self.tokens):
                yield self.tokens[given]
                given += 1
            if ended:
                break
            self._engine.step()
        if self.error is not None:
            raise self.error

    def page_name(self, index: int, page_size: int) -> bytes:
        """The name of its ``index``-th page, all of whose tokens are known."""
        while len(self._names) <= index:
            first = len(self._names) * page_size
            previous = self._names[-1] if self._names else self._root
            self._names.append(page_name(previous, self.known[first : first + page_size]))
        return self._names[index]

    def accept(self, token: int) -> str | None:
        """Add the next token; why the sequence ends with it, None if it goes on."""
        self.known.append(token)
        self.tokens.append(token)
        if self._on_token is not None:
            self._on_token(token)
        ended = self._texts is not None and self._texts.completed(self.prompt, self.tokens)
        if ended or token in self.ends:
            return "stop"
        return "length" if len(self.tokens) == self.max_new_tokens else None

    def finish(self, reason: str, error: BaseException | None) -> None:
        self.error = error
        self.finish_reason = reason
        if self._on_finish is not None:
            try:
                self._on_finish(self)
            except Exception as raised:  # others are in the same step
                self.error = self.error or raised
