"""Contents of a checkpoint, and resuming from it. state.due_after says when one is due."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from vdr_cli.checks import refuse_other_model_of, refuse_other_settings_of
from vdr_cli.config import Config
from vdr_cli.config.load import computed_settings
from vdr_cli.engine import checkpoint as checkpoints
from vdr_cli.engine import collectives
from vdr_cli.engine.ds_config import read_ds_config, zero_stage
from vdr_cli.engine.reference import FrozenCopy
from vdr_cli.environments.episodes import Episodes
from vdr_cli.errors import ConfigError, MachineError
from vdr_cli.exploration.sources import Memory
from vdr_cli.launch import watchdog
from vdr_cli.rewards.stream import RewardStream
from vdr_cli.samples import Prompt
from vdr_cli.training import pending_rollout
from vdr_cli.training.resources import Resources
from vdr_cli.training.state import LoopState

MEMORY = "bonus.pt"
"""File of a checkpoint that holds what the bonus's source carries from step to step."""


def new_state(resources: Resources) -> LoopState:
    """The state of a run that starts."""
    source = resources.source
    return LoopState(memory=source.memory(resources.config) if source else None)


def refuse_other_run(found: checkpoints.Checkpoint, config: Config, rows: str, directory: Path) -> None:
    """Raise ConfigError when a run in this directory, with these settings and rows (a digest), would not go on.

    A checkpoint of another run may have other settings: check_resume says which. Collective.
    """
    with collectives.agreed():
        if found.state.get("data", rows) != rows:
            raise ConfigError(
                f"--resume {found.path}: data.name {config.data.name} has changed since (other rows, or another "
                "order); resume with the data as they were, or start a new run with another --output"
            )
        done = found.state["loop"]["step"]
        if done > config.train.steps:
            raise ConfigError(
                f"train.steps {config.train.steps}: {found.path} has done {done} steps already, counted from its run's "
                "start; give more, or resume from an earlier checkpoint"
            )
        stage = zero_stage(read_ds_config(config.engine.ds_config))
        if found.state.get("zero_stage", stage) != stage:
            raise ConfigError(
                f"--resume {found.path}: engine.ds_config {config.engine.ds_config} has ZeRO stage {stage}, the "
                f"checkpoint stage {found.state['zero_stage']}; resume with the stage it was saved with"
            )
        settings = found.state.get("settings")
        if settings is not None and _is_in(directory / "checkpoints", found):
            refuse_other_settings_of(found.path, settings, config)
        elif settings is not None:
            refuse_other_model_of(found.path, settings, config)


def _save_memory(memory: Memory, folder: Path) -> None:
    """Rank 0 writes what the bonus's source carries from step to step."""
    if collectives.is_main():
        torch.save(memory.state_dict(), folder / MEMORY)


def _is_in(folder: Path, found: checkpoints.Checkpoint) -> bool:
    return found.path.resolve().parent == folder.resolve()


class Checkpointer:
    """Writes checkpoints/step_<n> of one run. Every method is a collective."""

    def __init__(self, resources: Resources, note: Callable[[str], None]) -> None:
        """note: prints a line for the user, from rank 0."""
        self._resources, self._note = resources, note
        self._saved_step: int | None = None
        self._folder = resources.directory / "checkpoints"

    def save_if_possible(self, state: LoopState) -> None:
        """`save`; if the checkpoint cannot be written (disk full), warn and carry on: the previous one is intact."""
        try:
            self.save(state)
        except MachineError as error:
            self._note(f"{error}; training continues")

    def save(self, state: LoopState) -> None:
        """Write the checkpoint of this step unless it is there, and remove old ones.

        Raises MachineError on every rank when it cannot be written; the previous checkpoint is intact.
        """
        if self._saved_step == state.step:
            return
        watchdog.phase("checkpoint")
        cfg = self._resources.config
        content = {
            "loop": state.saved(),
            "settings": computed_settings(cfg),
            "source": cfg.bonus_source,
            "data": self._resources.prompts.digest,
        }

        also: list[Callable[[Path], None]] = []
        if isinstance(self._resources.reference, FrozenCopy):
            also.append(self._resources.reference.save)
        if state.memory is not None:
            also.append(partial(_save_memory, state.memory))
        if state.pending is not None:
            also.append(partial(pending_rollout.save, state.pending))
        checkpoints.save(self._resources.engine, self._folder, state.step, content, also)
        self._saved_step = state.step
        best = state.best_step if cfg.train.keep_best else None
        keep = self._folder / f"step_{best:06d}" if best is not None else None
        checkpoints.prune(self._folder, cfg.train.keep_last, keep)

    def best_is_new(self, state: LoopState) -> bool:
        """True when the best held-out evaluation is of this step and its checkpoint is to be kept (keep_best).

        False at the run's end, where a checkpoint is written anyway.
        """
        cfg = self._resources.config.train
        return cfg.keep_best and state.best_step == state.step and not state.is_over(cfg)

    def restore(self, found: checkpoints.Checkpoint | None) -> LoopState:
        """Load this checkpoint into the engine and the reference; the loop's state. None: a run from its start.

        Checkpoints of later steps are set aside: the run writes them again.
        Raises MachineError when a rank does not see the same files, or they cannot be converted.
        """
        state = new_state(self._resources)
        if found is not None:
            checkpoints.load(self._resources.engine, found)
            if isinstance(self._resources.reference, FrozenCopy):
                self._resources.reference.load(found.path)
            state = LoopState.restored(found.state["loop"], state.memory)
            if state.memory is not None and self._has_memory(found):
                state.memory.load_state_dict(torch.load(found.path / MEMORY, weights_only=True))
            state.pending = self._pending(found.path, state.step)
            self._saved_step = state.step if _is_in(self._folder, found) else None
            self._note(f"resumed from {found.path}")
        checkpoints.set_aside(self._folder, after=state.step if found is not None else -1)
        return state

    def _has_memory(self, found: checkpoints.Checkpoint) -> bool:
        """True when the checkpoint holds what our bonus's source remembers; another run's source may be another."""
        ours = self._resources.config.bonus_source
        return found.state.get("source", ours) == ours and (found.path / MEMORY).is_file()

    def _pending(self, folder: Path, step: int) -> pending_rollout.PendingRollout | None:
        """The groups that this checkpoint carries for the step it resumes at."""
        res = self._resources

        def begin(prompts: list[Prompt]) -> tuple[Episodes, RewardStream]:
            episodes = res.begin_episodes(prompts)
            return episodes, pending_rollout.reward_stream(res.config, res.rewards, episodes, step)

        return pending_rollout.load(folder, collectives.even_shares, res.prompt_at, begin, res.tokenizer.pad_token_id)
