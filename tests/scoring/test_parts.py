"""Windows of an output: whole or absent, joined in order, resumed only by the same request."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vdr_cli.errors import ConfigError, DataError, MachineError
from vdr_cli.scoring.parts import Layout, Parts, encoded, metadata_path, plain, read_metadata

REQUEST = {"model": "starter", "seed": 0}
WINDOWS = [[{"id": 0, "nll": 1.5}, {"id": 1, "nll": float("nan")}], [{"id": 2, "nll": -2.0}]]
LAYOUT = Layout(("id", "nll"), pa.schema([("id", pa.int64()), ("nll", pa.float64())]))


def written(output: Path) -> Parts:
    parts = Parts(str(output), REQUEST)
    parts.check(resume=False)
    parts.begin()
    for window in (1, 0):  # ranks finish in any order
        parts.write(window, WINDOWS[window], {"skipped": window}, LAYOUT)
    return parts


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_windows_are_joined_in_order(suffix: str, tmp_path: Path) -> None:
    output = tmp_path / f"scores{suffix}"
    parts = written(output)
    assert parts.has(0) and not parts.has(2) and not output.exists()
    assert parts.notes(2) == [{"skipped": 0}, {"skipped": 1}]
    assert parts.finished() is None
    parts.join(2, LAYOUT, {"rows": 3})
    if suffix == ".jsonl":
        rows = [json.loads(line) for line in output.read_text().splitlines()]
    elif suffix == ".csv":
        rows = list(csv.DictReader(output.open()))
    else:
        rows = pq.read_table(output).to_pylist()
    assert [int(row["id"]) for row in rows] == [0, 1, 2]
    assert rows[1]["nll"] in (None, "") or rows[1]["nll"] != rows[1]["nll"], "NaN is missing, or NaN in Parquet"
    assert parts.finished() == {"rows": 3}
    assert read_metadata(output) == {"request": REQUEST, "summary": {"rows": 3}}
    assert metadata_path(output).exists() == (suffix != ".parquet")
    left = {path.name for path in tmp_path.iterdir()} - {output.name, metadata_path(output).name}
    assert left == set(), "the folder of parts and every temporary file are gone"
    assert Parts(str(output), {**REQUEST, "seed": 1}).finished() is None, "another request's answer"


def test_unfinished_work_is_kept_for_the_same_request_alone(tmp_path: Path) -> None:
    output = tmp_path / "scores.jsonl"
    written(output)
    with pytest.raises(ConfigError, match="unfinished work is here: add --resume"):
        Parts(str(output), REQUEST).check(resume=False)
    with pytest.raises(ConfigError, match="cannot resume, seed changed since"):
        Parts(str(output), {**REQUEST, "seed": 1}).check(resume=True)
    again = Parts(str(output), REQUEST)
    again.check(resume=True)
    again.begin()
    assert again.has(0) and again.has(1)
    again.leave()
    assert again.has(0), "finished windows stay after an error"


def test_a_request_that_finished_no_window_leaves_nothing(tmp_path: Path) -> None:
    parts = Parts(str(tmp_path / "scores.jsonl"), REQUEST)
    parts.begin()
    parts.leave()
    assert list(tmp_path.iterdir()) == []


def test_a_window_that_this_host_cannot_see_is_named(tmp_path: Path) -> None:
    parts = written(tmp_path / "scores.jsonl")
    with pytest.raises(MachineError, match=r"part-00000002.jsonl is not here: every host must see"):
        parts.notes(3)


def test_unknown_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown format '.txt'"):
        Parts(str(tmp_path / "scores.txt"), REQUEST)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_column_that_the_first_rows_did_not_have_is_refused(suffix: str, tmp_path: Path) -> None:
    parts = Parts(str(tmp_path / f"scores{suffix}"), REQUEST)
    parts.begin()
    with pytest.raises(DataError, match="column 'late' is not in the first rows: write JSONL"):
        parts.write(0, [{"id": 0, "late": 1}], {}, LAYOUT)
    assert not parts.has(0)


def test_a_value_of_another_type_is_refused(tmp_path: Path) -> None:
    parts = Parts(str(tmp_path / "scores.parquet"), REQUEST)
    parts.begin()
    with pytest.raises(DataError, match="column 'id' was int64 in the first rows"):
        parts.write(0, [{"id": "seven", "nll": 0.0}], {}, LAYOUT)


def test_a_key_that_the_first_messages_did_not_have_is_refused_and_a_null_one_is_not(tmp_path: Path) -> None:
    said = {"role": "assistant", "content": "hi"}
    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    layout = Layout(("messages", "nested"), pa.schema([("messages", messages), ("nested", pa.list_(messages))]))
    parts = Parts(str(tmp_path / "scores.parquet"), REQUEST)
    parts.begin()
    parts.write(0, [{"messages": [said, {**said, "tool_calls": None}]}], {}, layout)
    for row in ({"messages": [said, {**said, "tool_calls": [1]}]}, {"nested": [[said], [{**said, "tool_calls": [1]}]]}):
        with pytest.raises(
            DataError, match=r"has the key 'tool_calls', which the first rows lack: write JSONL instead"
        ):
            parts.write(1, [{"messages": [said]}, row], {}, layout)
    assert not parts.has(1)


def test_plain_values_are_what_json_can_hold() -> None:
    given = {"a": [float("inf"), 1.0, {"b": float("nan")}], 3: "x\ud800"}
    made = plain(given)
    assert made["a"] == [None, 1.0, {"b": None}]
    assert json.loads(json.dumps(made, allow_nan=False)).keys() == {"a", "3"}
    made["3"].encode()  # a lone surrogate is no UTF-8


def test_objects_become_text_and_chat_messages_stay() -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert encoded(messages) is messages
    assert encoded({"a": 1}) == '{"a": 1}' and encoded([{"a": 1}]) == '[{"a": 1}]'
    assert encoded([1, 2]) == [1, 2] and encoded(None) is None
