"""Run the conformance programs, one per primitive of csrc/device, and compare their digests.

    python tests/conformance/conformance.py                  # the emulator against digests.json
    python tests/conformance/conformance.py --device cuda    # a GPU against digests.json; takes nvcc
    python tests/conformance/conformance.py --write          # accept the emulator's

The emulator and a GPU have to print the same: where they differ, the emulator's model of that
primitive is wrong, and so is every proof that rests on it. A digest is the SHA-256 of a program's
output; functions that are only approximate are held to the error that csrc/device/math.cuh promises,
and their digest is that of the verdicts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from emulator import library  # noqa: E402

import setup as build  # noqa: E402

SOURCE = "tests/conformance/programs.cu"  # from ROOT
DIGESTS = ROOT / "tests" / "conformance" / "digests.json"

Array = np.ndarray


def bits(x: Array) -> Array:
    """float32 as the int32 with the same bits."""
    return x.astype(np.float32).view(np.int32)


def anything(count: int) -> Callable[[np.random.Generator], Array]:
    return lambda g: g.integers(-(2**31), 2**31, count, dtype=np.int64).astype(np.int32)


def whole(count: int, below: int) -> Callable[[np.random.Generator], Array]:
    return lambda g: g.integers(0, below, count).astype(np.int32)


def whole_floats(count: int, most: int) -> Callable[[np.random.Generator], Array]:
    return lambda g: bits(g.integers(-most, most + 1, count))


def every_kind_of_float(count: int) -> Callable[[np.random.Generator], Array]:
    """Of every exponent, ties and infinities among them; no NaN, whose bits are nobody's promise."""

    def draw(g: np.random.Generator) -> Array:
        x = g.integers(0, 2**32, count, dtype=np.int64).astype(np.uint32)
        halves = g.integers(0, 2**16, count, dtype=np.int64).astype(np.uint16).view(np.float16)
        near = halves.astype(np.float32)  # representable, and ties between two of them
        with np.errstate(invalid="ignore"):
            ties = near + np.spacing(halves).astype(np.float32) / 2
        kind = np.arange(count) % 4
        floats = np.select([kind == 0, kind == 1], [near, ties], x.view(np.float32))
        floats[::97] = np.inf
        floats[np.isnan(floats)] = -0.0
        return bits(floats)

    return draw


