"""The padding helpers as flash-attn 2.8 documents them."""

from __future__ import annotations

import inspect

import pytest
import torch

from fastattn.flash_attn import bert_padding

# (batch, seqlen): tokens, padding on either side, a hole, and a row of padding only
MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 0], [1, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
INDICES = [0, 1, 2, 7, 8, 10, 12, 13, 14]


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("index_first_axis", ["input", "indices"]),
        ("index_put_first_axis", ["values", "indices", "first_axis_dim"]),
        ("index_first_axis_residual", ["input", "indices"]),
        ("unpad_input", ["hidden_states", "attention_mask", "unused_mask"]),
        ("unpad_input_for_concatenated_sequences", ["hidden_states", "attention_mask_in_length"]),
        ("pad_input", ["hidden_states", "indices", "batch", "seqlen"]),
    ],
)
def test_signature(name: str, parameters: list[str]) -> None:
    signature = inspect.signature(getattr(bert_padding, name)).parameters
    assert list(signature) == parameters
    defaults = {p.name: p.default for p in signature.values() if p.default is not p.empty}
    assert defaults == ({"unused_mask": None} if name == "unpad_input" else {})


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("features", [(), (6,), (2, 3)], ids=str)
def test_unpad_and_back(features: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x = torch.randn(*MASK.shape, *features, device=device)
    mask = MASK.to(device)
    packed, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask.to(dtype))
    assert indices.tolist() == INDICES and indices.dtype == torch.int64
    assert torch.equal(packed, x.flatten(0, 1)[INDICES])
    assert cu_seqlens.tolist() == [0, 3, 5, 9, 9] and cu_seqlens.dtype == torch.int32
    assert longest == 4 and isinstance(longest, int)
    assert used.tolist() == [3, 2, 4, 0] and used.dtype == torch.int32
    padded = bert_padding.pad_input(packed, indices, *MASK.shape)
    assert torch.equal(padded, x * mask.view(*mask.shape, *(1 for _ in features)))


def test_places_that_are_kept_without_a_token(device: str) -> None:
    x = torch.randn(*MASK.shape, 3, device=device)
    unused = torch.zeros_like(MASK)
    unused[0, 3] = unused[3, 0] = unused[3, 1] = 1
    packed, indices, cu_seqlens, longest, used = bert_padding.unpad_input(
        x, MASK.to(device), unused.to(device)
    )
    assert indices.tolist() == sorted([*INDICES, 3, 15, 16])
    assert torch.equal(packed, x.flatten(0, 1)[indices])
    assert cu_seqlens.tolist() == [0, 4, 6, 10, 12] and longest == 4
    assert used.tolist() == [3, 2, 4, 0]


def test_several_samples_in_a_row(device: str) -> None:
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    x = torch.randn(3, 6, 4, device=device)
    packed, indices, cu_seqlens, longest = bert_padding.unpad_input_for_concatenated_sequences(
        x, lengths.to(device)
    )
    assert indices.tolist() == [*range(5), *range(6, 11), *range(12, 18)]
    assert torch.equal(packed, x.flatten(0, 1)[indices])
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16] and cu_seqlens.dtype == torch.int32
    assert longest == 6 and isinstance(longest, int)


def test_gradients() -> None:
    x = torch.randn(*MASK.shape, 3, dtype=torch.float64, requires_grad=True)
    packed, indices, *_ = bert_padding.unpad_input(x, MASK)
    weights = torch.randn_like(packed)
    (dx,) = torch.autograd.grad((packed * weights).sum(), x)
    expected = torch.zeros_like(x).flatten(0, 1)
    expected[INDICES] = weights
    assert torch.equal(dx, expected.view_as(x))

    packed = packed.detach().requires_grad_()
    padded = bert_padding.pad_input(packed, indices, *MASK.shape)
    weights = torch.randn_like(padded)
    (dpacked,) = torch.autograd.grad((padded * weights).sum(), packed)
    assert torch.equal(dpacked, weights.flatten(0, 1)[INDICES])


def test_second_derivatives() -> None:
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([4, 0, 3])

    def there_and_back(x: torch.Tensor) -> torch.Tensor:
        rows = bert_padding.index_first_axis(x, indices)
        return bert_padding.index_put_first_axis(rows * rows, indices, 6)

    assert torch.autograd.gradcheck(there_and_back, x)
    assert torch.autograd.gradgradcheck(there_and_back, x)


PLACES = {
    "int64": torch.tensor([4, 0, 3]),
    "int32": torch.tensor([4, 0, 3], dtype=torch.int32),
    "from the end": torch.tensor([-2, 0, -3]),
    "booleans": torch.tensor([1, 0, 0, 1, 1, 0], dtype=torch.bool),
}


@pytest.mark.parametrize("name", PLACES)
def test_every_kind_of_index(name: str, device: str) -> None:
    """What `output[indices] = values`, which is flash-attn's line, takes."""
    values = torch.randn(3, 2, device=device, requires_grad=True)
    indices = PLACES[name].to(device)
    expected = torch.zeros(6, 2, device=device)
    expected[indices] = values.detach()
    rows = bert_padding.index_put_first_axis(values, indices, 6)
    assert torch.equal(rows, expected)
    assert torch.equal(bert_padding.pad_input(values, indices, 2, 3), expected.view(2, 3, 2))
    weights = torch.randn_like(rows)
    (dvalues,) = torch.autograd.grad(rows, values, weights)
    assert torch.equal(dvalues, weights[indices])


def test_repeated_rows_add_their_gradients() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    rows = bert_padding.index_first_axis(x, torch.tensor([2, 0, 2]))
    assert torch.equal(rows, x[[2, 0, 2]])
    (dx,) = torch.autograd.grad(rows.sum(), x)
    assert dx.tolist() == [[1.0, 1.0], [0.0, 0.0], [2.0, 2.0]]


def test_residual() -> None:
    x = torch.randn(4, 2, requires_grad=True)
    indices = torch.tensor([3, 1])
    rows, residual = bert_padding.index_first_axis_residual(x, indices)
    assert torch.equal(rows, x[indices]) and torch.equal(residual, x)
    (dx,) = torch.autograd.grad(rows.sum() + 10.0 * residual.sum(), x)
    assert dx[:, 0].tolist() == [10.0, 11.0, 10.0, 11.0]
