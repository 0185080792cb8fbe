"""Triton's interpreter without work that changes no result: kernels take less than half of the time.

It computes each sum, difference and product of integers a second time, in 64 bits, for an assertion
that it makes only where its builder's `debug` is set; that never is. And each call of a function
inside of a kernel patches triton.language as the launch has done already.
"""

from __future__ import annotations

import dataclasses
from types import FunctionType
from typing import Any


def hasten() -> None:
    """In this process, from now on.

    The names are not public: a Triton without them interprets as it does, and test_interpreter.py
    says so.
    """
    # A launch would import it while triton.language is patched, and Gluon keep what it got.
    import triton.experimental.gluon.language  # noqa: F401
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    options = getattr(builder, "options", None)
    if getattr(options, "sanitize_overflow", False) and not options.debug:
        builder.options = dataclasses.replace(options, sanitize_overflow=False)

    if not (hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "GridExecutor")):
        return
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[tuple[bool, ...]] = set()  # in this launch, by what the function's module sees

    def patch_once(fn: FunctionType) -> Any:
        seen = list(map(id, fn.__globals__.values()))
        key = tuple(id(module) in seen for module in (tl, tl.core))
        if key in patched:
            return None
        patched.add(key)
        return patch(fn)

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        try:
            launch(self, *args, **kwargs)
        finally:
            patched.clear()  # the launch has taken its patches back

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launched
