"""Groups on their way from prompts to rewarded completions, and those that a checkpoint carries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vdr_cli.batch import concatenate_completions
from vdr_cli.disagreement.recorder import StemRecorder
from vdr_cli.engine import collectives
from vdr_cli.evaluate import completion_texts
from vdr_cli.rewards.base import TrainerState
from vdr_cli.rewards.stream import RewardStream
from vdr_cli.rollout.base import Completions, Prompt

if TYPE_CHECKING:
    from vdr_cli.run import Run

AHEAD = "ahead.pt"
"""In a checkpoint, when completions of the next step are drawn already."""


@dataclass(frozen=True)
class Drawing:
    """Groups that are being sampled; their rewards are computed as they finish."""

    positions: list[int]
    """Of the prompts in the stream."""
    prompts: list[Prompt]  # one a group
    wait: Callable[[], Completions]
    rewards: RewardStream
    recorder: StemRecorder | None = None


def save(drawing: Drawing, folder: Path) -> None:
    """The completions of all ranks, in the order of the stream. Collective; rank 0 writes."""
    completions = collectives.together(drawing.wait)
    shares = collectives.gather_objects((drawing.positions, asdict(completions)))
    if collectives.is_main():
        torch.save(shares, folder / AHEAD)


def load(run: Run, folder: Path, share: Callable[[int], list[int]]) -> Drawing | None:
    """This rank's part of what `save` wrote, if it did; share: how many of so many groups each rank takes. Collective.

    Rewards are computed again.
    """
    if not collectives.broadcast_object((folder / AHEAD).is_file()):
        return None
    saved: Sequence[tuple[list[int], dict[str, Any]]] = torch.load(folder / AHEAD, weights_only=True)
    everywhere = [position for positions, _ in saved for position in positions]
    whole = concatenate_completions([Completions(**parts) for _, parts in saved], run.tokenizer.pad_token_id)
    counts, G = share(len(everywhere)), len(whole) // len(everywhere)
    first = sum(counts[: collectives.rank()])
    end = first + counts[collectives.rank()]
    completions = whole.rows(slice(first * G, end * G)).trimmed()
    prompts = [run.prompt_at(position) for position in everywhere[first:end]]
    rewards = reward_stream(run, prompts, run.step)
    if prompts:
        rewards.finished(range(len(prompts)), completions)
    return Drawing(everywhere[first:end], prompts, lambda: completions, rewards)


def reward_stream(run: Run, prompts: list[Prompt], step: int) -> RewardStream:
    """What these prompts' groups are given to as they are sampled, for this step."""
    cfg = run.config
    return RewardStream(
        run.rewards,
        prompts,
        cfg.rollout.group_size,
        cfg.rewards.timeout,
        TrainerState(step, cfg.train.steps),
        lambda each, completions: completion_texts(run.tokenizer, each, completions),
    )
