"""The benchmarks' report in a real browser: it sorts, its links lead to rows, and it loads nothing."""

import json
import sys
from pathlib import Path

import driver
import pytest
from playwright.sync_api import Page

sys.path.insert(0, str(driver.ROOT / "bench"))  # `bench` is no package

import run


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """The page of a run that has just ended."""
    folder = tmp_path_factory.mktemp("report")
    assert run.main(["--quick", "--filter", " 16 frames", "--out", str(folder), "--plain"]) == 0
    return folder / "report.html"


@pytest.fixture
def page(browser, written):
    """The open page. It may not have had an error or asked for anything but itself."""
    context = browser.new_context(viewport=driver.SIZE)
    context.set_default_timeout(driver.PATIENCE)
    opened, mistakes, asked = context.new_page(), [], []
    opened.on("console", lambda told: told.type in ("error", "warning") and mistakes.append(told.text))
    opened.on("pageerror", lambda error: mistakes.append(str(error)))
    context.on("request", lambda request: asked.append(request.url))
    opened.goto(written.as_uri())
    yield opened
    context.close()
    assert mistakes == []
    assert set(asked) == {written.as_uri()}


def column(page: Page, table: str, name: str) -> list[str]:
    """The texts of a column, from the top."""
    names = page.locator(f"{table} thead button").all_inner_texts()
    return page.locator(f"{table} tbody tr > :nth-child({names.index(name) + 1})").all_inner_texts()


def sort_by(page: Page, table: str, name: str) -> None:
    page.locator(f"{table} thead button", has_text=name).first.click()


def test_a_heading_sorts_numbers_as_numbers_and_turns_round(page):
    table = "section:first-of-type table"
    before = column(page, table, "ms")
    sort_by(page, table, "ms")
    shown = [float(text) for text in column(page, table, "ms") if text]
    assert len(shown) >= 3
    assert shown == sorted(shown)
    assert sorted(column(page, table, "ms")) == sorted(before), "no row is lost"
    assert page.locator(f"{table} th[aria-sort]").get_attribute("aria-sort") == "ascending"
    sort_by(page, table, "ms")
    again = column(page, table, "ms")
    assert [float(text) for text in again if text] == shown[::-1]
    assert again[len(shown) :] == [""] * (len(again) - len(shown)), "what was not timed stays last"


def test_claims_sort_by_their_text(page):
    sort_by(page, "#claims", "claim")
    texts = column(page, "#claims", "claim")
    assert len(texts) > 20
    assert texts == page.evaluate(
        "(texts) => [...texts].sort((a, b) => a.localeCompare(b, 'en', {numeric: true}))", texts
    )


def test_a_claim_leads_to_its_rows_though_they_are_folded_away(page):
    link = page.locator("#claims a", has_text="tubes-cpu.json").first
    target = page.locator(link.get_attribute("href"))
    assert not target.is_visible()
    link.click()
    page.wait_for_function("document.querySelector('tr:target')?.checkVisibility()")
    assert target.is_visible()
    assert "mirasol" in target.inner_text()


def test_it_names_machine_commit_and_command_and_holds_the_plots(page, written):
    facts = json.loads(next(written.parent.glob("savings-*.json")).read_text())
    first = page.locator("section").first.inner_text()
    assert facts["command"] in first
    assert facts["machine"]["cpu"] in first
    assert facts["machine"]["commit"] in first
    assert "quick" in first
    plots = page.locator("section:first-of-type .plot svg")
    assert plots.count() == 2
    assert all(box["width"] > 300 for plot in plots.all() if (box := plot.bounding_box()))
    ids = page.evaluate("[...document.querySelectorAll('clipPath, tr')].map((node) => node.id).filter(Boolean)")
    assert len(ids) == len(set(ids)), "no two pictures share what they refer to"
