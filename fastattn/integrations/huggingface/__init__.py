"""Hugging Face transformers on fastattn.

Importing this package registers the attention implementation "fastattn" with transformers, for any
model that dispatches through its `AttentionInterface`:

    import fastattn.integrations.huggingface
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="fastattn")

`fastattn.accelerate(model)` goes further for the families that it knows, and needs no argument when
the model is loaded.
"""

from __future__ import annotations

try:
    import transformers
except ImportError as error:
    raise ImportError(
        "fastattn.integrations.huggingface needs transformers 5 or later: "
        'pip install "fastattn[hf]"'
    ) from error

if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(
        f"fastattn.integrations.huggingface needs transformers 5 or later; this is "
        f'{transformers.__version__}: pip install "fastattn[hf]"'
    )

from fastattn.integrations.huggingface.attention import attention_forward, register
from fastattn.integrations.huggingface.dispatch import NAME

register()

__all__ = ["NAME", "attention_forward", "register"]
