"""What the pages name exists: files, headings of pages, targets of make, modules."""

import importlib.util
import re
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[1]
_PAGES = [*_ROOT.glob("*.md"), *(_ROOT / "docs").glob("*.md")]


def _prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def _anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", _prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(((?!https?:)[^)\s]+)\)", _prose(page))
    wrong = []
    for link in links:
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            wrong.append(link)
    assert not wrong


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(docs/([a-z_]+\.md)", (_ROOT / "README.md").read_text()))
    assert {page.name for page in (_ROOT / "docs").glob("*.md")} <= linked


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.name)
def test_every_command_exists(page: Path) -> None:
    """Targets of make, modules run with -m, and files of the repository in backquotes."""
    text = page.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (_ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"(?:`|^ {4}|&& )make ([a-z-]+)", text, flags=re.MULTILINE)) <= targets
    modules = set(re.findall(r"python -m ((?:apps|torchrec_sid)[\w.]*)", text))
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []
    files = re.findall(r"`((?:apps|tests|torchrec_sid|docs|packaging)/[\w./-]*\w)(?:::?\w+)?`", text)
    assert [name for name in files if not (_ROOT / name).exists()] == []
