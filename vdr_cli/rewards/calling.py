"""Calling reward functions on a batch: time limits, checks, and errors that name function and row."""

from __future__ import annotations

import asyncio
import faulthandler
import inspect
import math
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vdr_cli.errors import DataError
from vdr_cli.rewards.base import PROVIDED, LoadedReward, RefusedMessagesError, TrainerState, listed
from vdr_cli.rewards.exiting import exit_is_an_error
from vdr_cli.rewards.loading import one_line
from vdr_cli.rewards.logs import CallLog
from vdr_cli.rewards.main_thread import need_of, noticing_attempts
from vdr_cli.samples import Completions, Messages, Prompt, Undecoded, own_copy
from vdr_cli.system.event_loop import event_loop, leave_event_loop

LARGEST = float(torch.finfo(torch.float32).max)  # advantages are float32
SEARCH_SECONDS = 10.0  # most time spent on finding the row on which a function raises


@dataclass
class _Call:
    """One call of one function, which ends with a value or an error, if it ends."""

    reward: LoadedReward
    arguments: dict[str, Any]
    value: Any = None
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)

    log: CallLog = field(default_factory=CallLog)
    """Record of its calls of log_extra and log_metric."""
    attempts: list[str] = field(default_factory=list)
    """Functions of `signal` that it called although only a main thread may."""

    def start(self) -> None:
        """Call it on a daemon thread, which cannot keep the process alive when the call hangs."""
        if self.reward.is_async and not self._is_elsewhere:
            asyncio.run_coroutine_threadsafe(self._await(), event_loop())
            return
        context = (self.reward.context or Context()).copy()
        threading.Thread(target=context.run, args=(self._run,), name=self.reward.label, daemon=True).start()

    @property
    def needs_main_thread(self) -> str | None:
        """The feature that needs a main thread; None: nothing does."""
        return None if self._is_elsewhere else need_of(self.attempts, self.error)

    @property
    def _is_elsewhere(self) -> bool:
        return self.reward.own_process is not None and self.reward.own_process.is_used

    @property
    def _function(self) -> Callable[..., Any]:
        if self.reward.own_process is not None and self.reward.own_process.is_used:
            return self.reward.own_process
        return self.reward.function

    @property
    def _count(self) -> int:
        return len(self.arguments["completions"])

    def _accepted(self) -> dict[str, Any]:
        recorders = {"log_extra": self.log.log_extra, "log_metric": self.log.log_metric}
        return accepted_by(self.reward, self.arguments | recorders)

    def _run(self) -> None:
        try:
            with exit_is_an_error(), _thread_event_loop(), noticing_attempts() as self.attempts:
                value = self._function(**self._accepted())
                if inspect.iscoroutine(value):  # a plain function around an async one
                    value = asyncio.run(_awaited(value))
                self.value = listed(value, self._count)
        except BaseException as error:  # SystemExit too: it would end the thread without a word
            self.error = error
        self.done.set()

    async def _await(self) -> None:
        try:
            with exit_is_an_error(), noticing_attempts() as self.attempts:
                value = await self.reward.function(**self._accepted())
                self.value = listed(value, self._count)
        except BaseException as error:
            self.error = error
        self.done.set()


