"""Personal data out of texts before a model learns them: found by rules, replaced by their kind.

    redacted("Mail bob@example.com")            "Mail <EMAIL>"

`patterns` has the rules, docs/privacy.md which data they do not find: names and addresses before
all, which have no form of their own. A second time nothing is found.
"""

from __future__ import annotations

import bisect
import gzip
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from fastattn.files import local_path, written_beside
from fastattn.training.data.formats import numbered_lines, read_json_lines, reader_of
from fastattn.training.data.sources import AnyPath, find_files
from fastattn.training.privacy.patterns import KINDS, RULES, Rule, plain

BLOCK = 1 << 16  # characters of a text that are read at once; more where a key's block is open
OPEN_BLOCK = 1 << 22  # no block of a key is longer


class Find(NamedTuple):
    """A piece of a text: characters start .. end - 1."""

    start: int
    end: int
    kind: str


def find(text: str, kinds: Sequence[str] = KINDS) -> list[Find]:
    """The personal data in a text, in their order; a character is of one find at most.

    It takes a time in proportion to the text's length.

    Raises:
        ValueError: an unknown kind.
    """
    check_kinds(kinds)
    rules = [rule for rule in RULES if rule.kind in kinds]
    rest = plain(text)
    found: list[Find] = []
    # Whatever stood directly beside a find stands beside a placeholder now, and may be a find then:
    # so again, until there is none.
    before = -1
    while len(found) > before:
        before = len(found)
        for rule in rules:
            new = [*_matches(rule, rest)]
            rest = _without(rest, new)
            found += new
    return sorted(found)


def _matches(rule: Rule, text: str) -> Iterator[Find]:
    group = "value" if "value" in rule.pattern.groupindex else 0
    for match in rule.pattern.finditer(text):
        start, end = match.span(group)
        if length := rule.check(text[start:end]):
            yield Find(start, start + length, rule.kind)


def _without(text: str, finds: Sequence[Find]) -> str:
    """The text with each find as so many "<", which no rule takes."""
    pieces, done = [], 0
    for start, end, _ in finds:
        pieces += [text[done:start], "<" * (end - start)]
        done = end
    return "".join([*pieces, text[done:]])


def check_kinds(kinds: Sequence[str]) -> None:
    """Raise ValueError where one of `kinds` is unknown."""
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"kinds must be of {', '.join(KINDS)}; got {unknown[0]!r}")


class Document:
    """Placeholders of one document: with numbers, the same value has the same one throughout."""

    def __init__(self, kinds: Sequence[str] = KINDS, numbered: bool = False) -> None:
        self.kinds = kinds
        self._numbered = numbered
        self._numbers: dict[str, dict[str, int]] = {kind: {} for kind in kinds}

    def redacted(self, text: str) -> tuple[str, list[Find]]:
        """The text with placeholders, and where the finds were in it."""
        finds = find(text, self.kinds)
        pieces, done = [], 0
        for start, end, kind in finds:
            pieces += [text[done:start], self._placeholder(kind, text[start:end])]
            done = end
        return "".join([*pieces, text[done:]]), finds

    def _placeholder(self, kind: str, value: str) -> str:
        if not self._numbered:
            return f"<{kind}>"
        numbers = self._numbers[kind]
        return f"<{kind}_{numbers.setdefault(plain(value), len(numbers) + 1)}>"


def redacted(text: str, kinds: Sequence[str] = KINDS, *, numbered: bool = False) -> str:
    """The text with placeholders, "<EMAIL>", or with numbers "<EMAIL_1>", in place of finds.

    Raises:
        ValueError: an unknown kind.
    """
    return Document(kinds, numbered).redacted(text)[0]


OnFind = Callable[[str, Find], object]


