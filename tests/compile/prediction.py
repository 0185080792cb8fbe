"""What the CUDA C++ kernels should take on a GPU: predicted, not measured.

    python tests/compile/prediction.py            # prints the tables
    python tests/compile/prediction.py --write    # and puts them into docs/kernels.md

A kernel's work is counted, not estimated: the emulator (csrc/emulator) runs it on a problem that is
small, but whose blocks do what the blocks of the large one do, and its counts are scaled:

    norms       by rows and blocks of the backward; its second stage runs with all its blocks
    attention   by heads and batch; by a S + b S^2 for a sequence length S, from two lengths
    decode      by sequences and key heads, at the full number of keys
    ffn         by tiles of C; by a + b k for a depth k, from two depths

test_prediction.py holds the rule against a size that it was not fitted to. What depends on data is
the number of exponentials of running maxima, a few in a thousand of all. csrc/resources.json, made
by cuda.py, has registers, and the instructions that the main loop issues for each of tensor cores.

Each unit of a chip then needs a time that it cannot go below, those of a multiprocessor as long as
the one with the most blocks needs, and the expected time is the longest of them, as if the others
were hidden behind it. Launches, latencies and the L1 cache have no place in the model.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from emulator import knobs  # noqa: E402

from fastattn.ops.attention import attention_with_kv_cache, cuda, cuda_cache  # noqa: E402
from fastattn.ops.attention.problem import check  # noqa: E402
from fastattn.ops.ffn.cuda import ACTIVATIONS, LARGE_TILE, ROWS_OF_A_PART  # noqa: E402
from fastattn.ops.ffn.cuda import ROWS_OF_A_SUM as ROWS_OF_AN_FFN_SUM  # noqa: E402
from fastattn.ops.layer_norm import cuda as norms  # noqa: E402

RESOURCES = ROOT / "csrc" / "resources.json"
DOCUMENT = ROOT / "docs" / "kernels.md"
MARKERS = ("<!-- predictions -->", "<!-- /predictions -->")

Counts = dict[str, int]

# Of a block, not of all: they do not grow with the problem.
CONSTANT = ("launches", "threads", "shared_bytes")
MMA_FLOP = 2 * 16 * 8 * 16
SECTOR, WAVEFRONT = 32, 128  # bytes


@dataclass(frozen=True)
class Chip:
    name: str
    multiprocessors: int
    clock: float  # Hz
    tensor: float  # FLOP/s of mma.sync on bfloat16
    memory: float  # bytes/s
    l2: float  # bytes a clock
    shared: int  # bytes of a multiprocessor
    registers: int = 65536
    threads: int = 2048
    blocks: int = 32
    # A clock of a multiprocessor: ex2, bytes of shared memory, instructions of warps (CUDA C++
    # Programming Guide, "Arithmetic Instructions" and "Compute Capability 8.x" and "9.0").
    exponentials: int = 16
    shared_rate: int = 128
    issue: int = 4


CHIPS = (
    # NVIDIA A100 80GB SXM datasheet; "NVIDIA A100 Tensor Core GPU Architecture": 5120 bytes a clock
    # from the L2, 1.41 GHz. 312e12 is 108 x 2048 FLOP a clock.
    Chip("A100", 108, 1.41e9, 312e12, 2039e9, 5120, 164 * 1024),
    # NVIDIA H200 datasheet: 989e12 dense, 4.8 TB/s; 989e12 is 132 x 4096 FLOP a clock at 1.83 GHz,
    # and that is the clock taken here (it may boost to 1.98). mma.sync reaches about 63 % of what
    # wgmma does (Luo et al. 2024, arXiv:2402.13499, recalled, not looked up). NVIDIA names no width
    # of the L2: an A100's is assumed.
    Chip("H200", 132, 1.83e9, 0.63 * 989e12, 4800e9, 5120, 228 * 1024),
)


@dataclass(frozen=True)
class Launch:
    """A kernel on a problem, with what the emulator counted, scaled to it."""

    kernel: str
    shape: str
    symbol: str  # a pattern of the kernel's name in resources.json
    bytes: int  # that must move: every input and output once
    flop: int  # of the products as a formula has them: half of them if causal, no tile at an edge
    counts: Counts = field(repr=False)
    even: bool = True  # all blocks do the same; else those with the most work start first


# --- counts of the emulator -----------------------------------------------------------------------


class Emulator(knobs.Emulator):
    """What the ops of torch.ops.fastattn_cuda do, on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = torch.ops.fastattn_cuda

    def count(self, call: Callable[[], Any]) -> dict[str, Counts]:
        """Of each kernel that `call` launches."""
        self.checks(1)  # sectors and banks are not counted below
        self.seed(0)
        with _seeded():
            return self.counts(call) or {}


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def scaled(samples: list[tuple[tuple[int, ...], Counts]], features: tuple[int, ...]) -> Counts:
    """The counts at `features`, of which each is a linear function without a constant.

    Args:
        samples: (features, counts) of as many problems as there are features, one or two.
    """
    if len(samples) == 1:
        weights = [Fraction(features[0], samples[0][0][0])]
    else:
        (a, b), (c, d) = (sample for sample, _ in samples)
        x, y = features
        weights = [Fraction(d * x - c * y, a * d - b * c), Fraction(a * y - b * x, a * d - b * c)]
    return {
        name: value
        if name in CONSTANT
        else round(sum(weight * counts[name] for weight, (_, counts) in zip(weights, samples)))
        for name, value in samples[-1][1].items()
    }


