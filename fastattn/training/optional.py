"""Packages that only some features need."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(package: str, extra: str, purpose: str) -> ModuleType:
    """The imported `package`.

    Raises:
        ImportError: it is not installed; the message says what needs it and which extra of
            fastattn brings it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.partition(".")[0]:
            raise
        raise ImportError(
            f'{purpose} needs the package {error.name}: pip install "fastattn[{extra}]"'
        ) from error
