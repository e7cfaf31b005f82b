"""`vdr report`: one self-contained HTML page of a run or of scored completions. No network, light and dark, printable.

Everything that came from a model or a data set passes through `visible` and is put into the page as text, never as
markup; the page forbids itself every request (Content-Security-Policy).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from vdr_cli.errors import ConfigError, MachineError
from vdr_cli.exploration.collapse import warnings_of
from vdr_cli.report.charts import MAX_POINTS, Chart, Series, finite, number, svg
from vdr_cli.report.data import (
    Decode,
    Heat,
    RunData,
    ShownGroup,
    load_run,
    over_seeds,
    pieces,
    reward_and_bonus_source,
    run_groups,
    scored_groups,
    scored_rows,
    settings_of,
)
from vdr_cli.report.intervals import Interval, IntervalChart, interval_svg, ordered
from vdr_cli.system.files import write_whole
from vdr_cli.system.text import visible

RUN_CHARTS = (
    ("Reward", ("reward",), "mean task reward"),
    ("Held-out pass@1", ("eval/pass@1",), "pass@1"),
    ("Held-out pass@k", ("eval/pass@{k}",), "pass@k"),
    ("Disagreement", ("disagreement/mean",), "nats"),
    ("Bonus source", ("bonus/mean",), "mean"),
    ("Groups whose rewards are all equal", ("frac_reward_zero_std",), "share"),
    ("Different completions per group", ("completions/distinct",), "completions"),
    ("Completion length", ("completions/mean_length",), "tokens"),
    ("Truncated completions", ("completions/clipped_ratio",), "share"),
    ("Entropy", ("entropy",), "nats"),
    ("KL to the reference", ("kl",), "nats"),
    ("Gradient norm", ("grad_norm",), "norm"),
    ("Seconds a step", ("step_time",), "s"),
)
SCORE_CURVES = ("bald_mean", "rmi_mean", "nll_mean", "entropy_mean", "n_tokens")
CHARTS_NOTE = (
    "Bands: the lowest to the highest of the seeds; of held-out numbers of one run, the 95 % interval over prompts; "
    "of a long run, the extremes of the steps that one point stands for."
)
QUANTILES = (0.5, 0.75, 0.9, 0.97)


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
    """What the numbers at the tokens are."""
    command: tuple[str, str]
    """How to get numbers at the tokens that have none: a command, and what it does."""


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
    """Every chart of the report as a PNG of 300 dots an inch."""
    from vdr_cli.report.pictures import write_intervals_png, write_png

    folder = Path(directory)
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


def run_page(runs: Sequence[RunData], members: int = 0) -> Page:
    """Learning curves of all runs, completions of the first."""
    first = runs[0]
    charts = []
    for title, names, unit in RUN_CHARTS:
        name = names[0].replace("{k}", str(_largest_k(first.metrics)))
        if name == "eval/pass@1" and title != "Held-out pass@1":
            continue
        series = over_seeds(runs, name)
        if any(finite(one).x for one in series):
            charts.append(Chart(title.replace("@k", "@" + name.rpartition("@")[2]), "step", unit, series))
    points = [reward_and_bonus_source(group) for group in settings_of(runs)]
    if any(len(one.x) for one in points):
        name, unit = _source_name(first)
        charts.append(Chart(f"Reward against {name}", f"{name}{unit}", "task reward", points, True))
    model = _model_of(first)
    if members and model is None:
        raise ConfigError(f"--members {members}: {first.path} has no model to measure with")
    heat = _measuring(first, model, members) if members and model else None
    groups, saved = run_groups(first, _decoder(model), heat)
    facts = [[name, *(_first_to_last(run, name) for run in runs)] for name in _named_facts(runs)]
    return Page(
        title=", ".join(run.name for run in runs),
        subtitle=_settings_line(first),
        charts=charts,
        groups=groups,
        groups_saved=saved,
        facts_header=[run.name for run in runs],
        facts=facts,
        facts_note=" ".join(["First and last measured value.", *map(_warnings, runs)]).strip(),
        ranking_header=[],
        ranking=[],
        ranked=None,
        heat="disagreement",
        command=("vdr report RUN --members 8", "measures the tokens of all of them, with the final model"),
    )


def score_page(path: Path) -> Page:
    """Risk-coverage curves and the ranking where there are labels, and the completions."""
    from vdr_cli.scoring.parts import read_metadata
    from vdr_cli.scoring.ranking import LABEL

    columns = scored_rows(path)
    request = (read_metadata(path) or {}).get("request", {})
    label = request.get("fields", {}).get("label") or LABEL
    charts = []
    if label.partition(".")[0] in columns or label in columns:
        charts.append(_risk_chart(columns, label))
    if "bald_mean" in columns:
        xs, ys = _floats(columns["nll_mean"])[:1500].tolist(), _floats(columns["bald_mean"])[:1500].tolist()
        cloud = [Series("completions", xs, ys)]
        charts.append(Chart("Disagreement against likelihood", "nll a token (nats)", "bald (nats)", cloud, True))
    groups, saved = scored_groups(columns, _decoder(request.get("model")))
    ranking = _saved_ranking(path)
    header = [name for name in (ranking[0] if ranking else {}) if not name.endswith(("_low", "_high"))]
    facts = [[name, number(float(np.nanmean(_floats(columns[name]))))] for name in SCORE_CURVES if name in columns]
    ensemble = request.get("ensemble") or {}
    return Page(
        title=path.name,
        subtitle=f"{len(columns['nll_mean'])} rows scored by {request.get('model', 'an unknown model')}, "
        f"{ensemble.get('members', 0)} members, seed {request.get('seed')}",
        charts=charts,
        groups=groups,
        groups_saved=saved,
        facts_header=["mean"],
        facts=facts,
        facts_note="",
        ranking_header=header,
        ranking=[[_interval(row, name) for name in header] for row in ranking],
        ranked=_ranked(ranking),
        heat="disagreement" if "token_bald" in columns else "entropy",
        command=("vdr score --tokens", "saves the numbers of each token"),
    )


def _ranked(ranking: Sequence[Mapping[str, Any]]) -> IntervalChart | None:
    """The AUROC of every column, PRR where the labels are a quality."""
    from vdr_cli.scoring.request import BASE_COLUMNS

    if not ranking:
        return None
    number = "auroc" if "auroc" in ranking[0] else "prr"
    rows = [
        Interval(
            name=row["measure"],
            value=_or_nan(row[number]),
            low=_or_nan(row[f"{number}_low"]),
            high=_or_nan(row[f"{number}_high"]),
            is_baseline=row["measure"] in BASE_COLUMNS,
        )
        for row in ranking
    ]
    name, chance = ("AUROC", 0.5) if number == "auroc" else ("PRR", 0.0)
    chart = IntervalChart(f"{name} with 95 % intervals", f"{name}; {chance:g} is chance", rows, chance)
    return chart if ordered(chart) else None


def _or_nan(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _risk_chart(columns: Mapping[str, Sequence[Any]], label: str) -> Chart:
    """What the most certain rows lose, for each column that ranks them."""
    from vdr_cli.scoring.ranking import loss_of
    from vdr_cli.scoring.tokens import value_at
    from vdr_cli.stats.ranking import Ranked, risk_coverage

    root = label if label in columns else label.partition(".")[0]
    is_binary, losses = loss_of(_floats([value_at({root: value}, label) for value in columns[root]]))
    curves = []
    for name in [name for name in SCORE_CURVES if name in columns]:
        values = _floats(columns[name])
        kept = np.isfinite(values) & np.isfinite(losses)
        coverage, risk = risk_coverage(Ranked.of(values[kept], losses[kept]))
        curves.append(Series(name, coverage.tolist(), risk.tolist()))
    unit = "share wrong" if is_binary else f"mean of -{label}"
    return Chart("Risk against coverage", "share kept, most certain first", unit, curves)


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
    """How many groups the page has of all that were saved, and what the colours in them mean."""
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
        return float(f"{value:.5g}") if math.isfinite(value) else 0.0
    if isinstance(value, list):
        return [_shown(item) for item in value]
    if isinstance(value, dict):
        return {visible(key): _shown(item) for key, item in value.items() if not _is_nan(item)}
    return value


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _decoder(model: str | None) -> Decode | None:
    """How to show single tokens; None when the tokenizer is not there any more: texts are then shown whole."""
    if model is None:
        return None
    from vdr_cli.models.loading import load_tokenizer

    try:
        return pieces(load_tokenizer(model))
    except (ConfigError, OSError):
        return None


def _measuring(run: RunData, model: str, members: int) -> Heat:
    """The run's measure a token under its ensemble settings, of `model`."""
    from vdr_cli.config import DisagreementConfig
    from vdr_cli.disagreement.masks import EnsembleSpec
    from vdr_cli.disagreement.reader import EnsembleReader, MeasureRequest
    from vdr_cli.models.loading import load_causal_lm
    from vdr_cli.scoring.batches import collate
    from vdr_cli.scoring.tokens import Item

    own = run.config.get("disagreement", {})
    kept = {key: own[key] for key in ("dropout", "scope", "last_k", "mask_sharing", "blocks") if key in own}
    if own.get("mode") == "per_token":
        kept["mode"] = "per_token"  # what scope None means depends on it
    settings = DisagreementConfig(members=members, **kept).member_settings
    spec = EnsembleSpec(**settings, seed=run.config["train"]["seed"])
    reader = EnsembleReader(spec)
    causal_lm = load_causal_lm(model)
    name = own.get("measure", "bald")

    def heat(prompt_ids: list[int], completions: list[list[int]]) -> list[list[float]]:
        items = [Item(at, prompt_ids, ids or [0], False) for at, ids in enumerate(completions)]
        request = MeasureRequest(collate(items, 0), len(items), measures=(name,))
        measured = reader.measure(causal_lm, request).get(name)  # (G, T)
        return [row[: len(ids)] for row, ids in zip(measured.tolist(), completions, strict=True)]

    return heat


