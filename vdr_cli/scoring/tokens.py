"""Rows to token ids: what is scored of each row, or why it cannot be.

Prompt and completion are tokenised apart, as in training: a sampled completion never merges with its prompt's
last token. Token ids that a row brings are used as they are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from vdr_cli.data.prompts import encode, without_extra_ends
from vdr_cli.models.sizes import UsableLength
from vdr_cli.scoring.request import Fields
from vdr_cli.scoring.sources import Row
from vdr_cli.system.text import is_text

ANCHORS = ("\n", ".", "a")
"""Texts whose last token rarely merges with what follows."""


@dataclass(slots=True)
class Item:
    """One row that can be scored."""

    at: int  # in its window
    prompt_ids: list[int]
    completion_ids: list[int]
    is_cut: bool


@dataclass(slots=True)
class _Part:
    """One row before its texts are tokenised."""

    at: int
    prompt: str | list[int]
    completion: str | list[int]


class RowError(Exception):
    """The reason that a row cannot be used: what `--on-error` decides about."""


@dataclass(frozen=True)
class Tokeniser:
    """The encoding of rows. use_ids: ids that rows bring are this tokenizer's."""

    tokenizer: Any
    fields: Fields
    vocabulary: int
    max_tokens: int | None
    append_eos: bool
    longest: UsableLength | None
    """Tokens that the model takes in all; None: no limit."""
    use_ids: bool = True

    def items(self, rows: Sequence[Row]) -> list[Item]:
        """The rows of a window that can be scored; the others get their error."""
        parts = [part for at, row in enumerate(rows) if (part := self._part(at, row)) is not None]
        prompts = self._prompts([part.prompt for part in parts if not isinstance(part.prompt, list)])
        texts = iter(self._completions([part.completion for part in parts if isinstance(part.completion, str)]))
        items = []
        for part in parts:
            prompt_ids = part.prompt if isinstance(part.prompt, list) else prompts[part.prompt]
            completion_ids = part.completion if isinstance(part.completion, list) else next(texts)
            try:
                items.append(self._item(part.at, prompt_ids, completion_ids))
            except RowError as error:
                rows[part.at].error = str(error)
        return items

    def _part(self, at: int, row: Row) -> _Part | None:
        """The parts of a row that are to be tokenised."""
        if row.error is not None or row.values is None:
            return None
        try:
            prompt: list[int] | str | None = self._ids(row.values, self.fields.prompt_ids)
            if prompt is None:
                value = prompt_value(row.values, self.fields)
                prompt = value if isinstance(value, str) else self._messages(value)
            completion: list[int] | str | None = self._ids(row.values, self.fields.completion_ids)
            if completion is None:
                completion = completion_value(row.values, self.fields)
            for name, text in ((self.fields.prompt, prompt), (self.fields.completion, completion)):
                if isinstance(text, str) and not is_text(text):
                    raise RowError(f"{name} has half of a surrogate pair, which no tokenizer takes")
        except RowError as error:
            row.error = str(error)
            return None
        return _Part(at, prompt, completion)

    def _item(self, at: int, prompt_ids: list[int], completion_ids: list[int]) -> Item:
        if not prompt_ids:
            raise RowError("the prompt has no tokens: a completion needs something to follow")
        is_cut = self.max_tokens is not None and len(completion_ids) > self.max_tokens
        completion_ids = completion_ids[: self.max_tokens]
        length = len(prompt_ids) + len(completion_ids)
        if self.longest is not None and length > self.longest.tokens:
            raise RowError(f"prompt and completion have {length} tokens, the model reads {self.longest}")
        return Item(at, prompt_ids, completion_ids, is_cut)

    def _prompts(self, texts: Sequence[str]) -> dict[str, list[int]]:
        """The ids that data.prompts.encode gives each text, tokenised together."""
        unique = list(dict.fromkeys(texts))
        if not unique:
            return {}
        encoded = zip(unique, self.tokenizer(unique)["input_ids"], strict=True)
        return {text: without_extra_ends(self.tokenizer, text, ids) for text, ids in encoded}

    def _messages(self, messages: list[dict[str, Any]]) -> list[int]:
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise RowError("the prompt is chat messages and the tokenizer has no chat template: give a string")
        try:
            return encode(self.tokenizer, messages)  # type: ignore[arg-type]
        except (TemplateError, ValueError, TypeError) as error:
            raise RowError(f"the chat template refuses the messages: {error}") from error

    def _completions(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        rows = continuation_ids(self.tokenizer, texts)
        end = [self.tokenizer.eos_token_id] if self.append_eos else []
        return [ids if ids[-1:] == end else ids + end for ids in rows]

    def _ids(self, values: dict[str, Any], name: str) -> list[int] | None:
        found = value_at(values, name) if self.use_ids else None
        if isinstance(found, str):  # CSV
            found = _json_or(found, None)
        if found is None:
            return None
        if not isinstance(found, list) or not all(type(token) is int for token in found):
            raise RowError(f"{name} must be a list of token ids")
        wrong = next((token for token in found if not 0 <= token < self.vocabulary), None)
        if wrong is not None:
            raise RowError(f"{name} holds {wrong}, the model's vocabulary has {self.vocabulary} tokens")
        return found


def continuation_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of texts that follow a prompt.

    SentencePiece tokenizers put a blank before a text that stands alone, which a sampled completion does not have: such
    texts are tokenised behind an anchor whose tokens are then taken off.
    """
    alone: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    if not _adds_blank(tokenizer):
        return alone
    rows = []
    for text, ids in zip(texts, alone, strict=True):
        rows.append(next((found for anchor in ANCHORS if (found := _behind(tokenizer, anchor, text)) is not None), ids))
    return rows


def _adds_blank(tokenizer: Any) -> bool:
    first = tokenizer.convert_ids_to_tokens(tokenizer("0", add_special_tokens=False)["input_ids"])[:1]
    return bool(first) and str(first[0]).startswith("\u2581")


def _behind(tokenizer: Any, anchor: str, text: str) -> list[int] | None:
    """The ids of the text where it follows the anchor; None where a token reaches over the seam."""
    before: list[int] = tokenizer(anchor, add_special_tokens=False)["input_ids"]
    both: list[int] = tokenizer(anchor + text, add_special_tokens=False)["input_ids"]
    return both[len(before) :] if both[: len(before)] == before else None


def prompt_value(values: dict[str, Any], fields: Fields) -> str | list[dict[str, Any]]:
    """The prompt of a row, a string or messages. Knows the sample logs of lm-evaluation-harness."""
    found = value_at(values, fields.prompt)
    if found is None and is_lm_eval(values):
        arguments = _parsed(values["arguments"])
        found = value_at(arguments, "gen_args_0.arg_0") if isinstance(arguments, dict) else value_at(arguments, "0.0")
    if found is None:
        raise RowError(_missing(fields.prompt, values, "--prompt-column"))
    if isinstance(found, str) and found.startswith('[{"'):  # messages in a CSV cell or lm-eval's chat prompts
        found = _json_or(found, found)
    if isinstance(found, str):
        return found
    messages = _messages(found)
    if not messages:
        raise RowError(f"{fields.prompt} must be a string or a list of messages with role and content")
    return messages


def completion_value(values: dict[str, Any], fields: Fields) -> str:
    """The completion of a row, from a string or one assistant message."""
    found = value_at(values, fields.completion)
    if found is None and fields.completion not in values and is_lm_eval(values):
        responses = [
            response for one in _parsed(values["resps"]) for response in (one if isinstance(one, list) else [one])
        ]
        if len(responses) != 1:
            raise RowError(f"resps holds {len(responses)} responses: choose one, --completion-column resps.0.0")
        found = responses[0]
    if found is None:
        raise RowError(_missing(fields.completion, values, "--completion-column"))
    if isinstance(found, str):
        return found
    messages = _messages(found)
    if len(messages) != 1:
        raise RowError(f"{fields.completion} must be a string or one assistant message")
    return str(messages[0]["content"])


def value_at(values: Any, path: str) -> Any:
    """The column of this name, else what a path such as resps.0.0 leads to; None when there is nothing."""
    if isinstance(values, dict) and path in values:
        return values[path]
    for step in path.split("."):
        if isinstance(values, str) and values.startswith(("{", "[")):  # a CSV cell, or an object in our Parquet
            values = _json_or(values, None)
        if isinstance(values, dict):
            values = values.get(step)
        elif isinstance(values, list) and step.isdigit() and int(step) < len(values):
            values = values[int(step)]
        else:
            return None
    return values


def ids_fit(rows: Sequence[Row], fields: Fields, tokenizer: Any) -> bool:
    """True when the ids that rows bring decode to their completions; False when another tokenizer made them."""
    same = other = 0
    for row in rows[:64]:
        ids = value_at(row.values, fields.completion_ids) if row.values else None
        text = value_at(row.values, fields.completion) if row.values else None
        if isinstance(text, list):
            text = text[0].get("content") if text and isinstance(text[0], dict) else None
        if not isinstance(ids, list) or not isinstance(text, str) or not ids:
            continue
        try:
            decoded = tokenizer.decode(ids, skip_special_tokens=True)
        except (IndexError, OverflowError, TypeError):
            decoded = None
        same, other = same + (decoded == text), other + (decoded != text)
    return same >= other


def group_key(values: dict[str, Any], fields: Fields) -> object:
    """The key of a row's group: its prompt, wherever that lies, or its token ids where there is no text.

    Raises RowError for a row without either.
    """
    try:
        return prompt_value(values, fields)
    except RowError:
        ids = value_at(values, fields.prompt_ids)
        if not ids:
            raise
        return ids


def is_lm_eval(values: dict[str, Any]) -> bool:
    """True when the row is from a sample log of lm-evaluation-harness, also as it stands in a Parquet or CSV output."""
    if "resps" not in values or "arguments" not in values:
        return False
    return isinstance(_parsed(values["resps"]), list) and isinstance(_parsed(values["arguments"]), list | dict)


def _parsed(value: Any) -> Any:
    """JSON text as the object that it spells; anything else as it is."""
    return _json_or(value, value) if isinstance(value, str) and value.startswith(("{", "[")) else value


def _messages(value: Any) -> list[dict[str, Any]]:
    usable = isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and message.get("content") is not None
        for message in value
    )
    return value if usable else []


def _missing(name: str, values: dict[str, Any], flag: str) -> str:
    state = "is null" if name in values else f"is missing (there are: {', '.join(values) or 'none'})"
    return f"{name} {state}; name the right column with {flag}"


def _json_or(text: str, otherwise: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return otherwise
