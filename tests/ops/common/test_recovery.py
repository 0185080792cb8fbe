"""Calls whose kernel turns out not to run: the next backend's does, and the user hears of it.

The `gluon` backend runs here in its emulator, on a CPU where it is proven and chosen first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from triton.runtime.errors import OutOfResources

import fastattn
from fastattn import backends, measured, proving, verdicts
from fastattn.backends import explanation_of
from fastattn.ops.attention import aten, gluon, reference, triton
from fastattn.ops.attention import interface as attentions
from fastattn.ops.attention.call import NONE, Settings
from fastattn.ops.common import descriptors, launch
from fastattn.ops.common import gluon as gluons
from fastattn.ops.ffn import gluon as ffn_gluon
from fastattn.ops.ffn import interface as ffns
from fastattn.ops.ffn import triton as ffn_triton
from fastattn.ops.layer_norm import cuda as norm_cuda
from fastattn.ops.layer_norm import interface as norms
from fastattn.ops.layer_norm import triton as norm_triton
from fastattn.ops.linear_cross_entropy import gluon as loss_gluon
from fastattn.ops.linear_cross_entropy import interface as losses
from fastattn.ops.linear_cross_entropy import triton as loss_triton
from oracle import assert_close_to_reference

BAD_TILE = OutOfResources(300_000, 232_448, "shared memory")
FAULT = RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
WITH_BACKWARD = pytest.mark.skipif(
    not gluons.REDUCES, reason="the Gluon backward of attention needs Triton 3.8"
)
SETTINGS = Settings(-1, -1, False, 0.125, 0.0, 0.0, "ieee", 0, 0, 0, 0)


class Kernels:
    """Who ran, in order, and what the entry points of the kernels raise instead.

    Attributes:
        raises: "gluon.forward" and the like -> an error.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran, self.raises = list[str](), dict[str, Exception]()
        for module, entries in (
            (gluon, ("forward", "backward")),
            (triton, ("forward", "backward")),
            (aten, ("forward",)),
            (reference, ("forward",)),
            (ffn_gluon, ("forward", "backward")),
            (ffn_triton, ("forward", "backward")),
            (loss_gluon, ("kernel_forward", "kernel_backward")),
            (loss_triton, ("kernel_forward", "kernel_backward")),
            (norm_triton, ("forward", "backward")),
        ):
            for entry in entries:
                name = f"{module.__name__.rsplit('.', 1)[-1]}.{entry}"
                monkeypatch.setattr(module, entry, self._spied(name, getattr(module, entry)))

    def _spied(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def spied(*args: Any) -> Any:
            if name in self.raises:
                self.ran.append(f"{name} fails")
                raise self.raises[name]
            result = run(*args)
            self.ran.append(name)
            return result

        return spied

    def of(self, call: Callable[[], object]) -> list[str]:
        self.ran.clear()
        call()
        return list(self.ran)


@pytest.fixture
def kernels(
    gluon_seed: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Kernels]:
    if torch.cuda.is_available():
        pytest.skip("the emulator's backend is chosen on a CPU")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(backends, "FOR_TESTS", {})
    monkeypatch.setattr(measured, "devices", lambda device: ("a GPU", "sm_90"))
    monkeypatch.setattr(measured, "found", lambda name, problem: True)
    monkeypatch.setattr(backends.extension, "unavailable", lambda device: "no extension here")
    # All that has not failed is proven.
    monkeypatch.setattr(
        proving, "remembered", lambda about: proving._known.get(about, proving.RIGHT)
    )

    def restart() -> None:
        for cache in (proving._known, proving._warned, verdicts.environment):
            getattr(cache, "cache_clear", getattr(cache, "clear", None))()
        attentions._dispatch.plans.clear()
        for op in (ffns, losses, norms):
            op._dispatch.plans.clear()

    restart()
    yield Kernels(monkeypatch)
    monkeypatch.undo()
    restart()


def tensors(grad: bool = False) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(1, 24, 1, 64).half().requires_grad_(grad) for _ in range(3))


def shifted(x: torch.Tensor) -> torch.Tensor:
    """The same values, 2 bytes past an aligned address."""
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


