"""backends.py: who runs a backward, and what the public ops say of the `cuda` backend."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastattn
from fastattn import backends, extension
from fastattn.backends import Backend, explanation_of

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


class Problem:
    def __init__(self, device: torch.device = GPU) -> None:
        self.device = device

    def describe(self) -> str:
        return "a problem"


def kernel(name: str, **answers: Callable[[Any], str | None]) -> Backend:
    module = types.SimpleNamespace(**{"unsupported": lambda problem: None, **answers})
    return Backend(name, lambda: module)  # type: ignore[arg-type, return-value]


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a GPU for both kinds of kernels."""
    monkeypatch.setattr(extension, "unavailable", lambda device: None)
    monkeypatch.setattr(backends, "triton_unavailable", lambda device: None)


def no(reason: str) -> Callable[[Any], str]:
    return lambda problem: reason


@pytest.mark.usefixtures("both")
def test_a_backward_follows_its_forward() -> None:
    kernels = (kernel("cuda"), kernel("triton"))
    for forward, backend in zip(("cuda", "triton"), kernels):
        for forced in (False, True):
            chosen = backends.select_backward("op", kernels, Problem(), forward, forced)
            assert chosen is backend.module


@pytest.mark.usefixtures("both")
def test_a_backward_that_a_module_lacks_goes_to_the_next() -> None:
    kernels = (kernel("cuda", unsupported=no("no gradient of a bias")), kernel("triton"))
    chosen = backends.select_backward("op", kernels, Problem(), "cuda", False)
    assert chosen is kernels[1].module
    with pytest.raises(fastattn.UnsupportedError, match=r"of op on a problem: cuda: no gradient"):
        backends.select_backward("op", kernels, Problem(), "cuda", True)


@pytest.mark.usefixtures("both")
def test_a_backward_that_a_forward_lacks_goes_to_the_next_even_if_named() -> None:
    lacking = kernel("cuda", backward_unsupported=no("no backward"))
    kernels = (lacking, kernel("triton"))
    for forced in (False, True):
        chosen = backends.select_backward("op", kernels, Problem(), "cuda", forced)
        assert chosen is kernels[1].module
    assert backends.select("op", kernels, Problem(), "cuda") is lacking
    with pytest.raises(fastattn.UnsupportedError, match="cuda: no backward"):
        backends.select_backward("op", (lacking,), Problem(), "cuda", True)


@pytest.mark.usefixtures("both")
def test_no_backward_at_all_names_every_reason() -> None:
    kernels = (kernel("cuda", unsupported=no("a")), kernel("triton", unsupported=no("b")))
    with pytest.raises(fastattn.UnsupportedError, match="triton: b; cuda: a"):
        backends.select_backward("op", kernels, Problem(), "triton", False)


def test_the_emulator_is_never_the_automatic_choice(both: None) -> None:
    others = (kernel("torch"),)
    for name in ("cuda", "triton"):
        choice = backends.select("op", (kernel(name), *others), Problem(CPU), None)
        assert choice.name == "torch"
        assert f"name backend='{name}'" in str(kernel(name).declined(Problem(CPU)))


