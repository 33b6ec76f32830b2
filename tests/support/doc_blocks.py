"""The code blocks of the documents in Markdown, and which of them say that they run; see docs/README.md."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.server import ROOT

_FENCE = re.compile(r"^(?P<fence>`{3,})(?P<info>[^`\n]*)\n(?P<code>.*?)^(?P=fence)[ \t]*$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    page: Path
    line: int  # of its first line of code, from 1
    language: str
    words: tuple[str, ...]  # behind the language
    code: str
    output: str | None = field(default=None)  # what it must print, if the page says so

    @property
    def runs(self) -> bool:
        return "run" in self.words

    @property
    def needs(self) -> list[str]:
        """Modules and commands without which it cannot run."""
        return [name for word in self.words if word.startswith("needs=") for name in word[6:].split(",")]

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks_of(page: Path) -> list[Block]:
    """In the page's order; a block marked `output` belongs to the one before it."""
    text = page.read_text(encoding="utf-8")
    blocks: list[Block] = []
    for match in _FENCE.finditer(text):
        language, *words = match["info"].split() or [""]
        line = text.count("\n", 0, match.start("code")) + 1
        if "output" in words:
            last = blocks.pop()
            blocks.append(Block(page, last.line, last.language, last.words, last.code, match["code"]))
        else:
            blocks.append(Block(page, line, language, tuple(words), match["code"]))
    return blocks