def _random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


# --- norms ----------------------------------------------------------------------------------------

ROWS = 8192
# Of csrc/layer_norm: vectors of a thread by hidden size.
VECTORS = {768: 3, 4096: 2}
NORM_FORWARD = r"norm_forward<ForwardTraits<Known<.*2>, 8, {}>>"
NORM_BACKWARD = r"norm_backward<BackwardTraits<Known<.*2>, 8, {}, true, .*>>"


def norm(emulator: Emulator, hidden: int, center: bool) -> Iterator[Launch]:
    few = 64
    blocks, sums = norms.sum_blocks(ROWS, hidden), 2 if center else 1

    def backward(rows: int, blocks: int) -> dict[str, Counts]:
        gradients = [torch.empty(hidden).bfloat16() for _ in range(sums)]
        dweight, dbias = gradients if center else (gradients[0], None)
        return emulator.count(
            lambda: emulator.ops.layer_norm_backward(
                torch.empty(rows, hidden).bfloat16(), None, dweight, dbias,
                torch.empty(sums, blocks, hidden), _random(rows, hidden), None,
                _random(rows, hidden), _random(hidden), torch.ones(sums, rows), center,
            )
        )  # fmt: skip

    forward = emulator.count(
        lambda: norms.forward(
            _random(few, hidden), None, _random(hidden), _random(hidden) if center else None,
            1e-5, center, torch.bfloat16,
        )
    )  # fmt: skip
    name = "layer_norm" if center else "rms_norm"
    shape = f"{name}, {hidden}"
    stream, weights, statistics = 2 * ROWS * hidden, 2 * hidden, 4 * ROWS * sums
    partials = 4 * sums * blocks * hidden
    yield Launch(
        "norm_forward", shape, NORM_FORWARD.format(VECTORS[hidden]),
        2 * stream + sums * weights + statistics, 0,
        scaled([((few,), forward["norm_forward"])], (ROWS,)),
    )  # fmt: skip
    at_once = max(1, 2048 // hidden)  # rows of a block
    two = [(a, 2) for a in (8 * at_once, 16 * at_once)]
    samples = [((2 * rows, n), backward(2 * rows, n)["norm_backward"]) for rows, n in two]
    yield Launch(
        "norm_backward", shape, NORM_BACKWARD.format(VECTORS[hidden]),
        3 * stream + weights + statistics + partials, 0, scaled(samples, (ROWS, blocks)),
    )  # fmt: skip
    if center:
        yield Launch(
            "norm_total_sums", shape, r"norm_total_sums<TotalSumsParams>",
            partials + sums * weights, 0, backward(blocks, blocks)["norm_total_sums"],
        )  # fmt: skip


# --- attention ------------------------------------------------------------------------------------

TOKENS, WIDTH, SEQLEN = 16384, 2048, 4096
SAMPLES = (256, 512)  # sequence lengths
ATTENTION = {  # what is read and written, of batch x heads x seqlen x (head_dim, 1), and products
    "attention_forward": (r"forward_kernel<ForwardTraits<bfloat16_t, {}, false>>", 4, 1, 2),
    "attention_delta": (r"delta_kernel<bfloat16_t>", 2, 1, 0),
    "attention_keys": (r"keys_kernel<KeysTraits<bfloat16_t, {}, false, .*0>>", 6, 2, 4),
    "attention_queries": (r"queries_kernel<QueriesTraits<bfloat16_t, {}, false>>", 5, 2, 3),
}


def attention_counts(
    emulator: Emulator, seqlen: int, head_dim: int, causal: bool
) -> dict[str, Counts]:
    """Of forward and backward, one head."""

    def call() -> None:
        q, k, v, dout = (_random(1, seqlen, 1, head_dim) for _ in range(4))
        settings, extras = check(q, k, v, causal=causal)
        out, lse = cuda.forward(q, k, v, extras, settings)
        cuda.backward(dout, None, out, lse, False, False, q, k, v, extras, settings)

    return emulator.count(call)


def attention(emulator: Emulator, head_dim: int, causal: bool) -> Iterator[Launch]:
    heads = TOKENS // SEQLEN * (WIDTH // head_dim)  # of all sequences
    small = [(n, attention_counts(emulator, n, head_dim, causal)) for n in SAMPLES]
    for kernel, (symbol, matrices, vectors, products) in ATTENTION.items():
        if kernel == "attention_delta" and causal:
            continue  # it is the same
        yield Launch(
            kernel,
            f"d {head_dim}" + (", causal" if causal else "") * (kernel != "attention_delta"),
            symbol.format(head_dim),
            heads * SEQLEN * (2 * matrices * head_dim + 4 * vectors),
            products * 2 * heads * SEQLEN**2 * head_dim // (2 if causal else 1),
            scaled(
                [((n, n * n), counts[kernel]) for n, counts in small],
                (heads * SEQLEN, heads * SEQLEN**2),
            ),
            even=not causal,
        )


# --- decode ---------------------------------------------------------------------------------------

SEQUENCES, HEADS, KV_HEADS, HEAD_DIM, KEYS = 64, 32, 8, 128, 8192


def decode(emulator: Emulator) -> Iterator[Launch]:
    group, splits = HEADS // KV_HEADS, cuda_cache.split(KEYS, 1, 1, HEADS // KV_HEADS, 1, None).most

    def step(kv_heads: int, keys: int) -> dict[str, Counts]:
        def call() -> None:
            q = _random(1, 1, group * kv_heads, HEAD_DIM)
            k, v = (_random(1, 1, kv_heads, HEAD_DIM) for _ in range(2))
            caches = [_random(1, keys, kv_heads, HEAD_DIM) for _ in range(2)]
            lengths = torch.tensor([keys - 1], dtype=torch.int32)
            attention_with_kv_cache(q, *caches, lengths, k=k, v=v, backend="cuda")

        return emulator.count(call)

    one = step(1, KEYS)
    tokens = SEQUENCES * HEADS  # rows of the output
    cache, out = 4 * SEQUENCES * KV_HEADS * KEYS * HEAD_DIM, tokens * (2 * HEAD_DIM + 4)
    parts = 4 * tokens * splits * (HEAD_DIM + 1)
    shape = f"{SEQUENCES} x {KEYS} keys, {HEADS} / {KV_HEADS} heads"
    times = (SEQUENCES * KV_HEADS,)
    yield Launch(
        "append", shape, r"append_kernel<bfloat16_t>", 8 * SEQUENCES * KV_HEADS * HEAD_DIM, 0,
        scaled([((1,), step(KV_HEADS, 256)["append"])], (SEQUENCES,)),
    )  # fmt: skip
    yield Launch(
        "decode", shape, r"decode_kernel<DecodeTraits<bfloat16_t, 128>>",
        cache + 2 * tokens * HEAD_DIM + parts, 4 * tokens * KEYS * HEAD_DIM,
        scaled([((1,), one["decode"])], times),
    )  # fmt: skip
    yield Launch(
        "merge", shape, r"merge_kernel<MergeTraits<bfloat16_t, 128>>", parts + out, 0,
        scaled([((1,), one["merge"])], times),
    )  # fmt: skip


# --- ffn ------------------------------------------------------------------------------------------

DEPTHS = (128, 256)
PRODUCT = r"product_kernel<ProductTraits<bfloat16_t, LargeTile, .*{}, .*{}, .*{}>>"


def ffn(emulator: Emulator, tokens: int, features: int, hidden: int) -> Iterator[Launch]:
    """The products into the hidden layer, back out of it, and of a weight's gradient."""
    tile, ops = LARGE_TILE, emulator.ops
    tanh, none = ACTIVATIONS["gelu_tanh"], ACTIVATIONS["none"]

    def empty() -> torch.Tensor:
        return torch.empty(tile, tile).bfloat16()

    def up(k: int) -> None:  # x w1 of a Linear's weight
        a, b = _random(tile, k), _random(tile, k).t()
        ops.ffn_product(empty(), empty(), a, b, _random(tile), tanh, tile)

    def derivative(k: int) -> None:  # dout w2^T
        sums = torch.empty(tile // ROWS_OF_AN_FFN_SUM, tile)
        a, b = _random(tile, k), _random(k, tile)
        ops.ffn_product_derivative(empty(), empty(), sums, a, b, _random(tile, tile), tanh, tile)

    def weight(k: int) -> None:  # dpre^T x
        ops.ffn_product(empty(), None, _random(k, tile).t(), _random(k, tile), None, none, tile)

    x, middle, weights = 2 * tokens * features, 2 * tokens * hidden, 2 * features * hidden
    sums = 4 * (tokens // ROWS_OF_AN_FFN_SUM) * hidden
    for kernel, what, call, symbol, size, (m, n, k) in (
        ("ffn_forward", "gelu(x w1)", up, (0, 0, 0),
         x + weights + 2 * hidden + 2 * middle, (tokens, hidden, features)),
        ("ffn_backward", "d gelu", derivative, (0, 1, 1),
         x + weights + 3 * middle + sums, (tokens, hidden, features)),
        ("ffn_forward", "dw1", weight, (1, 1, 0),
         x + middle + weights, (hidden, features, tokens)),
    ):  # fmt: skip
        counts = [emulator.count(functools.partial(call, depth))[kernel] for depth in DEPTHS]
        samples = [((1, depth), of_depth) for depth, of_depth in zip(DEPTHS, counts)]
        tiles = m * n // tile**2
        yield Launch(
            kernel, f"{what}, {tokens} x {features} x {hidden}", PRODUCT.format(*symbol), size,
            2 * m * n * k, scaled(samples, (tiles, tiles * k)),
        )  # fmt: skip
    rows, parts = ROWS_OF_A_PART, tokens // ROWS_OF_A_PART
    parts_counts = emulator.count(
        lambda: ops.ffn_column_sums(torch.empty(1, features), _random(rows, features), rows)
    )
    yield Launch(
        "ffn_column_sums", f"db2, {tokens} x {features}",
        r"column_sums_kernel<ColumnSumsTraits<bfloat16_t, float, true>>", x + 4 * parts * features,
        0, scaled([((1,), parts_counts["ffn_column_sums"])], (parts,)),
    )  # fmt: skip


def launches(emulator: Emulator) -> list[Launch]:
    found: list[Launch] = []
    for hidden, center in ((768, True), (4096, True), (4096, False)):
        found += norm(emulator, hidden, center)
    for head_dim in (64, 128):
        for causal in (False, True):
            found += attention(emulator, head_dim, causal)
    found += decode(emulator)
    for sizes in ((8192, 768, 3072), (4096, 4096, 16384)):
        found += ffn(emulator, *sizes)
    return found


# --- from counts to times -------------------------------------------------------------------------


def resources_of(launch: Launch, resources: dict[str, Any]) -> dict[str, Any]:
    names = [
        name
        for name in resources["kernels"]
        if re.fullmatch(launch.symbol, name.replace(" >", ">"))
    ]
    if len(names) != 1:
        raise ValueError(f"{launch.kernel}, {launch.shape}: {launch.symbol} is {names}")
    found: dict[str, Any] = resources["kernels"][names[0]]
    return found


def occupancy(chip: Chip, registers: int, threads: int, shared: int) -> tuple[int, str]:
    """Blocks that a multiprocessor holds at once, and of what there are no more.

    Registers are given to a warp by 256, and each quarter of a multiprocessor has its own; a block
    takes 1 KB of shared memory for the system (CUDA's occupancy calculator).
    """
    warps = threads // 32
    of_a_warp = -(-registers * 32 // 256) * 256
    limits = {
        "registers": chip.registers // 4 // of_a_warp * 4 // warps,
        "shared memory": chip.shared // (-(-shared // 128) * 128 + 1024),
        "threads": chip.threads // threads,
        "blocks": chip.blocks,
    }
    least = min(limits, key=lambda name: limits[name])
    return limits[least], least


def wavefronts(counts: Counts) -> int:
    """Clocks in which shared memory is busy: 128 bytes each, and those that banks add."""
    moved = counts["shared_bytes_read"] + counts["shared_bytes_written"]
    return max(counts["shared_accesses"], moved // WAVEFRONT) + counts["bank_conflicts"]


def issued(kernel: dict[str, Any]) -> float:
    """Instructions that the main loop issues for each tensor core instruction."""
    trip = kernel["trip"]
    return trip["instructions"] / trip["tensor core"] if trip else 0.0


def bounds(chip: Chip, launch: Launch, kernel: dict[str, Any]) -> dict[str, float]:
    """Seconds, by unit. Instructions are known of loops on tensor cores alone."""
    counts = launch.counts
    each = counts["blocks"] / chip.multiprocessors
    busiest = math.ceil(each) / each if launch.even else 1.0
    clocks = chip.clock * chip.multiprocessors / busiest
    # Asynchronous copies pass the L1 by; of what else is read, the L1 may have some.
    from_l2 = max(launch.bytes, 16 * counts["async_copies"] + counts["global_bytes_written"])
    return {
        "memory": launch.bytes / chip.memory,
        "L2": from_l2 / (chip.l2 * chip.clock),
        "tensor cores": MMA_FLOP * counts["mma"] / chip.tensor * busiest,
        "exponentials": counts["exp2"] / (chip.exponentials * clocks),
        "shared memory": WAVEFRONT * wavefronts(counts) / (chip.shared_rate * clocks),
        "issue": counts["mma"] * issued(kernel) / (chip.issue * clocks),
    }


# --- tables ---------------------------------------------------------------------------------------

INTRODUCTION = """\
**Predicted, not measured**, by `python tests/compile/prediction.py --write`, which says how: work as
counted in the emulator, registers and instructions of nvcc {nvcc} for {architecture}, figures of the
chips as NVIDIA states them; for an H200 {share} of its peak, which `mma.sync` is said to reach, and
the width of an A100's L2 (both assumed). bfloat16 throughout.

The expected time is the longest bound, one that no run can beat if the model is right. How near runs
come is what they are for: FlashAttention-2, the same algorithm, reports 50 to 73 % of an A100's peak
(arXiv:2307.08691), and FlashAttention-3 finds it at 35 % of an H100's (arXiv:2407.08608).

What a launch takes and does. Blocks are those that a multiprocessor holds at once, and what keeps it
from more. Sectors are what warps ask the L1 or L2 for, wavefronts the clocks of shared memory, bank
conflicts included; the main loop issues as many instructions for each tensor core instruction (mma)
as the last column has."""

TIMES = """\
Predicted bounds in microseconds, A100 / H200; the L2 by what asynchronous copies bring and what is
written; issue in loops on tensor cores alone. TFLOP/s count the products of the formula, half of them
if causal; for attention's whole backward 5 products, of which the kernels do 7."""


def number(x: float) -> str:
    """Three digits, and as many zeros as it takes."""
    if x == 0:
        return "-"
    text = f"{x:.3g}"
    if "e" in text:
        text = f"{float(text):.0f}" if x >= 1 else f"{float(text):.6f}".rstrip("0")
    return text


def table(header: list[str], rows: list[list[str]]) -> str:
    left = 2  # columns of text
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def what_it_takes(launch: Launch, kernel: dict[str, Any]) -> list[str]:
    counts = launch.counts
    held = [
        occupancy(chip, kernel["registers"], counts["threads"], counts["shared_bytes"])
        for chip in CHIPS
    ]
    # The same on both chips is said once.
    blocks = " / ".join(dict.fromkeys(f"{n} by {limit}" for n, limit in held))
    return [
        f"`{launch.kernel}`", launch.shape, str(kernel["registers"]), str(counts["threads"]),
        number(counts["shared_bytes"] / 1024), blocks, number(launch.bytes / 1e6),
        number(SECTOR * counts["global_sectors"] / 1e6), number(MMA_FLOP * counts["mma"] / 1e9),
        number(counts["exp2"] / 1e6), number(wavefronts(counts) / 1e6),
        number(counts["block_syncs"] * 32 / counts["threads"] / counts["blocks"]),
        number(issued(kernel)),
    ]  # fmt: skip


def speed(flop: int, seconds: list[float]) -> str:
    return " / ".join(number(flop / s / 1e12) for s in seconds) if flop else "-"


def times(launch: Launch, kernel: dict[str, Any]) -> list[str]:
    both = [bounds(chip, launch, kernel) for chip in CHIPS]
    longest = [max(of, key=lambda name: of[name]) for of in both]
    return [
        f"`{launch.kernel}`", launch.shape,
        *(
            " / ".join(number(1e6 * of[name]) for of in both) if both[0][name] else "-"
            for name in both[0]
        ),
        " / ".join(f"**{number(1e6 * of[name])}** {name}" for of, name in zip(both, longest)),
        speed(launch.flop, [of[name] for of, name in zip(both, longest)]),
    ]  # fmt: skip


def attention_backwards(found: list[Launch], resources: dict[str, Any]) -> Iterator[list[str]]:
    """What a benchmark sees: the three kernels of a backward, one after the other."""
    for queries in found:
        if queries.kernel != "attention_queries":
            continue
        head_dim = queries.shape.split(",")[0]
        parts = [
            launch
            for launch in found
            if (launch.kernel == "attention_keys" and launch.shape == queries.shape)
            or (launch.kernel == "attention_delta" and launch.shape == head_dim)
        ] + [queries]
        seconds = [
            sum(max(bounds(chip, part, resources_of(part, resources)).values()) for part in parts)
            for chip in CHIPS
        ]
        yield [
            "attention, backward", queries.shape, *["-"] * 6,
            " / ".join(f"**{number(1e6 * s)}** sum" for s in seconds),
            speed(queries.flop // 3 * 5, seconds),
        ]  # fmt: skip


def text(found: list[Launch], resources: dict[str, Any]) -> str:
    """What stands between the markers."""
    kernels = [resources_of(launch, resources) for launch in found]
    takes = table(
        ["kernel", "problem", "registers", "threads", "shared KB", "blocks A100 / H200",
         "MB that must move", "MB of sectors", "tensor core GFLOP", "10^6 exp2",
         "10^6 shared wavefronts", "barriers of a block", "loop / mma"],
        [what_it_takes(launch, kernel) for launch, kernel in zip(found, kernels)],
    )  # fmt: skip
    takes_time = table(
        ["kernel", "problem", *bounds(CHIPS[0], found[0], kernels[0]), "expected", "TFLOP/s"],
        [times(launch, kernel) for launch, kernel in zip(found, kernels)]
        + list(attention_backwards(found, resources)),
    )
    share = f"{CHIPS[1].tensor / 989e12:.0%}"
    introduction = INTRODUCTION.format(
        nvcc=resources["nvcc"], architecture=resources["architecture"], share=share
    )
    return "\n\n".join([introduction, takes, TIMES, takes_time])


def written() -> str:
    """What stands there now."""
    return DOCUMENT.read_text().split(MARKERS[0])[1].split(MARKERS[1])[0].strip()


def write(new: str) -> None:
    before, rest = DOCUMENT.read_text().split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    DOCUMENT.write_text(f"{before}{MARKERS[0]}\n\n{new}\n\n{MARKERS[1]}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="also into docs/kernels.md")
    parser.add_argument("--resources", type=Path, default=RESOURCES, help="instead of csrc's table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with Emulator() as emulator:
        new = text(launches(emulator), json.loads(args.resources.read_text()))
    print(new)
    if args.write:
        write(new)


if __name__ == "__main__":
    main()
