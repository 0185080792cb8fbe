"""accelerate on torch's transformer layers and attention."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from integrations.tiny import classes, random_, swapped

import fastattn
from fastattn.integrations import torch_nn
from fastattn.nn import transformer
from oracle import assert_close_to_reference

WIDTH, HEADS, LENGTH = 16, 4, 6


def results(
    model: torch.nn.Module, call: Callable[..., torch.Tensor], inputs: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Outputs in both modes, with autograd and without, and every gradient."""
    dtype = next(model.parameters()).dtype
    found: dict[str, torch.Tensor] = {}
    for training in (False, True):
        model.train(training)
        model.zero_grad()
        leaves = [
            x.to(dtype, copy=True).requires_grad_() if x.is_floating_point() else x for x in inputs
        ]
        out = call(model, *leaves)
        weights = torch.linspace(-1, 1, out.numel(), dtype=dtype, device=out.device)
        (out.flatten() * weights).sum().backward()
        found[f"output, {training=}"] = out.detach()
        for name, tensor in (*enumerate(leaves), *model.named_parameters()):
            if tensor.grad is not None:
                found[f"gradient of {name}, {training=}"] = tensor.grad
        with torch.no_grad():
            found[f"output without autograd, {training=}"] = call(model, *leaves)
    return found


def assert_accelerates(
    model: torch.nn.Module, call: Callable[..., torch.Tensor], *inputs: torch.Tensor
) -> fastattn.integrations.Report:
    """accelerate, hold the results to float64, and restore; returns accelerate's report."""
    reference = copy.deepcopy(model).double()
    exact, eager = results(reference, call, list(inputs)), results(model, call, list(inputs))
    were = classes(model)
    report = fastattn.accelerate(model)
    ours = results(model, call, list(inputs))
    assert ours.keys() == eager.keys()
    for name, result in ours.items():
        assert_close_to_reference(result, eager[name], exact[name], name=name)
    fastattn.verify(model)
    fastattn.restore(model)
    assert classes(model) == were
    return report


# --- torch's transformer -------------------------------------------------------------------------


def _transformer(**kwargs: Any) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # why there will be no nested tensors
        return random_(torch.nn.Transformer(WIDTH, HEADS, 2, 2, 24, 0.0, **kwargs), 0.3)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"batch_first": True},
        {"batch_first": True, "norm_first": True, "activation": "gelu"},
        {"norm_first": True, "bias": False, "activation": F.silu},
    ],
    ids=lambda options: ", ".join(options) or "default",
)
def test_a_transformer(kwargs: dict) -> None:
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])

    def call(model: torch.nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        hidden = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
        return model(*inputs, tgt_mask=causal, tgt_is_causal=True, **hidden)

    inputs = [
        torch.randn((2, n, WIDTH) if kwargs.get("batch_first") else (n, 2, WIDTH))
        for n in (7, LENGTH)
    ]
    report = assert_accelerates(_transformer(**kwargs), call, *inputs)
    assert swapped(report) == {
        "TransformerEncoderLayer": 2,
        "MultiheadAttention": 6,
        "LayerNorm": 12,
        "TransformerDecoderLayer": 2,
    }


@pytest.fixture
def ffn_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    ffn = transformer.ffn
    monkeypatch.setattr(transformer, "ffn", lambda *args: (calls.append(1), ffn(*args))[1])
    return calls


def test_swapped_linear_layers_are_fused_too(
    ffn_calls: list[int], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    if device != "cpu":
        pytest.skip("Linear is swapped only on a CPU")
    monkeypatch.setattr(torch_nn, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(torch_nn, "MIN_WEIGHTS", 1)
    model = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 24, dropout=0.0)
    assert swapped(fastattn.accelerate(model))["Linear"] == 2
    ffn_calls.clear()
    model(torch.randn(3, 2, WIDTH))
    assert ffn_calls == [1]


def test_a_hook_put_there_later_fires(ffn_calls: list[int]) -> None:
    model = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 24, dropout=0.0)
    fastattn.accelerate(model)
    seen: list[torch.Size] = []
    handle = model.linear1.register_forward_hook(lambda _, args, out: seen.append(out.shape))
    x = torch.randn(3, 2, WIDTH)
    ffn_calls.clear()
    hooked = model(x)
    assert (seen, ffn_calls) == ([(3, 2, 24)], [])
    handle.remove()
    torch.testing.assert_close(model(x), hooked)
    assert (len(seen), ffn_calls) == (1, [1])


def test_an_accelerated_layer_exports() -> None:
    model = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 24, batch_first=True).eval()
    fastattn.accelerate(model)
    x, longer = torch.randn(2, 5, WIDTH), torch.randn(2, 300, WIDTH)
    shapes = {"src": {1: torch.export.Dim.AUTO}}
    with torch.no_grad():
        exported = torch.export.export(model, (x,), dynamic_shapes=shapes).module()
        torch.testing.assert_close(exported(longer), model(longer))


def test_a_wrong_layer_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets(norm: Any, dropout: Any, branch: torch.Tensor, residual: torch.Tensor) -> Any:
        return norm(dropout(branch)), residual

    monkeypatch.setattr(transformer, "_add_and_norm", forgets)
    model = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 24)
    report = fastattn.accelerate(model)
    assert type(model) is torch.nn.TransformerEncoderLayer
    (left,) = (entry for entry in report.left if entry.class_name == "TransformerEncoderLayer")
    assert left.reason is not None and left.reason.startswith("output 0 is off")
    assert swapped(report) == {"MultiheadAttention": 1, "LayerNorm": 2}


# --- torch's attention ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs", [{}, {"batch_first": True, "bias": False}, {"kdim": 8, "vdim": 12}], ids=str
)
def test_attention(kwargs: dict) -> None:
    module = random_(torch.nn.MultiheadAttention(WIDTH, HEADS, **kwargs), 0.3)

    def call(module: torch.nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        return module(*inputs, need_weights=False)[0]

    sizes = WIDTH, kwargs.get("kdim", WIDTH), kwargs.get("vdim", WIDTH)
    report = assert_accelerates(module, call, *(torch.randn(3, 3, size) for size in sizes))
    assert swapped(report) == {"MultiheadAttention": 1}


@pytest.mark.parametrize("extra", ["add_bias_kv", "add_zero_attn"])
def test_attention_with_a_key_of_its_own_is_left(extra: str) -> None:
    module = torch.nn.MultiheadAttention(WIDTH, HEADS, **{extra: True})
    report = fastattn.accelerate(module)
    assert report.left[0].reason == "add_bias_kv and add_zero_attn append a key that no mask covers"
    assert type(module) is torch.nn.MultiheadAttention
