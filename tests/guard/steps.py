"""What a step of a model, or of one op, asks of the machine: launches, operators, memory.

Nothing here depends on the values of tensors, so the Triton kernels are not run: a recorder takes
the place of the launcher, and their outputs hold what the memory held.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn.generation import decoding, graphs
from fastattn.ops.common import launch
from fastattn.ops.linear import linear

BACKENDS = ("triton", "torch")


@dataclass(frozen=True)
class Step:
    """A forward, of which the first result is differentiated if any of `given` wants a gradient."""

    forward: Callable[[], Any]
    given: tuple[torch.Tensor, ...]  # there without the step: inputs, parameters

    def output(self) -> torch.Tensor:
        result = self.forward()
        return result if isinstance(result, torch.Tensor) else result[0]

    @property
    def differentiable(self) -> bool:
        return any(x.requires_grad for x in self.given)

    def forget(self) -> None:
        """As after optimizer.zero_grad()."""
        for x in self.given:
            x.grad = None


# --- the steps ------------------------------------------------------------------------------------

BATCH, SEQLEN, HEADS, KV_HEADS, HEAD_DIM = 2, 32, 4, 2, 16
WIDTH = HEADS * HEAD_DIM


def _input(*shape: int) -> torch.Tensor:
    return torch.randn(shape, requires_grad=True)


def _heads(*leading: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v."""
    q = _input(*leading, HEADS, HEAD_DIM)
    return q, _input(*leading, KV_HEADS, HEAD_DIM), _input(*leading, KV_HEADS, HEAD_DIM)


def _attention(**features: Any) -> Step:
    q, k, v = _heads(BATCH, SEQLEN)
    more = tuple(x for x in features.values() if isinstance(x, torch.Tensor))
    return Step(lambda: fastattn.attention(q, k, v, **features), (q, k, v, *more))


def _varlen() -> Step:
    q, k, v = _heads(BATCH * SEQLEN)
    starts = torch.tensor([0, 20, BATCH * SEQLEN], dtype=torch.int32)
    longest = BATCH * SEQLEN - 20

    def forward() -> torch.Tensor:
        return fastattn.attention_varlen(q, k, v, starts, starts, longest, longest, causal=True)

    return Step(forward, (q, k, v, starts))


