"""Values in registers: tiles and run-time scalars, with Triton's promotion and Gluon's layout rule.

A tile is one NumPy array, whatever its layout; 16-bit floats are float32 arrays that are rounded
after every operation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.experimental.gluon.language as gl
from triton.experimental.gluon.language import _layouts as layouts

from . import clusters, running
from .errors import check, fail

F32 = np.float32
AUTO = (layouts.AutoLayout, type(None))
RANK = ["int1", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "fp16", "bf16", "fp32", "fp64"]  # fmt: skip
SCALARS = (int, float, np.integer, np.floating)


def is_float(dtype: Any) -> bool:
    return bool(dtype.is_floating())


def size(dtype: Any) -> int:
    """Bytes of an element."""
    return int(dtype.primitive_bitwidth) // 8


def rounded(x: Any, dtype: Any) -> np.ndarray:
    """An array as the type holds it: floats as float32 (fp64: float64), integers as int64."""
    name = dtype.name
    if name == "bf16":
        x = np.asarray(x, F32)
        word = x.view(np.uint32)
        near = (word + 0x7FFF + ((word >> 16) & 1)) & np.uint32(0xFFFF0000)
        return np.where(np.isnan(x), x, near.view(F32))
    if name == "fp16":
        with np.errstate(over="ignore"):
            return np.asarray(x, F32).astype(np.float16).astype(F32)
    if name in ("fp32", "fp64"):
        return np.asarray(x, F32 if name == "fp32" else np.float64)
    if name == "int1":
        return np.asarray(x, bool)
    if is_float(dtype):
        raise NotImplementedError(f"the emulator has no {name}")
    x = np.asarray(x).astype(np.int64)
    if name == "int32" and x.size:
        check(x.min() >= -(2**31) and x.max() < 2**31, "overflow", "int32 overflow")
    return x & 0xFFFFFFFF if name == "uint32" else x


def layout_name(layout: Any) -> str:
    if isinstance(layout, layouts.SliceLayout):
        return f"Slice({layout.dim}, {layout_name(layout.parent)})"
    return type(layout).__name__


def _warps(layout: Any) -> int | None:
    while isinstance(layout, (layouts.SliceLayout, layouts.DotOperandLayout)):
        layout = layout.parent
    warps = getattr(layout, "warps_per_cta", None)
    return None if warps is None else math.prod(warps)


class Tensor:
    """A tile in registers, or a run-time scalar (no dimensions).

    `product` is the wgmma of which this is the result; it cannot be used before the wait that
    retires it.
    """

    __array_priority__ = 100

    def __init__(
        self,
        data: Any,
        dtype: Any,
        layout: Any = None,
        product: Any = None,
        divided: int | None = None,
    ):
        self._data, self.dtype, self.layout, self.product = data, dtype, layout, product
        # The dimension of which the programs of a cluster have parts; the layout says it, if any.
        self.divided = divided
        if not isinstance(layout, AUTO) and clusters.size() > 1:
            self.divided = clusters.divided(layout, len(self.shape))
        if layout is not None and product is None:
            warps, there = _warps(layout), running.partition().num_warps
            text = f"{layout_name(layout)} of {warps} warps in a partition of {there}"
            check(warps is None or warps == there, "layout", text)

    @property
    def data(self) -> Any:
        if self.product is None:
            return self._data
        text = "accumulator used while its wgmma may be in flight"
        check(self.product.retired, "accumulator", text)
        return self.product.result

    @property
    def shape(self) -> list[int]:
        return list(self._data.shape if self.product is None else self.product.shape)

    type = property(lambda self: self)
    element_ty = scalar = property(lambda self: self.dtype)
    numel = property(lambda self: math.prod(self.shape))

    def _with(self, other: Any, f: Callable, compare: bool = False, swap: bool = False) -> Any:
        if not isinstance(other, (Tensor, *SCALARS)):
            return NotImplemented
        dtype, x, y, layout = promoted(self, other)
        if swap:
            x, y = y, x
        with np.errstate(all="ignore"):
            result = f(x, y)
        divided = self.divided
        if divided is None and isinstance(other, Tensor):
            divided = other.divided
        if compare:
            return Tensor(np.asarray(result, bool), gl.int1, layout, divided=divided)
        return Tensor(rounded(result, dtype), dtype, layout, divided=divided)

    def _divided(self, other: Any, swap: bool = False) -> Any:
        floats = isinstance(other, float) or is_float(getattr(other, "dtype", gl.int32))
        whole = not floats and not is_float(self.dtype)
        return (self.to(gl.float32) if whole else self)._with(other, np.divide, swap=swap)

    def __truediv__(self, other: Any) -> Any:
        return self._divided(other)

    def __rtruediv__(self, other: Any) -> Any:
        return self._divided(other, swap=True)

    def __bool__(self) -> bool:
        check(self.data.ndim == 0, "type", "a tile has no truth value")
        return bool(self.data)

    def __index__(self) -> int:
        scalar = self.data.ndim == 0 and not is_float(self.dtype)
        check(scalar, "type", "not an integer scalar")
        return int(self.data)

    __int__ = __index__

    def __float__(self) -> float:
        return float(self.data)

    def __hash__(self) -> int:
        return id(self)

    def __neg__(self) -> Tensor:
        return Tensor(rounded(-self.data, self.dtype), self.dtype, self.layout)

    def __invert__(self) -> Tensor:
        return Tensor(~self.data, self.dtype, self.layout)

    def __getitem__(self, index: Any) -> Any:
        result = self
        for axis, part in enumerate(index if isinstance(index, tuple) else (index,)):
            if part is None:
                result = expand_dims(result, axis)
            else:
                check(part == slice(None), "type", "only None and : index a tile")
        return result

    def to(self, dtype: Any, fp_downcast_rounding: Any = None, bitcast: bool = False) -> Tensor:
        check(not bitcast and fp_downcast_rounding in (None, "rtne"), "type", "not emulated")
        x = self.data
        if dtype.name == "int1":
            x = x != 0
        elif is_float(self.dtype) and not is_float(dtype):
            x = np.trunc(x)
        return Tensor(rounded(x, dtype), dtype, self.layout, divided=self.divided)

    cast = to

    def permute(self, *order: Any) -> Tensor:
        order = [int(o) for o in (order[0] if len(order) == 1 else order)]
        divided = None if self.divided is None else order.index(self.divided)
        return Tensor(self.data.transpose(order), self.dtype, AUTO[0](), divided=divided)

    def reshape(self, *shape: Any) -> Tensor:
        shape = [int(n) for n in (shape[0] if len(shape) == 1 else shape)]
        if self.divided is not None:  # the first dimension, of which a part stays one
            right = self.divided == 0 and shape[0] % clusters.size() == 0
            check(right, "type", f"reshape to {shape} across a cluster is not emulated")
            shape[0] //= clusters.size()
        return Tensor(self.data.reshape(shape), self.dtype, AUTO[0](), divided=self.divided)

    def sum(self, axis: Any = None) -> Tensor:
        return reduced(self, axis, np.add)


def _truncated(a: Any, b: Any) -> Any:
    """Division of integers as the machine does it: towards zero."""
    return (np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))).astype(np.int64)


def _define_operators() -> None:
    arithmetic: dict[str, Callable] = {
        "add": np.add, "sub": np.subtract, "mul": np.multiply, "mod": np.fmod,
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
        "lshift": np.left_shift, "rshift": np.right_shift, "floordiv": _truncated,
    }  # fmt: skip
    comparisons: dict[str, Callable] = {
        "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
        "eq": np.equal, "ne": np.not_equal,
    }  # fmt: skip
    for name, f in arithmetic.items():
        setattr(Tensor, f"__{name}__", lambda a, b, f=f: a._with(b, f))
        setattr(Tensor, f"__r{name}__", lambda a, b, f=f: a._with(b, f, swap=True))
    for name, f in comparisons.items():
        setattr(Tensor, f"__{name}__", lambda a, b, f=f: a._with(b, f, compare=True))


_define_operators()


def tensor(x: Any) -> Tensor:
    """A Python number as a value of a kernel; tensors as they are."""
    if isinstance(x, Tensor):
        return x
    if isinstance(x, (bool, np.bool_)):
        return Tensor(np.asarray(x), gl.int1)
    if isinstance(x, (int, np.integer)):
        dtype = gl.int32 if -(2**31) <= x < 2**31 else gl.int64
        return Tensor(np.asarray(int(x), np.int64), dtype)
    if isinstance(x, (float, np.floating)):
        return Tensor(np.asarray(x, F32), gl.float32)
    flying = " (an accumulator still in flight)" if hasattr(x, "product") else ""
    fail("accumulator" if flying else "type", f"not a tensor: {type(x).__name__}{flying}")
    raise AssertionError


def _common(a: Any, b: Any) -> Any:
    if a.name == b.name:
        return a
    if {a.name, b.name} == {"fp16", "bf16"}:
        return gl.float32
    return max(a, b, key=lambda dtype: RANK.index(dtype.name))


def promoted(a: Any, b: Any) -> tuple[Any, np.ndarray, np.ndarray, Any]:
    """Two operands in their common type: the type, both arrays, the layout.

    A Python number, and a scalar beside a tile, only turn integers into floats.
    """
    weak_a, weak_b = isinstance(a, SCALARS), isinstance(b, SCALARS)
    a, b = tensor(a), tensor(b)
    scalar_a, scalar_b = a.shape == [], b.shape == []
    if weak_a != weak_b or scalar_a != scalar_b:
        b_yields = weak_b if weak_a != weak_b else scalar_b
        strong, weak = (a.dtype, b.dtype) if b_yields else (b.dtype, a.dtype)
        dtype = weak if is_float(weak) and not is_float(strong) else strong
    else:
        dtype = _common(a.dtype, b.dtype)
    if not scalar_a and not scalar_b:
        check(len(a.shape) == len(b.shape), "layout", lambda: f"ranks of {a.shape} and {b.shape}")
        same = isinstance(a.layout, AUTO) or isinstance(b.layout, AUTO) or a.layout == b.layout
        check(same, "layout", lambda: f"layouts differ: {_described(a)} against {_described(b)}")
    layout = b.layout if scalar_a or isinstance(a.layout, AUTO) else a.layout
    x, y = a.data, b.data
    if is_float(dtype):
        kind = np.float64 if dtype.name == "fp64" else F32
        x, y = np.asarray(x, kind), np.asarray(y, kind)
    return dtype, x, y, layout


def _described(x: Tensor) -> str:
    return f"{layout_name(x.layout)} {x.shape}"


def expanded_layout(layout: Any, shape: list[int], axis: int) -> Any:
    """The layout after a new dimension: of a slice, along the axis that it lacks, its parent's."""
    sliced = isinstance(layout, layouts.SliceLayout)
    right = shape == [] or isinstance(layout, AUTO) or (sliced and layout.dim == axis)
    check(right, "layout", lambda: f"expand_dims({axis}) of {layout_name(layout)}")
    return layout.parent if sliced else layout


def expand_dims(x: Any, axis: int) -> Any:
    if not isinstance(x, Tensor):
        return x.expand_dims(axis)
    layout = expanded_layout(x.layout, x.shape, axis)
    divided = x.divided if x.divided is None or x.divided < axis else x.divided + 1
    return Tensor(np.expand_dims(x.data, axis), x.dtype, layout, divided=divided)


def reduced(x: Tensor, axis: Any, f: Any) -> Tensor:
    """Reduce along an axis, or all, by a ufunc of NumPy, and round once."""
    axis = None if axis is None else int(axis)
    across = x.divided is not None and axis in (None, x.divided)
    check(not across, "type", "a reduction across a cluster is not emulated")
    data = f.reduce(x.data, axis=axis)
    if np.ndim(data) == 0:
        return Tensor(rounded(data, x.dtype), x.dtype)
    auto = isinstance(x.layout, AUTO)
    layout = x.layout if auto else layouts.SliceLayout(axis, x.layout)
    divided = x.divided if x.divided is None or x.divided < axis else x.divided - 1
    return Tensor(rounded(data, x.dtype), x.dtype, layout, divided=divided)
