"""A page in a real Chromium (pip install playwright), and what it complains of. CHROMIUM names the program."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
MARKS = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: bash scripts/install_test_tools.sh, or set CHROMIUM"),
]


@contextmanager
def started() -> Iterator[Any]:
    """A browser; the test is skipped without playwright."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Any, file: Path, scheme: str = "light", width: int = 1280) -> tuple[Any, list[str]]:
    """The page of a local file, and a list that its messages, errors, dialogs and requests elsewhere go to."""
    page = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 844}).new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url) if "file:" not in request.url else None)
    page.on("dialog", lambda dialog: complaints.append("dialog"))
    page.goto(file.as_uri())
    return page, complaints
