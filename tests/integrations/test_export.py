"""Ways out of an accelerated model: torch.export, AOTInductor, ONNX, torch.compile.

The measure is the original model, in float32 and in float64, never the accelerated one.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from integrations import tiny
from torch._dynamo.testing import CompileCounterWithBackend

import fastattn
from fastattn.ops.linear.few_rows import mkl_is_slow
from oracle import assert_close_to_reference

pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="of models on a CPU"),
    pytest.mark.filterwarnings("ignore"),  # of the tools themselves
]
SHAPES = ((3, 21), (2, 33), (1, 5))  # the first is that of the example
DYNAMIC = {
    "input_ids": {
        0: torch.export.Dim("batch", min=1, max=64),
        1: torch.export.Dim("seqlen", min=2, max=64),
    }
}
SHORT_FOR_PLAIN = [
    pytest.param(name, marks=() if name == "plain" else pytest.mark.long) for name in tiny.MODELS
]


def accelerated(original: torch.nn.Module) -> tiny.Logits:
    model = copy.deepcopy(original)
    assert fastattn.accelerate(model).swapped
    return tiny.Logits(model)


def exported(model: torch.nn.Module) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, (tiny.tokens(*SHAPES[0]),), dynamic_shapes=DYNAMIC)


def assert_as_original(run: Any, original: torch.nn.Module, shapes: Any = SHAPES) -> None:
    eager, exact = tiny.Logits(original), tiny.Logits(tiny.exact(original))
    with torch.no_grad():
        for shape in shapes:
            ids = tiny.tokens(*shape)
            assert_close_to_reference(run(ids), eager(ids), exact(ids), name=str(shape))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("plain", "llama") else pytest.mark.long)
        for name in tiny.MODELS
    ],
)
def test_torch_export(name: str, tmp_path: Path) -> None:
    """With sizes that stay open, and of ATen's operators only: it runs where fastattn is not."""
    original = tiny.make(name)
    program = exported(accelerated(original))
    assert not any("fastattn" in str(node.target) for node in program.graph.nodes)
    assert_as_original(program.module(), original)
    torch.export.save(program, tmp_path / "program.pt2")
    assert_as_original(torch.export.load(tmp_path / "program.pt2").module(), original)


def test_torch_export_of_one_shape() -> None:
    original = tiny.make("gpt2")
    with torch.no_grad():
        program = torch.export.export(accelerated(original), (tiny.tokens(*SHAPES[0]),))
    assert_as_original(program.module(), original, SHAPES[:1])


@pytest.mark.skipif(not mkl_is_slow(), reason="F.linear is not slow on this processor")
def test_torch_export_of_large_linear_layers() -> None:
    """Ours choose a path by the number of rows, which an exported program leaves open."""
    original = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.Linear(512, 256)).eval()
    model = copy.deepcopy(original)
    assert len(fastattn.accelerate(model).swapped) == 2
    rows = torch.export.Dim("rows", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(5, 256),), dynamic_shapes=({0: rows},))
        for count in (1, 2, 5, 40):
            x = torch.randn(count, 256)
            found, eager = program.module()(x), original(x)
            assert_close_to_reference(found, eager, tiny.exact(original)(x.double()))


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor compiles C++")
@pytest.mark.parametrize("name", tiny.MODELS)
def test_aot_inductor(name: str, tmp_path: Path) -> None:
    original = tiny.make(name)
    path = torch._inductor.aoti_compile_and_package(
        exported(accelerated(original)), package_path=str(tmp_path / "model.pt2")
    )
    assert_as_original(torch._inductor.aoti_load_package(path), original)


@pytest.mark.parametrize("name", SHORT_FOR_PLAIN)
def test_onnx(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs it")
    runtime = pytest.importorskip("onnxruntime", reason="it runs the exported model")
    original = tiny.make(name)
    path = str(tmp_path / "model.onnx")
    with torch.no_grad():
        torch.onnx.export(
            accelerated(original), (tiny.tokens(*SHAPES[0]),), path, dynamo=True,
            dynamic_shapes=DYNAMIC, verbose=False,
        )  # fmt: skip
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()

    def run(ids: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {given.name: ids.numpy()})[0])

    # ONNX's runtime has kernels of its own, whose error is not eager's.
    with torch.no_grad():
        for shape in SHAPES:
            ids = tiny.tokens(*shape)
            expected = tiny.Logits(tiny.exact(original))(ids)
            assert (run(ids) - expected).abs().max() <= 1e-5 * expected.abs().max()


# --- torch.compile of training --------------------------------------------------------------------


def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())


def trained(model: torch.nn.Module, backend: Any, fullgraph: bool) -> dict[str, torch.Tensor]:
    """The weights after three steps, at two lengths; `backend` None for no compilation."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    compute: Any = loss_of
    if backend is not None:
        torch._dynamo.reset()
        compute = torch.compile(loss_of, backend=backend, fullgraph=fullgraph)
    for shape in (SHAPES[0], SHAPES[1], SHAPES[0]):
        optimizer.zero_grad()
        compute(model, tiny.tokens(*shape)).backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", SHORT_FOR_PLAIN)
def test_training_compiles_in_one_graph(name: str, backend: str) -> None:
    original = tiny.make(name).train()
    eager = trained(tiny.Logits(copy.deepcopy(original)), None, False)
    exact = trained(tiny.Logits(tiny.exact(original)), None, False)
    found = trained(accelerated(original), backend, True)
    assert found.keys() == exact.keys()
    for weight, expected in exact.items():
        assert_close_to_reference(found[weight], eager[weight], expected, name=weight)


@pytest.mark.parametrize("name", SHORT_FOR_PLAIN)
def test_the_whole_step_compiles_in_no_more_graphs(name: str) -> None:
    """Loss, backward and optimiser in one function, in as many graphs as the original's."""
    original = tiny.make(name).train()
    ids = tiny.tokens(*SHAPES[0])

    def graphs(model: torch.nn.Module) -> tuple[int, torch.Tensor]:
        torch._dynamo.reset()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        counter = CompileCounterWithBackend("aot_eager")

        @torch.compile(backend=counter)
        def step() -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, ids)
            loss.backward()
            optimizer.step()
            return loss

        losses = [step() for _ in range(3)]
        return counter.frame_count, torch.stack(losses).detach()

    of_original, expected = graphs(tiny.Logits(copy.deepcopy(original)))
    of_ours, found = graphs(accelerated(original))
    assert of_ours <= of_original
    torch.testing.assert_close(found, expected)
