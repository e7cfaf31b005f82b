"""The parts of a run that never change."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdr_cli.config import Config
from vdr_cli.data.order import stream_indices
from vdr_cli.data.prompts import PromptSet
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.disagreement.reader import EnsembleReader
from vdr_cli.engine.engine import Engine
from vdr_cli.engine.reference import Adapterless, FrozenCopy
from vdr_cli.engine.reward_models import HeldRewardModels
from vdr_cli.environments.episodes import Environments, Episodes, OneTurn
from vdr_cli.exploration.sources import Source
from vdr_cli.rewards.base import LoadedReward
from vdr_cli.rollout.base import Rollout
from vdr_cli.samples import Prompt, Sampling
from vdr_cli.training.answers import Answers
from vdr_cli.training.end_states import EndStateKeeper
from vdr_cli.training.state import Due, due_after
from vdr_cli.training.timing import PhaseTimer


@dataclass(frozen=True)
class Resources:
    """One rank's fixed parts of a run."""

    config: Config
    directory: Path
    engine: Engine
    tokenizer: Any
    prompts: PromptSet
    held_out: PromptSet | None
    rewards: list[LoadedReward]
    rollout: Rollout
    sampling: Sampling
    ensemble: EnsembleReader | None
    """None where no member reads a step's completions."""
    acting: EnsembleSpec | None
    """Members that sample; None: the policy does."""
    reference: FrozenCopy | Adapterless | None
    """None where neither the KL nor the bonus reads one."""
    reward_models: HeldRewardModels
    """Weights of the reward models, if the rewards have any."""
    source: Source | None
    """The bonus's source; None for plain GRPO."""
    end_states: EndStateKeeper | None
    """Keeps the ends' hidden states of what is sampled; None where no bonus reads them, or members sample."""
    answers: Answers | None
    """Finds a completion's answer; None where nothing counts answers."""
    environments: Environments | None
    """The other side of episodes; None where a completion is one turn."""
    timer: PhaseTimer = field(default_factory=PhaseTimer)

    def prompt_at(self, position: int) -> Prompt:
        """The prompt at this position of the endless stream of training prompts."""
        cfg = self.config
        (row,) = stream_indices(len(self.prompts), position, 1, cfg.train.seed, cfg.data.shuffle)
        return self.prompts[row]

    def begin_episodes(self, prompts: list[Prompt]) -> Episodes:
        """group_size episodes of each prompt, as far as they begin before the policy speaks."""
        G = self.config.rollout.group_size
        if self.environments is None:
            return OneTurn(self.tokenizer, prompts, G)
        return self.environments.begin(prompts, G)

    def reward_weights(self) -> Tensor:
        """(F,) float32, the weight of each reward function."""
        return torch.tensor([reward.weight for reward in self.rewards])

    def shown_measure(self) -> Tensor | None:
        """(b, T) the measure at every token of the newest rollout's first b rows, on the CPU; None if not made."""
        if self.ensemble is None or self.ensemble.shown is None:
            return None
        return self.ensemble.shown.get(self.config.disagreement.measure).cpu()

    def due(self, before: int, now: int, over: bool) -> Due:
        """Things due when the optimizer steps before+1 ... now are done. over: they are the run's last."""
        cfg = self.config
        return due_after(
            before,
            now,
            over=over,
            eval_every=cfg.train.eval_every,
            completions_every=cfg.observe.completions_every,
            sync_reference_every=cfg.grpo.sync_reference_every or 0,
            checkpoint_every=cfg.train.checkpoint_every,
        )

    def shows_tokens(self, step: int) -> bool:
        """True when people will see the rollout of this step token by token: it is saved, or the first of the run."""
        after = step + self.config.grpo.updates_per_rollout
        return step == 0 or self.due(step, after, after >= self.config.train.steps).completions

    def synchronise_reference(self) -> None:
        """Make the reference model the policy as it is now. The base model under adapters stays as it is."""
        if isinstance(self.reference, FrozenCopy):
            self.reference.synchronise()
