"""With labels: how well each column of a scored file ranks what is wrong, beside likelihood, length and entropy."""

from __future__ import annotations

import csv
import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vdr_cli.errors import DataError
from vdr_cli.scoring.cells import RowError, group_key, is_lm_eval, value_at
from vdr_cli.scoring.parts import plain
from vdr_cli.scoring.request import BASE_COLUMNS, ENSEMBLE_COLUMNS, Fields
from vdr_cli.scoring.sources import WINDOW_ROWS, Row
from vdr_cli.stats.ranking import expected_calibration_error, with_intervals
from vdr_cli.system.files import write_whole

NOT_RANKED = ("ppl", "bald_se")  # ppl orders rows as nll_mean does; bald_se is an error bar
GROUP = "group_id"


@dataclass(frozen=True)
class Ranking:
    """The quality of each measure's ranking, and notes on the rows it was computed from."""

    rows: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()


def save_ranking(output: str, fields: Fields) -> Ranking:
    """rank_columns, also written to OUT.ranking.json when there are labels; that of an earlier output is removed."""
    saved = Path(output + ".ranking.json")
    saved.unlink(missing_ok=True)
    ranking = rank_columns(output, fields)
    if ranking.rows:
        write_whole(saved, json.dumps([plain(row) for row in ranking.rows], indent=1) + "\n")
    return ranking


def check_labels(rows: Sequence[Row], fields: Fields) -> None:
    """DataError when the first rows lack labels or groups that were named: sooner than after all have been scored."""
    kept = [(row.place, row.values) for row in rows if row.values is not None]
    for place, values in kept if fields.label else ():
        as_number(value_at(values, str(fields.label)), f"{place}: {fields.label}")
    logs = [values for _, values in kept if is_lm_eval(values)]
    filters = sorted({str(values["filter"]) for values in logs if "filter" in values})
    if fields.filter is not None and fields.filter not in filters:
        raise DataError(f"--filter {fields.filter}: the first rows have {', '.join(filters) or 'no filter'}")
    for name, flag in ((fields.label, "--label-column"), (fields.group, "--group-column")):
        if name and kept and not any(name in values or name.partition(".")[0] in values for _, values in kept):
            place, values = kept[0]
            raise DataError(f"{place}: no {name} in it (there are: {', '.join(values)}); name another {flag}")


def rank_columns(output: str, fields: Fields) -> Ranking:
    """A row a column: AUROC, AUPRC, PRR, AURC with intervals, ECE where the column is a probability's logarithm.

    Empty without labels. A label that is not 0 or 1 is a quality: PRR and AURC alone, of the loss −quality.
    Raises DataError when no row has a label, a label is not a number, or a row belongs to no group; where neither
    labels nor groups were named, this is a note.
    """
    names, rows = _open(output)
    label = fields.label or (fields.implied_label if fields.implied_label in names else None)
    if label is None:
        return Ranking()
    group = fields.group or (GROUP if GROUP in names else None)
    measures = [name for name in (*BASE_COLUMNS, *ENSEMBLE_COLUMNS) if name in names and name not in NOT_RANKED]
    try:
        table = _read(rows, output, label, group, fields, measures)
    except DataError as error:
        if fields.label or fields.group:
            raise
        return Ranking(notes=(f"not ranked: {error}",))
    is_binary, loss = loss_of(table.labels)
    ranking = []
    for index, name in enumerate(measures):
        column = table.columns[:, index]
        row: dict[str, Any] = {"measure": name, **with_intervals(column, loss, table.groups)}
        if is_binary:
            row["ece"] = _calibration(column, table.labels) if name in ("nll_mean", "nll_sum") else None
        ranking.append(row)
    what = f"rows with the same {group}" if group else "rows with the same prompt"
    count = len(np.unique(table.groups))
    return Ranking(tuple(ranking), (*table.notes, f"intervals: resampled over {count} groups ({what})"))


def loss_of(labels: NDArray[np.float64]) -> tuple[bool, NDArray[np.float64]]:
    """(whether every label is 0 or 1, what is to be small): the error 1 − label, or −quality."""
    is_binary = bool(np.isin(labels[np.isfinite(labels)], (0.0, 1.0)).all())
    return is_binary, 1.0 - labels if is_binary else -labels


