from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from vdr_cli.data.completions import completion_files, read_completions, remove_after, write_completions
from vdr_cli.errors import DataError

ROWS = {
    "row": [4, 4],
    "group": [0, 0],
    "prompt": ["1 2 3 → 6", "1 2 3 → 6"],
    "completion": ["1+2+3", "\ud83d\x00<script>"],
    "prompt_ids": [[1, 2], [1, 2]],
    "completion_ids": [torch.tensor([3, 4]), torch.tensor([], dtype=torch.int64)],
    "reward": [1.0, float("nan")],
    "rewards/countdown": [1.0, None],
    "truncated": torch.tensor([False, True]),
}


def test_round_trip(tmp_path: Path) -> None:
    path = write_completions(tmp_path / "completions", 10, ROWS)
    assert path.name == "step_000010.parquet"
    read = read_completions(path)
    assert read["step"] == [10, 10]
    assert read["completion"] == ["1+2+3", "\ufffd\x00<script>"]
    assert read["completion_ids"] == [[3, 4], []]
    assert read["rewards/countdown"] == [1.0, None]
    assert read["truncated"] == [False, True]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_chat_prompts_keep_their_messages(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hello"}]
    path = write_completions(tmp_path, 1, {"prompt": [messages, "plain"], "completion": ["a", "b"]})
    assert read_completions(path)["prompt"] == [messages, [{"role": "user", "content": "plain"}]]


def test_a_column_of_mixed_types_becomes_json(tmp_path: Path) -> None:
    path = write_completions(tmp_path, 1, {"prompt": ["a", "b"], "completion": ["a", "b"], "extra": [1, {"x": [2]}]})
    assert read_completions(path)["extra"] == ["1", '{"x": [2]}']


def test_columns_of_unequal_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unequal"):
        write_completions(tmp_path, 1, {"prompt": ["a"], "completion": ["a", "b"]})
    assert list(tmp_path.iterdir()) == []


def test_files_by_step_and_removal_on_resume(tmp_path: Path) -> None:
    for step in (20, 10, 5):
        write_completions(tmp_path / "completions", step, ROWS)
    assert [int(path.stem[5:]) for path in completion_files(tmp_path)] == [5, 10, 20]
    write_completions(tmp_path / "completions", 1_000_000, ROWS)
    copy = tmp_path / "completions" / "step_000020 (copy).parquet"
    copy.write_bytes(b"of a user")
    assert [int(path.stem[5:]) for path in completion_files(tmp_path)] == [5, 10, 20, 1_000_000]
    remove_after(tmp_path, 10)
    assert [int(path.stem[5:]) for path in completion_files(tmp_path / "completions")] == [5, 10]
    assert copy.exists()


def test_a_file_that_is_not_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "step_000001.parquet").write_text("no")
    with pytest.raises(DataError, match="step_000001"):
        read_completions(tmp_path / "step_000001.parquet")


def test_types_are_compact(tmp_path: Path) -> None:
    schema = pq.read_schema(write_completions(tmp_path, 1, ROWS))
    assert str(schema.field("prompt_ids").type) == "list<element: int32>"
