"""Compile the kernels for GPUs that are not there, and read the machine code.

Run as a program, in a process of its own (whether Triton interprets or compiles is settled when a
kernel is decorated):

    python tests/compile/offline.py attention 90 > report.json

Every launcher of the op is called with `meta` tensors over a grid of configurations; instead of
launching, the door `fastattn.ops.common.launch.launch` records the kernel and its arguments, which
are then compiled for the architecture as the launch would have compiled them. The report is a list
of records: kernel, configuration, tile, registers, spilled bytes, shared memory, tensor-core
instructions, and the instructions of the main loop by class. `report` runs the program.
"""

from __future__ import annotations

import functools
import importlib
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

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch  # noqa: E402
import triton  # noqa: E402
from compile import sass  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction  # noqa: E402
from triton.runtime.jit import compute_cache_key, create_function_from_signature  # noqa: E402

# Classes of a loop's instructions, by how the opcode begins; the rest is arithmetic and control.
CLASSES = {
    "tensor core": re.compile(r"(?:HMMA|HGMMA|UTC\w*MMA)\b"),  # mma.sync, wgmma, tcgen05
    "exponentials": re.compile(r"MUFU\b"),
    "global loads": re.compile(r"(?:LDG|LDGSTS|UTMALDG|UBLKCP)\b"),
    "shared accesses": re.compile(r"(?:LDS|LDSM|STS|STSM)\b"),
    "barriers": re.compile(r"(?:BAR|SYNCS|WARPSYNC|WARPGROUP|DEPBAR|LDGDEPBAR)\b"),
    "moves and conversions": re.compile(
        r"(?:U?MOV|IMAD\.MOV|R2UR|CS2R|U?PRMT|F2FP?|F2I|F2IP|I2F|I2FP|HADD2\.F32)\b"
    ),
    "spill accesses": re.compile(r"(?:LDL|STL)\b"),
}
# What the door `fastattn.ops.common.launch.launch` gives to every launch.
OPTIONS = {"enable_fp_fusion": True}

OFFLINE = Path(__file__)