def redact_files(
    paths: AnyPath | Sequence[AnyPath],
    folder: AnyPath,
    kinds: Sequence[str] = KINDS,
    *,
    numbered: bool = False,
    on_find: OnFind | None = None,
) -> Counter[str]:
    """Write files with placeholders into `folder`, under their names; returns the finds by kind.

    A text is read in pieces that end with a line, so that it may have any size. Of lines of JSON
    all strings in the values are looked at, and whole numbers, which a placeholder makes strings;
    the keys stay. A document is a file of text, or a line of JSON.

    Args:
        paths: as `find_files` takes them: .txt, .jsonl or .json (lines), each also with .gz.
        on_find: called with the place ("a.txt:17", "a.jsonl:3: messages.0.content") of each find.
            In a text its characters are counted from the beginning of that line.

    Raises:
        FileNotFoundError, ValueError: as `read_records`; a Parquet file; two files of one name; an
            unknown kind; or a file is there already.
        OSError: the folder cannot be written.
    """
    check_kinds(kinds)
    files, target = find_files(paths), local_path("folder", folder)
    for name, count in Counter(file.name for file in files).items():
        if count > 1:
            raise ValueError(
                f"paths name {count} files {name!r}: redact them to folders of their own"
            )
        if (target / name).exists():
            raise ValueError(f"{target / name} is there already: give a new folder")
        if name.lower().endswith(".parquet"):
            raise ValueError(f"{name}: Parquet is not redacted: export it to lines of JSON")
    counts: Counter[str] = Counter()

    def note(place: str, finds: list[Find]) -> None:
        for one in finds:
            counts[one.kind] += 1
            if on_find is not None:
                on_find(place, one)

    for file in files:
        is_json = reader_of(file) is read_json_lines
        pieces = _json_lines if is_json else _texts
        with written_beside(target / file.name) as beside, _opened(beside) as out:
            for piece in pieces(file, kinds, numbered, note):
                out.write(piece)
    return counts


Note = Callable[[str, list[Find]], None]


def _texts(file: Path, kinds: Sequence[str], numbered: bool, note: Note) -> Iterator[str]:
    document = Document(kinds, numbered)
    for first, lines in _blocks(file):
        text, finds = document.redacted("".join(lines))
        starts = [0]
        for line in lines:
            starts.append(starts[-1] + len(line))
        for start, end, kind in finds:
            number = bisect.bisect_right(starts, start) - 1
            begin = starts[number]
            note(f"{file}:{first + number}", [Find(start - begin, end - begin, kind)])
        yield text


def _blocks(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Lines and the number of the first, as many as BLOCK has; none ends inside a key's block."""
    lines: list[str] = []
    size, first, opened = 0, 1, False
    for number, line in numbered_lines(file):
        lines.append(line)
        size += len(line)
        if "-----" in line:
            opened = line.rfind("-----BEGIN ") > line.rfind("-----END ")
        if size >= (OPEN_BLOCK if opened else BLOCK):
            yield first, lines
            lines, size, first = [], 0, number + 1
    if lines:
        yield first, lines


def _json_lines(file: Path, kinds: Sequence[str], numbered: bool, note: Note) -> Iterator[str]:
    for place, record in read_json_lines(file, "file"):
        document = Document(kinds, numbered)
        value = _value(record, document, f"{place}: ", note)
        yield json.dumps(value, ensure_ascii=False) + "\n"


def _value(value: Any, document: Document, place: str, note: Note) -> Any:
    """A value of JSON with placeholders in all strings."""
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        text, finds = document.redacted(str(value))
        note(place.removesuffix("."), finds)
        return text if finds else value
    if isinstance(value, dict):
        return {k: _value(v, document, f"{place}{k}.", note) for k, v in value.items()}
    if isinstance(value, list):
        return [_value(v, document, f"{place}{i}.", note) for i, v in enumerate(value)]
    return value


def _opened(path: Path) -> TextIO:
    if path.name.endswith(".gz"):
        return io.TextIOWrapper(gzip.GzipFile(path, "wb", mtime=0), encoding="utf-8", newline="\n")
    return open(path, "w", encoding="utf-8", newline="\n")
