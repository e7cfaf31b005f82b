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
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from vdr_cli.config.paths import checked_path
from vdr_cli.data.compression import BROKEN, data_suffix, is_compressed, open_bytes
from vdr_cli.data.files import csv_delimiter, is_json_list, refuse_repeated
from vdr_cli.errors import ConfigError, DataError
from vdr_cli.scoring.parts import read_metadata
from vdr_cli.system.text import is_text

WINDOW_ROWS = 1024
FORMATS = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet"}
STDIN = "-"
BESIDE = (".meta.json", ".ranking.json")  # what is written beside an output
SPOOL = ".stdin"  # OUT.stdin: what came in on stdin, while it is scored


@dataclass(frozen=True)
class Source:
    path: str
    format: str

    @property
    def size(self) -> int:
        """Bytes."""
        return Path(self.path).stat().st_size

    @property
    def stamp(self) -> dict[str, Any]:
        """Path, size and time, which tell a changed file; the copy of stdin is a new file each time."""
        changed = {} if self.path.endswith(SPOOL) else {"changed": Path(self.path).stat().st_mtime_ns}
        return {"path": self.path, "bytes": self.size, **changed}


@dataclass(slots=True)
class Row:
    """One input row: its values, or why it cannot be used."""

    source: str
    number: int  # line of the file from 1 (JSONL, CSV), row from 0 (Parquet, a JSON list)
    values: dict[str, Any] | None
    error: str | None = None
    unit: str = "line"

    @property
    def place(self) -> str:
        return f"{shown_path(self.source)} {self.unit} {self.number}"


def shown_path(path: str) -> str:
    """A source's name in messages."""
    return "stdin" if path.endswith(SPOOL) else path


@dataclass(frozen=True)
class Window:
    index: int
    rows: list[Row]
    fraction: float
    """Share of the input read so far, by bytes."""


