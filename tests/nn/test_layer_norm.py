"""LayerNorm and RMSNorm against torch's."""

from __future__ import annotations

import pytest
import torch
from nn.compare import assert_module_close

import fastattn

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
NAMES = ["LayerNorm", "RMSNorm"]
SHAPES = [
    ((3, 5, 16), 16),
    ((7,), 7),  # no leading dimension
    ((2, 3, 4, 5), (4, 5)),  # several normalised dimensions
    ((6, 1), 1),
    ((0, 8), 8),  # no row
]


def _pair(name: str, *args: object, **kwargs: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and torch's with the same random weights."""
    ours = getattr(fastattn.nn, name)(*args, **kwargs)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter)
    theirs = getattr(torch.nn, name)(*args, **kwargs)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def _sum_then_norm(norm: torch.nn.Module, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """What the fused residual addition is, and one tensor that holds both results."""
    total = x + residual
    return torch.stack([norm(total), total])


def _fused(norm: torch.nn.Module, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return torch.stack(norm(x, residual))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "normalized_shape"), SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_against_torch(
    name: str, shape: tuple[int, ...], normalized_shape: object, dtype: torch.dtype
) -> None:
    """Alone, and with a residual, which torch's is given as a sum."""
    ours, theirs = _pair(name, normalized_shape, dtype=dtype)
    x, residual = torch.randn(2, *shape, dtype=dtype)
    assert_module_close(ours, theirs, x)
    assert_module_close(ours, theirs, x, residual, call=_fused, call_theirs=_sum_then_norm)


@pytest.mark.parametrize("shape", [16, (4, 4)])
@pytest.mark.parametrize("name", NAMES)
def test_dropout_before_the_sum(name: str, shape: object) -> None:
    """As dropout of the input, the sum and the norm after each other; in eval mode too."""
    norm, _ = _pair(name, shape)
    norm.eval()
    x, residual = torch.randn(2, 64, *((16,) if shape == 16 else (4, 4)))
    out, stream = norm(x, residual, dropout_p=0.5)
    kept = (stream - residual).abs() > 1e-6
    assert 0.4 < kept.double().mean() < 0.6
    torch.testing.assert_close(stream, torch.where(kept, 2 * x, 0.0) + residual)
    torch.testing.assert_close(out, norm(stream))
    with pytest.raises(ValueError, match="give a residual"):
        norm(x, dropout_p=0.5)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("LayerNorm", {"bias": False}),
        ("LayerNorm", {"elementwise_affine": False}),
        ("LayerNorm", {"eps": 0.1}),
        ("RMSNorm", {"elementwise_affine": False}),
        ("RMSNorm", {"eps": 0.1}),
    ],
)
def test_options_against_torch(name: str, kwargs: dict) -> None:
    ours, theirs = _pair(name, 24, **kwargs)
    assert_module_close(ours, theirs, torch.randn(5, 24))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_default_eps_is_torchs(dtype: torch.dtype) -> None:
    x = 1e-4 * torch.randn(4, 16, dtype=dtype)  # small enough for eps to decide the result
    ours, theirs = _pair("RMSNorm", 16, dtype=dtype)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("name", NAMES)
def test_input_that_is_not_contiguous(name: str) -> None:
    def call(norm: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return norm(x.transpose(0, 2))

    ours, theirs = _pair(name, (4, 6))
    assert_module_close(ours, theirs, torch.randn(6, 4, 3), call=call)


@pytest.mark.parametrize("name", NAMES)
def test_several_dimensions_are_folded_without_a_copy(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    module = {"LayerNorm": "layer_norm", "RMSNorm": "rms_norm"}[name]
    original = getattr(fastattn, module)

    def spy(x: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        seen.append(x)
        return original(x, *args, **options)

    monkeypatch.setattr(f"fastattn.nn.{module}.{module}", spy)
    x = torch.randn(2, 3, 4, 5)
    getattr(fastattn.nn, name)((4, 5))(x)
    assert seen[0].shape == (2, 3, 20)
    assert seen[0].data_ptr() == x.data_ptr()


@pytest.mark.parametrize("shape", [16, (4, 4)])
@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_a_graph_break(name: str, shape: object) -> None:
    ours, theirs = _pair(name, shape)
    x, residual = torch.randn(2, 3, *((16,) if shape == 16 else (4, 4)))
    compiled = torch.compile(_fused, fullgraph=True, backend="aot_eager")
    assert_module_close(ours, theirs, x, residual, call=compiled, call_theirs=_sum_then_norm)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("name", NAMES)
def test_autocast_gives_torchs_dtype(name: str, device: str) -> None:
    ours, theirs = _pair(name, 16)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 16, dtype=dtype)
        with torch.autocast(device, torch.bfloat16):
            result, expected = ours(x), theirs(x)
        assert result.dtype == expected.dtype
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(3, 15), (16, 3), (), (4, 0)])
def test_wrong_last_dimension(name: str, shape: tuple[int, ...]) -> None:
    for normalized_shape in (16, (2, 16)):
        norm = getattr(fastattn.nn, name)(normalized_shape)
        with pytest.raises(ValueError, match=r"must end in normalized_shape=.*got the shape"):
            norm(torch.zeros(shape))


@pytest.mark.parametrize("name", NAMES)
def test_residual_of_another_shape(name: str) -> None:
    for normalized_shape in (16, (2, 16)):
        norm = getattr(fastattn.nn, name)(normalized_shape)
        with pytest.raises(ValueError, match="residual"):
            norm(torch.zeros(3, 2, 16), torch.zeros(16))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("name", NAMES)
def test_nested_tensors_are_left_to_torch(name: str, layout: torch.layout) -> None:
    ours, theirs = _pair(name, 8)
    x = torch.nested.nested_tensor([torch.randn(n, 8) for n in (2, 5)], layout=layout)
    if name == "RMSNorm" and layout is torch.strided:  # torch's own has none
        with pytest.raises((NotImplementedError, RuntimeError)):
            theirs(x)
        return
    for row, expected in zip(ours(x).unbind(), theirs(x).unbind(), strict=True):
        assert torch.equal(row, expected)
    out, stream = ours(x, x)
    for row, total, one in zip(out.unbind(), stream.unbind(), x.unbind(), strict=True):
        assert torch.equal(total, one + one)
        torch.testing.assert_close(row, theirs(total))
    _, stream = ours(x, x, dropout_p=0.5)
    for total, one in zip(stream.unbind(), x.unbind(), strict=True):
        assert ((total == one) | (total == 3 * one)).all()
    with pytest.raises(ValueError, match="give a residual"):
        ours(x, dropout_p=0.5)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_offset_norm_of_a_nested_tensor(dtype: torch.dtype) -> None:
    norm = fastattn.nn.OffsetRMSNorm(8).to(dtype)
    torch.nn.init.normal_(norm.weight)
    rows = [torch.randn(n, 8, dtype=dtype) for n in (2, 5)]
    for row, x in zip(norm(torch.nested.nested_tensor(rows, layout=torch.jagged)).unbind(), rows):
        torch.testing.assert_close(row, norm(x))
