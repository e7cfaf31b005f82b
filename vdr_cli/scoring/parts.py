"""Output that survives a kill: every window is a file of its own, whole or absent; the last act joins them in order.

OUT.parts/ holds request.json (what is being scored, and how) and part-00000007.<suffix> for window 7. A restart
computes the windows that are missing. When all are there they are joined, and the whole replaces OUT.
"""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vdr_cli.errors import ConfigError, DataError, MachineError
from vdr_cli.system.files import replacing, write_whole
from vdr_cli.system.text import storable

SUFFIXES = (".parquet", ".jsonl", ".csv")
METADATA_KEY = b"vdr"
ROW_GROUP = 65_536


@dataclass(frozen=True)
class Layout:
    """The output's columns: those of the input, then ours; Arrow types when the output is Parquet."""

    names: tuple[str, ...]
    schema: pa.Schema | None = None


class Parts:
    """The unfinished output. Every rank may write parts; rank 0 begins and joins."""

    def __init__(self, output: str, request: dict[str, Any]) -> None:
        self.output = Path(output)
        self.suffix = self.output.suffix.lower()
        if self.suffix not in SUFFIXES:
            raise ConfigError(f"-o {output}: unknown format {self.suffix!r}: give one of {', '.join(SUFFIXES)}")
        self.folder = self.output.with_name(self.output.name + ".parts")
        self.request = request
        self._record = self.folder / "request.json"

    def finished(self) -> dict[str, Any] | None:
        """The summary of the output when it is there, whole, and the answer to this very request."""
        metadata = read_metadata(self.output) if self.output.exists() and not self.folder.exists() else None
        return metadata["summary"] if metadata is not None and metadata.get("request") == self.request else None

    def check(self, resume: bool) -> None:
        """ConfigError when unfinished work lies in the folder that this request may not go on with."""
        if not self._record.exists() or not any(self.folder.glob("part-*")):
            return
        before = json.loads(self._record.read_text(encoding="utf-8"))
        changed = sorted(key for key in {*before, *self.request} if before.get(key) != self.request.get(key))
        if not resume:
            raise ConfigError(f"{self.folder}: unfinished work is here: add --resume to continue, or remove the folder")
        if changed:
            raise ConfigError(
                f"{self.folder}: cannot resume, {', '.join(changed)} changed since: give the same arguments, "
                "or remove the folder to start over"
            )

    def begin(self) -> None:
        """Make the folder; what an earlier start of the same request finished stays."""
        try:
            if not self._record.exists():
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir(parents=True)
            write_whole(self._record, json.dumps(self.request, indent=1))
        except OSError as error:
            raise MachineError(f"{self.folder}: cannot be written ({error.strerror})") from error

    def leave(self) -> None:
        """After an error: finished windows stay for --resume; where there is none the folder goes."""
        if not [path for path in self.folder.glob("*") if path != self._record]:
            shutil.rmtree(self.folder, ignore_errors=True)

    def has(self, window: int) -> bool:
        return self._path(window).exists()

    def write(self, window: int, rows: Sequence[dict[str, Any]], note: dict[str, Any], layout: Layout) -> None:
        """Save one window's output rows and the note about it (counts of what was skipped)."""
        try:
            write_whole(self._path(window, ".note"), json.dumps(note))
            with replacing(self._path(window)) as partial:
                _writers[self.suffix](partial, rows, layout)
        except OSError as error:
            raise MachineError(f"{self.folder}: cannot be written ({error.strerror})") from error

    def notes(self, windows: int) -> list[dict[str, Any]]:
        """The note of every window. MachineError when another host wrote its parts where this one cannot see them."""
        missing = next((window for window in range(windows) if not self.has(window)), None)
        if missing is not None:
            raise MachineError(
                f"{self._path(missing)} is not here: every host must see {self.folder.parent} as the same directory; "
                "put -o on a shared file system"
            )
        return [json.loads(self._path(window, ".note").read_text(encoding="utf-8")) for window in range(windows)]

    def join(self, windows: int, layout: Layout, summary: dict[str, Any]) -> None:
        """All parts in order become the output, in one replacement; then the folder goes."""
        metadata = json.dumps({"request": self.request, "summary": summary})
        try:
            with replacing(self.output) as partial:
                _joiners[self.suffix](partial, [self._path(window) for window in range(windows)], layout, metadata)
                if self.suffix != ".parquet":
                    write_whole(metadata_path(self.output), metadata)
            self._record.unlink()
            shutil.rmtree(self.folder)
        except OSError as error:
            raise MachineError(f"{self.output}: cannot be written ({error.strerror})") from error

    def _path(self, window: int, suffix: str | None = None) -> Path:
        return self.folder / f"part-{window:08d}{suffix or self.suffix}"


def metadata_path(output: Path) -> Path:
    return output.with_name(output.name + ".meta.json")


