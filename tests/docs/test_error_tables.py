"""The messages in the tables of errors are messages of the code."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLES = {"operations": "## Errors", "building": "## Errors", "download": "## Images behind URLs"}


def texts(path: Path) -> Iterator[str]:
    """The strings of a file; in place of a value in an f-string stands "…"."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def messages(page: str) -> list[str]:
    """What stands in code font in the first column of the page's tables of errors."""
    section = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8").partition(TABLES[page])[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE)
    return [message for row in rows for message in re.findall(r"`([^`]+)`", row)]


@pytest.mark.slow
def test_every_message_is_in_the_code() -> None:
    paths = [path for package in ("shards", "molmo2", "tools") for path in (ROOT / package).rglob("*.py")]
    code = [text for path in paths for text in texts(path)]
    for page in TABLES:
        listed = messages(page)
        assert len(listed) > 3, page
        for message in listed:
            pattern = re.compile(".*".join(map(re.escape, re.split(r"…|\d+", message))), re.DOTALL)
            assert any(map(pattern.search, code)), f"{page}.md: {message}"