def _model_of(run: RunData) -> str | None:
    if (run.path / "model" / "config.json").is_file():
        return str(run.path)
    name = run.config.get("model", {}).get("name")
    return name if isinstance(name, str) else None


def _largest_k(metrics: Mapping[str, Any]) -> int:
    found = [name.removeprefix("eval/pass@") for name in metrics if name.startswith("eval/pass@")]
    return max((int(k) for k in found if k.isdigit()), default=1)


def _named_facts(runs: Sequence[RunData]) -> list[str]:
    wanted = ["eval/pass@1", f"eval/pass@{_largest_k(runs[0].metrics)}", "reward", "disagreement/mean", "bonus/mean"]
    wanted += ["frac_reward_zero_std", "completions/mean_length", "entropy", "step_time"]
    return [name for name in dict.fromkeys(wanted) if any(name in run.metrics for run in runs)]


def _first_to_last(run: RunData, name: str) -> str:
    values = [value for value in run.metrics.get(name, ([], []))[1] if math.isfinite(value)]
    return f"{number(values[0])} → {number(values[-1])}" if values else ""


def _settings_line(run: RunData) -> str:
    def at(section: str, key: str) -> Any:
        return run.config.get(section, {}).get(key, "?")

    return (
        f"{at('model', 'name')} on {at('data', 'name')}: bonus {_bonus_line(run)}, loss {at('grpo', 'loss')}, "
        f"group size {at('rollout', 'group_size')}, seed {at('train', 'seed')}"
    )


