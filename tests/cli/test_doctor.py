"""`fastattn doctor`: what it says is what is there."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastattn
from fastattn import backends, chips, extension
from fastattn.cli import main
from fastattn.extension import CannotLoad, Library
from fastattn.ops.common import ptxas


def doctor(capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["doctor"]) == 0
    return capsys.readouterr().out


def test_versions_devices_and_settings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TRITON_INTERPRET", "FASTATTN_TRITON_ON_CPU"):
        monkeypatch.delenv(name, raising=False)
    out = doctor(capsys)
    assert re.search(rf"^  fastattn +{re.escape(fastattn.__version__)}$", out, re.MULTILINE)
    assert re.search(rf"^  torch +{re.escape(torch.__version__)}$", out, re.MULTILINE)
    assert re.search(r"^  python +3\.\d+\.\d+", out, re.MULTILINE)
    assert re.search(r"^  triton +(\d|not installed)", out, re.MULTILINE)
    assert extension.status() in out
    for name in ("FASTATTN_BACKEND", "TRITON_INTERPRET", "FASTATTN_TRITON_ON_CPU"):
        assert re.search(rf"^  {name} +not set$", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("built", "reason", "line"),
    [
        (False, None, "not built, this is a pure Python install: .*"),
        (True, None, r"built for 80\+PTX;90a with CUDA 13.0, loaded"),
        (True, "this torch is built without CUDA", "built for .*, not used: this torch .*"),
        (CannotLoad("undefined symbol: x"), None, "built, cannot be loaded: undefined symbol: x"),
    ],
)
def test_the_extension(
    built: bool | CannotLoad, reason: str | None, line: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = Path("_C.abi3.so")
    library = Library(path, "80+PTX;90a", (13, 0), "cuda") if built is True else built
    monkeypatch.setattr(extension, "_emulator", None)
    monkeypatch.setattr(extension, "find", lambda: path if built else None)
    monkeypatch.setattr(extension, "_loaded", lambda path: library)
    monkeypatch.setattr(extension, "_no_gpu", lambda: reason)
    assert re.search(rf"^  extension  {line}$", doctor(capsys), re.MULTILINE)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Let torch have a GPU of a compute capability, and its tensors be on the CPU."""

    def there_is(major: int, minor: int) -> None:
        properties = SimpleNamespace(name="a GPU", major=major, minor=minor, total_memory=2**36)
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: properties)
        monkeypatch.setattr("fastattn.cli.doctor._available", lambda: [torch.device("cpu")])
        monkeypatch.setattr(extension, "status", lambda: "built")

    return there_is


def assembler(folder: Path, version: str) -> str:
    """A program that says that it is this ptxas."""
    path = folder / f"ptxas-{version}"
    path.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {version}, V{version}.1\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("capability", "version", "warned"),
    [((9, 0), "13.2", True), ((9, 0), "13.3", False), ((9, 0), "14.0", False),
     ((8, 0), "12.8", False), ((10, 0), "12.9", False)],
)  # fmt: skip
def test_the_assembler_of_a_gpu(
    capability: tuple[int, int], version: str, warned: bool, tmp_path: Path,
    gpu: Callable[[int, int], None], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It is named, and one that may miscompile on Hopper is warned of, with the fix."""
    gpu(*capability)
    path = assembler(tmp_path, version)
    for name in ptxas.VARIABLES:
        monkeypatch.setenv(name, path)
    newer = assembler(tmp_path, "13.9")
    monkeypatch.setattr(ptxas, "_places", lambda: iter([path, newer]))
    out = doctor(capsys)
    assert f"  ptxas      {path}, version {version}\n" in out
    warning = rf"^  ptxas      WARNING: on Hopper.*set TRITON_PTXAS\w*_PATH to {newer}$"
    assert (re.search(warning, out, re.MULTILINE) is not None) == warned
    monkeypatch.setattr(ptxas, "_places", lambda: iter([path]))
    assert ("PyPI's nvidia-cuda-nvcc" in doctor(capsys)) == warned


def test_the_variable_that_the_fix_names_takes_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ptxas.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    default = ptxas.in_use(90)
    monkeypatch.setattr(chips, "HOPPER_PTXAS", (99, 0))  # whatever this Triton carries
    assert ptxas.warning(100) is None
    variable = re.search(r"TRITON_PTXAS\w*_PATH", ptxas.warning(90))[0]
    path = assembler(tmp_path, "98.7")
    monkeypatch.setenv(variable, path)
    assert ptxas.in_use(90) == (path, (98, 7)) != default


def test_other_assemblers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version once, the newest first, and not the one in use."""
    used, *others = (assembler(tmp_path, version) for version in ("13.1", "12.9", "13.10", "13.1"))
    broken = tmp_path / "ptxas"
    broken.write_text("")
    for name in ptxas.VARIABLES:
        monkeypatch.setenv(name, used)
    monkeypatch.setattr(ptxas, "_places", lambda: iter([*others, used, broken, tmp_path / "none"]))
    assert [other.version for other in ptxas.others(90)] == [(13, 10), (12, 9)]


def test_every_op_has_its_backend_and_the_reasons(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extension, "_emulator", None)
    out = doctor(capsys)
    for op in ("attention", "layer_norm", "rms_norm", "ffn"):
        entry = re.search(
            rf"^  {op} on cpu, [\w ]*float32[\w ]*: (\w+) \(first capable\)\n((?:    .*\n)+)",
            out,
            re.MULTILINE,
        )
        assert entry is not None, op
        assert entry[1] == "torch"
        reasons = {line.split()[0]: line for line in entry[2].splitlines()}
        assert set(reasons) == {"gluon", "cuda", "triton", "reference"}
        assert reasons["reference"].endswith("could, but torch comes first")
        assert reasons["cuda"].endswith("the CUDA kernels run on NVIDIA GPUs, not on a CPU")


def test_it_agrees_with_explain(capsys: pytest.CaptureFixture[str]) -> None:
    q = torch.empty(2, 512, 8, 64)
    explanation = backends.explanation_of(fastattn.attention, q, q, q, causal=True)
    out = doctor(capsys)
    for reason in filter(None, explanation.reasons.values()):
        assert reason in out


def test_a_named_backend_shows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTATTN_BACKEND", "reference")
    out = doctor(capsys)
    assert re.search(r"^  FASTATTN_BACKEND +'reference'$", out, re.MULTILINE)
    assert len(re.findall(r": reference \(FASTATTN_BACKEND=reference\)$", out, re.MULTILINE)) >= 4


def test_a_wrong_backend_in_the_environment_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTATTN_BACKEND", "tritn")
    out = doctor(capsys)
    assert "no op can run: the environment variable FASTATTN_BACKEND must be one of" in out


def test_it_needs_none_of_the_extras(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("rich", "transformers", "tokenizers", "matplotlib", "safetensors"):
        monkeypatch.setitem(sys.modules, package, None)
    assert "attention on cpu" in doctor(capsys)
