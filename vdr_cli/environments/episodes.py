"""Episodes of one rollout: an environment each, its messages, and the replies to the policy's turns."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from vdr_cli.config import RolloutConfig
from vdr_cli.data.prompts import Limits, encode
from vdr_cli.environments.between_turns import BetweenTurns, ChatTemplate, PlainText, reply
from vdr_cli.environments.contract import Contract
from vdr_cli.environments.parsers import Parser, ToolCall, UnreadableCallError, is_unfinished, parser_of
from vdr_cli.environments.workers import Call, Workers
from vdr_cli.errors import ConfigError, DataError, VdrError
from vdr_cli.rewards.calling import completion_texts
from vdr_cli.rewards.exiting import exit_is_an_error
from vdr_cli.rewards.loading import one_line
from vdr_cli.samples import Completions, Conversation, Messages, Prompt, Reply, Turn, Undecoded, own_copy
from vdr_cli.system.text import reason, storable

logger = logging.getLogger(__name__)


@dataclass
class Counts:
    """One episode in numbers."""

    turns: int = 0
    """The policy's turns."""
    calls: int = 0
    """Tool calls that could be read."""
    failures: int = 0
    """Calls that raised, were late, or named no tool or wrong arguments."""
    unreadable: int = 0
    """Turns whose calls could not be read."""
    cut_in_call: bool = False
    """A limit of tokens cut the episode in the middle of a tool call."""


PlayedTurn = tuple[list[int], bool, int, list[int] | None]
"""A turn's ids, whether it ended, the room that it left, and the ids of the reply, as a checkpoint keeps them."""


class Episodes(Protocol):
    """One rollout's completions, n for each prompt, with or without an environment."""

    prompts: list[Prompt]
    """As the model reads them."""

    @property
    def conversation(self) -> Conversation | None: ...

    @property
    def environments(self) -> list[Any] | None:
        """(B,) for reward functions; None without an environment."""
        ...

    @property
    def counts(self) -> list[Counts] | None:
        """(B,); None without an environment or tools."""
        ...

    def texts(self, rows: Sequence[int], completions: Completions) -> list[str] | list[Messages]:
        """The completions of these rows as reward functions see them: strings, or their messages."""
        ...

    def history(self) -> list[list[PlayedTurn]]:
        """(B,) the turns of each episode so far; empty without an environment or tools."""
        ...

    def replay(self, history: Sequence[Sequence[PlayedTurn]]) -> None:
        """Play these turns again: the environments are then where they were. DataError when they answer otherwise."""
        ...

    def close(self) -> None:
        """Close the environments. A second call does nothing."""
        ...


