"""The table of docs/features.md, cell by cell: it says the same as the backends do.

A cell is what a backend answers for the call on a CPU and on a GPU, from the call's metadata; on
the device at hand the call is then run, and is right against float64 or refused for that reason.
Below it, the table of computed tiles in docs/attention.md.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ops.attention.cases import Case, call, check, formula, formula_of, results
from ops.cross_entropy import cases as losses
from ops.rotary import cases as rotations

import fastattn
from fastattn import backends
from fastattn.ops.attention import interface, problem
from fastattn.ops.attention.cache import interface as cache_interface
from fastattn.ops.attention.cache.problem import CacheProblem, describe
from fastattn.ops.attention.cache.stored import dequantised, quantised
from fastattn.ops.attention.problem import AttentionProblem
from fastattn.ops.cross_entropy import interface as loss_interface
from fastattn.ops.cross_entropy import problem as loss_problem
from fastattn.ops.linear_cross_entropy import interface as linear_loss_interface
from fastattn.ops.linear_cross_entropy import problem as linear_loss_problem
from fastattn.ops.rotary import interface as rotary_interface
from fastattn.ops.rotary import problem as rotary_problem

COLUMNS = ("triton", "torch", "reference")
FEATURES_PAGE = (Path(__file__).parents[1] / "docs" / "features.md").read_text(encoding="utf-8")
NO_SECOND = "ATen's fused attention has no second derivative"  # it says so in no metadata


@dataclasses.dataclass(frozen=True)
class Feature:
    """A row: the call's metadata, and a function that runs it on a backend and holds it to float64."""

    describe: Callable[[str], Any]  # device -> problem
    run: Callable[[str, str], None]  # (backend, device); raises UnsupportedError where refused
    refused: dict[str, str] = dataclasses.field(default_factory=dict)  # beyond the metadata
    table: tuple[backends.Backend, ...] = interface.BACKENDS
    case: Case | None = None  # where `run` checks its output and gradients


def described(case: Case, device: str, **more: Any) -> AttentionProblem:
    """The metadata of a case whose tensors require a gradient."""
    drawn = dataclasses.replace(case, device=device).draw()
    tensors = {name: x.requires_grad_() for name, x in drawn.tensors.items()}
    describe = problem.describe if case.packed is None else problem.describe_varlen
    return describe(**tensors, **drawn.packing, **drawn.options, **more)


def forward_and_backward(case: Case) -> Feature:
    """Output and gradients; of the LSE where the backend has one."""

    def run(backend: str, device: str) -> None:
        on_device = dataclasses.replace(case, device=device)
        drawn = on_device.draw()
        call(on_device, drawn, backend, drawn.tensors)  # where it is refused, `check` is content
        check(on_device, backend)

    return Feature(lambda device: described(case, device), run, case=case)


def with_lse(case: Case, gradient: bool) -> Feature:
    def describe(device: str) -> AttentionProblem:
        with torch.set_grad_enabled(gradient):
            return described(case, device, return_lse=True)

    def run(backend: str, device: str) -> None:
        drawn = dataclasses.replace(case, device=device).draw()
        doubles = {name: x.double() for name, x in drawn.tensors.items()}
        expected = results(lambda t: formula_of(drawn, None, t), doubles, drawn.dout, drawn.dlse)
        if gradient:
            actual = results(
                lambda t: call(case, drawn, backend, t, return_lse=True),
                drawn.tensors, drawn.dout, drawn.dlse,
            )  # fmt: skip
        else:
            actual = {"lse": call(case, drawn, backend, drawn.tensors, return_lse=True)[1]}
        for name, value in actual.items():
            torch.testing.assert_close(
                value.double(), expected[name].double(), atol=1e-5, rtol=1e-5
            )

    return Feature(describe, run)


