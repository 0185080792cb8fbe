"""Formulas by which torch.utils.flop_counter counts registered ops.

That module imports Triton, which takes longer than to import all of fastattn. So the formulas wait
here until somebody imports it.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

COUNTER = "torch.utils.flop_counter"

Formula = Callable[..., int]
_waiting: dict[str, Formula] = {}


def register(name: str, formula: Formula) -> None:
    """Count the op `fastattn::name`.

    Args:
        formula: (*inputs of the op) -> floating-point operations of its matrix products, two for a
            multiplication and an addition, as torch counts its own ops.
    """
    _waiting[name] = formula
    if COUNTER in sys.modules:
        _hand_over(sys.modules[COUNTER])


def _hand_over(counter: ModuleType) -> None:
    while _waiting:
        name, formula = _waiting.popitem()

        def count(*inputs: Any, out_val: Any = None, formula: Formula = formula) -> int:
            return formula(*inputs)

        counter.register_flop_formula(getattr(torch.ops.fastattn, name), get_raw=True)(count)


class _AtImport(importlib.abc.MetaPathFinder):
    """Finds the counter once, as it is found without this, and hands the formulas over."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _hand_over(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if COUNTER not in sys.modules:
    sys.meta_path.insert(0, _AtImport())
