"""Rows to prompts: column checks, chat template, tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from vdr_cli.config import DataConfig
from vdr_cli.data.files import Row, Table
from vdr_cli.data.sources import Role, open_table
from vdr_cli.errors import ConfigError, DataError
from vdr_cli.rollout.base import Messages, Prompt

logger = logging.getLogger(__name__)


class PromptSet(Sequence[Prompt]):
    """The prompts of one split. Every row's prompt was checked; tokens are made when a prompt is asked for."""

    def __init__(
        self,
        table: Table,
        tokenizer: Any,
        prompt_column: str = "prompt",
        system_prompt: str | None = None,
        max_prompt_tokens: int | None = None,
        as_chat: bool = False,
    ) -> None:
        self._table = table
        self._tokenizer = tokenizer
        self._prompt_column = prompt_column
        self._system_prompt = system_prompt
        self._max_prompt_tokens = max_prompt_tokens
        self._as_chat = as_chat
        self.truncated_rows: set[int] = set()
        """Rows seen so far whose prompt was longer than max_prompt_tokens."""
        self.columns = tuple(column for column in table.columns if column != prompt_column)
        """The columns that reward functions can ask for."""
        self.has_messages = self._check_rows()

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: Any) -> Any:
        """The prompt of row `index`; a slice gives a list."""
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        row = dict(self._table.rows[index])
        value = row.pop(self._prompt_column)
        if self.has_messages:
            value = [{"role": "user", "content": value}] if isinstance(value, str) else value
            value = with_system_prompt([dict(message) for message in value], self._system_prompt)
        return Prompt(row=index, value=value, token_ids=self._tokens(index, value), columns=self._columns_of(row))

    def where(self, index: int) -> str:
        """How error messages name a row: `FILE line 7` (JSONL, from 1) or `NAME row 6` (from 0)."""
        return self._table.where(index)

    def _columns_of(self, row: Row) -> Row:
        return {column: row.get(column) for column in self.columns}

    def _tokens(self, index: int, value: str | Messages) -> list[int]:
        try:
            ids = encode(self._tokenizer, value)
        except TemplateError as error:
            raise DataError(f"{self.where(index)}: the chat template refuses the messages: {error}") from None
        if not ids:
            raise DataError(f"{self.where(index)}: the prompt has no tokens; remove the row")
        limit = self._max_prompt_tokens
        if limit is None or len(ids) <= limit:
            return ids
        self.truncated_rows.add(index)
        count = len(self.truncated_rows)
        if count & (count - 1) == 0:  # 1, 2, 4, 8, ...: says it at once, and not a thousand times
            logger.warning("data.max_prompt_tokens %d: %d prompts so far lost their first tokens", limit, count)
        return ids[-limit:]

    def _check_rows(self) -> bool:
        """Every row's prompt is usable; returns whether they are chats. DataError names the first bad row."""
        column, table = self._prompt_column, self._table
        if column not in table.columns:
            raise DataError(
                f"{table.name}: no column {column}; the columns are {', '.join(table.columns)}; "
                "name the right one with data.prompt_column"
            )
        kinds = [_kind(table, index, row, column) for index, row in enumerate(_prompts_only(table, column))]
        if len(set(kinds)) > 1:
            odd = kinds.index(not kinds[0])
            raise DataError(
                f"{table.where(odd)}: prompts must be all strings or all messages; {table.where(0)} differs"
            )
        has_messages = kinds[0] or self._as_chat
        if self._system_prompt is not None and not has_messages:
            raise ConfigError(
                f"data.system_prompt needs chat messages; the prompts of {table.name} are plain strings: "
                "set data.as_chat, or leave data.system_prompt out"
            )
        if has_messages and getattr(self._tokenizer, "chat_template", None) is None:
            raise ConfigError(
                f"{table.name}: the prompts are chat messages, but the model's tokenizer has no chat template; "
                "give plain strings or a model with one"
            )
        return has_messages


def load_prompts(cfg: DataConfig, role: Role, tokenizer: Any) -> PromptSet:
    """The training (`train`) or held-out (`eval`) prompts of a configuration."""
    table = open_table(cfg, role)
    return PromptSet(table, tokenizer, cfg.prompt_column, cfg.system_prompt, cfg.max_prompt_tokens, cfg.as_chat)


def with_system_prompt(messages: Messages, system_prompt: str | None) -> Messages:
    """The messages, opened by the system prompt unless the row brings its own."""
    if system_prompt is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def encode(tokenizer: Any, value: str | Messages) -> list[int]:
    """Token ids of a prompt, ready to be continued.

    Messages go through the chat template, opened for the assistant's answer (an assistant message at the end is
    continued). A string is tokenised as it is with the tokenizer's own special tokens, without an EOS at its end.
    """
    if isinstance(value, str):
        ids = list(tokenizer(value)["input_ids"])
        eos = tokenizer.eos_token_id
        added = eos is not None and ids[-1:] == [eos] and not value.endswith(str(tokenizer.eos_token))
        return ids[:-1] if added else ids
    answer_begun = value[-1]["role"] == "assistant"
    encoded = tokenizer.apply_chat_template(
        value,
        add_generation_prompt=not answer_begun,
        continue_final_message=answer_begun,
        tokenize=True,
        return_dict=True,
    )
    return list(encoded["input_ids"])


def _prompts_only(table: Table, column: str) -> Sequence[Row]:
    """The rows with nothing but the prompt: images, audio and the like are not decoded for the check."""
    select = getattr(table.rows, "select_columns", None)
    rows: Any = select([column]) if select is not None else table.rows
    return rows


def _kind(table: Table, index: int, row: Row, column: str) -> bool:
    """True for chat messages, False for a string."""
    value = row.get(column)
    where = table.where(index)
    if isinstance(value, str):
        if not value:
            raise DataError(f"{where}: {column} is an empty string; remove the row")
        return False
    if value is None:
        missing = "is null" if column in row else f"is missing; the row has {', '.join(row) or 'nothing'}"
        raise DataError(f"{where}: {column} {missing}")
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {column} must be a string or a list of messages, not {_shown(value)}")
    for number, message in enumerate(value):
        usable = isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message
        if not usable:
            raise DataError(f"{where}: message {number} of {column} needs role and content, not {_shown(message)}")
        if message["content"] is None:
            raise DataError(f"{where}: message {number} of {column} has no content")
    return True


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
