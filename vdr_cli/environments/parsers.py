"""Tool calls in the text of a turn: the forms of Qwen and Hermes, Llama 3 and Mistral, or a parser of one's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vdr_cli.errors import ConfigError
from vdr_cli.rewards.loading import find_function, one_line


@dataclass(frozen=True)
class ToolCall:
    """One call that the model has asked for."""

    name: str
    arguments: dict[str, Any]


class UnreadableCallError(Exception):
    """The text asks for a call in a form that cannot be read; the message goes back to the model."""


Parser = Callable[[str], list[ToolCall]]
"""The calls in a turn's text, special tokens included; none: the turn is an answer. Raises UnreadableCallError."""


def hermes(text: str) -> list[ToolCall]:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of them."""
    calls = []
    for part in text.split("<tool_call>")[1:]:
        body, end, _ = part.partition("</tool_call>")
        if not end:
            raise UnreadableCallError("a <tool_call> has no </tool_call>")
        calls.append(_call(_json(body)))
    return calls


def llama3(text: str) -> list[ToolCall]:
    """The whole turn is `{"name": ..., "parameters": {...}}`, perhaps after <|python_tag|>; several with ; between."""
    body = text.strip()
    marked = body.startswith("<|python_tag|>")
    body = body.removeprefix("<|python_tag|>").strip()
    if not marked and not (body.startswith("{") and '"name"' in body):
        return []
    decoder, calls = json.JSONDecoder(), []
    while body:
        with _json_errors():
            value, end = decoder.raw_decode(body)
        calls.append(_call(value))
        body = body[end:].strip().removeprefix(";").strip()
    return calls


def mistral(text: str) -> list[ToolCall]:
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, or `[TOOL_CALLS]name[ARGS]{...}` for each call."""
    _, mark, body = text.partition("[TOOL_CALLS]")
    if not mark:
        return []
    if "[ARGS]" in body:
        parts = [part.partition("[ARGS]") for part in body.split("[TOOL_CALLS]")]
        return [_call({"name": name.strip(), "arguments": _json(arguments)}) for name, _, arguments in parts]
    value = _json(body)
    return [_call(each) for each in (value if isinstance(value, list) else [value])]


PARSERS: dict[str, Parser] = {"hermes": hermes, "llama3": llama3, "mistral": mistral}


def parser_of(given: str, template: str) -> Parser:
    """The parser that rollout.tool_parser names; "auto": the one whose form the chat template writes.

    ConfigError when there is none.
    """
    if given in PARSERS:
        return PARSERS[given]
    if given != "auto":
        return _own(given)
    if "[TOOL_CALLS]" in template:
        return mistral
    is_xml = any(mark in template for mark in ("<function=", "<arg_key>"))  # of Qwen3-Coder and GLM-4.5
    if "<tool_call>" in template and not is_xml:
        return hermes
    if not is_xml and ("python_tag" in template or '"parameters"' in template):
        return llama3
    raise ConfigError(
        "rollout.tool_parser is auto, but the chat template shows none of the known forms of a call; set it to hermes, "
        "llama3, mistral or file.py:function"
    )


def is_unfinished(text: str) -> bool:
    """True when a turn that was cut has begun a tool call and not ended it."""
    if text.rfind("<tool_call>") > text.rfind("</tool_call>"):
        return True
    for parse in (llama3, mistral):
        try:
            parse(text)
        except UnreadableCallError:
            return True
    return False


def load_named(given: str, key: str, what: str) -> Any:
    """The function or class that a setting names by file or module; a bare name would be a built-in reward function.

    what: the kind of thing, as the message calls it. ConfigError when there is none.
    """
    if ":" not in given:
        raise ConfigError(f"{key} {given}: give file.py:{what} or module:{what}")
    return find_function(given, key)


def _own(given: str) -> Parser:
    """A user's function: text to a list of {"name", "arguments"}; what it raises goes back to the model."""
    function = load_named(given, "rollout.tool_parser", "function")

    def parse(text: str) -> list[ToolCall]:
        try:
            return [_call(each) for each in function(text) or []]
        except UnreadableCallError:
            raise
        except Exception as error:
            raise UnreadableCallError(one_line(error)) from error

    return parse


def _json(text: str) -> Any:
    with _json_errors():
        return json.loads(text)


@contextmanager
def _json_errors() -> Iterator[None]:
    """Exceptions of json go back to the model."""
    try:
        yield
    except RecursionError:
        raise UnreadableCallError("it is not JSON: nested too deep") from None
    except ValueError as error:
        raise UnreadableCallError(f"it is not JSON: {error}") from None


def _call(value: Any) -> ToolCall:
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise UnreadableCallError('it must be an object with "name" and "arguments"')
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _json(arguments)
    if not isinstance(arguments, Mapping):
        raise UnreadableCallError('"arguments" must be an object')
    return ToolCall(value["name"], dict(arguments))