def _bonus_line(run: RunData) -> str:
    """The bonus of a run, as `vdr train --dry-run` puts it."""
    from vdr_cli.config.load import validate
    from vdr_cli.planning.batches import bonus_line

    try:
        return bonus_line(validate(run.config))
    except ConfigError:
        return "unknown"


def _warnings(run: RunData) -> str:
    """Early warnings of a run, each with its step, as sentences; empty without any."""
    from vdr_cli.config.load import validate

    try:
        config = validate(run.config)
    except ConfigError:  # of another version
        return ""
    by_step: dict[int, dict[str, float]] = {}
    for name, (steps, values) in run.metrics.items():
        for step, value in zip(steps, values, strict=True):
            by_step.setdefault(step, {"step": step})[name] = value
    found = warnings_of(config, [by_step[step] for step in sorted(by_step)])
    return " ".join(f"Warning at step {step} of {run.name}: {warning}." for step, warning in found)


def _source_name(run: RunData) -> tuple[str, str]:
    """(name, unit in brackets) of the numbers that a run's bonus is made from."""
    source = run.config.get("bonus", {}).get("source", "disagreement")
    return ("disagreement", " (nats)") if source == "disagreement" else (run.bonus_column, "")


def _saved_ranking(path: Path) -> list[dict[str, Any]]:
    saved = Path(str(path) + ".ranking.json")
    loaded = json.loads(saved.read_text(encoding="utf-8")) if saved.is_file() else []
    return loaded if isinstance(loaded, list) else []


def _interval(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, int | float):
        return "" if value is None else str(value)
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")  # null where there was one group
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _floats(values: Sequence[Any]) -> np.ndarray:
    from vdr_cli.scoring.ranking import as_number

    return np.array([as_number(value, "a cell") for value in values])
