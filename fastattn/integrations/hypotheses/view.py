"""A module of which only its own forward sees that parts are replaced."""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any


class View:
    """A module as its own forward sees it, with others in the place of some of its parts.

    Args:
        instead: by name the part, or a dictionary of the same kind for a part of a part.
    """

    def __init__(self, module: Any, instead: dict[str, Any]) -> None:
        self.__dict__["_module"] = module  # torch.compile of torch 2.11 knows no `update`
        self.__dict__["_instead"] = instead

    def __getattr__(self, name: str) -> Any:
        module, instead = self.__dict__["_module"], self.__dict__["_instead"].get(name)
        if isinstance(instead, dict):
            return View(getattr(module, name), instead)
        if instead is not None:
            return instead
        value = getattr(module, name)
        if isinstance(value, MethodType) and value.__self__ is module:
            return functools.partial(value.__func__, self)  # torch.compile makes no MethodType
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_module"], name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """That of the class; transformers' layers ask whether it is the one that they run in."""
        return type(self.__dict__["_module"]).forward(self, *args, **kwargs)

    __call__ = forward