def _calibration(nll: NDArray[np.float64], labels: NDArray[np.float64]) -> float:
    """The calibration error of exp(−nll) as the probability of being right."""
    kept = np.isfinite(nll) & np.isfinite(labels)
    return expected_calibration_error(np.exp(-nll[kept]), labels[kept])


@dataclass(frozen=True)
class _Table:
    """The ranked rows of an output."""

    labels: NDArray[np.float64]  # (N,)
    groups: NDArray[np.int64]  # (N,)
    columns: NDArray[np.float64]  # (N, measures), NaN where a row has none
    notes: tuple[str, ...]


def _read(
    rows: Iterator[dict[str, Any]],
    output: str,
    label: str,
    group: str | None,
    fields: Fields,
    measures: Sequence[str],
) -> _Table:
    """The rows that the ranking is of. A log of lm-eval with several filters holds each document once per filter."""
    labels, groups, filters, columns = array("d"), array("q"), array("q"), array("d")  # 8 bytes per number
    keys = _Numbers()
    names, documents = _Numbers(), _Numbers()
    for number, row in enumerate(rows):
        labels.append(as_number(value_at(row, label), f"{output} row {number}: {label}"))
        groups.append(keys.of(_key(row, group, fields, f"{output} row {number}")))
        columns.extend(as_number(row.get(name), name) for name in measures)
        filtered = str(row.get("filter", "")) if is_lm_eval(row) else ""
        filters.append(names.of(filtered))
        if is_lm_eval(row):
            documents.of((filtered, groups[-1], str(row.get("doc_id"))))
    found, of_filter = np.array(labels), np.array(filters)
    if not np.isfinite(found).any():
        raise DataError(f"{output}: no row has a number in {label}: name the right column with --label-column")
    kept = np.ones(len(found), bool)
    notes = []
    if documents.count and documents.seen > documents.count:
        repeated = documents.seen - documents.count
        notes.append(f"{repeated} rows repeat a document of the log (two runs of one task?): each of them counts")
    if names.count > 1:
        chosen = fields.filter or names.first
        kept = of_filter == names.of(chosen)
        notes.append(
            f"the log has {names.count} filters ({', '.join(map(str, names.values))}), each with every document: "
            f"ranked by the rows of {chosen} alone; --filter names another"
        )
    table = np.array(columns).reshape(len(found), len(measures))
    return _Table(found[kept], np.array(groups)[kept], table[kept], tuple(notes))


class _Numbers:
    """Numbers keys in the order in which they first come. Long keys are kept as 16 bytes."""

    def __init__(self) -> None:
        self._number: dict[bytes, int] = {}
        self.values: list[object] = []
        """The first few keys."""
        self.seen = 0

    def of(self, key: object) -> int:
        self.seen += 1
        digest = hashlib.blake2b(repr(key).encode("utf-8", "replace"), digest_size=16).digest()
        number = self._number.setdefault(digest, len(self._number))
        if number == len(self.values) < 16:
            self.values.append(key)
        return number

    @property
    def count(self) -> int:
        return len(self._number)

    @property
    def first(self) -> object:
        return self.values[0]


def _key(row: dict[str, Any], group: str | None, fields: Fields, where: str) -> object:
    """The key of the row's group."""
    if group is not None:
        return value_at(row, group)
    try:
        return group_key(row, fields)
    except RowError as error:
        raise DataError(f"{where} belongs to no group ({error}); name a column of groups with --group-column") from None


def as_number(value: Any, where: str) -> float:
    """The number in a cell of any format; NaN when it is empty. DataError when it is not a number."""
    if value is None or value == "":
        return float("nan")
    if value in ("True", "true", "False", "false"):  # a CSV's booleans
        return float(value in ("True", "true"))
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{where} is {value!r:.60}, not a number") from None


def _open(output: str) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """The names of the columns, in JSONL those of the first WINDOW_ROWS rows, and the rows."""
    path = Path(output)
    if path.suffix.lower() == ".parquet":
        file = pq.ParquetFile(path)
        return file.schema_arrow.names, (row for batch in file.iter_batches() for row in batch.to_pylist())
    if path.suffix.lower() == ".csv":
        with path.open(encoding="utf-8", newline="") as header:
            names = next(csv.reader(header), [])
        return names, _csv_rows(path)
    first = islice(_json_rows(path), WINDOW_ROWS)
    return list(dict.fromkeys(name for row in first for name in row)), _json_rows(path)


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as lines:
        yield from csv.DictReader(lines)


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)
