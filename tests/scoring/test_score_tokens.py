import json
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vdr_cli.data.prompts import encode
from vdr_cli.models.loading import load_tokenizer
from vdr_cli.models.sizes import UsableLength
from vdr_cli.scoring.cells import RowError, completion_value, prompt_value, value_at
from vdr_cli.scoring.request import Fields
from vdr_cli.scoring.saved_ids import ids_fit
from vdr_cli.scoring.sources import Row
from vdr_cli.scoring.tokens import Tokeniser, continuation_ids


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("starter")


def tokeniser(tokenizer: Any, **more: Any) -> Tokeniser:
    defaults = {
        "fields": Fields(),
        "vocabulary": 32,
        "max_tokens": None,
        "append_eos": False,
        "longest": UsableLength(40),
    }
    return Tokeniser(tokenizer=tokenizer, **(defaults | more))


def row(**values: Any) -> Row:
    return Row("f.jsonl", 1, values)


def test_text_is_tokenised_apart_and_ids_are_used_as_they_are(tokenizer: Any) -> None:
    rows = [row(prompt="1 2 3=6:", completion="1+2+3"), row(prompt_ids=[3, 4], completion_ids=[5, 1])]
    text, ids = tokeniser(tokenizer).items(rows)
    assert text.prompt_ids == encode(tokenizer, "1 2 3=6:")
    assert text.completion_ids == tokenizer("1+2+3", add_special_tokens=False)["input_ids"]
    assert (ids.prompt_ids, ids.completion_ids) == ([3, 4], [5, 1])


def test_eos_is_appended_to_text_only(tokenizer: Any) -> None:
    rows = [row(prompt="1:", completion="1"), row(prompt="1:", completion_ids=[5])]
    text, ids = tokeniser(tokenizer, append_eos=True).items(rows)
    assert text.completion_ids[-1] == tokenizer.eos_token_id
    assert ids.completion_ids == [5]


def test_an_eos_that_the_text_brings_is_not_doubled(tokenizer: Any) -> None:
    eos = str(tokenizer.eos_token)
    rows = [row(prompt="1:", completion=text) for text in ("1" + eos, "1", eos, "")]
    items = tokeniser(tokenizer, append_eos=True).items(rows)
    assert [item.completion_ids.count(tokenizer.eos_token_id) for item in items] == [1, 1, 1, 1]


def sentencepiece(prepend: str) -> PreTrainedTokenizerFast:
    """Llama's kind: blanks are part of tokens, and a text that stands alone gets one in front."""
    pieces = ["<s>", "</s>", "\u2581", "4", "2", "42", "\u258142", "\u25814", "\n", "a", "."]
    backend = Tokenizer(
        models.BPE(
            {piece: index for index, piece in enumerate(pieces)},
            [("4", "2"), ("\u2581", "42"), ("\u2581", "4")],
        )
    )
    if prepend == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.mark.parametrize("prepend", ["normalizer", "pre_tokenizer"])
def test_a_completion_in_pieces_begins_without_the_blank_of_a_text_alone(prepend: str) -> None:
    pieces = sentencepiece(prepend)
    assert pieces.convert_ids_to_tokens(pieces("42")["input_ids"]) == ["\u258142"]
    found = continuation_ids(pieces, ["42", " 42", "4", ""])
    assert [pieces.convert_ids_to_tokens(ids) for ids in found] == [["42"], ["\u258142"], ["4"], []]


def test_other_tokenizers_read_a_completion_as_a_text_alone(tokenizer: Any) -> None:
    assert continuation_ids(tokenizer, ["1+2"]) == tokenizer(["1+2"], add_special_tokens=False)["input_ids"]


def test_prompts_of_texts_are_those_of_training(tokenizer: Any) -> None:
    pieces = sentencepiece("normalizer")
    pieces._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    for text in ("42", "<s>42", "<s><s>42", "42</s>"):
        assert tokeniser(pieces)._prompts([text]) == {text: encode(pieces, text)}
    assert [encode(pieces, text)[:2].count(0) for text in ("42", "<s>42", "<s><s>42")] == [1, 1, 2]
    assert encode(pieces, "42</s>").count(1) == 1


