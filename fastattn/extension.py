"""Finds and loads the compiled CUDA C++ extension, lazily, with a reason when there is none."""

from __future__ import annotations

import importlib.util


def status() -> str:
    """One line on the extension `fastattn._C`: where it is, or why it is not used."""
    found = importlib.util.find_spec("fastattn._C")
    if found is None:
        return "not built: this version has no CUDA C++ sources, its kernels are Triton's"
    return f"built: {found.origin}"
