"""Rows to prompts: column checks, chat template, tokens."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vdr_cli.config import DataConfig
from vdr_cli.data.files import Row, Table, no_column
from vdr_cli.data.messages import plain_message, plain_messages
from vdr_cli.data.sources import Role, open_table
from vdr_cli.errors import ConfigError, DataError
from vdr_cli.models.sizes import foreign_token, language_part, largest, usable_length
from vdr_cli.samples import Messages, Prompt, Undecoded
from vdr_cli.system.text import reason, shown_value

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """The longest prompt and the vocabulary that a model can read; None: not known."""

    prompt_tokens: int | None = None
    vocabulary: int | None = None
    why: str = ""
    """The reason that prompts are limited below the model's own maximum."""
    setting: str = "rollout.max_new_tokens"
    """The setting that says how many tokens follow a prompt."""

    @classmethod
    def of(cls, model_config: Any, max_new_tokens: int, setting: str = "rollout.max_new_tokens") -> Limits:
        """The limits of a transformers configuration. ConfigError when it leaves no room for a prompt.

        max_new_tokens: tokens that may follow a prompt. setting: where that number comes from, for errors.
        """
        length, vocabulary = usable_length(model_config), largest(language_part(model_config), "vocab_size")
        if length is None:
            return cls(None, vocabulary)
        if max_new_tokens >= length.tokens:
            raise ConfigError(f"{setting} {max_new_tokens}: the model reads {length}, prompt included; give less")
        return cls(length.tokens - max_new_tokens, vocabulary, length.why, setting)

    def check_tokens(self, ids: Sequence[int], tokenizer: Any, where: str) -> None:
        """Raise DataError when the model has no entry for one of them. where: opens the line."""
        if foreign := foreign_token(ids, self.vocabulary, tokenizer):
            raise DataError(f"{where}: {foreign}")


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
        limits: Limits = Limits(),
        tools: Sequence[dict[str, Any]] = (),
    ) -> None:
        """tools: schemas that the chat template shows to the model."""
        self._table = table
        self._tokenizer = tokenizer
        self._prompt_column = prompt_column
        self._system_prompt = system_prompt
        self._max_prompt_tokens = max_prompt_tokens
        self._as_chat = as_chat
        self._limits, self._tools = limits, tools
        self.truncated_rows: set[int] = set()
        """Rows seen so far whose prompt was longer than max_prompt_tokens."""
        self.columns = tuple(column for column in table.columns if not column == prompt_column == "prompt")
        """The columns that reward functions can ask for: the prompt's too where it has a name of its own."""
        self.has_messages, self.digest = self._check_rows()
        """digest: tells these rows, in this order, from others; of a local file it covers every column."""

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: Any) -> Any:
        """The prompt of row `index`; a slice gives a list."""
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        row = dict(self._table.rows[index])
        value = self._value(row[self._prompt_column])
        ids = self._fitting(index, self._cut(index, self._tokens(index, value)))
        return Prompt(row=index, value=value, token_ids=ids, columns=self._columns_of(row))

    def check(self, rows: Iterable[int]) -> None:
        """DataError for the first of these rows whose prompt the template refuses or the model cannot read."""
        prompts = _prompts_only(self._table, self._prompt_column)
        kept = slice(None) if self._max_prompt_tokens is None else slice(-self._max_prompt_tokens, None)
        for index in rows:
            self._fitting(index, self._tokens(index, self._value(prompts[index][self._prompt_column]))[kept])

    def where(self, index: int) -> str:
        """A row's name in error messages: `FILE line 7` (JSONL, from 1) or `NAME row 6` (from 0)."""
        return self._table.where(index)

    def _columns_of(self, row: Row) -> Row:
        return {column: row.get(column) for column in self.columns}

    def _value(self, cell: Any) -> Any:
        """The prompt of a cell, as the model gets it."""
        if not self.has_messages:
            return cell
        messages: Any = [{"role": "user", "content": cell}] if isinstance(cell, str) else plain_messages(cell)
        return with_system_prompt(messages, self._system_prompt)

    def _tokens(self, index: int, value: str | Messages) -> list[int]:
        try:
            ids = encode(self._tokenizer, value, self._tools)
        except Exception as error:  # a template is a program that comes with the model: it may raise anything
            if isinstance(value, str):
                raise
            raise DataError(f"{self.where(index)}: the chat template refuses the messages: {reason(error)}") from None
        if not ids:
            raise DataError(f"{self.where(index)}: the prompt has no tokens; remove the row")
        return ids

    def _fitting(self, index: int, ids: list[int]) -> list[int]:
        """The tokens, if the model can read them and write its completion. DataError otherwise."""
        limits = self._limits
        limits.check_tokens(ids, self._tokenizer, self.where(index))
        if limits.prompt_tokens is not None and len(ids) > limits.prompt_tokens:
            raise DataError(
                f"{self.where(index)}: the prompt has {len(ids)} tokens; the model's length leaves "
                f"{limits.prompt_tokens} beside {limits.setting}{f' ({limits.why})' if limits.why else ''}: "
                "lower it, set data.max_prompt_tokens, or remove the row"
            )
        return ids

    def _cut(self, index: int, ids: list[int]) -> list[int]:
        limit = self._max_prompt_tokens
        if limit is None or len(ids) <= limit:
            return ids
        self.truncated_rows.add(index)
        count = len(self.truncated_rows)
        if count & (count - 1) == 0:  # 1, 2, 4, 8, ...: says it at once, and not a thousand times
            logger.warning("data.max_prompt_tokens %d: %d prompts so far lost their first tokens", limit, count)
        return ids[-limit:]

    def _check_rows(self) -> tuple[bool, str]:
        """(True when the prompts are chats, the rows' digest). DataError names the first row that cannot be used."""
        column, table = self._prompt_column, self._table
        if column not in table.columns:
            raise DataError(no_column(table, column))
        digest = hashlib.blake2b(f"{table.digest} {len(table)} {table.columns}".encode(), digest_size=16)
        kinds = []
        for index, row in enumerate(_prompts_only(table, column)):
            kinds.append(_kind(table, index, row, column))
            digest.update(repr(row[column]).encode("utf-8", "replace"))
        if len(set(kinds)) > 1:
            odd = kinds.index(not kinds[0])
            raise DataError(
                f"{table.where(odd)}: prompts must be all strings or all messages; {table.where(0)} differs"
            )
        if not kinds[0]:
            _warn_of_written_messages(str(_prompts_only(table, column)[0][column]), f"{table.where(0)}: {column}")
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
        return has_messages, digest.hexdigest()


