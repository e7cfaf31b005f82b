"""Tokens of completions of several turns: the assistant's, which are measured, and what stands between them.

As in training, every turn is tokenised on its own and the template's tokens are appended to it (docs/environments.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from vdr_cli.data.messages import BESIDE_CONTENT
from vdr_cli.environments.between_turns import SENTINEL, BetweenTurns, ChatTemplate, PlainText
from vdr_cli.scoring.cells import RowError
from vdr_cli.system.text import is_text, reason

AsIds = Any
"""A function from texts that follow something to their token ids."""


def turn_ids(
    tokenizer: Any,
    eos_ids: Sequence[int],
    as_ids: AsIds,
    prompt: str | list[dict[str, Any]],
    messages: Sequence[dict[str, Any]],
    tools: list[dict[str, Any]],
    last_ends: bool,
) -> tuple[list[int], list[bool]]:
    """Token ids of the messages after the prompt, and True where they are the assistant's.

    The token that ends a turn is the assistant's: every turn that is answered has it, the last one when `last_ends`.
    What follows the last turn is left out. Raises RowError for what template or tokenizer cannot take.
    """
    between = _between(tokenizer, eos_ids, prompt, tools)
    ids: list[int] = []
    mask: list[bool] = []
    before = [] if isinstance(prompt, str) else list(prompt)
    turns = list(_turns(messages))
    for number, (said, replies) in enumerate(turns):
        own = list(as_ids([_text(between, before, said)])[0])
        rest: list[int] = []
        if number + 1 < len(turns):
            rest = _placed(between, prompt, replies)
            if isinstance(between, ChatTemplate) and rest[:1] and rest[0] in between.eos_ids:
                own, rest = [*own, rest[0]], rest[1:]
        elif last_ends and own[-1:] != [tokenizer.eos_token_id]:
            own.append(tokenizer.eos_token_id)
        ids += own + rest
        mask += [True] * len(own) + [False] * len(rest)
        before += [said, *replies]
    return ids, mask


def _turns(messages: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each message of the assistant, with those that follow it."""
    starts = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    for at, end in zip(starts, [*starts[1:], len(messages)], strict=True):
        for message in messages[at:end]:
            content = message["content"]
            if not isinstance(content, str):
                raise RowError(f"a message of role {message['role']} holds {type(content).__name__}, not text")
            if not is_text(content):
                raise RowError(f"a message of role {message['role']} has half of a surrogate pair")
        yield messages[at], list(messages[at + 1 : end])


def _between(
    tokenizer: Any, eos_ids: Sequence[int], prompt: str | list[dict[str, Any]], tools: list[dict[str, Any]]
) -> BetweenTurns:
    if isinstance(prompt, str):
        return PlainText(tokenizer)
    template = ChatTemplate(tokenizer, eos_ids, [], "tool")
    template.tools = tools or None
    return template


def _placed(between: BetweenTurns, prompt: Any, replies: list[dict[str, Any]]) -> list[int]:
    try:
        return between.ids(prompt, replies, -1)
    except Exception as error:  # a template is a program that comes with the model: it may raise anything
        raise RowError(f"the chat template refuses the messages: {reason(error)}") from error


def _text(between: BetweenTurns, before: list[dict[str, Any]], said: dict[str, Any]) -> str:
    """The words of a turn: its content, or what the template makes of its calls and thoughts."""
    part = next((part for part in BESIDE_CONTENT if said.get(part)), None)
    if part is None:
        return str(said["content"])
    if not isinstance(between, ChatTemplate):
        raise RowError(f"the assistant's message has {part}, which needs a chat template: give the prompt as messages")
    try:
        opened = between.written(before, opened=True)
        whole = between.written([*before, said], opened=False)
        ending = between.written([*before, {"role": "assistant", "content": SENTINEL}], opened=False)
    except Exception as error:
        raise RowError(f"the chat template refuses the messages: {reason(error)}") from error
    if not whole.startswith(opened):
        raise RowError("the chat template rewrites what stands before a tool call: give token ids and policy_mask")
    return whole[len(opened) :].removesuffix(ending.rpartition(SENTINEL)[2])
