"""Documents taken apart: their blocks of code, the commands in them, their headings."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
PROGRAMS = ("kvstore ", "python -m ", "locust ", ".venv/bin/")


class Command(NamedTuple):
    """A command of a `sh` block with its comment; `status`: of the HTTP answer that the comment promises."""

    text: str
    status: int | None


class Document:
    """A Markdown file. `prose` is what is outside of its blocks of code."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path.relative_to(REPOSITORY))
        self.text = path.read_text(encoding="utf-8")
        self._blocks = re.findall(r"^```(\w*)\n(.*?)^```$", self.text, re.M | re.S)
        self.prose = re.sub(r"^```.*?^```$", "", self.text, flags=re.M | re.S)

    def blocks(self, language: str) -> list[str]:
        return [block for kind, block in self._blocks if kind == language]


def _documents() -> list[Document]:
    """The first page first: its example begins with an empty cluster."""
    folders = (REPOSITORY / name for name in ("kvstore", "loadtest"))
    found = [path for folder in folders for path in folder.rglob("*.md") if "out" not in path.parts]
    return [Document(REPOSITORY / "README.md"), *map(Document, sorted(found))]


DOCUMENTS = _documents()


@cache
def commands_of(document: Document) -> list[Command]:
    """The commands of all `sh` blocks, in their order; one may go over several lines."""
    commands = []
    for block in document.blocks("sh"):
        lines: list[str] = []
        for line in block.splitlines():
            lines.append(line)
            text = "\n".join(lines).strip()
            if text and subprocess.run(["sh", "-n"], input=text, text=True, capture_output=True).returncode == 0:
                promised = re.search(r"  # (\d{3})\b", text)
                commands.append(Command(text, int(promised[1]) if promised else None))
                lines = []
        if "".join(lines).strip():
            raise AssertionError(f"{document.name}: this is no command: {lines}")
    return commands


def inline_commands(document: Document) -> set[str]:
    """What stands in a line of text, between backquotes, and begins with the name of a program."""
    return {text for text in re.findall(r"`([^`\n]+)`", document.prose) if text.startswith(PROGRAMS)}


def anchors(path: Path) -> set[str]:
    """The names by which links lead to the headings of a file, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", Document(path).prose, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
