"""Logits that are made when somebody reads them: as F.linear's in all but when."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.integrations.deferred import DeferredLogits, deferred

BATCH, SEQLEN, WIDTH, CLASSES = 2, 7, 16, 50


@pytest.fixture
def parts(device: str) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = (BATCH, SEQLEN, WIDTH), (CLASSES, WIDTH), (CLASSES,)
    x, weight, bias = (torch.randn(s, device=device, requires_grad=True) for s in shapes)
    return x, weight, bias


@pytest.fixture
def targets(device: str) -> Tensor:
    made = torch.arange(BATCH * SEQLEN, device=device).reshape(BATCH, SEQLEN) * 31 % CLASSES
    made[0, 3] = -100
    return made


def values(x: Any) -> Any:
    return x.values() if isinstance(x, DeferredLogits) else x


# What models do with logits and labels, by where it stands.
def shifted_labels(logits: Tensor, targets: Tensor) -> Tensor:  # transformers' ForCausalLMLoss
    labels = F.pad(targets, (0, 1), value=-100)[..., 1:].contiguous()
    logits = logits.float()
    loss = F.cross_entropy(
        logits.view(-1, CLASSES), labels.view(-1), ignore_index=-100, reduction="sum"
    )
    return loss / 11


def shifted_logits(logits: Tensor, targets: Tensor) -> Tensor:  # before transformers 4.46
    logits = logits[..., :-1, :].contiguous()
    labels = targets[..., 1:].contiguous()
    return torch.nn.CrossEntropyLoss()(logits.view(-1, CLASSES), labels.view(-1))


def nanogpt(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-100)


def scaled(logits: Tensor, targets: Tensor) -> Tensor:  # Cohere; Granite divides
    return shifted_labels(logits * 0.0625 / 0.5, targets)


def capped(logits: Tensor, targets: Tensor) -> Tensor:  # Gemma 2
    return shifted_labels(torch.tanh(logits / 3.0) * 3.0, targets)


def biased(logits: Tensor, targets: Tensor) -> Tensor:  # BART
    return nanogpt(logits * 0.5 + torch.linspace(-1, 1, CLASSES, device=logits.device), targets)


def smoothed(logits: Tensor, targets: Tensor) -> Tensor:
    weight = torch.linspace(0.5, 2.0, CLASSES, device=logits.device)
    return F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), weight, label_smoothing=0.1, reduction="none"
    )


def sliced(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits[1:, 2:].reshape(-1, CLASSES), targets[1:, 2:].reshape(-1))


# And what makes the values.
def classes_in_the_middle(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), targets)


def probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(
        logits.flatten(0, 1), torch.full_like(values(logits).flatten(0, 1), 0.02)
    )


def negative(logits: Tensor, targets: Tensor) -> Tensor:
    return nanogpt(logits * -1.0, targets)


def capped_twice(logits: Tensor, targets: Tensor) -> Tensor:
    return nanogpt(logits.tanh().tanh(), targets)


def regularised(logits: Tensor, targets: Tensor) -> Tensor:
    return nanogpt(logits, targets) + logits.logsumexp(-1).square().mean()


def read_before(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.logsumexp(-1).square().mean() + nanogpt(logits, targets)


def written_to(logits: Tensor, targets: Tensor) -> Tensor:
    rows, doubled = logits.view(-1, CLASSES), logits * 2.0
    logits.mul_(3.0)
    return rows.square().sum() + doubled.sum() + nanogpt(logits, targets)


DEFERRED = [shifted_labels, shifted_logits, nanogpt, scaled, capped, biased, smoothed, sliced]
MADE = [
    *(classes_in_the_middle, probabilities, negative, capped_twice),
    *(regularised, read_before, written_to),
]


@pytest.mark.parametrize("use", [*DEFERRED, *MADE], ids=lambda use: use.__name__)
@pytest.mark.parametrize("with_bias", [False, True])
def test_loss_and_gradients(
    parts: tuple[Tensor, ...],
    targets: Tensor,
    use: Callable[[Tensor, Tensor], Tensor],
    with_bias: bool,
) -> None:
    parts = parts if with_bias else parts[:2]
    expected = use(F.linear(*parts), targets)
    logits = deferred(*parts)
    loss = use(logits, targets)
    assert (logits._read is None) == (use in DEFERRED)
    assert type(loss) is Tensor
    torch.testing.assert_close(loss, expected)
    upstream = torch.randn_like(expected)
    found = torch.autograd.grad(loss, parts, upstream)
    torch.testing.assert_close(found, torch.autograd.grad(expected, parts, upstream))
    # The values can still be had, and are F.linear's own.
    read = use is not written_to
    assert not read or torch.equal(logits.detach() + 0, F.linear(*parts).detach())


def saved(x: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    read: Tensor = torch.load(file)
    return read


def entropy(targets: Tensor, **options: Any) -> Callable[[Tensor], Tensor]:
    return lambda z: F.cross_entropy(z.view(-1, CLASSES), targets.to(z.device), **options)


OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    "argmax": lambda z: z.argmax(-1),
    "array": lambda z: np.asarray(z.detach().cpu()),
    "array, with a graph": lambda z: np.asarray(z),
    "bfloat16": lambda z: z.to(torch.bfloat16),
    "copy": lambda z: copy.copy(z.detach()),
    "cross_entropy, classes too large": entropy(torch.full((14,), CLASSES)),
    "cross_entropy, too few targets": entropy(torch.zeros(3).long()),
    "cross_entropy, int32": entropy(torch.zeros(14).int()),
    "cross_entropy, size_average": entropy(torch.zeros(14).long(), size_average=False),
    "cross_entropy, reduction": entropy(torch.arange(14), reduction="all"),
    "deepcopy": lambda z: copy.deepcopy(z.detach()),
    "deepcopy, with a graph": copy.deepcopy,
    "dlpack": lambda z: torch.from_dlpack(z.detach()),
    "double": lambda z: z.double(),
    "facts": lambda z: (z.shape, z.stride(), z.dtype, z.device, z.numel(), z.requires_grad),
    "fill_": lambda z: z.detach().fill_(1.0),
    "iteration": lambda z: torch.stack([*z]),
    "item": lambda z: z[0, 0, 0].item(),
    "last token": lambda z: z[:, -1, :],
    "numpy": lambda z: z.detach().cpu().numpy(),
    "numpy, with a graph": lambda z: z.numpy(),
    "pickle": lambda z: pickle.loads(pickle.dumps(z)),
    "repr": lambda z: repr(z).partition("grad_fn")[0],
    "retain_grad": lambda z: (z.retain_grad(), z.square().sum().backward(), z.grad)[2],
    "save": saved,
    "share_memory_": lambda z: z.detach().cpu().share_memory_().is_shared(),
    "storage": lambda z: z.untyped_storage().nbytes(),
    "sum": lambda z: z.sum(),
    "tolist": lambda z: z.tolist(),
    "unbind": lambda z: z.unbind(0)[1],
    "view that splits classes": lambda z: z.view(BATCH, SEQLEN, 2, -1),
    "view of another size": lambda z: z.view(3, CLASSES),
    "vocabulary cut": lambda z: z[..., :10],
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_any_operation(parts: tuple[Tensor, ...], name: str) -> None:
    """The same values, gradients and errors as of F.linear."""

    def run(function: Callable[..., Tensor]) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return OPERATIONS[name](function(*parts))
            except Exception as error:
                return type(error)

    expected, found = run(F.linear), run(deferred)
    if not isinstance(expected, Tensor):
        np.testing.assert_equal(found, expected)
        return
    assert found.requires_grad == expected.requires_grad
    torch.testing.assert_close(values(found), expected.detach(), rtol=0, atol=0)
    if expected.grad_fn is not None:
        upstream = torch.randn_like(expected)
        ours = torch.autograd.grad(found, parts, upstream)
        torch.testing.assert_close(ours, torch.autograd.grad(expected, parts, upstream))


class Through(torch.autograd.Function):
    """A function in whose forward the dispatcher is not asked, as DataParallel's and DDP's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@pytest.mark.parametrize("use", [nanogpt, lambda z, _: z.square().sum()])
