"""Files to records: formats, folders and patterns, and all that can be wrong with a file."""

from __future__ import annotations

import gzip
import json
import os
import random
from pathlib import Path

import pytest

from fastattn.training.data import find_files, read_records

BOM = b"\xef\xbb\xbf"
TEXT = b"one\r\ntwo \n\n \t\nthree\xe2\x80\xa8 still\n"


def records(path: Path, documents: str = "file") -> list[tuple[str, dict]]:
    """Places, relative to the file's folder, and records."""
    return [
        (place.removeprefix(f"{path.parent}/"), dict(record))
        for place, record in read_records(path, documents)
    ]


def written(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("bom", [b"", BOM])
@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.txt.gz"])
@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ("file", {"": "one\ntwo \n\n \t\nthree\u2028 still\n"}),
        ("line", {":1": "one", ":2": "two ", ":5": "three\u2028 still"}),
        ("paragraph", {":1": "one\ntwo ", ":5": "three\u2028 still"}),
    ],
)
def test_texts(tmp_path: Path, documents: str, expected: dict, name: str, bom: bytes) -> None:
    path = written(tmp_path / name, bom + TEXT)
    expected = [(name + place, {"text": text}) for place, text in expected.items()]
    assert records(path, documents) == expected
    written(path, (bom + TEXT).removesuffix(b"\n"))
    if documents != "file":
        assert records(path, documents) == expected


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_lines_of_json(tmp_path: Path, name: str, end: bytes) -> None:
    objects = [{"text": "今天\u2028 \x00"}, {}, {"a": [1, {"b": None}]}]
    lines = [json.dumps(o, ensure_ascii=i == 0).encode() for i, o in enumerate(objects)]
    path = written(tmp_path / name, BOM + end.join(lines))
    step = end.count(b"\n")
    assert records(path) == [(f"{name}:{1 + step * i}", o) for i, o in enumerate(objects)]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"text": f"row {i}", "label": i, "tags": ["a"] * (i % 3)} for i in range(3000)]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=700)
    assert records(path) == [(f"a.parquet: row {i + 1}", row) for i, row in enumerate(rows)]

    whole = path.read_bytes()
    draw = random.Random(0)
    for cut in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(
            ValueError, match=r"a\.parquet: no whole Parquet file, or a damaged one"
        ):
            records(path)
    # The first page's head is overwritten.
    path.write_bytes(whole[:4] + draw.randbytes(60) + whole[64:])
    with pytest.raises(ValueError, match=r"a\.parquet: no whole Parquet file, or a damaged one"):
        records(path)
    parquet.write_table(pyarrow.Table.from_pylist(rows[:0]), path)
    with pytest.raises(ValueError, match=r"a\.parquet: is empty"):
        records(path)


