"""Every setting of a run, with its unit, default and reason; sections/ has the settings themselves.

The sections are frozen pydantic models: unknown keys and impossible combinations are refused here,
before any weight is loaded. Nothing in this package imports torch, so `vdr --help` stays fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import model_validator

from vdr_cli.config.moved import with_moved_keys
from vdr_cli.config.recipe import on_recipe
from vdr_cli.config.sections.base import Section
from vdr_cli.config.sections.bonus import BonusConfig
from vdr_cli.config.sections.disagreement import DisagreementConfig
from vdr_cli.config.sections.inputs import DataConfig, LoraConfig, ModelConfig
from vdr_cli.config.sections.learning import GrpoConfig, TrainConfig
from vdr_cli.config.sections.machine import EngineConfig, LaunchConfig, ObserveConfig
from vdr_cli.config.sections.rewards import RewardFunction, RewardsConfig
from vdr_cli.config.sections.rollout import RolloutConfig, VllmConfig

__all__ = [
    "BonusConfig",
    "Config",
    "DataConfig",
    "DisagreementConfig",
    "EngineConfig",
    "GrpoConfig",
    "LaunchConfig",
    "LoraConfig",
    "ModelConfig",
    "ObserveConfig",
    "RewardFunction",
    "RewardsConfig",
    "RolloutConfig",
    "Section",
    "TrainConfig",
    "VllmConfig",
]


class Config(Section):
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardsConfig = RewardsConfig()
    disagreement: DisagreementConfig = DisagreementConfig()
    bonus: BonusConfig = BonusConfig()
    grpo: GrpoConfig = GrpoConfig()
    train: TrainConfig = TrainConfig()
    engine: EngineConfig = EngineConfig()
    launch: LaunchConfig = LaunchConfig()
    observe: ObserveConfig = ObserveConfig()

    @model_validator(mode="before")
    @classmethod
    def _on_its_recipe(cls, given: Any) -> Any:
        return on_recipe(with_moved_keys(given)) if isinstance(given, Mapping) else given

    @property
    def bonus_source(self) -> str:
        """The source of the bonus; none for plain GRPO, whichever of the two switches says so."""
        off = self.bonus.source == "disagreement" and self.disagreement.mode == "none"
        return "none" if off else self.bonus.source

    @property
    def needs_ensemble(self) -> bool:
        """True when dropout members read the completions of a step."""
        return self.bonus_source == "disagreement"

    @property
    def needs_reference(self) -> bool:
        """True when the starting weights are read as well: for the KL, or for source novelty."""
        return self.grpo.beta > 0 or self.bonus_source == "novelty"

    @property
    def token_bonus(self) -> bool:
        """True when the bonus differs from token to token; False where a user's function decides it."""
        credited = self.bonus_source == "disagreement" and self.disagreement.credit == "token"
        return credited or self.bonus_source == "entropy"

    @model_validator(mode="after")
    def _bonus_fits(self) -> Self:
        what = "disagreement.credit token" if self.bonus.source == "disagreement" else f"source {self.bonus.source}"
        if self.token_bonus and self.bonus.effective_shape not in ("additive", "plain"):
            raise ValueError(
                f"bonus.shape {self.bonus.effective_shape} needs one number per completion, and {what} gives one per "
                "token: set bonus.shape to additive or plain"
            )
        if self.bonus.source not in ("disagreement", "none") and self.disagreement.mode == "none":
            raise ValueError(
                f"bonus.source is {self.bonus.source}, but disagreement.mode none turns the bonus off: remove one of "
                "them"
            )
        return self

    @model_validator(mode="after")
    def _groups_fit(self) -> Self:
        if self.rollout.group_size < 2:
            raise ValueError(
                f"rollout.group_size is {self.rollout.group_size}: a group is compared with itself, give at least 2"
            )
        if self.rollout.members and self.disagreement.mask_sharing == "token":
            raise ValueError(
                "rollout.members needs disagreement.mask_sharing member: masks drawn by token depend on the whole "
                "completion, which sampling does not know yet"
            )
        if self.grpo.advantage == "pass_at_k" and self.grpo.pass_k > self.rollout.group_size:
            raise ValueError(
                f"grpo.pass_k {self.grpo.pass_k} is above rollout.group_size {self.rollout.group_size}: the best of k "
                "needs k completions"
            )
        return self

    def refused_processes(self, processes: int) -> str | None:
        """The reason why so many processes cannot share a step; None where they can.

        Every rank needs a group of its own, and a whole sequence group.
        """
        size, prompts = self.engine.sequence_parallel, self.train.prompts_per_step
        if processes % size:
            return f"engine.sequence_parallel {size} does not divide {processes} processes; start a multiple of {size}"
        if prompts < processes:
            return (
                f"train.prompts_per_step {prompts} is below {processes} processes: a group lives on one rank, so some "
                f"would have none; give at least {processes} or start fewer processes"
            )
        return None

    @model_validator(mode="after")
    def _processes_fit(self) -> Self:
        # With a hostfile num_processes counts the ranks per host: checks.check_processes has their sum.
        processes = self.launch.num_processes if self.launch.hostfile is None else None
        if processes and (refused := self.refused_processes(processes)):
            raise ValueError(refused)
        return self

    @model_validator(mode="after")
    def _environments_stay_here(self) -> Self:
        if self.rollout.environment is not None and self.rewards.processes:
            raise ValueError(
                "rewards.processes calls reward functions in other processes, and rollout.environment lives in this "
                "one: set rewards.processes to 0"
            )
        return self

    @model_validator(mode="after")
    def _sequence_fits(self) -> Self:
        if self.engine.sequence_parallel > 1 and self.grpo.router_aux_loss_coef:
            raise ValueError(
                "grpo.router_aux_loss_coef needs whole rows on a rank: set engine.sequence_parallel to 1, or it to 0"
            )
        return self

    @model_validator(mode="after")
    def _optimizer_fits(self) -> Self:
        if self.train.optimizer == "muon" and self.model.lora is not None:
            raise ValueError(
                "train.optimizer muon orthogonalises whole matrices, of which model.lora trains two thin factors: set "
                "train.optimizer to adamw, or remove model.lora"
            )
        return self

    @model_validator(mode="after")
    def _reference_fits(self) -> Self:
        if self.grpo.sync_reference_every and self.bonus_source == "novelty":
            raise ValueError(
                "grpo.sync_reference_every replaces the starting weights, which bonus.source novelty reads: remove it"
            )
        if self.grpo.sync_reference_every and self.grpo.beta == 0:
            raise ValueError("grpo.sync_reference_every is set but grpo.beta is 0: there is no reference to update")
        if self.grpo.sync_reference_every and self.model.lora is not None:
            raise ValueError(
                "grpo.sync_reference_every needs a reference of its own; with model.lora it is the base model"
            )
        return self

    @model_validator(mode="after")
    def _steps_fit(self) -> Self:
        if self.train.prompts_per_step % self.grpo.minibatches:
            raise ValueError(
                f"train.prompts_per_step {self.train.prompts_per_step} is not a multiple of grpo.minibatches "
                f"{self.grpo.minibatches}: minibatches are equal numbers of whole groups"
            )
        if self.train.steps % self.grpo.updates_per_rollout:
            factors = " x ".join(
                f"grpo.{name} {value}"
                for name in ("num_iterations", "minibatches")
                if (value := getattr(self.grpo, name)) > 1
            )
            raise ValueError(
                f"train.steps {self.train.steps} is not a multiple of {factors}: every rollout gives "
                f"{self.grpo.updates_per_rollout} optimizer steps"
            )
        if self.train.keep_best and self.train.eval_every == 0:
            raise ValueError("train.keep_best needs train.eval_every: nothing measures which checkpoint is best")
        if self.train.eval_k is not None and self.train.eval_every == 0:
            raise ValueError("train.eval_k needs train.eval_every: without it nothing is evaluated")
        if self.train.warmup_steps >= self.train.steps and self.train.warmup_steps > 0:
            raise ValueError(
                f"train.warmup_steps {self.train.warmup_steps} is not below train.steps {self.train.steps}"
            )
        return self

    @model_validator(mode="after")
    def _weights_reach_the_sampler(self) -> Self:
        if self.engine.gather == "layer" and self.rollout.backend != "vllm":
            raise ValueError(
                "engine.gather is layer, so no process has a full copy of the weights to sample with: set "
                "rollout.backend to vllm, or engine.gather to whole"
            )
        if self.engine.gather == "layer" and self.model.lora is not None and self.rollout.vllm.push == "broadcast":
            raise ValueError(
                "engine.gather is layer, and adapters are merged in the host's memory only: set rollout.vllm.push to "
                "directory"
            )
        return self
