"""TransformerBlock against the plain formulas."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from nn import formulas
from nn.compare import assert_module_close
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.nn import Attention, FeedForward, KeyValueCache, LayerNorm, TransformerBlock
from fastattn.nn.transformer_block import PLACEMENTS

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
EMBED, HEADS, HIDDEN, LENGTH = 16, 4, 24, 6


def _block(**kwargs: object) -> TransformerBlock:
    """Ours with every parameter random, so that none could be left out unnoticed."""
    block = TransformerBlock(EMBED, HEADS, HIDDEN, **kwargs)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block


def _sum(block: TransformerBlock, x: torch.Tensor) -> torch.Tensor:
    branch, residual = block(x)
    return branch + residual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"causal": True},
        {"activation": "relu", "norm_eps": 0.1},
        {"bias": False, "causal": True},
        {"recompute": True},
    ],
    ids=str,
)
def test_against_the_formula(kwargs: dict, dtype: torch.dtype) -> None:
    block, x = _block(dtype=dtype, **kwargs), torch.randn(3, LENGTH, EMBED, dtype=dtype)
    assert_module_close(block, block, x, call=_sum, call_theirs=formulas.block)


class Stack(torch.nn.Module):
    """Blocks and a final norm, as the docstring of TransformerBlock writes them."""

    def __init__(self, layers: int, **kwargs: object) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(_block(**kwargs) for _ in range(layers))
        self.norm = LayerNorm(EMBED)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch, residual = x, None
        for block in self.blocks:
            branch, residual = block(branch, residual)
        out, _ = self.norm(branch, residual)
        return out

    def formula(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = formulas.block(block, x)
        return formulas.normalised(self.norm, x)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_residual_stream_over_several_layers(compiled: bool) -> None:
    stack = Stack(3, causal=True)

    def call(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return module(x)

    assert_module_close(
        stack,
        stack,
        torch.randn(2, LENGTH, EMBED),
        call=torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call,
        call_theirs=Stack.formula,
    )


def test_one_compilation_serves_every_length() -> None:
    block = _block(causal=True)
    compiled = torch.compile(_sum, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(block, torch.randn(2, 5, EMBED))
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (8, 13):
            x = torch.randn(2, length, EMBED)
            torch.testing.assert_close(compiled(block, x), _sum(block, x))


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_on_every_backend(backend: str) -> None:
    block = _block(causal=True)

    def call(block: TransformerBlock, x: torch.Tensor) -> torch.Tensor:
        with fastattn.use_backend(backend):
            return _sum(block, x)

    x = torch.randn(2, LENGTH, EMBED)
    assert_module_close(block, block, x, call=call, call_theirs=formulas.block)


def test_functional_transforms_see_through() -> None:
    block = _block(causal=True)
    parameters = dict(block.named_parameters())
    x = torch.randn(3, LENGTH, EMBED)

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        branch, residual = torch.func.functional_call(block, parameters, (x,))
        return (branch + residual).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x[:, None])
    loss(parameters, x).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(per_sample[name].sum(0), parameter.grad, rtol=1e-4, atol=1e-4)


def test_the_pair_adds_up_to_the_stream() -> None:
    first, second = _block(), _block()
    x = torch.randn(2, LENGTH, EMBED)
    branch, residual = second(*first(x))
    expected_branch, expected_residual = second(_sum(first, x))
    torch.testing.assert_close(branch + residual, expected_branch + expected_residual)


def test_key_lengths_hide_padding() -> None:
    block = _block()
    lengths = torch.tensor([6, 2])
    x = torch.randn(2, LENGTH, EMBED)
    branch, residual = block(x, key_lengths=lengths)
    alone = _sum(block, x[1:, :2])
    torch.testing.assert_close((branch + residual)[1:, :2], alone)


@torch.no_grad()
def test_the_cache_reaches_the_attention() -> None:
    block, x = _block(causal=True).eval(), torch.randn(2, LENGTH, EMBED)
    keys, values = torch.empty(2, 2, LENGTH, HEADS, EMBED // HEADS)
    cache = KeyValueCache(keys, values, torch.tensor([0, 0]))
    block(x[:, :-1], cache=cache)
    cache.lengths.add_(LENGTH - 1)
    last = _sum(block, x)[:, -1:]
    branch, residual = block(x[:, -1:], cache=cache)
    torch.testing.assert_close(branch + residual, last)


def test_softmax_scale() -> None:
    block = _block(softmax_scale=0.0)  # every key counts alike: the values' mean
    x = torch.randn(2, LENGTH, EMBED)
    branch, residual = block(x)
    values = block.norm1(x) @ block.attention.in_proj.weight[2 * EMBED :].T
    values = values + block.attention.in_proj.bias[2 * EMBED :]
    attended = block.attention.out_proj(values.mean(1, keepdim=True)).expand_as(x)
    torch.testing.assert_close(residual, x + attended)
    torch.testing.assert_close(branch, block.feed_forward(block.norm2(x + attended)))


def test_dropouts_stand_where_they_are_said_to() -> None:
    assert _dropouts(TransformerBlock(EMBED, HEADS, dropout=0.2)) == (0.2, 0.2, 0.2)
    block = TransformerBlock(EMBED, HEADS, dropout=0.2, attention_dropout=0.0)
    assert _dropouts(block) == (0.0, 0.2, 0.2)

    x = torch.randn(2, LENGTH, EMBED)
    _, residual = block.train()(x)
    zeros = residual == x
    assert 0.1 < zeros.float().mean() < 0.3, "dropout of the attention's branch"
    branch, _ = block(x)
    assert 0.1 < (branch == 0).float().mean() < 0.3, "dropout of the feed-forward's branch"
    torch.testing.assert_close(_sum(block.eval(), x), formulas.block(block, x))


def test_a_hook_on_the_dropout_sees_it_called() -> None:
    """The norm does its work unless somebody watches, or it is in eval mode by itself."""
    block = _block(dropout=0.5).train()
    x = torch.randn(2, LENGTH, EMBED)
    shares = []
    block.dropout.register_forward_hook(lambda _, __, out: shares.append((out == 0).float().mean()))
    block(x)
    assert len(shares) == 1
    assert 0.3 < shares[0] < 0.7
    block.dropout.eval()
    _, residual = block(x)
    assert (residual != x).all()


def _dropouts(block: TransformerBlock) -> tuple[float, float, float]:
    return block.attention.dropout, block.dropout.p, block.feed_forward.dropout.p


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_repeats_the_dropout(use_reentrant: bool) -> None:
    block = _block(dropout=0.3, causal=True).train()
    x = torch.randn(2, LENGTH, EMBED, requires_grad=True)

    def grads(run: Callable[..., torch.Tensor]) -> list[torch.Tensor | None]:
        block.zero_grad()
        x.grad = None
        torch.manual_seed(4)
        run(block, x).square().sum().backward()
        return [x.grad, *(p.grad for p in block.parameters())]

    stored = grads(_sum)
    repeated = grads(lambda b, x: checkpoint(_sum, b, x, use_reentrant=use_reentrant))
    for plain, checkpointed in zip(stored, repeated, strict=True):
        assert torch.equal(plain, checkpointed)


def test_autocast_keeps_float32_in_the_stream(device: str) -> None:
    block = _block()
    x = torch.randn(2, LENGTH, EMBED)
    expected = _sum(block, x)
    with torch.autocast(device, torch.bfloat16):
        branch, residual = block(x)
    assert (branch.dtype, residual.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(branch + residual, expected, rtol=0.05, atol=0.05)
    (branch + residual).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in block.parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_deepcopy_and_pickle(copied: Callable[[TransformerBlock], TransformerBlock]) -> None:
    options = {"norm": "rms_norm", "qk_norm": "head", "window": (2, 0), "gated": True}
    block = _block(causal=True, softmax_scale=0.3, activation="relu", recompute=True, **options)
    twin = copied(block)
    x = torch.randn(2, LENGTH, EMBED)
    assert torch.equal(_sum(twin, x), _sum(block, x))
    assert repr(twin) == repr(block)
    assert "window=(2, 0), qk_norm='head', softmax_scale=0.3" in repr(block)


def test_parts_and_repr() -> None:
    block = TransformerBlock(EMBED, HEADS, causal=True, bias=False, device="meta")
    assert [(name, type(child)) for name, child in block.named_children()] == [
        ("norm1", LayerNorm),
        ("attention", Attention),
        ("dropout", torch.nn.Dropout),
        ("norm2", LayerNorm),
        ("feed_forward", FeedForward),
    ]
    assert block.feed_forward.feedforward_dim == 4 * EMBED
    assert not block.feed_forward.recompute
    assert TransformerBlock(EMBED, HEADS, recompute=True).feed_forward.recompute
    assert not any("bias" in name for name, _ in block.named_parameters())
    assert all(p.is_meta for p in block.parameters())
    assert "causal=True, norm_placement='pre'" in repr(block)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_heads": 3}, "embed_dim=16 and num_heads=3"),
        ({"dropout": 1.5}, r"dropout must be in \[0, 1\), got 1.5"),
        ({"attention_dropout": -1.0}, "attention_dropout must be"),
        ({"activation": "tanh"}, "activation must be one of"),
        ({"feedforward_dim": -1}, "feedforward_dim must be positive"),
    ],
)
def test_constructor_refuses(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerBlock(**{"embed_dim": EMBED, "num_heads": HEADS, **kwargs})


def test_input_of_another_size() -> None:
    with pytest.raises(ValueError, match="must end in normalized_shape"):
        _block()(torch.randn(2, LENGTH, EMBED + 1))
    with pytest.raises(ValueError, match="residual"):
        _block()(torch.randn(2, LENGTH, EMBED), torch.randn(1, LENGTH, EMBED))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["layer_norm", "offset_rms_norm"])
@pytest.mark.parametrize("crosses", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_norm_placements_and_cross_attention(
    placement: str, crosses: bool, norm: str, dtype: torch.dtype
) -> None:
    block = _block(
        norm_placement=placement, cross_attention=crosses, norm=norm, causal=True, dtype=dtype
    )
    context = torch.randn(2, 4, EMBED, dtype=dtype)

    def call(block: TransformerBlock, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        branch, residual = block(x, context=context if crosses else None)
        assert (residual is None) == (placement == "post")
        total = branch if residual is None else branch + residual
        return total if crosses else total + 0 * context.sum()

    assert_module_close(
        block,
        block,
        torch.randn(2, LENGTH, EMBED, dtype=dtype),
        context,
        call=call,
        call_theirs=lambda b, x, context: formulas.block(b, x, context) + 0 * context.sum(),
    )


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_placements_over_two_layers(placement: str) -> None:
    first, second = (_block(norm_placement=placement) for _ in range(2))
    x = torch.randn(2, LENGTH, EMBED)
    branch, residual = second(*first(x))
    stream = branch if residual is None else branch + residual
    expected = formulas.block(second, formulas.block(first, x))
    torch.testing.assert_close(stream, expected, rtol=1e-4, atol=1e-4)


def test_post_norm_drops_both_branches() -> None:
    block = _block(norm_placement="post", dropout=1 - 1e-7).train()
    x = torch.randn(2, LENGTH, EMBED)
    expected = formulas.normalised(block.norm2, formulas.normalised(block.norm1, x))
    torch.testing.assert_close(block(x)[0], expected)


def test_the_context_lengths_and_mask_reach_the_cross_attention() -> None:
    block = _block(cross_attention=True)
    x, context = torch.randn(2, LENGTH, EMBED), torch.randn(2, 5, EMBED)
    lengths = torch.tensor([5, 2])
    seen = (torch.arange(5) < lengths[:, None])[:, None, None]

    def run(**hides: torch.Tensor) -> torch.Tensor:
        branch, residual = block(x, context=context, **hides)
        return branch + residual

    alone = block(x[1:], context=context[1:, :2])
    for hidden in (run(context_lengths=lengths), run(context_mask=seen)):
        torch.testing.assert_close(hidden[1:], alone[0] + alone[1])
