"""The output's columns: those of the input as they came, then the measures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from vdr_cli.scoring.parts import Layout, encoded
from vdr_cli.scoring.request import (
    BASE_COLUMNS,
    BASE_TOKEN_COLUMNS,
    ENSEMBLE_COLUMNS,
    ENSEMBLE_TOKEN_COLUMNS,
    ScoreRequest,
)
from vdr_cli.scoring.sources import Row, Source, input_schema


def score_columns(request: ScoreRequest) -> tuple[str, ...]:
    """The columns that are added."""
    columns: tuple[str, ...] = BASE_COLUMNS
    if request.disagreement is not None:
        columns += ENSEMBLE_COLUMNS
    if request.tokens:
        columns += BASE_TOKEN_COLUMNS
        if request.disagreement is not None:
            columns += ENSEMBLE_TOKEN_COLUMNS
    return columns


def make_layout(
    request: ScoreRequest, sources: Sequence[Source], rows: Sequence[Row], rewards: Sequence[str] = ()
) -> Layout:
    """rows: those of the first window; a Parquet input says its columns itself. Ours replace any of the same name.

    rewards: columns that rewards add.
    """
    added = (*score_columns(request), *rewards)
    if Path(request.output).suffix.lower() != ".parquet":
        names = [name for name in _names(rows) if name not in added]
        return Layout((*names, *added))
    schema = input_schema(sources) or _inferred(rows)
    fields = [field for field in schema if field.name not in added]
    fields += [pa.field(name, _score_type(name)) for name in added]
    return Layout(tuple(field.name for field in fields), pa.schema(fields))


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows if row.values is not None for name in row.values))


def _inferred(rows: Sequence[Row]) -> pa.Schema:
    """Types of JSON or CSV columns; text where values differ in type or hold objects (written as JSON)."""
    fields = []
    for name in _names(rows):
        values: list[Any] = [encoded(row.values.get(name)) for row in rows if row.values is not None]
        try:
            kind = pa.array(values).type
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            kind = pa.string()
        fields.append(pa.field(name, pa.string() if pa.types.is_null(kind) else kind))
    return pa.schema(fields)


def _score_type(name: str) -> pa.DataType:
    if name == "n_tokens":
        return pa.int64()
    if name == "token_ids":
        return pa.list_(pa.int32())
    return pa.list_(pa.float32()) if name.startswith("token_") else pa.float64()