def find_sources(inputs: Sequence[str], spool: Path) -> list[Source]:
    """The files behind paths, globs, run directories and `-`, in order.

    stdin is copied to the file `spool` first: it can be read only once, and a resumed scoring reads it again.
    """
    sources: list[Source] = []
    for given in inputs:
        if given == STDIN:
            if sys.stdin is None:
                raise ConfigError("- (stdin) is closed; pipe JSONL into it, or give a file")
            with spool.open("wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
            sources.append(Source(str(spool), "jsonl"))
            continue
        for path in _expand(given):
            kind = FORMATS.get(data_suffix(path))
            if kind is None or (kind == "parquet" and is_compressed(path)):
                raise ConfigError(
                    f"{path}: unknown format {path.suffix!r}: give {', '.join(sorted(FORMATS))}, the text formats also "
                    "compressed (.jsonl.gz, .csv.bz2, .json.xz)"
                )
            sources.append(Source(str(path), kind))
    if not sources:
        raise ConfigError("no input: give files, a run directory, or - for JSONL on stdin")
    return sources


class Windows:
    """The wanted windows in order; `count` says how many there are in all once the end was reached.

    Rows of windows that are not wanted are read past without being parsed.
    """

    def __init__(self, sources: Sequence[Source], wanted: Callable[[int], bool]) -> None:
        self._sources = sources
        self._wanted = wanted
        self.count = 0

    def __iter__(self) -> Iterator[Window]:
        sizes = [source.size for source in self._sources]
        total = max(sum(sizes), 1)
        rows: list[Row] = []
        number = 0
        for index, source in enumerate(self._sources):
            before = sum(sizes[:index])
            for make, share in _readers[source.format](source):
                window = number // WINDOW_ROWS
                number += 1
                if self._wanted(window):
                    rows.append(make())
                if number % WINDOW_ROWS == 0 and rows:
                    yield Window(window, rows, (before + share * sizes[index]) / total)
                    rows = []
        if rows:
            yield Window(number // WINDOW_ROWS, rows, 1.0)
        self.count = -(-number // WINDOW_ROWS)


def first_rows(sources: Sequence[Source]) -> list[Row]:
    """The rows of the first window; DataError when there are none."""
    window = next(iter(Windows(sources, lambda index: index == 0)), None)
    if window is None:
        raise DataError(f"{', '.join(shown_path(source.path) for source in sources)}: no rows to score")
    return window.rows


def input_schema(sources: Sequence[Source]) -> pa.Schema | None:
    """The common schema of Parquet inputs; None when there are others."""
    if any(source.format != "parquet" for source in sources):
        return None
    schemas = []
    for source in sources:
        with _parquet(source.path) as file:
            schemas.append(file.schema_arrow.remove_metadata())
    try:
        return pa.unify_schemas(schemas)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"the input files have different columns: {error}; score them one by one") from error


def _expand(given: str) -> list[Path]:
    path = checked_path(given, "FILE")
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            raise ConfigError(f"{given}: saved by save_to_disk; write it with Dataset.to_parquet and give that file")
        folder = path / "completions" if (path / "completions").is_dir() else path
        names = ("step_*.parquet", "completions_*.parquet", "samples_*.jsonl")  # ours, TRL's, lm-eval's
        found = next(filter(None, (sorted(folder.glob(name)) for name in names)), [])
        found = found or sorted(file for file in folder.iterdir() if _is_input(file))
        found = found or sorted(folder.glob("*/samples_*.jsonl"))  # --output_path of lm-eval: a folder for each model
        if len({file.parent for file in found}) > 1:
            models = ", ".join(sorted({file.parent.name for file in found}))
            raise ConfigError(f"{given}: the directory holds logs of several models ({models}): give one of them")
        if not found:
            raise ConfigError(f"{given}: the directory holds no completions ({', '.join(sorted(FORMATS))})")
        return found
    if path.is_file():
        return [path]
    matches = sorted(Path(match) for match in glob.glob(str(path)) if Path(match).is_file())  # noqa: PTH207
    if not matches:
        raise ConfigError(f"{given}: no such file, and nothing matches it")
    return matches


def _is_input(file: Path) -> bool:
    """True for a data file in a directory, false for scores and what stands beside them."""
    return data_suffix(file) in FORMATS and not file.name.endswith(BESIDE) and read_metadata(file) is None


Reader = Iterator[tuple[Callable[[], Row], float]]


def _json(source: Source) -> Reader:
    """An object per line, or one list of objects: both are written under either ending."""
    with _opened(source) as (data, _):
        is_list = is_json_list(io.TextIOWrapper(data, encoding="utf-8-sig", errors="replace"))
    yield from (_json_list if is_list else _jsonl)(source)


def _json_list(source: Source) -> Reader:
    with _opened(source) as (data, _):
        content = data.read()
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        why = _not_json(error) + "; give one list of objects, or one object per line"
        yield lambda: Row(source.path, 0, None, why, "row"), 1.0
        return
    for number, values in enumerate(rows):
        yield partial(_listed_row, source.path, number, values), (number + 1) / len(rows)


def _listed_row(path: str, number: int, values: Any) -> Row:
    if not isinstance(values, dict):
        return Row(path, number, None, "not a JSON object", "row")
    return Row(path, number, values, unit="row")


def _jsonl(source: Source) -> Reader:
    size = max(source.size, 1)
    with _opened(source) as (lines, raw):
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            yield partial(_json_row, source.path, number, line), min(raw.tell() / size, 1.0)


def _json_row(path: str, number: int, line: bytes) -> Row:
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if line.strip() == b"{":
            return Row(path, number, None, "JSON over several lines: give one object per line, or one list of objects")
        return Row(path, number, None, _not_json(error))
    if isinstance(values, list):
        return Row(path, number, None, "a JSON array among objects: give one object per line")
    if not isinstance(values, dict):
        return Row(path, number, None, "not a JSON object")
    return Row(path, number, values)


def _not_json(error: Exception) -> str:
    """error: bad JSON, bad UTF-8, a number of more digits than Python reads, or too deep a nesting."""
    return f"not valid JSON ({'nested too deep' if isinstance(error, RecursionError) else error})"


def _csv(source: Source) -> Reader:
    csv.field_size_limit(sys.maxsize)
    size = max(source.size, 1)
    with _opened(source) as (data, raw):
        text = io.TextIOWrapper(data, encoding="utf-8-sig", errors="surrogateescape", newline="")
        skipped, first = next(((n, line) for n, line in enumerate(text) if line.strip("\r\n")), (0, ""))
        reader = csv.reader(itertools.chain([first], text), delimiter=csv_delimiter(first))
        header = next(reader, None)
        if header is None:
            return
        refuse_repeated(Path(source.path), header)
        for values in itertools.filterfalse(lambda row: not row, reader):
            yield partial(_csv_row, source.path, skipped + reader.line_num, header, values), min(raw.tell() / size, 1.0)


def _csv_row(path: str, number: int, header: list[str], values: list[str]) -> Row:
    if len(values) != len(header):
        return Row(path, number, None, f"{len(values)} cells, the header has {len(header)}")
    if any(not is_text(value) for value in values):
        return Row(path, number, None, "not valid UTF-8")
    return Row(path, number, dict(zip(header, values, strict=True)))


def _parquet_rows(source: Source) -> Reader:
    with _parquet(source.path) as file:
        total = max(file.metadata.num_rows, 1)
        number = 0
        for batch in file.iter_batches(batch_size=WINDOW_ROWS):
            parsed = _Parsed(batch)
            for at in range(batch.num_rows):
                yield partial(_parquet_row, source.path, number, parsed, at), (number + 1) / total
                number += 1


class _Parsed:
    """A record batch as Python rows, converted when the first of them is asked for."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._batch = batch
        self._rows: list[dict[str, Any]] | None = None

    def __getitem__(self, at: int) -> dict[str, Any]:
        if self._rows is None:
            try:
                self._rows = self._batch.to_pylist()
            except (ValueError, OverflowError):
                columns = [_cells(column) for column in self._batch.columns]
                self._rows = [
                    dict(zip(self._batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True)
                ]
        return self._rows[at]


def _cells(column: pa.Array) -> list[Any]:
    """The cells; as text where Python has no such value (a date beyond the year 9999), text not in UTF-8 as bytes."""
    try:
        return column.to_pylist()  # type: ignore[no-any-return]
    except (ValueError, OverflowError):
        as_bytes = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        return column.cast(pa.binary() if as_bytes else pa.string()).to_pylist()  # type: ignore[no-any-return]


def _parquet_row(path: str, number: int, parsed: _Parsed, at: int) -> Row:
    return Row(path, number, parsed[at], unit="row")


@contextmanager
def _parquet(path: str) -> Iterator[pq.ParquetFile]:
    """The open file. Raises DataError when it is damaged, at its end or at the rows that are being read."""
    try:
        with pq.ParquetFile(path) as file:
            refuse_repeated(Path(path), file.schema_arrow.names)
            yield file
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error


@contextmanager
def _opened(source: Source) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The data of a source, and the file whose position tells how far it was read. DataError when it is damaged."""
    try:
        data, raw = open_bytes(Path(source.path))
        with raw, data:
            yield data, raw
    except BROKEN as error:
        what = "decompressed" if is_compressed(Path(source.path)) else "read"
        raise DataError(f"{source.path}: cannot be {what} ({getattr(error, 'strerror', None) or error})") from error


_readers: dict[str, Callable[[Source], Reader]] = {"jsonl": _json, "csv": _csv, "parquet": _parquet_rows}