def read_metadata(output: Path) -> dict[str, Any] | None:
    """The making of a scored file, kept inside a Parquet file, beside another."""
    try:
        if output.suffix.lower() == ".parquet":
            text: str | bytes = (pq.read_schema(output).metadata or {})[METADATA_KEY]
        else:
            text = metadata_path(output).read_text(encoding="utf-8")
        loaded = json.loads(text)
    except (OSError, KeyError, ValueError, pa.ArrowException):
        return None
    return loaded if isinstance(loaded, dict) else None


def plain(value: Any) -> Any:
    """The value as JSON can hold it: no NaN, valid UTF-8."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {storable(str(key)): plain(item) for key, item in value.items()}
    return value


def _write_jsonl(path: Path, rows: Sequence[dict[str, Any]], layout: Layout) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(plain(row), ensure_ascii=False, default=str) + "\n")


def _write_csv(path: Path, rows: Sequence[dict[str, Any]], layout: Layout) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        for row in rows:
            unknown = [name for name in row if name not in layout.names]
            if unknown:
                raise DataError(_new_column(unknown[0]))
            writer.writerow([_cell(row.get(name)) for name in layout.names])


def _cell(value: Any) -> Any:
    value = plain(value)
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else value


def _write_parquet(path: Path, rows: Sequence[dict[str, Any]], layout: Layout) -> None:
    assert layout.schema is not None
    known = set(layout.names)
    for row in rows:
        if not row.keys() <= known:
            raise DataError(_new_column(next(name for name in row if name not in known)))
    columns = []
    for field in layout.schema:
        values = [_stored(row.get(field.name), field.type) for row in rows]
        if (key := next(filter(None, (_lost_key(value, field.type) for value in values)), None)) is not None:
            raise DataError(
                f"column {field.name!r} has the key {key!r}, which the first rows lack: write JSONL instead "
                "(-o OUT.jsonl)"
            )
        try:
            columns.append(pa.array(values, field.type))
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise DataError(
                f"column {field.name!r} was {field.type} in the first rows and is not always ({error}): "
                "write JSONL instead (-o OUT.jsonl)"
            ) from error
    pq.write_table(pa.table(columns, schema=layout.schema), path, compression="zstd")


def _lost_key(value: Any, kind: pa.DataType) -> str | None:
    """A key that the type lacks and whose value Arrow would drop in silence; None when all is kept."""
    if isinstance(value, list) and _is_list(kind) and pa.types.is_nested(kind.value_type):
        return next(filter(None, (_lost_key(item, kind.value_type) for item in value)), None)
    if isinstance(value, dict) and pa.types.is_struct(kind):
        types = {field.name: field.type for field in kind}
        return next(
            (key for key, item in value.items() if item is not None and key not in types),
            next(filter(None, (_lost_key(value.get(key), inner) for key, inner in types.items())), None),
        )
    return None


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def encoded(value: Any) -> Any:
    """Objects as JSON text (Parquet would drop keys it did not see before); chat messages stay as they are."""
    if isinstance(value, dict) or (isinstance(value, list) and not _is_flat(value)):
        return json.dumps(plain(value), ensure_ascii=False, default=str)
    return storable(value) if isinstance(value, str) else value


def _is_flat(value: list[Any]) -> bool:
    return all(
        not isinstance(item, list | dict)
        or (isinstance(item, dict) and item.keys() == {"role", "content"} and isinstance(item["content"], str))
        for item in value
    )


def _stored(value: Any, kind: pa.DataType) -> Any:
    if isinstance(value, str):
        return storable(value)
    if pa.types.is_string(kind) and value is not None:
        return json.dumps(plain(value), ensure_ascii=False, default=str)
    return value


def _new_column(name: str) -> str:
    return f"column {name!r} is not in the first rows: write JSONL, which takes any columns (-o OUT.jsonl)"


def _join_csv(path: Path, parts: Sequence[Path], layout: Layout, metadata: str) -> None:
    header = io.StringIO(newline="")
    csv.writer(header).writerow(layout.names)
    _join_bytes(path, parts, layout, metadata, header.getvalue().encode())


def _join_bytes(path: Path, parts: Sequence[Path], layout: Layout, metadata: str, header: bytes = b"") -> None:
    with path.open("wb") as whole:
        whole.write(header)
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, whole, 1 << 20)


def _join_parquet(path: Path, parts: Sequence[Path], layout: Layout, metadata: str) -> None:
    assert layout.schema is not None
    schema = layout.schema.with_metadata({METADATA_KEY: metadata.encode()})
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        waiting: list[pa.Table] = []
        for part in parts:
            waiting.append(pq.read_table(part).replace_schema_metadata(schema.metadata))
            if sum(table.num_rows for table in waiting) >= ROW_GROUP:
                writer.write_table(pa.concat_tables(waiting))
                waiting.clear()
        if waiting:
            writer.write_table(pa.concat_tables(waiting))


_writers = {".jsonl": _write_jsonl, ".csv": _write_csv, ".parquet": _write_parquet}
_joiners = {".jsonl": _join_bytes, ".csv": _join_csv, ".parquet": _join_parquet}