def test_long_completions_are_cut_and_marked(tokenizer: Any) -> None:
    (item,) = tokeniser(tokenizer, max_tokens=2).items([row(prompt="1:", completion="1+2")])
    assert (len(item.completion_ids), item.is_cut) == (2, True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"completion": "1"}, "prompt is missing"),
        ({"prompt": None, "completion": "1"}, "prompt is null"),
        ({"prompt": "1", "completion": None}, "completion is null"),
        ({"prompt": 7, "completion": "1"}, "must be a string or a list of messages"),
        ({"prompt": "1", "completion": 7}, "must be a string or messages"),
        ({"prompt": "", "completion": "1"}, "no tokens"),
        ({"prompt": "1", "completion": "\ud800"}, "half of a surrogate pair"),
        ({"prompt": "1", "completion_ids": [99]}, "holds 99"),
        ({"prompt": "1", "completion_ids": [1.5]}, "list of token ids"),
        ({"prompt": "1", "completion_ids": [True]}, "list of token ids"),
        ({"prompt": "1", "completion": "1" * 50}, "the model reads 40 tokens"),
        ({"prompt": [{"role": "user", "content": "hi"}], "completion": "1"}, "chat template"),
    ],
)
def test_rows_that_cannot_be_used(tokenizer: Any, values: dict[str, Any], message: str) -> None:
    bad = row(**values)
    assert tokeniser(tokenizer).items([bad]) == []
    assert bad.error is not None
    assert message in bad.error
    assert "\n" not in bad.error


@pytest.mark.parametrize("values", [{"prompt": "1<new>", "completion": "1"}, {"prompt": "1", "completion": "<new>"}])
def test_a_token_that_was_added_to_the_tokenizer_alone_is_named(values: dict[str, Any]) -> None:
    tokenizer = load_tokenizer("starter")
    entries = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    bad, good = row(**values), row(prompt="1", completion="1")
    assert [item.at for item in tokeniser(tokenizer, vocabulary=entries).items([bad, good])] == [1]
    assert bad.error is not None
    assert f"token {entries} of tokenizer " in bad.error and f"outside the model's vocabulary of {entries}" in bad.error
    assert "resize" in bad.error and "\n" not in bad.error


def test_layouts_of_other_tools() -> None:
    trl = {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}
    assert prompt_value(trl, Fields()) == trl["prompt"]
    assert completion_value(trl, Fields()) == "a"
    harness = {"arguments": {"gen_args_0": {"arg_0": "q", "arg_1": {}}}, "resps": [["a"]], "doc": {}}
    older = {"arguments": [["q", {}]], "resps": [["a"]]}
    for values in (harness, older):
        assert prompt_value(values, Fields()) == "q"
        assert completion_value(values, Fields()) == "a"
    several = {"arguments": [["q", {}]], "resps": [["a", "b"]]}
    with pytest.raises(Exception, match="2 responses: choose one, --completion-column resps"):
        completion_value(several, Fields())
    assert completion_value(several, Fields(completion="resps.0.1")) == "b"


MESSAGE = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    "completion",
    [
        MESSAGE,  # choices.0.message of an OpenAI batch
        [MESSAGE | {"content": [{"type": "text", "text": "a"}], "tool_calls": None}],
        json.dumps([MESSAGE]),  # a CSV cell
        json.dumps(MESSAGE),
    ],
)
def test_messages_of_every_spelling_are_their_text(completion: Any) -> None:
    values = {"prompt": "p", "response": {"body": {"choices": [{"message": completion}]}}}
    assert completion_value(values, Fields(completion="response.body.choices.0.message")) == "a"


def test_text_that_only_looks_like_messages_stays_text() -> None:
    for text in ('[{"x": 1}]', '{"role": 1}', '[{"role": "user", "content": "a"}]', '[{"'):
        assert completion_value({"prompt": "p", "completion": text}, Fields()) == text
    assert prompt_value({"prompt": '[{"x": 1}]', "completion": "a"}, Fields()) == '[{"x": 1}]'
    with pytest.raises(RowError, match="completion must be text, not"):
        completion_value({"prompt": "p", "completion": [MESSAGE | {"content": [{"type": "image"}]}]}, Fields())