def tool(name: str) -> str:
    """One of the CUDA tools that the triton wheel carries."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(path)


@functools.cache
def _binder(kernel: Any, architecture: int) -> tuple[Any, Any]:
    backend = make_backend(GPUTarget("cuda", architecture, 32))
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def key_of(kernel: Any, architecture: int, args: tuple[Any, ...], constants: dict[str, Any]) -> str:
    """What Triton finds a compiled kernel by: types, constants, what it specialises, options.

    Asked of the code that a launch asks. A `meta` tensor has the address 0, thus aligned.
    """
    _, specialisation, options = _binder(kernel, architecture)[1](*args, **constants, **OPTIONS)
    return f"{kernel.__name__} {compute_cache_key({}, specialisation, options)}"


def source_of(
    kernel: Any, architecture: int, args: tuple[Any, ...], constants: dict[str, Any]
) -> tuple[ASTSource, dict[str, Any]]:
    """What a launch with these arguments would compile, and with which options."""
    backend, bind = _binder(kernel, architecture)
    constants = constants | OPTIONS
    options, *rest = kernel._pack_args(backend, constants, *bind(*args, **constants))
    source = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    return source(kernel, *rest), options.__dict__


def machine_code(architecture: int, source: ASTSource, options: dict[str, Any]) -> tuple[Any, str]:
    """(what Triton compiled, its machine code as cuobjdump prints it, with its resources)."""
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        return compiled, _run(tool("cuobjdump"), "--dump-sass", "--dump-resource-usage", cubin.name)


def resources(text: str) -> tuple[int, int]:
    """(registers, bytes that a thread spills) of the kernel that cuobjdump printed."""
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    registers, stack, local = map(int, usage.groups())
    return registers, max(local, stack)


def measure(architecture: int, source: ASTSource, options: dict[str, Any]) -> dict[str, Any]:
    compiled, text = machine_code(architecture, source, options)
    registers, spills = resources(text)
    code = sass.instructions(text)
    opcodes = [x.opcode for x in code]

    def number(pattern: str) -> int:
        return sum(re.match(pattern, opcode) is not None for opcode in opcodes)

    return {
        "registers": registers,
        "spills": spills,
        "shared": compiled.metadata.shared,
        "tensor_core": number(CLASSES["tensor core"].pattern),
        "wide_loads": number(r"LDG\.E\.(?:\w+\.)*128"),
        "wide_stores": number(r"STG\.E\.(?:\w+\.)*128"),
        "narrow_stores": number(r"STG\.E\.(?:\w+\.)*[US](?:8|16)\b"),
        "serialised": sass.serialised(code),
        "overwritten": len(sass.overwritten_operands(code)),
        "loop": main_loop(code),
    }


def main_loop(code: sass.Code) -> dict[str, Any]:
    """How many instructions of which class the loop has in which the kernel's time goes.

    sass.py says which one that is; a kernel without a loop is counted as a whole.
    """
    loop = sass.main_loop(code)
    counts = {
        name: sum(pattern.match(x.opcode) is not None for x in loop or code)
        for name, pattern in CLASSES.items()
    }
    of = "the loop" if loop else "the whole kernel, which has no loop"
    return {"of": of, "instructions": len(loop or code), **counts}


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


Launch = tuple[Any, tuple[Any, ...], dict[str, Any], dict[str, Any]]


def record(
    architecture: int, configurations: Iterator[tuple[dict[str, Any], Callable[[], Any]]]
) -> list[Launch]:
    """(kernel, args, constants, configuration) of every different launch that the calls make."""
    from fastattn import chips
    from fastattn.ops.common import launch

    launches: dict[str, Launch] = {}
    for kernels in ("forward", "backward"):  # their plans may be of another architecture
        importlib.import_module(f"fastattn.ops.attention.triton.{kernels}")._plans.clear()
    launch.architecture = lambda device: architecture
    launch.multiprocessors = lambda device: chips.MULTIPROCESSORS[90]
    for configuration, call in configurations:

        def keep(
            kernel: Any, grid: Any, *args: Any, _c: Any = configuration, **constants: Any
        ) -> None:
            key = key_of(kernel, architecture, args, constants)
            launches.setdefault(key, (kernel, args, constants, _c))

        launch.launch = keep
        call()
    return list(launches.values())


@functools.cache  # processes that are forked off find it done
def launches_of(op: str, architecture: int) -> list[Launch]:
    """Those of a grid; of a hot call, only its hot kernels."""
    launches = record(architecture, GRIDS[op]())
    if op not in ("hot", "hottest"):
        return launches
    return [x for x in launches if x[0].__name__ in HOT[x[3]["call"]]]


def _measured(job: tuple[str, int, int]) -> dict[str, Any]:
    """The record of one launch. Triton's errors do not survive the way between processes."""
    op, architecture, index = job
    kernel, args, constants, configuration = launches_of(op, architecture)[index]
    try:
        result = measure(architecture, *source_of(kernel, architecture, args, constants))
    except Exception as error:
        raise RuntimeError(f"{kernel.__name__} {configuration}: {error}") from None
    return {
        "kernel": kernel.__name__,
        **configuration,
        "architecture": architecture,
        "tile": _tile(constants),
        **result,
    }


def _tile(constants: dict[str, Any]) -> str:
    sizes = ("ROWS", "BLOCK", "BLOCK_M", "BLOCK_N", "BLOCK_K")
    shape = " x ".join(str(constants[size]) for size in sizes if size in constants)
    stages = constants.get("num_stages", constants.get("STAGES", 1))
    return f"{shape}, warps {constants['num_warps']}, stages {stages}"


