"""The types that every part of a step shares: prompts, how to sample, completions, random numbers."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from itertools import compress
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Undecoded:
    """A cell of a column of images, audio or video: decoded only where a function asks for the column by name."""

    decode: Callable[[], Any]
    """Raises what the decoder raises: a package that is missing, a file that is broken."""


@dataclass(frozen=True)
class Prompt:
    """One dataset row: what the model reads and what the reward functions get."""

    row: int
    """Row number in the dataset, from 0; errors name it."""
    value: str | Messages
    token_ids: list[int]
    columns: dict[str, Any] = field(default_factory=dict)
    """Every other column of the row; `Undecoded` where it is an image, audio or video."""


def own_copy(value: Any) -> Any:
    """A cell as a user's code may keep and change it: a list or an object is a copy.

    The completions of a group come from one row. In TRL each has a row of its own, and an environment may play on it.
    """
    return copy.deepcopy(value) if isinstance(value, list | dict) else value


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling. temperature 0 means greedy."""

    max_new_tokens: int
    """Most tokens of a completion, an environment's included."""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    turn_tokens: int | None = None
    """Most tokens of one turn in a conversation; None: max_new_tokens."""


@dataclass
class Completions:
    """A batch of completions with their prompts; groups are contiguous rows."""

    prompt_ids: Tensor  # (B, P) int64, left-padded
    prompt_mask: Tensor  # (B, P) bool
    completion_ids: Tensor  # (B, T) int64, right-padded
    completion_mask: Tensor  # (B, T) bool, True on valid tokens, EOS included: what the model reads
    sampler_logps: Tensor  # (B, T) float32, log-probability under the sampling distribution; 0 where none was sampled
    truncated: Tensor  # (B,) bool, hit its limit of tokens or turns without an end
    policy_mask: Tensor = None  # type: ignore[assignment]
    """(B, T) bool, the valid tokens that the policy sampled; the others are an environment's. None becomes
    completion_mask: all of them. Losses, bonuses, lengths and metrics count these tokens only."""

    def __post_init__(self) -> None:
        if self.policy_mask is None:
            self.policy_mask = self.completion_mask

    def __len__(self) -> int:
        return self.completion_ids.shape[0]

    def prompt_token_ids(self) -> list[list[int]]:
        """Each row's prompt without its padding."""
        return _valid(self.prompt_ids, self.prompt_mask)

    def completion_token_ids(self) -> list[list[int]]:
        """Each row's completion without its padding, an environment's tokens included."""
        return _valid(self.completion_ids, self.completion_mask)

    def rows(self, index: slice | Tensor) -> Completions:
        """The same batch with only these rows, at the same widths."""
        return Completions(
            self.prompt_ids[index],
            self.prompt_mask[index],
            self.completion_ids[index],
            self.completion_mask[index],
            self.sampler_logps[index],
            self.truncated[index],
            self.policy_mask[index],
        )

    def trimmed(self) -> Completions:
        """The same rows without the columns that are padding in every row."""
        prompt_width = max(int(self.prompt_mask.sum(1).max()), 1) if len(self) else 1
        width = max(int(self.completion_mask.sum(1).max()), 1) if len(self) else 1
        return Completions(
            self.prompt_ids[:, -prompt_width:],
            self.prompt_mask[:, -prompt_width:],
            self.completion_ids[:, :width],
            self.completion_mask[:, :width],
            self.sampler_logps[:, :width],
            self.truncated,
            self.policy_mask[:, :width],
        )


def _valid(ids: Tensor, mask: Tensor) -> list[list[int]]:
    return [list(compress(row, valid)) for row, valid in zip(ids.tolist(), mask.tolist(), strict=True)]


Finished = Callable[[Sequence[int], Completions], None]
"""Called with the indices of the prompts whose completions are all done, and with these completions in order."""


@dataclass(frozen=True)
class Turn:
    """A turn that the policy has just ended."""

    row: int
    """Row of the sampling call."""
    ids: list[int]
    """Tokens sampled in this turn."""
    ended: bool
    """False: a limit of tokens cut it, which ends the completion."""
    room: int
    """Tokens that the completion may still take; a reply must leave one for the next turn."""


@dataclass(frozen=True)
class Reply:
    """An environment's answer to a turn."""

    ids: list[int] | None
    """Tokens that the model reads before its next turn; None: the episode is over."""
    truncated: bool = False
    """The episode is over because of a limit."""


