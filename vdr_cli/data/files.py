"""Local data files as rows, each with the place an error message can name."""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from vdr_cli.errors import ConfigError, DataError, MachineError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

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
        row: Row = self._table.slice(index, 1).to_pylist()[0]
        return row

    def __iter__(self) -> Iterator[Row]:
        for batch in self._table.to_batches():
            yield from batch.to_pylist()

    def select_columns(self, columns: list[str]) -> ArrowRows:
        """The same rows with only these columns."""
        return ArrowRows(self._table.select(columns))


def read_file(path: Path, text_column: str | None = None) -> Table:
    """A .jsonl, .json, .csv or .parquet file. Raises DataError naming the line or row that cannot be read.

    text_column: of a CSV file, which tells no types: kept as text even where every value looks like a number.
    """
    readers: dict[str, Callable[[Path], Table]] = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": partial(_read_csv, text_column=text_column),
        ".parquet": _read_parquet,
    }
    if path.suffix not in readers:
        raise ConfigError(f"{path}: a data file must end in one of {', '.join(SUFFIXES)}")
    try:
        table = readers[path.suffix](path)
    except PermissionError:
        raise MachineError(f"{path}: no permission to read it") from None
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such data file") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} line {_line_of_bad_byte(path)}: not text in UTF-8; convert the file") from None
    if len(table) == 0:
        raise DataError(f"{path}: no rows")
    twice = next((name for name in table.columns if table.columns.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}: the column {twice} is there more than once; rename one")
    return table


def check_column(path: Path, column: str) -> None:
    """DataError when no row of a file has the column `data.prompt_column`; mostly a look at its start."""
    if column not in _first_columns(path):
        table = read_file(path, column)
        if column not in table.columns:
            raise DataError(no_column(table, column))


def no_column(table: Table, column: str) -> str:
    near = difflib.get_close_matches(column, table.columns, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? Name" if near else "name"
    return (
        f"{table.name}: no column {column}; the columns are {', '.join(table.columns)}; {hint} the right one with "
        "data.prompt_column"
    )


def _first_columns(path: Path) -> list[str]:
    """The columns of the first row, from the file's start; none where that does not tell."""
    if path.suffix == ".parquet":
        return _parquet_columns(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                return next(csv.reader(file), [])
            first = json.loads(next(line for line in file if not line.isspace())) if path.suffix == ".jsonl" else None
    except (OSError, ValueError, RecursionError, StopIteration, csv.Error):
        return []
    return list(first) if isinstance(first, dict) else []


def _parquet_columns(path: Path) -> list[str]:
    from pyarrow import ArrowException, parquet

    try:
        return list(parquet.read_schema(path).names)
    except (ArrowException, OSError):
        return []


def _read_jsonl(path: Path) -> Table:
    rows: list[Row] = []
    lines: list[int] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, text in enumerate(file, start=1):
            if text.isspace():
                continue
            try:
                row = json.loads(text.rstrip())
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path} line {number}: not valid JSON ({_reason(error)}); mend or remove it") from None
            if not isinstance(row, dict):
                raise DataError(f'{path} line {number}: an object is needed, such as {{"prompt": ...}}')
            rows.append(row)
            lines.append(number)
    return Table(str(path), rows, _columns(rows), lines)


def _read_json(path: Path) -> Table:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not valid JSON ({_reason(error)}); a .json file holds one list of objects, "
            "a file with an object a line ends in .jsonl"
        ) from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: a list of objects is needed")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f'{path} row {index}: an object is needed, such as {{"prompt": ...}}')
    return Table(str(path), rows, _columns(rows))


def _read_csv(path: Path, text_column: str | None) -> Table:
    from pyarrow import ArrowInvalid, string
    from pyarrow import csv as arrow

    wrong: list[Any] = []

    def keep(row: Any) -> str:
        wrong.append(row)
        return "error"

    # Rows have numbers on one thread only. A row must fit in a block, and a column's type is inferred from the first:
    # one block, as far as Arrow allows.
    size = min(max(path.stat().st_size, 1 << 20), 1 << 30)
    try:
        table = arrow.read_csv(
            path,
            read_options=arrow.ReadOptions(block_size=size, use_threads=False),
            parse_options=arrow.ParseOptions(newlines_in_values=True, invalid_row_handler=keep),
            convert_options=arrow.ConvertOptions(column_types={text_column: string()} if text_column else None),
        )
    except ArrowInvalid as error:
        if "UTF8" in str(error):
            raise DataError(f"{path} line {_line_of_bad_byte(path)}: not text in UTF-8; convert the file") from None
        if wrong and wrong[0].number is not None:
            # Arrow counts from 1, the header too.
            raise DataError(
                f"{path} row {wrong[0].number - 2}: {wrong[0].actual_columns} values, but the header has "
                f"{wrong[0].expected_columns} columns; mend or remove it"
            ) from None
        raise DataError(f"{path}: not valid CSV: {_first_line(error)}") from None
    return Table(str(path), ArrowRows(table), tuple(table.column_names))


def _read_parquet(path: Path) -> Table:
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: not valid Parquet: {_first_line(error)}") from None
    return Table(str(path), ArrowRows(table), tuple(table.column_names))


def _line_of_bad_byte(path: Path) -> int:
    content = path.read_bytes()
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


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}" if error.lineno == 1 else f"{error.msg}, line {error.lineno}"
    return "too deeply nested" if isinstance(error, RecursionError) else "a number with too many digits"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