def load_prompts(
    cfg: DataConfig, role: Role, tokenizer: Any, limits: Limits = Limits(), tools: Sequence[dict[str, Any]] = ()
) -> PromptSet:
    """The training (`train`) or held-out (`eval`) prompts of a configuration.

    limits: of the model that reads them. tools: schemas that its chat template shows to it.
    """
    own = cfg.prompt_column, cfg.system_prompt, cfg.max_prompt_tokens, cfg.as_chat
    return PromptSet(open_table(cfg, role), tokenizer, *own, limits, tools)


def with_system_prompt(messages: Messages, system_prompt: str | None) -> Messages:
    """The messages, opened by the system prompt unless the row brings its own."""
    if system_prompt is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def encode(tokenizer: Any, value: str | Messages, tools: Sequence[dict[str, Any]] = ()) -> list[int]:
    """Token ids of a prompt, ready to be continued. tools: schemas for the chat template.

    Messages go through the chat template, opened for the assistant's answer (an assistant message at the end is
    continued). A string is tokenised as it is with the tokenizer's own special tokens, without an EOS at its end; a
    BOS that the string brings is not doubled.
    """
    if isinstance(value, str):
        return without_extra_ends(tokenizer, value, list(tokenizer(value)["input_ids"]))
    answer_begun = value[-1]["role"] == "assistant"
    encoded = tokenizer.apply_chat_template(
        value,
        tools=list(tools) or None,
        add_generation_prompt=not answer_begun,
        continue_final_message=answer_begun,
        tokenize=True,
        return_dict=True,
    )
    return list(encoded["input_ids"])


def without_extra_ends(tokenizer: Any, text: str, ids: list[int]) -> list[int]:
    """The ids of a text without the EOS that the tokenizer added, or the BOS that it added before the text's own."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    bos_text, eos_text = str(tokenizer.bos_token), str(tokenizer.eos_token)
    if eos is not None and ids[-1:] == [eos]:
        is_doubled = ids[-2:] == [eos, eos] and not text.endswith(eos_text * 2)
        ids = ids[:-1] if is_doubled or not text.endswith(eos_text) else ids
    if bos is not None and ids[:2] == [bos, bos] and not text.startswith(bos_text * 2):
        ids = ids[1:]
    return ids


def _prompts_only(table: Table, column: str) -> Sequence[Row]:
    """The rows with nothing but the prompt: images, audio and the like are not decoded for the check."""
    select = getattr(table.rows, "select_columns", None)
    rows: Any = select([column]) if select is not None else table.rows
    return rows


def _kind(table: Table, index: int, row: Row, column: str) -> bool:
    """True for chat messages, False for a string."""
    value = row.get(column)
    where = table.where(index)
    if isinstance(value, Undecoded):
        value = _decoded(value, f"{where}: {column}")
    if isinstance(value, str):
        if not value:
            raise DataError(f"{where}: {column} is an empty string; remove the row")
        _check_text(value, f"{where}: {column}")
        return False
    if value is None:
        missing = "is null" if column in row else f"is missing; the row has {', '.join(row) or 'nothing'}"
        raise DataError(f"{where}: {column} {missing}; give it a value or remove the row")
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {column} must be a string or a list of messages, not {shown_value(value)}")
    for number, message in enumerate(value):
        _check_message(message, f"{where}: message {number} of {column}")
    return True


def _decoded(value: Undecoded, what: str) -> Any:
    try:
        return value.decode()
    except Exception as error:  # decoders raise what they like
        raise DataError(f"{what} cannot be read ({reason(error)}); fix or remove the row") from None


def _check_message(message: Any, what: str) -> None:
    """DataError when it is not a message of text. what: the message in errors."""
    is_one = isinstance(message, dict) and isinstance(message.get("role"), str)
    if not is_one or not ("content" in message or message.get("tool_calls")):
        raise DataError(f"{what} needs role and content, not {shown_value(message)}")
    content = plain_message(message).get("content")
    if content is None:
        raise DataError(f"{what} has no content")
    if isinstance(content, list):
        raise DataError(f"{what} has parts that are not text: {shown_value(content)}; the model reads text only")
    if not isinstance(content, str):
        raise DataError(f"{what} has content that is not text: {shown_value(content)}; give a string")
    _check_text(content, what)


def _warn_of_written_messages(text: str, what: str) -> None:
    """A data set of chats that was saved as CSV has text in the place of lists."""
    if text.startswith("[{") and "role" in text and "content" in text:
        logger.warning("%s is messages written as text, and read as text; give lists, in JSONL or Parquet", what)


def _check_text(text: str, what: str) -> None:
    """JSON can spell half of a UTF-16 pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{what} has a lone surrogate at character {error.start}; fix or remove the row") from None
