"""Opening, resuming and ending a run: everything that train.py's loop finds in place."""

from __future__ import annotations

import logging
import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch

from vdr_cli.config import Config
from vdr_cli.config.load import config_hash, dump_run_record
from vdr_cli.config.paths import checked_path
from vdr_cli.data.completions import remove_after
from vdr_cli.data.order import stream_indices
from vdr_cli.data.prompts import Limits, PromptSet, load_prompts
from vdr_cli.disagreement.check import check_members
from vdr_cli.disagreement.hooks import ensemble
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.disagreement.reader import EnsembleReader
from vdr_cli.engine import checkpoint as checkpoints
from vdr_cli.engine import collectives
from vdr_cli.engine.build import build_engine
from vdr_cli.engine.engine import Engine
from vdr_cli.engine.export import export_model
from vdr_cli.engine.processes import patience_of, start_distributed
from vdr_cli.engine.reference import build_reference
from vdr_cli.engine.reward_models import HeldRewardModels
from vdr_cli.engine.serving import ServedLayers
from vdr_cli.environments.contract import load_contract
from vdr_cli.environments.episodes import Environments
from vdr_cli.errors import ConfigError, MachineError, VdrError
from vdr_cli.exploration.collapse import watch_of
from vdr_cli.exploration.sources import SOURCES, Source
from vdr_cli.exploration.watch import EVIDENCE, ROLLOUTS_BEFORE_WARNING, BonusWatch
from vdr_cli.launch import outcome, watchdog
from vdr_cli.launch.environment import environment_restored, prepare_process
from vdr_cli.models.adapters import frozen_layers
from vdr_cli.models.anatomy import check_head
from vdr_cli.models.independence import check_independence
from vdr_cli.models.loading import eos_token_ids, load_model_config, load_tokenizer
from vdr_cli.models.paths import adapter_directory
from vdr_cli.models.train_mode import check_train_mode
from vdr_cli.rewards.base import LoadedReward, check_columns
from vdr_cli.rewards.loading import load_rewards
from vdr_cli.rewards.model import check_templates
from vdr_cli.rewards.watch import RewardWatch
from vdr_cli.rollout.base import Rollout, sampling_of
from vdr_cli.rollout.build import open_rollout
from vdr_cli.rollout.check import check_sampling
from vdr_cli.system.files import create_whole, write_whole
from vdr_cli.system.stopping import StopSignal
from vdr_cli.system.writers import only_writer
from vdr_cli.training import audit_record
from vdr_cli.training.answers import Answers, answers_of
from vdr_cli.training.checkpointer import Checkpointer, new_state, refuse_other_run
from vdr_cli.training.closing import closing_lines
from vdr_cli.training.end_states import EndStateKeeper
from vdr_cli.training.live import LiveView
from vdr_cli.training.metrics_writer import MetricsWriter
from vdr_cli.training.resources import Resources
from vdr_cli.training.run_log import RunLog
from vdr_cli.training.state import LoopState
from vdr_cli.training.user_source import user_source
from vdr_cli.training.watched_rollout import WatchedRollout

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """A run as train.py's loop sees it."""

    resources: Resources
    state: LoopState
    checkpointer: Checkpointer
    log: RunLog
    stop: StopSignal
    exit_code: int = 0
    looked_at: float = field(default_factory=monotonic)
    """Time at which the step in progress began, on the clock of time.monotonic."""

    def stopped(self) -> bool:
        """True when any rank received Ctrl-C or SIGTERM; the exit code says which. Collective, before each step."""
        now = monotonic()
        received, seconds = collectives.all_reduce_max([float(self.stop.received), now - self.looked_at])
        self.looked_at, signal_number = now, int(received)
        self.state.longest_step = max(self.state.longest_step, seconds)
        watchdog.note_step(self.state.longest_step)
        if signal_number:
            self.exit_code = 128 + signal_number
        return bool(signal_number)

    def complete(self) -> None:
        """Write the last checkpoint and, when the run reached its end, model/, report.html and the finished marker.

        Collective. Raises MachineError on every rank when something cannot be written.
        """
        res = self.resources
        self.checkpointer.save(self.state)
        if self.exit_code:
            return
        if res.config.train.save_model:
            export_model(res.engine, res.tokenizer, res.directory / "model", _adapter_folder(res))
        if collectives.is_main() and res.config.observe.report:
            _write_report(res.directory, self.log)
        with collectives.agreed():
            if collectives.is_main():
                _mark_finished(res.directory, self.state.step)
                for line in closing_lines(res.directory, res.config):
                    self.log.note(line)


