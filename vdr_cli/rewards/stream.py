"""Rewards of finished groups, while other groups are still sampled."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from vdr_cli.rewards.base import LoadedReward, TrainerState
from vdr_cli.rewards.calling import compute_rewards, rewards_and_logs
from vdr_cli.rewards.logs import CallLog, Logs, logs_of
from vdr_cli.samples import Completions, Messages, Prompt

Texts = list[str] | list[Messages]

AWAITED_TOGETHER = 16
"""Calls of async functions that wait at once; other functions are called one after another."""


@dataclass(frozen=True)
class _Part:
    """Some groups: where their completions stand in the batch, and what is being found out about them."""

    rows: list[int]
    texts: Texts
    ids: list[list[int]]
    found: list[tuple[list[int], Future[tuple[Tensor, list[CallLog]]]]]
    """Columns of the reward functions, and their rewards (b, columns) with what they logged."""


class RewardStream:
    """Takes the groups of one batch as they finish, in any order and from any thread, and calls the functions on them.

    A function sees whole groups, as many as were ready together; with processes, these shared out among them. One that
    logs metrics is called once, with the whole batch: how a batch is split must not change a metric. The time limit is
    each call's own. Reward models read all texts at the end, on the thread that asks for the result.
    """

    logs: Logs
    """Log of the functions; set by `result`."""

    def __init__(
        self,
        loaded: Sequence[LoadedReward],
        prompts: Sequence[Prompt],
        group_size: int,
        timeout: float,
        state: TrainerState,
        texts_of: Callable[[list[int], Completions], Texts],
        environments: Sequence[Any] | None = None,
    ) -> None:
        """prompts: one per group, in the order of the batch. texts_of: completions of these rows as functions see them.

        environments: one per completion.
        """
        self.loaded, self.prompts, self.group_size = loaded, prompts, group_size
        self.timeout, self.state, self.texts_of, self.environments = timeout, state, texts_of, environments
        plain = [column for column, reward in enumerate(loaded) if not (reward.is_async or reward.is_model)]
        awaited = [column for column, reward in enumerate(loaded) if reward.is_async]
        self._at_once = min((loaded[column].at_once for column in plain), default=1)
        lanes = ((plain, self._at_once), (awaited, AWAITED_TOGETHER))
        self._lanes = [(columns, _Lane(width)) for columns, width in lanes if columns]
        self._parts: list[_Part] = []
        self._missing = len(prompts)
        self._lock = threading.Lock()

    def finished(self, groups: Sequence[int], completions: Completions) -> None:
        """These groups are sampled; completions: theirs, group by group."""
        G, share = self.group_size, max(-(-len(groups) // self._at_once), 1)
        for first in range(0, len(groups), share):
            self._call(groups[first : first + share], completions.rows(slice(first * G, (first + share) * G)))

    def _call(self, groups: Sequence[int], completions: Completions) -> None:
        rows = [group * self.group_size + g for group in groups for g in range(self.group_size)]
        with self._lock:
            texts = self.texts_of(rows, completions)
        part = self._begin(rows, texts, completions.completion_token_ids(), logs_metrics=False)
        with self._lock:
            self._parts.append(part)
            self._missing -= len(groups)
            is_last = self._missing == 0
        if is_last and any(reward.logs_metrics for reward in self.loaded):
            self._call_with_all()

    def _call_with_all(self) -> None:
        """Call the functions that log metrics on the whole batch, in its order."""
        every = [one for part in self._parts for one in zip(part.rows, part.texts, part.ids, strict=True)]
        every.sort(key=lambda one: one[0])
        rows, texts, ids = ([one[index] for one in every] for index in range(3))
        self._parts.append(self._begin(rows, texts, ids, logs_metrics=True))  # type: ignore[arg-type]

    def _begin(self, rows: list[int], texts: Texts, ids: list[list[int]], logs_metrics: bool) -> _Part:
        """Call the functions that log metrics, or the others, on these rows."""
        prompts = [self.prompts[row // self.group_size] for row in rows]
        environments = None if self.environments is None else [self.environments[row] for row in rows]
        found = []
        for every, lane in self._lanes:
            columns = [column for column in every if self.loaded[column].logs_metrics == logs_metrics]
            if columns:
                functions = [self.loaded[column] for column in columns]
                given = prompts, texts, ids, self.timeout, self.state, environments
                found.append((columns, lane.call(rewards_and_logs, functions, *given)))
        return _Part(rows, texts, ids, found)

    def result(self) -> tuple[Texts, Tensor]:
        """Texts and rewards (B, F) of the whole batch, once all calls have ended; sets `logs`.

        Raises what a call raised.
        """
        count = len(self.prompts) * self.group_size
        texts: list[Any] = [None] * count
        rewards = torch.full((count, len(self.loaded)), torch.nan)
        logged = []
        try:
            for part in sorted(self._parts, key=lambda part: part.rows[0]):
                for columns, future in part.found:
                    found, logs = future.result()
                    rewards[torch.tensor(part.rows)[:, None], torch.tensor(columns)] = found
                    logged += [
                        (self.loaded[column].label, part.rows, log) for column, log in zip(columns, logs, strict=True)
                    ]
                for row, text in zip(part.rows, part.texts, strict=True):
                    texts[row] = text
        finally:
            self.close()
        self._ask_models(texts, rewards)
        self.logs = logs_of(logged, count)
        return texts, rewards

    def _ask_models(self, texts: list[Any], rewards: Tensor) -> None:
        """Fill the columns of the reward models."""
        columns = [column for column, reward in enumerate(self.loaded) if reward.is_model]
        if columns and texts:
            prompts = [prompt for prompt in self.prompts for _ in range(self.group_size)]
            models = [self.loaded[column] for column in columns]
            no_ids: list[list[int]] = [[]] * len(texts)
            rewards[:, columns] = compute_rewards(models, prompts, texts, no_ids, self.timeout, self.state)

    def close(self) -> None:
        """No more calls are begun."""
        for _, lane in self._lanes:
            lane.close()


class _Lane:
    """Daemon threads that work through calls in order: one that hangs cannot keep the process alive."""

    def __init__(self, width: int) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._width, self._threads = width, 0
        self._closed = False

    def call(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._calls.put((future, lambda: function(*arguments)))
        if self._threads < self._width:
            self._threads += 1
            threading.Thread(target=self._work, name="rewards", daemon=True).start()
        return future

    def close(self) -> None:
        self._closed = True
        for _ in range(self._threads):
            self._calls.put(None)

    def _work(self) -> None:
        while (entry := self._calls.get()) is not None:
            future, call = entry
            if self._closed:
                future.cancel()
                continue
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
