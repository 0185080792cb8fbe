"""Which requests run, and what of each is read next: memory bounded by pages, first come first.

A request waits, runs, may be preempted and wait again, and leaves. Both queues are in the order of
arrival, the running ones being older than all that wait; whoever lacks a page takes the youngest's,
so the oldest always goes on, and none is forgotten.
"""

from __future__ import annotations

from collections import deque

import torch

from fastattn.generation.paging import PagePool
from fastattn.generation.request import Request

Rows = list[tuple[Request, int]]  # and how many of its pending tokens


class Scheduler:
    """
    Args:
        pages, page_size, max_batch, prefill_chunk: `Engine`'s.
        width: pages that a row of the block table has room for.

    Attributes:
        table: (max_batch, width) int32 on the CPU, the block table of the running requests, whose
            ``row`` is theirs; what they do not hold is page number ``pages``.
        waiting, running: the requests, the oldest first.
        preempted, reused: `Engine`'s.
    """

    def __init__(
        self, pages: int, page_size: int, max_batch: int, prefill_chunk: int, width: int
    ) -> None:
        self.pool = PagePool(pages)
        self.page_size, self.prefill_chunk = page_size, prefill_chunk
        self.table = torch.full((max_batch, width), pages, dtype=torch.int32, device="cpu")
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.preempted = self.reused = 0
        self._free_rows = list(range(max_batch))[::-1]

    def pages_of(self, tokens: int) -> int:
        """How many pages they take."""
        return -(-tokens // self.page_size)

    def plan(self) -> Rows:
        """What this step reads. Whoever lacks a page for it takes the youngest's, or waits."""
        self._admit()
        budget = self.prefill_chunk
        rows: Rows = []
        for request in tuple(self.running):  # the oldest first: one that was planned stays
            if request.row < 0 or not self._has_room(request):
                continue
            if request.pending == 1:
                rows.append((request, 1))
                continue
            self._skip_shared(request)
            if budget > 0:
                count = min(budget, request.pending)
                if request.length == 0:
                    count = max(count, request.fixing) if request.reads_on else request.fixing
                rows.append((request, count))
                budget -= count
        return rows

    def count(self, request: Request, count: int) -> None:
        """Its next ``count`` tokens are in its pages."""
        full = request.length // self.page_size
        request.length += count
        for index in range(full, request.length // self.page_size):
            self.pool.publish(request.pages[index], request.page_name(index, self.page_size))

    def remove(self, request: Request) -> None:
        """It has ended, running or waiting."""
        if request.row >= 0:
            self._leave(request)
        else:
            self.waiting.remove(request)

    def _admit(self) -> None:
        """Let waiting requests run, in order, as long as all of their known tokens have room."""
        while self.waiting and self._free_rows:
            request = self.waiting[0]
            shared = self._shared(request)
            needed = self.pages_of(len(request.known))
            if needed - sum(map(self.pool.is_held, shared)) > self.pool.available:
                return
            self.waiting.popleft()
            self.running.append(request)
            request.row = self._free_rows.pop()
            for page in shared:
                self.pool.hold(page)
                self._give(request, page)
            request.length = len(shared) * self.page_size
            self.reused += request.length
            while len(request.pages) < needed:
                self._give(request, self.pool.take())

    def _shared(self, request: Request) -> list[int]:
        """The pages that hold its beginning already; not its last token, which is to be read."""
        pages: list[int] = []
        for index in range((len(request.known) - 1) // self.page_size):
            page = self.pool.find(request.page_name(index, self.page_size))
            if page is None:
                break
            pages.append(page)
        return pages

    def _give(self, request: Request, page: int | None) -> None:
        assert page is not None
        self.table[request.row, len(request.pages)] = page
        request.pages.append(page)

    def _has_room(self, request: Request) -> bool:
        """Whether it has a page for each known token, if need be by preempting the youngest."""
        while len(request.pages) < self.pages_of(len(request.known)):
            page = self.pool.take()
            if page is not None:
                self._give(request, page)
                continue
            youngest = self.running[-1]
            self._leave(youngest)
            self.waiting.appendleft(youngest)
            self.preempted += 1
            if youngest is request:
                return False
        return True

    def _skip_shared(self, request: Request) -> None:
        """Skip the next pages that another request has filled since this one was admitted."""
        size, pool = self.page_size, self.pool
        while request.length % size == 0 and request.pending > size:
            index = request.length // size
            page = pool.find(request.page_name(index, size))
            if page is None:
                return
            if page != request.pages[index]:
                pool.hold(page)
                pool.release([request.pages[index]])
                request.pages[index] = page
                self.table[request.row, index] = page
            request.length += size
            self.reused += size

    def _leave(self, request: Request) -> None:
        """Stop running it; what it has computed may be found again by its name."""
        self.running.remove(request)
        self.pool.release(request.pages)
        self.table[request.row] = self.pool.count
        self._free_rows.append(request.row)
        request.row, request.pages, request.length = -1, [], 0
