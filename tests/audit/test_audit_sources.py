"""Every source of the bonus is recomputed by the audit."""

from __future__ import annotations

from vdr_cli.audit import sources, states
from vdr_cli.exploration.sources import SOURCES


def test_no_source_is_silently_taken_from_the_record() -> None:
    """Disagreement has its own way (audit/members.py); functions of the user's are named as left out."""
    assert set(sources.SOURCES) | set(states.SOURCES) | {"disagreement"} == set(SOURCES)