def _adapter_folder(res: Resources) -> Path | None:
    """The directory of a LoRA run's adapter. None where the base has an adapter itself, which no file could name."""
    model = res.config.model
    return None if model.lora is None or adapter_directory(model.name) else res.directory / "adapter"


@contextmanager
def open_run(config: Config, resume: str | None) -> Iterator[Run]:
    """Everything that a run needs, loaded or resumed; closed again whatever happens.

    After a VdrError in the loop the last finished step is saved before the error is raised again.
    """
    with environment_restored():
        prepare_process(config.launch)
        yield from _opened(config, resume)


def _opened(config: Config, resume: str | None) -> Iterator[Run]:
    if config.train.output is None:
        raise ConfigError("train.output is needed: the run directory, the same for every process")
    directory = Path(config.train.output)
    watchdog.begin(str(directory), config.launch.fault_timeout)
    device = start_distributed(patience_of(config))
    with ExitStack() as stack:
        rank, size = collectives.rank(), collectives.world_size()
        stack.enter_context(watchdog.connected(rank, size, collectives.broadcast_object))
        refuse_other_settings(config)
        resume = collectives.broadcast_object(resume)  # at a restart another host may see other checkpoints
        stop = stack.enter_context(StopSignal())
        run = _open(config, directory, device, stop, resume, stack)
        try:
            yield run
        except VdrError as error:
            outcome.write_fault(directory, collectives.rank(), str(error), error.exit_code)
            if not isinstance(error, MachineError):
                run.log.note("saving the last finished step")
                run.checkpointer.save_if_possible(run.state)
                run.log.finish_uploads()
            raise


def _open(
    config: Config, directory: Path, device: torch.device, stop: StopSignal, resume: str | None, stack: ExitStack
) -> Run:
    _seed(config.train.seed)
    with collectives.agreed():
        inputs = _read_inputs(config)
    refuse_other_rows(config.data.name, inputs.prompts)
    found, passed_over = _choose_checkpoint(directory, resume)
    if found is not None:
        refuse_other_run(found, config, inputs.prompts.digest, directory)
    with _on_disk(directory):
        if collectives.is_main() and directory.is_dir():  # how an earlier run ended is not how this one did
            outcome.clear(directory)
    res = _load(config, directory, device, inputs, checkpoints.needs_conversion(found), resume is None, stack)
    log = _open_log(res, stack)
    log.note(f"run directory {directory}")
    for line in passed_over:
        log.note(line)
    lora = config.model.lora
    if lora is not None and lora.targets == "all-linear" and (frozen := frozen_layers(res.engine.causal_lm)):
        log.note(frozen)
    checkpointer = Checkpointer(res, log.note)
    state = new_state(res)
    if resume is not None:
        state = checkpointer.restore(found)
        watchdog.note_step(state.longest_step)
        log.truncate(state.step or -1)  # what was measured before the first step is measured again
        if collectives.is_main():
            remove_after(directory, state.step)
            audit_record.remove_from(directory, state.step)
    if state.step == 0 and config.bonus_source == "disagreement":
        log.note(EVIDENCE)
    log.begin(config.train.steps, state.step)
    return Run(res, state, checkpointer, log, stop)


@dataclass
class _Inputs:
    """Inputs that are read before a weight is loaded."""

    tokenizer: Any
    prompts: PromptSet
    held_out: PromptSet | None
    rewards: list[LoadedReward]
    source: Source | None
    answers: Answers | None
    environments: Environments | None


