"""setup.py: its decisions; only an install that asked for the extension fails without it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastattn

ROOT = Path(__file__).parents[2]
TORCH = (Path("torch"), (2, 10))

# Smallest library on the stable ABI that has a kernel and an op.
PLANTED = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

__global__ void fill(float* x) { x[threadIdx.x] = 1.0f; }

torch::stable::Tensor same(torch::stable::Tensor x) {
  if (x.numel() < 0) fill<<<1, 32>>>(static_cast<float*>(x.data_ptr()));
  return torch::stable::clone(x);
}
STABLE_TORCH_LIBRARY(fastattn_planted, m) { m.def("same(Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(fastattn_planted, CompositeExplicitAutograd, m) {
  m.impl("same", TORCH_BOX(&same));
}
"""


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_py_under_test", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a build reads."""
    root = tmp_path / "tree"
    skip = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "fastattn", root / "fastattn", ignore=skip)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, root)
    (root / "csrc").mkdir()
    shutil.copy(ROOT / "csrc" / "builder.py", root / "csrc")
    return root


def plant(root: Path, source: str = PLANTED) -> None:
    (root / "csrc" / "emulator").mkdir(parents=True)
    (root / "csrc" / "library.cu").write_text(source)
    (root / "csrc" / "emulator" / "host.cpp").write_text("#error not part of the extension")


# Stands for nvcc: BAD names a source to fail at; the "library" wants a glibc of 2.30.
COMPILER = r"""#!/bin/sh
while [ $# -gt 0 ]; do
    case "$1" in -c) source=$2;; -o) output=$2;; esac
    shift
done
if [ "$source" = "csrc/$BAD" ]; then echo "$source: broken" >&2; exit 3; fi
printf 'library\0GLIBC_2.17\0GLIBC_2.30\0' > "$output"
"""


def fake_nvcc(folder: Path, body: str = COMPILER) -> Path:
    folder.mkdir()
    program = folder / "nvcc"
    program.write_text(body if body.startswith("#!") else f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    return folder


def run_build(root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build a wheel as an installer does."""
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    unset = ("CUDA_HOME", "CUDA_PATH", "FASTATTN_CUDA_ARCHS")
    clean = {k: v for k, v in os.environ.items() if k not in unset}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={**clean, **environment},
        capture_output=True,
        text=True,
    )


def build_wheel(root: Path, **environment: str) -> tuple[str, set[str], str]:
    """The wheel's name, its files, what the build printed."""
    run = run_build(root, **environment)
    assert run.returncode == 0, run.stdout + run.stderr
    wheel = max((root / "dist").glob("*.whl"), key=lambda path: path.stat().st_mtime_ns)
    return wheel.name, set(zipfile.ZipFile(wheel).namelist()), run.stdout


def test_sources_are_those_of_csrc_without_the_emulator(
    setup_py: ModuleType, tmp_path: Path
) -> None:
    assert setup_py.find_sources(tmp_path) == []
    plant(tmp_path)
    (tmp_path / "csrc" / "notes.md").write_text("no source")
    assert setup_py.find_sources(tmp_path) == ["csrc/library.cu"]


@pytest.mark.parametrize(
    ("sources", "archs", "nvcc", "found", "reason"),
    [
        ([], "90a", "nvcc", TORCH, "holds no sources"),
        (["a.cu"], " ", "nvcc", TORCH, "FASTATTN_CUDA_ARCHS is empty"),
        (["a.cu"], " ; ", "nvcc", TORCH, "FASTATTN_CUDA_ARCHS is empty"),
        (["a.cu"], "80;sm_90", "nvcc", TORCH, "the entry 'sm_90'; it is a list such as"),
        (["a.cu"], "9.0", "nvcc", TORCH, "the entry '9.0'; it is a list such as"),
        (["a.cu"], "80,90", "nvcc", TORCH, "the entry '80,90'; it is a list such as"),
        (["a.cu"], "80 --help", "nvcc", TORCH, "the entry '80--help'; it is a list such as"),
        (["a.cu"], "75+PTX", "nvcc", TORCH, "the entry '75[+]PTX'; the kernels need 80"),
        (["a.cu"], "90a", None, TORCH, "nvcc was not found"),
        (["a.cu"], "90a", "nvcc", None, "torch is not installed"),
        (["a.cu"], "90a", "nvcc", (Path("torch"), (2, 9)), "torch 2.9 .* torch >= 2.10"),
    ],
)
def test_each_thing_that_is_missing_is_named(
    setup_py: ModuleType,
    sources: list[str],
    archs: str,
    nvcc: str | None,
    found: tuple[Path, tuple[int, int]] | None,
    reason: str,
) -> None:
    assert re.search(reason, setup_py.skip_reason(sources, archs, nvcc, found))


def test_nothing_is_missing(setup_py: ModuleType) -> None:
    for archs in ("90a", setup_py.DEFAULT_ARCHS, " 80 + PTX; 100f;"):
        assert setup_py.skip_reason(["a.cu"], archs, "nvcc", TORCH) is None


def test_architectures(setup_py: ModuleType) -> None:
    assert setup_py.gencode_flags("80+PTX; 90a;") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=compute_80",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]


def test_toolkit_named_by_the_user_comes_first(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = fake_nvcc(tmp_path / "bin", "true")
    on_path = fake_nvcc(tmp_path / "path", "true")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", str(on_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup_py.find_nvcc() == str(named / "nvcc")
    monkeypatch.delenv("CUDA_HOME")
    assert setup_py.find_nvcc() == str(on_path / "nvcc")


def test_torch_is_found_though_an_isolated_build_hides_it(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [])
    folder, version = setup_py.find_torch()
    assert folder.samefile(Path(torch.__file__).parent)
    assert version == tuple(int(part) for part in torch.__version__.split(".")[:2])


def test_tree_as_it_is_gives_a_pure_wheel_with_its_data(tree: Path) -> None:
    name, files, printed = build_wheel(tree, FASTATTN_CUDA_ARCHS="")
    assert name == f"fastattn-{fastattn.__version__}-py3-none-any.whl"
    assert "fastattn: extension skipped" in printed
    for data in (*ROOT.glob("fastattn/**/*.txt"), *ROOT.glob("fastattn/**/*.md")):
        assert data.relative_to(ROOT).as_posix() in files
    assert "fastattn/py.typed" in files
    assert not any(file.startswith(("tests/", "benchmarks/", "csrc/")) for file in files)


def test_failing_compiler_gives_a_pure_wheel_and_a_line(tree: Path, tmp_path: Path) -> None:
    """The file is named, and what the compiler said of it is shown."""
    plant(tree)
    (tree / "csrc" / "bad.cu").touch()
    fake_nvcc(tmp_path / "bin")
    name, files, printed = build_wheel(tree, CUDA_HOME=str(tmp_path), BAD="bad.cu")
    assert name.endswith("-py3-none-any.whl")
    assert not any(file.endswith(".so") for file in files)
    assert "csrc/bad.cu: broken\n" in printed
    reason = "extension skipped, the package is pure Python: .*csrc/bad.cu.* cannot be built: "
    assert re.search(reason, printed)


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"FASTATTN_CUDA_ARCHS": "90a", "BAD": "bad.cu"}, ".*csrc/bad.cu.* cannot be built: "),
        ({"FASTATTN_CUDA_ARCHS": "75"}, "FASTATTN_CUDA_ARCHS has the entry '75'"),
    ],
)
def test_who_asked_for_the_extension_gets_an_error(
    environment: dict[str, str], reason: str, tree: Path, tmp_path: Path
) -> None:
    plant(tree)
    (tree / "csrc" / "bad.cu").touch()
    fake_nvcc(tmp_path / "bin")
    run = run_build(tree, CUDA_HOME=str(tmp_path), **environment)
    assert run.returncode != 0
    assert re.search(f"the extension was asked for and cannot be built: {reason}", run.stderr)
    assert ("csrc/bad.cu: broken" in run.stdout) == ("BAD" in environment)
    assert not list(tree.glob("dist/*.whl"))


