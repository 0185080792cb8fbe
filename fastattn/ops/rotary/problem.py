"""A call of `rotary` apart from its data, and every error that a user can make."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch

from fastattn.ops.common import modes
from fastattn.ops.common.dense import INDEX_DTYPES, check_dense, check_floating, dtype_name

NESTED = "pad it with torch.nested.to_padded_tensor"


@dataclass(frozen=True)
class RotaryProblem:
    """Metadata of one call of `rotary`, checked."""

    q_shape: tuple[int, ...]  # (batch, seqlen, heads, head_dim)
    k_shape: tuple[int, ...]  # (batch, seqlen, kv_heads, head_dim)
    dtype: torch.dtype  # of q and k
    cos_dtype: torch.dtype
    sin_dtype: torch.dtype
    q_weight_dtype: torch.dtype | None
    k_weight_dtype: torch.dtype | None
    rotary_dim: int
    width: int  # of cos and sin: rotary_dim or half of it
    is_table: bool  # cos and sin are (positions, width), else (batch or 1, seqlen, width)
    has_positions: bool
    interleaved: bool
    eps: float
    weight_offset: float
    device: torch.device
    promoted: torch.dtype  # of a product of x and cos
    angles_need_grad: bool
    needs_grad: bool
    recorded: bool
    transformed: bool
    op: str = "rotary"

    @property
    def elements(self) -> int | None:
        """The problem's size where backends are compared (measured.py): elements of q and k."""
        return math.prod(self.q_shape) + math.prod(self.k_shape)

    @property
    def head_dim(self) -> int:
        return self.q_shape[-1]

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        weights = (self.q_weight_dtype, self.k_weight_dtype)
        given = (self.dtype, self.cos_dtype, self.sin_dtype, *weights)
        return tuple(dtype for dtype in given if dtype is not None)

    @property
    def mixed(self) -> bool:
        """Whether q and k, cos and sin are of several dtypes."""
        return not self.dtype == self.cos_dtype == self.sin_dtype

    @property
    def plain(self) -> bool:
        """Whether autograd at most looks on, and only for q and k: no transform, no recording."""
        return not (self.transformed or self.recorded or self.angles_need_grad)

    @property
    def precision(self) -> torch.dtype:
        """The dtype of exact computation."""
        return torch.float64 if torch.float64 in self.dtypes else torch.float32

    def describe(self) -> str:
        facts = [f"q {tuple(self.q_shape)}", f"k {tuple(self.k_shape)} {dtype_name(self.dtype)}"]
        pairs = "interleaved pairs" if self.interleaved else "pairs"
        facts.append(f"{self.rotary_dim} elements in {pairs}")
        facts.append(f"cos {dtype_name(self.cos_dtype)}")
        for name, dtype in (("q", self.q_weight_dtype), ("k", self.k_weight_dtype)):
            if dtype is not None:
                facts.append(f"norm of {name} {dtype_name(dtype)}")
        if self.transformed:
            facts.append("under a torch.func transform or forward-mode AD")
        return f"{', '.join(facts)}, on {self.device}"


def describe(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
) -> RotaryProblem:
    """The problem of a call. Raises TypeError or ValueError for every error of the caller."""
    _check_heads(q, k)
    _check_angles(q, cos, sin, positions)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            _check_weight(name, weight, q)
    _check_number("eps", eps)
    _check_number("weight_offset", weight_offset)
    if eps < 0:
        raise ValueError(f"eps must not be negative; got {eps}")
    return RotaryProblem(
        q_shape=q.shape,
        k_shape=k.shape,
        dtype=q.dtype,
        cos_dtype=cos.dtype,
        sin_dtype=sin.dtype,
        q_weight_dtype=None if q_weight is None else q_weight.dtype,
        k_weight_dtype=None if k_weight is None else k_weight.dtype,
        rotary_dim=_rotary_dim(q.shape[3], cos.shape[-1], rotary_dim),
        width=cos.shape[-1],
        is_table=cos.dim() == 2,
        has_positions=positions is not None,
        interleaved=bool(interleaved),
        eps=float(eps),
        weight_offset=float(weight_offset),
        device=q.device,
        promoted=torch.promote_types(q.dtype, torch.promote_types(cos.dtype, sin.dtype)),
        angles_need_grad=modes.needs_grad(cos, sin),
        needs_grad=modes.needs_grad(q, k, cos, sin, q_weight, k_weight),
        recorded=modes.recorded(),
        transformed=modes.transformed(),
    )


