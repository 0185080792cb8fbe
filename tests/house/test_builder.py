"""csrc/builder.py: it compiles again what has changed, and says what a failure was."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from emulator import library

builder = library.builder


class Tree:
    """Two sources, of which `a.cpp` reads a header, and a library of them."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / "build of it"
        (root / "csrc").mkdir()
        self.write("csrc/shared.h", "constexpr int one = 1;")
        self.write("csrc/a.cpp", '#include "shared.h"\nint a() { return one; }')
        self.write("csrc/b.cpp", "int b() { return 2; }")

    def write(self, name: str, text: str, seconds: int = 0) -> None:
        (self.root / name).write_text(text)
        os.utime(self.root / name, (time.time() + seconds,) * 2)

    def build(self, *names: str, version: str = "", flags: tuple[str, ...] = ()) -> set[str]:
        """The outputs that are new."""
        times = {path: path.stat().st_mtime_ns for path in self.folder.glob("**/*.*o")}
        time.sleep(0.02)
        builder.build(
            ["g++", "-fPIC", "-Wall"], [f"csrc/{name}.cpp" for name in names or "ab"],
            self.root, self.folder, linker=["g++", "-shared", *flags], library="lib.so",
            version=version, say=lambda line: None,
        )  # fmt: skip
        found = self.folder.glob("**/*.*o")
        return {path.name for path in found if path.stat().st_mtime_ns != times.get(path)}


ALL = {"a.cpp.o", "b.cpp.o", "lib.so"}


@pytest.fixture(params=["ninja", "without ninja"])
def tree(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Tree:
    if shutil.which("g++") is None:
        pytest.skip("g++ was not found")
    if request.param == "without ninja":
        monkeypatch.setattr(builder.shutil, "which", lambda name, path: None)
    elif shutil.which("ninja") is None:
        pytest.skip("ninja was not found")
    return Tree(tmp_path)


def test_a_change_is_compiled_and_nothing_else_is_built_twice(
    tree: Tree, request: pytest.FixtureRequest
) -> None:
    ninja = "[ninja]" in request.node.name
    assert tree.build() == ALL
    assert tree.build() == set()
    tree.write("csrc/b.cpp", "int b() { return 3; }")
    assert tree.build() == (ALL - {"a.cpp.o"} if ninja else ALL)
    tree.write("csrc/shared.h", "constexpr int one = 11;")
    assert tree.build() == (ALL - {"b.cpp.o"} if ninja else ALL)
    assert {"a.cpp.o", "b.cpp.o"} <= tree.build(version="2")
    assert tree.build("a", version="2") >= {"lib.so"}  # without b


def test_a_failure_names_its_files_and_has_the_output(tree: Tree) -> None:
    tree.write("csrc/bad.cpp", "int bad() { return nothing; }")
    tree.write("csrc/worse.cpp", "#error that is all")
    with pytest.raises(builder.BuildError) as caught:
        tree.build("a", "bad", "b", "worse")
    message = str(caught.value)
    assert "csrc/bad.cpp.o" in message and "'nothing' was not declared" in message.replace("‘", "'").replace("’", "'")  # fmt: skip
    assert "csrc/worse.cpp.o" in message and "that is all" in message
    assert (tree.folder / "csrc" / "b.cpp.o").exists()
    with pytest.raises(builder.BuildError, match=r"lib\.so cannot be built"):
        tree.build(flags=("-lof_nobody",))


def test_a_compiler_that_is_not_there(tree: Tree) -> None:
    with pytest.raises(builder.BuildError, match=r"no-g.*(cannot be run|not found)"):
        builder.build(["no-g"], ["csrc/a.cpp"], tree.root, tree.folder)


def test_a_process_keeps_the_library_that_it_has_loaded(tree: Tree) -> None:
    tree.build()
    with open(tree.folder / "lib.so", "rb") as held:
        tree.write("csrc/b.cpp", "int b() { return 3; }")
        tree.build()
        assert held.read(4) == b"\x7fELF"
        assert os.fstat(held.fileno()).st_ino != (tree.folder / "lib.so").stat().st_ino


def test_the_emulator_has_its_own_sources_and_no_tests(tmp_path: Path) -> None:
    names = ("library.cpp", "ffn/a.cu", "ffn/a.cuh", "emulator/machine.cpp", "emulator/x/y.cpp")
    for name in names:
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert library.sources(tmp_path) == [
        "csrc/emulator/machine.cpp", "csrc/ffn/a.cu", "csrc/library.cpp",
    ]  # fmt: skip
