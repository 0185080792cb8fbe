"""Compile the kernels for GPUs that are not there, and read the machine code.

Run as a program, in a process of its own (whether Triton interprets or compiles is settled when a
kernel is decorated):

    python tests/compile/offline.py attention 90 > report.json

Every launcher of the op is called with `meta` tensors over a grid of configurations; instead of
launching, the door `fastattn.ops.common.launch.launch` records the kernel and its arguments, which
are then compiled for the architecture as the launch would have compiled them. The report is a list
of records: kernel, configuration, registers, spilled bytes, shared memory, tensor-core instructions.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Tensor-core instructions: mma.sync, wgmma, tcgen05.
TENSOR_CORE = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b")
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def tool(name: str) -> str:
    """One of the CUDA tools that the triton wheel carries."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(path)


def signature_of(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> dict[str, Any]:
    """What tells one compiled kernel from another: types, constants, options."""
    signature = dict(constants)
    for name, value in zip(kernel.arg_names, args):
        signature[name] = str(value.dtype) if isinstance(value, torch.Tensor) else type(value)
    return signature


def source_of(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> ASTSource:
    """What a launch with these arguments would compile: types, constants, divisibility by 16."""
    signature: dict[str, str] = {}
    constexprs: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    values = dict(zip(kernel.arg_names, args)) | constants
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or (specialised and isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constexprs[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialised and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs, attributes)


def measure(architecture: int, source: ASTSource, options: dict[str, int]) -> dict[str, Any]:
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _run(tool("cuobjdump"), "--dump-resource-usage", cubin.name)
        sass = _run(tool("cuobjdump"), "--dump-sass", cubin.name)
    registers, local = re.search(r"REG:(\d+) STACK:\d+ SHARED:\d+ LOCAL:(\d+)", usage).groups()
    stack = re.search(r"STACK:(\d+)", usage).group(1)
    return {
        "registers": int(registers),
        "spills": max(int(local), int(stack)),
        "shared": compiled.metadata.shared,
        "tensor_core": len(TENSOR_CORE.findall(sass)),
        "wide_loads": len(re.findall(r"\bLDG\.E\.(?:\w+\.)*128", sass)),
    }


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


Launch = tuple[Any, tuple[Any, ...], dict[str, Any], dict[str, Any]]


def record(
    architecture: int, configurations: Iterator[tuple[dict[str, Any], Callable[[], Any]]]
) -> list[Launch]:
    """(kernel, args, constants, configuration) of every different launch that the calls make."""
    from fastattn.ops.common import launch

    launches: dict[tuple[Any, ...], Launch] = {}
    launch.architecture = lambda device: architecture
    launch.multiprocessors = lambda device: 132
    for configuration, call in configurations:

        def keep(
            kernel: Any, grid: Any, *args: Any, _c: Any = configuration, **constants: Any
        ) -> None:
            same = kernel.__name__, *signature_of(kernel, args, constants).items()
            launches.setdefault(same, (kernel, args, constants, _c))

        launch.launch = keep
        call()
    return list(launches.values())


def _measured(job: tuple[str, int, int]) -> dict[str, Any]:
    op, architecture, index = job
    kernel, args, constants, configuration = record(architecture, GRIDS[op]())[index]
    names = ("num_warps", "num_stages", "maxnreg")
    options = {k: constants.pop(k) for k in names if k in constants}
    result = measure(architecture, source_of(kernel, args, constants), options)
    return {"kernel": kernel.__name__, **configuration, "architecture": architecture, **result}


def main(op: str, architecture: int) -> None:
    assert os.environ.get("TRITON_INTERPRET", "0") != "1", "the interpreter cannot compile"
    count = len(record(architecture, GRIDS[op]()))
    jobs = [(op, architecture, index) for index in range(count)]
    workers = int(os.environ.get("FASTATTN_COMPILE_WORKERS", os.cpu_count() or 1))
    with ProcessPoolExecutor(workers) as pool:
        json.dump(list(pool.map(_measured, jobs)), sys.stdout, indent=1)


# --- grids: op -> (configuration, call that launches it) ------------------------------------------


def attention() -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    """Every row of the tile tables, with every switch on at least once."""
    from fastattn.ops.attention import triton as kernels

    rows: list[tuple[torch.dtype, int, bool, bool, bool]] = [
        (torch.bfloat16, 64, True, False, False),
        (torch.float16, 64, False, True, True),
        (torch.bfloat16, 128, True, False, False),
        (torch.bfloat16, 128, True, True, True),
        (torch.float16, 256, True, False, False),
        (torch.bfloat16, 256, False, True, False),
        (torch.float32, 80, True, True, True),
        (torch.float32, 256, True, False, False),
    ]
    for dtype, head_dim, causal, has_mask, has_lengths in rows:
        q = torch.empty(2, 1024, 8, head_dim, dtype=dtype, device="meta")
        k = torch.empty(2, 1024, 4, head_dim, dtype=dtype, device="meta")
        mask = torch.empty(2, 1, 1024, 1024, dtype=torch.bool, device="meta") if has_mask else None
        lengths = torch.empty(2, dtype=torch.int32, device="meta") if has_lengths else None

        def call(q=q, k=k, mask=mask, lengths=lengths, causal=causal) -> None:  # type: ignore[no-untyped-def]
            out, lse = kernels.forward(q, k, k, mask, lengths, causal, 0.1)
            kernels.backward(out, lse, q, k, k, mask, lengths, out, lse, causal, 0.1)
            one = None if mask is None else mask[:, :, :1]
            kernels.forward(q[:, :1], k, k, one, lengths, causal, 0.1)

        yield (
            {
                "dtype": str(dtype).removeprefix("torch."),
                "head_dim": head_dim,
                "causal": causal,
                "mask": has_mask,
                "key_lengths": has_lengths,
            },
            call,
        )


def ffn() -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    """Both layouts and all activations, on tiles for many, some, and few tokens."""
    from fastattn.ops.ffn import triton as kernels

    rows = [
        (torch.bfloat16, 16384, "linear", "gelu_tanh", False),
        (torch.float16, 16384, "conv1d", "gelu", True),
        (torch.bfloat16, 512, "conv1d", "silu", False),
        (torch.float16, 4, "linear", "relu", False),
        (torch.float32, 16384, "linear", "gelu_tanh", False),
        (torch.float32, 4, "conv1d", "gelu", True),
    ]
    for dtype, tokens, layout, activation, recompute in rows:
        x = torch.empty(tokens, 1024, dtype=dtype, device="meta")
        w1 = torch.empty(4096, 1024, dtype=dtype, device="meta")
        w2 = torch.empty(1024, 4096, dtype=dtype, device="meta")
        if layout == "conv1d":
            w1, w2 = w2, w1
        bias = torch.empty(4096, dtype=dtype, device="meta")

        def call(
            x=x, w1=w1, w2=w2, b=bias, layout=layout, act=activation, save=not recompute
        ) -> None:  # type: ignore[no-untyped-def]
            out, pre = kernels.forward(x, w1, b, w2, b[:1024], act, layout, save)
            saved = pre if save else None
            kernels.backward(out, x, w1, b, w2, b[:1024], saved, (True,) * 5, act, layout)

        yield (
            {
                "dtype": str(dtype).removeprefix("torch."),
                "tokens": tokens,
                "layout": layout,
                "activation": activation,
                "recompute": recompute,
            },
            call,
        )


def layer_norm() -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    """Every row of the tile tables, with all there is to load: the most registers."""
    from fastattn.ops.layer_norm import triton as kernels

    rows = [
        (torch.bfloat16, 64, True),
        (torch.bfloat16, 768, True),
        (torch.float32, 2048, True),
        (torch.bfloat16, 4096, False),
        (torch.float32, 8192, True),
        (torch.bfloat16, 16384, True),
        (torch.float32, 65536, True),
        (torch.float16, 50257, False),
    ]
    for dtype, hidden, center in rows:
        x = torch.empty(4096, hidden, dtype=dtype, device="meta")
        weight = torch.empty(hidden, dtype=dtype, device="meta")
        bias = weight if center else None

        def call(x=x, weight=weight, bias=bias, center=center) -> None:  # type: ignore[no-untyped-def]
            out, stream, statistics = kernels.forward(x, x, weight, bias, 1e-5, center, x.dtype)
            kernels.backward(
                out, stream, stream, weight, statistics, center, x.dtype, x.dtype,
                None if bias is None else bias.dtype, True,
            )  # fmt: skip

        yield (
            {"dtype": str(dtype).removeprefix("torch."), "hidden": hidden, "center": center},
            call,
        )


GRIDS = {"attention": attention, "ffn": ffn, "layer_norm": layer_norm}

if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
