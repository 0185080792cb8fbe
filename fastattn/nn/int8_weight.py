"""A weight of 8-bit integers with a scale and a least value for each group of 288 at most.

    weight[o, i] = scale[g, i] * integer[o, i] + least[g, i]       o in the group g of outputs

An integer is 0 to 255. The groups lie along the output features, so that a product of one row of x
is a weighted sum of rows of the table, sum over i of x[i] * table[g, i]: that is what an embedding
bag computes, and torch brings FBGEMM's kernel of it for 8 bits (Khudia et al. 2021,
arXiv:2101.05615). It multiplies in float32, so only the weights are rounded. With one row it reads
a quarter of the bytes: 576 -> 1536 takes 0.3 of the time of float32's product, 576 -> 49152 too
(AMD EPYC, 1 thread, torch 2.13, weights beyond the caches, 2026-11-30; groups of 240 to 288 are the
fastest there, of 768 and more take 1.3 to 2 times as long).

Everywhere else (more than a few rows, a GPU, gradients, torch.func) the product is that of the
dequantised weight: the memory is saved, the time is not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.nn.plain import COMPUTING_WEIGHTS
from fastattn.ops.common import modes

GROUP = 288
LEVELS = 255
TAIL = 8  # bytes after a group: its scale and its least value, in float32
# The kernel reads the weight for each row of x; from here on it is dequantised once for all.
MAX_ROWS = 8


class Int8Weight(Tensor):
    """The parameter of a linear layer or an embedding, rounded to 8 bits.

        linear.weight = torch.nn.Parameter(Int8Weight.rounded(linear.weight), requires_grad=False)

    It stands for a tensor of the dtype that was rounded: `F.linear` and `F.embedding` read the
    integers, every other function gets `dequantize()`. A function that would write to it raises
    RuntimeError. It has no gradient itself; the input of `F.linear` has one. `torch.compile` does
    not take it.

    Attributes:
        table: (groups, in_features, group + 8) uint8; the last 8 bytes are scale and least value.
        sizes: (out_features, in_features).
        kind: the dtype that it stands for.
    """

    table: Tensor
    sizes: tuple[int, int]
    kind: torch.dtype

    @staticmethod
    def __new__(
        cls, table: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> Int8Weight:
        rows, columns = shape
        expected = table_shape(rows, columns)
        if table.dtype != torch.uint8 or tuple(table.shape) != expected:
            raise ValueError(
                f"the table of a weight {(rows, columns)} of 8 bits must be {expected} of uint8, "
                f"got {tuple(table.shape)} of {table.dtype}"
            )
        weight: Int8Weight = Tensor._make_wrapper_subclass(
            cls, (rows, columns), dtype=dtype, device=table.device
        )
        weight.table, weight.sizes, weight.kind = table, (rows, columns), dtype
        return weight

    @classmethod
    def rounded(cls, weight: Tensor) -> Int8Weight:
        """(out_features, in_features), floating point and finite -> the nearest integers.

        Raises ValueError for another shape or dtype, and for inf and NaN, which no scale holds.
        """
        if weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
            raise ValueError(
                "a weight of 8 bits is made of a matrix of floating-point numbers, got "
                f"{tuple(weight.shape)} of {weight.dtype}"
            )
        values = weight.detach().float()
        groups, width = _groups(len(values))
        # Rows that fill the last group repeat the last one: they do not widen its range.
        missing = groups * width - len(values)
        values = torch.cat((values, values[-1:].expand(missing, -1))) if missing else values
        values = values.view(groups, width, -1).transpose(1, 2)
        least, largest = values.aminmax(dim=-1, keepdim=True)
        if not (largest - least).isfinite().all():
            raise ValueError(
                "the weight has inf, NaN or numbers too far apart for float32: 8-bit integers have "
                "no place for them"
            )
        scale = ((largest - least) / LEVELS).clamp_min(1e-38)
        integers = ((values - least) / scale).round().clamp(0, LEVELS).to(torch.uint8)
        tail = torch.cat((scale, least), -1).contiguous().view(torch.uint8)
        return cls(torch.cat((integers, tail), -1), weight.shape, weight.dtype)

    @property
    def bytes(self) -> int:
        """Of the table."""
        return self.table.numel()

    def dequantize(self) -> Tensor:
        """The weight in its dtype, as an ordinary tensor."""
        values = _values(self.table).transpose(1, 2).flatten(0, 1)
        return values[: self.sizes[0]].to(self.kind).contiguous()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Int8Weight({self.sizes}, dtype={self.kind}, device={self.table.device})"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear(*args, **kwargs)
        if func is F.embedding:
            return _embedding(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        aten = torch.ops.aten
        if func is aten.detach.default:
            return cls(args[0].table, args[0].sizes, args[0].kind)
        if func is aten.clone.default:
            return cls(args[0].table.clone(), args[0].sizes, args[0].kind)
        if func is aten._to_copy.default:
            return _moved(args[0], kwargs)
        if func._schema.is_mutable:
            raise RuntimeError(
                f"{func} would write to a weight of 8 bits: assign a new one to the module "
                "(Int8Weight.rounded), or train the model before it is quantised"
            )
        args, kwargs = torch.utils._pytree.tree_map_only(
            Int8Weight, Int8Weight.dequantize, (args, kwargs)
        )
        return func(*args, **kwargs)


def table_shape(rows: int, columns: int) -> tuple[int, int, int]:
    """Of the table of a weight (rows, columns)."""
    groups, width = _groups(rows)
    return groups, columns, width + TAIL


def _groups(rows: int) -> tuple[int, int]:
    """How many groups so many output features make, and how wide they are."""
    groups = -(-rows // GROUP)
    return groups, -(-rows // groups)


def _values(table: Tensor) -> Tensor:
    """A part of a table, (..., group + 8) -> (..., group), float32."""
    tail = table[..., -TAIL:].clone(memory_format=torch.contiguous_format)
    scale, least = tail.view(torch.float32).split(1, -1)
    return table[..., :-TAIL] * scale + least


def _linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    """F.linear; a few rows by the kernel where nothing but the result is asked for."""
    if not isinstance(weight, Int8Weight):
        with torch._C.DisableTorchFunctionSubclass():
            return F.linear(input, weight, bias)
    table, (rows, columns) = weight.table, weight.sizes
    if not (
        type(input) in (Tensor, torch.nn.Parameter)
        and input.is_cpu
        and table.is_cpu
        and input.dtype is weight.kind
        and input.dtype is not torch.float64
        and 0 < input.numel() <= MAX_ROWS * columns
        and input.shape[-1] == columns  # else F.linear says what is wrong
        and not modes.needs_grad(input, bias)
        and modes.plain()
        and not modes.recorded()
        and has_kernel()
    ):
        return F.linear(input, weight.dequantize(), bias)
    count = input.numel() // columns
    indices, offsets = _bags(len(table), columns, count)
    x = input.reshape(count, 1, columns).float()
    out: Tensor = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
        table.view(-1, table.shape[-1]),
        indices,
        offsets,
        per_sample_weights=x.expand(-1, len(table), -1).reshape(-1),
    )
    out = out.view(*input.shape[:-1], -1)[..., :rows]
    if bias is not None:
        out = out + bias
    return out.to(input.dtype).contiguous()


@functools.cache
def has_kernel() -> bool:
    """Whether this torch has FBGEMM's kernel, which is for x86 processors."""
    return "fbgemm" in torch.backends.quantized.supported_engines and hasattr(
        torch.ops.quantized, "embedding_bag_byte_rowwise_offsets"
    )


