"""What the tests of rings have run on several processes; each function gets its rank first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from ops.attention.cases import Case, formula, units

from fastattn.ops.attention import ring_attention, zigzag
from oracle import assert_close_to_reference


@dataclass(frozen=True)
class Ring:
    """A problem of a whole sequence; `lengths` are those of the sequences packed in it."""

    piece: int = 7
    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 8
    head_dim_v: int | None = None
    causal: bool = True
    window: tuple[int, int] | None = None
    softmax_scale: float | None = None
    softcap: float = 0.0
    lengths: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32
    backend: str | None = None
    only_lse: bool = False
    seed: int = 0

    def features(self) -> dict[str, Any]:
        names = ("causal", "window", "softmax_scale", "softcap")
        return {name: getattr(self, name) for name in names}

    def draw(self, length: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """q, k, v of the whole sequence, and the gradients of out and LSE."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        width_v = self.head_dim if self.head_dim_v is None else self.head_dim_v
        before = self.batch, length
        inputs = [
            normal(*before, self.heads, self.head_dim),
            normal(*before, self.kv_heads, self.head_dim),
            normal(*before, self.kv_heads, width_v),
        ]
        dout = normal(*before, self.heads, width_v)
        dlse = normal(self.batch, self.heads, length)
        inputs, dout = [x.to(self.dtype) for x in inputs], dout.to(self.dtype)
        return inputs, [torch.zeros_like(dout) if self.only_lse else dout, dlse]


def _results(function: Any, inputs: list[torch.Tensor], directions: list[torch.Tensor]) -> Any:
    """(out, lse, dq, dk, dv)."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out, lse = function(*leaves)
    directions = [direction.to(x.dtype) for direction, x in zip(directions, (out, lse))]
    return out, lse, *torch.autograd.grad((out, lse), leaves, directions)


def held_to_the_rule(rank: int, ring: Ring) -> None:
    """This process's rows of all results, against one process's in float64."""
    size = dist.get_world_size()
    length = 2 * size * ring.piece
    inputs, directions = ring.draw(length)
    places = zigzag.places(rank, size, length)
    starts, whole_features = None, ring.features()
    if ring.lengths is not None:
        assert sum(ring.lengths) == length, f"{length} tokens"
        starts = torch.tensor([0, *ring.lengths]).cumsum(0)
        ids = torch.repeat_interleave(torch.arange(len(ring.lengths)), torch.tensor(ring.lengths))
        whole_features["document_ids"] = ids[None], ids[None]

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return ring_attention(
            q, k, v, dist.group.WORLD, cu_seqlens=starts, return_lse=True, backend=ring.backend,
            **ring.features(),
        )  # fmt: skip

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return formula(q, k, v, **whole_features)

    dout, dlse = directions
    mine = [x[:, places] for x in inputs]
    got = _results(ours, mine, [dout[:, places], dlse[..., places]])
    eager = _results(plain, inputs, directions)
    expected = _results(plain, [x.double() for x in inputs], directions)
    ulps = units(Case(seqlen_k=length, dtype=ring.dtype), "torch")
    names = ("out", "lse", "dq", "dk", "dv")
    for name, x, theirs, truth in zip(names, got, eager, expected):
        dim = 2 if name == "lse" else 1
        parts = [y.index_select(dim, places) for y in (theirs, truth)]
        factors = {"max_factor": 3.0, "rms_factor": 2.0} if ring.softcap else {}
        assert_close_to_reference(
            x, *parts, name=f"{name} of rank {rank}", ulps=ulps[name == "lse"], terms=1.0, **factors
        )


def leaks(rank: int, lengths: tuple[int, ...]) -> list[tuple[bool, bool]]:
    """For each packed sequence, of the gradients of its own outputs: (any of its own keys and
    values, any of the others')."""
    size = dist.get_world_size()
    length = sum(lengths)
    inputs, _ = Ring(batch=1).draw(length)
    places = zigzag.places(rank, size, length)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[places]
    leaves = [x[:, places].requires_grad_() for x in inputs]
    out = ring_attention(*leaves, dist.group.WORLD, causal=True, cu_seqlens=starts)
    found = []
    for number in range(len(lengths)):
        chosen = (out * (ids == number)[:, None, None]).square().sum()
        grads = torch.autograd.grad(chosen, leaves, retain_graph=True)
        own = [bool(x[:, ids == number].any()) for x in grads]
        others = [bool(x[:, ids != number].any()) for x in grads]
        found.append((any(own), any(others)))
    return found


def bytes_sent(rank: int, ring: Ring) -> tuple[int, int, int]:
    """What a forward and a backward send, and the bytes of k and v."""
    size = dist.get_world_size()
    inputs, _ = ring.draw(2 * size * ring.piece)
    places = zigzag.places(rank, size, 2 * size * ring.piece)
    leaves = [x[:, places].requires_grad_() for x in inputs]
    sent = 0
    real = dist.batch_isend_irecv

    def counted(operations: Any) -> Any:
        nonlocal sent
        sent += sum(x.tensor.nbytes for x in operations if x.op is dist.isend)
        return real(operations)

    dist.batch_isend_irecv = counted
    try:
        out = ring_attention(*leaves, dist.group.WORLD, **ring.features())
        forward, sent = sent, 0
        out.sum().backward()
    finally:
        dist.batch_isend_irecv = real
    return forward, sent, sum(x.nbytes for x in leaves[1:])


def refusals(rank: int, calls: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[str]:
    """The errors of calls of `ring_attention` with (other arguments, other shapes)."""
    said = []
    for changes, shapes in calls:
        usual = shapes.get("all", (1, 4, 2, 8))
        tensors = {name: torch.randn(*shapes.get(name, usual)) for name in "qkv"}
        try:
            ring_attention(**{**tensors, "group": dist.group.WORLD, **changes})
            said.append("nothing was raised")
        except (TypeError, ValueError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said
