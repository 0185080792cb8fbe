"""Sealed folders: durable before they have their name, and any damage is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastattn.training.checkpoints import durable
from fastattn.training.distributed.processes import Processes

ALONE = Processes("cpu")


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    folder = tmp_path / "beside"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.json").write_text("{}")
    (folder / "inner" / "b.bin").write_bytes(bytes(range(256)) * 5000)  # more than one piece
    durable.seal(folder, ALONE)
    return folder


def test_a_folder_as_it_was_sealed_is_whole(sealed: Path) -> None:
    assert durable.damage(sealed, ALONE) is None
    durable.rename(sealed, sealed.with_name("there"))
    assert durable.damage(sealed.with_name("there"), ALONE) is None


def test_any_damage_is_named(sealed: Path) -> None:
    data = sealed / "inner" / "b.bin"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    assert (
        durable.damage(sealed, ALONE)
        == f"inner/b.bin has {len(whole) - 1} bytes and had {len(whole)}"
    )
    for place in (0, 2**20 + 3, len(whole) - 1):
        data.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert (
            durable.damage(sealed, ALONE)
            == "inner/b.bin has other bytes than were written (SHA-256)"
        )
    data.unlink()
    assert durable.damage(sealed, ALONE) == "inner/b.bin is missing"
    manifest = sealed / "manifest.json"
    for content in ("", '{"a.json": {"size"', "[1]", "null", '{"a.json": 3}'):
        manifest.write_text(content)
        assert durable.damage(sealed, ALONE) == "manifest.json cannot be read"
    manifest.unlink()
    assert durable.damage(sealed, ALONE) == "manifest.json is missing"


def test_everything_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of a save: files, the manifest, their folders, the renaming, the folder above."""
    folder, target = tmp_path / "beside", tmp_path / "there"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "b.bin").write_bytes(b"b")
    done: list[str] = []

    def synced(file: int) -> None:
        place = Path(os.readlink(f"/proc/self/fd/{file}"))
        manifest = (folder / "manifest.json").exists()
        done.append(f"{place.relative_to(tmp_path)}{' with the manifest' if manifest else ''}")

    rename = os.rename
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", lambda *a: (done.append("renamed"), rename(*a)))
    durable.seal(folder, ALONE)
    durable.rename(folder, target)
    assert done[0] == "beside/inner/b.bin"
    assert done[1] == "beside/manifest.json with the manifest"
    assert sorted(done[2:4]) == ["beside with the manifest", "beside/inner with the manifest"]
    assert done[4:] == ["renamed", "."]
