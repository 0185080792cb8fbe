"""Host time of the launchers of attention, without a GPU.

Each launcher runs as on a GPU, but for the driver's launch, which does nothing (stub_driver.py). It
is timed with the compiled kernels that its plan keeps, and interleaved with the same launches
handed to Triton's own binder. Targets: 20 us for a forward, 45 us for a forward and its backward.
Of a Gluon kernel's TMA descriptors, all but the driver's own encoding (cuTensorMapEncodeTiled) is
in the time.

    python benchmarks/launches.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import checkout  # noqa: F401
import stub_driver
import torch

from fastattn.ops.common import launch
from fastattn.timing import Candidate, interleave, ratio

TARGETS = {"forward": 20.0, "forward + backward": 45.0}


def launchers(kernels: Any) -> dict[str, Callable[[], object]]:
    """Causal self-attention on tensors so small that allocating them costs what it must."""
    from fastattn.ops.attention.call import NO_GRADIENT, NONE, Settings

    q, k, v = torch.randn(3, 1, 128, 2, 64, dtype=torch.bfloat16)
    settings = Settings(-1, 0, False, 0.125, 0.0, 0.0, "ieee", 0, 0, 0, 0)

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        return kernels.forward(q, k, v, NONE, settings)

    def both() -> None:
        out, lse = forward()
        kernels.backward(out, None, out, lse, NO_GRADIENT, q, k, v, NONE, settings)

    return {"forward": forward, "forward + backward": both}


@contextmanager
def through_triton() -> Iterator[None]:
    """Inside, no kept kernel is launched: recording wants to see every launch."""
    with launch.recorded():
        yield


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=41, help="values to take of each")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    missed = False
    print(f"{'launcher':28}{'us':>8}{'target':>8}{'through Triton':>16}{'ratio':>8}")
    stub_driver.install()
    from fastattn.ops.attention import gluon, triton

    calls = [(kernels, *item) for kernels in (triton, gluon) for item in launchers(kernels).items()]
    with torch.no_grad():
        for kernels, name, call in calls:
            candidates = [Candidate("kept", call), Candidate("bound", call, through_triton)]
            samples = interleave(candidates, rounds=rounds)
            kept, bound = (1e6 * samples[n].median for n in ("kept", "bound"))
            times = ratio(samples["bound"], samples["kept"]).median
            missed |= kept > TARGETS[name]
            title = f"{kernels.__name__.rsplit('.', 1)[-1]} {name}"
            print(f"{title:28}{kept:8.1f}{TARGETS[name]:8g}{bound:16.1f}{times:8.2f}")
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
