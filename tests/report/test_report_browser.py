"""The report in a real Chromium (pip install playwright). AXE_CORE names axe.min.js of the npm package axe-core."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.browser import MARKS, opened, started
from vdr_cli.report.page import write_report

pytestmark = MARKS


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with started() as browser:
        yield browser


@pytest.fixture
def open_page(browser: Any, make_run: Callable[..., Path]) -> Callable[..., tuple[Any, list[str]]]:
    report = write_report(make_run())
    return partial(opened, browser, report)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_quiet_and_within_the_window(open_page: Any, scheme: str, width: int) -> None:
    page, complaints = open_page(scheme, width)
    assert complaints == []
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.querySelectorAll('#groups script, #groups img').length") == 0


def test_hostile_completions_are_text(open_page: Any) -> None:
    page, _ = open_page()
    page.select_option("#which", "all")
    texts = [element.inner_text() for element in page.query_selector_all(".group:first-child .text")]
    assert texts[0] == "<script>window.hacked=1</script>"
    assert len(texts[1]) == 100_000
    assert texts[4] == "nul ␀ here"
    assert texts[6] == "</script><img src=x onerror=window.hacked=1>"
    assert page.inner_text(".group:first-child .prompt").endswith("<b>bold</b>")


def test_hover_tells_the_disagreement(open_page: Any) -> None:
    page, _ = open_page()
    token = page.query_selector("span[data-heat]")
    token.scroll_into_view_if_needed()
    token.hover()
    assert "disagreement" in page.inner_text("#tip")
    chart = page.query_selector("svg.chart")
    chart.scroll_into_view_if_needed()
    chart.hover()
    assert page.inner_text("#tip").startswith("wide:")


def test_find_filter_sort_and_numbers(open_page: Any) -> None:
    page, complaints = open_page()
    assert page.inner_text("#count") == "4 of 4 groups", "those with numbers at their tokens"
    page.select_option("#which", "all")
    assert page.inner_text("#count") == "6 of 6 groups"
    page.select_option("#which", "mixed")
    assert page.inner_text("#count") == "2 of 2 groups"
    page.select_option("#which", "all")
    page.fill("#find", "ONERROR")
    assert page.inner_text("#count") == "2 of 2 groups"
    page.fill("#find", "")
    page.select_option("#sort", "reward")
    assert "row 1" in page.inner_text(".group:first-child h3")
    page.check("#values")
    assert page.query_selector(".value") is not None
    assert complaints == []


@pytest.mark.skipif(
    "AXE_CORE" not in os.environ,
    reason="no axe-core: bash scripts/install_test_tools.sh, or set AXE_CORE to its axe.min.js",
)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_accessibility_finding(open_page: Any, scheme: str) -> None:
    page, _ = open_page(scheme)
    page.evaluate(Path(os.environ["AXE_CORE"]).read_text(encoding="utf-8"))
    found = page.evaluate("axe.run().then((result) => result.violations)")
    serious = [(one["id"], one["nodes"][0]["html"][:200]) for one in found if one["impact"] in ("serious", "critical")]
    assert serious == []