def _read_inputs(config: Config) -> _Inputs:
    model = config.model
    named = model.name, model.revision, model.trust_remote_code
    tokenizer = load_tokenizer(*named)
    limits = Limits.of(load_model_config(*named), config.rollout.completion_tokens, config.rollout.length_setting)
    contract = load_contract(config.rollout.environment, config.rollout.tools)
    tools = contract.schemas if contract else []
    prompts = load_prompts(config.data, "train", tokenizer, limits, tools)
    prompts.check(_drawn(config, len(prompts)))
    rewards = load_rewards(config.rewards, config.data.name, contract.reward if contract else None)
    check_columns(rewards, prompts.columns)
    check_templates(rewards, prompts.has_messages)
    environments = None
    if contract is not None:
        environments = Environments(contract, tokenizer, config.rollout, prompts.has_messages, limits)
    held_out = load_prompts(config.data, "eval", tokenizer, limits, tools) if config.train.eval_every else None
    if held_out is not None:
        check_columns(rewards, held_out.columns)
        held_out.check(range(min(config.train.eval_prompts, len(held_out))))
    source = open_source(config)
    answers = answers_of(config, rewards) if source and "answers" in source.needs else None
    return _Inputs(tokenizer, prompts, held_out, rewards, source, answers, environments)


def _drawn(config: Config, rows: int) -> list[int]:
    """The rows that the run will draw, each once: a row that cannot be used is reported now, not hours later."""
    prompts = _rollouts(config) * config.train.prompts_per_step * (1 + config.grpo.resample_groups)
    return stream_indices(rows, 0, min(prompts, rows), config.train.seed, config.data.shuffle)


def _rollouts(config: Config) -> int:
    return config.train.steps // config.grpo.updates_per_rollout


def open_source(config: Config) -> Source | None:
    """The source of the run's bonus; None for plain GRPO. ConfigError when a function of the user's is not there."""
    name = config.bonus_source
    return user_source(name) if ":" in name else SOURCES.get(name)


def _load(
    config: Config,
    directory: Path,
    device: torch.device,
    inputs: _Inputs,
    universal: bool,
    fresh: bool,
    stack: ExitStack,
) -> Resources:
    """The models and the sampler, once everything that can be wrong with the settings has been checked."""
    seed = config.train.seed
    spec = EnsembleSpec(**config.disagreement.member_settings, seed=seed)
    members = spec if config.needs_ensemble else None
    engine = build_engine(config, device, universal=universal)
    _check_model(engine, config, spec if config.needs_ensemble or config.rollout.members else None)
    _prepare_directory(directory, config, fresh, stack)
    eos_ids = eos_token_ids(engine.causal_lm, inputs.tokenizer)
    _check_end(config, eos_ids)
    if inputs.environments is not None:
        inputs.environments.end_with(eos_ids)
        stack.callback(inputs.environments.close)
    layered = ServedLayers(engine) if engine.by_layers else None
    opened = open_rollout(config.rollout, inputs.tokenizer, eos_ids, directory, collectives.is_main(), layered)
    rollout: Rollout = stack.enter_context(opened)
    reader = keeper = None
    if inputs.source and "states" in inputs.source.needs and not config.rollout.members:
        keeper = EndStateKeeper()
        rollout = WatchedRollout(rollout, keeper)
    if members is not None:
        divided = members.mask_sharing == "member"  # a mask of its own at every position needs the whole row
        reader = EnsembleReader(
            members, engine.whole_layers if engine.by_layers else None, engine.sequence if divided else None
        )
        rollout = WatchedRollout(rollout, reader)
    return Resources(
        config=config,
        directory=directory,
        engine=engine,
        **vars(inputs),
        rollout=rollout,
        sampling=sampling_of(config.rollout),
        ensemble=reader,
        end_states=keeper,
        acting=spec if config.rollout.members else None,
        reference=build_reference(config, engine),
        reward_models=HeldRewardModels(inputs.rewards, config, engine),
    )


def _check_model(engine: Engine, config: Config, members: EnsembleSpec | None) -> None:
    """Raise ConfigError when the model lacks modules that the run needs, or they compute something else. Collective."""
    with engine.gathered_model() as model, collectives.agreed():
        check_head(model)
        check_train_mode(model)
        check_independence(model)
        if config.rollout.backend == "transformers":
            check_sampling(model, config.rollout.cuda_graphs)
        if members is not None:
            with ensemble(model, members, step=0, members=[0]):  # refuses a last_k beyond the model's layers
                pass
            check_members(model, members)


def _check_end(config: Config, eos_ids: list[int]) -> None:
    """Say that no completion can end. ConfigError where those that are cut do not count (grpo.mask_truncated)."""
    if eos_ids or config.rollout.stop:
        return
    why = f"model {config.model.name} and its tokenizer have no EOS token: every completion is cut at its limit"
    cure = "give the tokenizer an eos_token, or set rollout.stop"
    if config.grpo.mask_truncated:
        raise ConfigError(f"grpo.mask_truncated leaves nothing to train on: {why}; {cure}")
    if collectives.is_main():
        logger.warning("%s; %s", why, cure)


