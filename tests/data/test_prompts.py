"""Rows to prompts: strings, chat templates, columns, and what a bad row prints."""

from __future__ import annotations

import pytest

from tests.data.conftest import OK, ROWS, character_tokenizer, load, text, write_jsonl
from vdr_cli.data.prompts import encode
from vdr_cli.errors import ConfigError, DataError, VdrError


def test_ragged_rows_get_every_column(tmp_path, tokenizer):
    prompts = load(write_jsonl(tmp_path / "a.jsonl", {"prompt": "a", "x": 1}, "", {"prompt": "b", "y": 2}), tokenizer)
    assert [p.columns for p in prompts] == [{"x": 1, "y": None}, {"x": None, "y": 2}]
    assert [prompts.where(i) for i in range(2)] == [f"{tmp_path}/a.jsonl line 1", f"{tmp_path}/a.jsonl line 3"]


def test_the_prompts_column_is_a_column_too_under_a_name_of_its_own(tmp_path, tokenizer):
    """A reward function of GSM8K takes `question`."""
    row = {"question": "1+1", "answer": "2"}
    (prompt,) = found = load(write_jsonl(tmp_path / "q.jsonl", row), tokenizer, prompt_column="question")
    assert prompt.columns == row and found.columns == ("question", "answer")
    (prompt,) = load(write_jsonl(tmp_path / "p.jsonl", {"prompt": "1+1", "answer": "2"}), tokenizer)
    assert prompt.columns == {"answer": "2"}


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


def test_chat_needs_a_template_and_system_needs_chat(tmp_path):
    chat = write_jsonl(tmp_path / "c.jsonl", {"prompt": [{"role": "user", "content": "a"}]})
    plain = write_jsonl(tmp_path / "p.jsonl", OK)
    with pytest.raises(ConfigError, match="no chat template"):
        load(chat, character_tokenizer(template=None))
    with pytest.raises(ConfigError, match="plain strings"):
        load(plain, character_tokenizer(), system_prompt="x")


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