def test_through_a_function(
    parts: tuple[Tensor, ...], targets: Tensor, use: Callable[[Tensor, Tensor], Tensor]
) -> None:
    found = torch.autograd.grad(use(Through.apply(deferred(*parts)), targets), parts)
    expected = torch.autograd.grad(use(F.linear(*parts), targets), parts)
    torch.testing.assert_close(found, expected)


def test_without_a_graph(parts: tuple[Tensor, ...], targets: Tensor) -> None:
    with torch.no_grad():
        logits = deferred(*parts)
        loss = nanogpt(logits, targets)
    assert not logits.requires_grad and not loss.requires_grad
    torch.testing.assert_close(loss, nanogpt(F.linear(*parts), targets).detach())
    detached = nanogpt(deferred(*parts).detach(), targets)
    assert not detached.requires_grad


def test_read_under_no_grad_they_keep_their_graph(
    parts: tuple[Tensor, ...], targets: Tensor
) -> None:
    logits = deferred(*parts)
    with torch.no_grad():
        assert not logits.argmax(-1).requires_grad
    (found,) = torch.autograd.grad(nanogpt(logits, targets), parts[1])
    (expected,) = torch.autograd.grad(nanogpt(F.linear(*parts), targets), parts[1])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("changed", [0, 1, 2])
