"""The contents of a report, read from run directories and scored files. No markup here."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from vdr_cli.config.moved import with_moved_keys
from vdr_cli.config.sections.bonus import SOURCES
from vdr_cli.data.completions import completion_files, read_completions
from vdr_cli.data.metrics import METRICS_FILE, read_metrics
from vdr_cli.data.turns import shown_turns
from vdr_cli.errors import ConfigError, DataError
from vdr_cli.report.charts import Series
from vdr_cli.scoring.request import (
    BASE_COLUMNS,
    BASE_TOKEN_COLUMNS,
    ENSEMBLE_COLUMNS,
    ENSEMBLE_TOKEN_COLUMNS,
    Fields,
)

Decode = Callable[[list[int]], list[str]]
"""Token ids to the text of each token."""

Heat = Callable[[list[int], list[list[int]]], list[list[float]]]
"""Prompt ids and the completions' ids of a group to one number per token."""

DISAGREEMENT = ("bald_tokens", "rmi_tokens", "measured_tokens", "token_bald")
HEAT = (*DISAGREEMENT, "token_entropy")
"""Columns with a number per token; the first that a completion has colours it."""
GROUPS_SHOWN = 60
POINTS_SHOWN = 600
SCORED_ROWS = 100_000
CHARACTERS_SHOWN = 4_000_000  # of all completions in one page
NOT_SEEDS = ("seed", "output")
LISTS = (*BASE_TOKEN_COLUMNS, *ENSEMBLE_TOKEN_COLUMNS, "prompt_ids", "completion_ids")
"""Columns of scored files that hold lists, which a CSV spells as JSON."""
NUMBERS_SHOWN = (
    *("reward", "bonus", "advantage", "bald", "rmi"),
    *("bald_mean", "rmi_mean", "nll_mean", "entropy_mean", "label"),
)


@dataclass(frozen=True)
class RunData:
    name: str
    path: Path
    config: dict[str, Any]
    metrics: dict[str, tuple[list[int], list[float]]]
    """Name to steps and values, where it was measured."""

    @property
    def bonus_column(self) -> str:
        """The column of completions/ with the numbers that the bonus is made from."""
        source = str(self.config.get("bonus", {}).get("source", "disagreement"))
        of_members = str(self.config.get("disagreement", {}).get("measure", "bald"))
        return of_members if source == "disagreement" else source.rpartition(":")[2]

    @property
    def same_but_for_seed(self) -> str:
        """Equal for runs that differ in nothing but their seed and where they were written."""
        settings = {
            section: {key: value for key, value in values.items() if not (section == "train" and key in NOT_SEEDS)}
            for section, values in self.config.items()
            if isinstance(values, dict) and section not in ("launch", "observe")
        }
        return repr(sorted(settings.items()))


@dataclass(frozen=True)
class Completion:
    text: str
    tokens: list[str] | None = None
    heat: list[float] | None = None
    """One number per token."""
    numbers: dict[str, float] = field(default_factory=dict)
    turns: list[TurnShown] | None = None
    """The messages of an episode, with the tokens of the policy's; None: the completion is one answer."""


@dataclass(frozen=True)
class TurnShown:
    """One message of an episode."""

    role: str
    text: str
    tokens: list[str] | None = None
    """The policy's tokens; None: the message is an environment's, or was not measured."""
    heat: list[float] | None = None


@dataclass(frozen=True)
class ShownGroup:
    """The completions of one prompt at one step."""

    title: str
    prompt: str
    completions: list[Completion]