def _open_log(res: Resources, stack: ExitStack) -> RunLog:
    writer = view = None
    observe = res.config.observe
    with collectives.agreed():
        if collectives.is_main():
            writer = stack.enter_context(MetricsWriter(res.directory, observe, res.config.model_dump()))
            view = stack.enter_context(LiveView(observe.live))
    rewards = RewardWatch([reward.name for reward in res.rewards], _rollouts(res.config))
    return RunLog(res.directory, writer, view, _bonus_watch(res), rewards, watch_of(res.config))


def _bonus_watch(res: Resources) -> BonusWatch | None:
    source, config = res.source, res.config
    if source is None:
        return None
    flat_after = min(ROLLOUTS_BEFORE_WARNING, _rollouts(config))
    return BonusWatch(source.quantity(config), source.flat(config), config.bonus.gate, flat_after)


def refuse_other_rows(name: str, prompts: PromptSet) -> None:
    """Raise ConfigError when ranks have read different data: each would draw prompts of its own. Collective."""
    (first, expected), *others = collectives.gather_objects((socket.gethostname(), prompts.digest))
    for host, theirs in others:
        if theirs != expected:
            raise ConfigError(
                f"data.name {name}: its rows on host {host} differ from those on {first}; copy them again"
            )


def refuse_other_settings(config: Config) -> None:
    """Raise ConfigError when ranks were started with different settings: they would wait for each other. Collective."""
    own = config_hash(config), config.observe.completions_every, config.observe.audit_every
    (first, expected), *others = collectives.gather_objects((socket.gethostname(), own))
    for host, theirs in others:
        if theirs != expected:
            raise ConfigError(
                f"the settings on host {host} differ from those on {first}, where rank 0 is; start every rank with the "
                "same file and flags"
            )


def _choose_checkpoint(directory: Path, resume: str | None) -> tuple[checkpoints.Checkpoint | None, list[str]]:
    if resume is None:
        return None, []
    if resume == "auto":
        found, passed_over = checkpoints.newest_complete(directory / "checkpoints")
        if found is None and passed_over:  # a start from scratch would write over all that the run recorded
            raise MachineError(
                f"--resume auto: no checkpoint of {directory} is complete: {passed_over[0]}; repair it, or give "
                "another --output to start again"
            )
        return found, passed_over
    return checkpoints.open_checkpoint(checked_path(resume, "--resume")), []


def _prepare_directory(directory: Path, config: Config, fresh: bool, stack: ExitStack) -> None:
    """Create the directory with config.yaml, and hold it until the stack is closed. Collective.

    Raises ConfigError when another process writes there; with fresh, also when another run has taken the directory in
    the meantime.
    """
    with _on_disk(directory):
        if not collectives.is_main():
            return
        directory.mkdir(parents=True, exist_ok=True)
        stack.enter_context(only_writer(directory))
        try:
            (create_whole if fresh else write_whole)(directory / "config.yaml", dump_run_record(config))
        except FileExistsError:
            raise ConfigError(f"train.output {directory} holds another run; give another --output") from None


@contextmanager
def _on_disk(directory: Path) -> Iterator[None]:
    """A block that writes to the run directory; a write that fails is a MachineError on every rank. Collective."""
    with collectives.agreed():
        try:
            yield
        except OSError as fault:
            reason = fault.strerror or fault
            raise MachineError(f"train.output {directory}: cannot be written ({reason}); choose another") from fault


def _write_report(directory: Path, log: RunLog) -> None:
    """Write report.html; if that fails, warn: the run itself is complete."""
    from vdr_cli.report.page import write_report

    try:
        write_report(directory)
    except (VdrError, OSError) as error:
        log.note(f"report.html was not written: {error}")


def _mark_finished(directory: Path, step: int) -> None:
    try:
        outcome.write_finished(directory, step=step)
    except OSError as fault:
        raise MachineError(f"{directory}: the run is done but this cannot be written: {fault}") from fault


def _seed(seed: int) -> None:
    """Seed the global generators for reward functions that use them; vdr itself never does."""
    own = seed * 1_000_003 + collectives.rank()
    random.seed(own)
    np.random.seed(own % 2**32)
    torch.manual_seed(own)
