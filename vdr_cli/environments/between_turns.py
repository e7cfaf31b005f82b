"""Tokens between two turns of the policy: what a chat template puts around an environment's messages.

They are found from a conversation of the row's prompt, one assistant message with a text that stands nowhere else, and
the reply: whatever the template writes behind that text is appended to the tokens that were sampled. Nothing that was
sampled is ever tokenised again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

from vdr_cli.errors import ConfigError
from vdr_cli.samples import Messages
from vdr_cli.system.text import reason, storable

logger = logging.getLogger(__name__)

SENTINEL = "@@assistant@@"
THOUGHT = "@@thought@@"
REMEMBERED = 1024
"""Pairs of a prompt and replies whose tokens are kept. In a group of games the same answers return again and again."""


class BetweenTurns(Protocol):
    def ids(self, prompt: Any, replies: Messages, last: int) -> list[int]:
        """Tokens from the end of a turn to the beginning of the next. last: the last token sampled.

        prompt: the episode's, a string or messages.
        """
        ...


class PlainText:
    """Prompts that are strings: the reply's own tokens and nothing else."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def ids(self, prompt: Any, replies: Messages, last: int) -> list[int]:
        text = "".join(message["content"] for message in replies)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


class ChatTemplate:
    """Prompts that are messages."""

    def __init__(self, tokenizer: Any, eos_ids: Sequence[int], schemas: list[dict[str, Any]], role: str) -> None:
        """role: of replies, user or tool. Raises ConfigError when the template cannot place them."""
        self.tokenizer, self.eos_ids, self.tools = tokenizer, frozenset(eos_ids), schemas or None
        self._known: dict[str, list[int]] = {}
        for each in ["tool"] * bool(schemas) + ["user"] * (role == "user"):
            self._probe(each)

    def ids(self, prompt: Messages, replies: Messages, last: int) -> list[int]:
        key = repr((prompt, replies))
        if key not in self._known:
            if len(self._known) == REMEMBERED:
                self._known.clear()
            self._known[key] = self._between(prompt, replies)
        ids = self._known[key]
        # The template closes the assistant's turn; the policy has done so already when it sampled an end token.
        return ids[1:] if last in self.eos_ids and ids[:1] and ids[0] in self.eos_ids else list(ids)

    def _between(self, prompt: Messages, replies: Messages) -> list[int]:
        """Tokens that the template writes behind the assistant's words, the end of the turn included."""
        whole = self._text([*prompt, {"role": "assistant", "content": SENTINEL}, *replies])
        _, found, between = whole.rpartition(SENTINEL)
        if not found:
            raise ConfigError("the chat template leaves out the assistant's words when a reply follows them")
        return list(self.tokenizer(between, add_special_tokens=False)["input_ids"])

    def written(self, messages: Messages, opened: bool) -> str:
        """The conversation as the model reads it. opened: it ends with the beginning of the assistant's next turn."""
        return str(
            self.tokenizer.apply_chat_template(messages, tools=self.tools, add_generation_prompt=opened, tokenize=False)
        )

    def _text(self, messages: Messages) -> str:
        return self.written(messages, opened=True)

    def _probe(self, role: str) -> None:
        """Place a reply of this role once, and say it when the template would rewrite what stands before it."""
        start: Messages = [{"role": "user", "content": "question"}]
        said = reply(role, "answer")
        try:
            before = self._text(start)
            if self.tools and before == str(
                self.tokenizer.apply_chat_template(start, add_generation_prompt=True, tokenize=False)
            ):
                raise ConfigError(
                    "the chat template does not show tools to the model: take a model whose template does, or an "
                    "environment with respond(messages)"
                )
            after = self._text([*start, {"role": "assistant", "content": SENTINEL}, said])
            self.ids(start, [said], -1)
        except ConfigError:
            raise
        except Exception as error:  # a template is a program that comes with the model: it may raise anything
            raise ConfigError(
                f"the chat template rejects a message of role {role} after the assistant's: {reason(error)}"
            ) from None
        thought = f"<think>\n{THOUGHT}\n</think>\n\n{SENTINEL}"
        with_thought = self._text([*start, {"role": "assistant", "content": thought}, said])
        history = after.rpartition(SENTINEL)[0]
        if THOUGHT not in with_thought:
            what = "removes <think> from earlier turns"
        elif not (history.startswith(before) or before.startswith(history)):
            what = "changes what stands before a turn once it is answered"
        else:
            return
        logger.warning(
            "the chat template %s; episodes keep every turn as it was sampled, and the model is trained on that", what
        )


def reply(role: str, content: str, name: str = "tool", number: int = 0) -> dict[str, str]:
    """A message of the environment: a user's words, or a tool's result with the name and id that templates ask for.

    Halves of surrogate pairs, which no tokenizer takes, become U+FFFD.
    """
    if role == "user":
        return {"role": "user", "content": storable(content)}
    return {"role": "tool", "name": storable(name), "tool_call_id": f"{number:09d}", "content": storable(content)}