@contextmanager
def _thread_event_loop() -> Iterator[None]:
    """An event loop for functions that call asyncio.get_event_loop(), which makes one on a main thread alone."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        yield
    finally:
        asyncio.set_event_loop(None)
        loop.close()


async def _awaited(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return await coroutine


def completion_texts(tokenizer: Any, prompts: Sequence[Prompt], completions: Completions) -> list[str] | list[Messages]:
    """Each completion as reward functions get it: a string, or one assistant message when the prompt is a chat."""
    texts = tokenizer.batch_decode(completions.completion_token_ids(), skip_special_tokens=True)
    if any(not isinstance(prompt.value, str) for prompt in prompts):
        return [[{"role": "assistant", "content": text}] for text in texts]
    return texts  # type: ignore[no-any-return]


def compute_rewards(
    loaded: Sequence[LoadedReward],
    prompts: Sequence[Prompt],
    completions: Sequence[str] | Sequence[Messages],
    completion_ids: Sequence[Sequence[int]],
    timeout: float,
    trainer_state: TrainerState = TrainerState(),  # noqa: B008 - frozen
    environments: Sequence[Any] | None = None,
) -> Tensor:
    """Rewards of B completions by F functions, (B, F) float32; what the functions log is dropped (rewards_and_logs)."""
    given = prompts, completions, completion_ids, timeout, trainer_state, environments
    return rewards_and_logs(loaded, *given)[0]


def rewards_and_logs(
    loaded: Sequence[LoadedReward],
    prompts: Sequence[Prompt],
    completions: Sequence[str] | Sequence[Messages],
    completion_ids: Sequence[Sequence[int]],
    timeout: float,
    trainer_state: TrainerState,
    environments: Sequence[Any] | None,
) -> tuple[Tensor, list[CallLog]]:
    """Rewards of B completions by F functions, (B, F) float32, NaN where one returned None; and what each logged.

    prompts: one per completion. timeout: seconds for each function's call. environments: one per completion.
    Async functions are awaited together, the others run one after another, reward models on this thread and without
    a limit. Raises DataError, naming function and row, when one raises, hangs or returns what is not B numbers.
    """
    arguments = arguments_of(prompts, completions, completion_ids) | {"trainer_state": trainer_state}
    if environments is not None:
        arguments["environments"] = list(environments)
    calls = iter(_call_all([reward for reward in loaded if not reward.is_model], arguments, prompts, timeout))
    rewards = torch.empty(len(prompts), len(loaded), dtype=torch.float32)  # (B, F)
    logs = []
    for column, reward in enumerate(loaded):
        call = _Call(reward, arguments, _judged(reward, arguments, prompts)) if reward.is_model else next(calls)
        rewards[:, column] = torch.tensor(_checked(reward, call.value, prompts), dtype=torch.float32)
        logs.append(_checked_log(call, prompts))
    return rewards, logs


def _judged(reward: LoadedReward, arguments: dict[str, Any], prompts: Sequence[Prompt]) -> Any:
    """A reward model's answer. DataError, with the row, when its chat template refuses one."""
    try:
        return reward.function(**arguments)
    except RefusedMessagesError as error:
        row = prompts[error.index].row
        raise DataError(f"{reward.label}: its chat template refuses dataset row {row}: {error}") from error


def call_all(
    loaded: Sequence[LoadedReward], arguments: dict[str, Any], prompts: Sequence[Prompt], timeout: float
) -> list[Any]:
    """Return values of the functions, iterables as lists. DataError when one raises or hangs, with function and row.

    arguments: as arguments_of makes them for these prompts, one per completion. timeout: seconds for each call.
    """
    return [call.value for call in _call_all(loaded, arguments, prompts, timeout)]


def _call_all(
    loaded: Sequence[LoadedReward], arguments: dict[str, Any], prompts: Sequence[Prompt], timeout: float
) -> list[_Call]:
    calls = [_Call(reward, arguments) for reward in loaded]
    for call in calls:
        if not call.reward.is_async:
            with ended_without_the_interpreter(timeout):
                _wait([call], prompts, timeout)
    _wait([call for call in calls if call.reward.is_async], prompts, timeout)
    calls = [_moved(call, prompts, timeout) if call.needs_main_thread else call for call in calls]
    for call in calls:
        _raise_error(call, prompts, timeout)
    return calls