def attention(*inputs: torch.Tensor, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    found: tuple[torch.Tensor, torch.Tensor] = fastattn.attention(*inputs, return_lse=True, **more)
    return found


# --- addresses and strides ------------------------------------------------------------------------


def test_a_tensor_that_no_descriptor_takes_goes_to_the_next_kernel(kernels: Kernels) -> None:
    given = tensors()
    wide = [torch.cat([x, x[..., :3]], -1)[..., :64] for x in given]  # rows 134 bytes apart
    for odd in (
        [shifted(given[0]), *given[1:]],
        wide,
        [x.transpose(1, 3).contiguous().transpose(1, 3) for x in given],
    ):
        assert kernels.of(lambda: attention(*given)) == ["gluon.forward"]
        assert kernels.of(lambda odd=odd: attention(*odd)) == ["triton.forward"]
    assert kernels.of(lambda: attention(*given)) == ["gluon.forward"]  # by the plan that is kept
    for x, y in zip(attention(*wide), attention(*wide, backend="triton")):
        assert torch.equal(x, y)


def test_explain_and_the_error_say_what_was_given_and_what_to_do(kernels: Kernels) -> None:
    q, k, v = tensors()
    odd = shifted(k)
    told = "TMA reads from multiples of 16 bytes; k begins 2 bytes after one: give k.clone()"
    assert explanation_of(fastattn.attention, q, odd, v).reasons["gluon"] == told
    assert explanation_of(fastattn.attention, q, odd, v).backend == "triton"
    with pytest.raises(fastattn.UnsupportedError) as error:
        attention(q, odd, v, backend="gluon")
    assert told in str(error.value) and str(error.value).startswith("backend='gluon': the gluon")
    with (
        fastattn.use_backend("gluon"),
        pytest.raises(
            fastattn.UnsupportedError,
            match=r"^fastattn.use_backend\('gluon'\): .* give v.contiguous\(\)",
        ),
    ):
        attention(q, k, torch.cat([v, v[..., :3]], -1)[..., :64])


def test_a_tensor_without_an_address_may_be_aligned() -> None:
    x = shifted(torch.randn(4, 64).half())
    found = [descriptors.misfit(q=x.to("meta"))]
    torch.vmap(lambda row: found.append(descriptors.misfit(q=row)) or row)(x)  # type: ignore[func-returns-value]
    assert found == [None, None]
    assert "q has the shape (64, 4)" in str(descriptors.misfit(q=x.to("meta").t()))


@WITH_BACKWARD
def test_a_compiled_graph_goes_to_the_next_kernel(kernels: Kernels) -> None:
    """Its operator has the backend that was chosen for tensors without an address."""
    q, k, v = (shifted(x).requires_grad_() for x in tensors())

    def operator(forced: bool) -> torch.Tensor:
        operator = torch.ops.fastattn.attention
        out: torch.Tensor = operator(q, k, v, *NONE, *SETTINGS, "gluon", forced)[0]
        return out

    def both() -> None:
        operator(False).sum().backward()

    assert kernels.of(both) == ["triton.forward", "gluon.backward"]
    with pytest.raises(fastattn.UnsupportedError, match="q begins 2 bytes after one"):
        operator(True)


# --- kernels that do not run ----------------------------------------------------------------------


@pytest.mark.parametrize("error", (BAD_TILE, launch.NotCompiled("PTXASError: sm_90a")))
def test_a_kernel_that_cannot_be_launched_fails_and_the_next_one_runs(
    error: Exception, kernels: Kernels, tmp_path: Path
) -> None:
    given = tensors()
    assert kernels.of(lambda: attention(*given)) == ["gluon.forward"]
    kernels.raises["gluon.forward"] = error
    with pytest.warns(RuntimeWarning, match="the gluon backend of attention is no longer used for"):
        found = kernels.of(lambda: attention(*given))
    assert found == ["gluon.forward fails", "triton.forward"]
    assert kernels.of(lambda: attention(*given)) == ["triton.forward"]  # and no warning
    del kernels.raises["gluon.forward"]
    reason = explanation_of(fastattn.attention, *given, return_lse=True).reasons["gluon"]
    assert "its proof failed on a GPU: in a later call, " in str(reason) and str(error) in str(
        reason
    )
    notes = [json.loads(path.read_text()) for path in (tmp_path / "fastattn/proofs").glob("*.json")]
    assert {note["verdict"] for note in notes} == {"failed"}
    assert kernels.of(lambda: attention(*given, causal=True)) == ["gluon.forward"]  # no such family


@WITH_BACKWARD
def test_a_backward_that_cannot_be_launched_follows_on_the_next_kernel(kernels: Kernels) -> None:
    inputs = tensors(grad=True)
    eager = [x.detach().clone().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    dout = torch.randn(1, 24, 1, 64).half()
    kernels.raises["gluon.backward"] = BAD_TILE
    grads: tuple[torch.Tensor, ...] = ()

    def both() -> None:
        nonlocal grads
        grads = torch.autograd.grad(attention(*inputs)[0], inputs, dout)

    with pytest.warns(RuntimeWarning, match="with gradients: in a later call, OutOfResources"):
        assert kernels.of(both) == ["gluon.forward", "gluon.backward fails", "triton.backward"]
    plain, truth = (
        torch.autograd.grad(fastattn.attention(*x, backend="reference"), x, dout.to(x[0].dtype))
        for x in (eager, exact)
    )
    for triple in zip(grads, plain, truth):
        assert_close_to_reference(*triple)
    assert kernels.of(both) == ["triton.forward", "triton.backward"]
    assert kernels.of(lambda: attention(*tensors())) == ["gluon.forward"]  # without gradients


def test_where_no_kernel_can_be_launched_plain_torch_runs_with_gradients(kernels: Kernels) -> None:
    inputs = tensors(grad=True)
    kernels.raises |= dict.fromkeys(("gluon.forward", "triton.forward"), BAD_TILE)
    with pytest.warns(RuntimeWarning) as warned:
        out = attention(*inputs)[0]
    # ATen has no LSE on a CPU.
    assert kernels.ran == ["gluon.forward fails", "triton.forward fails", "reference.forward"]
    assert [str(x.message).split()[2] for x in warned] == ["gluon", "triton"]
    out.sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in inputs[1:])
    assert kernels.of(lambda: attention(*inputs)) == ["reference.forward"]


@pytest.mark.parametrize("features", ({}, {"mask": torch.ones(24, 24, dtype=torch.bool)}))
def test_a_refusal_that_is_no_familys_is_told(
    features: dict[str, torch.Tensor], kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call's arguments, or a kernel of which there is no proof."""
    name = "triton" if features else "gluon"
    if features:
        monkeypatch.setattr(proving, "subject", lambda backend, problem: None)
    error = BAD_TILE if features else RuntimeError(TRITONS + "invalid argument")
    kernels.raises[f"{name}.forward"] = error
    told = f"the {name} backend of attention could not run q .* and another one does: .*{error}"
    with pytest.warns(RuntimeWarning, match=re.escape(told).replace(r"\.\*", ".*")):
        attention(*tensors(), **features)
    after = "aten.forward" if features else "triton.forward"
    assert kernels.ran == [f"{name}.forward fails", after]
    assert explanation_of(fastattn.attention, *tensors()).backend == "gluon"


@WITH_BACKWARD
def test_whoever_names_the_backend_gets_its_error(kernels: Kernels) -> None:
    inputs = tensors(grad=True)
    kernels.raises["gluon.backward"] = BAD_TILE
    out = attention(*inputs, backend="gluon")[0]
    with pytest.raises(OutOfResources):
        out.sum().backward()
    kernels.raises["gluon.forward"] = launch.NotCompiled("CompilationError: here")
    with pytest.raises(launch.NotCompiled, match="CompilationError: here"):
        attention(*inputs, backend="gluon")
    assert explanation_of(fastattn.attention, *inputs).backend == "gluon"


@pytest.mark.parametrize("error", (FAULT, ValueError("the user's"), AssertionError("ours")))
def test_other_errors_pass_through(error: Exception, kernels: Kernels) -> None:
    kernels.raises["gluon.forward"] = error
    with pytest.raises(type(error), match=str(error).split(":")[-1]):
        attention(*tensors())
    assert kernels.ran == ["gluon.forward fails"]
    assert explanation_of(fastattn.attention, *tensors()).backend == "gluon"


def test_ffn(kernels: Kernels) -> None:
    x, w1, w2 = (torch.randn(16, 16).half().requires_grad_() for _ in range(3))

    def both() -> None:
        fastattn.ffn(x, w1, None, w2, None).sum().backward()

    assert kernels.of(both) == ["gluon.forward", "gluon.backward"]
    kernels.raises["gluon.forward"] = BAD_TILE
    with pytest.warns(RuntimeWarning, match="the gluon backend of ffn is no longer used"):
        found = kernels.of(both)
    assert found == ["gluon.forward fails", "triton.forward", "gluon.backward"]  # another kernel
    assert kernels.of(both) == ["triton.forward", "triton.backward"]


def test_a_backward_of_ffn(kernels: Kernels) -> None:
    x, w1, w2 = (torch.randn(16, 16).half().requires_grad_() for _ in range(3))
    out = fastattn.ffn(x, w1, None, w2, None)
    kernels.raises["gluon.backward"] = BAD_TILE
    with pytest.warns(RuntimeWarning, match="the gluon backend of ffn is no longer used"):
        assert kernels.of(out.sum().backward) == ["gluon.backward fails", "triton.backward"]
    assert x.grad is not None and x.grad.isfinite().all()


# --- every op, in a compiled model too ------------------------------------------------------------


class Op(NamedTuple):
    """A call, its inputs by shape, and the names of its kernels."""

    call: Callable[..., torch.Tensor]
    shapes: tuple[tuple[int, ...], ...]
    forward: str  # that fails
    backward: str

    def second(self, name: str) -> str:
        return f"triton.{name.partition('.')[2]}"

    def gradients(self, kind: torch.dtype, **more: Any) -> tuple[torch.Tensor, ...]:
        """Of the reference."""
        with fastattn.use_backend("reference"):
            leaves = [x.to(kind).requires_grad_() for x in self.inputs()]
            return torch.autograd.grad(self.call(*leaves).sum(), leaves)

    def inputs(self) -> list[torch.Tensor]:
        g = torch.Generator().manual_seed(0)
        return [torch.randn(shape, generator=g).half() for shape in self.shapes]


def loss_of(reduction: str) -> Callable[..., torch.Tensor]:
    def call(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        targets = torch.arange(6)
        return fastattn.linear_cross_entropy(x, weight, targets, reduction=reduction)

    return call


OPS = {
    "attention": Op(
        lambda *x: attention(*x)[0], ((1, 24, 1, 64),) * 3, "gluon.forward", "gluon.backward"
    ),
    "ffn": Op(
        lambda x, w1, w2: fastattn.ffn(x, w1, None, w2, None),
        ((16, 16), (16, 16), (16, 16)),
        "gluon.forward",
        "gluon.backward",
    ),
    "layer_norm": Op(
        lambda x, w, b: fastattn.layer_norm(x, w, b, residual=x)[0].square(),
        ((6, 40), (40,), (40,)),
        "cuda.forward",
        "cuda.backward",
    ),
    "linear_cross_entropy": Op(
        loss_of("none"), ((6, 16), (24, 16)), "gluon.kernel_forward", "gluon.kernel_backward"
    ),
    "linear_cross_entropy, mean": Op(
        loss_of("mean"), ((6, 16), (24, 16)), "gluon.kernel_forward", ""
    ),
}


@pytest.fixture
def with_extension(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """And the norms' CUDA C++ kernels are there, with Triton's results."""
    monkeypatch.setattr(backends.extension, "unavailable", lambda device: None)
    monkeypatch.setattr(measured, "devices", lambda device: ("a GPU", "sm_80"))
    forward, backward = norm_triton.forward, norm_triton.backward
    for name, run in (("forward", forward), ("backward", backward)):
        monkeypatch.setattr(norm_cuda, name, kernels._spied(f"cuda.{name}", run))
    return kernels


FAILS = [
    (name, part)
    for name, op in OPS.items()
    for part in ("forward", "backward")
    if op._asdict()[part]
]


@WITH_BACKWARD
@pytest.mark.parametrize("compiled", (False, True))
@pytest.mark.parametrize(("name", "part"), FAILS)
def test_each_op(name: str, part: str, compiled: bool, request: pytest.FixtureRequest) -> None:
    """A kernel that cannot be launched: the next one's results, a warning, and no second try."""
    op = OPS[name]
    fixture = "with_extension" if name == "layer_norm" else "kernels"
    kernels: Kernels = request.getfixturevalue(fixture)
    failing = op._asdict()[part]
    kernels.raises[failing] = BAD_TILE
    torch.compiler.reset()
    call = torch.compile(op.call, fullgraph=True, backend="aot_eager") if compiled else op.call

    def step() -> tuple[torch.Tensor, ...]:
        leaves = [x.requires_grad_() for x in op.inputs()]
        return torch.autograd.grad(call(*leaves).sum(), leaves)

    kernels.ran.clear()
    with pytest.warns(
        RuntimeWarning,
        match=f"the {failing.partition('.')[0]} backend of {name.partition(',')[0]} is no longer used",
    ):
        grads = step()
    ran = [x for x in kernels.ran if x.startswith(failing) or x == op.second(failing)]
    assert f"{failing} fails" in ran and op.second(failing) in ran
    for triple in zip(grads, op.gradients(torch.float16), op.gradients(torch.float64)):
        assert_close_to_reference(*triple)
    torch.compiler.reset()
    assert f"{failing} fails" not in kernels.of(step)
    torch.compiler.reset()


# --- the door -------------------------------------------------------------------------------------

EXTENSIONS = (
    "fastattn: kernel attention_forward with a grid of 1 x 1 x 1 blocks of 128 threads and "
)
TRITONS = "Triton Error [CUDA]: "


@pytest.mark.parametrize(
    ("error", "which"),
    [
        (launch.CannotRun("q"), launch.CALL),
        (launch.NotCompiled("x"), launch.KERNEL),
        (BAD_TILE, launch.KERNEL),
        (RuntimeError(TRITONS + "Failed to create tensor map descriptor: invalid argument\n"), "call"),
        (RuntimeError(TRITONS + "invalid argument"), launch.CALL),
        (RuntimeError(TRITONS + "device kernel image is invalid"), launch.KERNEL),
        (
            RuntimeError(
                EXTENSIONS + "0 bytes of shared memory: too many resources requested for launch "
                "(cudaErrorLaunchOutOfResources)"
            ),
            launch.KERNEL,
        ),
        (RuntimeError(EXTENSIONS + "0 bytes: an illegal memory access was encountered"), None),
        (RuntimeError(TRITONS + "out of memory"), None),
        (RuntimeError("somebody else's: invalid argument"), None),
        (torch.OutOfMemoryError("CUDA out of memory"), None),
        (FAULT, None),
    ],
)  # fmt: skip
def test_what_a_refusal_is(error: Exception, which: str | None) -> None:
    assert launch.refused(error) == which


class Compiling:
    """A kernel as far as its launch goes, whose compiler fails."""

    arg_names = ("x",)

    def __init__(self) -> None:
        self.compiled = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return lambda *args, **constants: self._do_compile("key")

    def _do_compile(self, key: str) -> None:
        self.compiled += 1
        raise FileNotFoundError("Cannot find ptxas")


def test_a_kernel_that_does_not_compile_is_not_compiled_again() -> None:
    kernel = Compiling()
    prepared = launch.Prepared(kernel, (1,), ())
    for _ in range(3):
        with pytest.raises(launch.NotCompiled, match="FileNotFoundError: Cannot find ptxas"):
            prepared(torch.zeros(1))
    assert kernel.compiled == 1
    with pytest.raises(launch.NotCompiled) as error:
        launch.launch(kernel, (1,), torch.zeros(1))
    assert isinstance(error.value.__cause__, FileNotFoundError)
