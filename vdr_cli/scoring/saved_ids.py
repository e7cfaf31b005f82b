"""Token ids that rows bring: which of them are read, and whether they are those of the text beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from vdr_cli.data.prompts import encode
from vdr_cli.scoring.cells import RowError, completion_value, json_or, prompt_value, tools_of, value_at
from vdr_cli.scoring.request import Fields
from vdr_cli.scoring.sources import Row

ROWS_LOOKED_AT = 64


def ids_at(values: dict[str, Any], fields: Fields, part: Literal["prompt", "completion"]) -> Any:
    """The cell of a part's token ids; None without one, and where another column was named for the part's text."""
    if getattr(fields, part) != getattr(Fields, part):
        return None
    found = value_at(values, getattr(fields, f"{part}_ids"))
    return json_or(found, None) if isinstance(found, str) else found  # CSV


def ids_fit(rows: Sequence[Row], fields: Fields, tokenizer: Any) -> bool:
    """False when the ids of most of the first rows are another tokenizer's: a guess about rows without text."""
    judged = [row_fits(row.values, fields, tokenizer) for row in rows[:ROWS_LOOKED_AT] if row.values is not None]
    return judged.count(True) >= judged.count(False)


def row_fits(values: dict[str, Any], fields: Fields, tokenizer: Any) -> bool | None:
    """True when a row's token ids are those of its text, False when they are not; None without text beside ids.

    One part whose ids are not its text's is enough for False: another tokenizer made the ids, or the text was changed.
    """
    judged = (_completion_fits(values, fields, tokenizer), _prompt_fits(values, fields, tokenizer))
    known = [fits for fits in judged if fits is not None]
    return all(known) if known else None


def _completion_fits(values: dict[str, Any], fields: Fields, tokenizer: Any) -> bool | None:
    ids = _token_ids(ids_at(values, fields, "completion"))
    if ids is None:
        return None
    try:
        value = completion_value(values, fields)
    except RowError:
        return None
    plain = _decoded(tokenizer, ids, skip_special_tokens=True)
    if isinstance(value, str):
        return value == plain or value == _decoded(tokenizer, ids)
    return _holds(plain, [message for message in value if message["role"] == "assistant"])


def _prompt_fits(values: dict[str, Any], fields: Fields, tokenizer: Any) -> bool | None:
    """A prompt's ids may hold more than its text (a template's tokens), or its end alone (data.max_prompt_tokens)."""
    ids = _token_ids(ids_at(values, fields, "prompt"))
    if not ids:
        return None
    try:
        value = prompt_value(values, fields)
        tools = tools_of(values)
    except RowError:
        return None
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if _holds(_decoded(tokenizer, ids, skip_special_tokens=True), messages):
        return True
    try:
        return encode(tokenizer, value, tools)[-len(ids) :] == ids
    except Exception:  # a template or a tokenizer in Python may raise anything
        return False


def _holds(text: str | None, messages: Sequence[dict[str, Any]]) -> bool:
    """True when the text has the words of every message."""
    contents = [message["content"] for message in messages]
    return text is not None and all(content in text for content in contents if isinstance(content, str))


def _token_ids(cell: Any) -> list[int] | None:
    """The cell when it is a list of integers; anything else is an error that the tokeniser reports."""
    return cell if isinstance(cell, list) and all(type(token) is int for token in cell) else None


def _decoded(tokenizer: Any, ids: list[int], skip_special_tokens: bool = False) -> str | None:
    """The text of token ids; None when the tokenizer lacks one of them."""
    try:
        return str(tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))
    except Exception:  # a tokenizer in Python may raise anything
        return None
