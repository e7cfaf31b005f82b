"""The parts of a row: prompt, completion, token ids, wherever they lie in its columns."""

from __future__ import annotations

import json
from typing import Any

from vdr_cli.data.messages import BESIDE_CONTENT, plain_messages
from vdr_cli.scoring.request import Fields
from vdr_cli.system.text import shown_value

MESSAGES = "messages"
"""Column of a whole conversation, for rows without a completion."""
POLICY_MASK = "policy_mask"
"""Column that `vdr train` saves beside the ids of several turns."""
TOOLS = "tools"
"""Column of the schemas that the chat template shows to the model."""


class RowError(Exception):
    """The reason that a row cannot be used: what `--on-error` decides about."""


def prompt_value(values: dict[str, Any], fields: Fields) -> str | list[dict[str, Any]]:
    """The prompt of a row, a string or messages. Knows the sample logs of lm-evaluation-harness."""
    if (conversation := whole_conversation(values, fields)) is not None:
        return conversation[0]
    found = value_at(values, fields.prompt)
    if found is None and is_lm_eval(values):
        arguments = _parsed(values["arguments"])
        found = value_at(arguments, "gen_args_0.arg_0") if isinstance(arguments, dict) else value_at(arguments, "0.0")
    if found is None:
        raise RowError(_missing(fields.prompt, values, "--prompt-column"))
    messages = _messages(found)
    if isinstance(found, str):
        return messages or found
    if not messages:
        raise RowError(f"{fields.prompt} must be a string or a list of messages with role and content")
    return messages


def completion_value(values: dict[str, Any], fields: Fields) -> str | list[dict[str, Any]]:
    """The completion of a row: a string, also from one assistant message, or the messages of several turns."""
    if (conversation := whole_conversation(values, fields)) is not None:
        return conversation[1]
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
    messages = _messages(found)
    is_assistant = bool(messages) and messages[0]["role"] == "assistant"
    if isinstance(found, str) and not is_assistant:
        return found
    if not messages or (len(messages) > 1 and not is_assistant):
        raise RowError(f"{fields.completion} must be a string or messages, the first of them the assistant's")
    if len(messages) > 1 or any(messages[0].get(part) for part in BESIDE_CONTENT):
        return messages
    text = messages[0]["content"]
    if not isinstance(text, str):
        raise RowError(f"{fields.completion} must be text, not {shown_value(text)}")
    return text


def whole_conversation(
    values: dict[str, Any], fields: Fields
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]] | None:
    """The column `messages`, split before the assistant's first words; None when the row has a completion beside it.

    Raises RowError when it is no conversation of a user and an assistant.
    """
    given = _parsed(values.get(MESSAGES))
    if given is None or any(value_at(values, name) is not None for name in (fields.completion, fields.completion_ids)):
        return None
    messages = _messages(given)
    if not messages:
        raise RowError(f"{MESSAGES} must be a list of messages with role and content")
    first = next((at for at, message in enumerate(messages) if message["role"] == "assistant"), None)
    if first is None:
        raise RowError(f"{MESSAGES} has no message of the assistant: there is nothing to score")
    if first == 0:
        raise RowError(f"{MESSAGES} begins with the assistant: a completion needs something to follow")
    return messages[:first], messages[first:]


def policy_mask(values: dict[str, Any], count: int) -> list[bool] | None:
    """True at those of the row's `count` completion ids that the policy wrote; None without a mask. Raises RowError."""
    given = _parsed(values.get(POLICY_MASK))
    if given is None:
        return None
    if not isinstance(given, list) or len(given) != count or not all(each in (0, 1) for each in given):
        raise RowError(f"{POLICY_MASK} must be a list of {count} booleans, one for each of the completion's ids")
    return [bool(each) for each in given]


def tools_of(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The schemas in the row's column `tools`, for the chat template; none without it. Raises RowError."""
    given = _parsed(values.get(TOOLS))
    if given is None:
        return []
    if not isinstance(given, list) or not all(isinstance(each, dict) for each in given):
        raise RowError(f"{TOOLS} must be a list of JSON schemas of functions")
    return given


def value_at(values: Any, path: str) -> Any:
    """The column of this name, else what a path such as resps.0.0 leads to; None when there is nothing."""
    if isinstance(values, dict) and path in values:
        return values[path]
    for step in path.split("."):
        if isinstance(values, str) and values.startswith(("{", "[")):  # a CSV cell, or an object in our Parquet
            values = json_or(values, None)
        if isinstance(values, dict):
            values = values.get(step)
        elif isinstance(values, list) and step.isdigit() and int(step) < len(values):
            values = values[int(step)]
        else:
            return None
    return values


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
    return json_or(value, value) if isinstance(value, str) and value.startswith(("{", "[")) else value


def _messages(value: Any) -> list[dict[str, Any]]:
    """The messages, or the one, also those that a CSV cell spells; none when one has no role or nothing to say."""
    if isinstance(value, str) and value.startswith(('[{"', '{"')):
        value = json_or(value, None)
    messages = plain_messages([value] if isinstance(value, dict) else value)
    usable = all(isinstance(message.get("role"), str) and "content" in message for message in messages or [])
    return messages if messages and usable else []


def _missing(name: str, values: dict[str, Any], flag: str) -> str:
    state = "is null" if name in values else f"is missing (there are: {', '.join(values) or 'none'})"
    return f"{name} {state}; name the right column with {flag}"


def json_or(text: str, otherwise: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return otherwise
