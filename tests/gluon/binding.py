"""Runs the source of a `@gluon.jit` function as Python, with the emulator's names in place of Triton's.

The function's globals and closure are replaced (modules, library functions, other jit functions,
constexpr values), never its code.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import triton.experimental.gluon.language as gl

from . import barriers, copies, language, products
from .errors import check
from .values import Tensor

LANGUAGE = gl.__name__


class Namespace:
    """A module, of which every name is emulated when it is asked for."""

    def __init__(self, module: Any):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = emulated(getattr(self._module, name))
        setattr(self, name, value)
        return value


class Function:
    """A jit function, callable in a launch."""

    def __init__(self, function: Callable):
        self.function, self.__name__ = function, function.__name__
        code = function.__code__
        self.names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        notes = {n: getattr(x, "__name__", x) for n, x in function.__annotations__.items()}
        self.constants = {n for n in self.names if "constexpr" in str(notes.get(n))}
        self.bound: Callable | None = None

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self.bound is None:
            self.bound = self._bind()
        for name, value in [*zip(self.names, args), *options.items()]:
            if name in self.constants:
                text = f"{self.__name__}: run-time value for constexpr {name}"
                check(not isinstance(value, Tensor), "type", text)
        return self.bound(*args, **options)

    def _bind(self) -> Callable:
        function, known = self.function, self.function.__globals__
        names = {n: emulated(known[n]) for n in _names(function.__code__) if n in known}
        names.update(__builtins__=__builtins__, __name__=function.__module__)
        names.update(range=language.run_time_range)
        names.update(min=language.TABLE["minimum"], max=language.TABLE["maximum"])
        cells = [types.CellType(emulated(x.cell_contents)) for x in function.__closure__ or ()]
        defaults = function.__defaults__ and tuple(emulated(x) for x in function.__defaults__)
        code = function.__code__
        bound = types.FunctionType(code, names, self.__name__, defaults, tuple(cells))
        bound.__kwdefaults__ = function.__kwdefaults__
        return bound


def _names(code: types.CodeType) -> set[str]:
    inner = (x for x in code.co_consts if isinstance(x, types.CodeType))
    return set(code.co_names).union(*(_names(x) for x in inner))


@functools.cache
def function(source: Callable) -> Function:
    """The emulated form of a Python function that a kernel is made of."""
    return Function(source)


def emulated(value: Any) -> Any:
    """The counterpart of an object that a kernel's globals hold."""
    if isinstance(value, types.ModuleType | types.SimpleNamespace):
        return Namespace(value)
    kind, module = type(value).__name__, getattr(value, "__module__", None) or ""
    if kind == "constexpr":
        return value.value
    if value is gl.constexpr or value is gl.static_range:
        return language.TABLE[value.__name__]
    if getattr(value, "__triton_aggregate__", False) and isinstance(value, type):
        return _aggregate(value)
    jit = kind in ("JITFunction", "GluonJITFunction", "InterpretedFunction")
    if jit and not module.startswith(("triton.language", LANGUAGE)):
        return function(value.fn)
    if jit or getattr(value, "__triton_builtin__", False):
        return _library(value.fn.__name__ if jit else value.__name__, module)
    return value


def _library(name: str, module: str) -> Any:
    """A function of Triton's own."""
    table = {"tma": copies.TABLE, "mbarrier": barriers.TABLE}.get(module.rsplit(".", 1)[-1])
    for known in (table,) if table else (products.TABLE, language.TABLE):
        if name in known:
            return known[name]

    def missing(*_: Any, **__: Any) -> None:
        raise NotImplementedError(f"the emulator has no {module}.{name}")

    return missing


@functools.cache
def _aggregate(real: Any) -> type:
    """A class with the fields and methods of a `@gluon.aggregate`."""
    fields, init = real.__aggregate_fields__, real.hash_attrs[0]
    init = getattr(init, "fn", init)
    members: dict[str, Any] = {
        name: _method(function(member.fn))
        for name, member in inspect.getmembers(real)
        if type(member).__name__ in ("JITFunction", "GluonJITFunction")
    }

    def construct(self: Any, *args: Any, **options: Any) -> None:
        if getattr(init, "__triton_builtin__", False):  # Triton's own: a field each
            values = {**real.__aggregate_defaults__, **dict(zip(fields, args)), **options}
            for name, value in values.items():
                setattr(self, name, value)
        else:
            init(self, *args, **options)
        lost = [name for name in fields if not hasattr(self, name)]
        check(not lost, "type", f"{real.__name__} without {lost}")

    def assign(self: Any, name: str, value: Any) -> None:
        check(name in fields, "type", f"{real.__name__} has no field {name}")
        object.__setattr__(self, name, emulated(value))

    return type(real.__name__, (), {**members, "__init__": construct, "__setattr__": assign})


def _method(emulated_function: Function) -> Callable:
    return lambda self, *args, **options: emulated_function(self, *args, **options)
