"""Figures: what pages quote is what bench/results says, and results are as they were made."""

from __future__ import annotations

import shutil
from pathlib import Path

import measure
import pytest
import quotes


def test_every_figure_is_a_results():
    assert quotes.differences() == []


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """A folder with the pages, which are looked at there."""
    for name in {quote.page for quote in quotes.quotes()}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(quotes.ROOT / name, tmp_path / name)
    monkeypatch.setattr(quotes, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize("page, old", [("README.md", "| 4 bits | "), ("docs/index.md", "| 12 | ")])
def test_another_figure_is_found(page, old, pages):
    text = (pages / page).read_text()
    assert text.count(old) == 1
    (pages / page).write_text(text.replace(old, old + "1"))
    (wrong,) = quotes.differences()
    assert wrong.startswith(page)
    assert quotes.write() == [] and quotes.differences() == []


def test_a_figure_from_nowhere_is_found(pages):
    with (pages / "README.md").open("a") as page:
        page.write("It is 7.5 times as fast.\n")
    assert quotes.differences() == ["README.md: '7.5 times' is in no quote of bench/quotes.py"]


def test_every_result_has_one_measurement():
    of = [path for made in measure.MEASUREMENTS.values() for path in measure.files_of(made)]
    every = [p for p in measure.RESULTS.rglob("*") if p.is_file() and p != measure.NOTES]
    assert sorted(of) == sorted(every)


@pytest.mark.parametrize("name", measure.notes())
def test_results_are_as_they_were_made(name):
    facts = measure.notes()[name]
    files = measure.files_of(measure.MEASUREMENTS[name])
    assert measure.digest(files) == facts["digest"], f"{name} was changed after its measurement"
    assert facts["commit"] and facts["machine"]


def test_every_result_is_noted():
    made = {name for name, one in measure.MEASUREMENTS.items() if measure.files_of(one)}
    assert made == measure.notes().keys()


def test_the_status_page_lists_them():
    page = (Path(measure.ROOT) / "docs" / "status.md").read_text()
    assert "\n".join(measure.lines()) in page
