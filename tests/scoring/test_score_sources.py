import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vdr_cli.errors import ConfigError, DataError
from vdr_cli.scoring import sources
from vdr_cli.scoring.parts import Layout, Parts
from vdr_cli.scoring.sources import Source, Windows, find_sources, first_rows, input_schema

ROWS = [{"prompt": f"p{index}", "completion": f"c{index}"} for index in range(10)]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "WINDOW_ROWS", 4)


def save(path: Path, rows: list[dict[str, str]] = ROWS) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    elif path.suffix == ".csv":
        path.write_text("prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_windows_are_fixed_stretches_of_rows(tmp_path: Path, suffix: str) -> None:
    found = find_sources([str(save(tmp_path / f"a{suffix}"))], tmp_path / "spool")
    windows = Windows(found, lambda index: True)
    seen = list(windows)
    assert [(window.index, [row.values for row in window.rows]) for window in seen] == [
        (0, ROWS[:4]),
        (1, ROWS[4:8]),
        (2, ROWS[8:]),
    ]
    assert windows.count == 3
    assert [window.fraction for window in seen] == sorted(window.fraction for window in seen)
    assert seen[-1].fraction == 1.0
    assert first_rows(found) == seen[0].rows


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_wanted_windows_only_and_the_same_ones_whoever_asks(tmp_path: Path, suffix: str) -> None:
    found = find_sources([str(save(tmp_path / f"a{suffix}")), str(save(tmp_path / f"b{suffix}"))], tmp_path / "spool")
    shares = [Windows(found, lambda index, rank=rank: index % 3 == rank) for rank in range(3)]
    windows = sorted((window.index, window.rows) for share in shares for window in share)
    assert [row.values for _, rows in windows for row in rows] == ROWS * 2
    assert {share.count for share in shares} == {5}


@pytest.mark.parametrize(("ending", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_compressed_files_and_other_delimiters_are_read(
    tmp_path: Path, suffix: str, ending: str, compress: Any
) -> None:
    content = save(tmp_path / f"a{suffix}").read_bytes().replace(b"prompt,", b"prompt;").replace(b",c", b";c")
    content = content if suffix == ".csv" else content.replace(b";c", b",c")
    file = tmp_path / f"b{suffix}.{ending}"
    file.write_bytes(compress(content))
    windows = list(Windows(find_sources([str(file)], tmp_path / "spool"), lambda index: True))
    assert [row.values for window in windows for row in window.rows] == ROWS
    assert windows[-1].fraction == 1.0
    file.write_bytes(compress(content * 50)[:-9])
    with pytest.raises(DataError, match="cannot be decompressed"):
        list(Windows(find_sources([str(file)], tmp_path / "spool"), lambda index: True))


def test_rows_know_their_place_and_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n\nrubbish\n[1]\n"\xff"\n')
    rows = first_rows([Source(str(path), "jsonl")])
    assert [(row.number, row.error is None) for row in rows] == [(1, True), (3, False), (4, False), (5, False)]
    assert rows[1].place == f"{path} line 3"
    assert rows[2].error == "a JSON array among objects: give one object per line"
    assert rows[3].error is not None
    for text, message in (
        ('{\n "prompt": "a"\n}', "JSON over several lines"),
        ('{"prompt": "a"}'.encode("utf-16"), "utf-8"),
    ):
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        assert message in str(first_rows([Source(str(path), "jsonl")])[0].error)
    csv_path = tmp_path / "bad.csv"
    csv_path.write_text('prompt,completion\n"two\nlines",b\nonly\n')
    good, bad = first_rows([Source(str(csv_path), "csv")])
    assert good.values == {"prompt": "two\nlines", "completion": "b"}
    assert (bad.place, bad.error) == (f"{csv_path} line 4", "1 cells, the header has 2")
    pq_rows = first_rows([Source(str(save(tmp_path / "a.parquet")), "parquet")])
    assert pq_rows[0].place == f"{tmp_path / 'a.parquet'} row 0"


def test_inputs_that_hold_no_rows_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"saved by save_to_disk; write it with Dataset\.to_parquet"):
        find_sources([str(tmp_path)], tmp_path / "spool")
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ConfigError, match=r"- \(stdin\) is closed"):
        find_sources(["-"], tmp_path / "spool")


def test_globs_run_directories_and_what_is_not_there(tmp_path: Path) -> None:
    completions = tmp_path / "run" / "completions"
    completions.mkdir(parents=True)
    for step in (20, 10):
        save(completions / f"step_{step:06d}.parquet")
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    spool = tmp_path / "spool"
    names = [Path(source.path).name for source in find_sources([str(tmp_path / "run")], spool)]
    assert names == ["step_000010.parquet", "step_000020.parquet"]
    assert len(find_sources([str(completions / "*10.parquet")], spool)) == 1
    with pytest.raises(ConfigError, match="nothing matches"):
        find_sources([str(tmp_path / "no*.jsonl")], spool)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ConfigError, match=r"unknown format '\.txt'"):
        find_sources([str(tmp_path / "a.txt")], spool)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no completions"):
        find_sources([str(tmp_path / "empty")], spool)


