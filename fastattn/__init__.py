"""Custom-kernel attention, normalisation and feed-forward for PyTorch on NVIDIA GPUs.

The functions run on the fastest capable backend (`fastattn.explain` says which, and why); the
modules of `fastattn.nn` are drop-ins for torch's; `fastattn.accelerate` swaps them into a model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastattn import nn
from fastattn.backends import UnsupportedError, explain, use_backend
from fastattn.ops.attention import attention
from fastattn.ops.ffn import ffn
from fastattn.ops.layer_norm import layer_norm, rms_norm

if TYPE_CHECKING:
    from fastattn import models
    from fastattn.integrations import accelerate, restore, verify
    from fastattn.models import GPT, GPTConfig

__version__ = "0.1.0"

__all__ = [
    "GPT",
    "GPTConfig",
    "UnsupportedError",
    "__version__",
    "accelerate",
    "attention",
    "explain",
    "ffn",
    "layer_norm",
    "models",
    "nn",
    "restore",
    "rms_norm",
    "use_backend",
    "verify",
]

# Imported at first use, so that a user of the ops alone does not pay for them.
_LAZY = {
    "GPT": "fastattn.models",
    "GPTConfig": "fastattn.models",
    "accelerate": "fastattn.integrations",
    "restore": "fastattn.integrations",
    "verify": "fastattn.integrations",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name == "models":
        return importlib.import_module("fastattn.models")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