@functools.lru_cache(64)
def _bags(groups: int, columns: int, count: int) -> tuple[Tensor, Tensor]:
    """For each row of x and each group, the rows of the table that make its sum."""
    indices = torch.arange(groups * columns, dtype=torch.int32).repeat(count)
    return indices, torch.arange(count * groups, dtype=torch.int32) * columns


def _embedding(input: Tensor, weight: Any, *rest: Any, **options: Any) -> Tensor:
    """F.embedding of the rows that are asked for; options that write to the weight are refused."""
    if any(rest[1:2]) or options.get("max_norm") is not None:
        raise ValueError("max_norm would change the weight, which has 8 bits: leave it None")
    if not isinstance(weight, Int8Weight):
        raise TypeError(f"the indices of an embedding are integers, got a {type(input).__name__}")
    table, (rows, _) = weight.table, weight.sizes
    if input.numel() and not modes.recorded() and not 0 <= input.min() <= input.max() < rows:
        raise IndexError(f"index out of range: the embedding has {rows} rows")
    width = table.shape[-1] - TAIL
    groups = input.div(width, rounding_mode="floor")
    integers = table[groups, :, input.remainder(width)]  # (..., columns)
    scale, least = table[..., -TAIL:][groups].view(torch.float32).unbind(-1)
    return (integers * scale + least).to(weight.kind)


def _moved(weight: Int8Weight, options: Mapping[str, Any]) -> Int8Weight:
    """On another device, or standing for another dtype."""
    dtype = options.get("dtype") or weight.kind
    if not dtype.is_floating_point:
        raise ValueError(f"a weight of 8 bits stands for floating-point numbers, not for {dtype}")
    device = options.get("device") or weight.table.device
    return Int8Weight(weight.table.to(device, copy=True), weight.sizes, dtype)


def round_linear_layers(
    model: torch.nn.Module, rounded: Callable[[Tensor], Tensor] = Int8Weight.rounded
) -> None:
    """Give the linear layers of a model weights of 8 bits, and embeddings that share one too.

    ``rounded`` makes the new value of a weight. A weight that is not an ordinary one
    (`why_not_rounded`) stays.
    """
    new: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and why_not_rounded(module) is None:
            weight = module.weight
            if id(weight) not in new:
                new[id(weight)] = torch.nn.Parameter(rounded(weight), requires_grad=False)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = new.get(id(parameter), parameter)


def why_not_rounded(module: torch.nn.Module) -> str | None:
    """Why the weight of a linear layer stays as it is; None if it can be rounded."""
    weight = module._parameters.get("weight")
    hooks = module._forward_pre_hooks.values()
    if weight is None or any(isinstance(hook, COMPUTING_WEIGHTS) for hook in hooks):
        return "its weight is computed before each call (pruned, normed or parametrised)"
    if type(weight) not in (torch.nn.Parameter, Tensor):
        return f"its weight is a {type(weight).__name__} (quantised or sharded)"
    if weight.layout is not torch.strided or not weight.is_floating_point() or not weight.numel():
        return f"its weight is {tuple(weight.shape)} of {weight.dtype}, {weight.layout}"
    return None