def test_working_compiler_gives_one_wheel_for_every_python(tree: Path, tmp_path: Path) -> None:
    plant(tree)
    fake_nvcc(tmp_path / "bin")
    name, files, printed = build_wheel(tree, CUDA_HOME=str(tmp_path), FASTATTN_CUDA_ARCHS="80; 90a")
    assert "-cp310-abi3-manylinux_2_30_" in name
    assert "fastattn/_C.abi3.so" in files
    assert not any("emulator" in file or file.endswith((".o", ".py.o")) for file in files)
    assert "building the extension for 80;90a" in printed
    assert re.search(r"built the extension for 80;90a in \d+ s", printed)


@pytest.mark.parametrize(
    ("symbols", "tag"),
    [
        (b"", "2_28"),  # torch itself runs on none older
        (b"\0GLIBC_2.2.5\0GLIBC_2.17\0", "2_28"),
        (b"\0GLIBC_2.34\0GLIBC_2.9\0", "2_34"),
        (b"\0GLIBCXX_3.4\0GLIBCXX_3.4.9\0GLIBCXX_3.4.26\0", "2_31"),
        (b"\0GLIBC_2.34\0GLIBCXX_3.4.30\0", "2_35"),
        (b"\0GLIBC_2.38\0GLIBCXX_3.4.32\0", "2_39"),
        (b"\0NOT_GLIBC_2.40\0", "2_28"),
    ],
)
def test_wheels_say_which_systems_they_run_on(
    setup_py: ModuleType, symbols: bytes, tag: str
) -> None:
    assert setup_py.manylinux(symbols) == f"manylinux_{tag}"


def test_real_compiler_builds_a_library_that_torch_loads(
    tree: Path, setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    if setup_py.find_nvcc() is None:
        pytest.skip("nvcc was not found")
    plant(tree)
    _, _, printed = build_wheel(tree, FASTATTN_CUDA_ARCHS="80")
    (wheel,) = (tree / "dist").glob("*.whl")
    assert "-cp310-abi3-manylinux_2_" in wheel.name, printed
    zipfile.ZipFile(wheel).extract("fastattn/_C.abi3.so", tree)
    code = (
        "import torch; torch.ops.load_library('fastattn/_C.abi3.so');"
        "print(torch.ops.fastattn_planted.same(torch.arange(3)).tolist())"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert run.stdout.strip() == "[0, 1, 2]", run.stderr
