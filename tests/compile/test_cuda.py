"""Every CUDA C++ kernel, compiled by nvcc: what it takes stands in csrc/resources.json."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from compile import cuda

pytestmark = [
    pytest.mark.long,  # nvcc takes minutes; the emulator's kernels are the same sources
    pytest.mark.skipif(
        cuda.build.find_nvcc() is None, reason="nvcc was not found: no kernel of csrc/ was compiled"
    ),
]

# Bytes that a thread of a kernel may spill, by a pattern of its name; 0 for all others. Forward and
# keys keep a few addresses on the stack: with smaller tiles they would not, and read shared memory
# more often. The decode keeps where it is among the parts, outside the loop over the keys; widening
# 256 columns beside 192 registers of q and of sums takes ten accesses in it too.
SPILLS = {
    r"^forward_kernel<ForwardTraits<\w+, 128, false>": 8,
    r"^keys_kernel<KeysTraits<\w+, 64, false,": 16,
    r"^decode_kernel<DecodeTraits<\w+, 256, (half|bfloat16)_t>": 8,
    r"^decode_kernel<DecodeTraits<\w+, 256, (int8|e4m3)_t>": 40,
}
# Kernels whose time is in matrix products.
PRODUCTS = ("forward_kernel", "keys_kernel", "queries_kernel", "decode_kernel", "product_kernel")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """One module, one worker: the objects are compiled once."""
    return cuda.report()


def test_no_kernel_spills_more_than_its_budget(found: dict[str, Any]) -> None:
    over = []
    for name, kernel in found["kernels"].items():
        allowed = max((n for p, n in SPILLS.items() if re.search(p, name)), default=0)
        if kernel["spills"] > allowed:
            over.append(f"{name} spills {kernel['spills']} bytes, {allowed} are allowed")
    assert not over, "\n".join(over)


def test_products_are_on_tensor_cores(found: dict[str, Any]) -> None:
    for kind in PRODUCTS:
        named = [kernel for name, kernel in found["kernels"].items() if name.startswith(f"{kind}<")]
        assert named and all(kernel["loop"]["tensor core"] > 0 for kernel in named), kind


def test_what_kernels_take_is_in_the_table(found: dict[str, Any]) -> None:
    table = json.loads(cuda.TABLE.read_text())
    if table["nvcc"] != found["nvcc"]:
        pytest.skip(f"the table is of nvcc {table['nvcc']}, this is {found['nvcc']}")
    lines = cuda.differences(table, found)
    fix = "if it is meant: python tests/compile/cuda.py --write"
    assert not lines, "\n".join([*lines, fix])
