"""The hub is asked once whether it answers, and only where that is allowed."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from vdr_cli.models import hub


class Session:
    """A client that counts its requests, and fails where it is told to."""

    def __init__(self, fails: bool) -> None:
        self.fails, self.asked = fails, 0

    def head(self, url: str, timeout: float) -> None:
        self.asked += 1
        assert url == constants.ENDPOINT and timeout == hub.ANSWER_SECONDS
        if self.fails:
            raise ConnectionError


@pytest.fixture(autouse=True)
def _anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    hub.settle_on_cache_if_away.cache_clear()
    yield
    hub.settle_on_cache_if_away.cache_clear()


@pytest.mark.parametrize("away", [True, False])
def test_the_hub_is_asked_once(away: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(fails=away)
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: session)
    for _ in range(3):
        hub.settle_on_cache_if_away()
    assert session.asked == 1
    assert constants.HF_HUB_OFFLINE is away, "later loads look in the cache at once"
    assert os.environ["HF_HUB_OFFLINE"] == ("1" if away else "0"), "and so do processes that are started"


def test_offline_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(fails=True)
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: session)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.settle_on_cache_if_away()
    assert session.asked == 0
