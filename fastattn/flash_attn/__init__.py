"""flash-attn 2.8's functions on fastattn's ops: write `fastattn.flash_attn` for `flash_attn`.

`flash_attn_interface` says what differs; `bert_padding` has the padding helpers. `__version__` is
that of flash-attn's interface, which its users compare.
"""

from __future__ import annotations

from fastattn.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__version__ = "2.8.3"

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
