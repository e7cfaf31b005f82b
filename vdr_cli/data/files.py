"""Local data files as rows, each with the place an error message can name."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from vdr_cli.data.compression import BROKEN, data_suffix, is_compressed, open_bytes, read_bytes
from vdr_cli.errors import ConfigError, DataError, MachineError
from vdr_cli.system.text import nearest, reason

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
COMPRESSED = "or one of these compressed: .jsonl.gz, .csv.xz, .json.bz2"
DELIMITERS = ",;\t|"

Row = dict[str, Any]


class RowSource(Protocol):
    """Rows by number, as a list, an Arrow table or a `datasets` data set gives them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Row: ...


@dataclass(frozen=True)
class Table:
    """Rows of one split. `lines[i]`: the line of row i in a JSONL file, from 1; elsewhere rows count from 0."""

    name: str
    rows: RowSource
    columns: tuple[str, ...]
    lines: Sequence[int] = field(default=(), repr=False)
    digest: str = ""
    """Hash of the file's bytes; empty for data that `datasets` keeps."""

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        """`FILE line 7` or `FILE row 6`."""
        return f"{self.name} line {self.lines[index]}" if self.lines else f"{self.name} row {index}"


class ArrowRows:
    """An Arrow table row by row, converted when asked for."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int, /) -> Row:
        one = self._table.slice(index, 1)
        return row_of(one.column_names, lambda: one.to_pylist()[0], partial(_first_cell, one))

    def __iter__(self) -> Iterator[Row]:
        first = 0
        for batch in self._table.to_batches():
            rows = range(first, first := first + batch.num_rows)
            try:
                yield from batch.to_pylist()
            except (ValueError, OverflowError):
                yield from map(self.__getitem__, rows)

    def select_columns(self, columns: list[str]) -> ArrowRows:
        """The same rows with only these columns."""
        return ArrowRows(self._table.select(columns))


def _first_cell(table: Any, name: str) -> Any:
    return table.column(name)[0].as_py()


def row_of(columns: Sequence[str], whole: Callable[[], Row], cell: Callable[[str], Any]) -> Row:
    """The row as `whole` gives it, or cell by cell where one has no counterpart in Python (a date in the year 10000).

    That one is `Undecoded`: only whoever asks for its column gets the error.
    """
    try:
        return whole()
    except (ValueError, OverflowError):
        from vdr_cli.samples import Undecoded  # brings torch, which the checks before the start do without

        row = {}
        for name in columns:
            try:
                row[name] = cell(name)
            except (ValueError, OverflowError):
                row[name] = Undecoded(partial(cell, name))
        return row


def read_file(path: Path) -> Table:
    """A .jsonl, .json, .csv or .parquet file; the text formats may be compressed (.gz, .bz2, .xz).

    A CSV file has no types, so every cell is text.
    Raises DataError naming the line or row that cannot be read, ConfigError for another kind of file, and MachineError
    without permission.
    """
    readers: dict[str, Callable[[Path], Table]] = {
        ".jsonl": _read_json,
        ".json": _read_json,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    if data_suffix(path) not in readers:
        raise ConfigError(f"{path}: a data file must end in one of {', '.join(SUFFIXES)}, {COMPRESSED}")
    try:
        table = readers[data_suffix(path)](path)
    except PermissionError:
        raise MachineError(f"{path}: no permission to read it") from None
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such data file") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} line {_line_of_bad_byte(path)}: not text in UTF-8; convert the file") from None
    except BROKEN as error:
        if not is_compressed(path):
            raise
        raise DataError(f"{path}: cannot be decompressed ({reason(error)})") from None
    if len(table) == 0:
        raise DataError(f"{path}: no rows")
    refuse_repeated(path, table.columns)
    with path.open("rb") as file:
        return replace(table, digest=hashlib.file_digest(file, "blake2b").hexdigest()[:32])


def refuse_repeated(path: Path, columns: Sequence[str]) -> None:
    """Raise DataError when two columns of a file have one name: a row could hold only one of them."""
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}: the column {twice} appears more than once; rename one")


def check_column(path: Path, column: str) -> None:
    """DataError when no row of a file has the column `data.prompt_column`; mostly a look at its start."""
    if column not in _first_columns(path):
        table = read_file(path)
        if column not in table.columns:
            raise DataError(no_column(table, column))


def no_column(table: Table, column: str) -> str:
    near = nearest(column, table.columns)
    hint = f"did you mean {near}? Name" if near else "name"
    return (
        f"{table.name}: no column {column}; the columns are {', '.join(table.columns)}; {hint} the right one with "
        "data.prompt_column"
    )


def csv_delimiter(header: str) -> str:
    """The mark between the columns of a CSV file: the first of `,` `;` tab `|` that its header has outside quotes."""
    unquoted = re.sub(r'"[^"]*"?', "", header)
    return next((mark for mark in DELIMITERS if mark in unquoted), ",")


def _first_columns(path: Path) -> list[str]:
    """The columns of the first row, from the file's start; none where that does not tell."""
    if data_suffix(path) == ".parquet":
        return _parquet_columns(path)
    try:
        with _open_text(path) as file:
            if data_suffix(path) == ".csv":
                return _csv_header(file)[0]
            lines = (line for line in file if not line.isspace())
            first = json.loads(next(lines))
    except (*BROKEN, ValueError, RecursionError, StopIteration, csv.Error):
        return []
    return list(first) if isinstance(first, dict) else []


