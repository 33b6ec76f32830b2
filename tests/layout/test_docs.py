"""The documents: every page is in the index, links lead somewhere, and blocks that run are of a kind that can."""

import re
from pathlib import Path

import pytest

from tests.support.doc_blocks import blocks_of, pages
from tests.support.server import ROOT

_LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?!https?://)([^)#\s]*)(?:#([^)\s]*))?\)")


def _prose(page: Path) -> str:
    return re.sub(
        r"^(`{3,}).*?^\1[ \t]*$|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )


def _anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    text = re.sub(r"^(`{3,}).*?^\1[ \t]*$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    linked = {target for target, _ in _LINK.findall(index)}
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} <= linked


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in _LINK.findall(_prose(page)):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in _anchors(path), f"{page.name} links to {target}#{anchor}"


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_marks_of_blocks(page: Path) -> None:
    for block in blocks_of(page):
        unknown = [word for word in block.words if word != "run" and not word.startswith("needs=")]
        assert not unknown, f"{block.place}: {unknown}"
        if block.runs:
            assert block.language in ("python", "sh"), block.place
        if block.language == "python":
            compile(block.code, block.place, "exec")