def test_broken_and_empty_files(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(DataError, match="not a readable Parquet"):
        first_rows([Source(str(tmp_path / "a.parquet"), "parquet")])
    for suffix in ("jsonl", "csv"):
        (tmp_path / f"e.{suffix}").write_text("")
        with pytest.raises(DataError, match="no rows"):
            first_rows([Source(str(tmp_path / f"e.{suffix}"), suffix)])


def test_a_parquet_file_with_damaged_rows_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = pa.table({"prompt": [f"{number * 7919 % 1000}" for number in range(1000)]})
    pq.write_table(rows, path, use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[200:400] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet: not a readable Parquet file"):
        list(Windows([Source(str(path), "parquet")], lambda index: True))


def test_a_column_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion,prompt\na,b,c\n")
    pq.write_table(pa.table([["a"], ["b"]], names=["prompt", "prompt"]), tmp_path / "a.parquet")
    for kind in ("csv", "parquet"):
        with pytest.raises(DataError, match=rf"a\.{kind}: the column prompt appears more than once; rename one"):
            first_rows([Source(str(tmp_path / f"a.{kind}"), kind)])


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_scores_in_a_directory_are_no_input_of_the_next_scoring(tmp_path: Path, kind: str) -> None:
    save(tmp_path / "a.jsonl")
    parts = Parts(str(tmp_path / f"scores.{kind}"), {})
    layout = Layout(("prompt",), pa.schema([("prompt", pa.string())]))
    parts.begin()
    parts.write(0, [{"prompt": "a"}], {}, layout)
    parts.join(1, layout, {})
    found = find_sources([str(tmp_path)], tmp_path / "spool")
    assert [Path(source.path).name for source in found] == ["a.jsonl"]


@pytest.mark.parametrize("name", ["~nobody-of-this-name/a.jsonl", "a\nb.jsonl", "x" * 300])
def test_names_that_no_file_can_have_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="FILE"):
        find_sources([name], tmp_path / "spool")


def test_schema_of_parquet_inputs(tmp_path: Path) -> None:
    first = save(tmp_path / "a.parquet")
    pq.write_table(pa.table({"prompt": [1]}), tmp_path / "b.parquet")
    assert input_schema([Source(str(first), "parquet")]).names == ["prompt", "completion"]  # type: ignore[union-attr]
    assert input_schema([Source(str(save(tmp_path / "a.jsonl")), "jsonl")]) is None
    with pytest.raises(DataError, match="different columns"):
        input_schema([Source(str(first), "parquet"), Source(str(tmp_path / "b.parquet"), "parquet")])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[" * 100_000, "nested too deep"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'[{"prompt": "a", "completion": "b"}', "give one list of objects, or one object per line"),
        (b"[3]", "not a JSON object"),
        (b'{"prompt": "caf\xe9"}', "not valid JSON"),
    ],
)
def test_lines_that_only_look_like_rows(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(line + b"\n")
    (row,) = first_rows([Source(str(path), "jsonl")])
    assert row.error is not None
    assert message in row.error


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_list_of_objects_is_read_under_either_ending(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("\ufeff" + json.dumps(ROWS, indent=1))
    windows = Windows(find_sources([str(tmp_path / name)], tmp_path / "spool"), lambda index: True)
    rows = [row for window in windows for row in window.rows]
    assert [row.values for row in rows] == ROWS
    assert rows[1].place == f"{tmp_path / name} row 1"


def test_cells_that_python_lacks_come_as_text_or_bytes(tmp_path: Path) -> None:
    """A column that nobody asked for must not end the scoring."""
    broken = pa.array([b"a", b"\xff"]).cast(pa.string(), safe=False)
    when = pa.array([0, 2**62], pa.timestamp("us"))
    pq.write_table(pa.table({"prompt": ["a", "b"], "when": when, "text": broken}), tmp_path / "a.parquet")
    values = [row.values for row in first_rows([Source(str(tmp_path / "a.parquet"), "parquet")])]
    assert [row["prompt"] for row in values if row] == ["a", "b"]
    assert values[1] is not None and values[1]["text"] == b"\xff" and "out of range" in values[1]["when"]


def test_a_csv_as_spreadsheets_write_it(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfprompt,completion\r\na,b\r\ncaf\xe9,c\r\n")
    good, bad = first_rows([Source(str(path), "csv")])
    assert good.values == {"prompt": "a", "completion": "b"}
    assert bad.error == "not valid UTF-8"
    path.write_bytes(b"\r\n\r\nprompt;completion\r\na;b\r\nc\r\n")
    good, bad = first_rows([Source(str(path), "csv")])
    assert good.values == {"prompt": "a", "completion": "b"} and good.place.endswith("line 4")
    assert bad.error == "1 cells, the header has 2"


def test_the_folder_of_lm_evaluation_harness_has_results_that_are_no_rows(tmp_path: Path) -> None:
    save(tmp_path / "samples_gsm8k_2026.jsonl")
    (tmp_path / "results_2026.json").write_text('{\n "a": 1\n}')
    assert [Path(source.path).name for source in find_sources([str(tmp_path)], tmp_path / "spool")] == [
        "samples_gsm8k_2026.jsonl"
    ]


def test_the_output_path_of_lm_eval_holds_a_folder_for_each_model(tmp_path: Path) -> None:
    for model in ("one", "two"):
        (tmp_path / "out" / model).mkdir(parents=True)
        (tmp_path / "out" / model / "samples_sums_2026.jsonl").write_text("{}\n")
        (tmp_path / "out" / model / "results_2026.json").write_text("{}")
        if model == "one":
            (found,) = find_sources([str(tmp_path / "out")], tmp_path / "spool")
            assert found.path.endswith("one/samples_sums_2026.jsonl")
    with pytest.raises(ConfigError, match=r"logs of several models \(one, two\): give one of them"):
        find_sources([str(tmp_path / "out")], tmp_path / "spool")
