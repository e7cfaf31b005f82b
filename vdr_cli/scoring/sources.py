"""Rows of JSONL, CSV and Parquet files, streamed in windows of fixed row numbers.

A window is what is scored, written and resumed as a whole. Row k of all inputs, in order, is in window
k // WINDOW_ROWS whether it can be used or not, so windows are the same on every rank and after every restart.
"""

from __future__ import annotations

import csv
import glob
import io
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vdr_cli.errors import ConfigError, DataError

WINDOW_ROWS = 1024
FORMATS = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet"}
STDIN = "-"


@dataclass(frozen=True)
class Source:
    path: str
    format: str

    @property
    def size(self) -> int:
        """Bytes; 0 for stdin."""
        return 0 if self.path == STDIN else Path(self.path).stat().st_size


@dataclass(slots=True)
class Row:
    """One input row: its values, or why it cannot be used."""

    source: str
    number: int  # line of the file (JSONL, CSV) or row (Parquet), from 1
    values: dict[str, Any] | None
    error: str | None = None

    @property
    def place(self) -> str:
        return f"{'stdin' if self.source == STDIN else self.source}:{self.number}"


@dataclass(frozen=True)
class Window:
    index: int
    rows: list[Row]
    fraction: float
    """Share of the input read so far, by bytes; 0 when unknown."""


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """The files behind paths, globs, run directories and `-`, in order."""
    sources: list[Source] = []
    for given in inputs:
        if given == STDIN:
            sources.append(Source(STDIN, "jsonl"))
            continue
        for path in _expand(given):
            kind = FORMATS.get(path.suffix.lower())
            if kind is None:
                raise ConfigError(f"{path}: unknown format {path.suffix!r}: give {', '.join(sorted(FORMATS))}")
            sources.append(Source(str(path), kind))
    if not sources:
        raise ConfigError("no input: give files, a run directory, or - for JSONL on stdin")
    return sources


def windows(sources: Sequence[Source], wanted: Callable[[int], bool]) -> Iterator[Window]:
    """The wanted windows in order. Rows of the others are read past without being parsed."""
    sizes = [source.size for source in sources]
    total = sum(sizes)
    number = 0
    rows: list[Row] = []
    for index, source in enumerate(sources):
        before = sum(sizes[:index])
        for make, share in _readers[source.format](source):
            window = number // WINDOW_ROWS
            if wanted(window):
                rows.append(make())
            number += 1
            if number % WINDOW_ROWS == 0:
                if rows:
                    yield Window(window, rows, (before + share * sizes[index]) / total if total else 0.0)
                rows = []
    if rows:
        yield Window(number // WINDOW_ROWS, rows, 1.0)


def count_rows(sources: Sequence[Source]) -> int | None:
    """How many rows there are when that is cheap to know (Parquet), else None."""
    if any(source.format != "parquet" for source in sources):
        return None
    return sum(_parquet(source.path).metadata.num_rows for source in sources)


def input_schema(sources: Sequence[Source]) -> pa.Schema | None:
    """The common schema of Parquet inputs; None when there are others."""
    if any(source.format != "parquet" for source in sources):
        return None
    schemas = [_parquet(source.path).schema_arrow.remove_metadata() for source in sources]
    try:
        return pa.unify_schemas(schemas)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"the input files have different columns: {error}; score them one by one") from error


def _expand(given: str) -> list[Path]:
    path = Path(given).expanduser()
    if path.is_dir():
        folder = path / "completions" if (path / "completions").is_dir() else path
        found = sorted(file for file in folder.iterdir() if file.suffix.lower() in FORMATS)
        if not found:
            raise ConfigError(f"{given}: the directory holds no completions ({', '.join(sorted(FORMATS))})")
        return found
    if path.is_file():
        return [path]
    matches = sorted(Path(match) for match in glob.glob(str(path)) if Path(match).is_file())  # noqa: PTH207
    if not matches:
        raise ConfigError(f"{given}: no such file, and nothing matches it")
    return matches


Reader = Iterator[tuple[Callable[[], Row], float]]


def _jsonl(source: Source) -> Reader:
    size = source.size
    read = 0
    with _open_binary(source) as lines:
        for number, line in enumerate(lines, 1):
            read += len(line)
            if not line.strip():
                continue
            yield (lambda line=line, number=number: _json_row(source.path, number, line)), read / size if size else 0.0


def _json_row(path: str, number: int, line: bytes) -> Row:
    try:
        values = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        return Row(path, number, None, f"not valid JSON ({error})")
    if not isinstance(values, dict):
        return Row(path, number, None, "not a JSON object")
    return Row(path, number, values)


def _csv(source: Source) -> Reader:
    csv.field_size_limit(sys.maxsize)
    size = source.size
    with _open_binary(source) as raw:
        reader = csv.reader(io.TextIOWrapper(raw, encoding="utf-8", errors="replace", newline=""))
        header = next(reader, None)
        if header is None:
            return
        for values in itertools.filterfalse(lambda row: not row, reader):
            share = raw.tell() / size if size else 0.0
            number = reader.line_num
            yield (lambda values=values, number=number: _csv_row(source.path, number, header, values)), share


def _csv_row(path: str, number: int, header: list[str], values: list[str]) -> Row:
    if len(values) != len(header):
        return Row(path, number, None, f"{len(values)} cells, the header has {len(header)}")
    return Row(path, number, dict(zip(header, values, strict=True)))


def _parquet_rows(source: Source) -> Reader:
    file = _parquet(source.path)
    total = max(file.metadata.num_rows, 1)
    number = 0
    for batch in file.iter_batches(batch_size=WINDOW_ROWS):
        parsed: list[dict[str, Any]] = []

        def row(at: int, first: int, batch: Any = batch, parsed: list[dict[str, Any]] = parsed) -> Row:
            if not parsed:
                parsed.extend(batch.to_pylist())
            return Row(source.path, first + at + 1, parsed[at])

        for at in range(batch.num_rows):
            yield (lambda at=at, first=number, row=row: row(at, first)), (number + at + 1) / total
        number += batch.num_rows


def _parquet(path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error


def _open_binary(source: Source) -> Any:
    if source.path == STDIN:
        return sys.stdin.buffer
    try:
        return Path(source.path).open("rb")
    except OSError as error:
        raise DataError(f"{source.path}: cannot be read ({error.strerror})") from error


_readers: dict[str, Callable[[Source], Reader]] = {"jsonl": _jsonl, "csv": _csv, "parquet": _parquet_rows}
