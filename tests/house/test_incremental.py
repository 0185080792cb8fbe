"""csrc/incremental.py: what is compiled anew, what is not, and what a failure says."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from emulator import library

incremental = library.incremental


class Tree:
    """Two sources, of which `a.cpp` reads a header."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / "build"
        self.said: list[str] = []
        (root / "csrc").mkdir()
        self.write("csrc/shared.h", "constexpr int one = 1;")
        self.write("csrc/a.cpp", '#include "shared.h"\nint a() { return one; }')
        self.write("csrc/b.cpp", "int b() { return 2; }")

    def write(self, name: str, text: str) -> None:
        """As if some time ago, so that the next compilation is certainly later."""
        path = self.root / name
        path.write_text(text)
        os.utime(path, (time.time() - 10,) * 2)

    def compile(
        self, *names: str, flags: Sequence[str] = (), version: str = "", jobs: int = 2
    ) -> set[str]:
        """What was compiled."""
        self.said.clear()
        sources = [f"csrc/{name}.cpp" for name in names or "ab"]
        self.objects = incremental.compile_all(
            ["g++", *flags], sources, self.root, self.folder, jobs, self.said.append, version
        )
        assert all(path.exists() for path in self.objects)
        return {line.split()[1].removeprefix("csrc/") for line in self.said if "compiled" in line}


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    if shutil.which("g++") is None:
        pytest.skip("g++ was not found")
    return Tree(tmp_path)


def test_only_what_changed_is_compiled(tree: Tree) -> None:
    assert tree.compile() == {"a.cpp", "b.cpp"}
    assert tree.said[-1].endswith("(2 of 2)")
    assert tree.compile() == set()
    assert tree.said == []
    tree.write("csrc/b.cpp", "int b() { return 3; }")
    assert tree.compile() == {"b.cpp"}
    tree.write("csrc/shared.h", "constexpr int one = 11;")
    assert tree.compile() == {"a.cpp"}


def test_contents_count_and_not_times(tree: Tree) -> None:
    tree.compile()
    os.utime(tree.root / "csrc" / "shared.h")
    assert tree.compile() == set()


def test_other_options_versions_and_lost_objects_compile_anew(tree: Tree) -> None:
    tree.compile()
    assert tree.compile(flags=["-O1"]) == {"a.cpp", "b.cpp"}
    assert tree.compile(flags=["-O1"], version="2") == {"a.cpp", "b.cpp"}
    tree.objects[0].unlink()
    assert tree.compile(flags=["-O1"], version="2") == {"a.cpp"}


def test_a_header_that_is_gone_is_no_crash(tree: Tree) -> None:
    tree.compile()
    (tree.root / "csrc" / "shared.h").unlink()
    tree.write("csrc/a.cpp", "int a() { return 1; }")
    assert tree.compile() == {"a.cpp"}


def test_a_source_that_changes_while_it_is_compiled_is_compiled_again(tree: Tree) -> None:
    tomorrow = time.time() + 3600
    os.utime(tree.root / "csrc" / "b.cpp", (tomorrow, tomorrow))
    tree.compile()
    assert tree.compile() == {"b.cpp"}


def test_a_failure_names_its_file_and_keeps_the_others(tree: Tree) -> None:
    tree.write("csrc/bad.cpp", "int bad() { return nothing; }")
    tree.write("csrc/worse.cpp", "#error that is all")
    with pytest.raises(incremental.BuildError) as caught:
        tree.compile("a", "bad", "b", "worse")
    message = str(caught.value)
    assert "csrc/bad.cpp does not compile: g++ exited with 1" in message
    assert "'nothing' was not declared" in message.replace("‘", "'").replace("’", "'")
    assert "csrc/worse.cpp does not compile" in message and "that is all" in message
    tree.write("csrc/bad.cpp", "int bad() { return 0; }")
    assert tree.compile("a", "b", "bad") == {"bad.cpp"}


def test_a_compiler_that_is_not_there(tree: Tree) -> None:
    with pytest.raises(
        incremental.BuildError, match=r"csrc/a.cpp does not compile: no-g cannot be"
    ):
        incremental.compile_all(["no-g"], ["csrc/a.cpp"], tree.root, tree.folder, 1, print)


def test_any_name_of_the_folder(tree: Tree) -> None:
    tree.folder = tree.root / "of a:b"
    assert tree.compile() == {"a.cpp", "b.cpp"}
    assert tree.compile() == set()
    tree.write("csrc/shared.h", "constexpr int one = 2;")
    assert tree.compile() == {"a.cpp"}


def test_warnings_are_shown(tree: Tree) -> None:
    tree.write("csrc/b.cpp", "int b() { int unused; return 2; }")
    tree.compile(flags=["-Wall"])
    assert any("unused variable" in line for line in tree.said)


def test_files_are_compiled_at_the_same_time(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two waits for the other one to have begun."""
    both = threading.Barrier(2, timeout=30)
    run = incremental._run

    def waiting(*arguments: object) -> str:
        both.wait()
        return run(*arguments)

    monkeypatch.setattr(incremental, "_run", waiting)
    assert tree.compile(jobs=2) == {"a.cpp", "b.cpp"}


def test_linking(tree: Tree) -> None:
    output = tree.folder / "library.so"

    def link(*flags: str) -> int:
        """The library's inode, another one for another library."""
        command = ["g++", "-shared", *flags]
        incremental.link(command, tree.objects, tree.root, output)
        return output.stat().st_ino

    tree.compile(flags=["-fPIC"])
    first = link()
    assert link() == first
    tree.write("csrc/b.cpp", "int b() { return 3; }")
    tree.compile(flags=["-fPIC"])
    with open(output, "rb") as held:  # as a process that has loaded it
        second = link()
        assert held.read(4) == b"\x7fELF"
    assert second != first
    assert link("-s") != second
    with pytest.raises(incremental.BuildError, match=r"library\.so does not link: g\+\+ exited"):
        link("-lof_nobody")
    assert output.exists()


def test_the_emulator_has_its_own_sources_and_no_tests(tmp_path: Path) -> None:
    for name in (
        "library.cpp",
        "ffn/a.cu",
        "ffn/a.cuh",
        "emulator/machine.cpp",
        "emulator/x/y.cpp",
    ):
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert library.sources(tmp_path) == [
        "csrc/emulator/machine.cpp", "csrc/ffn/a.cu", "csrc/library.cpp",
    ]  # fmt: skip