def _csv_header(file: Any) -> tuple[list[str], str]:
    """The columns of an open CSV file, and its delimiter."""
    first = next((line for line in file if line.strip("\r\n")), "")  # Arrow skips empty lines too
    delimiter = csv_delimiter(first)
    return next(csv.reader(itertools.chain([first], file), delimiter=delimiter), []), delimiter


def _open_text(path: Path) -> io.TextIOWrapper:
    return io.TextIOWrapper(open_bytes(path)[0], encoding="utf-8-sig", newline="")


def _parquet_columns(path: Path) -> list[str]:
    from pyarrow import ArrowException, parquet

    try:
        return list(parquet.read_schema(path).names)
    except (ArrowException, OSError):
        return []


def _read_jsonl(path: Path) -> Table:
    rows: list[Row] = []
    lines: list[int] = []
    with io.TextIOWrapper(open_bytes(path)[0], encoding="utf-8-sig") as file:
        for number, text in enumerate(file, start=1):
            if text.isspace():
                continue
            try:
                row = json.loads(text.rstrip())
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path} line {number}: not valid JSON ({_problem(error)}); fix or remove it") from None
            if not isinstance(row, dict):
                raise DataError(f'{path} line {number}: an object is needed, such as {{"prompt": ...}}')
            rows.append(row)
            lines.append(number)
    return Table(str(path), rows, _columns(rows), lines)


def _read_json(path: Path) -> Table:
    """One list of objects, or an object per line: both are written under either ending."""
    with _open_text(path) as file:
        return _read_json_list(path) if is_json_list(file) else _read_jsonl(path)


def is_json_list(lines: Iterable[str]) -> bool:
    """True for JSON text that opens a list, false for one of objects."""
    return next((line.lstrip()[0] for line in lines if not line.isspace()), "") == "["


def _read_json_list(path: Path) -> Table:
    try:
        rows = json.loads(read_bytes(path).decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not valid JSON ({_problem(error)}); give one list of objects, or one object per line"
        ) from None
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f'{path} row {index}: an object is needed, such as {{"prompt": ...}}')
    return Table(str(path), rows, _columns(rows))


def _read_csv(path: Path) -> Table:
    from pyarrow import ArrowInvalid, py_buffer, string
    from pyarrow import csv as arrow

    wrong: list[Any] = []

    def keep(row: Any) -> str:
        wrong.append(row)
        return "error"

    with _open_text(path) as file:
        header, delimiter = _csv_header(file)
    content = read_bytes(path)
    # Rows have numbers on one thread only, and a row must fit in a block: one block, as far as Arrow allows.
    size = min(max(len(content), 1 << 20), 1 << 30)
    try:
        table = arrow.read_csv(
            py_buffer(content),
            read_options=arrow.ReadOptions(block_size=size, use_threads=False),
            parse_options=arrow.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=keep),
            convert_options=arrow.ConvertOptions(column_types=dict.fromkeys(header, string())),
        )
    except ArrowInvalid as error:
        if "UTF8" in str(error):
            raise DataError(f"{path} line {_line_of_bad_byte(path)}: not text in UTF-8; convert the file") from None
        if wrong and wrong[0].number is not None:
            # Arrow counts from 1, the header too.
            raise DataError(
                f"{path} row {wrong[0].number - 2}: {wrong[0].actual_columns} values, but the header has "
                f"{wrong[0].expected_columns} columns; fix or remove it"
            ) from None
        raise DataError(f"{path}: not valid CSV: {reason(error)}") from None
    return Table(str(path), ArrowRows(table), tuple(table.column_names))


def _read_parquet(path: Path) -> Table:
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: not valid Parquet: {reason(error)}") from None
    return Table(str(path), ArrowRows(table), tuple(table.column_names))


def _line_of_bad_byte(path: Path) -> int:
    content = read_bytes(path)
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return content.count(b"\n", 0, error.start) + 1
    return 1


def _columns(rows: Sequence[Row]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_keys(rows)))


def _keys(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        yield from row


def _problem(error: Exception) -> str:
    """The reason that the text is not JSON, with its place."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}" if error.lineno == 1 else f"{error.msg}, line {error.lineno}"
    return "too deeply nested" if isinstance(error, RecursionError) else "a number with too many digits"
