"""extension.py: the library is found, loaded once and late, and every failure is one line."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emulator.knobs import Emulator, asked

from fastattn import extension
from fastattn.extension import CannotLoad, Capability, Library

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)

# A library as the emulator's: its ops run on the CPU.
TINY = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <string>

using torch::stable::Tensor;
std::string built_for() { return "80+PTX;90a"; }
int64_t toolkit() { return 13020; }
void fill(Tensor out, double value) { static_cast<float*>(out.data_ptr())[0] = value; }

STABLE_TORCH_LIBRARY(fastattn_cuda, m) {
  m.def("built_for() -> str");
  m.def("toolkit() -> int");
  m.def("fill(Tensor(a!) out, float value) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastattn_cuda, CompositeExplicitAutograd, m) {
  m.impl("built_for", TORCH_BOX(&built_for));
  m.impl("toolkit", TORCH_BOX(&toolkit));
}
STABLE_TORCH_LIBRARY_IMPL(fastattn_cuda, CPU, m) { m.impl("fill", TORCH_BOX(&fill)); }
"""

# In a process of its own, for a library is never unloaded.
LOAD = """
import sys, shutil, torch, fastattn
from fastattn import extension

path, other = sys.argv[1:]
cpu = torch.device("cpu")
assert extension.registered() == [], "the import loads nothing"
assert extension.device_type() == "cuda" and extension.unavailable(cpu) is not None

extension.use(path)
extension.use(path)  # once is enough
assert extension.device_type() == "cpu" and extension.unavailable(cpu) is None
assert "runs on a CPU, not on 'cuda'" in extension.unavailable(torch.device("cuda"))
assert extension.registered() == ["built_for", "fill", "toolkit"]
assert path in extension.status()
assert extension._emulator.toolkit == (13, 2)

x = torch.zeros(2)
torch.ops.fastattn_cuda.fill(x, 3.0)
assert x.tolist() == [3.0, 0.0]
with torch._subclasses.FakeTensorMode():
    assert torch.ops.fastattn_cuda.fill(torch.zeros(2), 3.0) is None

shutil.copy(path, other)
try:
    extension.use(other)
except RuntimeError as error:
    assert "only one library can be" in str(error)
    print("held")
"""


