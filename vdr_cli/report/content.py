"""The content of a page, before it is markup."""

from __future__ import annotations

from dataclasses import dataclass

from vdr_cli.errors import ConfigError
from vdr_cli.report.charts import Chart
from vdr_cli.report.data import Decode, ShownGroup, pieces
from vdr_cli.report.intervals import IntervalChart


@dataclass(frozen=True)
class Page:
    title: str
    subtitle: str
    charts: list[Chart]
    groups: list[ShownGroup]
    groups_saved: int
    facts_header: list[str]
    facts: list[list[str]]
    facts_note: str
    ranking_header: list[str]
    ranking: list[list[str]]
    ranked: IntervalChart | None
    heat: str
    """Name of the numbers at the tokens."""
    command: tuple[str, str]
    """A command that adds numbers at tokens without any, and its effect."""


def decoder_of(model: str | None) -> Decode | None:
    """A function that shows single tokens; None when the tokenizer is gone: texts are then shown whole."""
    if model is None:
        return None
    from vdr_cli.models.loading import load_tokenizer

    try:
        return pieces(load_tokenizer(model))
    except (ConfigError, OSError):
        return None
