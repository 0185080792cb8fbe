"""The attention implementation "fastattn" of transformers, for any of its models."""

from __future__ import annotations

import importlib
import itertools
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import fastattn
from fastattn.integrations import huggingface
from fastattn.integrations.huggingface import NAME, attention_forward, register
from fastattn.integrations.huggingface import attention as face
from fastattn.integrations.huggingface.attention import make_mask
from oracle import assert_close_to_reference


def test_registered() -> None:
    register()  # twice is harmless
    assert AttentionInterface()[NAME] is attention_forward
    assert NAME in AttentionMaskInterface()


def test_an_old_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers puts another module in its place while it is imported.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    with pytest.raises(ImportError, match=r"needs transformers 5 or later; this is 4\.57\.1"):
        importlib.reload(huggingface)


def module(kv_groups: int = 1, is_causal: bool = True) -> Any:
    return SimpleNamespace(num_key_value_groups=kv_groups, is_causal=is_causal, training=False)


def tensors(
    device: str, seqlen_q: int, seqlen_k: int, kv_heads: int = 6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = torch.randn(2, 6, seqlen_q, 8, device=device)
    k, v = torch.randn(2, 2, kv_heads, seqlen_k, 8, device=device)
    return q, k, v


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k"),
    [
        (7, 7),
        (1, 7),  # decoding
        (5, 9),  # prefill into an empty static cache: its rest is not seen
    ],
)
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("is_causal", [None, True, False])
def test_as_sdpa_without_a_mask(
    device: str, seqlen_q: int, seqlen_k: int, kv_heads: int, is_causal: bool | None
) -> None:
    q, k, v = tensors(device, seqlen_q, seqlen_k, kv_heads)
    for causal, scaling in itertools.product((True, False), (None, 0.7)):
        host = module(6 // kv_heads, causal)
        arguments = {"scaling": scaling, "is_causal": is_causal}
        expected, _ = sdpa_attention_forward(host, q, k, v, None, **arguments)
        found, weights = attention_forward(host, q, k, v, None, **arguments)
        assert weights is None
        torch.testing.assert_close(found, expected)


def test_as_sdpa_with_a_mask(device: str) -> None:
    q, k, v = tensors(device, 5, 9, kv_heads=2)
    mask = torch.rand(2, 1, 5, 9, device=device) < 0.5
    mask[..., 0] = True
    expected, _ = sdpa_attention_forward(module(3), q, k, v, mask)
    found, _ = attention_forward(module(3), q, k, v, mask)
    torch.testing.assert_close(found, expected)


def test_a_query_that_sees_nothing_gives_zero(device: str) -> None:
    q, k, v = tensors(device, 3, 4)
    mask = torch.ones(2, 1, 3, 4, dtype=torch.bool, device=device)
    mask[1, :, 2] = False
    found, _ = attention_forward(module(), q, k, v, mask)
    assert torch.equal(found[1, 2], torch.zeros_like(found[1, 2]))
    assert found[1, 1].abs().min() > 0


def test_dropout(device: str) -> None:
    q, k, _ = tensors(device, 64, 64)
    ones = torch.ones_like(k)
    found, _ = attention_forward(module(), q, k, ones, None, dropout=0.5)
    # Kept weights are doubled: each output is 1 in the mean, and 1 exactly without dropout.
    assert found.mean().item() == pytest.approx(1, abs=0.1)
    assert found.std().item() > 0.1


def formula(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float = 8**-0.5,
    softcap: float = 0.0,
    bias: torch.Tensor | float = 0.0,
    seen: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
) -> torch.Tensor:
    """What a module of transformers computes in "eager": (batch, seqlen, heads, head_dim).

    But 0 for a query that sees nothing.
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + bias
    if seen is not None:
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    keys = scores.shape[-1]
    if sink is not None:
        scores = torch.cat([scores, sink.expand(*scores.shape[:-1], 1)], -1)
    weights = scores.softmax(-1)[..., :keys]
    if seen is not None:
        weights = weights * seen
    return (weights @ v).transpose(1, 2)


def distances(seqlen_q: int, seqlen_k: int, device: str) -> torch.Tensor:
    """How far behind the query a key lies, the last ones being beside each other."""
    rows = torch.arange(seqlen_k - seqlen_q, seqlen_k, device=device)[:, None]
    return rows - torch.arange(seqlen_k, device=device)


class TestFeatures:
    """Each argument against the formula, values and gradients, in float64."""

    def check(
        self, device: str, kwargs: Any, expected: Any, q_len: int = 7, k_len: int = 7
    ) -> None:
        """`expected(q, k, v)` is the formula; `kwargs` and it share tensors that want gradients."""
        qkv = [x.double() for x in tensors(device, q_len, k_len, kv_heads=2)]
        leaves = [x.requires_grad_() for x in (*qkv, *kwargs.pop("leaves", ()))]
        mask = kwargs.pop("attention_mask", None)
        causal = kwargs.pop("causal", False)
        found, _ = attention_forward(module(3, causal), *qkv, mask, **kwargs)
        wanted = expected(*qkv)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
        towards = torch.randn_like(wanted)
        ours = torch.autograd.grad(found, leaves, towards)
        theirs = torch.autograd.grad(wanted, leaves, towards)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)

    def test_softcap(self, device: str) -> None:
        self.check(device, {"softcap": 0.5}, lambda *x: formula(*x, softcap=0.5))

    def test_s_aux(self, device: str) -> None:
        sink = torch.randn(6, dtype=torch.float64, device=device)
        self.check(
            device,
            {"s_aux": sink, "leaves": [sink]},
            lambda *x: formula(*x, sink=sink[:, None, None]),
        )

    def test_sinks_per_query(self, device: str) -> None:
        sinks = torch.randn(2, 6, 7, 1, dtype=torch.float64, device=device)
        self.check(device, {"sinks": sinks, "leaves": [sinks]}, lambda *x: formula(*x, sink=sinks))

    @pytest.mark.parametrize("causal", [False, True])
    def test_position_bias(self, causal: bool, device: str) -> None:
        bias = torch.randn(1, 6, 7, 7, dtype=torch.float64, device=device)
        seen = distances(7, 7, device) >= 0 if causal else None
        self.check(
            device,
            {"position_bias": bias, "leaves": [bias], "causal": causal},
            lambda *x: formula(*x, bias=bias, seen=seen),
        )

    def test_position_bias_and_masks(self, device: str) -> None:
        bias = torch.randn(1, 6, 7, 7, dtype=torch.float64, device=device)
        added = torch.randn(2, 1, 1, 7, dtype=torch.float64, device=device)
        self.check(
            device,
            {"position_bias": bias, "attention_mask": added, "leaves": [bias, added]},
            lambda *x: formula(*x, bias=bias + added),
        )
        seen = torch.rand(2, 1, 7, 7, device=device) < 0.6
        seen[..., 0] = True
        self.check(
            device,
            {"position_bias": bias, "attention_mask": seen, "leaves": [bias]},
            lambda *x: formula(*x, bias=bias, seen=seen),
        )

    def test_position_bias_over_an_empty_static_cache(self, device: str) -> None:
        bias = torch.randn(1, 6, 5, 9, dtype=torch.float64, device=device)
        seen = torch.ones(5, 9, dtype=torch.bool, device=device).tril()
        kwargs = {"position_bias": bias, "causal": True}
        self.check(device, kwargs, lambda *x: formula(*x, bias=bias, seen=seen), 5, 9)

    @pytest.mark.parametrize(
        ("mask_dtype", "model_dtype"),
        [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)],
    )
    def test_an_additive_mask_of_another_dtype(
        self, mask_dtype: torch.dtype, model_dtype: torch.dtype, device: str
    ) -> None:
        q, k, v = (x.to(model_dtype) for x in tensors(device, 7, 7, kv_heads=2))
        added = torch.randn(2, 1, 7, 7, device=device).to(mask_dtype)
        found, _ = attention_forward(module(3), q, k, v, added)
        expected = formula(q.double(), k.double(), v.double(), bias=added.double())
        assert found.dtype == model_dtype
        eager = formula(q, k, v, bias=added.to(model_dtype))
        assert_close_to_reference(found, eager, expected)

    def test_a_mask_of_the_least_number(self, device: str) -> None:
        """transformers' additive masks hold it where a key is hidden."""
        seen = torch.rand(2, 1, 7, 7, device=device) < 0.6
        seen[..., 0] = True
        least = torch.finfo(torch.float64).min
        added = torch.zeros(seen.shape, dtype=torch.float64, device=device).masked_fill(
            ~seen, least
        )
        self.check(device, {"attention_mask": added}, lambda *x: formula(*x, seen=seen))

    @pytest.mark.parametrize("masked", [False, True])
    def test_a_window_comes_by_the_mask_alone(self, masked: bool, device: str) -> None:
        """As in "eager" and "sdpa": OLMoE passes one to layers that have none."""
        seen = distances(7, 7, device) >= 0
        kwargs: dict[str, Any] = {"sliding_window": 2, "causal": True}
        if masked:
            seen &= distances(7, 7, device) < 4
            kwargs["attention_mask"] = seen[None, None]
        self.check(device, kwargs, lambda *x: formula(*x, seen=seen))

    @pytest.mark.parametrize("additive", [False, True])
    @pytest.mark.parametrize("given", ["q", "q and k"])
    def test_packed_sequences_under_a_mask_that_does_not_know_of_them(
        self, given: str, additive: bool, device: str
    ) -> None:
        """GPT-OSS and ModernBERT make their masks without position_ids."""
        starts = torch.tensor([0, 3, 7, 7, 12], dtype=torch.int32, device=device)
        ids = torch.bucketize(torch.arange(14, device=device), starts[1:], right=True).view(2, 7)
        seen = (distances(7, 7, device) >= 0) & (distances(7, 7, device) < 3)
        mask = seen.expand(2, 1, 7, 7)
        packed = seen & (ids[:, :, None] == ids[:, None])[:, None]
        packed[1, :, 5:] = False  # behind the last sequence
        kwargs: dict[str, Any] = {"cu_seq_lens_q": starts, "attention_mask": mask, "causal": True}
        if given != "q":
            kwargs["cu_seq_lens_k"] = starts
        if additive:
            kwargs["attention_mask"] = torch.zeros_like(mask, dtype=torch.float64).masked_fill(
                ~mask, torch.finfo(torch.float64).min
            )
        self.check(device, kwargs, lambda *x: formula(*x, seen=packed))

    def test_packed_sequences_and_a_position_bias(self, device: str) -> None:
        starts = torch.tensor([0, 7, 10, 14], dtype=torch.int32, device=device)
        ids = torch.bucketize(torch.arange(14, device=device), starts[1:], right=True).view(2, 7)
        seen = (ids[:, :, None] == ids[:, None])[:, None] & (distances(7, 7, device) >= 0)
        bias = torch.randn(1, 6, 7, 7, dtype=torch.float64, device=device)
        self.check(
            device,
            {"cu_seq_lens_q": starts, "position_bias": bias, "leaves": [bias], "causal": True},
            lambda *x: formula(*x, bias=bias, seen=seen),
        )

    @pytest.mark.parametrize("ends", [[7], [3, 14], [10]])
    def test_few_packed_sequences(self, ends: list[int], device: str) -> None:
        """No more than rows: not the rows themselves, but what cu_seq_lens_q says."""
        starts = torch.tensor([0, *ends], dtype=torch.int32, device=device)
        ids = torch.bucketize(torch.arange(14, device=device), starts[1:], right=True)
        seen = (ids[:, None] == ids) & (ids < len(ends))

        def expected(*rows: torch.Tensor) -> torch.Tensor:
            one_row = [x.transpose(0, 1).flatten(1, 2)[None] for x in rows]
            return formula(*one_row, seen=seen).unflatten(1, (2, 7))[0]

        self.check(device, {"cu_seq_lens_q": starts}, expected)

    @pytest.mark.parametrize("given", ["q", "q and k", "all"])
    @pytest.mark.parametrize("sinks", [False, True])
    @pytest.mark.parametrize("causal", [False, True])
    def test_packed_sequences(self, causal: bool, sinks: bool, given: str, device: str) -> None:
        """Five sequences behind each other in two rows, one of them across both."""
        starts = torch.tensor([0, 2, 5, 9, 13, 14], dtype=torch.int32, device=device)
        kwargs: dict[str, Any] = {"cu_seq_lens_q": starts, "softcap": 2.0, "causal": causal}
        if given != "q":
            kwargs["cu_seq_lens_k"] = starts
        if given == "all":
            kwargs |= {"max_length_q": 4, "max_length_k": torch.tensor(4)}
        sink = None
        if sinks:
            sink = torch.randn(2, 6, 7, 1, dtype=torch.float64, device=device)
            kwargs |= {"sinks": sink, "leaves": [sink]}
        ids = torch.bucketize(torch.arange(14, device=device), starts[1:], right=True)
        seen = ids[:, None] == ids
        if causal:
            seen = seen.tril()

        def expected(*rows: torch.Tensor) -> torch.Tensor:
            one_row = [x.transpose(0, 1).flatten(1, 2)[None] for x in rows]
            flat = None if sink is None else sink.transpose(0, 1).flatten(1, 2)[None]
            return formula(*one_row, softcap=2.0, seen=seen, sink=flat).unflatten(1, (2, 7))[0]

        self.check(device, kwargs, expected)

    @pytest.mark.parametrize("masked", [False, True])
    def test_indices(self, masked: bool, device: str) -> None:
        indices = torch.rand(2, 7, 7, device=device).argsort(-1)[..., :3].int()
        indices[..., 0] = 0
        seen = torch.zeros(2, 7, 7, dtype=torch.bool, device=device)
        seen = seen.scatter(-1, indices.long(), True)[:, None]
        seen &= distances(7, 7, device) >= 0
        kwargs: dict[str, Any] = {"indices": indices, "causal": True}
        if masked:
            kwargs["attention_mask"] = distances(7, 7, device)[None, None] >= 0
        self.check(device, kwargs, lambda *x: formula(*x, seen=seen))

    def test_learned_queries(self, device: str) -> None:
        q, k, v = (x.double() for x in tensors(device, 5, 7, kv_heads=2))
        found, _ = attention_forward(module(3, False), q[:1], k, v, None)
        torch.testing.assert_close(found, formula(q[:1], k, v))


class TestPositionsThatRestart:
    """Packed sequences whose positions say where they begin."""

    ROWS = ((0, 1, 2, 3, 0, 1, 2), (4, 5, 0, 0, 1, 2, 0))  # the second begins inside of a text
    NUMBERS = ((1, 1, 1, 1, 2, 2, 2), (0, 0, 1, 2, 2, 2, 3))

    def rows(self, device: str, offset: int = 0) -> torch.Tensor:
        return torch.tensor(self.ROWS, device=device) + offset

    def packed(self, device: str) -> torch.Tensor:
        ids = torch.tensor(self.NUMBERS, device=device)
        return (ids[:, :, None] == ids[:, None])[:, None]

    def run(
        self, device: str, positions: torch.Tensor, mask: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        q, k, v = (x.double() for x in tensors(device, 7, 7, kv_heads=2))
        found, _ = attention_forward(module(3), q, k, v, mask, position_ids=positions, **kwargs)
        return found, (q, k, v)

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("offset", [0, 2])  # RoBERTa counts from 2
    def test_without_a_mask(self, causal: bool, offset: int, device: str) -> None:
        found, qkv = self.run(device, self.rows(device, offset), is_causal=causal)
        seen = self.packed(device)
        if causal:
            seen &= distances(7, 7, device) >= 0
        torch.testing.assert_close(found, formula(*qkv, seen=seen))

    @pytest.mark.parametrize("padding", [None, "none", "a hole"])
    def test_with_our_mask(self, padding: str | None, device: str) -> None:
        """Padding is counted as 0, inside of a text too: then the positions say nothing."""
        given = None if padding is None else torch.ones(2, 7, dtype=torch.bool, device=device)
        if padding == "a hole":
            given[0, 4] = False
        mask = make_mask(
            batch_size=2, q_length=7, kv_length=7, attention_mask=given, device=device,
            allow_is_causal_skip=False,
        )  # fmt: skip
        assert mask is not None
        found, qkv = self.run(device, self.rows(device), mask)
        seen = mask if padding == "a hole" else mask & self.packed(device)
        torch.testing.assert_close(found, formula(*qkv, seen=seen))

    def test_with_a_mask_of_the_user(self, device: str) -> None:
        """Branches of one prefix restart, and see it."""
        mask = (distances(7, 7, device) >= 0).expand(2, 1, 7, 7)
        found, qkv = self.run(device, self.rows(device), mask)
        torch.testing.assert_close(found, formula(*qkv, seen=mask))

    @pytest.mark.parametrize(
        "positions",
        [
            torch.arange(7).expand(2, 7),
            torch.tensor([0, 1, 2, 5, 6, 9, 10]).expand(2, 7),  # jumps
            torch.tensor([0, 1, 1, 1, 1, 2, 3]).expand(2, 7),  # an image at one position
            torch.zeros(2, 7, dtype=torch.int64),  # no positions
            torch.tensor([ROWS[0]]),  # not of this batch
            torch.tensor(ROWS[0]),
            torch.tensor(ROWS).expand(3, 2, 7),  # rotary of images: time, height, width
        ],
        ids=["one sequence", "jumps", "image", "constant", "one row", "flat", "three axes"],
    )
    def test_no_packing(self, positions: torch.Tensor, device: str) -> None:
        found, qkv = self.run(device, positions.to(device))
        torch.testing.assert_close(found, formula(*qkv, seen=distances(7, 7, device) >= 0))

    def test_not_behind_a_cache(self, device: str) -> None:
        q, k, v = tensors(device, 3, 7, kv_heads=2)
        mask = distances(3, 7, device)[None, None] >= 0
        positions = torch.tensor([[5, 0, 1]], device=device).expand(2, 3)
        found, _ = attention_forward(module(3), q, k, v, mask, position_ids=positions)
        torch.testing.assert_close(found, formula(q, k, v, seen=mask))

    @pytest.mark.parametrize("inference", [False, True])
    def test_read_once(self, inference: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A GPU is waited for only in the first layer, and when their owner has changed them."""
        reads: list[torch.Tensor] = []

        def spy(positions: torch.Tensor) -> torch.Tensor:
            reads.append(positions)
            return original(positions)

        original = face._numbers
        monkeypatch.setattr(face, "_numbers", spy)
        with torch.inference_mode(inference):
            positions = self.rows(device)
            for _ in range(3):
                self.run(device, positions)
            assert len(reads) == (3 if inference else 1)
            positions.copy_(torch.arange(7, device=device))
            found, qkv = self.run(device, positions)
        torch.testing.assert_close(found, formula(*qkv, seen=distances(7, 7, device) >= 0))

    def test_compiled(self, device: str) -> None:
        host = torch.nn.Module()
        function = torch.compile(
            lambda q, k, v, ids: attention_forward(host, q, k, v, None, position_ids=ids)[0],
            fullgraph=True,
            backend="aot_eager",
        )
        qkv = tensors(device, 7, 7, kv_heads=2)
        for positions in (self.rows(device), torch.arange(7, device=device).expand(2, 7)):
            expected, _ = attention_forward(module(3), *qkv, None, position_ids=positions)
            torch.testing.assert_close(function(*qkv, positions), expected)


class TestWhatCannotBeHonoured:
    @pytest.mark.parametrize(
        ("kwargs", "match"),
        [
            ({"head_mask": torch.ones(6)}, r"head_mask: .* a mask of heads"),
            ({"cache": object()}, r"cache: .* a paged cache"),
            ({"block_indices": torch.zeros(1)}, r"block_indices: .* sparse attention by blocks"),
            ({"output_attentions": True}, r"output_attentions: fastattn never forms"),
        ],
    )
    def test_arguments(self, device: str, kwargs: dict[str, Any], match: str) -> None:
        q, k, v = tensors(device, 7, 7)
        with pytest.raises(ValueError, match=match):
            attention_forward(module(), q, k, v, None, **kwargs)

    def test_the_same_arguments_when_they_say_nothing(self, device: str) -> None:
        q, k, v = tensors(device, 7, 7)
        expected, _ = attention_forward(module(), q, k, v, None)
        found, _ = attention_forward(
            module(), q, k, v, None, softcap=None, s_aux=None, output_attentions=False,
            sliding_window=7, position_ids=torch.arange(7, device=device)[None].expand(2, -1),
            head_mask=None, deterministic=True,
        )  # fmt: skip
        assert torch.equal(found, expected)
        rows = torch.tensor([0, 7, 14], device=device)
        found, _ = attention_forward(module(), q, k, v, None, cu_seq_lens_q=rows)
        torch.testing.assert_close(found, expected)

    def test_integer_masks(self, device: str) -> None:
        q, k, v = tensors(device, 7, 7)
        with pytest.raises(
            ValueError, match=r"attention_mask is torch\.int64; .* `mask\.bool\(\)`"
        ):
            mask = torch.ones(2, 1, 7, 7, dtype=torch.int64, device=device)
            attention_forward(module(), q, k, v, mask)

    def test_more_queries_than_keys(self, device: str) -> None:
        q, k, v = tensors(device, 7, 5)
        with pytest.raises(ValueError, match="key has 5 positions, query 7"):
            attention_forward(module(), q, k, v, None)


def test_gpt2_by_name(make_gpt2: Any, tokens: torch.Tensor) -> None:
    model = make_gpt2()
    expected = model(tokens).logits
    model.set_attn_implementation(NAME)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="output_attentions"):
        model(tokens, output_attentions=True)
    report = fastattn.accelerate(model)
    reason = {entry.name: entry.reason for entry in report.left}["transformer.h.0.attn"]
    assert reason == 'its config already says attn_implementation="fastattn"'
    fastattn.restore(model)
    assert model.config._attn_implementation == NAME