def mathematical(count: int) -> Callable[[np.random.Generator], Array]:
    def draw(g: np.random.Generator) -> Array:
        x = np.concatenate([g.normal(0, 1, count // 2), g.uniform(-30, 30, count - count // 2)])
        return bits(x)

    return draw


@dataclass(frozen=True)
class Program:
    """`outputs` int32 numbers from the input that `draw` makes; their order is programs.cu's."""

    outputs: int
    draw: Callable[[np.random.Generator], Array]


ROUNDED = 64 * 64 * 4
POINTS = 64 * 64
PROGRAMS = {
    "indices": Program(12 * 64, whole(1, 2)),
    "vectors": Program(128 * (1 + 2 + 4 + 4), anything(128 * 11)),
    "scalars": Program(128, anything(128)),
    "shuffles": Program(64 * (5 + 7 + 2), anything(64)),
    "reductions": Program(128 * 5, whole_floats(128, 1000)),
    "barriers": Program(6 * 2 * 32, anything(6 * 32)),
    "warp_memory": Program(128, anything(128)),
    "atomics": Program(16, whole(64, 1000)),
    "async_copies": Program(1024, anything(1024)),
    "matrices": Program(256, anything(128)),
    "products of halves": Program(128, whole(256 + 128, 40)),
    "products of bfloat16s": Program(128, whole(256 + 128, 40)),
    "rounding to halves": Program(ROUNDED, every_kind_of_float(ROUNDED)),
    "rounding to bfloat16s": Program(ROUNDED, every_kind_of_float(ROUNDED)),
    "random_words": Program(256, anything(3)),
    "math": Program(10 * POINTS, mathematical(POINTS)),
    "running_softmax": Program(7 * 32, whole(128, 1000)),
}

# The largest error of a function, relative, or absolute where it says so: what kernels rely on.
ERRORS = {
    "exp2_fast": (lambda x: np.exp2(x), 2.0**-21, 0.0),
    "log2_fast": (lambda x: np.log2(np.abs(x)), 2.0**-21, 2.0**-21),
    "rsqrt": (lambda x: 1 / np.sqrt(np.abs(x)), 2.0**-22, 0.0),
    "erf": (lambda x: np.vectorize(math.erf)(x), 2.0**-21, 0.0),
    "tanh": (lambda x: np.tanh(x), 2.0**-21, 0.0),
    "exp": (lambda x: np.exp(x), 2.0**-21, 0.0),
    "max": (lambda x: np.maximum(x, 0.5), 0.0, 0.0),
    "min": (lambda x: np.minimum(x, 0.5), 0.0, 0.0),
    "fma": (lambda x: x * x - x, 2.0**-23, 1e-12),
    "reciprocal_fast": (lambda x: 1 / x, 2.0**-22, 0.0),
}


def verdicts(x: Array, out: Array) -> dict[str, bool]:
    """Whether each function of the program `math` is as near as it has to be."""
    x = x.view(np.float32).astype(np.float64)
    results = out.view(np.float32).reshape(len(ERRORS), -1).astype(np.float64)
    found = {}
    for (name, (function, relative, absolute)), ours in zip(ERRORS.items(), results):
        expected = function(x)
        error = np.abs(ours - expected)
        found[name] = bool((error <= relative * np.abs(expected) + absolute).all())
    return found


def run(device: str) -> dict[str, str]:
    """The digest of every program; the library with them is loaded."""
    found = {}
    for number, (name, program) in enumerate(PROGRAMS.items()):
        given = program.draw(np.random.default_rng(number))
        out = torch.empty(program.outputs, dtype=torch.int32, device=device)
        torch.ops.fastattn_conformance.run(out, torch.from_numpy(given).to(device), number)
        result = out.cpu().numpy()
        if name == "math":
            wrong = [function for function, right in verdicts(given, result).items() if not right]
            found[name] = f"inexact: {', '.join(wrong)}" if wrong else "within the errors"
        else:
            found[name] = hashlib.sha256(result.tobytes()).hexdigest()[:16]
    return found


def build_for_gpu() -> Path:
    """The programs, compiled by nvcc for the GPU that is there. Processes that ask at once build once."""
    nvcc, (torch_folder, _) = build.find_nvcc(), build.find_torch()
    if nvcc is None:
        raise RuntimeError("nvcc was not found (looked in CUDA_HOME, PATH and /usr/local/cuda)")
    major, minor = torch.cuda.get_device_capability()
    compiler = build.compile_command(f"{major}{minor}", nvcc, torch_folder)
    linker = build.link_command(nvcc, torch_folder)
    folder, name = ROOT / "build" / "conformance-cuda", "conformance.so"
    with library.locked(folder):
        build.builder.build(
            compiler, [SOURCE], ROOT, folder, linker=linker, library=name, say=build.say
        )
    return folder / name


def load(device: str) -> None:
    """Build the programs for a device and load them: `torch.ops.fastattn_conformance`."""
    path = build_for_gpu() if device == "cuda" else library.build_programs([SOURCE], "conformance")
    torch.ops.load_library(path)


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    return [
        f"{name}: {expected.get(name)} expected, {found.get(name)} found"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--write", action="store_true", help="write digests.json")
    args = parser.parse_args()
    load(args.device)
    found = run(args.device)
    for name, digest in found.items():
        print(f"{name:24} {digest}")
    if args.write:
        DIGESTS.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    lines = differences(json.loads(DIGESTS.read_text()), found)
    where = torch.cuda.get_device_name() if args.device == "cuda" else "the emulator"
    print("\n".join(lines) or f"{where} agrees with digests.json")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
