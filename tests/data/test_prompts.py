"""Rows to prompts: every kind of source, chat templates, and what a bad row prints."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vdr_cli.beds.registry import BEDS
from vdr_cli.config import DataConfig
from vdr_cli.data import sources
from vdr_cli.data.files import check_column
from vdr_cli.data.prompts import Limits, PromptSet, encode, load_prompts
from vdr_cli.errors import ConfigError, DataError, VdrError

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m.role[0] }}>{{ m.content }}{% if not loop.last or m.role != 'assistant' %}|{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def character_tokenizer(append_eos: bool = False, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    alphabet = [chr(c) for c in range(32, 127)]
    vocabulary = {token: index for index, token in enumerate(["[pad]", "[eos]", "[bos]", *alphabet])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[pad]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    single = "[bos] $A [eos]" if append_eos else "$A"
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("[bos]", 2), ("[eos]", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[pad]", eos_token="[eos]", bos_token="[bos]"
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return character_tokenizer()


def text(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(ids))


def write_jsonl(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def load(path: Path, tokenizer, **settings) -> PromptSet:
    return load_prompts(DataConfig(name=str(path), **settings), "train", tokenizer)


ROWS = [{"prompt": "1+1=", "answer": 2}, {"prompt": "2+3=", "answer": 5}]


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


def test_ragged_rows_get_every_column(tmp_path, tokenizer):
    prompts = load(write_jsonl(tmp_path / "a.jsonl", {"prompt": "a", "x": 1}, "", {"prompt": "b", "y": 2}), tokenizer)
    assert [p.columns for p in prompts] == [{"x": 1, "y": None}, {"x": None, "y": 2}]
    assert [prompts.where(i) for i in range(2)] == [f"{tmp_path}/a.jsonl line 1", f"{tmp_path}/a.jsonl line 3"]


def test_chat_prompts(tmp_path, tokenizer):
    user, assistant = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "well"}
    system = {"role": "system", "content": "own"}
    path = write_jsonl(tmp_path / "a.jsonl", *({"prompt": m} for m in ([user], [user, assistant], [system, user])))
    prompts = load(path, tokenizer, system_prompt="be brief")
    assert [text(tokenizer, p.token_ids) for p in prompts] == [
        "<s>be brief|<u>hi|<a>",
        "<s>be brief|<u>hi|<a>well",
        "<s>own|<u>hi|<a>",
    ]
    assert prompts[0].value == [{"role": "system", "content": "be brief"}, user]
    assert load(path, tokenizer)[0].value == [user]


def test_a_string_keeps_its_special_tokens_but_no_end(tokenizer):
    ending = character_tokenizer(append_eos=True)
    assert text(ending, encode(ending, "ab")) == "[bos]ab"
    assert text(tokenizer, encode(tokenizer, "ab")) == "ab"


def test_a_bos_that_a_string_brings_is_not_doubled():
    begins = character_tokenizer(append_eos=True)
    for given in ("ab", "[bos]ab"):
        assert text(begins, encode(begins, given)) == "[bos]ab"
    assert text(begins, encode(begins, "[bos][bos]ab")) == "[bos][bos][bos]ab"


def test_the_digest_tells_other_rows_and_another_order(tmp_path, tokenizer):
    other = [{"prompt": "1+1=", "answer": 3}, ROWS[1]]
    contents = [ROWS, ROWS[::-1], ROWS[:1], other, ROWS]
    digests = [load(write_jsonl(tmp_path / f"{n}.jsonl", *rows), tokenizer).digest for n, rows in enumerate(contents)]
    assert len(set(digests)) == 4 and digests[0] == digests[-1]


def test_long_prompts_keep_their_end_and_are_counted(tmp_path, tokenizer, caplog):
    prompts = load(
        write_jsonl(tmp_path / "a.jsonl", *({"prompt": "x" * n + "!"} for n in (1, 5, 6))),
        tokenizer,
        max_prompt_tokens=3,
    )
    assert [text(tokenizer, p.token_ids) for p in prompts] == ["x!", "xx!", "xx!"]
    assert prompts.truncated_rows == {1, 2} and "2 prompts so far" in caplog.text


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


OK = {"prompt": "a"}


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([OK, "{"], "a.jsonl line 2: not valid JSON"),
        ([OK, "", "[1]"], "a.jsonl line 3: an object is needed"),
        ([{"question": "a", "x": 1}], "a.jsonl: no column prompt; the columns are question, x; name the right one"),
        ([OK, {"x": 1}], "a.jsonl line 2: prompt is missing; the row has x; give it a value or remove the row"),
        ([OK, {"prompt": None}], "a.jsonl line 2: prompt is null; give it a value or remove the row"),
        ([OK, {"prompt": ""}], "a.jsonl line 2: prompt is an empty string"),
        ([OK, {"prompt": 3}], "a.jsonl line 2: prompt must be a string or a list of messages, not 3"),
        ([OK, {"prompt": []}], "a.jsonl line 2: prompt must be a string or a list of messages, not []"),
        ([{"prompt": [{"role": "user"}]}], "a.jsonl line 1: message 0 of prompt needs role and content"),
        ([{"prompt": ["hi"]}], "a.jsonl line 1: message 0 of prompt needs role and content, not 'hi'"),
        ([{"prompt": [{"role": "user", "content": None}]}], "a.jsonl line 1: message 0 of prompt has no content"),
        ([OK, {"prompt": [{"role": "user", "content": "a"}]}], "a.jsonl line 2: prompts must be all strings or all"),
        ([""], "a.jsonl: no rows"),
        ([OK, '{"prompt": "a", "x": ' + "9" * 5000 + "}"], "a.jsonl line 2: not valid JSON (a number with too many"),
        ([OK, '{"prompt": "a\\ud800"}'], "a.jsonl line 2: prompt has a lone surrogate at character 1"),
        ([{"prompt": [{"role": "user", "content": "\ud800"}]}], "message 0 of prompt has a lone surrogate"),
        ([OK, "[" * 100_000], "a.jsonl line 2: not valid JSON (too deeply nested)"),
    ],
)
def test_bad_rows_are_named(tmp_path, tokenizer, lines, expected):
    with pytest.raises(DataError) as caught:
        load(write_jsonl(tmp_path / "a.jsonl", *lines), tokenizer)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


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


class Longest64:
    """As much of a transformers configuration as matters here."""

    vocab_size = 98
    max_position_embeddings = 64
    rope_parameters: dict | None = None

    def get_text_config(self, decoder: bool = False):
        return self


def test_what_the_model_cannot_read(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", {"prompt": "x" * 14}, {"prompt": "x" * 15})
    config = DataConfig(name=str(path))
    prompts = load_prompts(config, "train", tokenizer, Limits.of(Longest64(), 50))
    assert len(prompts[0].token_ids) == 14
    with pytest.raises(DataError, match=r"line 2: the prompt has 15 tokens; the model's length leaves 14"):
        prompts[1]
    cut = load_prompts(DataConfig(name=str(path), max_prompt_tokens=14), "train", tokenizer, Limits.of(Longest64(), 50))
    assert len(cut[1].token_ids) == 14
    with pytest.raises(ConfigError, match=r"max_new_tokens 64: the model reads 64 tokens"):
        Limits.of(Longest64(), 64)
    with pytest.raises(DataError, match=r"outside the model's vocabulary of 20"):
        load_prompts(config, "train", tokenizer, Limits(vocabulary=20))[0]


def test_stretched_and_unknown_lengths():
    stretched, unknown = Longest64(), Longest64()
    stretched.rope_parameters = {"rope_type": "yarn", "factor": 4.0}
    unknown.max_position_embeddings = None
    assert Limits.of(stretched, 56).prompt_tokens == 200
    assert Limits.of(unknown, 1000).prompt_tokens is None


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


def test_chat_needs_a_template_and_system_needs_chat(tmp_path):
    chat = write_jsonl(tmp_path / "c.jsonl", {"prompt": [{"role": "user", "content": "a"}]})
    plain = write_jsonl(tmp_path / "p.jsonl", OK)
    with pytest.raises(ConfigError, match="no chat template"):
        load(chat, character_tokenizer(template=None))
    with pytest.raises(ConfigError, match="plain strings"):
        load(plain, character_tokenizer(), system_prompt="x")


def test_messages_as_arrow_and_openai_write_them(tmp_path, tokenizer):
    """Null keys, a turn that only calls tools, content in parts: as in a data set with tool calls that TRL reads."""
    from datasets import Dataset

    asks = {"role": "user", "content": "1+1"}
    calls = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    parts = {"role": "user", "content": [{"type": "text", "text": "2"}, {"type": "text", "text": "+2"}]}
    number = "{% if 'tool_calls' in m %}{{ m.tool_calls | length }}{% endif %}"
    calling = character_tokenizer(template="{% for m in messages %}" + number + "{{ m.content }}|{% endfor %}")
    for file in (tmp_path / "a.jsonl", tmp_path / "a.parquet"):
        rows = [{"prompt": [asks, calls, {"role": "user", "content": "so"}]}, {"prompt": [asks]}]
        if file.suffix == ".parquet":
            Dataset.from_list(rows).to_parquet(file)
        else:
            write_jsonl(file, *rows)
        assert [text(calling, prompt.token_ids) for prompt in load(file, calling)] == ["1+1|1|so|", "1+1|"]
    (prompt,) = load(write_jsonl(tmp_path / "p.jsonl", {"prompt": [parts]}), tokenizer)
    assert prompt.value == [{"role": "user", "content": "2+2"}]
    image = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}
    with pytest.raises(DataError, match="message 0 of prompt has parts that are not text"):
        load(write_jsonl(tmp_path / "i.jsonl", {"prompt": [image]}), tokenizer)
    for content in (5, True, {"text": "1"}):  # many templates would leave it out without a word
        with pytest.raises(DataError, match=r"message 0 of prompt has content that is not text: .*; give a string"):
            load(write_jsonl(tmp_path / "n.jsonl", {"prompt": [{"role": "user", "content": content}]}), tokenizer)


def test_the_prompts_column_is_a_column_too_under_a_name_of_its_own(tmp_path, tokenizer):
    """A reward function of GSM8K takes `question`."""
    row = {"question": "1+1", "answer": "2"}
    (prompt,) = found = load(write_jsonl(tmp_path / "q.jsonl", row), tokenizer, prompt_column="question")
    assert prompt.columns == row and found.columns == ("question", "answer")
    (prompt,) = load(write_jsonl(tmp_path / "p.jsonl", {"prompt": "1+1", "answer": "2"}), tokenizer)
    assert prompt.columns == {"answer": "2"}


def test_messages_written_as_text_are_noticed(tmp_path, tokenizer, caplog):
    """A data set of chats saved as CSV."""
    load(write_jsonl(tmp_path / "a.jsonl", {"prompt": "[{1}]"}), tokenizer)
    assert not caplog.records
    (tmp_path / "a.csv").write_text("""prompt\n"[{'role': 'user', 'content': 'hi'}]"\n""")
    load(tmp_path / "a.csv", tokenizer)
    assert "a.csv row 0: prompt is messages written as text" in caplog.text


def test_a_row_that_the_template_refuses_is_named(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "c.jsonl", {"prompt": [{"role": "tool", "content": "a"}]})
    with pytest.raises(VdrError, match="line 1: the chat template refuses the messages: no tools here"):
        load(path, tokenizer)[0]
    path = write_jsonl(tmp_path / "n.jsonl", {"prompt": [{"role": "user", "content": "a", "name": 3}]})
    joining = character_tokenizer(template="{% for m in messages %}{{ m.content + m.name }}{% endfor %}")
    with pytest.raises(DataError, match="line 1: the chat template refuses the messages: can only concatenate"):
        load(path, joining)[0]


def test_plain_prompts_as_chats(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "d.jsonl", *ROWS)
    prompts = load(path, tokenizer, as_chat=True, system_prompt="be brief")
    assert prompts.has_messages
    assert prompts[0].value == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1="}]
    assert text(tokenizer, prompts[0].token_ids) == "<s>be brief|<u>1+1=|<a>"
    with pytest.raises(ConfigError, match=r"set data\.as_chat"):
        load(path, tokenizer, system_prompt="be brief")
    with pytest.raises(ConfigError, match="no chat template"):
        load(path, character_tokenizer(template=None), as_chat=True)


def test_rows_are_checked_before_they_are_drawn(tmp_path, tokenizer):
    """A row that the model cannot read is found at the start, and not in the night."""
    path = write_jsonl(tmp_path / "a.jsonl", {"prompt": "x" * 14}, {"prompt": "x" * 15}, {"prompt": "x"})
    limits = Limits.of(Longest64(), 50)
    prompts = load_prompts(DataConfig(name=str(path)), "train", tokenizer, limits)
    prompts.check([2, 0])
    with pytest.raises(DataError, match=r"line 2: the prompt has 15 tokens"):
        prompts.check(range(3))
    cut = load_prompts(DataConfig(name=str(path), max_prompt_tokens=14), "train", tokenizer, limits)
    cut.check(range(3))
    assert not cut.truncated_rows, "only what is drawn counts as cut"


def test_a_template_that_refuses_a_row_is_found_by_the_check(tmp_path, tokenizer, monkeypatch):
    user = {"role": "user", "content": "a"}
    rows = {"prompt": [user]}, {"prompt": [{"role": "system", "content": "b"}, user]}
    path = write_jsonl(tmp_path / "a.jsonl", *rows)
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    monkeypatch.setattr(tokenizer, "chat_template", refusing)
    prompts = load_prompts(DataConfig(name=str(path)), "train", tokenizer)
    prompts.check([0])
    with pytest.raises(DataError, match=r"line 2: the chat template refuses the messages: no system"):
        prompts.check([0, 1])


def test_empty_lines_before_the_header_of_a_csv_file(tmp_path, tokenizer):
    for content in ("\nprompt,answer\nwhat,007\n", "\r\n\r\nprompt;answer\r\nwhat;007\r\n"):
        (tmp_path / "a.csv").write_bytes(content.encode())
        assert [prompt.columns for prompt in load(tmp_path / "a.csv", tokenizer)] == [{"answer": "007"}]