def test_paths_into_nested_columns() -> None:
    values = {"a.b": 1, "a": {"b": 2, "c": [3, {"d": 4}]}}
    assert [value_at(values, path) for path in ("a.b", "a.c.0", "a.c.1.d", "a.c.9", "x.y")] == [1, 3, 4, None, None]


def test_ids_of_another_tokenizer_are_noticed(tokenizer: Any) -> None:
    ids = tokenizer("1+2", add_special_tokens=False)["input_ids"]
    own = row(completion="1+2", completion_ids=[*ids, tokenizer.eos_token_id])
    other = row(completion="1+2", completion_ids=[9, 9, 9000])
    assert ids_fit([own], Fields(), tokenizer)
    assert not ids_fit([other], Fields(), tokenizer)
    assert ids_fit([row(prompt="1")], Fields(), tokenizer)


def plain(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("as_cell", [list, json.dumps])
def test_each_row_whose_ids_are_not_its_texts_is_tokenised(tokenizer: Any, as_cell: Any) -> None:
    end = [tokenizer.eos_token_id]
    own = {"prompt_ids": as_cell(plain(tokenizer, "1:")), "completion_ids": as_cell([*plain(tokenizer, "1+2"), *end])}
    text = {"prompt": "1:", "completion": "1+2"}
    rows = [
        row(**text, **own),
        row(**text, **own | {"completion_ids": as_cell([9, 9, 9])}),
        row(**text, **own | {"prompt_ids": as_cell([9, 9, 9])}),
        row(**text | {"completion": f"1+2{tokenizer.eos_token}"}, **own),
    ]
    items = tokeniser(tokenizer, append_eos=True).items(rows)
    assert [item.ids_differ for item in items] == [False, True, True, False]
    assert all(item.prompt_ids == encode(tokenizer, "1:") for item in items)
    assert all(item.completion_ids == [*plain(tokenizer, "1+2"), *end] for item in items)


def test_ids_that_hold_a_template_or_the_end_of_a_long_prompt_are_the_texts(tokenizer: Any) -> None:
    whole = encode(tokenizer, "1 2 3=6:")
    rows = [
        row(prompt="1 2 3=6:", prompt_ids=whole[-3:], completion="1"),
        row(prompt=[{"role": "user", "content": "2 3"}], prompt_ids=whole, completion="1"),
    ]
    assert [item.prompt_ids for item in tokeniser(tokenizer).items(rows)] == [whole[-3:], whole]


def test_ids_without_text_are_used_unless_the_first_rows_ids_are_anothers(tokenizer: Any) -> None:
    bare = row(prompt_ids=[3, 4], completion_ids=[5])
    (item,) = tokeniser(tokenizer).items([bare])
    assert (item.prompt_ids, item.completion_ids, item.ids_differ) == ([3, 4], [5], False)
    assert tokeniser(tokenizer, use_ids=False).items([bare]) == [] and bare.error is not None


def test_a_column_that_was_named_comes_before_saved_ids(tokenizer: Any) -> None:
    values = {"prompt": "1:", "prompt_ids": plain(tokenizer, "1:"), "completion": "1", "other": "2:", "answer": "3+3"}
    values |= {"completion_ids": plain(tokenizer, "1")}
    (item,) = tokeniser(tokenizer, fields=Fields(prompt="other")).items([row(**values)])
    assert (item.prompt_ids, item.completion_ids) == (encode(tokenizer, "2:"), plain(tokenizer, "1"))
    (item,) = tokeniser(tokenizer, fields=Fields(completion="answer")).items([row(**values)])
    assert (item.prompt_ids, item.completion_ids) == (encode(tokenizer, "1:"), plain(tokenizer, "3+3"))
    assert not item.ids_differ


def test_csv_cells_hold_json(tokenizer: Any) -> None:
    (item,) = tokeniser(tokenizer).items([row(prompt_ids="[3, 4]", completion_ids="[5]", prompt="")])
    assert (item.prompt_ids, item.completion_ids) == ([3, 4], [5])
