"""fastattn in PyTorch's registry of flash attention implementations (torch.nn.attention).

    fastattn.integrations.sdpa.register()
    torch.nn.attention.activate_flash_attention_impl("fastattn")

F.scaled_dot_product_attention keeps its own choice between flash, memory-efficient, cuDNN and plain
attention. What it sends to flash on a GPU (float16 or bfloat16, no attn_mask) are the two ATen ops
below, and these then run on fastattn's kernels, in eager mode and under torch.compile. Nested
tensors and torch.nn.attention.varlen have other ops, which stay ATen's. `override_sdpa()` reaches
further in another direction: every dtype, masks, the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from fastattn import backends
from fastattn.ops.attention import problem as _problem
from fastattn.ops.attention.call import Extras, Settings
from fastattn.ops.attention.registration import BACKENDS
from fastattn.ops.common import dropout

KERNELS = tuple(backend for backend in BACKENDS if backend.name in backends.KERNELS)

NAME = "fastattn"
FORWARD = "_scaled_dot_product_flash_attention"
BACKWARD = "_scaled_dot_product_flash_attention_backward"


def register() -> None:
    """Make "fastattn" known to `torch.nn.attention.activate_flash_attention_impl`.

    Nothing changes before it is activated; `torch.nn.attention.restore_flash_attention_impl()`,
    which torch 2.10 lacks, ends that. Harmless if repeated.

    Raises:
        RuntimeError: this version of torch has no such registry.
    """
    import torch.nn.attention as torch_attention

    if not hasattr(torch_attention, "register_flash_attention_impl"):
        raise RuntimeError(
            f"torch {torch.__version__} has no registry of flash attention implementations; "
            "use fastattn.override_sdpa()"
        )
    torch_attention.register_flash_attention_impl(NAME, register_fn=lambda: Implementation("CUDA"))


class Implementation:
    """Our kernels in the place of ATen's two flash ops, from construction until `remove`.

    These ops are ATen's own words for it: causal is bottom-right (F.scaled_dot_product_attention,
    which means top-left, sends them only equal lengths; torch.nn.attention.bias.causal_lower_right
    the others), the LSE is float32 (batch, heads, seqlen_q) in natural logarithm. The seed of our
    dropout travels in the first of the two words of `rng_state`.

    A call that our kernels do not take runs on the kernel that was there before; forward and
    backward decide it alike, from metadata.

    Args:
        dispatch_key: the device type whose kernels are replaced, as the dispatcher calls it.

    Raises:
        RuntimeError: there is no kernel to replace.
    """

    def __init__(self, dispatch_key: str) -> None:
        try:
            self._original_forward = torch.library.get_kernel(f"aten::{FORWARD}", dispatch_key)
            self._original_backward = torch.library.get_kernel(f"aten::{BACKWARD}", dispatch_key)
        except RuntimeError as error:
            raise RuntimeError(
                f"this torch ({torch.__version__}) is built without flash attention for "
                f"{dispatch_key}, so there is nothing to replace; use fastattn.override_sdpa()"
            ) from error
        self._library: Library | None = Library("aten", "IMPL", dispatch_key)
        for name, function in ((FORWARD, self._forward), (BACKWARD, self._backward)):
            self._library.impl(name, function, dispatch_key, with_keyset=True, allow_override=True)

    def remove(self) -> None:
        """Put back what was there before."""
        self._library = None  # the last reference; its end takes the kernels out

    def _forward(
        self,
        keys: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        return_debug_mask: bool = False,
        *,
        scale: float | None = None,
    ) -> tuple[Any, ...]:
        q, k, v = (x.detach().transpose(1, 2) for x in (query, key, value))
        settings, extras, backend = _described(q, k, v, dropout_p, is_causal, scale)
        if backend is None:
            result: tuple[Any, ...] = self._original_forward.call_boxed(
                keys, query, key, value, dropout_p, is_causal, return_debug_mask, scale=scale
            )
            return result
        if return_debug_mask:
            raise RuntimeError("return_debug_mask: fastattn never holds the dropout mask")
        seed = torch.zeros(1, dtype=torch.int64, device=q.device)
        if dropout_p:
            seed = dropout.draw_seed(q.device)
            extras = extras._replace(dropout_seed=seed)
        out, lse = torch.ops.fastattn.attention(q, k, v, *extras, *settings, backend, True)
        state = torch.cat((seed, torch.zeros_like(seed))).view(torch.uint64)
        unused = torch.zeros((), dtype=torch.uint64, device=q.device)
        debug_mask = query.new_empty(0)
        lengths = query.shape[2], key.shape[2]
        out = _strides_like(query, out.transpose(1, 2))
        return out, lse, None, None, *lengths, state, unused, debug_mask

    def _backward(
        self,
        keys: Any,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        cum_seq_q: Tensor | None,
        cum_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        philox_seed: Tensor,
        philox_offset: Tensor,
        *,
        scale: float | None = None,
    ) -> tuple[Tensor, ...]:
        q, k, v = (x.detach().transpose(1, 2) for x in (query, key, value))
        settings, extras, backend = _described(q, k, v, dropout_p, is_causal, scale)
        if backend is None:
            result: tuple[Tensor, ...] = self._original_backward.call_boxed(
                keys, grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q,
                max_k, dropout_p, is_causal, philox_seed, philox_offset, scale=scale,
            )  # fmt: skip
            return result
        if dropout_p:
            extras = extras._replace(dropout_seed=philox_seed.view(torch.int64)[:1])
        grads = torch.ops.fastattn.attention_backward(
            grad_out.transpose(1, 2), None, out.transpose(1, 2), logsumexp, [False, False],
            q, k, v, *extras, *settings, backend, True,
        )  # fmt: skip
        return tuple(
            _strides_like(x, grad.transpose(1, 2)) for x, grad in zip((query, key, value), grads)
        )


def _described(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, is_causal: bool, scale: float | None
) -> tuple[Settings, Extras, str | None]:
    """The call as our registered op takes it, and the backend that runs it, None for ATen's own."""
    settings, extras = _problem.check(
        q,
        k,
        v,
        causal=is_causal,
        softmax_scale=scale,
        dropout_p=dropout_p,
    )
    problem = _problem.AttentionProblem.of(q, k, v, extras, settings, return_lse=True)
    named = backends.named(None)
    if named is not None:
        if named[0] not in [kernel.name for kernel in KERNELS]:
            return settings, extras, None  # "torch" is what was there before
        return settings, extras, backends.select("attention", KERNELS, problem, None).name
    for kernel in KERNELS:
        if kernel.unsupported(problem) is None and kernel.declined(problem, prove=True) is None:
            return settings, extras, kernel.name
    return settings, extras, None


def _strides_like(x: Tensor, result: Tensor) -> Tensor:
    """`result` in the memory order of x, which is what torch.compile counts on here."""
    if torch.empty_like(x, device="meta").stride() == result.stride():
        return result
    return torch.empty_like(x).copy_(result)
