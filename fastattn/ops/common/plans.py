"""The cache between a call and the backend that runs it.

Describing, checking and dispatching a call costs tens of microseconds, more than a small op. All of
it depends only on metadata, so its result is kept under a key of that metadata.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Generic, TypeVar

Plan = TypeVar("Plan")


class PlanCache(Generic[Plan]):
    """A dict that forgets everything when it is full.

    Decoding with a growing cache makes a new key every step; a full cache is emptied, and the few
    shapes in use are described once more.
    """

    def __init__(self, capacity: int = 4096) -> None:
        self._plans: dict[Hashable, Plan] = {}
        self._capacity = capacity
        self.get = self._plans.get
        self.clear = self._plans.clear

    def put(self, key: Hashable, plan: Any) -> None:
        if len(self._plans) >= self._capacity:
            self._plans.clear()
        self._plans[key] = plan