def slope_gradient() -> Feature:
    case = Case(5, 7, alibi="heads")

    def tensors(device: str, dtype: torch.dtype = torch.float32) -> Any:
        drawn = dataclasses.replace(case, device=device).draw()
        slopes = drawn.options.pop("alibi_slopes").to(dtype).requires_grad_()
        return drawn, [drawn.tensors[name].to(dtype) for name in "qkv"], slopes

    def describe(device: str) -> AttentionProblem:
        _, qkv, slopes = tensors(device)
        return problem.describe(*qkv, alibi_slopes=slopes)

    def run(backend: str, device: str) -> None:
        drawn, qkv, slopes = tensors(device)
        out = fastattn.attention(*qkv, alibi_slopes=slopes, backend=backend)
        (actual,) = torch.autograd.grad(out, slopes, drawn.dout)
        _, qkv, slopes = tensors(device, torch.float64)
        out, _ = formula(*qkv, alibi_slopes=slopes)
        (expected,) = torch.autograd.grad(out, slopes, drawn.dout.double())
        torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)

    return Feature(describe, run)


def second_derivative(case: Case) -> Feature:
    def of_gradient(function: Any, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        out = function(leaves)
        grads = torch.autograd.grad(out.square().sum(), list(leaves.values()), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves["q"])[0]

    def run(backend: str, device: str) -> None:
        drawn = dataclasses.replace(case, device=device).draw()
        try:
            actual = of_gradient(lambda t: call(case, drawn, backend, t), drawn.tensors)
        except RuntimeError as error:
            if "is not implemented" not in str(error):
                raise
            raise fastattn.UnsupportedError(NO_SECOND) from error
        doubles = {name: x.double() for name, x in drawn.tensors.items()}
        expected = of_gradient(lambda t: formula_of(drawn, None, t)[0], doubles)
        torch.testing.assert_close(actual.double(), expected, atol=1e-4, rtol=1e-4)

    return Feature(lambda device: described(case, device), run, {"torch": NO_SECOND})


def transforms(case: Case) -> Feature:
    """grad, vmap and jvp of torch.func."""

    def describe(device: str) -> AttentionProblem:
        return dataclasses.replace(described(case, device), transformed=True)

    def run(backend: str, device: str) -> None:
        drawn = dataclasses.replace(case, device=device).draw()

        def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return fastattn.attention(q, k, v, **drawn.options, backend=backend)

        def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return formula(q, k, v, causal=case.causal)[0]

        def transformed(function: Any, dtype: torch.dtype) -> list[torch.Tensor]:
            q, k, v = (drawn.tensors[name].to(dtype) for name in "qkv")
            return [
                torch.func.grad(lambda q: function(q, k, v).square().sum())(q),
                torch.func.vmap(lambda q: function(q, k, v))(torch.stack([q, 2 * q])),
                torch.func.jvp(lambda q: function(q, k, v), (q,), (torch.ones_like(q),))[1],
            ]

        actual, expected = transformed(ours, torch.float32), transformed(plain, torch.float64)
        for x, exact in zip(actual, expected, strict=True):
            torch.testing.assert_close(x.double(), exact, atol=1e-5, rtol=1e-5)

    return Feature(describe, run)


@dataclasses.dataclass(frozen=True)
class CacheCase:
    """Two sequences of 5 and 11 keys in a cache of 21, two queries each; the flags add features."""

    paged: bool = False
    chosen_rows: bool = False
    left_padding: bool = False
    appending: bool = False
    rotary: bool = False
    stored: torch.dtype | None = None

    def draw(self, device: str) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
        g = torch.Generator().manual_seed(0)
        q, new_k, new_v = (torch.randn(2, 2, n, 16, generator=g) for n in (4, 2, 2))
        caches = [torch.randn(2, 21, 2, 16, generator=g) for _ in range(2)]
        for cache in caches:  # what does not count must have no effect
            cache[0, 5:], cache[1, 11:] = torch.nan, torch.nan
            if self.left_padding:
                cache[0, :2] = torch.nan
        options: dict[str, torch.Tensor] = {}
        if self.paged:
            page_of = torch.randperm(14, generator=g)
            caches = [x.reshape(14, 3, 2, 16)[page_of.argsort()] for x in caches]
            options["block_table"] = page_of.view(2, 7)
        if self.chosen_rows:
            caches = [torch.stack([x[1], torch.full_like(x[0], torch.nan), x[0]]) for x in caches]
            options["cache_indices"] = torch.tensor([2, 0])
        if self.left_padding:
            options["cache_starts"] = torch.tensor([2, 0])
        if self.appending:
            options |= {"k": new_k, "v": new_v}
        if self.stored is not None:
            scale = torch.tensor([0.03, 0.04])
            caches = [quantised(x, scale, self.stored) for x in caches]
            options |= {"k_scale": scale, "v_scale": scale}
        if self.rotary:
            angles = torch.randn(30, 4, generator=g)
            options |= {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
        tensors = (q, *caches, torch.tensor([5, 11]))
        return tuple(x.to(device) for x in tensors), {n: x.to(device) for n, x in options.items()}

    def describe(self, device: str) -> CacheProblem:
        tensors, options = self.draw(device)
        return describe(*tensors, **options)

    def run(self, backend: str, device: str) -> None:
        (q, k_cache, v_cache, lengths), options = self.draw(device)
        places = [[self.place(b, j, options) for j in range(21)] for b in range(2)]
        held = k_cache, v_cache
        if self.stored is not None:
            held = tuple(dequantised(x, options["k_scale"], torch.float32) for x in held)
        old = [
            [torch.stack([cache[place] for place in places[b][: lengths[b]]]) for b in range(2)]
            for cache in held
        ]
        out = fastattn.attention_with_kv_cache(
            q, k_cache, v_cache, lengths, backend=backend, **options
        )
        for b, n in enumerate(lengths.tolist()):
            query, keys, values = q[b], old[0][b], old[1][b]
            if self.appending:
                new_k, new_v = options["k"][b], options["v"][b]
                if self.rotary:
                    query, new_k = self.rotated(query, n, options), self.rotated(new_k, n, options)
                keys, values = torch.cat([keys, new_k]), torch.cat([values, new_v])
                for t in range(2):
                    torch.testing.assert_close(k_cache[places[b][n + t]], new_k[t].float())
                    assert torch.equal(v_cache[places[b][n + t]], new_v[t])
            start = int(options["cache_starts"][b]) if self.left_padding else 0
            parts = (x[None].double() for x in (query, keys[start:], values[start:]))
            expected, _ = formula(*parts, causal=True)
            torch.testing.assert_close(out[b : b + 1].double(), expected, atol=1e-5, rtol=1e-5)

    def place(self, b: int, j: int, options: dict[str, torch.Tensor]) -> tuple[int, int]:
        """Row and slot of the caches in which key j of sequence b lies."""
        if self.paged:
            return int(options["block_table"][b, j // 3]), j % 3
        return int(options["cache_indices"][b]) if self.chosen_rows else b, j

    @staticmethod
    def rotated(x: torch.Tensor, first: int, options: dict[str, torch.Tensor]) -> torch.Tensor:
        """x (seqlen, heads, 16) with its columns 0-3 and 4-7 as complex numbers, turned."""
        turn = torch.complex(options["rotary_cos"].double(), options["rotary_sin"].double())
        turn = turn[first : first + len(x), None]
        turned = torch.complex(x[..., :4].double(), x[..., 4:8].double()) * turn
        return torch.cat([turned.real, turned.imag, x[..., 8:].double()], -1)


def of_loss(case: losses.Case) -> Feature:
    """Of cross_entropy, or of linear_cross_entropy if the case has features."""

    def describe(device: str) -> Any:
        on_device = dataclasses.replace(case, device=device)
        inputs, (targets, weight) = on_device.inputs(), on_device.others()
        leaves = {name: x.requires_grad_() for name, x in inputs.items()}
        if case.features is None:
            return loss_problem.describe(**leaves, targets=targets, weight=weight, **case.options)
        return linear_loss_problem.describe(
            **leaves, targets=targets, class_weight=weight, **case.options
        )

    def run(backend: str, device: str) -> None:
        on_device = dataclasses.replace(case, device=device)
        on_device.ours(backend)(**on_device.inputs())  # where it is refused
        losses.check(on_device, backend)

    op = loss_interface if case.features is None else linear_loss_interface
    return Feature(describe, run, table=op.BACKENDS)


def turned(case: rotations.Case) -> Feature:
    def describe(device: str) -> Any:
        tensors = dataclasses.replace(case, device=device).inputs()
        given = {n: x.requires_grad_() if n in "qk" else x for n, x in tensors.items()}
        return rotary_problem.describe(**given, **case.options)

    def run(backend: str, device: str) -> None:
        rotations.check(dataclasses.replace(case, device=device), backend)

    return Feature(describe, run, table=rotary_interface.BACKENDS)


def cached(**flags: bool) -> Feature:
    case = CacheCase(**flags)
    return Feature(case.describe, case.run, table=cache_interface.BACKENDS)


ALL_OF_A_LOSS = losses.OPTIONS["everything"]
FEATURES = {
    "float32": forward_and_backward(Case(5, 7)),
    "float16": forward_and_backward(Case(5, 7, dtype=torch.float16)),
    "bfloat16": forward_and_backward(Case(5, 7, dtype=torch.bfloat16)),
    "float64": forward_and_backward(Case(5, 7, dtype=torch.float64)),
    "grouped-query heads": forward_and_backward(Case(5, 7, heads=4, kv_heads=2)),
    "head_dim 512": forward_and_backward(Case(3, 5, batch=1, heads=1, kv_heads=1, head_dim=512)),
    "v of another head_dim": forward_and_backward(Case(5, 7, head_dim=24, head_dim_v=40)),
    "causal, bottom-right": forward_and_backward(Case(5, 7, causal=True)),
    "causal, top-left": forward_and_backward(Case(5, 7, causal="top_left")),
    "window": forward_and_backward(Case(9, 9, window=(2, 1))),
    "softcap": forward_and_backward(Case(5, 7, softcap=2.0)),
    "ALiBi": forward_and_backward(Case(5, 7, alibi="batch")),
    "gradient of ALiBi's slopes": slope_gradient(),
    "bias and its gradient": forward_and_backward(Case(5, 7, bias=(1, 0, 0, 0))),
    "sink and its gradient": forward_and_backward(Case(5, 7, sink=True)),
    "boolean mask": forward_and_backward(Case(5, 7, mask=(0, 1, 0, 0))),
    "key lengths": forward_and_backward(Case(5, 7, lengths=True)),
    "documents": forward_and_backward(Case(9, 9, documents="sorted")),
    "block mask": forward_and_backward(Case(20, 20, block_mask=(16, 16))),
    "dropout": forward_and_backward(Case(5, 9, dropout_p=0.3)),
    "packed sequences": forward_and_backward(Case(packed=((5, 7), (3, 2)), causal=True)),
    "LSE": with_lse(Case(5, 7), gradient=False),
    "gradient of the LSE": with_lse(Case(5, 7), gradient=True),
    "second derivative": second_derivative(Case(3, 4, causal=True)),
    "`torch.func`, forward-mode": transforms(Case(3, 4, causal=True)),
    "KV cache (it has no gradient)": cached(),
    "KV cache: pages": cached(paged=True),
    "KV cache: chosen rows": cached(chosen_rows=True),
    "KV cache: left padding": cached(left_padding=True),
    "KV cache: appending": cached(paged=True, appending=True),
    "KV cache: rotary": cached(appending=True, rotary=True),
    "KV cache: int8": cached(stored=torch.int8),
    "KV cache: float8_e4m3fn": cached(stored=torch.float8_e4m3fn),
    "rotary embedding": turned(rotations.Case(rotary_dim=8)),
    "rotary embedding: norm of the heads": turned(rotations.Case(interleaved=True, norms="qk")),
    "cross-entropy": of_loss(losses.Case((5,), 9, weighted=True, options=ALL_OF_A_LOSS)),
    "linear cross-entropy": of_loss(
        losses.Case((5,), 9, 16, bias=True, weighted=True, options=ALL_OF_A_LOSS)
    ),
}  # fmt: skip


def features_table() -> dict[str, dict[str, tuple[str, str | None]]]:
    """{feature: {backend: (word, reason)}} of the table and the notes below it."""
    found = re.search(
        r"^\| feature \|.*\n\|[-|]+\|\n((?:\|.*\n)+)\n((?:- \([a-z]\) .*\n)+)", FEATURES_PAGE, re.M
    )
    assert found, "docs/features.md has no table with notes"
    notes = dict(re.findall(r"- \((\w)\) (.*)", found[2]))
    header = [name.strip("` ") for name in found[0].split("\n")[0].split("|")[2:-1]]
    table = {}
    for line in found[1].splitlines():
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        parsed = (re.fullmatch(r"(\w+)(?: \((\w)\))?", cell) for cell in cells)
        words = [(p[1], p[2] and notes[p[2]]) for p in parsed if p]
        table[name] = dict(zip(header, words, strict=True))
    return table


TABLE = features_table()


def elsewhere(described: Any, device: torch.device) -> Any:
    """The same problem on another device."""
    if isinstance(described, CacheProblem):
        moved = elsewhere(described.attention, device)
        return dataclasses.replace(described, attention=moved)
    return dataclasses.replace(described, device=device)


def as_usual(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backends answer as in a process where Triton interprets for a CPU, compiles for a GPU."""
    monkeypatch.setenv("TRITON_INTERPRET", str(int(device == "cpu")))


def found(
    feature: Feature, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, str | None]:
    """The cell, from what the backend answers on both kinds of device."""
    module = next(b.module for b in feature.table if b.name == backend)
    described = feature.describe(device)

    def answer(kind: str) -> str | None:
        as_usual(kind, monkeypatch)
        on_kind = elsewhere(described, torch.device(kind))
        declines = getattr(module, "unsupported", lambda problem: None)
        return feature.refused.get(backend) or declines(on_kind)

    cpu, gpu = answer("cpu"), answer("cuda")
    word = {(True, True): "yes", (True, False): "CPU", (False, True): "GPU", (False, False): "no"}
    return word[cpu is None, gpu is None], cpu or gpu


def test_table_has_every_feature() -> None:
    assert list(TABLE) == list(FEATURES)
    assert all(tuple(row) == COLUMNS for row in TABLE.values())


@pytest.mark.parametrize("backend", COLUMNS)
@pytest.mark.parametrize("name", FEATURES)
def test_cell(name: str, backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    feature = FEATURES[name]
    word, reason = found(feature, backend, device, monkeypatch)
    assert (word, reason) == TABLE[name][backend], f"the cell {name!r}, {backend}"
    as_usual(device, monkeypatch)
    if word in ("yes", {"cpu": "CPU", "cuda": "GPU"}[device]):
        feature.run(backend, device)
        return
    with pytest.raises(fastattn.UnsupportedError, match=re.escape(reason or "")):
        feature.run(backend, device)


# --- docs/attention.md's table of tiles (that the counts are right: test_tiles_visited.py) --------

DOCS = (Path(__file__).parents[1] / "docs" / "attention.md").read_text(encoding="utf-8")
SEQLEN, LENGTHS = 1024, (150, 106, 350, 18, 250, 150)
DOCUMENTS = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
LOCAL_AND_STRIDED = fastattn.BlockMask.from_predicate(
    lambda b, h, i, j: (j <= i) & ((i - j < 128) | (j % 512 < 64)), 1, 1, SEQLEN, SEQLEN
)
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"causal": True},
    "causal, window of 128 keys": {"causal": True, "window": (127, 0)},
    "causal, six packed documents": {"causal": True, "document_ids": DOCUMENTS[None]},
    "block mask, local and strided": {"block_mask": LOCAL_AND_STRIDED},
}


@pytest.mark.skipif(backends.triton_runs() != "interpreted", reason="counts in the interpreter")
@pytest.mark.parametrize("name", MASKS)
def test_tiles_in_the_docs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = importlib.import_module("fastattn.ops.attention.triton.fold")
    score_tile, computed = kernels.score_tile, []

    def counted(products: Any, *args: Any) -> Any:
        computed.append(products.handle.data.shape)
        return score_tile(products, *args)

    monkeypatch.setattr(kernels, "score_tile", counted)
    q = torch.randn(1, SEQLEN, 1, 16, dtype=torch.float16)
    fastattn.attention(q, q, q, **MASKS[name], backend="triton")
    ((rows, columns),) = set(computed)
    total = SEQLEN // rows * (SEQLEN // columns)
    assert f"| {name} | {rows} x {columns} | {len(computed)} of {total} |" in DOCS
