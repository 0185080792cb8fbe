"""Personal data found by rules: how much of a labelled set, in linear time, once and for all."""

from __future__ import annotations

import gzip
import json
import re
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training.privacy.labelled import LABELLED, NOT_FOUND, unmarked

from fastattn.cli import main
from fastattn.training.privacy import redaction
from fastattn.training.privacy.patterns import KINDS, chinese_id, iban, luhn
from fastattn.training.privacy.redaction import find, redact_files, redacted


def counted() -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Of the labelled set by kind: right finds, wrong ones, values that were not found."""
    right: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    missing: Counter[str] = Counter()
    for text in LABELLED:
        plain, spans = unmarked(text)
        found = {tuple(one) for one in find(plain)}
        for _, _, kind in found & set(spans):
            right[kind] += 1
        for _, _, kind in found - set(spans):
            wrong[kind] += 1
        for _, _, kind in set(spans) - found:
            missing[kind] += 1
    return right, wrong, missing


def test_precision_and_recall_on_the_labelled_set() -> None:
    """The figures of docs/privacy.md. Of one number only a part is found: wrong and missing."""
    right, wrong, missing = counted()
    assert set(right) == set(KINDS)
    assert right.total() == 54
    assert dict(wrong) == {"PHONE": 1, "IP_ADDRESS": 1}
    assert dict(missing) == {"PHONE": 2, "BIRTH_DATE": 2, "CREDIT_CARD": 1}


@pytest.mark.parametrize("what", NOT_FOUND)
def test_what_is_documented_as_not_found_is_not(what: str) -> None:
    assert redacted(NOT_FOUND[what]) == NOT_FOUND[what]
    documented = (Path(__file__).parents[3] / "docs/privacy.md").read_text(encoding="utf-8")
    assert what in " ".join(documented.split())


PIECES = [unmarked(text)[0] for text in LABELLED] + [
    value for text in LABELLED for value in re.findall(r"\[\[\w+\|(.*?)\]\]", text, re.DOTALL)
]  # fmt: skip
ALPHABET = "ab1290@.-+:/ ()eyJ_<>=\"'\n日年,;A"


@given(
    st.lists(st.sampled_from(PIECES) | st.text(ALPHABET, max_size=12), max_size=8), st.booleans()
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_twice_is_once(pieces: list[str], numbered: bool) -> None:
    """Also of values without a space between them, of which one ends where another begins."""
    once = redacted("".join(pieces), numbered=numbered)
    assert redacted(once, numbered=numbered) == once


@given(st.text(ALPHABET, max_size=60))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_all_else_stays(text: str) -> None:
    finds = find(text)
    kept, done = "", 0
    for start, end, kind in finds:
        assert done <= start < end <= len(text)
        kept, done = f"{kept}{text[done:start]}<{kind}>", end
    assert redacted(text) == kept + text[done:]


HOSTILE = [
    "a", "1", "-", "@", "1 ", "1-", "a@", "a.", "a@a.", "::", "a:", "+1", "(", "://", "://a:",
    "eyJ", "eyJa.", "sk-", "AKIA", "DE89 ", "A1", "password:", "password: a", "born ", "born 1/",
    "-----BEGIN PRIVATE KEY-----", "-----BEGIN PRIVATE KEY-----\n-a", "0" * 40 + ".",
    "a" * 64 + "@" + "a" * 63 + ".", "a@b.com1", "a@b.com123-45-6789", "1@b.com", "192.168.", "年1",
    "１", "<", "<EMAIL>",
]  # fmt: skip


@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_texts_take_linear_time(piece: str) -> None:
    """Four times the text takes at most eight times the time, or next to none."""

    def seconds(length: int) -> float:
        text = "-----BEGIN PRIVATE KEY-----" + piece * (length // len(piece)) + "!"
        start = time.process_time()
        find(text)
        return time.process_time() - start

    short = min(seconds(8_000) for _ in range(2))
    assert seconds(32_000) < max(8 * short, 0.02) or seconds(32_000) < max(8 * short, 0.02)


def test_checks_of_numbers() -> None:
    assert luhn("4111111111111111") and not luhn("4111111111111112")
    assert iban("GB82WEST12345698765432 AND") == 22 and not iban("GB82WEST12345698765433")
    assert not iban("ZZ82WEST12345698765432") and not iban("GB82WEST123456987654321")
    assert chinese_id("11010519491231002X") and chinese_id("11010519491231002x")
    assert not chinese_id("110105194912310021") and not chinese_id("11010519491331002X")


def test_numbers_are_consistent_in_a_document() -> None:
    text = "a@b.org, c@d.org, a@b.org, ａ＠ｂ．ｏｒｇ; 13812345678"
    wanted = "<EMAIL_1>, <EMAIL_2>, <EMAIL_1>, <EMAIL_1>; <PHONE_1>"
    assert redacted(text, numbered=True) == wanted
    assert redacted(text, ["PHONE"]) == text.replace("13812345678", "<PHONE>")
    with pytest.raises(ValueError, match="got 'NAME'"):
        redacted(text, ["NAME"])


def test_files_of_text_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines stay; a key's block is not cut by the end of a piece; offsets are of the line."""
    monkeypatch.setattr(redaction, "BLOCK", 40)
    key = (
        f"-----BEGIN {'RSA '}PRIVATE KEY-----\n" + "MIIEow\n" * 30 + "-----END RSA PRIVATE KEY-----"
    )
    lines = [*(f"line {i} of bob{i}@example.com\n" for i in range(20)), "\n", f"x {key} y\n", "z"]
    (tmp_path / "a.txt").write_bytes("".join(lines).replace("line 3", "\r\nline 3").encode())
    with gzip.open(tmp_path / "b.txt.gz", "wt", encoding="utf-8") as file:
        file.write("".join(lines))
    found: list[tuple[str, redaction.Find]] = []
    counts = redact_files(
        [tmp_path / "a.txt", tmp_path / "b.txt.gz"], tmp_path / "out", on_find=lambda p, f: found.append((p, f))
    )  # fmt: skip
    wanted = "".join(f"line {i} of <EMAIL>\n" for i in range(20)) + "\nx <PRIVATE_KEY> y\nz"
    assert gzip.decompress((tmp_path / "out/b.txt.gz").read_bytes()).decode() == wanted
    normal = wanted.replace("line 3", "\nline 3")
    assert (tmp_path / "out/a.txt").read_text(encoding="utf-8") == normal
    assert counts == {"EMAIL": 40, "PRIVATE_KEY": 2}
    for place, (start, end, kind) in found:
        if "b.txt" in place and kind == "EMAIL":
            line = lines[int(place.rpartition(":")[2]) - 1]
            assert re.fullmatch(r"bob\d+@example.com", line[start:end])
    assert found[20][0] == f"{tmp_path / 'a.txt'}:23"


