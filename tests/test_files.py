"""Files are written whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from fastattn.files import folder_written_beside, local_path, write_text, written_beside


def test_the_file_and_its_folder_are_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    write_text(path, "今天\n")
    assert path.read_bytes() == "今天\n".encode()
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(OSError, match="disk"), written_beside(path) as temporary:
        temporary.write_text("half of the new")
        raise OSError("disk full")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_home_and_empty_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_text("~/file", "mine")
    assert (tmp_path / "file").read_text() == "mine"
    assert local_path("path", "~/file") == local_path("path", Path("~/file")) == tmp_path / "file"
    assert local_path("path", "a~b") == Path("a~b")
    with pytest.raises(ValueError, match="where is an empty path"):
        local_path("where", "")
    for wrong in (None, 3, b"file"):
        with pytest.raises(TypeError, match="where must be a path, got"):
            local_path("where", wrong)  # type: ignore[arg-type]


def test_a_folder_keeps_what_is_not_replaced(tmp_path: Path) -> None:
    for name in ("mine", "old-1", "last"):
        (tmp_path / name).write_text("before")
    with folder_written_beside(tmp_path, "last", lambda name: name.startswith("old")) as beside:
        (beside / "new").write_text("after")
        (beside / "last").write_text("after")
        assert (tmp_path / "last").read_text() == "before"
    found = {entry.name: entry.read_text() for entry in tmp_path.iterdir()}
    assert found == {"mine": "before", "new": "after", "last": "after"}


def test_last_is_missing_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies between two renamings leaves no folder that looks whole."""
    for name in ("a", "last"):
        (tmp_path / name).write_text("before")
    states, replace = [], os.replace

    def watch(source: Path, target: Path) -> None:
        replace(source, target)
        states.append((tmp_path / "last").exists())

    monkeypatch.setattr("os.replace", watch)
    with folder_written_beside(tmp_path, "last", lambda name: False) as beside:
        for name in ("a", "last"):
            (beside / name).write_text("after")
    assert states == [False, False, False, True]
