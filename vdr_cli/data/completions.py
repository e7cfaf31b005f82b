"""Saved completions: completions/step_000010.parquet, a row per completion. `vdr score` reads these files directly.

Columns: step, row (dataset row), group (of the step), prompt, completion, prompt_ids, completion_ids, reward,
rewards/<name>, bonus, advantage, truncated, the measures (bald, ...), and what the caller adds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vdr_cli.errors import DataError, MachineError
from vdr_cli.system.files import replacing
from vdr_cli.system.text import storable

_INTEGER_LISTS = ("prompt_ids", "completion_ids")
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def completions_path(directory: str | Path, step: int) -> Path:
    return Path(directory) / f"step_{step:06d}.parquet"


def write_completions(directory: str | Path, step: int, rows: Mapping[str, Sequence[Any]]) -> Path:
    """Write one step's completions, whole or not at all.

    rows: columns of equal length, at least prompt and completion; `step` is added.
    """
    count = len(next(iter(rows.values()), ()))
    return write_columns(completions_path(directory, step), {"step": [step] * count, **rows})


def write_columns(path: Path, columns: Mapping[str, Sequence[Any]]) -> Path:
    """Columns of equal length as a Parquet file, whole or not at all."""
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns of unequal length: {lengths}")
    return write_table(path, pa.table({name: _column(name, values) for name, values in columns.items()}))


def write_table(path: Path, table: pa.Table) -> Path:
    """A Parquet file, whole or not at all. Raises MachineError when it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            pq.write_table(table, partial, compression="zstd")
    except OSError as error:
        raise MachineError(f"{path}: completions cannot be written: {error.strerror or error}") from error
    return path


def completion_files(directory: str | Path) -> list[Path]:
    """The step files of a run directory or of its completions/ folder, by step."""
    folder = Path(directory)
    if (folder / "completions").is_dir():
        folder = folder / "completions"
    return list(numbered_files(folder, "step").values())


def numbered_files(folder: Path, kind: str) -> dict[int, Path]:
    """The files KIND_<number>.parquet in order, by number. Copies that somebody made under other names are left out."""
    named = {path.stem.removeprefix(f"{kind}_"): path for path in folder.glob(f"{kind}_*.parquet")}
    return dict(sorted((int(number), path) for number, path in named.items() if number.isdecimal()))


def remove_after(directory: str | Path, step: int) -> None:
    """Delete the files of later steps: a resumed run writes them again."""
    for number, path in numbered_files(Path(directory) / "completions", "step").items():
        if number > step:
            path.unlink()


def read_completions(path: str | Path) -> dict[str, list[Any]]:
    """The columns of one step file."""
    try:
        return pq.read_table(path).to_pydict()
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a Parquet file of completions: {error}") from error


def _column(name: str, values: Sequence[Any]) -> pa.Array:
    listed = [value.tolist() if hasattr(value, "tolist") else value for value in values]
    if name in _INTEGER_LISTS:
        return pa.array(listed, pa.list_(pa.int32()))
    if name in ("prompt", "completion") and any(_is_messages(value) for value in listed):
        return pa.array([_messages(value) for value in listed], _MESSAGES)
    if any(isinstance(value, str) for value in listed):
        return pa.array([value if value is None else storable(str(value)) for value in listed], pa.string())
    try:
        return pa.array(listed)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # a dataset column of mixed types
        return pa.array([json.dumps(value, default=str) for value in listed], pa.string())


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(message, dict) for message in value)


def _messages(value: Any) -> list[dict[str, str]]:
    messages = value if _is_messages(value) else [{"role": "user", "content": str(value)}]
    return [
        {"role": str(message.get("role", "")), "content": storable(_content(message.get("content")))}
        for message in messages
    ]


def _content(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content, default=str)
