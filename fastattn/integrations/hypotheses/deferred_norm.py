"""Heads of q or k whose norm is left to the rotation after it.

    q = self.q_norm(q).transpose(1, 2)
    q, k = apply_rotary_pos_emb(q, k, cos, sin)

`later(norm, cls, module, x)` is x, which remembers its norm. Transposes of other dimensions do so
too. Our rotation takes x and norm apart, for one kernel that does both; any other operation takes
the norm first, and goes on with the result. So no forward has to be known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastattn.integrations.hypotheses.norm import Norm
from fastattn.nn.plain import is_plain

# Of which the norm changes nothing.
_METADATA = frozenset(
    [
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim")),
        *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_cpu", "requires_grad")),
        *(Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_floating_point),
    ]
)


class DeferredNorm(Tensor):
    """(..., head_dim); see the module. Made by `later`."""

    _heads: Tensor
    _norm: Norm
    _module: torch.nn.Module
    _read: Tensor | None

    @staticmethod
    def of(heads: Tensor, norm: Norm, module: torch.nn.Module) -> DeferredNorm:
        made = heads.as_subclass(DeferredNorm)
        made._heads, made._norm, made._module, made._read = heads, norm, module, None
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.transpose and not kwargs:
            x, *dims = args
            if x._read is None and all(dim % x._heads.dim() != x._heads.dim() - 1 for dim in dims):
                return DeferredNorm.of(x._heads.transpose(*dims), x._norm, x._module)
        with torch._C.DisableTorchFunctionSubclass():
            if func not in _METADATA:
                args, kwargs = tree_map(read, (tuple(args), kwargs))
            return func(*args, **kwargs)


def later(norm: Norm, cls: type[torch.nn.Module], module: torch.nn.Module, x: Any) -> Any:
    """`module` of x, a norm of the class `cls`; at once where it has to be called itself."""
    suits = (
        isinstance(x, Tensor)
        and is_plain(module, cls)
        and all(p is None or p.dtype is x.dtype for p in module._parameters.values())
    )
    return DeferredNorm.of(x, norm, module) if suits else module(x)


def read(x: Any) -> Any:
    """x; with its norm taken, if it is deferred."""
    if not isinstance(x, DeferredNorm):
        return x
    if x._read is None:
        x._read = x._module(x._heads)
    return x._read


def taken_off(q: Tensor, k: Tensor) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """q and k without norms, and these as arguments of `rotary`.

    It has one eps and one offset: where those of k are others, k comes with its norm taken.
    """
    heads: list[Tensor] = []
    norms: dict[str, Any] = {}
    for name, x in (("q_weight", q), ("k_weight", k)):
        if isinstance(x, DeferredNorm) and x._read is None:
            weight, settings = x._norm.of_heads(x._module)
            if norms.items() >= settings.items() or not norms:
                norms |= {**settings, name: weight}
                heads.append(x._heads)
                continue
        heads.append(read(x))
    return (heads[0], heads[1]), norms
