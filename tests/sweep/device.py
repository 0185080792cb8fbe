"""What the sweep runs on: this GPU at full size and in every dtype, or a CPU at little cost."""

from __future__ import annotations

import torch

from fastattn.ops.common import launch

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPES = ["bfloat16", "float16", "float32"] if GPU else ["float16"]
HALVES = [dtype for dtype in DTYPES if dtype != "float32"]
ARCHITECTURE = launch.architecture(DEVICE)
