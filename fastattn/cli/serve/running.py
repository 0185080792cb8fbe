"""A task in the engine: whether it is taken on, its choices as they run, their text as it comes."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

from fastattn.cli.answers import TextStream
from fastattn.cli.serve.protocol import RequestError, Task
from fastattn.generation import Background, Request


@dataclasses.dataclass
class Admission:
    """How much is taken on at once.

    Attributes:
        most: choices of all clients together that run or wait; what is beyond them is refused.
        new_tokens: the most of one choice; None: as many as there is room for.
        now: choices that run or wait.
    """

    most: int = 256
    new_tokens: int | None = None
    now: int = 0

    def check(self, task: Task) -> None:
        """Raises RequestError if the task is too much, or too much now."""
        if self.now + task.n * len(task.prompts) > self.most:
            raise RequestError.too_many(f"{self.now} choices run or wait already", 1)
        asked, most = task.max_tokens, self.new_tokens
        if asked is not None and most is not None and asked > most:
            raise RequestError(f"max_tokens may be at most {most} here; got {asked}", "max_tokens")


class Running:
    """A task's requests to the engine, one a choice, and their text as it comes."""

    def __init__(
        self, engine: Background, task: Task, tokenizer: Any, admission: Admission
    ) -> None:
        """Raises RequestError if one of them does not fit; then none runs."""
        admission.check(task)
        self._engine, self._admission = engine, admission
        self._events: asyncio.Queue[tuple[int, int | None]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self.requests: list[Request] = []
        try:
            for prompt in task.prompts:
                for _ in range(task.n):
                    self.requests.append(self._submit(task, prompt, len(self.requests)))
        except (TypeError, ValueError) as error:
            self.cancel()
            long = "_positions" in str(error) or "pages" in str(error)
            code = "context_length_exceeded" if long else None
            param = "messages" if task.chat else "prompt"
            raise RequestError(str(error), param, code=code) from error
        self._texts = [TextStream(tokenizer, task.stop) for _ in self.requests]

    def _submit(self, task: Task, prompt: list[int], index: int) -> Request:
        def tell(token: int | None) -> None:  # in the engine's thread
            self._loop.call_soon_threadsafe(heard, token)

        def heard(token: int | None) -> None:
            self._events.put_nowait((index, token))
            self._admission.now -= token is None

        longest = self._engine.engine.longest - len(prompt)
        room = max(min(longest, self._admission.new_tokens or longest), 1)
        request = self._engine.submit(
            prompt,
            max_new_tokens=room if task.max_tokens is None else task.max_tokens,
            sampling=task.sampling,
            seed=None if task.seed is None else task.seed + index,
            on_token=tell,
            on_finish=lambda _: tell(None),
        )
        self._admission.now += 1
        return request

    async def pieces(self) -> AsyncIterator[tuple[int, str, str | None]]:
        """(choice, its next text, None or why it ended: "stop" or "length") until all have ended.

        Raises RequestError if one fails.
        """
        unfinished = len(self.requests)
        while unfinished:
            index, token = await self._events.get()
            request, text = self.requests[index], self._texts[index]
            if token is not None:
                yield index, text.push(token), None
                if text.stopped:
                    self._engine.cancel(request)
                continue
            if request.error is not None:
                raise RequestError(str(request.error), status=500)
            unfinished -= 1
            last = text.end()
            yield index, last, "stop" if text.stopped else str(request.finish_reason)

    def cancel(self) -> None:
        """End what has not ended."""
        for request in self.requests:
            self._engine.cancel(request)

    def usage(self) -> dict[str, int]:
        prompt = sum(len(request.prompt) for request in self.requests)
        new = sum(len(request.tokens) for request in self.requests)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
