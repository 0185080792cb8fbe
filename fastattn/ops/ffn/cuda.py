"""The `cuda` backend of ffn: the kernels of csrc/ffn, and cuBLASLt with epilogues of its own.

    forward     pre = x w1 + b1, hidden = activation(pre)                 one product
                out = hidden w2 + b2                                      one product
    backward    dpre = (dout w2^T) activation'(pre), hidden again,        one product
                and column sums of dpre over every 32 tokens
                db1 = the sums of those, db2 = column sums of dout
                dw2 = hidden^T dout, dw1 = x^T dpre, dx = dpre w1^T       one product each

Each product is done by cuBLASLt where there is one that has the epilogue and an algorithm, unless
fastattn/measured.py says that our kernel is faster, else by our kernel. cuBLASLt's epilogues know
gelu_tanh, ReLU and a bias; in the backward only gelu_tanh, and then the hidden layer is formed by
ATen.

float16 and bfloat16, sums in float32; any sizes and strides, but rows that are not aligned to 16
bytes are read by the element. No atomics in our kernels: a row's bits depend only on that row.
cuBLASLt gives the same bits for the same call, not for another number of rows. ReLU's derivative
needs but its result, which is therefore kept in the place of `pre`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F

from fastattn import measured
from fastattn.ops.common import launch
from fastattn.ops.common.matrices import as_rows, columns, gradient_like
from fastattn.ops.ffn.problem import FFNProblem

# As csrc/ffn/activation.cuh numbers them.
ACTIVATIONS = {"none": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3, "silu": 4}

# The kernels count rows and columns in 32 bits, up to a tile, or a block of the column sums, beyond
# the last.
MAX_SIZE = 2**31 - 257

WORKSPACE = 32 * 2**20  # bytes for cuBLASLt, what NVIDIA recommends on sm_90

# Where its products can be computed; a test adds the CPU, for a library of its own.
CUBLASLT_DEVICES = {"cuda"}

# Rows of a tile (csrc/ffn/product.cuh), and those of the backward's first sums.
LARGE_TILE, SMALL_TILE = 128, 64
ROWS_OF_A_SUM = 32
# Rows that one block of the column sums adds up, and up to which one block does the rest.
ROWS_OF_A_PART, ROWS_OF_THE_LAST = 256, 1024

# The op of a row of measured.py, before what follows the product: "activation", "derivative", or
# "nothing", the last one with or without a bias. Its size is the multiplications of the product.
PRODUCT = "ffn's product, then "


def unsupported(problem: FFNProblem) -> str | None:
    if problem.transformed:
        return "torch.func transforms and forward-mode AD need a differentiable backend"
    if problem.gated:
        return "the CUDA kernels have no gate"
    if problem.dtype not in (torch.float16, torch.bfloat16):
        dtype = str(problem.dtype).removeprefix("torch.")
        return f"the mma.sync kernels compute float16 and bfloat16, not {dtype}"
    if not torch.compiler.is_compiling():  # no guard for a size that nobody has
        tokens = math.prod(problem.x_shape[:-1])
        largest = max(tokens, problem.in_features, problem.hidden, problem.out_features)
        if largest > MAX_SIZE:
            return f"a size of {largest} is above {MAX_SIZE}"
    return None


# --- forward and backward -------------------------------------------------------------------------


def forward(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    gate: None,
    gate_bias: None,
    activation: str,
    layout: str,
    save_pre: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (..., out_features), and pre (tokens, hidden) if `save_pre`, else without elements."""
    rows, w1, w2 = as_rows(x), columns(w1, layout), columns(w2, layout)
    shape = rows.shape[0], w1.shape[1]
    activated = rows.new_empty(shape)
    pre = rows.new_empty(shape) if save_pre and activation != "relu" else None
    _product(activated, rows, w1, b1, activation, pre)
    out = rows.new_empty((shape[0], w2.shape[1]))
    _product(out, activated, w2, b2)
    if pre is None:
        pre = activated if save_pre else rows.new_empty(0)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[1]), pre


def backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    gate: None,
    gate_bias: None,
    pre: torch.Tensor | None,
    needs: tuple[bool, ...],
    activation: str,
    layout: str,
) -> tuple[torch.Tensor, ...]:
    """dx, dw1, db1, dw2, db2, and the gate's two; those that `needs` leaves out have no elements.

    `pre` is None if the forward did not save it.
    """
    need_dx, need_dw1, need_db1, need_dw2, need_db2, *_ = needs
    dx, dw1, db1, dw2, db2, dgate, dgate_bias = (x.new_empty(0) for _ in needs)
    drows = as_rows(dout)
    if need_db2:
        db2 = _column_sums(drows, x.dtype)
    if need_dx or need_dw1 or need_db1 or need_dw2:
        rows = as_rows(x)
        into, back = columns(w1, layout), columns(w2, layout).t()
        if pre is None:
            pre = rows.new_empty((rows.shape[0], into.shape[1]))
            _product(pre, rows, into, b1)
        dpre, activated, db1 = _derivative(
            drows, back, pre.contiguous(), activation, need_dw2, need_db1
        )
        if need_dx:
            dx = x.new_empty(rows.shape)
            _product(dx, dpre, into.t())
            dx = dx.view(x.shape)
        if need_dw1:
            dw1 = _weight_gradient(w1, layout, rows, dpre)
        if need_dw2:
            dw2 = _weight_gradient(w2, layout, activated, drows)
    return dx, dw1, db1, dw2, db2, dgate, dgate_bias


