"""Episodes of several turns on a server: each turn is a request that continues the tokens of the turns before it.

Token ids go out and come back; nothing that was sampled is tokenised again. One thread talks to the environments, so
replies to turns that end at about the same time are awaited together, while other episodes are sampled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from queue import SimpleQueue

from vdr_cli.rollout.base import RolloutRequest
from vdr_cli.rollout.vllm_client import Answer
from vdr_cli.samples import Sampling, Turn

Complete = Callable[[int, Sequence[int], int, Sampling, int], list[Answer]]
"""Completions of one prompt: its place in the call, token ids, their number, the sampling and the key."""

Done = Callable[[int, list[Answer]], None]
"""Called with a prompt's place in the call and its episodes, when all of them are over."""


@dataclass
class _Episode:
    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    policy: list[bool] = field(default_factory=list)
    turns: int = 0
    over: Answer | None = None

    def add(self, ids: Sequence[int], logps: Sequence[float] | None = None) -> None:
        """Append tokens: the policy's with their log-probabilities, or the environment's."""
        self.token_ids += ids
        self.logps += [0.0] * len(ids) if logps is None else logps
        self.policy += [logps is not None] * len(ids)

    def end(self, truncated: bool) -> None:
        self.over = Answer(self.token_ids, self.logps, truncated, self.policy)


class Served:
    """The episodes of one request, from the first turn of each to its end."""

    def __init__(self, request: RolloutRequest, complete: Complete, pool: Executor, done: Done) -> None:
        assert request.conversation is not None
        self.request, self.conversation = request, request.conversation
        self.complete, self.pool, self.done = complete, pool, done
        self.T = request.sampling.max_new_tokens
        self.episodes = [_Episode() for _ in range(len(request.prompts) * request.n)]
        self.answered: SimpleQueue[tuple[list[int], Future[list[Answer]]]] = SimpleQueue()
        """Rows whose turns have come back; a greedy group's first turn is the same for all."""

    def run(self) -> list[Answer]:
        """Every episode to its end; (B,) in the order of the request. Raises what a server or environment raises."""
        n = self.request.n
        for prompt in range(len(self.request.prompts)):
            self._ask(list(range(prompt * n, (prompt + 1) * n)), self.request.keys[prompt])
        unfinished = len(self.episodes)
        while unfinished:
            arrived = [self.answered.get()]
            while not self.answered.empty():
                arrived.append(self.answered.get())
            over = self._go_on([(row, answer) for rows, future in arrived for row, answer in _by_row(rows, future)])
            unfinished -= len(over)
            for prompt in sorted({row // n for row in over}):
                group = [episode.over for episode in self.episodes[prompt * n : (prompt + 1) * n]]
                if all(each is not None for each in group):
                    self.done(prompt, [each for each in group if each is not None])
        return [episode.over for episode in self.episodes if episode.over is not None]

    def _ask(self, rows: list[int], key: int) -> None:
        """Request the next turn of these rows, which have said the same so far."""
        prompt, episode = rows[0] // self.request.n, self.episodes[rows[0]]
        most = min(self.request.sampling.turn_tokens or self.T, self.T - len(episode.token_ids))
        ids = [*self.request.prompts[prompt], *episode.token_ids]
        sampling = replace(self.request.sampling, max_new_tokens=most)
        future = self.pool.submit(self.complete, prompt, ids, len(rows), sampling, key)
        future.add_done_callback(lambda future: self.answered.put((rows, future)))

    def _go_on(self, answers: Sequence[tuple[int, Answer]]) -> list[int]:
        """Hand these turns to the environments and ask for what follows; the rows whose episode is over."""
        turns = []
        for row, answer in answers:
            episode = self.episodes[row]
            episode.add(answer.token_ids, answer.logps)
            episode.turns += 1
            turns.append(Turn(row, list(answer.token_ids), not answer.truncated, self.T - len(episode.token_ids)))
        over = []
        for turn, reply in zip(turns, self.conversation.replies(turns), strict=True):
            episode = self.episodes[turn.row]
            if reply.ids is None or not turn.ended:
                episode.end(reply.truncated or not turn.ended)
                over.append(turn.row)
                continue
            episode.add(reply.ids)
            prompt, g = divmod(turn.row, self.request.n)
            self._ask([turn.row], turn_key(self.request.keys[prompt], g, episode.turns))
        return over


def _by_row(rows: list[int], future: Future[list[Answer]]) -> list[tuple[int, Answer]]:
    return list(zip(rows, future.result(), strict=True))


def turn_key(key: int, g: int, turn: int) -> int:
    """The 64-bit key of turn `turn` (from 1) of completion g of the prompt with this key."""
    digest = hashlib.blake2b(f"{key}/{g}/{turn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
