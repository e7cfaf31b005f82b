"""The output's columns and their types: the input's own, then the measures."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from vdr_cli.scoring.layout import make_layout, score_columns
from vdr_cli.scoring.request import BASE_COLUMNS, ENSEMBLE_COLUMNS, ENSEMBLE_TOKEN_COLUMNS, ScoreRequest
from vdr_cli.scoring.sources import Row, Source


def request(output: str = "o.parquet", **more: Any) -> ScoreRequest:
    return ScoreRequest(("in.jsonl",), "starter", output, **more)


def rows(*values: dict[str, Any] | None) -> list[Row]:
    return [Row("in.jsonl", number, given) for number, given in enumerate(values)]


def test_columns_are_those_that_were_asked_for() -> None:
    assert score_columns(request(disagreement=None)) == BASE_COLUMNS
    assert score_columns(request()) == (*BASE_COLUMNS, *ENSEMBLE_COLUMNS)
    assert set(ENSEMBLE_TOKEN_COLUMNS) <= set(score_columns(request(tokens=True)))
    without = score_columns(request(tokens=True, disagreement=None))
    assert "token_logp" in without and "token_bald" not in without


@pytest.mark.parametrize("output", ["o.jsonl", "o.csv"])
def test_a_text_output_needs_names_only(output: str) -> None:
    given = rows({"id": 1, "nll_mean": "the user's"}, None, {"note": "x"})
    layout = make_layout(request(output, disagreement=None), [], given)
    assert layout.schema is None
    assert layout.names == ("id", "note", *BASE_COLUMNS), "a column of the input with one of our names gives way"


def test_types_are_those_of_the_first_rows() -> None:
    given = rows({"id": 1, "mixed": 1, "object": {"a": 1}, "empty": None}, {"id": 2, "mixed": "x", "empty": None})
    schema = make_layout(request(tokens=True), [Source("in.jsonl", "jsonl")], given).schema
    assert schema is not None
    kinds = {field.name: field.type for field in schema}
    assert kinds["id"] == pa.int64() and kinds["mixed"] == kinds["object"] == kinds["empty"] == pa.string()
    assert kinds["n_tokens"] == pa.int64() and kinds["bald_mean"] == pa.float64()
    assert kinds["token_ids"] == pa.list_(pa.int32()) and kinds["token_bald"] == pa.list_(pa.float32())
