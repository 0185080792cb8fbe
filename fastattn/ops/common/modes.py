"""The modes of torch that change what an op has to do: autocast, transforms, tracing, gradients."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

_tracing_state = torch._C._get_tracing_state
_dispatch_modes = torch._C._len_torch_dispatch_stack
_RECORDERS = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for `device_type`; torch raises for "meta", which has none."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast wants of a matmul-like op on `device_type`, None if it is off."""
    if autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor` as autocast would cast it: floating point below float64 to `dtype`."""
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def transformed() -> bool:
    """Whether a torch.func transform (grad, jvp, vmap, ...) or forward-mode AD is active.

    An op that autograd sees as one opaque node gives a zero tangent there, in silence; such calls
    must go to a backend that is plain differentiable PyTorch.
    """
    return forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None


def recorded() -> bool:
    """Whether calls are recorded (torch.compile, export, jit.trace, make_fx) or faked.

    A tensor may then have no values, and a choice that depends on its sizes, or an operation in
    place, would become part of the recording.
    """
    return (
        torch.compiler.is_compiling()
        or _tracing_state() is not None
        or (
            _dispatch_modes() > 0
            and any(torch._C._get_dispatch_mode(mode) is not None for mode in _RECORDERS)
        )
    )


def readable(tensor: torch.Tensor) -> bool:
    """Whether the host may read values of `tensor`, for a check: it has some, and nobody records.

    A tensor inside of vmap has no values of its own. Reading may wait for the device.
    """
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and not tensor.is_meta
        and not recorded()
        and not _batched(tensor)
    )


def _batched(tensor: torch.Tensor) -> bool:
    """Whether a vmap has wrapped `tensor`, in other transforms or not."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def plain() -> bool:
    """Whether nothing of this changes a call on the CPU: no transform and no autocast."""
    return (
        forward_ad._current_level < 0
        and torch._C._functorch.maybe_current_level() is None
        and not torch.is_autocast_enabled("cpu")
    )


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd will record a function of `tensors`."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