def load_run(path: str | Path) -> RunData:
    """A run directory's settings and metrics."""
    directory = Path(path)
    if not (directory / METRICS_FILE).is_file():
        raise ConfigError(f"{directory}: no {METRICS_FILE} in it: give a run directory, or a file that vdr score wrote")
    metrics: dict[str, tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))
    for line in read_metrics(directory / METRICS_FILE):
        for name, value in line.items():
            if name != "step":
                metrics[name][0].append(int(line["step"]))
                metrics[name][1].append(value)
    config_file = directory / "config.yaml"
    try:
        loaded = yaml.safe_load(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{config_file}: not valid YAML ({' '.join(str(error).split())})") from None
    settings = with_moved_keys(loaded) if isinstance(loaded, dict) else {}
    return RunData(directory.name, directory, settings, dict(metrics))


def over_seeds(runs: Sequence[RunData], metric: str) -> list[Series]:
    """One curve a setting: runs that differ only in their seed become their mean, with a band from lowest to highest.

    A single run gets its own interval as a band where it has one (eval/pass@1_low, _high). A setting that did not
    measure the metric keeps its place, empty.
    """
    series = []
    for group in settings_of(runs):
        members = [run for run in group if metric in run.metrics]
        if len(members) < 2:
            series.append(_own_curve(members[0], metric) if members else Series(group[0].name, [], []))
            continue
        at: dict[int, list[float]] = defaultdict(list)
        for run in members:
            for step, value in zip(*run.metrics[metric], strict=True):
                if math.isfinite(value):
                    at[step].append(value)
        steps = sorted(step for step, values in at.items() if len(values) == len(members))
        means = [sum(at[step]) / len(at[step]) for step in steps]
        low, high = [min(at[step]) for step in steps], [max(at[step]) for step in steps]
        series.append(Series(_shared_name(members), steps, means, low, high))
    return series


def settings_of(runs: Sequence[RunData]) -> list[list[RunData]]:
    """Runs that differ only in their seed, together; in the order of their first. A run given twice counts once."""
    groups: dict[str, list[RunData]] = defaultdict(list)
    for run in {run.path.resolve(): run for run in runs}.values():
        groups[run.same_but_for_seed if run.config else str(run.path)].append(run)
    return list(groups.values())


def _shared_name(runs: Sequence[RunData]) -> str:
    """The name of the curve of some runs of one setting."""
    if len(runs) == 1:
        return runs[0].name
    seeds = len({run.config.get("train", {}).get("seed") for run in runs})
    return f"{runs[0].name} ({f'{seeds} seeds' if seeds > 1 else f'{len(runs)} runs'})"


def _own_curve(run: RunData, metric: str) -> Series:
    steps, values = run.metrics[metric]
    low, high = run.metrics.get(f"{metric}_low"), run.metrics.get(f"{metric}_high")
    if low is not None and high is not None and len(low[1]) == len(high[1]) == len(values):
        return Series(run.name, steps, values, low[1], high[1])
    return Series(run.name, steps, values)


def run_groups(run: RunData, decode: Decode | None, heat: Heat | None = None) -> tuple[list[ShownGroup], int]:
    """Groups from all over the run, the same number from each saved step; and how many were saved in all.

    heat: measures the tokens of a group where the run did not save that.
    """
    files = completion_files(run.path)
    shown: list[ShownGroup] = []
    saved = characters = 0
    each = max(GROUPS_SHOWN // max(len(files), 1), 1)
    picked = set(_spaced(len(files), GROUPS_SHOWN))
    for index, file in enumerate(files):
        if index not in picked:
            saved += _rows_of(file)[1]
            continue
        columns = read_completions(file)
        groups = _by_group(columns)
        saved += len(groups)
        for rows in [groups[at] for at in _chosen(columns, groups, each)]:
            if heat is not None and not _is_measured(columns, rows[0]):
                columns.setdefault("measured_tokens", [None] * len(columns["prompt"]))
                ids = [columns["completion_ids"][row] for row in rows]
                for row, values in zip(rows, heat(columns["prompt_ids"][rows[0]], ids), strict=True):
                    columns["measured_tokens"][row] = values
            group = _group(columns, rows, decode)
            characters += sum(len(completion.text) for completion in group.completions)
            if shown and characters > CHARACTERS_SHOWN:
                return shown, saved
            shown.append(group)
    return shown, saved


def _chosen(columns: Mapping[str, Sequence[Any]], groups: Sequence[list[int]], wanted: int) -> list[int]:
    """Up to `wanted` groups of a step, in order: those that the run measured token by token before others."""
    measured = [at for at, rows in enumerate(groups) if _is_measured(columns, rows[0])]
    first = [measured[at] for at in _spaced(len(measured), wanted)]
    others = [at for at in range(len(groups)) if at not in first]
    return sorted(first + [others[at] for at in _spaced(len(others), wanted - len(first))])


def _is_measured(columns: Mapping[str, Sequence[Any]], row: int) -> bool:
    return any(columns[name][row] for name in DISAGREEMENT if name in columns)


def reward_and_bonus_source(runs: Sequence[RunData]) -> Series:
    """A point per saved completion of one setting's runs, the latest ones: its source's number and its reward."""
    xs: list[float] = []
    ys: list[float] = []
    measure = runs[0].bonus_column
    files = [reversed(completion_files(run.path)) for run in runs]
    for file in (file for latest in zip_longest(*files) for file in latest if file is not None):
        columns = read_completions(file)
        if measure not in columns or "reward" not in columns:
            continue
        for x, y in zip(columns[measure], columns["reward"], strict=True):
            if x is not None and y is not None and len(xs) < POINTS_SHOWN:
                xs.append(x)
                ys.append(y)
        if len(xs) >= POINTS_SHOWN:
            break
    return Series(_shared_name(runs), xs, ys)


def scored_rows(path: str | Path) -> dict[str, list[Any]]:
    """The first SCORED_ROWS of a scored file, in whole windows, as columns.

    prompt and completion are those that were scored, wherever they lie in a row; None where there is no text.
    """
    from vdr_cli.scoring.sources import WINDOW_ROWS, Windows, find_sources

    sources = find_sources([str(path)], Path(str(path) + ".stdin"))
    windows = Windows(sources, lambda index: index * WINDOW_ROWS < SCORED_ROWS)
    rows = [row.values for window in windows for row in window.rows if row.values is not None]
    if str(path).lower().endswith(".csv"):
        rows = [{name: _from_cell(name, cell) for name, cell in row.items()} for row in rows]
    if not rows or "nll_mean" not in rows[0]:
        raise DataError(f"{path}: not a file that vdr score wrote (there is no nll_mean column)")
    named = _scored_fields(Path(path))
    rows = [_with_parts(row, named) for row in rows]
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def _scored_fields(path: Path) -> Fields:
    """The columns that the scoring read, from the file's metadata."""
    from vdr_cli.scoring.parts import read_metadata

    saved = (read_metadata(path) or {}).get("request", {}).get("fields", {})
    return Fields(**{name.name: saved[name.name] for name in fields(Fields) if name.name in saved})


def _with_parts(row: dict[str, Any], named: Fields) -> dict[str, Any]:
    """The row, its columns prompt and completion replaced by those that were scored."""
    from vdr_cli.scoring.cells import RowError, completion_value, prompt_value

    parts: dict[str, Any] = {"prompt": None, "completion": None}
    with suppress(RowError):
        parts["prompt"] = prompt_value(row, named)
    with suppress(RowError):
        parts["completion"] = completion_value(row, named)
    return row | parts


def _from_cell(name: str, cell: Any) -> Any:
    """A CSV's text as its value, where it is a number or a list of them."""
    if name in LISTS:
        return _list_in(cell)
    if name in (*BASE_COLUMNS, *ENSEMBLE_COLUMNS, *NUMBERS_SHOWN) or name.startswith("rewards/"):
        try:
            return float(cell) if cell else None
        except ValueError:
            return cell
    return cell


def _list_in(cell: str) -> list[Any] | None:
    """The list that a cell spells; None for anything else, such as an empty cell or a user's text."""
    try:
        found = json.loads(cell)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) else None


def scored_groups(columns: Mapping[str, Sequence[Any]], decode: Decode | None) -> tuple[list[ShownGroup], int]:
    """Completions of one prompt side by side, from all over the file. Rows without a prompt are left out."""
    by_prompt: dict[str, list[int]] = defaultdict(list)
    for row, keys in enumerate(zip_longest(columns.get("prompt", ()), columns.get("prompt_ids", ()))):
        key = next((key for key in keys if key is not None), None)
        if key is not None:
            by_prompt[str(key)].append(row)
    groups = list(by_prompt.values())
    return [_group(columns, groups[at], decode) for at in _spaced(len(groups), GROUPS_SHOWN)], len(groups)


def pieces(tokenizer: Any) -> Decode:
    """The text of each token; bytes of one character that several tokens share are shown with the first of them."""

    def decode(ids: list[int]) -> list[str]:
        texts: list[str] = []
        start = 0
        while start < len(ids):
            end, text = start + 1, str(tokenizer.decode(ids[start : start + 1]))
            while "\ufffd" in text and end < min(start + 4, len(ids)):
                end += 1
                text = str(tokenizer.decode(ids[start:end]))
            texts += [text] + [""] * (end - start - 1)
            start = end
        return texts

    return decode


def _group(columns: Mapping[str, Sequence[Any]], rows: Iterable[int], decode: Decode | None) -> ShownGroup:
    rows = list(rows)
    first = rows[0]
    where = [f"{name} {columns[name][first]}" for name in ("step", "row", "id", "group_id") if name in columns]
    return ShownGroup(
        ", ".join(where) or f"row {first}",
        _as_text(columns["prompt"][first] if "prompt" in columns else ""),
        [_completion(columns, row, decode) for row in rows],
    )


def _completion(columns: Mapping[str, Sequence[Any]], row: int, decode: Decode | None) -> Completion:
    heat_name = next((name for name in HEAT if name in columns and columns[name][row]), None)
    ids_name = next((name for name in ("token_ids", "completion_ids") if name in columns), None)
    tokens = heat = None
    if heat_name and ids_name and decode is not None and columns[ids_name][row]:
        ids, values = list(columns[ids_name][row]), list(columns[heat_name][row])
        if len(ids) == len(values):
            tokens, heat = decode(ids), values
    turns = _turns(columns, row, tokens, heat)
    if turns is not None:
        measured = [value for turn in turns for value in turn.heat or ()]
        tokens, heat = None, measured or None
    functions = [name for name in columns if name.startswith("rewards/")]
    names = [*NUMBERS_SHOWN, *SOURCES, *(functions if len(functions) > 1 else ())]  # a single one is the reward
    numbers = {name: columns[name][row] for name in names if name in columns}
    kept = {name: float(value) for name, value in numbers.items() if isinstance(value, int | float)}
    return Completion(
        _as_text(columns["completion"][row] if "completion" in columns else ""), tokens, heat, kept, turns
    )


def _turns(
    columns: Mapping[str, Sequence[Any]], row: int, tokens: list[str] | None, heat: Sequence[float | None] | None
) -> list[TurnShown] | None:
    """The turns of a completion, coloured where its tokens are; None when it is one answer."""
    policy = columns["policy_mask"][row] if "policy_mask" in columns else None
    if tokens is not None and (not isinstance(policy, list) or len(policy) != len(tokens)):
        policy = [value is not None for value in heat or ()]
    found = shown_turns(columns["completion"][row] if "completion" in columns else None, policy or [])
    shown = []
    for turn in found:
        if turn.tokens is None or tokens is None or heat is None:
            shown.append(TurnShown(turn.role, turn.text))
            continue
        values = [float(heat[at] or 0.0) for at in turn.tokens]
        shown.append(TurnShown(turn.role, turn.text, [tokens[at] for at in turn.tokens], values))
    return shown or None


def _as_text(value: Any) -> str:
    """A prompt or completion as one text; messages with their roles."""
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        if len(value) == 1 and value[0].get("role") == "assistant":
            return str(value[0].get("content"))
        return "\n".join(f"[{message.get('role')}] {message.get('content')}" for message in value)
    return "" if value is None else str(value)


def _by_group(columns: Mapping[str, Sequence[Any]]) -> list[list[int]]:
    rows: dict[Any, list[int]] = defaultdict(list)
    for index, key in enumerate(columns.get("group", columns.get("prompt", []))):
        rows[str(key)].append(index)
    return list(rows.values())


def _rows_of(file: Path) -> tuple[int, int]:
    """(completions, groups) of a file that is not shown."""
    try:
        table = pq.read_table(file, columns=["group"]) if "group" in pq.read_schema(file).names else None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a Parquet file of completions: {error}") from error
    return (0, 0) if table is None else (table.num_rows, len(table["group"].unique()))


def _spaced(count: int, wanted: int) -> list[int]:
    """Up to `wanted` of 0 ... count-1, evenly spaced, the first and the last among them."""
    if count <= wanted:
        return list(range(count))
    if wanted <= 0:
        return []
    if wanted == 1:
        return [count - 1]
    return sorted({round(index * (count - 1) / (wanted - 1)) for index in range(wanted)})
