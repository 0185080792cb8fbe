"""linear_cross_entropy with gradients over its three matrix products alone, by the model.

    python tests/compile/products.py            # prints the table of docs/losses.md

A product takes its operations at the tensor cores' peak. All else is traffic, which the products
do not hide: bytes over the memory's rate, in bfloat16,

    3 * 2 N V           cross_entropy's kernels: the logits read, read again and their gradient written
    10 N D              dx: zeroed, copied to its place, multiplied by the gradient from above
    4 V D               dweight, multiplied likewise
    (10 c + 2) V D      with c > 1 chunks: the first product made float32, each further one added,
                        and the sum rounded

of N rows, D features, V classes. What a product itself reads and writes is not counted.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fastattn.ops.linear_cross_entropy import tiles

MARKERS = ("<!-- products -->", "<!-- /products -->")


class Rates(NamedTuple):
    """By NVIDIA's data sheets, of SXM modules."""

    flops: float  # dense bfloat16, a second
    bytes: float  # of the memory, a second


CHIPS = {
    "A100": Rates(312e12, 2.04e12),
    "H100": Rates(989e12, 3.35e12),
    "H200": Rates(989e12, 4.8e12),
}
# (rows, features, classes)
SIZES = (
    (8192, 4096, 131072),
    (8192, 2048, 131072),
    (32768, 4096, 131072),
    (8192, 768, 50257),
)


def chunks(rows: int, features: int, classes: int) -> int:
    return -(-rows // tiles.rows_at_once(rows, classes, features, 2))


def traffic(rows: int, features: int, classes: int) -> float:
    """Bytes beside those of the products."""
    c = chunks(rows, features, classes)
    weight = classes * features * (4 + (10 * c + 2) * (c > 1))
    return 6.0 * rows * classes + 10.0 * rows * features + weight


def over_products(chip: Rates, rows: int, features: int, classes: int) -> float:
    """The time of all over that of the products."""
    products = 6.0 * rows * features * classes / chip.flops
    return 1.0 + traffic(rows, features, classes) / chip.bytes / products


def table() -> str:
    names = " | ".join(CHIPS)
    lines = [
        f"| tokens | hidden | classes | chunks | {names} |",
        "| ---: " * (4 + len(CHIPS)) + "|",
    ]
    for rows, features, classes in SIZES:
        size = rows, features, classes
        shares = (f"{over_products(chip, *size):.2f}" for chip in CHIPS.values())
        lines.append(f"| {' | '.join(map(str, (*size, chunks(*size))))} | {' | '.join(shares)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
