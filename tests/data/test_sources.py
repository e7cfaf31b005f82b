"""Places that rows come from: files, directories, saved data sets, the starter; their splits and subsets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.conftest import OK, ROWS, load, text, write_jsonl
from vdr_cli.beds.registry import BEDS
from vdr_cli.config import DataConfig
from vdr_cli.data import sources
from vdr_cli.data.prompts import load_prompts
from vdr_cli.errors import ConfigError, DataError


@pytest.fixture(params=["jsonl", "json", "csv", "parquet", "directory", "saved", "saved_dict", "glob_directory"])
def source(request, tmp_path: Path) -> Path:
    from datasets import Dataset, DatasetDict

    kind = request.param
    if kind == "jsonl":
        return write_jsonl(tmp_path / "a.jsonl", *ROWS)
    if kind == "json":
        (tmp_path / "a.json").write_text(json.dumps(ROWS))
        return tmp_path / "a.json"
    if kind == "csv":
        (tmp_path / "a.csv").write_text("prompt,answer\n1+1=,2\n2+3=,5\n")
        return tmp_path / "a.csv"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
        return tmp_path / "a.parquet"
    if kind == "directory":
        write_jsonl(tmp_path / "train.jsonl", *ROWS)
    elif kind == "glob_directory":
        write_jsonl(tmp_path / "train-00000-of-00001.jsonl", *ROWS)
    elif kind == "saved":
        Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "d"))
        return tmp_path / "d"
    else:
        DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "d"))
        return tmp_path / "d"
    return tmp_path


def test_every_source_gives_the_same_prompts(source: Path, tokenizer, monkeypatch, tmp_path_factory):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    prompts = load(source, tokenizer)
    assert len(prompts) == 2 and prompts.columns == ("answer",)
    typed = str if "csv" in str(source) else int  # a CSV file tells no types
    assert [(p.row, p.value, text(tokenizer, p.token_ids), p.columns) for p in prompts] == [
        (0, "1+1=", "1+1=", {"answer": typed(2)}),
        (1, "2+3=", "2+3=", {"answer": typed(5)}),
    ]
    assert prompts[-1].row == 1 and [p.row for p in prompts[:1]] == [0]


def test_starter_rows(monkeypatch, tokenizer):
    small = replace(BEDS["starter"], rows=lambda split: [{"prompt": split, "target": 3}])
    monkeypatch.setitem(sources.BEDS, "starter", small)
    assert load_prompts(DataConfig(), "train", tokenizer)[0].value == "train"
    assert load_prompts(DataConfig(), "eval", tokenizer)[0].value == "test"
    with pytest.raises(ConfigError, match="the splits of starter are train, test"):
        load_prompts(DataConfig(split="dev"), "train", tokenizer)


def test_splits(tmp_path, tokenizer):
    from datasets import Dataset, DatasetDict

    file = write_jsonl(tmp_path / "a.jsonl", OK)
    cases: list[tuple[DataConfig, str]] = [
        (DataConfig(name=str(file), split="dev"), "data.split dev"),
        (DataConfig(name=str(file), split="test"), "data.split test: .* has no splits; leave data.split out"),
        (DataConfig(name=str(tmp_path / "none.txt"), split="train"), "no such file"),
    ]
    DatasetDict({"train": Dataset.from_list([OK]), "val": Dataset.from_list([OK])}).save_to_disk(str(tmp_path / "d"))
    cases.append((DataConfig(name=str(tmp_path / "d"), split="dev"), "the splits of .* are train, val"))
    for cfg, expected in cases:
        with pytest.raises(ConfigError, match=expected):
            load_prompts(cfg, "train", tokenizer)
    with pytest.raises(ConfigError, match=r"give data\.eval_name"):
        load_prompts(DataConfig(name=str(file)), "eval", tokenizer)
    Dataset.from_list([OK]).save_to_disk(str(tmp_path / "one"))
    with pytest.raises(ConfigError, match=r"one has no splits; give data\.eval_name"):  # never the training rows
        load_prompts(DataConfig(name=str(tmp_path / "one")), "eval", tokenizer)
    with pytest.raises(ConfigError, match=r"data\.split dev: .*one has no splits"):
        load_prompts(DataConfig(name=str(tmp_path / "one"), split="dev"), "train", tokenizer)
    shown = Dataset.from_list([OK | {"n": 1}]).with_format("numpy", columns=["n"])
    shown.save_to_disk(str(tmp_path / "formatted"))
    prompt = load(tmp_path / "formatted", tokenizer)[0]
    assert (prompt.value, type(prompt.columns["n"])) == (OK["prompt"], int)
    for arrow in (tmp_path / "one").glob("*.arrow"):
        arrow.write_bytes(b"cut")
    with pytest.raises(DataError, match="cannot be read as a saved data set"):
        load_prompts(DataConfig(name=str(tmp_path / "one")), "train", tokenizer)
    held_out = write_jsonl(tmp_path / "h.jsonl", {"prompt": "h"})
    assert load_prompts(DataConfig(name=str(file), eval_name=str(held_out)), "eval", tokenizer)[0].value == "h"


@pytest.mark.parametrize("kind", ["file", "bed", "saved", "saved_splits", "directory"])
def test_a_subset_of_data_without_subsets_is_refused(kind, tmp_path, tokenizer):
    from datasets import Dataset, DatasetDict

    rows, saved = Dataset.from_list([OK]), str(tmp_path / "data")
    if kind == "saved":
        rows.save_to_disk(saved)
    elif kind == "saved_splits":
        DatasetDict({"train": rows}).save_to_disk(saved)
    elif kind == "directory":
        (tmp_path / "data").mkdir()
        write_jsonl(tmp_path / "data" / "train.jsonl", OK)
    name = {"file": str(write_jsonl(tmp_path / "a.jsonl", OK)), "bed": "starter"}.get(kind, saved)
    assert len(load_prompts(DataConfig(name=name), "train", tokenizer)) > 0
    with pytest.raises(ConfigError, match=r"data\.subset main: ") as caught:
        load_prompts(DataConfig(name=name, subset="main"), "train", tokenizer)
    assert "\n" not in str(caught.value)
    held_out = write_jsonl(tmp_path / "held_out.jsonl", OK)  # no part of data.name
    assert len(load_prompts(DataConfig(subset="main", eval_name=str(held_out)), "eval", tokenizer)) == 1


def test_json_in_a_directory_says_what_the_file_says(tmp_path, tokenizer, monkeypatch):
    """`datasets` makes datetimes of dates and 42.0 of 42 beside 0.5; objects with keys of their own are no media."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [
        {"prompt": "a", "answer": "2024-01-01", "number": 42, "when": {"at": ["2024-01-01"]}, "odd": [{"x": 1}]},
        {"prompt": "b", "answer": "2023-05-06", "number": 0.5, "when": {"at": []}, "odd": [{"y": "q"}]},
    ]
    (tmp_path / "d").mkdir()
    write_jsonl(tmp_path / "d" / "train-00000.jsonl", *rows)
    prompts = load(tmp_path / "d", tokenizer)
    assert [repr({"prompt": prompt.value, **prompt.columns}) for prompt in prompts] == list(map(repr, rows))


