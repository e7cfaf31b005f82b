"""study.html in a real Chromium (pip install playwright). AXE_CORE names axe.min.js of the npm package axe-core."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.browser import MARKS, opened, started
from vdr_cli.study.page import write_results
from vdr_cli.study.record import record_of

pytestmark = MARKS


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with started() as browser:
        yield browser


@pytest.fixture
def open_page(browser: Any, make_study: Callable[..., Any]) -> Callable[..., tuple[Any, list[str]]]:
    study, directory = make_study(seeds=6, beds={"starter": {}, "narrow": {"rollout.top_k": 5}})
    write_results(record_of(study, directory), directory.path)
    return partial(opened, browser, directory.path / "study.html")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_quiet_and_within_the_window(open_page: Any, scheme: str, width: int) -> None:
    page, complaints = open_page(scheme, width)
    assert complaints == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = """[...document.querySelectorAll('svg.chart')].flatMap((svg) => [...svg.querySelectorAll('text')].filter(
      (text) => { const a = text.getBoundingClientRect(), b = svg.getBoundingClientRect();
                  return a.width > 0 && (a.left < b.left - 1 || a.right > b.right + 1 || a.bottom > b.bottom + 1); })
      .map((text) => text.textContent))"""
    assert page.evaluate(outside) == []


def test_the_answer_comes_first_and_charts_tell_their_numbers(open_page: Any) -> None:
    page, _ = open_page()
    first = page.inner_text("section:first-of-type .answer")
    assert first.startswith("grpo reaches pass@64 0.") and "Better than grpo: pass_at_k (+0." in first
    seeds = page.locator("section:first-of-type svg").first.locator(".seeds circle").count()
    assert seeds == 3 * 6, "every seed of every rival is a point"
    chart = page.locator(".small svg.chart").first
    chart.scroll_into_view_if_needed()
    chart.hover()
    assert "grpo: 0." in page.inner_text("#tip") and " at 16" in page.inner_text("#tip"), "k, not its logarithm"


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