@contextmanager
def ended_without_the_interpreter(timeout: float) -> Iterator[None]:
    """A function that never lets go of the interpreter (a runaway regular expression) stops every Python thread, and
    with them our clock. A thread in C ends the process then, and leaves on stderr where it was."""
    if sys.__stderr__ is not None:
        faulthandler.dump_traceback_later(min(timeout + SEARCH_SECONDS, 1e6), exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def accepted_by(reward: LoadedReward, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that the function takes; images, audio and video only for a parameter of the column's name.

    Raises RuntimeError, naming the column, when one cannot be decoded.
    """
    given = {}
    for name, values in reward.accepted(arguments).items():
        if not (isinstance(values, list) and any(isinstance(value, Undecoded) for value in values)):
            given[name] = values
        elif reward.asks_for(name):
            given[name] = _decoded(name, values)
    return given


def _decoded(name: str, values: list[Any]) -> list[Any]:
    try:
        return [value.decode() if isinstance(value, Undecoded) else value for value in values]
    except Exception as error:  # decoders raise what they like
        raise RuntimeError(f"its column {name} cannot be decoded ({one_line(error)})") from error


def _moved(call: _Call, prompts: Sequence[Prompt], timeout: float) -> _Call:
    """The call once more, on the main thread of a process of its own. DataError when the function has none."""
    reward, need = call.reward, call.needs_main_thread
    if reward.own_process is None:
        raise DataError(
            f"{reward.label} needs the main thread ({need}), and reward functions are called on others; name it in "
            "rewards.functions and set rewards.processes=1, which calls it on a main thread"
        ) from call.error
    reward.own_process.start_for(reward.label, str(need))
    again = _Call(reward, call.arguments)
    with ended_without_the_interpreter(timeout):
        _wait([again], prompts, timeout)
    return again


def _wait(calls: list[_Call], prompts: Sequence[Prompt], timeout: float) -> None:
    """Start the calls and wait for all of them. DataError when one is not done in time."""
    deadline = time.monotonic() + timeout
    for call in calls:
        call.start()
    for call in calls:
        call.done.wait(deadline - time.monotonic())
    late = [call.reward.label for call in calls if not call.done.is_set()]
    if late:
        leave_event_loop()
        raise DataError(
            f"{' and '.join(late)} had not returned after {timeout:g} s on dataset {_rows(prompts)}; "
            "fix it or raise rewards.timeout"
        )


def _raise_error(call: _Call, prompts: Sequence[Prompt], timeout: float) -> None:
    """DataError, naming the row, when the call raised."""
    if call.error is not None:
        row = _failing_row(call, prompts, timeout)
        where = f"row {row}" if row is not None else _rows(prompts)
        message = f"{call.reward.label} raised on dataset {where}: {one_line(call.error)}"
        raise DataError(message) from call.error


def _failing_row(failed: _Call, prompts: Sequence[Prompt], timeout: float) -> int | None:
    """The row of the first completion on which the function raises alone; None when none is found."""
    deadline = time.monotonic() + min(timeout, SEARCH_SECONDS)
    for index, prompt in enumerate(prompts):
        single = {
            name: values[index : index + 1] if isinstance(values, list) else values
            for name, values in failed.arguments.items()
        }
        call = _Call(failed.reward, single)
        call.start()
        if not call.done.wait(deadline - time.monotonic()):
            return None
        if call.error is not None:
            return prompt.row
    return None


def arguments_of(
    prompts: Sequence[Prompt],
    completions: Sequence[str] | Sequence[Messages],
    completion_ids: Sequence[Sequence[int]],
) -> dict[str, list[Any]]:
    """Everything that a reward function may take, one list entry a completion, which it may change."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns if name not in PROVIDED)
    columns = {name: [own_copy(prompt.columns.get(name)) for prompt in prompts] for name in names}
    return {
        "prompts": [own_copy(prompt.value) for prompt in prompts],
        "completions": [own_copy(completion) for completion in completions],
        "completion_ids": [list(ids) for ids in completion_ids],
        **columns,
    }


def _checked(reward: LoadedReward, entries: Any, prompts: Sequence[Prompt]) -> list[float]:
    """The function's answer as B floats, NaN for None. DataError for anything else."""
    if not isinstance(entries, list):
        raise DataError(
            f"{reward.label} returned {_shown(entries)} on dataset {_rows(prompts)}, not a list of "
            f"{len(prompts)} numbers, one per completion"
        )
    if len(entries) != len(prompts):
        count = len(entries) if len(entries) < len(prompts) else f"more than {len(prompts)}"
        raise DataError(
            f"{reward.label} returned {count} rewards for {len(prompts)} completions of dataset "
            f"{_rows(prompts)}; it must return one per completion"
        )
    return [_number(reward, entry, prompt) for entry, prompt in zip(entries, prompts, strict=True)]


def _checked_log(call: _Call, prompts: Sequence[Prompt]) -> CallLog:
    for column, values in call.log.columns.items():
        if len(values) != len(prompts):
            raise DataError(
                f"{call.reward.label} logged {len(values)} values of the column {column} for {len(prompts)} "
                f"completions of dataset {_rows(prompts)}; log_extra takes one per completion"
            )
    return call.log


def _number(reward: LoadedReward, entry: Any, prompt: Prompt) -> float:
    if entry is None:
        return math.nan
    try:
        if isinstance(entry, str):
            raise TypeError
        value = float(entry)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        value = math.nan
    if abs(value) <= LARGEST:
        return value
    raise DataError(
        f"{reward.label} returned {_shown(entry)} for a completion of dataset row {prompt.row}; "
        "it must return a finite number (float32), or None to skip the completion"
    )


def _shown(value: Any) -> str:
    text = "".join(character if character.isprintable() else "?" for character in repr(value))
    return text if len(text) <= 60 else text[:57] + "..."


def _rows(prompts: Sequence[Prompt]) -> str:
    """`row 3`, or `rows 3, 5, 9 and 13 more`."""
    rows = list(dict.fromkeys(prompt.row for prompt in prompts))
    if len(rows) == 1:
        return f"row {rows[0]}"
    more = f" and {len(rows) - 4} more" if len(rows) > 4 else ""
    return f"rows {', '.join(map(str, rows[:4]))}{more}"