def _check_heads(q: torch.Tensor, k: torch.Tensor) -> None:
    for name, x in (("q", q), ("k", k)):
        check_floating(name, x, NESTED, None if name == "q" else ("q", q))
        if x.dim() != 4:
            raise ValueError(
                f"{name} must have the shape (batch, seqlen, heads, head_dim); got {tuple(x.shape)}"
            )
    if k.dtype != q.dtype:
        raise TypeError(
            f"k must have q's dtype {dtype_name(q.dtype)}; got {dtype_name(k.dtype)}: "
            "cast one of them"
        )
    if (k.shape[0], k.shape[1], k.shape[3]) != (q.shape[0], q.shape[1], q.shape[3]):
        raise ValueError(
            "k must have the batch, seqlen and head_dim of q; got k "
            f"{tuple(k.shape)} for q {tuple(q.shape)} (batch, seqlen, heads, head_dim): "
            "give x.transpose(1, 2) where heads come before seqlen"
        )


def _check_angles(
    q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None
) -> None:
    for name, x in (("cos", cos), ("sin", sin)):
        check_floating(name, x, NESTED, ("q", q))
    batch, seqlen = q.shape[:2]
    if sin.shape != cos.shape:
        raise ValueError(f"sin must have cos's shape {tuple(cos.shape)}; got {tuple(sin.shape)}")
    if cos.dim() == 3:
        if positions is not None:
            raise ValueError(
                "positions are rows of a table (positions, width); cos and sin "
                f"{tuple(cos.shape)} already have an angle for every token: leave positions out"
            )
        if cos.shape[0] not in (1, batch) or cos.shape[1] != seqlen:
            raise ValueError(
                f"cos and sin must be ({batch} or 1, {seqlen}, width), for q's batch and seqlen; "
                f"got {tuple(cos.shape)}"
            )
        return
    if cos.dim() != 2:
        raise ValueError(
            "cos and sin must be a table (positions, width), or (batch or 1, seqlen, width); got "
            f"{tuple(cos.shape)}"
        )
    if positions is None:
        if cos.shape[0] < seqlen:
            raise ValueError(
                f"cos and sin must reach position {seqlen - 1} of q's {seqlen}; they have "
                f"{cos.shape[0]}"
            )
        return
    check_dense("positions", positions, NESTED, " or None")
    if positions.dtype not in INDEX_DTYPES:
        raise TypeError(f"positions must be int32 or int64; got {dtype_name(positions.dtype)}")
    if positions.device != q.device:
        raise ValueError(
            f"positions must be on q's device {q.device}; got {positions.device}: move it there"
        )
    if tuple(positions.shape) not in ((seqlen,), (1, seqlen), (batch, seqlen)):
        raise ValueError(
            f"positions must be ({seqlen},), (1, {seqlen}) or ({batch}, {seqlen}), for q's batch "
            f"and seqlen; got {tuple(positions.shape)}"
        )
    check_values(positions, cos.shape[0])


def check_values(positions: torch.Tensor, rows: int) -> None:
    """Raise for positions outside of the table, where looking does not wait for a GPU."""
    looks = positions.is_cpu or os.environ.get("FASTATTN_CHECK") == "1"
    if not looks or not modes.readable(positions) or positions.numel() == 0:
        return
    least, most = (int(x) for x in torch.aminmax(positions))
    if least < 0 or most >= rows:
        raise ValueError(
            f"positions must be from 0 to {rows - 1}, the rows of cos and sin; they go from "
            f"{least} to {most}"
        )


def _rotary_dim(head_dim: int, width: int, given: int | None) -> int:
    if given is not None:
        if isinstance(given, bool) or not isinstance(given, (int, torch.SymInt)):
            raise TypeError(f"rotary_dim must be an int or None; got {type(given).__name__}")
        if given % 2 or not 0 < given <= head_dim:
            raise ValueError(
                f"rotary_dim must be even, above 0 and at most head_dim {head_dim}; got {given}"
            )
        if width not in (given, given // 2):
            raise ValueError(
                f"cos and sin must be rotary_dim {given} or its half {given // 2} wide; got {width}"
            )
        return given
    if 2 * width == head_dim:
        return head_dim
    if not 0 < width <= head_dim or (2 * width > head_dim and width % 2):
        raise ValueError(
            "cos and sin must be rotary_dim or rotary_dim / 2 wide, with rotary_dim even and at "
            f"most head_dim {head_dim}; got {width}"
        )
    if 2 * width < head_dim:
        one = f"rotary_dim={width} (an angle for each element) or " if width % 2 == 0 else ""
        raise ValueError(
            f"cos and sin are {width} wide for head_dim {head_dim}: give "
            f"{one}rotary_dim={2 * width} (an angle for each pair)"
        )
    return width


def _check_weight(name: str, weight: torch.Tensor, q: torch.Tensor) -> None:
    check_floating(name, weight, NESTED, ("q", q))
    if tuple(weight.shape) != (q.shape[3],):
        raise ValueError(
            f"{name} must have the shape (head_dim,) = ({q.shape[3]},); got {tuple(weight.shape)}"
        )


def _check_number(name: str, number: float) -> None:
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{name} must be a float; got {type(number).__name__}")
    if not -math.inf < number < math.inf:  # torch.compile traces no math.isfinite
        raise ValueError(f"{name} must be finite; got {number}")
