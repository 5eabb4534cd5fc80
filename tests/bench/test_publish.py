"""docs/results.md and the README's table are what `python -m benchmarks publish` makes of the committed results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import publish, results

ROOT = Path(__file__).parents[2]
FILES = publish.files()


def test_there_are_results():
    assert FILES


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_committed_run_is_whole(file):
    run = results.load(file)
    assert run["machine"]["torch"] and run["ceilings"] and run["commit"] and run["command"]
    assert not run["crashed"] and not run["failed"]
    assert all(row["seconds"] > 0 for row in run["rows"])


def test_the_page_is_made_of_them():
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    assert page == publish.page()
    for picture in re.findall(r"\]\((results/[^)]+)\)", page):
        assert (ROOT / "docs" / picture).exists(), picture


def test_the_readme_is_made_of_them():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert publish.headlines()
    assert text == publish.readme(text)


def test_a_readme_without_its_marks_is_an_error():
    with pytest.raises(ValueError, match="found 0 times"):
        publish.readme("no marks")
