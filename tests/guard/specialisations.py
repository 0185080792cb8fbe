"""How many compiled kernels typical calls take, on sm_90.

Run as a program, in a process in which Triton compiles, it prints the numbers; with the argument
`random` those of random shapes. The calls are those of tests/ops/attention/test_specialisation.py,
which explains how Triton is asked.
"""

from __future__ import annotations

import functools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
ARCHITECTURE = 90

Numbers = dict[str, dict[str, int]]

# Of one kind: a cache of them is read in several parts, and batches of them fill a GPU.
TEN_LENGTHS = (1024, 512, 577, 640, 1000, 1001, 1536, 2048, 3333, 4096)


BATCH, RANDOM_SHAPES = 8, 200
CLASSES = 50257


def random_shapes() -> list[tuple[int, int]]:
    """(length, batch), short and long ones alike often."""
    draw = random.Random(0)
    return [
        (int(2 ** draw.uniform(0, 13)), int(2 ** draw.uniform(0, 6))) for _ in range(RANDOM_SHAPES)
    ]


def report(*arguments: str) -> Numbers:
    """What the program prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = [str(TESTS.parent), str(TESTS), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    done = subprocess.run(
        [sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def main(arguments: list[str]) -> None:
    import torch
    from compile.offline import key_of
    from ops.attention import test_specialisation as attention

    from fastattn import chips
    from fastattn.ops.common import launch
    from fastattn.ops.cross_entropy.problem import Options
    from fastattn.ops.cross_entropy.triton import kernels as of_logits
    from fastattn.ops.ffn import triton as ffn
    from fastattn.ops.layer_norm import triton as layer_norm
    from fastattn.ops.linear import triton as linear
    from fastattn.ops.linear_cross_entropy import triton as of_head
    from fastattn.ops.rotary import triton as rotary

    keys: set[str] = set()

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        if 0 not in grid:
            keys.add(key_of(kernel, ARCHITECTURE, args, constants))

    launch.launch = record
    launch.architecture = lambda device: ARCHITECTURE
    launch.multiprocessors = lambda device: chips.MULTIPROCESSORS[90]

    def kernels_of(calls: Iterable[Callable[[], Any]]) -> int:
        keys.clear()
        for call in calls:
            call()
        return len(keys)

    hidden, dtype = 768, torch.bfloat16
    weights = torch.empty(2, 4 * hidden, hidden, dtype=dtype, device="meta")
    w1, w2, biases = weights[0], weights[1].view(hidden, -1), weights[1].view(-1)

    seed = torch.empty(1, dtype=torch.int64, device="meta")

    def norm(
        length: int, batch: int = BATCH, *, center: bool, dropped: tuple[Any, float] = (None, 0.0)
    ) -> None:
        x = torch.empty(batch, length, hidden, dtype=dtype, device="meta")
        bias = biases[:hidden] if center else None
        out, stream, statistics = layer_norm.forward(
            x, x, biases[:hidden], bias, 1e-5, center, dtype, *dropped
        )
        layer_norm.backward(
            out, stream, stream, biases[:hidden], statistics, center, dtype, dtype,
            dtype if center else None, True, *dropped,
        )  # fmt: skip

    def feed_forward(length: int, batch: int = BATCH, gate: tuple[Any, Any] = (None, None)) -> None:
        x = torch.empty(batch, length, hidden, dtype=dtype, device="meta")
        given = x, w1, biases[: 4 * hidden], w2, biases[:hidden], *gate
        needs = tuple(t is not None for t in given)
        out, pre = ffn.forward(*given, "gelu_tanh", "linear", True)
        ffn.backward(out, *given, pre, needs, "gelu_tanh", "linear")

    def activated(length: int, batch: int = BATCH) -> None:
        x = torch.empty(batch, length, hidden, dtype=dtype, device="meta")
        given = x, w1, biases[: 4 * hidden]
        out, pre = linear.forward(*given, "gelu_tanh", True)
        linear.backward(out, *given, pre, (True, True, True), "gelu_tanh")

    def loss(length: int, batch: int = BATCH) -> None:
        logits = torch.empty(batch, length, CLASSES, dtype=dtype, device="meta")
        targets = torch.empty(batch, length, dtype=torch.int64, device="meta")
        losses, statistics = of_logits.kernel_forward(logits, targets, None, plain)
        of_logits.kernel_backward(losses, logits, targets, None, statistics, plain)

    def loss_of_head(length: int, batch: int = BATCH, *, kept: bool) -> None:
        x = torch.empty(batch, length, hidden, dtype=dtype, device="meta")
        targets = torch.empty(batch, length, dtype=torch.int64, device="meta")
        given = x, head, None, targets, None
        needs = True, True, False
        losses, statistics, _ = of_head.kernel_forward(
            *given, plain, needs if kept else (False,) * 3
        )
        if not kept:
            of_head.kernel_backward(losses, *given, statistics, plain, needs)

    def turned(length: int, batch: int = BATCH, *, norms: bool) -> None:
        q = torch.empty(batch, length, 12, 64, dtype=dtype, device="meta")
        k, cos = q[:, :, :4], torch.empty(length, 64, device="meta")
        weight = biases[:64] if norms else None
        rest = cos, cos, None, weight, weight, 64, False, 1e-6, 0.0
        rotary.forward(q, k, *rest)
        rotary.backward(q, k, q, k, *rest, norms, norms)

    plain = Options(-100, 0.0, 0.0, 1.0, 0.0, "none")
    head = torch.empty(CLASSES, hidden, dtype=dtype, device="meta")
    by_length: dict[str, Callable[..., Any]] = {
        "attention, training": lambda n, batch=BATCH: attention.dense(
            "causal", (batch, n, n), "meta"
        ),
        "attention, training, one query": lambda n, batch=BATCH: attention.dense(
            "causal", (batch, 1, n), "meta"
        ),
        "attention_with_kv_cache, pages, rotary": lambda n, batch=BATCH: attention.cache(
            (batch, 1, n), "meta", paged=True, rotary=True
        ),
        "layer_norm, training": functools.partial(norm, center=True),
        "layer_norm, dropout, training": lambda n, batch=BATCH: norm(
            n, batch, center=True, dropped=(seed, 1 / (n + 1))
        ),
        "rms_norm, training": functools.partial(norm, center=False),
        "ffn, training": feed_forward,
        "linear, training": activated,
        "ffn, gated, training": functools.partial(feed_forward, gate=(w1, biases[: 4 * hidden])),
        "cross_entropy, training": loss,
        "linear_cross_entropy, training": functools.partial(loss_of_head, kept=True),
        "linear_cross_entropy, none, training": functools.partial(loss_of_head, kept=False),
        "rotary, training": functools.partial(turned, norms=False),
        "rotary, norms, training": functools.partial(turned, norms=True),
    }
    counts: Numbers = {}
    if arguments == ["random"]:
        by_length["attention_varlen, training"] = lambda n, batch: attention.packed(
            "causal", (batch, n, n), "meta"
        )
        shapes = random_shapes()
        for name, call in by_length.items():
            calls = [functools.partial(call, *shape) for shape in shapes]
            half = kernels_of(calls[: RANDOM_SHAPES // 2])
            counts[name] = {"half of the shapes": half, "all shapes": kernels_of(calls)}
        print(json.dumps(counts))
        return
    for name, call in by_length.items():
        calls = [functools.partial(call, length) for length in TEN_LENGTHS]
        counts[name] = {"one length": kernels_of(calls[:1]), "ten lengths": kernels_of(calls)}

    # Every feature once, at a long query and at one query.
    everything: dict[str, list[Callable[[], Any]]] = {}
    for name, of_size in attention.CALLS.items():
        op, _, feature = name.partition(", ")
        sizes = (attention.PREFILL, attention.DECODE)
        calls = [functools.partial(of_size, size, "meta") for size in sizes]
        everything.setdefault(op, []).extend(calls)
        counts.setdefault(f"{op}, by feature", {})[feature or "plain"] = kernels_of(calls)
    for op, calls in everything.items():
        counts[f"{op}, by feature"]["all together"] = kernels_of(calls)
    print(json.dumps(counts))


if __name__ == "__main__":
    main(sys.argv[1:])