# --- products -------------------------------------------------------------------------------------


def _product(
    out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    pre: torch.Tensor | None = None,
) -> None:
    """out = activation(a b + bias), and pre = a b + bias: (m, k) by (k, n)."""
    kind = "nothing" if activation == "none" else "activation"
    known = activation in ("none", "gelu_tanh", "relu")
    packed = bias is None or bias.stride(0) == 1
    number = ACTIVATIONS[activation]
    done = False
    if known and packed and _by_cublaslt(kind, out, a, b):
        done = _ops().ffn_cublaslt_product(out, pre, _workspace(out), a, b, bias, number)
    if not done:
        _ops().ffn_product(out, pre, a, b, bias, number, _tile_rows(out))


def _derivative(
    drows: torch.Tensor,
    w2: torch.Tensor,
    pre: torch.Tensor,
    activation: str,
    need_activated: bool,
    need_sums: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dpre, activation(pre) and db1 of w2 (out_features, hidden); those not needed are empty."""
    dpre = torch.empty_like(pre)
    nothing = pre.new_empty(0)
    if activation == "gelu_tanh" and _by_cublaslt("derivative", dpre, drows, w2):
        db1 = pre.new_empty(pre.shape[1]) if need_sums else None
        if _ops().ffn_cublaslt_product_derivative(dpre, db1, _workspace(dpre), drows, w2, pre):
            activated = F.gelu(pre, approximate="tanh") if need_activated else nothing
            return dpre, activated, nothing if db1 is None else db1
    hidden = torch.empty_like(pre) if need_activated else None
    parts = (-(-pre.shape[0] // ROWS_OF_A_SUM), pre.shape[1])
    sums = pre.new_empty(parts, dtype=torch.float32) if need_sums else None
    _ops().ffn_product_derivative(
        dpre, hidden, sums, drows, w2, pre, ACTIVATIONS[activation], _tile_rows(dpre)
    )
    db1 = nothing if sums is None else _column_sums(sums, pre.dtype)
    return dpre, nothing if hidden is None else hidden, db1


def _weight_gradient(
    weight: torch.Tensor, layout: str, left: torch.Tensor, right: torch.Tensor
) -> torch.Tensor:
    """left^T right, (in, out), as the gradient of `weight`, written as it lies in memory."""
    gradient = gradient_like(weight)
    there = columns(gradient, layout)
    if there.is_contiguous():
        _product(there, left.t(), right)
    else:
        _product(there.t(), right.t(), left)
    return gradient


def _column_sums(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sums of the columns, in an order that depends only on the number of rows."""
    rows, width = matrix.shape
    if matrix.dtype != torch.float32 or rows > ROWS_OF_THE_LAST:
        parts = matrix.new_empty((-(-rows // ROWS_OF_A_PART), width), dtype=torch.float32)
        _ops().ffn_column_sums(parts, matrix, ROWS_OF_A_PART)
        matrix = parts
    sums = matrix.new_empty(width, dtype=dtype)
    _ops().ffn_column_sums(sums, matrix, max(matrix.shape[0], 1))
    return sums


# --- who does a product ---------------------------------------------------------------------------


def _ops() -> Any:
    return torch.ops.fastattn_cuda


@functools.cache
def cublaslt_version() -> int:
    """The version of the cuBLASLt of this process, e.g. 130000; 0 if there is none."""
    version: int = _ops().ffn_cublaslt_version()
    return version


def _by_cublaslt(kind: str, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether cuBLASLt can and should do out = a b, as far as `kind` of epilogue goes."""
    if out.device.type not in CUBLASLT_DEVICES or cublaslt_version() == 0:
        return False
    if not all(map(_aligned, (out, a, b))):
        return False
    found = measured.find(PRODUCT + kind, "cuda", out.dtype, None, out.device)
    return found is None or measured.slower(*found, out.numel() * a.shape[1]) is not None


def _aligned(matrix: torch.Tensor) -> bool:
    """Whether a matrix has elements, in rows or columns that are dense, and aligned to 16 bytes."""
    (height, width), (down, across) = matrix.shape, matrix.stride()
    if across != 1:
        height, width, down, across = width, height, across, down
    return (
        across == 1
        and height > 0
        and width > 0
        and (height == 1 or (down >= width and down % 8 == 0))
        and width % 8 == 0
        and matrix.data_ptr() % 16 == 0
    )


def _workspace(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(WORKSPACE, dtype=torch.uint8, device=like.device)


def _tile_rows(out: torch.Tensor) -> int:
    """The large tile where it keeps every multiprocessor busy."""
    tiles = -(-out.shape[0] // LARGE_TILE) * -(-out.shape[1] // LARGE_TILE)
    few = out.shape[0] <= SMALL_TILE or tiles < launch.multiprocessors(out.device)
    return SMALL_TILE if few else LARGE_TILE
