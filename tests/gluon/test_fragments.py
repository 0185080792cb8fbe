"""Where Triton puts tiles in registers and shared memory, which the emulator does not see.

Triton's print of the layouts that the kernels' sources name is compared, element by element, with
CUTLASS's atoms of the instructions, as the package `tensor-layouts` has them.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.experimental.gluon import language as gl

from fastattn import ops
from fastattn.ops.attention.gluon import tiles
from fastattn.ops.attention.gluon.backward import KEYS, QUERIES
from fastattn.ops.common import gluon as kernels

pytestmark = pytest.mark.skipif(
    not hasattr(gl.NVMMASharedLayout, "format_hardware_view"),
    reason="this Triton prints no layouts",
)

ROWS = 64  # of a consumer's product
SIZES = (64, 128, 192, 256)  # of heads


def view(layout: Any, shape: Sequence[int]) -> torch.Tensor:
    """(elements, rank): their coordinates, in the order of Triton's own print of the layout."""
    found = re.findall(r"\(([\d, ]+)\)", layout.format_hardware_view(list(shape)))
    return torch.tensor([[int(x) for x in at.split(",")] for at in found])


def registers(layout: Any, *shape: int) -> torch.Tensor:
    """(threads, registers, rank): the coordinates of the element in each register."""
    warps = view(layout, shape).reshape(4, -1, 32, len(shape))
    return warps.transpose(1, 2).flatten(0, 1)


