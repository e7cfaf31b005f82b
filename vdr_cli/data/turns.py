"""An episode's messages beside the tokens of its turns, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any


@dataclass(frozen=True)
class ShownTurn:
    """One message, and the places of its tokens in the completion where the policy sampled them."""

    role: str
    text: str
    tokens: range | None = None
    """None: the message is not the policy's, or its tokens are not known."""


def shown_turns(messages: Any, policy: Sequence[bool]) -> list[ShownTurn]:
    """The messages of a completion of several turns; none when it is one answer.

    policy: True where a token of the completion is the policy's; each stretch of them is one of its messages. Where the
    numbers of stretches and messages differ, no tokens are given.
    """
    if not _is_dialogue(messages):
        return []
    stretches, start = [], 0
    for is_own, run in groupby(map(bool, policy)):
        end = start + len(list(run))
        stretches += [range(start, end)] if is_own else []
        start = end
    said = sum(message.get("role") == "assistant" for message in messages)
    tokens = iter(stretches if len(stretches) == said else [])
    return [
        ShownTurn(
            str(message.get("role")),
            _text(message),
            next(tokens, None) if message.get("role") == "assistant" else None,
        )
        for message in messages
    ]


def _is_dialogue(messages: Any) -> bool:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return False
    return len(messages) > 1 or any(message.get("tool_calls") for message in messages)


def _text(message: dict[str, Any]) -> str:
    """The words of a message and the calls that stand beside them as objects."""
    calls = message.get("tool_calls") or []
    return (
        "\n".join([str(message.get("content") or ""), *map(str, calls)]).strip("\n")
        if calls
        else str(message.get("content"))
    )
