"""With labels: how well each column of a scored file ranks what is wrong, beside likelihood, length and entropy."""

from __future__ import annotations

import csv
import json
import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vdr_cli.errors import DataError
from vdr_cli.scoring.parts import plain
from vdr_cli.scoring.request import BASE_COLUMNS, ENSEMBLE_COLUMNS, Fields
from vdr_cli.scoring.sources import Row
from vdr_cli.scoring.tokens import value_at
from vdr_cli.stats.ranking import expected_calibration_error, with_intervals

NOT_RANKED = ("ppl", "bald_se")  # ppl orders rows as nll_mean does; bald_se is an error bar
LABEL = "label"
GROUP = "group_id"


def save_ranking(output: str, fields: Fields) -> tuple[dict[str, Any], ...]:
    """rank_columns, also written to OUT.ranking.json when there are labels."""
    ranking = rank_columns(output, fields)
    path = Path(output + ".ranking.json")
    if ranking:
        path.write_text(json.dumps([plain(row) for row in ranking], indent=1) + "\n", encoding="utf-8")
    return ranking


def check_labels(rows: Sequence[Row], fields: Fields) -> None:
    """DataError when the first rows lack labels or groups that were named: sooner than after all have been scored."""
    label = fields.label or LABEL
    kept = [(row.place, row.values) for row in rows if row.values is not None]
    for place, values in kept:
        as_number(value_at(values, label), f"{place}: {label}")
    for name, flag in ((fields.label, "--label-column"), (fields.group, "--group-column")):
        if name and kept and not any(name in values or name.partition(".")[0] in values for _, values in kept):
            place, values = kept[0]
            raise DataError(f"{place}: no {name} in it (there are: {', '.join(values)}); name another {flag}")


def rank_columns(output: str, fields: Fields, seed: int = 0) -> tuple[dict[str, Any], ...]:
    """A row a column: AUROC, AUPRC, PRR, AURC with intervals, ECE where the column is a probability's logarithm.

    Empty without labels. A label that is not 0 or 1 is a quality: PRR and AURC alone, of the loss −quality.
    """
    names, rows = _open(output)
    label = fields.label or (LABEL if LABEL in names else None)
    if label is None:
        return ()
    group = fields.group or (GROUP if GROUP in names else None)
    measures = [name for name in (*BASE_COLUMNS, *ENSEMBLE_COLUMNS) if name in names and name not in NOT_RANKED]
    labels, clusters, columns = _read(rows, output, label, group, fields, measures)
    is_binary, loss = loss_of(labels)
    ranking = []
    for index, name in enumerate(measures):
        row: dict[str, Any] = {"measure": name, **with_intervals(columns[:, index], loss, clusters, seed)}
        if is_binary:
            row["ece"] = _calibration(columns[:, index], labels) if name in ("nll_mean", "nll_sum") else None
        ranking.append(row)
    return tuple(ranking)


def loss_of(labels: NDArray[np.float64]) -> tuple[bool, NDArray[np.float64]]:
    """(whether every label is 0 or 1, what is to be small): the error 1 − label, or −quality."""
    is_binary = bool(np.isin(labels[np.isfinite(labels)], (0.0, 1.0)).all())
    return is_binary, 1.0 - labels if is_binary else -labels


def _calibration(nll: NDArray[np.float64], labels: NDArray[np.float64]) -> float:
    """Of exp(−nll) as the probability of being right."""
    kept = np.isfinite(nll) & np.isfinite(labels)
    return expected_calibration_error(np.exp(-nll[kept]), labels[kept])


def _read(
    rows: Iterator[dict[str, Any]],
    output: str,
    label: str,
    group: str | None,
    fields: Fields,
    measures: Sequence[str],
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """Labels (N,), clusters (N,) and columns (N, measures), NaN where a row has none."""
    labels, clusters, columns = array("d"), array("q"), array("d")  # 8 bytes a number, however many rows
    for number, row in enumerate(rows):
        labels.append(as_number(value_at(row, label), f"{output} row {number}: {label}"))
        key = value_at(row, group) if group else (value_at(row, fields.prompt) or value_at(row, fields.prompt_ids))
        clusters.append(zlib.crc32(repr(key).encode("utf-8", "replace")))
        columns.extend(as_number(row.get(name), name) for name in measures)
    found = np.array(labels)
    if not np.isfinite(found).any():
        raise DataError(f"{output}: no row has a number in {label}: name the right column with --label-column")
    return found, np.array(clusters), np.array(columns).reshape(len(found), len(measures))


def as_number(value: Any, where: str) -> float:
    """What a cell of any format says; NaN when it is empty. DataError for what is no number."""
    if value is None or value == "":
        return float("nan")
    if value in ("True", "true", "False", "false"):  # a CSV's booleans
        return float(value in ("True", "true"))
    try:
        return float(value)
    except (TypeError, ValueError):
        raise DataError(f"{where} is {value!r:.60}, not a number") from None


def _open(output: str) -> tuple[list[str], Iterator[dict[str, Any]]]:
    path = Path(output)
    if path.suffix.lower() == ".parquet":
        file = pq.ParquetFile(path)
        return file.schema_arrow.names, (row for batch in file.iter_batches() for row in batch.to_pylist())
    if path.suffix.lower() == ".csv":
        with path.open(encoding="utf-8", newline="") as header:
            names = next(csv.reader(header), [])
        return names, _csv_rows(path)
    with path.open(encoding="utf-8") as lines:
        first = lines.readline()
    return list(json.loads(first)) if first else [], _json_rows(path)


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as lines:
        yield from csv.DictReader(lines)


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)
