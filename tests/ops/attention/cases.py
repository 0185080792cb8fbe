"""Problems of attention for the tests: drawn from a seed, run on any backend, held to the rule."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from ops.backends import widest

import fastattn
from fastattn.backends import triton_runs
from fastattn.ops.common import dropout
from oracle import assert_close_to_reference

WITH_DOCUMENTS = ("reference", "torch", "triton")  # and with block masks
LAYOUTS = ("contiguous", "heads first", "expanded", "sliced", "last dimension strided")

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One problem; `draw` makes its tensors, `check` runs it.

    Shapes of broadcast tensors are told by four flags, 1 where a dimension of (batch, heads,
    seqlen_q, seqlen_k) is broadcast. `packed` makes it a call of attention_varlen, with the lengths
    (queries, keys) of each sequence; batch, seqlen_q and seqlen_k then follow from it.
    """

    seqlen_q: int = 0
    seqlen_k: int = 0
    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    head_dim_v: int | None = None
    causal: bool | str = False
    window: tuple[int, int] | None = None
    softmax_scale: float | None = None
    softcap: float = 0.0
    bias: tuple[int, int, int, int] | None = None
    sink: bool = False
    in_float32: bool = False  # bias and sink, instead of in dtype
    mask: tuple[int, int, int, int] | None = None
    alibi: str | None = None  # "heads" or "batch"
    lengths: bool = False
    documents: str | None = None  # "sorted" or "scattered"
    block_mask: tuple[int, int] | None = None  # the tile
    dropout_p: float = 0.0
    fp32_precision: str = "ieee"
    deterministic: bool = True
    packed: tuple[tuple[int, int], ...] | None = None
    used: bool = False  # seqused_q and seqused_k, drawn
    tail: int = 0  # tokens behind the last packed sequence
    layout: str = "contiguous"  # of q, k and v
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0

    def sizes(self) -> tuple[int, int, int]:
        """Batch and the lengths of queries and keys, of a packed call the longest ones."""
        if self.packed is None:
            return self.batch, self.seqlen_q, self.seqlen_k
        longest = (max((pair[side] for pair in self.packed), default=0) for side in (0, 1))
        return len(self.packed), *longest

    def draw(self) -> Problem:
        g = torch.Generator().manual_seed(self.seed)
        batch, seqlen_q, seqlen_k = self.sizes()
        full = batch, self.heads, seqlen_q, seqlen_k

        def uniform(*shape: int) -> torch.Tensor:
            return torch.rand(*shape, generator=g)

        def integers(low: int, high: int, *shape: int) -> torch.Tensor:
            return torch.randint(low, high, shape, generator=g)

        def normal(*shape: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.randn(*shape, generator=g).to(dtype).to(self.device)

        def broadcast(flags: tuple[int, int, int, int]) -> list[int]:
            return [1 if one else n for one, n in zip(flags, full)]

        def tokens(side: int, heads: int, width: int) -> torch.Tensor:
            if self.layout == "expanded":
                return normal(*self.tokens(side), 1, width).expand(*self.tokens(side), heads, width)
            x = normal(*self.tokens(side), heads, width)
            return laid_out(x, self.layout)

        width_v = self.head_dim if self.head_dim_v is None else self.head_dim_v
        problem = Problem(
            {
                "q": tokens(0, self.heads, self.head_dim),
                "k": tokens(1, self.kv_heads, self.head_dim),
                "v": tokens(1, self.kv_heads, width_v),
            },
            {
                "causal": self.causal, "window": self.window, "softmax_scale": self.softmax_scale,
                "softcap": self.softcap, "dropout_p": self.dropout_p,
                "fp32_precision": self.fp32_precision, "deterministic": self.deterministic,
            },
        )  # fmt: skip
        options = problem.options
        added = torch.float32 if self.in_float32 else self.dtype
        if self.bias is not None:
            problem.tensors["bias"] = normal(*broadcast(self.bias), dtype=added)
        if self.sink:
            problem.tensors["sink"] = normal(self.heads, dtype=added)
        if self.mask is not None:
            options["mask"] = (uniform(*broadcast(self.mask)) > 0.4).to(self.device)
        if self.alibi is not None:
            shape = (self.heads,) if self.alibi == "heads" else (batch, self.heads)
            options["alibi_slopes"] = (0.5 * uniform(*shape)).to(self.device)
        if self.lengths:
            options["key_lengths"] = integers(0, seqlen_k + 1, batch).to(self.device)
        if self.documents is not None:
            ids = [integers(0, 3, *self.tokens(side)) for side in (0, 1)]
            if self.documents == "sorted":
                ids = [x.sort(-1).values for x in ids]
            options["document_ids"] = tuple(x.to(self.device) for x in ids)
        if self.block_mask is not None:
            # Of a third of the tiles nothing is seen, of one all, of one a random half.
            tile_q, tile_k = self.block_mask
            shape = (-(-seqlen_q // tile_q), -(-seqlen_k // tile_k))
            kind = integers(0, 3, batch, self.heads, *shape)
            kind = kind.repeat_interleave(tile_q, -2).repeat_interleave(tile_k, -1)
            kind = kind[..., :seqlen_q, :seqlen_k]
            table = (kind == 1) | ((kind == 2) & (uniform(*full) > 0.5))
            problem.blocks = table.to(self.device)
            options["block_mask"] = fastattn.BlockMask.from_predicate(
                lambda b, h, i, j: problem.blocks[b, h, i, j],
                *full,
                block_size=self.block_mask,
                device=self.device,
            )
        if self.packed is not None:
            for side, name in enumerate("qk"):
                lengths = torch.tensor([pair[side] for pair in self.packed], dtype=torch.int32)
                cu = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
                problem.packing[f"cu_seqlens_{name}"] = cu.to(self.device)
                if self.used:
                    used = (uniform(batch) * (lengths + 1)).int()
                    problem.packing[f"seqused_{name}"] = used.to(self.device)
        problem.dout = normal(*self.tokens(0), self.heads, width_v)
        shape = (
            (self.heads, *self.tokens(0))
            if self.packed is not None
            else (batch, self.heads, seqlen_q)
        )
        problem.dlse = normal(*shape, dtype=torch.float32)
        return problem

    def tokens(self, side: int) -> tuple[int, ...]:
        """The leading dimensions of q (side 0) or k and v (side 1)."""
        if self.packed is None:
            return self.batch, (self.seqlen_q, self.seqlen_k)[side]
        return (sum(pair[side] for pair in self.packed) + self.tail,)


@dataclass
class Problem:
    """The data of a case."""

    tensors: dict[str, torch.Tensor]  # those with a gradient: q, k, v, bias, sink
    options: dict[str, Any]  # the other features, as the public function takes them
    packing: dict[str, torch.Tensor] = field(default_factory=dict)  # cu_seqlens and seqused
    blocks: torch.Tensor | None = None  # what the block mask shows, element by element
    dout: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    dlse: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def places(self, side: str) -> list[slice]:
        """Where the tokens that count of each packed sequence lie."""
        starts = self.packing[f"cu_seqlens_{side}"].tolist()
        used = self.packing.get(f"seqused_{side}")
        lengths = [b - a for a, b in itertools.pairwise(starts)] if used is None else used.tolist()
        return [slice(i, i + n) for i, n in zip(starts, lengths)]


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of `x` with other strides."""
    if layout == "heads first":
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "sliced":  # every other token of a wider tensor
        wide = torch.full((*x.shape[:-3], 2 * x.shape[-3], x.shape[-2], x.shape[-1] + 3), torch.nan)
        view = wide.to(x)[..., ::2, :, 1:-2]
        return view.copy_(x)
    if layout == "last dimension strided":
        return x.transpose(-3, -1).contiguous().transpose(-3, -1)
    return x


# --- the formula, independent of the package ------------------------------------------------------


def formula(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool | str = False,
    window: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
    document_ids: Pair | None = None,
    blocks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain PyTorch in the inputs' dtype; `blocks` and `kept` are boolean matrices."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.permute(0, 2, 1, 3) for x in (q, k, v))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    i = torch.arange(seqlen_q, device=q.device).unsqueeze(1)
    j = torch.arange(seqlen_k, device=q.device)
    corner = seqlen_k - seqlen_q
    relative = j - i - (0 if causal == "top_left" else corner)  # to the causal diagonal

    left, right = window or (-1, -1)
    hidden = torch.zeros(q.shape[0], q.shape[1], seqlen_q, seqlen_k, dtype=torch.bool)
    hidden = hidden.to(q.device)
    if causal or right >= 0:
        hidden = hidden | (relative > (0 if causal else right))
    if left >= 0:
        hidden = hidden | (relative < -left)
    for shown in (mask, blocks):
        hidden = hidden if shown is None else hidden | ~shown
    if key_lengths is not None:
        hidden = hidden | (j >= key_lengths[:, None, None, None])
    if document_ids is not None:
        ids_q, ids_k = document_ids
        hidden = hidden | (ids_q[:, None, :, None] != ids_k[:, None, None, :])

    scores = (q * (1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale)) @ k.mT
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(q.dtype).reshape(-1, q.shape[1], 1, 1)
        scores = scores - slopes * (i + corner - j).abs()
    if bias is not None:
        scores = scores + bias.to(q.dtype)
    scores = scores.masked_fill(hidden, float("-inf"))
    if sink is not None:
        logit = sink.to(q.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, logit], -1)
    blind = (scores == float("-inf")).all(-1, keepdim=True)
    scores = scores.masked_fill(blind, 0.0)
    precise = scores if scores.dtype == torch.float64 else scores.float()
    lse = torch.logsumexp(precise, -1).masked_fill(blind.squeeze(-1), float("-inf"))
    p = torch.softmax(scores, -1).masked_fill(blind, 0.0)[..., :seqlen_k]
    if kept is not None:
        p = p.masked_fill(~kept, 0.0) / (1 - dropout_p)
    return (p @ v).permute(0, 2, 1, 3), lse


def formula_of(
    problem: Problem, kept: torch.Tensor | None, tensors: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`formula` on a problem's options and these tensors; a packed one sequence by sequence."""
    ours = "block_mask", "fp32_precision", "deterministic"
    options = {n: x for n, x in problem.options.items() if n not in ours}
    if not problem.packing:
        return formula(**tensors, **options, blocks=problem.blocks, kept=kept)
    q, k, v = (tensors[name] for name in "qkv")
    out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=q.dtype, device=q.device)
    lse = q.new_full(q.shape[1::-1], float("-inf"), dtype=precise_dtype(q.dtype))
    anchor = 0 * sum(x.nan_to_num(0, 0, 0).sum() for x in tensors.values())  # no gradient is None
    out = out + anchor
    matrices = {"bias": tensors.get("bias"), "mask": options.get("mask"), "blocks": problem.blocks,
                "kept": kept}  # fmt: skip
    for b, (rows, columns) in enumerate(zip(problem.places("q"), problem.places("k"))):
        n, m = rows.stop - rows.start, columns.stop - columns.start
        its = {name: sequence(x, b, n, m) for name, x in matrices.items()}
        its = options | {"sink": tensors.get("sink")} | its
        slopes, ids = options.get("alibi_slopes"), options.get("document_ids")
        if slopes is not None and slopes.dim() == 2:
            its["alibi_slopes"] = slopes[b : b + 1]
        if ids is not None:
            its["document_ids"] = ids[0][None, rows], ids[1][None, columns]
        its_out, its_lse = formula(q[None, rows], k[None, columns], v[None, columns], **its)
        index = torch.arange(rows.start, rows.stop, device=q.device)
        out = out.index_copy(0, index, its_out[0])
        lse = lse.index_copy(1, index, its_lse[0])
    return out, lse


def sequence(x: torch.Tensor | None, b: int, seqlen_q: int, seqlen_k: int) -> torch.Tensor | None:
    """What of a broadcastable (batch, heads, seqlen_q, seqlen_k) tensor belongs to sequence b."""
    if x is None:
        return None
    x = x if x.shape[0] == 1 else x[b : b + 1]
    x = x if x.shape[2] == 1 else x[:, :, :seqlen_q]
    return x if x.shape[3] == 1 else x[..., :seqlen_k]


def precise_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- ours against the formula ---------------------------------------------------------------------


def refusal(case: Case, backend: str) -> str | None:
    """What a backend that cannot run the case says, as a regular expression."""
    if backend == "triton":
        if case.dtype == torch.bfloat16 and triton_runs() == "interpreted":
            return "bfloat16 dots"
        return "float64" if case.dtype == torch.float64 else None
    if backend == "cuda":
        if case.dtype not in (torch.float16, torch.bfloat16):
            return "float16 and bfloat16"
        if max(case.head_dim, case.head_dim_v or 0) > 256:
            return "above 256"
        if case.documents:
            return "no documents"
        return "no block masks" if case.block_mask else None
    if backend == "gluon":
        return refusal_of_gluon(case)
    if backend == "torch":
        if 0 in case.tokens(0) + case.tokens(1):
            return "empty tensors"
        if case.softcap:
            return "ATen has no softcap"
        if case.sink:
            return "ATen has no attention sink"
        if case.packed is not None and case.device != "cpu":
            return "no packed sequences"
    return None


def refusal_of_gluon(case: Case) -> str | None:
    """What `refusal` says of that backend, in the order in which it asks."""
    width_v = case.head_dim if case.head_dim_v is None else case.head_dim_v
    reasons = {
        "float16 and bfloat16": case.dtype.itemsize != 2,
        "above 256": max(case.head_dim, width_v) > 256,
        "steps of 8": case.head_dim % 8 or width_v % 8,
        "empty tensor": 0 in case.tokens(0) + case.tokens(1),
        "no masks": case.mask,
        "no bias": case.bias,
        "no documents": case.documents,
        "no block masks": case.block_mask,
        "no dropout": case.dropout_p,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def runnable(case: Case, backend: str) -> Case:
    """The case without what is not in the backend: of `cuda` wide heads, documents, block masks."""
    if backend != "cuda":
        return case
    dtype = case.dtype if case.dtype.itemsize == 2 else widest(backend)
    widths = {"head_dim": min(case.head_dim, 256)}
    if case.head_dim_v is not None:
        widths["head_dim_v"] = min(case.head_dim_v, 256)
    return replace(case, **widths, dtype=dtype, documents=None, block_mask=None)


def call(
    case: Case, problem: Problem, backend: str | None, tensors: dict[str, torch.Tensor], **more: Any
) -> Any:
    """The public function on a problem's options and these tensors."""
    function = fastattn.attention if case.packed is None else fastattn.attention_varlen
    return function(**tensors, **problem.packing, **problem.options, backend=backend, **more)


def has_lse(case: Case, backend: str) -> bool:
    """Whether the backend returns the LSE; ATen does on a CPU, without a gradient."""
    if backend != "torch":
        return True
    same_width = case.head_dim_v in (None, case.head_dim)
    return case.device == "cpu" and not case.dropout_p and same_width


def check(case: Case, backend: str) -> dict[str, torch.Tensor | None]:
    """`backend` on `case` against float64 under the rule: its outputs and gradients, by name.

    A backend that does not do the case has to say so; there are no results then.
    """
    problem = case.draw()
    reason = refusal(case, backend)
    if reason is not None:
        try:
            call(case, problem, backend, problem.tensors)
        except fastattn.UnsupportedError as error:
            if reason in str(error):
                return {}
            raise AssertionError(f"expected the reason {reason!r}, got {error}") from error
        raise AssertionError(f"{backend} runs what it does not do: {reason}")

    kept = kept_weights(case, problem, backend)
    differentiable = backend != "torch"  # of ATen's LSE there is no gradient
    dlse = problem.dlse if differentiable else torch.zeros_like(problem.dlse)

    def ours(tensors: dict[str, torch.Tensor]) -> Any:
        torch.manual_seed(case.seed)
        if differentiable:
            return call(case, problem, backend, tensors, return_lse=True)
        out = call(case, problem, backend, tensors)
        if not has_lse(case, backend):
            return out, None
        with torch.no_grad():
            return out, call(case, problem, backend, tensors, return_lse=True)[1]

    def plain(tensors: dict[str, torch.Tensor]) -> Any:
        return formula_of(problem, kept, tensors)

    doubles = {name: x.double() for name, x in problem.tensors.items()}
    constant = ("bias",) if backend == "cuda" else ()  # of which it has no gradient
    actual = results(ours, poisoned(case, problem), problem.dout, dlse, constant)
    eager = results(plain, problem.tensors, problem.dout, dlse, constant)
    exact = results(plain, doubles, problem.dout, dlse, constant)
    grads = [x for name, x in exact.items() if name[0] == "d" and x is not None and x.numel()]
    terms = max((x.abs().max().item() for x in grads), default=0.0)
    ulps = units(case, backend)
    factors = {"max_factor": 3.0, "rms_factor": 2.0} if case.softcap else {}
    for name, value in actual.items():
        if value is not None:
            # A float32 parameter's gradient is made of the call's 16-bit tensors: it is held to what
            # that of a 16-bit parameter is, whose eager error does not vanish by chance.
            if name in ("dbias", "dsink") and case.in_float32:
                value = value.to(case.dtype)
            assert_close_to_reference(
                value,
                eager[name],
                exact[name],
                name=name,
                ulps=ulps[name == "lse"],
                terms=terms,
                **factors,
            )
    return actual


def units(case: Case, backend: str) -> tuple[int, int]:
    """Units in the last place that output and gradients, and the LSE, may be off by in any case."""
    # Terms that cancel are larger than what they leave: by dropout's factor, and with one key, where
    # dS = p (dP - delta) is all that the LSE's gradient leaves.
    grown = int(1 / (1 - case.dropout_p))
    if min((m for _, m in case.packed or [(0, case.seqlen_k)]), default=0) <= 2:
        grown *= 32
    if case.dtype == torch.float64:  # what it is compared to is no more exact than itself
        return 64 * grown, 64
    if backend == "torch" and case.device == "cpu":
        # ATen's fused kernel for the CPU computes its exponentials to 20 bits, 16 units of float32;
        # for 16-bit inputs to 14 bits, which the LSE, a float32, shows.
        return 32 * grown, 32 if case.dtype == torch.float32 else 1024
    # Sums of a few float32 terms, in another order than eager's, which may happen to be exact.
    return (64 * grown, 64) if case.dtype == torch.float32 else (4 * grown, 16)


def results(
    function: Any,
    tensors: dict[str, torch.Tensor],
    dout: torch.Tensor,
    dlse: torch.Tensor,
    constant: tuple[str, ...] = (),
) -> dict[str, torch.Tensor | None]:
    """`function(tensors) -> (out, lse)` and its gradients, by name, but of the `constant` ones."""
    leaves = {n: x.detach().requires_grad_(n not in constant) for n, x in tensors.items()}
    out, lse = function(leaves)
    outputs, cotangents = [out], [dout.to(out.dtype)]
    if lse is not None and lse.requires_grad:
        outputs.append(lse)
        cotangents.append(dlse.to(lse.dtype))
    torch.autograd.backward(outputs, cotangents)
    return {"out": out, "lse": lse} | {f"d{name}": x.grad for name, x in leaves.items()}


def poisoned(case: Case, problem: Problem) -> dict[str, torch.Tensor]:
    """The tensors with NaN and Inf in the padding, which must have no effect."""
    padding: dict[str, torch.Tensor] = {}
    if "key_lengths" in problem.options:
        place = torch.arange(case.seqlen_k, device=case.device)
        padding["k"] = place >= problem.options["key_lengths"][:, None]
    for side in "qk" if problem.packing else "":
        padding[side] = torch.ones(case.tokens("qk".index(side)), dtype=torch.bool)
        for place in problem.places(side):
            padding[side][place] = False
        padding[side] = padding[side].to(case.device)
    if "k" in padding:
        padding["v"] = padding["k"]
    tensors = dict(problem.tensors)
    for name, hidden in padding.items():
        value = float("inf") if name == "v" else float("nan")
        filled = tensors[name].masked_fill(hidden[..., None, None], value)
        tensors[name] = laid_out(filled, case.layout)
    return tensors


def kept_weights(case: Case, problem: Problem, backend: str) -> torch.Tensor | None:
    """(batch, heads, seqlen_q, seqlen_k), the weights that the call's dropout keeps.

    Our own backends draw one seed for a call. ATen drops as it likes; its choice is read off a call
    with the unit matrix as v, whose output is the matrix of the weights.
    """
    if not case.dropout_p:
        return None
    batch, seqlen_q, seqlen_k = case.sizes()
    torch.manual_seed(case.seed)
    if backend != "torch":
        seed = dropout.draw_seed(torch.device(case.device))
        return dropout.keep(seed, case.dropout_p, batch, case.heads, seqlen_q, seqlen_k)
    if not seqlen_k:
        return torch.ones(batch, case.heads, seqlen_q, 0, dtype=torch.bool, device=case.device)
    k = problem.tensors["k"]
    unit = torch.eye(seqlen_k, dtype=case.dtype, device=case.device)
    if not problem.packing:
        v = unit[None, :, None].expand(batch, seqlen_k, case.kv_heads, seqlen_k)
        weights = call(case, problem, backend, problem.tensors | {"v": v})
        return weights.transpose(1, 2) != 0
    v = k.new_zeros(*k.shape[:2], seqlen_k)
    for place in problem.places("k"):
        v[place] = unit[: place.stop - place.start, None]
    weights = call(case, problem, backend, problem.tensors | {"v": v})
    kept = weights.new_zeros(batch, case.heads, seqlen_q, seqlen_k, dtype=torch.bool)
    for b, place in enumerate(problem.places("q")):
        kept[b, :, : place.stop - place.start] = (weights[place] != 0).transpose(0, 1)
    return kept


def check_forward(case: Case, backend: str) -> None:
    """`check` without gradients, of a case that the backend does."""
    problem = case.draw()
    with torch.no_grad():
        ours = call(case, problem, backend, poisoned(case, problem), return_lse=True)
        eager = formula_of(problem, None, problem.tensors)
        exact = formula_of(problem, None, {n: x.double() for n, x in problem.tensors.items()})
    factors = {"max_factor": 3.0, "rms_factor": 2.0} if case.softcap else {}
    few = 32 if min(m for _, m in case.packed or [(0, case.seqlen_k)]) <= 2 else 1
    for name, ulps, *triple in zip(("out", "lse"), (4 * few, 16), ours, eager, exact):
        assert_close_to_reference(*triple, name=f"{name} of {case}", ulps=ulps, **factors)