class Conversation(Protocol):
    """The other side of completions that take several turns."""

    def replies(self, turns: Sequence[Turn]) -> list[Reply]:
        """One reply per turn. Called for every turn, cut ones too, by one thread at a time."""
        ...


class Watcher(Protocol):
    """Sees what a model in this process reads while it is sampled from."""

    seen: Tensor | None
    """The watched layer's output in the newest pass; a pass replayed from a CUDA graph sets it from outside."""

    def prompts_were_read(self, prompts: Tensor) -> None:
        """prompts (N,): indices in the call; one row each, left-padded to the longest."""
        ...

    def token_was_read(self, rows: Tensor, t: int) -> None:
        """rows (r,) of the call; one row each, its completion's token t."""
        ...


class Actors(Protocol):
    """Several models in one: which of them reads each row of a pass depends on the prompt that the row continues."""

    def rows_continue(self, prompts: Tensor) -> None:
        """The rows of the next passes continue these prompts of the call, (R,)."""
        ...


class Stream(IntEnum):
    """Independent streams of random numbers under one seed. The values are frozen: they decide what is drawn."""

    EVALUATION = 0
    """Held-out prompts, by their row in the dataset: every evaluation draws the same numbers."""
    TRAINING = 1
    """Training prompts, by their position in the shuffled stream, which passes over the dataset again and again."""
    PERMUTATION = 2
    """Orders of the bonus within groups (bonus.permute), by the prompts' positions in the stream of training."""
    NOISE = 3
    """The numbers of bonus.source noise, by the prompts' positions in the stream of training."""
    PROJECTION = 4
    """Projections of bonus.source novelty, by optimizer step."""
    HEADS = 5
    """Heads of bonus.source value_heads at the start, by their number."""
    BOOTSTRAP = 6
    """Completions that each of these heads learns from, by the prompts' positions in the stream of training."""
    CLIPPED_TOKENS = 10
    """Tokens that loss clip_cov leaves out, by optimizer step."""
    ACTING_MEMBER = 11
    """Members that sample (rollout.members), by their prompt's position in the stream of training."""


def completion_key(seed: int, stream: Stream, index: int) -> int:
    """The 63-bit seed of the completions of one prompt: a hash, so that no two prompts share one.

    index: the prompt's place in the stream, see `Stream`.
    """
    digest = hashlib.blake2b(f"{seed}/{int(stream)}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniform_rows(keys: Sequence[tuple[int, int]], count: int) -> Tensor:
    """(R, count) float64 in [0, 1): one stream per (key, number of the row under this key).

    Philox 4x64 (Salmon et al. 2011), 53 bits a number. Number t is a pure function of the pair and t, so a longer
    stream begins with the shorter one. For sampling, number t of (`completion_key`, completion) decides token t.
    """
    bits = np.empty((len(keys), count), dtype=np.uint64)
    generator = np.random.Philox(key=0)
    start = generator.state  # making a generator takes fifteen times as long as setting one
    for row, pair in enumerate(keys):
        start["state"]["key"][:] = pair
        generator.state = start
        bits[row] = generator.random_raw(count)
    return torch.from_numpy((bits >> np.uint64(11)) * 2.0**-53)


def pad_prompts(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Left-pad token id lists to (B, P) ids and mask."""
    width = max((len(ids) for ids in prompts), default=1)
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(prompts), width), dtype=torch.bool)
    for row, tokens in enumerate(prompts):
        ids[row, width - len(tokens) :] = torch.as_tensor(tokens, dtype=torch.int64)
        mask[row, width - len(tokens) :] = True
    return ids, mask


def to_device(completions: Completions, device: torch.device) -> Completions:
    moved = {entry.name: getattr(completions, entry.name).to(device) for entry in fields(completions)}
    return replace(completions, **moved)


def last_token(mask: Tensor) -> Tensor:
    """(B,) int64: the column of the last token in the mask (B, T); 0 where there is none."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    return (mask.long() * columns).amax(1)


def last_tokens(mask: Tensor, n: int | None) -> Tensor:
    """(B, T) bool: the last n tokens of each row that are in the mask; None: all of them."""
    valid = mask.bool()
    if n is None:
        return valid
    remaining = valid.long().flip(-1).cumsum(-1).flip(-1)  # valid tokens from here to the row's end
    return valid & (remaining <= n)
