"""The Hugging Face hub, or what is cached of it where there is no network."""

from __future__ import annotations

import functools
import os

ANSWER_SECONDS = 5.0
"""Seconds for one answer of the hub."""


@functools.cache
def settle_on_cache_if_away() -> None:
    """If the hub does not answer, later loads look in the cache at once; to be called before the first.

    The hub's own client tries again and again, half a minute for each file: a model that is cached, or a directory
    with a typing error, would take a minute to say so.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.is_offline_mode():
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=ANSWER_SECONDS)
    except Exception:  # of whatever HTTP library the client uses
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries not imported yet, and processes not started yet