@pytest.mark.parametrize(
    ("settings", "runs", "reason"),
    [
        ("", "compiled", "Triton compiles for GPUs; on a CPU it needs TRITON_INTERPRET=1"),
        ("TRITON_INTERPRET", "interpreted", "Triton's interpreter computes bfloat16 dots wrong"),
        ("FASTATTN_TRITON_ON_CPU", "executed", "Triton kernels on a CPU are for tests"),
        ("FASTATTN_TRITON_ON_CPU TRITON_INTERPRET", "interpreted", "bfloat16 dots wrong"),
    ],
)
def test_what_runs_a_triton_kernel(
    settings: str, runs: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FASTATTN_TRITON_ON_CPU", "TRITON_INTERPRET"):
        monkeypatch.setenv(name, str(int(name in settings)))
    assert backends.triton_runs() == runs
    x = torch.ones(8, 8, 8, 8, dtype=torch.bfloat16)
    weight = x[0, 0]
    for call in (
        (fastattn.attention, x, x, x),
        (fastattn.ffn, x, weight, None, weight, None),
    ):
        assert reason in str(explanation_of(*call).reasons["triton"])


X = torch.randn(2, 4, 2, 16)
CALLS = {
    "attention": (X, X, X),
    "layer_norm": (X,),
    "rms_norm": (X,),
    "ffn": (torch.randn(3, 4), torch.randn(8, 4), None, torch.randn(4, 8), None),
    "attention_with_kv_cache": (X, X, X, torch.tensor([4, 4])),
}


@pytest.mark.parametrize("op", CALLS)
def test_who_chooses(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument, then the innermost use_backend, then the environment, then the order."""

    def chosen(**more: Any) -> tuple[str | None, str]:
        explanation = explanation_of(getattr(fastattn, op), *CALLS[op], **more)
        return explanation.backend, explanation.source

    assert chosen() == ("torch", "first capable")  # the tensors are on the CPU
    monkeypatch.setenv("FASTATTN_BACKEND", "reference")
    assert chosen() == ("reference", "FASTATTN_BACKEND=reference")
    with fastattn.use_backend("triton"):
        assert chosen()[1] == "fastattn.use_backend('triton')"
        with fastattn.use_backend("reference"):
            assert chosen() == ("reference", "fastattn.use_backend('reference')")
        assert chosen()[1] == "fastattn.use_backend('triton')"
        assert chosen(backend="reference") == ("reference", "backend='reference'")
    assert chosen()[0] == "reference"
    monkeypatch.setenv("FASTATTN_BACKEND", "nonsense")
    with pytest.raises(ValueError, match=r"FASTATTN_BACKEND must be one of .* got 'nonsense'"):
        chosen()
    with pytest.raises(ValueError, match="name must be one of"), fastattn.use_backend("nonsense"):
        pass


@pytest.mark.parametrize("op", CALLS)
def test_a_forced_backend_is_not_replaced(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function = getattr(fastattn, op)
    double = [
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in CALLS[op]
    ]
    assert function(*double).dtype == torch.float64
    monkeypatch.setenv("FASTATTN_BACKEND", "triton")
    reason = f"FASTATTN_BACKEND=triton: the triton backend cannot run {op} on .*float64"
    with pytest.raises(fastattn.UnsupportedError, match=reason):
        function(*double)
    monkeypatch.delenv("FASTATTN_BACKEND")
    assert function(*double).dtype == torch.float64


@pytest.mark.parametrize("op", CALLS)
def test_cuda_on_a_cpu(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "_emulator", None)
    function = getattr(fastattn, op)
    explanation = explanation_of(function, *CALLS[op])
    assert list(explanation.reasons) == list(backends.NAMES)
    assert explanation.reasons["cuda"] == "the CUDA kernels run on NVIDIA GPUs, not on a CPU"
    for _ in range(2):  # an error is not forgotten by the cache of plans
        with pytest.raises(
            fastattn.UnsupportedError, match=f"cuda backend cannot run {op} on .*GPU"
        ):
            function(*CALLS[op], backend="cuda")


def test_an_op_without_the_backend_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """It chooses by itself; a call that names the backend says that there is none."""
    logits, targets = torch.randn(3, 5), torch.tensor([0, 4, 2])
    expected = fastattn.cross_entropy(logits, targets)
    with fastattn.use_backend("cuda"):
        assert torch.equal(fastattn.cross_entropy(logits, targets), expected)
    monkeypatch.setenv("FASTATTN_BACKEND", "cuda")
    explanation = explanation_of(fastattn.cross_entropy, logits, targets)
    assert (explanation.backend, explanation.source) == ("torch", "first capable")
    assert explanation.reasons["cuda"] == "not in this op"
    with pytest.raises(fastattn.UnsupportedError, match="cross_entropy has no cuda backend"):
        fastattn.cross_entropy(logits, targets, backend="cuda")


def test_a_compiled_function_notices_a_choice_made_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """By use_backend and by the environment alike; other variables compile nothing again."""
    graphs: list[bool] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append("torch.layer_norm(" in graph.code)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(fastattn.layer_norm, backend=keep, fullgraph=True)
    x = torch.randn(3, 8)
    compiled(x)
    with fastattn.use_backend("reference"):
        compiled(x)
    assert graphs == [True, False]
    monkeypatch.setenv("FASTATTN_BACKEND", "reference")
    compiled(x)
    assert graphs == [True, False, False]
    monkeypatch.setenv("FASTATTN_BACKEND", "torch")
    compiled(x)
    assert graphs == [True, False, False, True]
    monkeypatch.setenv("SOMETHING_ELSE", "1")
    compiled(x)
    monkeypatch.setenv("FASTATTN_BACKEND", "reference")
    compiled(x)
    assert len(graphs) == 4


COMPILED_LATER = """
import torch, fastattn
x, w = torch.randn(2, 8, 64), torch.ones(64)
for backend in ("torch", "reference"):
    with fastattn.use_backend(backend):
        torch.compile(lambda x: fastattn.layer_norm(x, w), backend="eager", fullgraph=True)(x)
block = fastattn.nn.TransformerBlock(64, 4)
with fastattn.use_backend("torch"):
    torch.compile(block, backend="eager", fullgraph=True)(x)
"""


def test_torch_compile_finds_backends_that_were_not_loaded() -> None:
    subprocess.run([sys.executable, "-c", COMPILED_LATER], check=True, timeout=300)
