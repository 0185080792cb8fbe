"""A function with other globals: its code runs unchanged, but for what some of its names mean.

A forward whose names `F` or `apply_rotary_pos_emb` are ours is made so. Neither the module that
they come from nor the class is touched, and other classes there keep the original.
"""

from __future__ import annotations

import functools
from types import CellType, FunctionType
from typing import Any


class _Globals(dict[str, Any]):
    """The globals of a function's module as they are at each lookup, with some names replaced.

    A copy would go stale when a name of the module is set later. A lookup in a dict's subclass goes
    through `__getitem__`. The items of the dict itself are a copy nonetheless: torch.compile reads
    them for its guards, and adds names of its own. Without `__name__` among them, by which it would
    guard the module's functions in place of these.
    """

    def __init__(self, original: dict[str, Any], replaced: dict[str, Any]) -> None:
        super().__init__({**original, **replaced})
        self.pop("__name__", None)
        self._original, self._replaced = original, replaced

    def __getitem__(self, name: str) -> Any:
        if name in self._original and name not in self._replaced:
            return self._original[name]
        return super().__getitem__(name)


def rebound(function: FunctionType, replaced: dict[str, Any]) -> FunctionType:
    """`function` with other globals; where it wraps another one (a decorator), that one."""
    wrapped = _wrapped(function)
    names, closure = function.__globals__, function.__closure__
    if wrapped is None:
        names = _Globals(names, replaced)
    else:
        inner = rebound(wrapped, replaced)
        closure = tuple(CellType(inner) if _holds(c, wrapped) else c for c in closure or ())
    made = FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    functools.update_wrapper(made, function)
    made.__kwdefaults__ = function.__kwdefaults__
    if wrapped is None:
        del made.__wrapped__  # type: ignore[attr-defined]
    else:
        made.__wrapped__ = inner  # type: ignore[attr-defined]
    return made


def _wrapped(function: Any) -> FunctionType | None:
    wrapped: FunctionType | None = vars(function).get("__wrapped__")
    return wrapped


def _holds(cell: CellType, value: object) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # empty
        return False


def innermost(forward: Any) -> FunctionType | None:
    """The function that decorators have wrapped, None where one does not keep it in its closure."""
    while isinstance(forward, FunctionType):
        wrapped = _wrapped(forward)
        if wrapped is None:
            return forward
        if not any(_holds(cell, wrapped) for cell in forward.__closure__ or ()):
            return None
        forward = wrapped
    return None