def report(op: str, architecture: int) -> list[dict[str, Any]]:
    """What the program prints, run in a process in which Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if "PYTEST_XDIST_WORKER" in environment:  # there is one of them for every core already
        environment["FASTATTN_COMPILE_WORKERS"] = "1"
    command = [sys.executable, str(OFFLINE), op, str(architecture)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def main(op: str, architecture: int) -> None:
    assert os.environ.get("TRITON_INTERPRET", "0") != "1", "the interpreter cannot compile"
    jobs = [(op, architecture, index) for index in range(len(launches_of(op, architecture)))]
    workers = int(os.environ.get("FASTATTN_COMPILE_WORKERS", os.cpu_count() or 1))
    with ProcessPoolExecutor(workers) as pool:
        json.dump(list(pool.map(_measured, jobs)), sys.stdout, indent=1)


# --- grids: op -> (configuration, call that launches it) ------------------------------------------


Grid = Iterator[tuple[dict[str, Any], Callable[[], Any]]]


def of(dtype: torch.dtype, **more: Any) -> dict[str, Any]:
    """A configuration."""
    return {"dtype": str(dtype).removeprefix("torch."), **more}


def attention(
    rows: list[tuple[torch.dtype, int, str]] | None = None,
    caches: tuple[tuple[torch.dtype, int, bool, torch.dtype | None], ...] = (
        (torch.bfloat16, 128, True, None),
        (torch.float16, 64, False, None),
        (torch.bfloat16, 128, True, torch.int8),
        (torch.float16, 64, False, torch.int8),
        (torch.bfloat16, 64, False, torch.float8_e4m3fn),
        (torch.float16, 128, True, torch.float8_e4m3fn),
        (torch.bfloat16, 256, True, torch.float8_e4m3fn),
    ),
    one_query: bool = True,
) -> Grid:
    """Every row of the tile tables, with every switch on at least once.

    Args:
        rows: (dtype, head_dim, name of the features) of forward and backward.
        caches: (dtype, head_dim, whether paged, dtype of stored numbers) of decoding steps.
        one_query: a forward of one query too, where it has the features.
    """
    import fastattn.ops.attention.cache.registration
    from fastattn.ops.attention import BlockMask
    from fastattn.ops.attention import triton as kernels
    from fastattn.ops.attention.call import Learnt
    from fastattn.ops.attention.problem import check, check_varlen

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    # Features that load or compute for every score, by themselves where heavy, and all at once.
    features: dict[str, dict[str, Any]] = {
        "full": {},
        "causal": {"causal": True},
        "window": {"causal": True, "window": (256, 0)},
        "mask": {"mask": empty(2, 1, 1024, 1024, dtype=torch.bool)},
        "bias": {"bias": empty(1, 8, 1024, 1024)},
        "one row of bias": {"bias": empty(2, 1, 1, 1024), "key_lengths": empty(2, dtype=torch.int32)},
        "softcap": {"softcap": 30.0, "causal": True},
        "dropout": {"dropout_p": 0.1, "causal": True},
        "documents": {"document_ids": empty(2048, dtype=torch.int32), "causal": True},
        "blocks": {"block_mask": None},
        "packed": {"causal": True},
        "tf32x3": {"causal": True, "fp32_precision": "tf32x3"},
        "everything": {
            "causal": True, "window": (256, 0), "softcap": 30.0, "bias": empty(2, 8, 1024, 1024),
            "mask": empty(2, 1, 1024, 1024, dtype=torch.bool), "alibi_slopes": empty(8),
            "sink": empty(8), "document_ids": empty(2, 1024, dtype=torch.int32),
            "dropout_p": 0.1, "key_lengths": empty(2, dtype=torch.int32),
        },
    }  # fmt: skip
    every = [
        *((torch.bfloat16, 128, name) for name in features if name not in ("full", "tf32x3")),
        *((torch.bfloat16, 64, name) for name in ("causal", "mask", "bias")),
        *((torch.bfloat16, 256, name) for name in ("causal", "bias")),
        (torch.float16, 512, "bias"),
        *((torch.float32, 80, name) for name in ("tf32x3", "everything")),
        *((torch.float32, head_dim, "bias") for head_dim in (256, 512)),
    ]
    for dtype, head_dim, name in every if rows is None else rows:
        options = dict(features[name])
        q = empty(2, 1024, 8, head_dim, dtype=dtype)
        k = empty(2, 1024, 4, head_dim, dtype=dtype)
        if name == "blocks":
            mask = BlockMask.from_predicate(lambda b, h, i, j: i - j < 300, 1, 1, 1024, 1024)
            mask.tensors = tuple(x.to("meta") for x in mask.tensors)
            options["block_mask"] = mask
        if name in ("packed", "documents"):
            q, k = q.flatten(0, 1), k.flatten(0, 1)
            starts = empty(3, dtype=torch.int32)
            settings, extras = check_varlen(q, k, k, starts, starts, 1024, 1024, **options)
        else:
            settings, extras = check(q, k, k, **options)
        if settings.dropout_p:
            extras = extras._replace(dropout_seed=empty(1, dtype=torch.int64))

        v = k[..., :-8] if name == "softcap" else k  # another head_dim than k's

        def call(q=q, k=k, v=v, extras=extras, settings=settings) -> None:  # type: ignore[no-untyped-def]
            wanted = Learnt(*(x is not None for x in Learnt.of(extras)))
            out, lse = kernels.forward(q, k, v, extras, settings)
            kernels.backward(out, lse, out, lse, wanted, q, k, v, extras, settings)
            masked = extras.mask is not None or extras.bias is not None
            if one_query and q.dim() == 4 and not masked and extras.q_documents is None:
                kernels.forward(q[:, :1], k, v, extras, settings)

        yield of(dtype, head_dim=head_dim, features=name), call

    for dtype, head_dim, paged, stored in caches:
        q = empty(2, 1, 32, head_dim, dtype=dtype)
        k = empty(2, 1, 8, head_dim, dtype=dtype)
        keys = empty(*((512, 16) if paged else (2, 4096)), 8, head_dim, dtype=stored or dtype)
        scale = None if stored is None else empty(2, 8)
        lengths, table = empty(2, dtype=torch.int32), empty(2, 256, dtype=torch.int32)
        angles = empty(4096, head_dim // 2)

        def step(
            q=q, k=k, keys=keys, lengths=lengths, paged=paged, t=table, angles=angles, scale=scale
        ) -> None:  # type: ignore[no-untyped-def]
            fastattn.ops.attention.cache.registration._forward(
                q, keys, keys, lengths, k, k, t if paged else None, None, None, angles, angles,
                scale, scale, not paged, True, None, None, None, -1, 0, 0.1, 0.0, "triton",
            )  # fmt: skip

        yield (
            of(
                dtype,
                head_dim=head_dim,
                features=("paged cache" if paged else "cache") + f" of {stored}" * bool(stored),
            ),
            step,
        )


def ffn(rows: list[tuple[torch.dtype, int, str, str, bool, bool]] | None = None) -> Grid:
    """Both layouts and all activations, on tiles for many, some, and few tokens; gated and not."""
    from fastattn.ops.ffn import triton as kernels

    every = [
        (torch.bfloat16, 16384, "linear", "gelu_tanh", False, False),
        (torch.float16, 16384, "conv1d", "gelu", True, False),
        (torch.bfloat16, 512, "conv1d", "silu", False, False),
        (torch.float16, 4, "linear", "relu", False, False),
        (torch.float32, 16384, "linear", "gelu_tanh", False, False),
        (torch.float32, 4, "conv1d", "gelu", True, False),
        (torch.bfloat16, 16384, "linear", "silu", False, True),
        (torch.float16, 16384, "conv1d", "gelu_tanh", True, True),
        (torch.bfloat16, 16384, "conv1d", "gelu", False, True),
        (torch.bfloat16, 512, "linear", "silu", False, True),
        (torch.float16, 4, "linear", "relu", False, True),
        (torch.float32, 16384, "linear", "silu", False, True),
        (torch.float32, 512, "conv1d", "gelu", False, True),
        (torch.float32, 4, "conv1d", "gelu", True, True),
    ]
    for dtype, tokens, layout, activation, recompute, gated in every if rows is None else rows:
        x = torch.empty(tokens, 1024, dtype=dtype, device="meta")
        w1 = torch.empty(4096, 1024, dtype=dtype, device="meta")
        w2 = torch.empty(1024, 4096, dtype=dtype, device="meta")
        if layout == "conv1d":
            w1, w2 = w2, w1
        bias = torch.empty(4096, dtype=dtype, device="meta")
        gate = (w1, bias) if gated else (None, None)
        given = x, w1, bias, w2, bias[:1024], *gate

        def call(given=given, layout=layout, act=activation, save=not recompute) -> None:  # type: ignore[no-untyped-def]
            out, pre = kernels.forward(*given, act, layout, save)
            needs = tuple(t is not None for t in given)
            kernels.backward(out, *given, pre if save else None, needs, act, layout)

        yield (
            of(
                dtype,
                tokens=tokens,
                layout=layout,
                activation=activation,
                recompute=recompute,
                gated=gated,
            ),
            call,
        )


def linear() -> Grid:
    """All activations, on tiles for many, some, and few tokens, kept for a backward and not."""
    from fastattn.ops.linear import triton as kernels

    for dtype, tokens, activation, save in (
        (torch.bfloat16, 16384, "gelu_tanh", True),
        (torch.float16, 16384, "gelu", False),
        (torch.bfloat16, 512, "silu", True),
        (torch.float16, 4, "relu", True),
        (torch.float32, 16384, "gelu", True),
        (torch.float32, 4, "gelu_tanh", False),
    ):
        x = torch.empty(tokens, 1024, dtype=dtype, device="meta")
        weight = torch.empty(4096, 1024, dtype=dtype, device="meta")
        bias = torch.empty(4096, dtype=dtype, device="meta")
        given = x, weight, bias

        def call(given=given, act=activation, save=save) -> None:  # type: ignore[no-untyped-def]
            out, pre = kernels.forward(*given, act, save)
            kernels.backward(out, *given, pre if save else None, (True, True, True), act)

        yield of(dtype, tokens=tokens, activation=activation, save_pre=save), call


def layer_norm(rows: list[tuple[torch.dtype, int, bool, float]] | None = None) -> Grid:
    """Every row of the tile tables, with all there is to load: the most registers."""
    from fastattn.ops.layer_norm import triton as kernels

    every = [
        (torch.bfloat16, 64, True, 0.0),
        (torch.bfloat16, 768, True, 0.0),
        (torch.float32, 2048, True, 0.0),
        (torch.bfloat16, 4096, False, 0.0),
        (torch.float32, 8192, True, 0.0),
        (torch.bfloat16, 16384, True, 0.0),
        (torch.float32, 65536, True, 0.0),
        (torch.float16, 50257, False, 0.0),
        (torch.bfloat16, 64, True, 0.1),
        (torch.bfloat16, 768, True, 0.1),
        (torch.float32, 2048, True, 0.1),
        (torch.bfloat16, 4096, False, 0.1),
        (torch.float32, 8192, True, 0.1),
        (torch.float16, 16384, True, 0.1),
    ]
    for dtype, hidden, center, dropout_p in every if rows is None else rows:
        x = torch.empty(4096, hidden, dtype=dtype, device="meta")
        weight = torch.empty(hidden, dtype=dtype, device="meta")
        bias = weight if center else None
        seed = torch.empty(1, dtype=torch.int64, device="meta") if dropout_p else None
        dropped = (seed, dropout_p)

        def call(x=x, weight=weight, bias=bias, center=center, dropped=dropped) -> None:  # type: ignore[no-untyped-def]
            out, stream, statistics = kernels.forward(
                x, x, weight, bias, 1e-5, center, x.dtype, *dropped
            )
            kernels.backward(
                out, stream, stream, weight, statistics, center, x.dtype, x.dtype,
                None if bias is None else bias.dtype, True, *dropped,
            )  # fmt: skip

        yield of(dtype, hidden=hidden, center=center, dropout_p=dropout_p), call


NO_OPTIONS = {"label_smoothing": 0.0, "z_loss": 0.0, "logit_scale": 1.0, "softcap": 0.0}
ALL_OPTIONS = {"label_smoothing": 0.1, "z_loss": 1e-4, "logit_scale": 0.5, "softcap": 30.0}


def cross_entropy(rows: list[tuple[torch.dtype, int, bool]] | None = None) -> Grid:
    """Every tile, plain and with all options."""
    from fastattn.ops.cross_entropy.problem import Options
    from fastattn.ops.cross_entropy.triton import kernels

    every = [
        (torch.bfloat16, 131072, False),
        (torch.float32, 50257, True),
        (torch.bfloat16, 50257, True),
        (torch.float16, 2048, True),
        (torch.bfloat16, 1000, False),
        (torch.float32, 64, True),
    ]
    for dtype, classes, everything in every if rows is None else rows:
        logits = torch.empty(4096, classes, dtype=dtype, device="meta")
        targets = torch.empty(4096, dtype=torch.int64, device="meta")
        weight = torch.empty(classes, device="meta") if everything else None
        options = Options(-100, *(ALL_OPTIONS if everything else NO_OPTIONS).values(), "none")

        def call(logits=logits, targets=targets, weight=weight, options=options) -> None:  # type: ignore[no-untyped-def]
            losses, statistics = kernels.kernel_forward(logits, targets, weight, options)
            kernels.kernel_backward(losses, logits, targets, weight, statistics, options)

        yield of(dtype, classes=classes, everything=everything), call


def linear_cross_entropy(rows: list[tuple[torch.dtype, int, int, bool]] | None = None) -> Grid:
    """Every tile, plain and with all options."""
    from fastattn.ops.cross_entropy.problem import Options
    from fastattn.ops.linear_cross_entropy import triton as kernels

    every = [
        (torch.bfloat16, 131072, 4096, False),
        (torch.bfloat16, 131072, 4096, True),
        (torch.float16, 50257, 333, True),
        (torch.float32, 131072, 1024, True),
        (torch.float32, 50257, 333, True),
    ]
    for dtype, classes, features, everything in every if rows is None else rows:
        x = torch.empty(4096, features, dtype=dtype, device="meta")
        weight = torch.empty(classes, features, dtype=dtype, device="meta")
        targets = torch.empty(4096, dtype=torch.int64, device="meta")
        extra = torch.empty(classes, device="meta") if everything else None
        bias = None if extra is None else extra.to(dtype)
        options = Options(-100, *(ALL_OPTIONS if everything else NO_OPTIONS).values(), "none")

        def call(given=(x, weight, bias, targets, extra), options=options) -> None:  # type: ignore[no-untyped-def]
            losses, statistics, _ = kernels.kernel_forward(*given, options, (False,) * 3)
            kernels.kernel_backward(losses, *given, statistics, options, (True, True, False))

        yield of(dtype, classes=classes, features=features, everything=everything), call


def rotary(
    rows: list[tuple[torch.dtype, int, int, bool]] | None = None,
    norms: tuple[bool, ...] = (False, True),
) -> Grid:
    """Heads that fill the tiles and heads that do not, each with and without a norm."""
    from fastattn.ops.rotary import triton as kernels

    every = [
        (torch.bfloat16, 64, 64, False),
        (torch.bfloat16, 128, 128, True),
        (torch.float16, 80, 32, False),
        (torch.float32, 256, 64, True),
        (torch.float32, 4096, 4096, False),
    ]
    for dtype, head_dim, rotary_dim, interleaved in every if rows is None else rows:
        q = torch.empty(4, 1024, 32, head_dim, dtype=dtype, device="meta")
        k, weight = q[:, :, :8], q[0, 0, 0]
        cos = q.new_empty(4, 1024, rotary_dim)

        def call(q=q, k=k, cos=cos, weight=weight, r=rotary_dim, i=interleaved) -> None:  # type: ignore[no-untyped-def]
            for w in (weight if norm else None for norm in norms):
                kernels.forward(q, k, cos, cos, None, w, w, r, i, 1e-6, 0.0)
                wanted = w is not None
                kernels.backward(q, k, q, k, cos, cos, None, w, w, r, i, 1e-6, 0.0, wanted, wanted)

        yield of(dtype, head_dim=head_dim, rotary_dim=rotary_dim, interleaved=interleaved), call


# The calls in which a model's time goes, and the kernels of each in which that of the call goes.
HOT = {
    "attention, causal, head_dim 64": ("_forward_kernel",),
    "attention, causal, head_dim 128": ("_forward_kernel", "_keys_kernel", "_queries_kernel"),
    "attention, decoding, pages, head_dim 128": ("_forward_kernel",),
    "ffn, gelu_tanh": ("_forward_kernel", "_backward_kernel"),
    "ffn, silu, gated": ("_forward_kernel", "_backward_kernel"),
    "layer_norm, hidden 4096": ("_forward_kernel", "_backward_kernel"),
    "cross_entropy, 131072 classes": ("_forward_kernel", "_backward_kernel"),
    "linear_cross_entropy, 131072 classes": ("_forward_kernel", "_gradient_kernel"),
    "rotary, head_dim 128": ("_rotate_kernel",),
}


def hot(*names: str) -> Grid:
    """The calls of HOT, or those that are named, in bfloat16."""
    dtype = torch.bfloat16
    grids = {
        "attention, causal, head_dim 64": attention([(dtype, 64, "causal")], (), False),
        "attention, causal, head_dim 128": attention([(dtype, 128, "causal")], (), False),
        "attention, decoding, pages, head_dim 128": attention([], ((dtype, 128, True, None),)),
        "ffn, gelu_tanh": ffn([(dtype, 16384, "linear", "gelu_tanh", False, False)]),
        "ffn, silu, gated": ffn([(dtype, 16384, "linear", "silu", False, True)]),
        "layer_norm, hidden 4096": layer_norm([(dtype, 4096, True, 0.0)]),
        "cross_entropy, 131072 classes": cross_entropy([(dtype, 131072, False)]),
        "linear_cross_entropy, 131072 classes": linear_cross_entropy(
            [(dtype, 131072, 4096, False)]
        ),
        "rotary, head_dim 128": rotary([(dtype, 128, 128, False)], (False,)),
    }
    for name in names or HOT:
        for configuration, call in grids[name]:
            yield {"call": name, **configuration}, call


# Every row of the tile tables of attention, with one feature or none, and one row with all.
ROWS = [
    *((torch.bfloat16, 128, name) for name in ("causal", "bias", "everything")),
    *((dtype, head_dim, "causal") for dtype, head_dim in (
        (torch.bfloat16, 64), (torch.bfloat16, 256), (torch.float16, 512), (torch.float32, 256),
    )),
    (torch.float32, 80, "tf32x3"),
    (torch.float32, 512, "bias"),
]  # fmt: skip

# Those that sm_100 has of its own; its others are Hopper's.
OWN_ROWS = [(torch.bfloat16, 128, name) for name in ("causal", "bias", "everything")]


def main_loops() -> Grid:
    """The calls of the table in docs/kernels.md."""
    dtype = torch.bfloat16
    masked = [(dtype, d, name) for d in (64, 128, 256) for name in ("full", "causal")]
    yield from attention(masked, (), False)
    yield from ffn([(dtype, 16384, "linear", "gelu_tanh", False, False)])
    yield from linear_cross_entropy([(dtype, 131072, 4096, False)])


GRIDS: dict[str, Callable[[], Grid]] = {
    "attention": attention,
    "attention, rows": functools.partial(attention, ROWS),
    "attention, own rows": functools.partial(attention, OWN_ROWS),
    "ffn": ffn,
    "linear": linear,
    "layer_norm": layer_norm,
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
    "rotary": rotary,
    "table": main_loops,
    "hot": hot,
    "hottest": functools.partial(
        hot, "attention, causal, head_dim 128", "ffn, gelu_tanh", "layer_norm, hidden 4096"
    ),
}

if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
