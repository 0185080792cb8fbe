"""Custom-kernel attention, normalisation and feed-forward for PyTorch on NVIDIA GPUs.

The functions run on the fastest capable backend (`fastattn.explain` says which, and why); the
modules of `fastattn.nn` are drop-ins for torch's; `fastattn.accelerate` swaps them into a model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastattn import nn
from fastattn.backends import UnsupportedError, explain, use_backend
from fastattn.ops.attention import (
    BlockMask,
    attention,
    attention_varlen,
    attention_with_kv_cache,
    merge_attention_states,
)
from fastattn.ops.cross_entropy import cross_entropy
from fastattn.ops.ffn import ffn
from fastattn.ops.layer_norm import layer_norm, rms_norm
from fastattn.ops.linear import linear
from fastattn.ops.linear_cross_entropy import linear_cross_entropy
from fastattn.ops.rotary import rotary

if TYPE_CHECKING:
    from fastattn import flash_attn, models
    from fastattn.integrations import accelerate, restore, verify
    from fastattn.integrations.sdpa import override_sdpa, scaled_dot_product_attention
    from fastattn.models import GPT, GPTConfig

__version__ = "0.1.0"

__all__ = [
    "GPT",
    "BlockMask",
    "GPTConfig",
    "UnsupportedError",
    "__version__",
    "accelerate",
    "attention",
    "attention_varlen",
    "attention_with_kv_cache",
    "cross_entropy",
    "explain",
    "ffn",
    "flash_attn",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "merge_attention_states",
    "models",
    "nn",
    "override_sdpa",
    "restore",
    "rms_norm",
    "rotary",
    "scaled_dot_product_attention",
    "use_backend",
    "verify",
]

# Imported at first use, so that a user of only the ops does not pay for them.
_LAZY = {
    "GPT": "fastattn.models",
    "GPTConfig": "fastattn.models",
    "accelerate": "fastattn.integrations",
    "override_sdpa": "fastattn.integrations.sdpa",
    "restore": "fastattn.integrations",
    "scaled_dot_product_attention": "fastattn.integrations.sdpa",
    "verify": "fastattn.integrations",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in ("flash_attn", "models"):
        return importlib.import_module(f"fastattn.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
