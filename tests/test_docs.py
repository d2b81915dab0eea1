"""The pages for contributors name only files and functions that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "client/README.md",
    "tests/README.md",
    "bench/README.md",
)


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_to_files(page: str) -> None:
    folder = (ROOT / page).parent
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text_of(page))
    assert links
    assert [link for link in links if not (folder / link).exists()] == []


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_paths_of_a_page_exist(page: str) -> None:
    paths = re.findall(r"`((?:broker|worker|client|tests|bench)/[\w/.]*)`", text_of(page))
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_ways_of_a_request_and_a_token_name_functions_that_exist() -> None:
    """Checks every `path/file.py`, `function`."""
    pairs = re.findall(
        r"`((?:broker|worker|client)/[\w/]+\.py)`, `(\w+)`", text_of("ARCHITECTURE.md")
    )
    assert len(pairs) >= 12
    missing = [
        (path, name)
        for path, name in pairs
        if not re.search(rf"def {name}\(", (ROOT / path).read_text(encoding="utf-8"))
    ]
    assert missing == []


def test_the_written_page_of_the_benchmarks_is_short() -> None:
    assert len(text_of("bench/README.md").splitlines()) <= 280