def test_lines_of_json_and_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [
        {"text": "给bob@example.com打电话", "n": 3, "ok": True, "x": None, "f": 1.5},
        {"messages": [{"role": "user", "content": "我是13812345678"}], "phone": 13812345678},
    ]
    source = tmp_path / "a.jsonl"
    source.write_text("\n\n".join(json.dumps(r) for r in records), encoding="utf-8")
    report = tmp_path / "report.jsonl"
    command = ["redact", str(source), "--out", str(tmp_path / "out"), "--numbered"]
    assert main([*command, "--report", str(report)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^EMAIL +1$", out, re.MULTILINE) and re.search(
        r"^PHONE +2$", out, re.MULTILINE
    )
    assert "names, postal addresses" in out
    written = (tmp_path / "out/a.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in written.splitlines()] == [
        {**records[0], "text": "给<EMAIL_1>打电话"},
        {"messages": [{"role": "user", "content": "我是<PHONE_1>"}], "phone": "<PHONE_1>"},
    ]
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert lines[1] == {
        "place": f"{source}:3: messages.0.content", "start": 2, "end": 13, "kind": "PHONE"
    }  # fmt: skip
    assert "13812345678" not in report.read_text() and "example.com" not in report.read_text()

    assert main(command) == 1  # again: the file is there
    assert "is there already" in capsys.readouterr().err


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    for name in ("a.txt", "x/a.txt", "b.parquet", "c.txt", "d.jsonl"):
        (tmp_path / name).write_bytes(b"\xff" if "c.txt" in name else b"[1]")
    with pytest.raises(ValueError, match=r"2 files 'a\.txt'"):
        redact_files([tmp_path / "a.txt", tmp_path / "x/a.txt"], tmp_path / "out")
    with pytest.raises(ValueError, match="Parquet is not redacted"):
        redact_files(tmp_path / "b.parquet", tmp_path / "out")
    with pytest.raises(ValueError, match=r"c\.txt:1: is not in UTF-8"):
        redact_files(tmp_path / "c.txt", tmp_path / "out")
    with pytest.raises(ValueError, match=r"d\.jsonl:1: each line must be one whole object"):
        redact_files(tmp_path / "d.jsonl", tmp_path / "out")
    with pytest.raises(ValueError, match="is there already"):
        redact_files(tmp_path / "a.txt", tmp_path)
    assert not any((tmp_path / "out").iterdir())
