"""Chat messages as data sets bring them, in the plain form that chat templates and reward functions read."""

from __future__ import annotations

from typing import Any

BESIDE_CONTENT = ("tool_calls", "reasoning_content", "thinking")
"""Parts of an assistant's message that only a chat template can put into words."""


def plain_messages(value: Any) -> list[dict[str, Any]] | None:
    """The messages in a cell; None when it is not a list of objects."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return None
    return [plain_message(message) for message in value]


def plain_message(message: dict[str, Any]) -> dict[str, Any]:
    """The message without null entries, its content as one text where it consists of parts of text.

    Arrow gives every message the keys of all the others, null where it has none, and templates ask whether a key is
    there (`'tool_calls' in message`). A message that only calls tools has the content "".
    """
    plain: dict[str, Any] = _without_nulls(message)
    if plain.get("tool_calls"):
        plain.setdefault("content", "")
    content = plain.get("content")
    if isinstance(content, list) and all(_is_text(part) for part in content):
        plain["content"] = "".join(part["text"] for part in content)
    return plain


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value
