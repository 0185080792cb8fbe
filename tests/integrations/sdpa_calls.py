"""What the tests of F.scaled_dot_product_attention share: calls, the formula, empty arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

ORIGINAL = F.scaled_dot_product_attention
Arguments = dict[str, Any]
Shape = tuple[int, ...]


def run(
    function: Callable[..., torch.Tensor],
    tensors: list[torch.Tensor],
    arguments: Arguments,
    grad_out: torch.Tensor | None = None,
) -> dict[str, torch.Tensor | None]:
    """Output and gradients, of a floating-point attn_mask too."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    mask = arguments.get("attn_mask")
    names = ["query", "key", "value"]
    if mask is not None and mask.is_floating_point():
        mask = mask.detach().clone().requires_grad_()
        arguments = {**arguments, "attn_mask": mask}
        leaves, names = [*leaves, mask], [*names, "attn_mask"]
    out = function(*leaves[:3], **arguments)
    if out.numel():
        out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape).to(out))
    found = {f"gradient of {name}": x.grad for name, x in zip(names, leaves, strict=True)}
    return {"out": out.detach(), **found}


def doubles(device: str, *shapes: Shape) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=torch.float64, device=device) for shape in shapes]


def plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The formula."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = query @ key.mT / query.shape[-1] ** 0.5
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


Q, K = zeros(3, 2, 5, 8), zeros(3, 2, 7, 8)
