"""What the device can do at best: a large copy and a large matrix product, on random data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from timing import Candidate, interleave


@dataclass(frozen=True, kw_only=True)
class CeilingCell:
    """A copy of `size` elements, or a product of two square matrices of `size` rows."""

    device: str
    op: str
    size: int
    dtype: str
    limit = 60.0

    @property
    def title(self) -> str:
        return f"{self.op} size={self.size} {self.dtype}"

    def measure(self, seconds: float = 2.0) -> dict[str, object]:
        options = {"device": self.device, "dtype": getattr(torch, self.dtype)}
        if self.op == "copy":
            source = torch.randn(self.size, **options)
            target = torch.empty_like(source)
            call = Candidate(self.op, lambda: target.copy_(source))
            unit, work = "gbps", 2.0 * source.nbytes / 1e9  # read and written
        else:
            a, b = (torch.randn(self.size, self.size, **options) for _ in range(2))
            call = Candidate(self.op, lambda: a @ b)
            unit, work = "tflops", 2.0 * self.size**3 / 1e12
        sample = interleave([call], device=self.device, rounds=15, seconds=seconds)[self.op]
        row = {
            "title": self.title,
            "op": self.op,
            "dtype": self.dtype,
            "size": self.size,
            "right": True,
        }
        return row | sample.as_dict() | {unit: work / sample.median}


def cells(device: str) -> Iterator[CeilingCell]:
    copied, rows = (1 << 30, 8192) if device == "cuda" else (1 << 22, 512)
    dtype = "bfloat16" if device == "cuda" else "float32"
    yield CeilingCell(device=device, op="copy", size=copied, dtype=dtype)
    yield CeilingCell(device=device, op="matmul", size=rows, dtype=dtype)
