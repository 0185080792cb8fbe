"""Every Python block of README.md and of some pages of docs/ runs, each on its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = ("attention", "generation", "losses", "privacy", "serving", "tools", "training")
PAGES = {
    "README.md": README,
    **{f"docs/{name}.md": (ROOT / "docs" / f"{name}.md").read_text("utf-8") for name in DOCS},
}
BLOCKS = [
    pytest.param(page, block, id=f"{page}-{number}")
    for page, text in PAGES.items()
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S))
]


def test_pages_have_blocks() -> None:
    assert len(BLOCKS) >= 5


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_block_runs(page: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a block may save a model
    torch.manual_seed(0)
    exec(compile(block, page, "exec"), {})


def test_readme_is_short() -> None:
    assert README.count("\n") <= 200


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", text):
        assert ((ROOT / page).parent / target).exists(), target