def atom(layout: Any, threads: int, values: int, rows: int) -> torch.Tensor:
    """(threads, values, 2), the same of an atom, which numbers elements down the columns."""
    at = torch.tensor([[layout(t, v) for v in range(values)] for t in range(threads)])
    return torch.stack([at % rows, at // rows], -1)


def calls(layout: str) -> list[str]:
    """Each call in the kernels' sources that makes a layout of this class."""
    sources = (path.read_text() for path in Path(ops.__path__[0]).rglob("*.py"))
    trees = [ast.parse(text) for text in sources if layout in text]
    found = [x for tree in trees for x in ast.walk(tree) if isinstance(x, ast.Call)]
    return [ast.unparse(x) for x in found if ast.unparse(x.func) == f"gl.{layout}"]


def columns(layout: Any) -> int:
    return layout.instr_shape[1]  # type: ignore[no-any-return]


TILES = [tiles.forward(d, dv, crowded=False) for d in SIZES for dv in SIZES]
KINDS = [SimpleNamespace(BM=QUERIES, BN=x.keys, D=x.d, DV=x.dv) for x in TILES]
TERMS = sorted({n for x in KINDS for n in (x.BM, x.BN)})  # of products with A in registers
NAMES = [{"gl": gl, "kind": kind, "columns": n} for kind in KINDS for n in (64, 128)]
NAMED = {eval(x, names) for x in calls("NVMMADistributedLayout") for names in NAMES}
ACCUMULATORS = sorted((x for x in NAMED if not x.cga_layout), key=columns)
OF_CLUSTERS = sorted((x for x in NAMED if x.cga_layout), key=columns)
OPERANDS = [
    (out, eval(x, {"gl": gl, "OUT": out}))
    for x in sorted(set(calls("DotOperandLayout")))
    for out in ACCUMULATORS
]
BOXES = [  # of the copies by TMA
    *((torch.bfloat16, (1, n, 1, d)) for n in (64, 128) for d in (64, 128, 256)),
    *((torch.float32, (1, QUERIES, 1, d)) for d in (32, 64)),
    *((torch.bfloat16, box) for box in ((64, 64), (128, 64), (64, 128))),
]


def is_an_accumulator(layout: Any) -> bool:
    """Whether a product of 64 rows leaves its results there."""
    atoms = pytest.importorskip("tensor_layouts.atoms_nv")
    wgmma = atoms.make_gmma_atom_ss(columns(layout), d_type="F32", ab_type="BF16")
    there = atom(wgmma.c_layout, 128, columns(layout) // 2, ROWS)
    return torch.equal(registers(layout, ROWS, columns(layout)), there)


def is_a_left_operand(layout: Any, terms: int) -> bool:
    """Whether products of `terms`, 16 at a time, read A from there.

    The package has wgmma's A in shared memory only. From registers, each warp reads 16 rows of it as
    its own mma.m16n8k16 does (PTX ISA, register fragments of wgmma and mma).
    """
    mma = pytest.importorskip("tensor_layouts.atoms_nv").SM80_16x8x16_F32BF16BF16F32_TN
    warps = torch.tensor([[16 * warp, 0] for warp in range(4)])
    steps = torch.tensor([[0, 16 * step] for step in range(terms // 16)])
    there = atom(mma.a_layout, 32, 8, 16)
    there = warps[:, None, None, None] + there[:, None] + steps[:, None]
    return torch.equal(registers(layout, ROWS, terms), there.reshape(128, -1, 2))


def is_swizzled(layout: Any, dtype: torch.dtype, box: Sequence[int]) -> bool:
    """Whether each 128 bytes of columns follow one another, their rows swizzled as wgmma reads."""
    swizzle = pytest.importorskip("tensor_layouts").Swizzle(3, 4, 3)  # of addresses in bytes
    at = view(layout, box)
    row, byte = at[:, :-1].sum(1), at[:, -1] * dtype.itemsize
    address = byte // 128 * 128 * (len(at) // box[-1]) + row * 128 + byte % 128
    return [swizzle(x) for x in address.tolist()] == [dtype.itemsize * i for i in range(len(at))]


def test_the_kernels_have_these() -> None:
    assert [columns(x) for x in ACCUMULATORS] == [32, 64, 128, 256]
    assert len(OPERANDS) == len(ACCUMULATORS)  # one for each
    assert [columns(x) for x in OF_CLUSTERS] == [64, 128]


@pytest.mark.parametrize("layout", ACCUMULATORS, ids=columns)
def test_accumulators(layout: Any) -> None:
    assert is_an_accumulator(layout)


def has_halves(layout: Any, of_one: Any, box: Sequence[int], second: Sequence[int]) -> bool:
    """Whether both programs of a cluster have their parts as a program alone has `box`."""
    whole = [n * (1 + x) for n, x in zip(box, second)]
    first, other = view(layout, whole).chunk(2)
    there = view(of_one, box)
    step = torch.tensor([n * x for n, x in zip(box, second)])
    return torch.equal(first, there) and torch.equal(other, there + step)


def test_programs_of_a_cluster_have_64_rows_each() -> None:
    for layout in OF_CLUSTERS:
        alone = next(x for x in ACCUMULATORS if columns(x) == columns(layout))
        assert has_halves(layout, alone, (ROWS, columns(layout)), (1, 0))
        assert not has_halves(layout, alone, (ROWS, columns(layout)), (0, 1))


@pytest.mark.parametrize(
    "box, second", [((64, 64), (1, 0)), ((64, 128), (1, 0)), ((64, 64), (0, 1))]
)
def test_a_box_that_a_cluster_divides(box: tuple[int, int], second: tuple[int, int]) -> None:
    whole = [n * (1 + x) for n, x in zip(box, second)]
    x = torch.empty(whole, dtype=torch.bfloat16)
    alone = kernels.descriptor(x, box).layout
    assert has_halves(kernels.descriptor(x, whole, second=second).layout, alone, box, second)


@pytest.mark.parametrize("terms", TERMS)
def test_left_operands(terms: int) -> None:
    assert all(is_a_left_operand(operand, terms) for _, operand in OPERANDS)


@pytest.mark.parametrize("terms", TERMS)
def test_probabilities_stay_in_their_registers(terms: int) -> None:
    """As the left operand of the next product; and so do rows' factors of its results."""
    of_terms = [x for x in ACCUMULATORS if columns(x) == terms]
    for scores, (out, operand) in itertools.product(of_terms, OPERANDS):
        assert torch.equal(registers(scores, ROWS, terms), registers(operand, ROWS, terms))
        ours, theirs = (registers(gl.SliceLayout(1, x), ROWS) for x in (scores, out))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype, box", BOXES)
def test_shared_memory(dtype: torch.dtype, box: tuple[int, ...]) -> None:
    layout = kernels.descriptor(torch.empty(box, dtype=dtype), box).layout
    assert is_swizzled(layout, dtype, box)


def test_shared_memory_of_ds() -> None:
    """Which the backward's consumers store themselves."""
    layout = gl.NVMMASharedLayout.get_default_for([KEYS, QUERIES], gl.bfloat16)
    assert is_swizzled(layout, torch.bfloat16, (KEYS, QUERIES))


def test_a_wrong_layout_is_found() -> None:
    out = ACCUMULATORS[-1]
    for warps in ([2, 2], [1, 4]):
        assert not is_an_accumulator(gl.NVMMADistributedLayout([3, 0], warps, [16, 64, 16]))
    for wrong in (gl.DotOperandLayout(0, out, 1), gl.DotOperandLayout(0, out, 4)):
        assert not is_a_left_operand(wrong, 64)
        assert not torch.equal(registers(wrong, ROWS, 64), registers(ACCUMULATORS[1], ROWS, 64))
    for bytes_of_a_row in (0, 32, 64):
        wrong = gl.NVMMASharedLayout(bytes_of_a_row, 16, rank=2)
        assert not is_swizzled(wrong, torch.bfloat16, (64, 64))
