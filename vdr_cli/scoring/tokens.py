"""Rows to token ids: what is scored of each row, or why it cannot be.

Prompt and completion are tokenised apart, as in training: a sampled completion never merges with its prompt's
last token. So are the turns of a conversation. Token ids that a row brings are used as they are, unless they are
not those of the text beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from vdr_cli.data.prompts import encode, without_extra_ends
from vdr_cli.models.sizes import UsableLength, foreign_token
from vdr_cli.scoring.cells import (
    RowError,
    completion_value,
    policy_mask,
    prompt_value,
    tools_of,
)
from vdr_cli.scoring.request import Fields
from vdr_cli.scoring.saved_ids import ids_at, row_fits
from vdr_cli.scoring.sources import Row
from vdr_cli.scoring.turns import turn_ids
from vdr_cli.system.text import is_text, reason

ANCHORS = ("\n", ".", "a")
"""Texts whose last token rarely merges with what follows."""


@dataclass(slots=True)
class Item:
    """One row that can be scored."""

    at: int  # in its window
    prompt_ids: list[int]
    completion_ids: list[int]
    is_cut: bool
    policy: list[bool] | None = None
    """True for the completion's ids that are the assistant's, and so measured; None: all of them."""
    ids_differ: bool = False
    """The row has token ids that are not those of its text, which was tokenised instead."""

    @property
    def measured(self) -> int:
        """Tokens that are measured."""
        return len(self.completion_ids) if self.policy is None else sum(self.policy)


@dataclass(slots=True)
class _Part:
    """One row before its texts are tokenised."""

    at: int
    prompt: str | list[int]
    completion: str | list[int]
    policy: list[bool] | None
    ids_differ: bool


@dataclass(frozen=True)
class Tokeniser:
    """The encoding of rows. use_ids: ids without text beside them are this tokenizer's."""

    tokenizer: Any
    fields: Fields
    vocabulary: int
    max_tokens: int | None
    append_eos: bool
    longest: UsableLength | None
    """Tokens that the model takes in all; None: no limit."""
    use_ids: bool = True
    eos_ids: tuple[int, ...] = ()
    """Tokens that end a turn."""

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
                items.append(self._item(part, prompt_ids, completion_ids))
            except RowError as error:
                rows[part.at].error = str(error)
        return items

    def _part(self, at: int, row: Row) -> _Part | None:
        """The parts of a row that are to be tokenised."""
        if row.error is not None or row.values is None:
            return None
        try:
            fits = row_fits(row.values, self.fields, self.tokenizer)
            use_ids = self.use_ids if fits is None else fits
            prompt = self._prompt(row.values, use_ids)
            completion, policy = self._completion(row.values, use_ids)
            for name, text in ((self.fields.prompt, prompt), (self.fields.completion, completion)):
                if isinstance(text, str) and not is_text(text):
                    raise RowError(f"{name} has half of a surrogate pair, which no tokenizer takes")
        except RowError as error:
            row.error = str(error)
            return None
        return _Part(at, prompt, completion, policy, fits is False)

    def _prompt(self, values: dict[str, Any], use_ids: bool) -> str | list[int]:
        ids = self._ids(values, "prompt") if use_ids else None
        if ids is not None:
            return ids
        value = prompt_value(values, self.fields)
        return value if isinstance(value, str) else self._messages(value, tools_of(values))

    def _completion(self, values: dict[str, Any], use_ids: bool) -> tuple[str | list[int], list[bool] | None]:
        """Text, or ids, and which of those are the assistant's."""
        ids = self._ids(values, "completion") if use_ids else None
        if ids is not None:
            return ids, policy_mask(values, len(ids))
        value = completion_value(values, self.fields)
        if isinstance(value, str):
            return value, None
        as_ids = partial(continuation_ids, self.tokenizer)
        prompt, tools = prompt_value(values, self.fields), tools_of(values)
        return turn_ids(self.tokenizer, self.eos_ids, as_ids, prompt, value, tools, self.append_eos)

    def _item(self, part: _Part, prompt_ids: list[int], completion_ids: list[int]) -> Item:
        policy = part.policy
        if not prompt_ids:
            raise RowError("the prompt has no tokens: a completion needs something to follow")
        if foreign := foreign_token(prompt_ids + completion_ids, self.vocabulary, self.tokenizer):
            raise RowError(foreign)
        is_cut = False
        if self.max_tokens is not None:
            own = [at for at, is_own in enumerate(policy or [True] * len(completion_ids)) if is_own]
            is_cut = len(own) > self.max_tokens
            if is_cut:
                completion_ids = completion_ids[: own[self.max_tokens]]
                policy = None if policy is None else policy[: len(completion_ids)]
        length = len(prompt_ids) + len(completion_ids)
        if self.longest is not None and length > self.longest.tokens:
            raise RowError(f"prompt and completion have {length} tokens, the model reads {self.longest}")
        return Item(part.at, prompt_ids, completion_ids, is_cut, policy, part.ids_differ)

    def _prompts(self, texts: Sequence[str]) -> dict[str, list[int]]:
        """The ids that data.prompts.encode gives each text, tokenised together."""
        unique = list(dict.fromkeys(texts))
        if not unique:
            return {}
        encoded = zip(unique, self.tokenizer(unique)["input_ids"], strict=True)
        return {text: without_extra_ends(self.tokenizer, text, ids) for text, ids in encoded}

    def _messages(self, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[int]:
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise RowError("the prompt is chat messages and the tokenizer has no chat template: give a string")
        try:
            return encode(self.tokenizer, messages, tools)  # type: ignore[arg-type]
        except Exception as error:  # a template is a program that comes with the model: it may raise anything
            raise RowError(f"the chat template refuses the messages: {reason(error)}") from error

    def _completions(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        rows = continuation_ids(self.tokenizer, texts)
        end = [self.tokenizer.eos_token_id] if self.append_eos else []
        return [ids if ids[-1:] == end else ids + end for ids in rows]

    def _ids(self, values: dict[str, Any], part: Literal["prompt", "completion"]) -> list[int] | None:
        found = ids_at(values, self.fields, part)
        if found is None:
            return None
        name = getattr(self.fields, f"{part}_ids")
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