@pytest.mark.parametrize("saved", [True, False])
def test_a_value_that_python_lacks_matters_only_to_whoever_asks(tmp_path, tokenizer, saved):
    from datasets import Dataset

    when = pa.array([0, 2**62], pa.timestamp("us"))  # a database's "infinity"
    table = pa.table({"prompt": ["a", "b"], "when": when})
    if saved:
        Dataset(table).save_to_disk(str(tmp_path / "rows"))
    else:
        pq.write_table(table, tmp_path / "rows.parquet")
    prompts = load(tmp_path / ("rows" if saved else "rows.parquet"), tokenizer)
    assert [prompt.value for prompt in prompts] == ["a", "b"]
    with pytest.raises(OverflowError):
        prompts[1].columns["when"].decode()
    broken = pa.array([b"a", b"\xff"]).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"prompt": broken}), tmp_path / "broken.parquet")
    with pytest.raises(DataError, match="row 1: prompt cannot be read"):
        load(tmp_path / "broken.parquet", tokenizer)


def test_media_are_decoded_only_for_whoever_asks(tmp_path, tokenizer):
    from datasets import Dataset, Image

    pytest.importorskip("PIL").Image.new("RGB", (2, 3)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("no picture")
    files = [str(tmp_path / name) for name in ("good.png", "bad.png")]
    rows = Dataset.from_list(ROWS).add_column("image", files).cast_column("image", Image())
    rows.save_to_disk(str(tmp_path / "d"))
    prompts = load(tmp_path / "d", tokenizer)
    assert prompts.columns == ("answer", "image")
    good, bad = (prompt.columns["image"] for prompt in prompts)
    assert good.decode().size == (2, 3)
    with pytest.raises(Exception, match="cannot identify image"):
        bad.decode()
