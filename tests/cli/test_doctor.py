"""`fastattn doctor`: what it says is what is there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn import backends, extension
from fastattn.cli import main
from fastattn.extension import CannotLoad, Library


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
    assert re.search(r"^  FASTATTN_BACKEND +not set$", out, re.MULTILINE)
    assert re.search(r"^  TRITON_INTERPRET +not set$", out, re.MULTILINE)
    assert re.search(r"^  FASTATTN_TRITON_ON_CPU +not set$", out, re.MULTILINE)


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
        assert set(reasons) == {"cuda", "triton", "reference"}
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