class OneTurn:
    """Completions that are one answer each."""

    conversation: None = None
    environments: None = None
    counts: None = None

    def __init__(self, tokenizer: Any, prompts: list[Prompt], n: int) -> None:
        self.tokenizer, self.prompts, self.n = tokenizer, prompts, n

    def texts(self, rows: Sequence[int], completions: Completions) -> list[str] | list[Messages]:
        return completion_texts(self.tokenizer, [self.prompts[row // self.n] for row in rows], completions)

    def history(self) -> list[list[PlayedTurn]]:
        return []

    def replay(self, history: Sequence[Sequence[PlayedTurn]]) -> None:
        return

    def close(self) -> None:
        return


class Environments:
    """A run's environment class and tools, and the episodes that are open."""

    def __init__(
        self, contract: Contract, tokenizer: Any, cfg: RolloutConfig, has_messages: bool, limits: Limits
    ) -> None:
        """has_messages: prompts are chats. limits: of the model. ConfigError when the chat template does not fit."""
        self.contract, self.tokenizer, self.cfg, self.limits = contract, tokenizer, cfg, limits
        self.workers = Workers()
        self.parse: Parser | None = None
        self.between: BetweenTurns = PlainText(tokenizer)
        self._open: list[ManyTurns] = []
        if contract.tools and not has_messages:
            raise ConfigError(
                f"{'rollout.tools' if cfg.tools else f'rollout.environment {contract.name}'}: tools are offered "
                "through the chat template, and the prompts are plain strings: set data.as_chat"
            )
        if contract.tools:
            self.parse = parser_of(cfg.tool_parser, str(tokenizer.chat_template))
        if has_messages:
            role = "user" if contract.responds else "tool"
            self.between = ChatTemplate(tokenizer, [tokenizer.eos_token_id], contract.schemas, role)

    def end_with(self, eos_ids: Sequence[int]) -> None:
        """The tokens that end a turn of the model."""
        if isinstance(self.between, ChatTemplate):
            self.between.eos_ids = frozenset(eos_ids)

    def begin(self, prompts: Sequence[Prompt], n: int) -> ManyTurns:
        """n episodes of each prompt, reset. DataError, naming the row, for an environment that fails."""
        episodes = ManyTurns(self, prompts, n)
        self._open = [each for each in self._open if not each.is_closed] + [episodes]
        episodes.reset()
        return episodes

    def close(self) -> None:
        """Close whatever is still open."""
        for each in self._open:
            each.close()
        self.workers.close()

    def call(self, calls: Sequence[Call], method: str, prompts: Sequence[Prompt]) -> list[Any]:
        """Return values of a method of the environments. DataError, naming the row, when one raises or hangs."""
        timeout = self.cfg.tool_timeout
        self.workers.run(calls, timeout)
        for call, prompt in zip(calls, prompts, strict=True):
            where = f"rollout.environment {self.contract.name}: {method}"
            if call.is_late:
                raise DataError(
                    f"{where} had not returned after {timeout:g} s on dataset row {prompt.row}; fix it or raise "
                    "rollout.tool_timeout"
                )
            if call.error is not None:
                raise DataError(f"{where} raised on dataset row {prompt.row}: {one_line(call.error)}") from call.error
        return [call.value for call in calls]


@dataclass
class _Episode:
    prompt: Prompt
    environment: Any
    messages: Messages = field(default_factory=list)
    """The messages after the prompt."""
    counts: Counts = field(default_factory=Counts)
    played: list[PlayedTurn] = field(default_factory=list)


class ManyTurns:
    """Episodes of several turns: the `Conversation` of one rollout."""

    def __init__(self, owner: Environments, prompts: Sequence[Prompt], n: int) -> None:
        self.owner, self.n, self.is_closed = owner, n, False
        self.prompts = list(prompts)
        self._episodes: list[_Episode] = []
        cls = owner.contract.environment
        for prompt in prompts:
            self._episodes += [_Episode(prompt, None if cls is None else _made(owner, cls)) for _ in range(n)]

    @property
    def conversation(self) -> Conversation:
        return self

    @property
    def environments(self) -> list[Any] | None:
        """(B,) one per episode; None where there are only tools."""
        return None if self.owner.contract.environment is None else [each.environment for each in self._episodes]

    @property
    def counts(self) -> list[Counts]:
        return [each.counts for each in self._episodes]

    def texts(self, rows: Sequence[int], completions: Completions) -> list[Messages]:
        return [self._episodes[row].messages for row in rows]

    def reset(self) -> None:
        """Begin every episode; what reset returns is appended to the prompt, as in TRL."""
        if self.owner.contract.environment is None:
            return
        calls = [Call(each.environment.reset, _reset_arguments(each)) for each in self._episodes]
        said = self.owner.call(calls, "reset", [each.prompt for each in self._episodes])
        for index, prompt in enumerate(self.prompts):
            group = said[index * self.n : (index + 1) * self.n]
            self.prompts[index] = self._continued(prompt, group)
        for row, each in enumerate(self._episodes):
            each.prompt = self.prompts[row // self.n]

    def _continued(self, prompt: Prompt, said: Sequence[Any]) -> Prompt:
        """The prompt with what `reset` said to each of its episodes, which must be the same."""
        where, text = f"rollout.environment {self.owner.contract.name}: reset", said[0]
        if not all(isinstance(each, str | None) for each in said):
            odd = next(type(each).__name__ for each in said if not isinstance(each, str | None))
            raise DataError(f"{where} returned {odd} on dataset row {prompt.row}; return text, or None")
        if any(each != text for each in said):
            raise DataError(
                f"{where} gave different replies to episodes of dataset row {prompt.row}, and a group is compared with "
                "itself: make it depend on the row's columns alone (a seed column)"
            )
        if not text:
            return prompt
        value = _appended(prompt.value, storable(text))
        with _refusals(f"the opening of dataset row {prompt.row}"):
            ids = encode(self.owner.tokenizer, value, self.owner.contract.schemas)
        self.owner.limits.check_tokens(ids, self.owner.tokenizer, f"the opening of dataset row {prompt.row}")
        most = self.owner.limits.prompt_tokens
        if most is not None and len(ids) > most:
            raise DataError(
                f"{where} made the prompt of dataset row {prompt.row} {len(ids)} tokens long; the model's length "
                f"leaves {most}: say less there, or lower rollout.episode_tokens"
            )
        return replace(prompt, value=value, token_ids=ids)

    def replies(self, turns: Sequence[Turn]) -> list[Reply]:
        """Append each turn to its episode, call what it asks for, and return what the model reads next."""
        episodes = [self._episodes[turn.row] for turn in turns]
        for turn, episode in zip(turns, episodes, strict=True):
            self._take(turn, episode)
        said: dict[int, Messages] = {}
        asked: dict[int, list[ToolCall]] = {}
        for index, (turn, episode) in enumerate(zip(turns, episodes, strict=True)):
            if not turn.ended:
                continue
            try:
                if calls := self._calls(turn):
                    asked[index] = calls
            except UnreadableCallError as error:
                episode.counts.unreadable += 1
                said[index] = [reply("tool", str({"error": f"the tool call cannot be read: {error}"}))]
        said |= self._call_tools(asked, episodes)
        said |= self._respond([i for i, turn in enumerate(turns) if turn.ended and i not in said], episodes)
        replies = [self._reply(turn, episodes[i], said.get(i)) for i, turn in enumerate(turns)]
        for turn, episode, answer in zip(turns, episodes, replies, strict=True):
            episode.played.append((turn.ids, turn.ended, turn.room, answer.ids))
        return replies

    def history(self) -> list[list[PlayedTurn]]:
        return [each.played for each in self._episodes]

    def replay(self, history: Sequence[Sequence[PlayedTurn]]) -> None:
        for number in range(max(map(len, history), default=0)):
            again = [(row, played[number]) for row, played in enumerate(history) if len(played) > number]
            turns = [Turn(row, list(ids), ended, room) for row, (ids, ended, room, _) in again]
            for (row, (_, _, _, before)), now in zip(again, self.replies(turns), strict=True):
                if now.ids != before:
                    raise DataError(
                        f"rollout.environment {self.owner.contract.name}: it replied differently when the checkpoint's "
                        f"episode of dataset row {self._episodes[row].prompt.row} was played again; make it depend on "
                        "the row's columns alone (a seed column), or resume with rollout.ahead 0"
                    )

    def _take(self, turn: Turn, episode: _Episode) -> None:
        text = self.owner.tokenizer.decode(turn.ids, skip_special_tokens=True)
        episode.messages.append({"role": "assistant", "content": text})
        episode.counts.turns += 1
        if not turn.ended and self.owner.parse is not None:
            episode.counts.cut_in_call = is_unfinished(self.owner.tokenizer.decode(turn.ids))

    def _calls(self, turn: Turn) -> list[ToolCall]:
        """The calls of a turn; its end token is no part of them."""
        if self.owner.parse is None:
            return []
        tokenizer = self.owner.tokenizer
        ids = turn.ids[:-1] if turn.ids[-1] in tokenizer.all_special_ids else turn.ids
        return self.owner.parse(tokenizer.decode(ids))

    def _call_tools(self, asked: dict[int, list[ToolCall]], episodes: Sequence[_Episode]) -> dict[int, Messages]:
        """Results as messages. Calls of one episode run one after another, those of several beside each other."""
        said: dict[int, Messages] = {index: [] for index in asked}
        for number in range(max(map(len, asked.values()), default=0)):
            now = {index: calls[number] for index, calls in asked.items() if len(calls) > number}
            made = {index: self._made_call(call, episodes[index]) for index, call in now.items()}
            self.owner.workers.run(
                [call for call in made.values() if isinstance(call, Call)], self.owner.cfg.tool_timeout
            )
            for index, call in made.items():
                text, failed = self._result(call)
                episodes[index].counts.calls += 1
                episodes[index].counts.failures += failed
                said[index].append(reply("tool", text, now[index].name, number))
        return said

    def _made_call(self, asked: ToolCall, episode: _Episode) -> Call | str:
        """The call, or why it cannot be made."""
        tool = next((tool for tool in self.owner.contract.tools if tool.name == asked.name), None)
        if tool is None:
            return f"Tool {asked.name} not found."
        return Call(tool.function or getattr(episode.environment, tool.name), asked.arguments)

    def _result(self, call: Call | str) -> tuple[str, bool]:
        """(text for the model, True when the call failed)."""
        if isinstance(call, str):
            return str({"error": call}), True
        if call.is_late:
            return str({"error": f"no result after {self.owner.cfg.tool_timeout:g} s"}), True
        if call.error is not None:
            return str({"error": str(call.error) or type(call.error).__name__}), True
        try:
            return str(call.value), False
        except Exception as error:  # a value's own __str__, or an integer of too many digits
            return str({"error": one_line(error)}), True

    def _respond(self, waiting: Sequence[int], episodes: Sequence[_Episode]) -> dict[int, Messages]:
        """The environments' answers to turns without tool calls; an episode that is over has no entry."""
        if not waiting or not self.owner.contract.responds:
            return {}
        own = [episodes[index] for index in waiting]
        calls = [Call(functools.partial(each.environment.respond, _history(each))) for each in own]
        answers = self.owner.call(calls, "respond", [each.prompt for each in own])
        for answer, each in zip(answers, own, strict=True):
            if not isinstance(answer, str | None):
                raise DataError(
                    f"rollout.environment {self.owner.contract.name}: respond returned {type(answer).__name__} on "
                    f"dataset row {each.prompt.row}; return text, or None to end the episode"
                )
        return {i: [reply("user", text)] for i, text in zip(waiting, answers, strict=True) if text is not None}

    def _reply(self, turn: Turn, episode: _Episode, said: Messages | None) -> Reply:
        if said is None:
            return Reply(None)
        if episode.counts.turns >= self.owner.cfg.max_turns:
            return Reply(None, truncated=True)
        where = f"the reply on dataset row {episode.prompt.row}"
        with _refusals(where):
            ids = self.owner.between.ids(episode.prompt.value, said, turn.ids[-1])
        self.owner.limits.check_tokens(ids, self.owner.tokenizer, where)
        if len(ids) >= turn.room:
            return Reply(None, truncated=True)
        episode.messages += said
        return Reply(ids)

    def close(self) -> None:
        if self.is_closed:
            return
        self.is_closed = True
        closing = [each for each in self._episodes if callable(getattr(each.environment, "close", None))]
        calls = [Call(each.environment.close) for each in closing]
        self.owner.workers.run(calls, self.owner.cfg.tool_timeout)
        failed = next((call for call in calls if call.error is not None or call.is_late), None)
        if failed is not None:
            why = "it hangs" if failed.error is None else one_line(failed.error)
            logger.warning("rollout.environment %s: close failed: %s", self.owner.contract.name, why)


@contextmanager
def _refusals(where: str) -> Iterator[None]:
    """A chat template's exceptions become DataError."""
    try:
        yield
    except VdrError:
        raise
    except Exception as error:  # a template is a program that comes with the model: it may raise anything
        raise DataError(f"{where}: the chat template refuses the messages: {reason(error)}") from error


def _made(owner: Environments, cls: Callable[[], Any]) -> Any:
    try:
        with exit_is_an_error():
            return cls()
    except (Exception, SystemExit) as error:
        raise DataError(
            f"rollout.environment {owner.contract.name}: its constructor raised: {one_line(error)}"
        ) from error


def _reset_arguments(episode: _Episode) -> dict[str, Any]:
    """The row's columns and its prompt, as far as reset has parameters for them, for this episode to change."""
    columns = {"prompt": episode.prompt.value, **episode.prompt.columns}
    plain = {name: own_copy(value) for name, value in columns.items() if not isinstance(value, Undecoded)}
    parameters = inspect.signature(episode.environment.reset).parameters
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return plain
    return {name: value for name, value in plain.items() if name in parameters}


def _history(episode: _Episode) -> Messages:
    """The conversation so far, a copy."""
    value = episode.prompt.value
    start: Messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    return [dict(message) for message in [*start, *episode.messages]]


def _appended(value: str | Messages, text: str) -> str | Messages:
    """A prompt with more text at the end of the user's words."""
    if isinstance(value, str):
        return value + text
    last = value[-1]
    if last["role"] == "user":
        return [*value[:-1], {**last, "content": last["content"] + text}]
    return [*value, {"role": "user", "content": text}]
