"""ops/common/gluon.py: which ptxas, who may run the kernels, and which tensors a descriptor takes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from triton import knobs
from triton.backends.nvidia import compiler
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastattn import backends, chips
from fastattn.ops.common import gluon, launch
from fastattn.ops.common.ptxas import Ptxas

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "gluon_unavailable", lambda device: None)


def test_the_newest_assembler_and_only_inside() -> None:
    carried = [knobs.nvidia.ptxas.version, knobs.nvidia.ptxas_blackwell.version]
    newest = max(tuple(map(int, version.split("."))) for version in carried)
    assert gluon.assembler().version == newest
    before = compiler.get_ptxas(90).path, compiler.get_ptxas_version(90)
    with gluon.newest_assembler():
        assert compiler.get_ptxas(90).path == gluon.assembler().path
        assert f"release {newest[0]}.{newest[1]}" in compiler.get_ptxas_version(90)
    assert (compiler.get_ptxas(90).path, compiler.get_ptxas_version(90)) == before


def test_a_launch_compiles_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the method that Triton's launch calls for a kernel that it has not compiled yet."""

    class Kernel(GluonJITFunction):  # type: ignore[misc]
        def _do_compile(self) -> str:
            return str(compiler.get_ptxas(90).path)

    compiled = []
    monkeypatch.setattr(
        gluon.door, "launch", lambda kernel, *_, **__: compiled.append(kernel._do_compile())
    )
    kernel = Kernel(test_an_old_assembler_is_refused)
    for _ in range(2):
        gluon.launch(kernel, (1,), torch.empty(1, device="meta"))
    assert compiled == [gluon.assembler().path] * 2
    assert callable(GluonJITFunction._do_compile)


@pytest.mark.usefixtures("hopper")
def test_an_old_assembler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old = Ptxas("/usr/bin/ptxas", (13, 2))
    monkeypatch.setattr(gluon, "assembler", lambda: old)
    assert "ptxas before 13.3 may assemble wgmma wrongly" in str(gluon.unavailable(GPU))
    assert "version 13.2: update Triton" in str(gluon.unavailable(GPU))
    monkeypatch.setattr(gluon, "assembler", lambda: old._replace(version=chips.HOPPER_PTXAS))
    assert gluon.unavailable(GPU) is None


@pytest.mark.usefixtures("hopper")
def test_a_triton_whose_assemblers_do_not_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    there = knobs.nvidia.ptxas.path
    gluon.assembler.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(knobs, "NvidiaTool", type("None_", (), {"from_path": lambda path: None}))
        assert gluon.unavailable(GPU) == (
            "Triton finds no ptxas that can be run: set TRITON_PTXAS_PATH"
        )
    one = knobs.NvidiaTool(there, "13.3")
    with monkeypatch.context() as patch:
        found = {"from_path": lambda path: None if "blackwell" in path else one}
        patch.setattr(knobs, "NvidiaTool", type("One", (), found))
        assert gluon.assembler() == Ptxas(there, (13, 3))
    gluon.assembler.cache_clear()


@pytest.mark.usefixtures("hopper")
def test_a_triton_without_reductions_is_refused_where_they_are_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gluon, "REDUCES", False)
    assert gluon.unavailable(CPU) is None
    assert "from 3.8" in str(gluon.unavailable(CPU, reduces=True))


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_gpus_are_refused(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = str(gluon.unavailable(GPU))
    assert reason.endswith(
        f"need compute capability 9.0, this GPU has {'.'.join(map(str, capability))}"
    )


def test_a_cpu_only_with_an_emulator(gluon_seed: Callable[[int], None]) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU needs no emulator")
    assert gluon.unavailable(CPU) is None
    gluon.use(None)
    assert gluon.unavailable(CPU) == "the Gluon kernels run on Hopper GPUs, not on a CPU"


X = torch.randn(2, 6, 4, 64, dtype=torch.float16)


@pytest.mark.parametrize(
    ("view", "reads"),
    [
        (X, True),
        (X.transpose(1, 2), True),
        (X[:, ::2], True),
        (X[:, :, :1].expand_as(X), True),
        (X[..., 8:], True),
        (X[..., 4:12], False),  # 8 bytes past an aligned address
        (X[..., ::2], False),
        (torch.randn(2, 6, 8, 64).half().transpose(2, 3), False),
        (torch.randn(2, 6, 4, 68).half()[..., :64], False),  # rows 136 bytes apart
        (X[:0], False),
    ],
)
def test_a_descriptor_takes_what_reads_says(view: torch.Tensor, reads: bool) -> None:
    """Triton checks the same when one is made."""
    assert gluon.reads(view) == reads
    sizes, strides = list(view.shape), list(view.stride())
    layout = gl.NVMMASharedLayout(128, 16, rank=4)
    if reads:
        made = gluon.descriptor(view, [1, 8, 1, 64])
        assert made == TensorDescriptor(view, sizes, strides, [1, 8, 1, 64], layout)
    elif view.numel():
        with pytest.raises(AssertionError):
            TensorDescriptor(view, sizes, strides, [1, 8, 1, 64], layout)
        with pytest.raises(launch.CannotRun, match=r"x begins 8 bytes after|give x\.contiguous"):
            gluon.descriptor(view, [1, 8, 1, 64], name="x")
    assert gluon.reads(gluon.readable(view)) == (view.numel() > 0)
