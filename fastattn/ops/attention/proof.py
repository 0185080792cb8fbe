"""How the kernels of attention prove themselves: small problems by kind (proving.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastattn import proving
from fastattn.ops.attention import problem as _problem
from fastattn.ops.attention import reference, registration
from fastattn.ops.attention.block_mask import BlockMask
from fastattn.ops.attention.call import UNBOUNDED, Extras
from fastattn.ops.attention.problem import AttentionProblem

# Longer than the tiles of 128, and no multiple of one.
QUERIES, KEYS = 141, 205
KV_HEADS = 2
DOCUMENT = 37  # tokens of a document
LEFT, RIGHT = 68, 28  # the sides of a window
DROPOUT, SEED = 0.25, 2**40 + 7  # a seed of two words


def family(problem: AttentionProblem) -> str | None:
    """All features that select a kernel; lengths and the number of heads are not among them."""
    if problem.is_empty:
        return None
    s = problem.settings
    tile = f"blocks {int(s.block_q)} x {int(s.block_k)}"
    facts = [
        *of_scores(problem),
        # The longest sequence of a packed call may be unknown while torch.compile traces.
        "one query" if not problem.packed and problem.seqlen_q == 1 else "",
        "top-left" if s.top_left else "",
        "dropout" if s.dropout_p else "",
        s.fp32_precision if problem.dtype == torch.float32 else "",
        *(tile if name == "blocks" else name for name in problem.given),
        *(f"{name} float32" for name in problem.wide),
        "lse" if problem.return_lse else "",
        "with gradients" if problem.needs_grad else "",
        "in any order" if problem.needs_grad and not s.deterministic else "",
        "and of the bias" if problem.needs_bias_grad else "",
        "which has one row" if problem.needs_bias_grad and problem.bias_is_row else "",
    ]
    return ", ".join(filter(None, facts))


def of_scores(problem: AttentionProblem) -> list[str]:
    """The features that a call on a key-value cache has too."""
    s = problem.settings
    return [
        str(problem.dtype).removeprefix("torch."),
        f"head_dim {int(problem.head_dim)}, {int(problem.head_dim_v)}",
        f"{int(problem.group_size)} heads to a key",
        "left bound" if problem.bounded_left else "",
        "causal" if s.window_right == 0 else "right bound" if problem.bounded_right else "",
        "softcap" if s.softcap else "",
    ]


def inputs(problem: AttentionProblem, draw: Callable[..., torch.Tensor]) -> dict[str, Any]:
    """The tensors of a call of `attention`, or of `attention_varlen`, of the problem's kind."""
    heads, kv_heads = KV_HEADS * problem.group_size, KV_HEADS
    queries = 1 if not problem.packed and problem.seqlen_q == 1 else QUERIES
    head_dim, head_dim_v, given = problem.head_dim, problem.head_dim_v, problem.given

    def integers(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=problem.device)

    def dtype_of(name: str) -> torch.dtype:
        return torch.float32 if name in problem.wide else problem.dtype

    # (queries, keys) of each sequence; those of a call that is not packed have one length.
    lengths = (
        (queries, KEYS),
        (queries // 3, KEYS // 2) if problem.packed else (queries, KEYS),
    )
    of_q, of_k = (
        (sum(side),) if problem.packed else (len(side), side[0]) for side in zip(*lengths)
    )
    found: dict[str, Any] = {
        "q": draw(*of_q, heads, head_dim),
        "k": draw(*of_k, kv_heads, head_dim),
        "v": draw(*of_k, kv_heads, head_dim_v),
    }
    if problem.packed:
        for side, sizes in zip("qk", zip(*lengths)):
            found[f"cu_seqlens_{side}"] = integers(0, sizes[0], sum(sizes))
            found[f"max_seqlen_{side}"] = sizes[0]
    if "seqused_q" in given:
        found["seqused_q"] = integers(queries, queries // 4)
    if "seqused_k" in given:
        found["seqused_k"] = integers(KEYS - 7, KEYS // 3)
    if "key_lengths" in given:
        found["key_lengths"] = integers(KEYS - 7, KEYS // 3)
    if "q_documents" in given:
        found["document_ids"] = (
            integers(*(_document(i, n, m, problem) for n, m in lengths for i in range(n))),
            integers(*(j // DOCUMENT for n, m in lengths for j in range(m))),
        )
        if not problem.packed:
            found["document_ids"] = tuple(x.view(2, -1) for x in found["document_ids"])
    if "blocks" in given:
        found["block_mask"] = _block_mask(heads, queries, problem)
    if "mask" in given:
        found["mask"] = draw(2, heads, queries, KEYS) > -1.0
    if "bias" in given:
        rows = 1 if problem.bias_is_row else queries
        # A gradient is summed over what is broadcast.
        batch = 1 if problem.needs_bias_grad else 2
        found["bias"] = draw(batch, heads, rows, KEYS).to(dtype_of("bias"))
    if "sink" in given:
        found["sink"] = draw(heads).to(dtype_of("sink"))
    if "alibi_slopes" in given:
        found["alibi_slopes"] = draw(heads).float().abs() / 8
    if problem.dropout_p:
        found["dropout_seed"] = torch.tensor([SEED], device=problem.device)
    if problem.needs_grad:
        wanted = ["q", "k", "v", "sink", *(["bias"] if problem.needs_bias_grad else [])]
        for name in set(wanted) & found.keys():
            found[name].requires_grad_()
    return found


def _document(i: int, queries: int, keys: int, problem: AttentionProblem) -> int:
    """The document of query i: that of the key on its diagonal."""
    return (i if problem.settings.top_left else i + keys - queries) // DOCUMENT


def _block_mask(heads: int, queries: int, problem: AttentionProblem) -> BlockMask:
    """A band around the diagonal, of another width in every head."""
    s, shift = problem.settings, KEYS - queries
    return BlockMask.from_predicate(
        lambda b, h, i, j: (i + shift - j).abs() < LEFT * (h + 1), 1, heads, queries, KEYS,
        block_size=(s.block_q, s.block_k), device=problem.device,
    )  # fmt: skip


def options(problem: AttentionProblem) -> dict[str, Any]:
    """The other arguments of the call."""
    s = problem.settings
    left = LEFT if problem.bounded_left else UNBOUNDED
    right = min(s.window_right, RIGHT)
    causal: Any = "top_left" if s.top_left else right == 0
    return {
        "causal": causal,
        "window": (left, right) if left >= 0 or right > 0 else None,
        "softcap": s.softcap,
        "dropout_p": DROPOUT if s.dropout_p else 0.0,
        "fp32_precision": s.fp32_precision,
        "deterministic": s.deterministic,
    }


def kernel(
    problem: AttentionProblem, given: dict[str, Any], backend: str
) -> dict[str, torch.Tensor]:
    """The results by name, from a backend."""
    small, extras = _described(problem, given)
    tensors = given["q"], given["k"], given["v"], extras
    return _named(problem, registration.run_kernel(backend, True, small, *tensors))


def formula(problem: AttentionProblem, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The results by name, in the dtype of the tensors."""
    small, extras = _described(problem, given)
    q, k, v = given["q"], given["k"], given["v"]
    if extras.alibi_slopes is not None:
        extras = extras._replace(alibi_slopes=extras.alibi_slopes.to(q.dtype))
    return _named(problem, reference.formula(small, q, k, v, extras))


def _described(problem: AttentionProblem, given: dict[str, Any]) -> tuple[AttentionProblem, Extras]:
    """The small problem, and its tensors besides q, k and v."""
    features = {name: x for name, x in given.items() if name not in ("q", "k", "v")}
    seed = features.pop("dropout_seed", None)
    q, k, v = given["q"], given["k"], given["v"]
    check = _problem.check_varlen if problem.packed else _problem.check
    settings, extras = check(q, k, v, **features, **options(problem))
    small = AttentionProblem.of(q, k, v, extras, settings, return_lse=problem.return_lse)
    return small, extras._replace(dropout_seed=seed)


def _named(
    problem: AttentionProblem, results: tuple[torch.Tensor, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """(out, lse) by name, those that the call returns."""
    return dict(zip(("out", "lse") if problem.return_lse else ("out",), results))


PROOF = proving.Proof(family, inputs, kernel, formula)