def _kv_cache() -> Step:
    """One new token: rotated, appended to a paged cache of two parts, attended to."""
    pages, page_size = 4, 128
    q, k, v = (x.detach() for x in _heads(BATCH, 1))
    keys, values = (torch.zeros(2 * pages, page_size, KV_HEADS, HEAD_DIM) for _ in "kv")
    table = torch.arange(2 * pages, dtype=torch.int32).view(BATCH, pages)
    lengths = torch.tensor([300, 40], dtype=torch.int32)
    cos, sin = (torch.ones(pages * page_size, HEAD_DIM // 2) for _ in "cs")

    def forward() -> torch.Tensor:
        return fastattn.attention_with_kv_cache(
            q, keys, values, lengths, k=k, v=v, block_table=table, rotary_cos=cos, rotary_sin=sin
        )

    return Step(forward, (q, k, v, keys, values, table, lengths, cos, sin))


def _layer_norm(residual: bool, dropout_p: float = 0.0) -> Step:
    x, weight, bias = _input(BATCH, SEQLEN, WIDTH), _input(WIDTH), _input(WIDTH)
    more = _input(BATCH, SEQLEN, WIDTH) if residual else None
    given = (x, weight, bias) if more is None else (x, weight, bias, more)
    options = {"residual": more, "dropout_p": dropout_p}
    return Step(lambda: fastattn.layer_norm(x, weight, bias, **options), given)


def _rms_norm() -> Step:
    x, weight, residual = _input(BATCH, SEQLEN, WIDTH), _input(WIDTH), _input(BATCH, SEQLEN, WIDTH)
    return Step(lambda: fastattn.rms_norm(x, weight, residual=residual), (x, weight, residual))


def _ffn(**options: Any) -> Step:
    x, w1, b1 = _input(BATCH, SEQLEN, WIDTH), _input(4 * WIDTH, WIDTH), _input(4 * WIDTH)
    w2, b2 = _input(WIDTH, 4 * WIDTH), _input(WIDTH)
    return Step(lambda: fastattn.ffn(x, w1, b1, w2, b2, **options), (x, w1, b1, w2, b2))


def _gated_ffn() -> Step:
    x, w1, w2 = _input(BATCH, SEQLEN, WIDTH), _input(4 * WIDTH, WIDTH), _input(WIDTH, 4 * WIDTH)
    gate = _input(4 * WIDTH, WIDTH)
    return Step(lambda: fastattn.ffn(x, w1, None, w2, None, "silu", gate=gate), (x, w1, w2, gate))


def _linear() -> Step:
    x, weight, bias = _input(BATCH, SEQLEN, WIDTH), _input(4 * WIDTH, WIDTH), _input(4 * WIDTH)
    return Step(lambda: linear(x, weight, bias, "gelu"), (x, weight, bias))


def _cross_entropy() -> Step:
    logits, targets = _input(BATCH, SEQLEN, VOCABULARY), torch.zeros(BATCH, SEQLEN).long()
    return Step(lambda: fastattn.cross_entropy(logits, targets), (logits, targets))


def _linear_cross_entropy(reduction: str) -> Step:
    x, weight = _input(BATCH, SEQLEN, WIDTH), _input(VOCABULARY, WIDTH)
    targets = torch.zeros(BATCH, SEQLEN).long()

    def forward() -> torch.Tensor:
        return fastattn.linear_cross_entropy(x, weight, targets, reduction=reduction)

    return Step(forward, (x, weight, targets))


def _rotary(norms: bool) -> Step:
    q, k, _ = _heads(BATCH, SEQLEN)
    cos, sin = torch.ones(2, SEQLEN, HEAD_DIM)
    weight = _input(HEAD_DIM) if norms else None
    given = (q, k, cos, sin) if weight is None else (q, k, cos, sin, weight)
    return Step(lambda: fastattn.rotary(q, k, cos, sin, q_weight=weight, k_weight=weight), given)


def _block() -> Step:
    block = fastattn.nn.TransformerBlock(WIDTH, HEADS, causal=True)
    x, residual = _input(BATCH, SEQLEN, WIDTH), _input(BATCH, SEQLEN, WIDTH)

    def forward() -> torch.Tensor:
        branch, stream = block(x, residual)
        return branch + stream

    return Step(forward, (x, residual, *block.parameters()))


LAYERS, CAPACITY, VOCABULARY = 2, 512, 97


def _gpt() -> tuple[fastattn.GPT, torch.Tensor]:
    config = fastattn.GPTConfig(
        vocab_size=VOCABULARY, n_positions=CAPACITY, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS
    )
    return fastattn.GPT(config), torch.zeros(BATCH, SEQLEN, dtype=torch.int64)


def _training(autocast: bool = False) -> Step:
    model, ids = _gpt()

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            return model(ids, targets=ids)[1]

    return Step(forward, (ids, *model.parameters()))


def _prefill() -> Step:
    """Into an empty cache, the logits of the last position only."""
    model, ids = _gpt()
    model.eval().requires_grad_(False)
    cache = fastattn.models.KVCache(model.config, BATCH, CAPACITY)

    def forward() -> torch.Tensor:
        cache.reset()
        return model(ids, cache=cache, logits_to_keep=1)

    return Step(forward, (ids, *model.parameters()))


def _decoding(static: bool) -> Step:
    """One token for each sequence; static: the step that a CUDA graph replays."""
    model, ids = _gpt()
    model.eval().requires_grad_(False)
    decoder = graphs.GraphDecoder(decoding.decode, model, model.new_cache(BATCH, CAPACITY))
    model(ids, cache=decoder.cache)
    if static:
        decoder.cache.set_lengths([SEQLEN, SEQLEN - 5])

    def forward(model: fastattn.GPT = model) -> torch.Tensor:  # which the decoder does not hold
        return decoder(ids[:, 0])

    return Step(forward, (ids, *model.parameters()))


Steps = dict[str, Callable[[], Step]]

STEPS: Steps = {
    "attention": lambda: _attention(causal=True),
    "attention, bias": lambda: _attention(bias=_input(1, HEADS, SEQLEN, SEQLEN)),
    "attention, key_lengths": lambda: _attention(key_lengths=torch.tensor([SEQLEN, 20])),
    "attention, dropout": lambda: _attention(causal=True, dropout_p=0.1),
    "attention_varlen": _varlen,
    "attention_with_kv_cache": _kv_cache,
    "layer_norm": lambda: _layer_norm(residual=False),
    "layer_norm, residual": lambda: _layer_norm(residual=True),
    "layer_norm, dropout": lambda: _layer_norm(residual=True, dropout_p=0.1),
    "rms_norm, residual": _rms_norm,
    "ffn": _ffn,
    "ffn, recompute": lambda: _ffn(recompute=True),
    "ffn, gated": _gated_ffn,
    "linear": _linear,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": lambda: _linear_cross_entropy("mean"),
    "linear_cross_entropy, none": lambda: _linear_cross_entropy("none"),
    "rotary": lambda: _rotary(norms=False),
    "rotary, norms": lambda: _rotary(norms=True),
    "TransformerBlock": _block,
    "GPT, training": _training,
    "GPT, training, autocast": lambda: _training(autocast=True),
    "GPT, prefill": _prefill,
    "GPT, decoding": lambda: _decoding(static=False),
    "GPT, decoding, static cache": lambda: _decoding(static=True),
}


# --- what they take -------------------------------------------------------------------------------


@contextlib.contextmanager
def _recorded() -> Iterator[list[str]]:
    """The kernels that are launched, by name, and not run."""
    names: list[str] = []

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        if 0 not in grid:
            op = kernel.fn.__module__.removeprefix("fastattn.ops.").split(".")[0]
            names.append(f"{op}.{kernel.fn.__name__}")

    run, launch.launch = launch.launch, record
    try:
        yield names
    finally:
        launch.launch = run


class Operators(TorchDispatchMode):
    """Notes the operators that PyTorch dispatches, those inside of our registered ops too."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def note(self, operator: Any, args: Any) -> None:
        self.names.append(operator._schema.name.removeprefix("aten::"))

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.note(operator, args)
        kwargs = kwargs or {}
        if operator.namespace != "fastattn":
            return operator(*args, **kwargs)
        with self:
            keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
            return operator.redispatch(keys, *args, **kwargs)


Numbers = dict[str, int]


def _sorted(names: Iterable[str]) -> Numbers:
    return dict(sorted(Counter(names).items()))


def _in_both_directions(
    step: Step, counted: Callable[[], contextlib.AbstractContextManager[list[str]]]
) -> dict[str, Numbers]:
    """Names by number, of the second time: the first one makes plans and fills caches."""
    counts = {}
    for _ in range(2):
        step.forget()
        with torch.inference_mode(not step.differentiable), counted() as names:
            output = step.output()
        counts["forward"] = _sorted(names)
        if step.differentiable:
            gradient = torch.ones_like(output)
            with counted() as names:
                output.backward(gradient)
            counts["backward"] = _sorted(names)
    return counts


@contextlib.contextmanager
def _dispatched() -> Iterator[list[str]]:
    with Operators() as mode:
        yield mode.names


def launches(steps: Steps = STEPS) -> dict[str, dict[str, Numbers]]:
    """Kernels of ours, by step and direction."""
    counts = {}
    for name, step in steps.items():
        with fastattn.use_backend("triton"), _recorded():
            counts[name] = _in_both_directions(step(), _recorded)
    return counts


def operators(steps: Steps = STEPS) -> dict[str, dict[str, dict[str, Numbers]]]:
    """Operators of PyTorch and ours, by backend, step and direction."""
    counts: dict[str, dict[str, dict[str, Numbers]]] = {}
    for backend in BACKENDS:
        counts[backend] = {}
        for name, step in steps.items():
            with fastattn.use_backend(backend), _recorded():
                counts[backend][name] = _in_both_directions(step(), _dispatched)
    return counts


def _saved_bytes(step: Step) -> int:
    """Each storage counts once, as a whole; those that are given do not."""
    given = {x.untyped_storage().data_ptr() for x in step.given}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x: torch.Tensor) -> None:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        step.output()
    return sum(x.nbytes() for place, x in kept.items() if place not in given)


def saved_bytes(steps: Steps = STEPS) -> dict[str, Numbers]:
    """Of storages that a forward keeps for its backward, by step and backend."""
    counts: dict[str, Numbers] = {}
    for name, step in steps.items():
        with _recorded():
            numbers = {}
            for backend in BACKENDS:
                with fastattn.use_backend(backend):
                    made = step()
                    if made.differentiable:
                        numbers[backend] = _saved_bytes(made)
            if numbers:
                counts[name] = numbers
    return counts
