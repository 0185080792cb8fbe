"""The results of the norms' operator and of its backward: their shapes, dtypes and memory.

One place for the kernel backends and for the operator's fake implementation. A result that a call
does not have is an empty tensor.
"""

from __future__ import annotations

import torch


def of_forward(
    x: torch.Tensor, residual: torch.Tensor | None, center: bool, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, stream, statistics): stream only with a residual; statistics (2 or 1, ...) float32."""
    out = x.new_empty(x.shape, dtype=out_dtype)
    if residual is None:
        stream = out.new_empty(0)
    else:
        stream = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    shape = (2 if center else 1, *x.shape[:-1])
    return out, stream, x.new_empty(shape, dtype=torch.float32)


def of_backward(
    stream: torch.Tensor,
    weight: torch.Tensor | None,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    weight_grad: bool,
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dresidual, dweight, dbias).

    dresidual is empty where it would be dx again (one dtype, no dropout), dweight without
    `weight_grad`, dbias without `bias_dtype`.
    """
    dx = stream.new_empty(stream.shape, dtype=x_dtype)
    has_dresidual = residual_dtype is not None and (residual_dtype != x_dtype or dropout_p > 0)
    dresidual = dx.new_empty(dx.shape if has_dresidual else 0, dtype=residual_dtype)
    if weight is None or not weight_grad:
        dweight = dx.new_empty(0)
    else:
        dweight = weight.new_empty(weight.shape)
    dbias = dx.new_empty(0 if bias_dtype is None else stream.shape[-1], dtype=bias_dtype)
    return dx, dresidual, dweight, dbias