HOSTILE = {
    "empty": ("a.txt", b"", "a.txt: is empty, or blank"),
    "blank": ("a.txt", BOM + b"\n \n", "a.txt: is empty, or blank"),
    "no objects": ("a.jsonl", b"\n\n", "a.jsonl: is empty, or blank"),
    "latin-1": ("a.txt", b"good\ncaf\xe9\n", r"a.txt:2: is not in UTF-8: byte 0xe9 at column 4"),
    "cut character": ("a.txt", "好".encode()[:2], "a.txt:1: is not in UTF-8.*unexpected end"),
    "utf-16": ("a.txt", "hello".encode("utf-16"), "a.txt:1: holds a zero byte, so it is binary"),
    "utf-16 in json": ("a.jsonl", '{"a": 1}'.encode("utf-16-be"), "a.jsonl:1: holds a zero byte"),
    "picture": ("a.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a.txt:1: is not in UTF-8"),
    "surrogate": ("a.txt", b"\xed\xa0\x80", "a.txt:1: is not in UTF-8"),
    "cut object": (
        "a.jsonl",
        b'{"a": 1}\n{"a": "b',
        "a.jsonl:2: each line must be one whole object",
    ),
    "several lines": ("a.json", b'{\n "a": 1}\n', "a.json:1: each line must be one whole object"),
    "list": ("a.json", b'[{"a": 1}]', "a.json:1: each line must be.* got list"),
    "number": ("a.jsonl", b'{"a": 1}\n3', "a.jsonl:2: each line must be.* got int"),
    "two objects": ("a.jsonl", b"{} {}", "a.jsonl:1: each line must be.*Extra data"),
    "deep": ("a.jsonl", b'{"a":' * 100_000, "a.jsonl:1: each line must be one whole object"),
    "long number": ("a.jsonl", b'{"a": ' + b"1" * 5000 + b"}", "a.jsonl:1: each line must be"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_named_with_the_line(case: str, tmp_path: Path) -> None:
    name, data, message = HOSTILE[case]
    for end in ("", ".gz"):
        path = written(tmp_path / (name + end), data)
        with pytest.raises(ValueError, match=f"^{tmp_path}/{message.replace(name, name + end)}"):
            records(path)


def test_gzip_that_is_cut_or_damaged_or_none(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(b"%d\n" % i for i in range(4_000)), mtime=0)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    for data in (whole[:2000], whole[:-1], whole[:3], bytes(damaged), b"no gzip\n"):
        path = tmp_path / "a.txt.gz"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.txt\.gz: damaged or cut off after line \d+"):
            records(path, "line")


def test_folders_and_patterns(tmp_path: Path) -> None:
    names = ["b.txt", "a.jsonl", "sub/c.txt", "sub/deep/d.txt.gz", "10.txt", "9.txt"]
    for name in [*names, ".hidden.txt", ".git/config", "sub/.DS_Store"]:
        written(tmp_path / name, b"x")
    (tmp_path / "empty").mkdir()

    def found(*paths: str) -> list[str]:
        return [str(f.relative_to(tmp_path)) for f in find_files([tmp_path / p for p in paths])]

    inside = ["10.txt", "9.txt", "a.jsonl", "b.txt", "sub/c.txt", "sub/deep/d.txt.gz"]
    assert found(".") == inside
    assert found("*.txt", "sub") == ["10.txt", "9.txt", "b.txt", "sub/c.txt", "sub/deep/d.txt.gz"]
    assert found("**/*.txt") == ["10.txt", "9.txt", "b.txt", "sub/c.txt"]
    assert found("b.txt", "[0-9]*.txt", ".hidden.txt") == [
        "b.txt",
        "10.txt",
        "9.txt",
        ".hidden.txt",
    ]
    assert find_files(str(tmp_path / "b.txt")) == [tmp_path / "b.txt"]
    written(tmp_path / "odd[1].txt", b"x")  # the file of that name, no pattern
    assert found("odd[1].txt") == ["odd[1].txt"]

    for wrong, error, message in [
        ("none.txt", FileNotFoundError, "none.txt: there is no such file or folder"),
        ("*.parquet", FileNotFoundError, r"\*.parquet: no file is there"),
        ("empty", FileNotFoundError, "empty: no file is there, or only hidden ones"),
    ]:
        with pytest.raises(error, match=message):
            found(wrong)
    with pytest.raises(ValueError, match=r"paths name a file twice: as \S+/b.txt and as \S+/b.txt"):
        found("*.txt", "b.txt")
    with pytest.raises(ValueError, match="paths is empty"):
        found()
    with pytest.raises(TypeError, match="paths must be a path, got int"):
        find_files([3])
    with pytest.raises(ValueError, match="documents must be one of 'file', 'line', 'paragraph'"):
        read_records(tmp_path, "lines")
    written(tmp_path / "sub/notes.pdf", b"x")
    with pytest.raises(ValueError, match=r"notes.pdf: the name of a file of data must end with"):
        found(".")


def test_links_and_what_is_no_regular_file(tmp_path: Path) -> None:
    written(tmp_path / "there/a.txt", b"x")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "there")
    assert find_files(folder) == [folder / "link/a.txt"]
    (tmp_path / "there/loop").symlink_to(tmp_path / "there")
    with pytest.raises(ValueError, match=r"/link/loop: links lead to this folder twice"):
        find_files(folder)
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    for name in ("pipe.txt", "[d]angling.txt"):
        with pytest.raises(ValueError, match="is no regular file"):
            find_files(tmp_path / name)


def test_a_large_file_is_read_in_pieces(tmp_path: Path) -> None:
    """The first records come without the last ones having been read."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "x"}\n' * 20_000 + b"damaged")
    stream = read_records(path)
    assert next(stream).place == f"{path}:1"
    with pytest.raises(ValueError, match=r"a\.jsonl:20001: each line"):
        for _ in stream:
            pass
