"""Groups that are still being sampled, and how a checkpoint carries them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vdr_cli.config import Config
from vdr_cli.engine import collectives
from vdr_cli.environments.episodes import Episodes
from vdr_cli.rewards.base import LoadedReward, TrainerState
from vdr_cli.rewards.stream import RewardStream
from vdr_cli.samples import Completions, Prompt
from vdr_cli.training.batch import concatenate_completions

AHEAD = "ahead.pt"
"""File of a checkpoint that holds completions of the next step."""


@dataclass(frozen=True)
class PendingRollout:
    """Groups that are being sampled; their rewards are computed as they finish."""

    positions: list[int]
    """The prompts' places in the stream."""
    episodes: Episodes
    wait: Callable[[], Completions]
    """Returns the completions when all of them are there; a second call returns them again."""
    rewards: RewardStream


def save(pending: PendingRollout, folder: Path) -> None:
    """Write the completions of all ranks, in the order of the stream. Collective; rank 0 writes."""
    with collectives.agreed():
        completions = pending.wait()
    shares = collectives.gather_objects((pending.positions, asdict(completions), pending.episodes.history()))
    if collectives.is_main():
        torch.save(shares, folder / AHEAD)


def load(
    folder: Path,
    share: Callable[[int], list[int]],
    prompt_at: Callable[[int], Prompt],
    begin: Callable[[list[Prompt]], tuple[Episodes, RewardStream]],
    pad_id: int,
) -> PendingRollout | None:
    """This rank's part of what `save` wrote, or None when it wrote nothing. Collective.

    Rewards are computed again, after environments have played their episodes again.

    share: splits a number of groups over the ranks. prompt_at: the prompt at a position of the stream. begin:
    the episodes of a list of prompts, and the stream of their rewards.
    """
    if not collectives.broadcast_object((folder / AHEAD).is_file()):
        return None
    saved: Sequence[tuple[list[int], dict[str, Any], list[Any]]] = torch.load(folder / AHEAD, weights_only=True)
    everybody = [position for positions, _, _ in saved for position in positions]
    whole = concatenate_completions([Completions(**parts) for _, parts, _ in saved], pad_id)
    history = [played for _, _, episodes in saved for played in episodes]
    counts, G = share(len(everybody)), len(whole) // len(everybody)
    first = sum(counts[: collectives.rank()])
    end = first + counts[collectives.rank()]
    completions = whole.rows(slice(first * G, end * G)).trimmed()
    prompts = [prompt_at(position) for position in everybody[first:end]]
    episodes, rewards = begin(prompts)
    with collectives.agreed():
        episodes.replay(history[first * G : end * G])
    if prompts:
        rewards.finished(range(len(prompts)), completions)
    return PendingRollout(everybody[first:end], episodes, lambda: completions, rewards)


def reward_stream(config: Config, rewards: list[LoadedReward], episodes: Episodes, step: int) -> RewardStream:
    """A stream that computes the rewards of these episodes' groups at this step, each as soon as it is sampled."""
    return RewardStream(
        rewards,
        episodes.prompts,
        config.rollout.group_size,
        config.rewards.timeout,
        TrainerState(step, config.train.steps),
        episodes.texts,
        episodes.environments,
    )