@pytest.fixture(autouse=True)
def _no_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests loaded in this process does not count."""
    monkeypatch.setattr(extension, "_emulator", None)


def library(folder: Path, source: str, *flags: str) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("g++ was not found")
    (folder / "library.cpp").write_text(source)
    path = folder / "library.so"
    command = ["g++", "-std=c++17", "-shared", "-fPIC", "library.cpp", "-o", str(path), *flags]
    subprocess.run(command, cwd=folder, check=True)
    return path


def torch_flags() -> list[str]:
    folder = Path(torch.__file__).parent
    return [
        *("-isystem", str(folder / "include"), "-DTORCH_TARGET_VERSION=0x020a000000000000"),
        *("-L", str(folder / "lib"), "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"),
    ]


def test_a_library_runs_on_cpu_tensors(tmp_path: Path) -> None:
    path = library(tmp_path, TINY, *torch_flags())
    run = subprocess.run(
        [sys.executable, "-c", LOAD, str(path), str(tmp_path / "other.so")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.stdout == "held\n", run.stderr


@pytest.mark.skipif(not asked(), reason="FASTATTN_CUDA_ARCHS does not ask for the extension")
def test_what_was_asked_for_is_built_and_loads() -> None:
    code = "from fastattn import extension; extension.load()"  # not here: only one can be loaded
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("archs", "outcome"), [("90a", pytest.fail.Exception), ("", pytest.skip.Exception)]
)
def test_without_it_tests_fail_where_it_was_asked_for(
    archs: str, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU: tests of the `cuda` backend begin with Emulator()."""
    plant(monkeypatch, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("FASTATTN_CUDA_ARCHS", archs)
    with pytest.raises(outcome, match="not built, this is a pure Python install"):
        Emulator()


# --- what cannot be loaded ------------------------------------------------------------------------


def plant(monkeypatch: pytest.MonkeyPatch, path: Path | None) -> None:
    """`path` is fastattn._C, no library is loaded, and there is a GPU."""
    monkeypatch.setattr(extension, "find", lambda: path)
    monkeypatch.setattr(extension, "registered", list)
    monkeypatch.setattr(extension, "_no_gpu", lambda: None)


def test_a_missing_symbol_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = "void torch_of_tomorrow(); void f() { torch_of_tomorrow(); }"
    plant(monkeypatch, library(tmp_path, call))
    reason = extension.unavailable(GPU)
    assert reason is not None and "\n" not in reason
    assert reason.startswith("the extension cannot be loaded: undefined symbol: ")
    assert "torch_of_tomorrow" in reason
    assert extension.status() == reason.replace("the extension cannot", "built, cannot")
    assert extension.unavailable(CPU) == "the CUDA kernels run on NVIDIA GPUs, not on a CPU"
    with pytest.raises(CannotLoad, match="torch_of_tomorrow"):
        extension.load()


def test_another_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needed").mkdir()
    needed = library(tmp_path / "needed", "int libcudart_of_yesterday;")
    path = library(tmp_path, "", "-Wl,--no-as-needed", str(needed))
    needed.unlink()
    plant(monkeypatch, path)
    assert str(needed) in str(extension.unavailable(GPU))


def test_a_file_that_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "_C.abi3.so"
    path.write_text("no library")
    plant(monkeypatch, path)
    assert "the extension cannot be loaded: " in str(extension.unavailable(GPU))
    with pytest.raises(CannotLoad):
        extension._load(path, "cpu")


def test_two_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which torch would end the process: the tests' emulator, and what is built."""
    path = tmp_path / "_C.so"
    path.touch()
    plant(monkeypatch, path)
    monkeypatch.setattr(extension, "registered", lambda: ["attention_forward"])
    with pytest.raises(extension.CannotLoad, match="only one library can be"):
        extension.load()
    assert "cannot be loaded: fastattn_cuda has been loaded already" in extension.status()


# --- what runs where ------------------------------------------------------------------------------


def test_a_pure_python_install(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, None)
    assert extension.unavailable(GPU) == extension.status() == extension.NOT_BUILT
    assert "\n" not in extension.NOT_BUILT
    with pytest.raises(CannotLoad, match="not built"):
        extension.load()


def test_other_devices() -> None:
    assert extension.unavailable(CPU) == "the CUDA kernels run on NVIDIA GPUs, not on a CPU"
    assert "not on 'meta'" in str(extension.unavailable(torch.device("meta")))


LIBRARY = Library(Path("_C.abi3.so"), "80+PTX;90a", (13, 0), "cuda")


def with_gpu(
    monkeypatch: pytest.MonkeyPatch, *, cuda: str | None = "13.0", hip: str | None = None,
    available: bool = True, capability: tuple[int, int] = (9, 0),
) -> None:  # fmt: skip
    """A built extension, a torch and a GPU."""
    monkeypatch.setattr(extension, "find", lambda: LIBRARY.path)
    monkeypatch.setattr(extension, "_loaded", lambda path: LIBRARY)
    monkeypatch.setattr(extension, "driver", lambda: (13, 0))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def test_a_gpu_that_it_has_code_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu(monkeypatch)
    assert extension.unavailable(GPU) is None
    assert extension.status() == "built for 80+PTX;90a with CUDA 13.0, loaded"


def test_a_gpu_that_it_has_no_code_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu(monkeypatch, capability=(7, 5))
    reason = "it has no code for compute capability 7.5: it was built for 80+PTX;90a"
    assert extension.unavailable(GPU) == reason


def test_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu(monkeypatch, cuda=None)
    assert extension.unavailable(GPU) == "this torch is built without CUDA"
    assert extension.status().endswith("CUDA 13.0, not used: this torch is built without CUDA")


def test_a_torch_for_other_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu(monkeypatch, cuda=None, hip="6.4")
    assert "this torch is built for ROCm" in str(extension.unavailable(GPU))


def test_no_gpu_says_what_torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old.\nPlease update")

    with_gpu(monkeypatch, available=False)
    monkeypatch.setattr(torch.cuda, "init", init)
    reason = "torch sees no CUDA device: The NVIDIA driver on your system is too old."
    assert extension.unavailable(GPU) == reason
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    assert extension.unavailable(GPU) == "torch sees no CUDA device"


@pytest.mark.parametrize(
    ("built_for", "runs"),
    [
        ("80", {"8.0", "8.6", "8.9"}),  # code: from its capability on, in its generation
        ("86", {"8.6", "8.9"}),
        ("80+PTX", {"8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0", "12.1"}),
        ("90a", {"9.0"}),
        ("90a+PTX", {"9.0"}),  # PTX for "a" is only for that one
        ("100f", {"10.0", "10.3"}),
        ("100a", {"10.0"}),
        ("120f+PTX", {"12.0", "12.1"}),
        ("75;90a", {"7.5", "9.0"}),
        ("80+PTX; 90a", {"8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0", "12.1"}),
        ("emulator", set()),
    ],
)
def test_architectures(built_for: str, runs: set[str]) -> None:
    gpus = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)]
    built = Library(Path("x"), built_for, (13, 0), "cuda")
    able = [gpu for gpu in gpus if extension.no_code(built, Capability(*gpu), (13, 0)) is None]
    assert {str(Capability(*gpu)) for gpu in able} == runs


@pytest.mark.parametrize(
    ("gpu", "driver", "runs"),
    [
        ((8, 6), (13, 1), True),
        ((8, 6), (13, 0), True),  # code, and a driver of the same major version
        ((12, 0), (13, 0), False),  # PTX of a newer toolkit
        ((12, 0), (13, 1), True),
        ((8, 6), (12, 9), False),
        ((12, 0), (14, 0), True),
    ],
)
def test_drivers(gpu: tuple[int, int], driver: tuple[int, int], runs: bool) -> None:
    built = Library(Path("x"), "80+PTX;90a", (13, 1), "cuda")
    reason = extension.no_code(built, Capability(*gpu), driver)
    assert (reason is None) is runs
    if reason is not None:
        assert f"driver supports CUDA {driver[0]}.{driver[1]} and" in reason
        assert "built with CUDA 13.1" in reason
