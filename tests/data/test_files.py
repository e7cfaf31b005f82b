"""Files of rows: JSON, CSV, Parquet, compressed ones; their columns, and what a bad file prints."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.conftest import ROWS, load, text
from vdr_cli.data.files import check_column
from vdr_cli.errors import DataError


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_a_files_column_is_looked_for_at_its_start(tmp_path, name):
    file, rows = tmp_path / name, [{"qestion": "a", "x": "1"}, {"qestion": "b", "x": "2"}]
    written = {
        ".jsonl": lambda: file.write_text("\n" + "\n".join(map(json.dumps, rows))),
        ".json": lambda: file.write_text(json.dumps(rows)),
        ".csv": lambda: file.write_text("\ufeffqestion,x\na,1\nb,2\n"),
        ".parquet": lambda: pq.write_table(pa.Table.from_pylist(rows), file),
    }
    written[file.suffix]()
    check_column(file, "x")
    expected = f"{name}: no column question; the columns are qestion, x; did you mean qestion?"
    with pytest.raises(DataError, match=re.escape(expected)):
        check_column(file, "question")


def test_a_column_that_the_first_row_lacks_and_a_file_that_cannot_be_read(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"x": 1}\n{"prompt": "a"}\n')
    check_column(file, "prompt")
    file.write_text('{"x": 1}\n{"prompt"\n')
    with pytest.raises(DataError, match="line 2: not valid JSON"):
        check_column(file, "prompt")


def test_bad_files_of_other_kinds(tmp_path, tokenizer):
    for name, content, expected in [
        ("a.json", '{"data": []}', "no column prompt; the columns are data"),
        ("b.json", '[{"prompt": "a"}]\n{"prompt": "b"}', "not valid JSON (Extra data, line 2); give one list"),
        ("c.json", '[{"prompt": "a"}, 3]', "row 1: an object is needed"),
        ("a.csv", 'prompt,x\n"a\nb",1\nb\n', "a.csv row 1: 1 values, but the header has 2 columns"),
        ("b.csv", "prompt,prompt\na,1\n", "the column prompt appears more than once"),
        ("c.csv", "\n\n", "not valid CSV"),
        ("a.parquet", "hello", "not valid Parquet"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError) as caught:
            load(tmp_path / name, tokenizer)
        assert expected in str(caught.value) and "\n" not in str(caught.value)
    pq.write_table(pa.Table.from_pylist([{"prompt": "a"}, {"prompt": None}]), tmp_path / "n.parquet")
    with pytest.raises(DataError, match="row 1: prompt is null"):
        load(tmp_path / "n.parquet", tokenizer)
    for name, start in (("latin.jsonl", b'{"prompt": "a"}\n' * 2000), ("latin.csv", b"prompt\n" + b"a\n" * 1999)):
        (tmp_path / name).write_bytes(start + b'{"prompt": "\xe9"}\n')
        with pytest.raises(DataError, match="line 2001: not text in UTF-8"):
            load(tmp_path / name, tokenizer)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("lines", [True, False])
def test_both_forms_of_json_are_read_under_either_ending(tmp_path, tokenizer, name, lines):
    """Dataset.to_json writes an object per line to a.json; json.dump of all rows often goes to a.jsonl."""
    content = "\n".join(map(json.dumps, ROWS)) if lines else json.dumps(ROWS, indent=1)
    (tmp_path / name).write_text("\ufeff\n" * (not lines) + content)
    assert [(p.value, p.columns) for p in load(tmp_path / name, tokenizer)] == [
        ("1+1=", {"answer": 2}),
        ("2+3=", {"answer": 5}),
    ]


def test_csv_rows_of_any_size_and_prompts_that_are_numbers(tmp_path, tokenizer):
    long = "x" * 1_200_000  # beyond the 1 MiB that readers take at once
    (tmp_path / "a.csv").write_text(f'prompt,answer\n12,1\n"{long}",2.5\n007,3\n')
    prompts = load(tmp_path / "a.csv", tokenizer, max_prompt_tokens=3)
    assert [text(tokenizer, p.token_ids) for p in prompts] == ["12", "xxx", "007"]
    assert [p.columns["answer"] for p in prompts] == ["1", "2.5", "3"]


CELLS = 'prompt,answer,code,flag,when\na,42,007,true,2024-01-01\nb,0.5,010,,"x, ""y"""\n'
READ = [
    {"answer": "42", "code": "007", "flag": "true", "when": "2024-01-01"},
    {"answer": "0.5", "code": "010", "flag": "", "when": 'x, "y"'},
]


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["a.csv", "train-00000.csv", "train.csv.gz"])
def test_csv_cells_are_the_text_in_the_file(tmp_path, tokenizer, mark, name, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    content = CELLS.replace('"x, ""y"""', "\x00").replace(",", mark).replace("\x00", '"x, ""y"""').encode()
    folder = tmp_path / "d"
    folder.mkdir()
    if name.startswith("train-") and mark != ",":  # read by datasets, through pandas, which splits a cell at its comma
        content = content.replace(b", ", b"-")
    (folder / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    prompts = load(folder if name.startswith("train") else folder / name, tokenizer)
    assert [prompt.columns | {"when": prompt.columns["when"].replace("x-", "x, ")} for prompt in prompts] == READ


def test_empty_lines_before_the_header_of_a_csv_file(tmp_path, tokenizer):
    for content in ("\nprompt,answer\nwhat,007\n", "\r\n\r\nprompt;answer\r\nwhat;007\r\n"):
        (tmp_path / "a.csv").write_bytes(content.encode())
        assert [prompt.columns for prompt in load(tmp_path / "a.csv", tokenizer)] == [{"answer": "007"}]


@pytest.mark.parametrize(("ending", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_compressed_files_are_read_as_the_plain_ones(tmp_path, tokenizer, ending, compress, kind):
    content = {
        "jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
        "json": json.dumps(ROWS),
        "csv": "prompt,answer\n1+1=,2\n2+3=,5\n",
    }[kind].encode()
    whole, torn = tmp_path / f"a.{kind}.{ending}", tmp_path / f"torn.{kind}.{ending}"
    whole.write_bytes(compress(content))
    check_column(whole, "answer")
    assert [prompt.value for prompt in load(whole, tokenizer)] == ["1+1=", "2+3="]
    torn.write_bytes(compress(content * 100)[:-12])
    with pytest.raises(DataError, match=f"torn.{kind}.{ending}: cannot be decompressed"):
        load(torn, tokenizer)