@pytest.mark.parametrize("use", [nanogpt, lambda z, _: z.sum()])
def test_modified_in_place_since(
    parts: tuple[Tensor, ...], targets: Tensor, changed: int, use: Callable[..., Tensor]
) -> None:
    logits = deferred(*parts)
    with torch.no_grad():
        parts[changed].mul_(2.0)
    with pytest.raises(RuntimeError, match=r"modified in place since: read the logits before"):
        use(logits, targets)


def test_read_before_the_change_they_stay(parts: tuple[Tensor, ...]) -> None:
    logits = deferred(*parts)
    expected = logits.argmax(-1)
    with torch.no_grad():
        parts[1].neg_()
    assert torch.equal(logits.argmax(-1), expected)


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(parts: tuple[Tensor, ...], targets: Tensor, inside: bool) -> None:
    """In the dtype of where they came from, wherever the loss and the reading are."""
    device = parts[0].device.type
    runs = []
    for function in (deferred, F.linear):
        with torch.autocast(device, torch.bfloat16):
            logits = function(*parts)
            loss = nanogpt(logits, targets) if inside else None
        runs.append((logits, nanogpt(logits, targets) if loss is None else loss))
    (ours, our_loss), (theirs, their_loss) = runs
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert our_loss.dtype == their_loss.dtype
    assert torch.equal(ours.detach() + 0, theirs.detach())
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-2, atol=1e-2)
    found = torch.autograd.grad(our_loss, parts)
    torch.testing.assert_close(found, torch.autograd.grad(their_loss, parts), rtol=0.05, atol=2e-3)


def test_second_derivatives(parts: tuple[Tensor, ...], targets: Tensor) -> None:
    x = parts[0].detach()[:1, :3].double().requires_grad_()
    weight = parts[1].detach()[:5].double().requires_grad_()

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(deferred(x, weight)[0], targets[0, :3] % 5)

    def read(x: Tensor, weight: Tensor) -> Tensor:
        return deferred(x, weight).square()

    assert torch.autograd.gradgradcheck(loss, (x, weight))
    assert torch.autograd.gradgradcheck(read, (x, weight))
