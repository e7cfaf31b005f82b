"""Calling reward functions on a batch: time limits, checks, and errors that name function and row."""

from __future__ import annotations

import asyncio
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vdr_cli.errors import DataError
from vdr_cli.rewards.base import PROVIDED, LoadedReward
from vdr_cli.rewards.loading import one_line
from vdr_cli.rollout.base import Messages, Prompt

SEARCH_SECONDS = 10.0  # most time spent on finding the row on which a function raises


class _TimedOutError(Exception):
    """A call was still running at its limit."""


def compute_rewards(
    loaded: Sequence[LoadedReward],
    prompts: Sequence[Prompt],
    completions: Sequence[str] | Sequence[Messages],
    completion_ids: Sequence[Sequence[int]],
    timeout: float,
) -> Tensor:
    """Rewards of B completions by F functions, (B, F) float32; NaN where a function returned None.

    prompts: one a completion. timeout: seconds for each function's call. Async functions are awaited
    together. Raises DataError, naming function and row, when one raises, hangs or returns what is
    not B numbers.
    """
    arguments = _arguments(prompts, completions, completion_ids)
    returned: list[Any] = [None] * len(loaded)
    together = [index for index, reward in enumerate(loaded) if reward.is_async]
    for index, reward in enumerate(loaded):
        if index not in together:
            returned[index] = _guarded(reward, arguments, prompts, timeout, _call)
    if together:
        outcomes = _await_all([loaded[index] for index in together], arguments, timeout)
        for index, outcome in zip(together, outcomes, strict=True):
            returned[index] = _guarded(loaded[index], arguments, prompts, timeout, _already(outcome))
    columns = [_checked(reward, values, prompts) for reward, values in zip(loaded, returned, strict=True)]
    return torch.tensor(columns, dtype=torch.float32).T.contiguous().reshape(len(prompts), len(loaded))


def _arguments(
    prompts: Sequence[Prompt],
    completions: Sequence[str] | Sequence[Messages],
    completion_ids: Sequence[Sequence[int]],
) -> dict[str, list[Any]]:
    """Everything that a function may take, one list entry a completion."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns if name not in PROVIDED)
    columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
    return {
        "prompts": [prompt.value for prompt in prompts],
        "completions": list(completions),
        "completion_ids": [list(ids) for ids in completion_ids],
        **columns,
    }


def _call(reward: LoadedReward, arguments: dict[str, list[Any]], timeout: float) -> Any:
    """One function's answer, from a daemon thread: a call that hangs cannot keep the process alive."""
    accepted = reward.accepted(arguments)
    if reward.is_async:
        return _in_thread(lambda: asyncio.run(reward.function(**accepted)), timeout)
    return _in_thread(lambda: reward.function(**accepted), timeout)


def _in_thread(work: Callable[[], Any], timeout: float) -> Any:
    answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((work(), None))
        except BaseException as error:  # SystemExit too: it would end the thread without a word
            answers.put((None, error))

    threading.Thread(target=run, name="reward", daemon=True).start()
    try:
        value, error = answers.get(timeout=timeout)
    except queue.Empty:
        raise _TimedOutError from None
    if error is not None:
        raise error
    return value


def _await_all(rewards: list[LoadedReward], arguments: dict[str, list[Any]], timeout: float) -> list[Any]:
    """Each async function's answer or exception; what is unfinished at the limit counts as timed out."""
    outcomes: list[Any] = [_TimedOutError() for _ in rewards]

    async def run_one(index: int, reward: LoadedReward) -> None:
        try:
            outcomes[index] = await asyncio.wait_for(reward.function(**reward.accepted(arguments)), timeout)
        except TimeoutError as error:
            outcomes[index] = _TimedOutError() if time.monotonic() - start >= timeout else error
        except BaseException as error:
            outcomes[index] = error

    async def run_all() -> None:
        await asyncio.gather(*(run_one(index, reward) for index, reward in enumerate(rewards)))

    start = time.monotonic()
    try:
        _in_thread(lambda: asyncio.run(run_all()), timeout + 1.0)
    except _TimedOutError:  # one of them blocks the event loop: those without an outcome say so
        return list(outcomes)
    return outcomes


def _already(outcome: Any) -> Callable[..., Any]:
    def give(*_: Any) -> Any:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    return give


def _guarded(
    reward: LoadedReward,
    arguments: dict[str, list[Any]],
    prompts: Sequence[Prompt],
    timeout: float,
    call: Callable[[LoadedReward, dict[str, list[Any]], float], Any],
) -> Any:
    """`call`, with whatever goes wrong turned into a DataError."""
    try:
        return call(reward, arguments, timeout)
    except _TimedOutError:
        raise DataError(
            f"reward {reward.name} had not returned after {timeout:g} s on dataset {_rows(prompts)}; "
            "mend it or raise rewards.timeout"
        ) from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        row = _failing_row(reward, arguments, prompts, timeout)
        where = f"row {row}" if row is not None else _rows(prompts)
        raise DataError(f"reward {reward.name} raised on dataset {where}: {one_line(error)}") from error


def _failing_row(
    reward: LoadedReward, arguments: dict[str, list[Any]], prompts: Sequence[Prompt], timeout: float
) -> int | None:
    """The row of the first completion on which the function raises alone; None when none does."""
    deadline = time.monotonic() + min(timeout, SEARCH_SECONDS)
    for index, prompt in enumerate(prompts):
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        try:
            _call(reward, {name: values[index : index + 1] for name, values in arguments.items()}, left)
        except _TimedOutError:
            return None
        except Exception:
            return prompt.row
    return None


def _checked(reward: LoadedReward, values: Any, prompts: Sequence[Prompt]) -> list[float]:
    """The function's answer as B floats, NaN for None. DataError for anything else."""
    try:
        entries = list(values)
    except TypeError:
        raise DataError(
            f"reward {reward.name} returned {_shown(values)} on dataset {_rows(prompts)}, not a list of "
            f"{len(prompts)} numbers, one a completion"
        ) from None
    if len(entries) != len(prompts):
        raise DataError(
            f"reward {reward.name} returned {len(entries)} rewards for {len(prompts)} completions of dataset "
            f"{_rows(prompts)}; it must return one a completion"
        )
    return [_number(reward, entry, prompt) for entry, prompt in zip(entries, prompts, strict=True)]


def _number(reward: LoadedReward, entry: Any, prompt: Prompt) -> float:
    if entry is None:
        return math.nan
    try:
        if isinstance(entry, str):
            raise TypeError
        value = float(entry)
    except (TypeError, ValueError):
        value = math.nan
    if math.isfinite(value):
        return value
    raise DataError(
        f"reward {reward.name} returned {_shown(entry)} for a completion of dataset row {prompt.row}; "
        "it must return a finite number, or None to skip the completion"
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
