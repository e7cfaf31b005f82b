"""`vdr report`: one self-contained HTML page of a run or of scored completions. No network, light and dark, printable.

Everything that came from a model or a data set passes through `visible` and is put into the page as text, never as
markup; the page forbids itself every request (Content-Security-Policy).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from vdr_cli.config.paths import checked_path
from vdr_cli.errors import MachineError
from vdr_cli.report.charts import LARGEST, MAX_POINTS, Chart, svg
from vdr_cli.report.content import Page
from vdr_cli.report.data import load_run
from vdr_cli.report.intervals import interval_svg
from vdr_cli.report.run_page import run_page
from vdr_cli.report.score_page import score_page
from vdr_cli.system.files import write_whole
from vdr_cli.system.text import visible

CHARTS_NOTE = (
    "Bands: the range over seeds; for held-out numbers of a single run, the 95 % interval over prompts; for a long "
    "run, the extremes of the steps behind each point."
)
QUANTILES = (0.5, 0.75, 0.9, 0.97)


def write_report(
    source: str | Path, output: str | Path | None = None, compare: Sequence[str | Path] = (), members: int = 0
) -> Path:
    """The report of a run directory or a scored file; default: report.html in the run, FILE.html beside the file.

    compare: further runs in the same charts. Runs that differ only in their seed become one curve with a band.
    members: where the run saved no disagreement a token, measure it with this many members of its final model; 0: not.
    """
    source = Path(source)
    default = source.with_name(source.name + ".html") if source.is_file() else source / "report.html"
    target = Path(output) if output is not None else default
    html = render(_page(source, compare, members))
    try:
        write_whole(target, html)
    except OSError as error:
        raise MachineError(f"{target}: cannot be written ({error.strerror})") from error
    return target


def write_pictures(source: str | Path, directory: str | Path, compare: Sequence[str | Path] = ()) -> list[Path]:
    """Every chart of the report as a PNG of 300 dots an inch. directory: a leading ~ is the home directory."""
    from vdr_cli.report.pictures import write_intervals_png, write_png

    folder = checked_path(str(directory), "--png")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        page = _page(Path(source), compare)
        ranked = [write_intervals_png(page.ranked, folder)] if page.ranked else []
        return [*(write_png(chart, folder) for chart in page.charts), *ranked]
    except OSError as error:
        raise MachineError(f"{folder}: cannot be written ({error.strerror})") from error


def _page(source: Path, compare: Sequence[str | Path], members: int = 0) -> Page:
    if source.is_file():
        return score_page(source)
    return run_page([load_run(path) for path in (source, *compare)], members)


def render(page: Page) -> str:
    """The HTML. Every string is escaped by the template or put in by script as text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vdr_cli.report"),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.j2").render(
        title=visible(page.title),
        subtitle=visible(page.subtitle),
        charts_note=CHARTS_NOTE if any(map(_has_bands, page.charts)) else "",
        charts=[
            {"title": visible(chart.title), "unit": visible(chart.y_label), "svg": Markup(svg(chart))}
            for chart in page.charts
        ],
        facts_header=[visible(name) for name in page.facts_header],
        facts=[[visible(cell) for cell in row] for row in page.facts],
        facts_note=page.facts_note,
        ranked=page.ranked and {"title": page.ranked.title, "svg": Markup(interval_svg(page.ranked))},
        ranking_header=page.ranking_header,
        ranking=page.ranking,
        has_groups=bool(page.groups),
        groups_note=_groups_note(page),
        command=page.command[0] if _coloured(page) < len(page.groups) else "",
        command_does=page.command[1],
        data=Markup(_embedded(page)),
    )


def _groups_note(page: Page) -> str:
    """A note on the number of groups shown, of all that were saved, and on the meaning of their colours."""
    shown = len(page.groups)
    note = f"{shown} of {page.groups_saved} saved groups" if shown < page.groups_saved else f"All {shown} saved groups"
    coloured = _coloured(page)
    if not coloured:
        return f"{note}."
    reason = "the members disagree there" if page.heat == "disagreement" else "the model is unsure of what comes there"
    note += f". Tokens on a coloured background: {reason}."
    return note if coloured == shown else f"{note} {coloured} groups were measured token by token."


def _coloured(page: Page) -> int:
    """Groups with numbers at their tokens."""
    return sum(any(one.heat for one in group.completions) for group in page.groups)


def _has_bands(chart: Chart) -> bool:
    return not chart.is_scatter and any(one.low is not None or len(one.x) > MAX_POINTS for one in chart.series)


def _embedded(page: Page) -> str:
    """JSON that no content can leave: <, > and & are escapes, line separators too (json's ASCII)."""
    values = [value for group in page.groups for one in group.completions for value in one.heat or ()]
    heat = sorted(filter(math.isfinite, values))
    levels = [heat[min(int(share * len(heat)), len(heat) - 1)] for share in QUANTILES] if heat else []
    data = {"heat": page.heat, "levels": levels, "groups": [_shown(asdict(group)) for group in page.groups]}
    text = json.dumps(data, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _shown(value: Any) -> Any:
    if isinstance(value, str):
        return visible(value, multiline=True)
    if isinstance(value, float):
        rounded = float(f"{value:.5g}") if abs(value) <= LARGEST else value  # the largest numbers round to infinity
        return rounded if math.isfinite(rounded) else 0.0
    if isinstance(value, list):
        return [_shown(item) for item in value]
    if isinstance(value, dict):
        return {visible(key): _shown(item) for key, item in value.items() if not _is_nan(item)}
    return value


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
