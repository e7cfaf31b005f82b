"""What a training run consists of, and how it starts, saves, resumes and ends.

The algorithm is in train.py; here is everything around it.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vdr_cli.config import Config
from vdr_cli.config.load import config_hash, dump_run_record
from vdr_cli.data.completions import remove_after
from vdr_cli.data.order import stream_indices
from vdr_cli.data.prompts import Limits, PromptSet, load_prompts
from vdr_cli.disagreement.check import check_members
from vdr_cli.disagreement.hooks import ensemble
from vdr_cli.disagreement.members import EnsembleSpec
from vdr_cli.engine import checkpoint as checkpoints
from vdr_cli.engine import collectives
from vdr_cli.engine.build import Engine, build_engine, start_distributed
from vdr_cli.engine.export import export_model
from vdr_cli.engine.reference import Adapterless, FrozenCopy, build_reference
from vdr_cli.errors import ConfigError, MachineError, VdrError
from vdr_cli.exploration.bonus import PATIENCE, BonusWatch, RunningRms
from vdr_cli.launch import outcome, watchdog
from vdr_cli.launch.environment import prepare_process
from vdr_cli.models.anatomy import check_head
from vdr_cli.models.independence import check_independence
from vdr_cli.models.loading import eos_token_ids, load_model_config, load_tokenizer
from vdr_cli.rewards.loading import LoadedReward, check_columns, load_rewards
from vdr_cli.rewards.stream import RewardStream
from vdr_cli.rollout.base import Rollout
from vdr_cli.rollout.build import open_rollout
from vdr_cli.samples import Prompt, Sampling
from vdr_cli.system.stopping import StopSignal
from vdr_cli.training import audit_record
from vdr_cli.training import pending_rollout as drawings
from vdr_cli.training.live import LiveView
from vdr_cli.training.metrics import MetricsWriter
from vdr_cli.training.pending_rollout import Drawing
from vdr_cli.training.timing import PhaseTimer


@dataclass
class LoopState:
    """What a checkpoint must carry beside the engine so that a resumed run is the same run."""

    step: int = 0
    """Optimizer steps done."""
    drawn: int = 0
    """Prompts taken from the stream so far, over all ranks."""
    tokens: int = 0
    """Completion tokens so far, over all ranks."""
    refused: int = 0
    """Steps refused in a row."""
    best: float | None = None
    """Best held-out pass@1."""
    best_step: int | None = None
    rms: dict[str, Any] = field(default_factory=lambda: RunningRms().state_dict())
    """The bonus's running RMS after the steps done."""


@dataclass
class Run:
    """One rank's parts of a run."""

    config: Config
    directory: Path
    engine: Engine
    tokenizer: Any
    prompts: PromptSet
    held_out: PromptSet | None
    rewards: list[LoadedReward]
    rollout: Rollout
    sampling: Sampling
    ensemble: EnsembleSpec | None
    rms: RunningRms
    reference: FrozenCopy | Adapterless | None
    writer: MetricsWriter | None
    view: LiveView | None
    stop: StopSignal
    state: LoopState = field(default_factory=LoopState)
    timer: PhaseTimer = field(default_factory=PhaseTimer)
    exit_code: int = 0
    saved_step: int | None = None
    drawn_this_step: int = 0
    """Prompts taken from the stream in this step, over all ranks."""
    drawing: Drawing | None = None
    """This step's groups, when they were drawn in the step before (rollout.ahead)."""
    next_drawing: Drawing | None = None
    """The next step's groups, drawn in this one."""
    watch: BonusWatch = field(default_factory=BonusWatch)

    @property
    def step(self) -> int:
        return self.state.step

    def stopped(self) -> bool:
        """True when any rank received Ctrl-C or SIGTERM; the exit code says which. Collective."""
        signal_number = int(collectives.all_reduce_max([float(self.stop.received)])[0])
        if signal_number:
            self.exit_code = 128 + signal_number
        return bool(signal_number)

    def note(self, text: str) -> None:
        """A line for the user, from rank 0."""
        if self.view is not None:
            self.view.note(text)

    def next_prompts(self, counts: list[int]) -> list[tuple[int, Prompt]]:
        """This rank's prompts when rank r takes the next counts[r] of the stream, each with its position in it.

        The step's end moves `state.drawn` on, so a step that is abandoned draws the same prompts again.
        """
        rank = collectives.rank()
        first = self.state.drawn + self.drawn_this_step + sum(counts[:rank])
        self.drawn_this_step += sum(counts)
        return [(position, self.prompt_at(position)) for position in range(first, first + counts[rank])]

    def prompt_at(self, position: int) -> Prompt:
        """Of the stream."""
        cfg = self.config
        (row,) = stream_indices(len(self.prompts), position, 1, cfg.train.seed, cfg.data.shuffle)
        return self.prompts[row]

    def advance(self, steps: int, tokens: int) -> None:
        """These optimizer steps are done: what they used is used."""
        self.state.step += steps
        self.state.tokens += tokens
        self.state.drawn += self.drawn_this_step
        self.state.rms = self.rms.state_dict()
        self.drawn_this_step = 0
        self.drawing, self.next_drawing = self.next_drawing, None
        every = self.config.grpo.sync_reference_every
        if isinstance(self.reference, FrozenCopy) and every and self.step // every > (self.step - steps) // every:
            self.reference.synchronise()

    def best_is_new(self) -> bool:
        """True right after the best held-out evaluation so far, when the best checkpoint is to be kept."""
        return self.config.train.keep_best and self.state.best_step == self.step

    def save_if_possible(self) -> None:
        """A checkpoint that cannot be written (disk full) is said and passed over: the one before is intact."""
        try:
            self.save_checkpoint()
        except MachineError as error:
            self.note(f"{error}; going on")

    def save_checkpoint(self) -> None:
        """Write checkpoints/step_<n>, once a step. Collective."""
        if self.saved_step == self.step:
            return
        watchdog.phase("checkpoint")
        folder = self.directory / "checkpoints"
        state = {"loop": vars(self.state), "config_hash": config_hash(self.config)}
        checkpoints.save(self.engine, folder, self.step, state, also=self._save_more)
        self.saved_step = self.step
        best = self.state.best_step if self.config.train.keep_best else None
        keep = folder / f"step_{best:06d}" if best is not None else None
        checkpoints.prune(folder, self.config.train.keep_last, keep)

    def _save_more(self, folder: Path) -> None:
        if isinstance(self.reference, FrozenCopy):
            self.reference.save(folder)
        if self.drawing is not None:
            drawings.save(self.drawing, folder)

    def _write_report(self) -> None:
        """report.html; a report that cannot be made is said, and costs nothing else."""
        from vdr_cli.report.page import write_report

        try:
            write_report(self.directory)
        except (VdrError, OSError) as error:
            self.note(f"report.html was not written: {error}")

    def finish(self) -> None:
        """The last checkpoint; when the run reached its end also model/ and the finished marker. Collective."""
        self.save_checkpoint()
        if self.exit_code:
            return
        if self.config.train.save_model:
            export_model(self.engine, self.tokenizer, self.directory / "model")
        if collectives.is_main() and self.config.observe.report:
            self._write_report()
        collectives.together(self._say_finished)

    def _say_finished(self) -> None:
        try:
            if collectives.is_main():
                outcome.write_finished(self.directory, step=self.step)
        except OSError as fault:
            raise MachineError(f"{self.directory}: the run is done but this cannot be written: {fault}") from fault


def even_shares(count: int) -> list[int]:
    """How many of `count` things each rank takes: they differ by at most one."""
    size = collectives.world_size()
    return [count * (rank + 1) // size - count * rank // size for rank in range(size)]


@contextmanager
def open_run(config: Config, resume: str | None) -> Iterator[Run]:
    """Everything a run needs, loaded or resumed; closed again whatever happens.

    After a VdrError in the loop the last finished step is saved before the error goes on.
    """
    prepare_process(config.launch)
    if config.train.output is None:
        raise ConfigError("train.output is needed: the run directory, the same for every process")
    directory = Path(config.train.output)
    watchdog.begin(str(directory), config.launch.fault_timeout)
    device = start_distributed()
    with ExitStack() as stack:
        stack.callback(_leave_process_group)
        rank, size = collectives.rank(), collectives.world_size()
        stack.enter_context(watchdog.connected(rank, size, collectives.broadcast_object))
        refuse_other_settings(config)
        stop = stack.enter_context(StopSignal())
        run = _build(config, directory, device, stop, resume, stack)
        try:
            yield run
        except VdrError as error:
            outcome.write_fault(directory, collectives.rank(), str(error), error.exit_code)
            if not isinstance(error, MachineError):
                run.note("saving the last finished step")
                run.save_if_possible()
            raise


@dataclass
class _Inputs:
    """What is read before a weight is loaded."""

    tokenizer: Any
    prompts: PromptSet
    held_out: PromptSet | None
    rewards: list[LoadedReward]


def _read_inputs(config: Config) -> _Inputs:
    model = config.model
    named = model.name, model.revision, model.trust_remote_code
    tokenizer = load_tokenizer(*named)
    limits = Limits.of(load_model_config(*named), config.rollout.max_new_tokens)
    prompts = load_prompts(config.data, "train", tokenizer, limits)
    rewards = load_rewards(config.rewards, config.data.name)
    check_columns(rewards, prompts.columns)
    held_out = load_prompts(config.data, "eval", tokenizer, limits) if config.train.eval_every else None
    if held_out is not None:
        check_columns(rewards, held_out.columns)
    return _Inputs(tokenizer, prompts, held_out, rewards)


def refuse_other_settings(config: Config) -> None:
    """Every rank has read its own file and flags; with other ones it would leave the rest waiting. Collective."""
    own = config_hash(config), config.observe.completions_every, config.observe.audit_every
    (first, expected), *others = collectives.gather_objects((socket.gethostname(), own))
    for host, theirs in others:
        if theirs != expected:
            raise ConfigError(
                f"the settings on host {host} are not those on {first}, where rank 0 is; start every rank with the "
                "same file and flags"
            )


def _check_model(engine: Engine, members: EnsembleSpec | None) -> None:
    """What is asked of the model's modules can be had of them; ConfigError otherwise. Collective."""

    def check(model: Any) -> None:
        check_head(model)
        check_independence(model)
        if members is not None:
            with ensemble(model, members, step=0, members=[0]):  # refuses a last_k beyond the model's layers
                pass
            check_members(model, members)

    with engine.twin() as model:
        collectives.together(lambda: check(model))


def _build(
    config: Config, directory: Path, device: torch.device, stop: StopSignal, resume: str | None, stack: ExitStack
) -> Run:
    _seed(config.train.seed)
    inputs = collectives.together(lambda: _read_inputs(config))
    _forget_the_end(directory)
    found, passed_over = _choose_checkpoint(directory, resume)
    members = _ensemble(config)
    engine = build_engine(config, device, universal=checkpoints.needs_conversion(found))
    _check_model(engine, members)
    _prepare_directory(directory, config, fresh=resume is None)
    eos_ids = eos_token_ids(engine.causal_lm, inputs.tokenizer)
    is_main = collectives.is_main()
    run = Run(
        config=config,
        directory=directory,
        engine=engine,
        **vars(inputs),
        rollout=stack.enter_context(open_rollout(config.rollout, inputs.tokenizer, eos_ids, directory, is_main)),
        sampling=sampling_of(config),
        ensemble=members,
        rms=RunningRms(),
        reference=build_reference(config, engine),
        writer=None,
        view=None,
        stop=stop,
        watch=BonusWatch(flat_after=min(PATIENCE, config.train.steps)),
    )
    collectives.together(lambda: _open_outputs(run, stack) if is_main else None)
    run.note(f"run directory {directory}")
    for line in passed_over:
        run.note(line)
    if resume is not None:
        _go_on(run, found)
    if run.view is not None:
        run.view.start(config.train.steps, run.step)
    return run


def sampling_of(config: Config) -> Sampling:
    cfg = config.rollout
    return Sampling(
        cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p, cfg.repetition_penalty, tuple(cfg.stop)
    )


def _ensemble(config: Config) -> EnsembleSpec | None:
    cfg = config.disagreement
    return None if cfg.mode == "none" else EnsembleSpec.from_config(cfg, config.train.seed)


def _choose_checkpoint(directory: Path, resume: str | None) -> tuple[checkpoints.Checkpoint | None, list[str]]:
    if resume is None:
        return None, []
    if resume == "auto":
        return checkpoints.newest_complete(directory / "checkpoints")
    return checkpoints.open_checkpoint(Path(resume)), []


def _go_on(run: Run, found: checkpoints.Checkpoint | None) -> None:
    """From a checkpoint, or from the start when there is none; what the run wrote after it will be written again."""
    folder = run.directory / "checkpoints"
    if found is not None:
        checkpoints.load(run.engine, found)
        if isinstance(run.reference, FrozenCopy):
            run.reference.load(found.path)
        run.state = LoopState(**found.state["loop"])
        run.rms.load_state_dict(run.state.rms)
        run.drawing = _saved_drawing(run, found.path)
        run.saved_step = run.step if found.path.parent == folder else None
        run.note(f"resumed from {found.path}")
    checkpoints.set_aside(folder, after=run.step if found is not None else -1)
    if run.writer is not None:
        run.writer.truncate(run.step or -1)  # what was measured before the first step is measured again
        remove_after(run.directory, run.step)
        audit_record.remove_from(run.directory, run.step)


def _saved_drawing(run: Run, folder: Path) -> Drawing | None:
    """The groups that this checkpoint carries for the step it resumes at. Collective."""

    def stream(prompts: list[Prompt]) -> RewardStream:
        return drawings.reward_stream(run.config, run.rewards, run.tokenizer, prompts, run.step)

    return drawings.load(folder, even_shares, run.prompt_at, stream, run.tokenizer.pad_token_id)


def _open_outputs(run: Run, stack: ExitStack) -> None:
    run.writer = stack.enter_context(MetricsWriter(run.directory, run.config.observe, run.config.model_dump()))
    run.view = stack.enter_context(LiveView(run.config.observe.live))


def _forget_the_end(directory: Path) -> None:
    """How an earlier run ended is not how this one did, whatever becomes of it."""
    _on_disk(directory, lambda: outcome.clear(directory) if directory.is_dir() else None)


def _prepare_directory(directory: Path, config: Config, fresh: bool) -> None:
    """The directory with config.yaml, once everything that can be wrong with the settings has been looked at.

    fresh: another run that took the directory in the meantime keeps it.
    """

    def prepare() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            with (directory / "config.yaml").open("x" if fresh else "w", encoding="utf-8") as file:
                file.write(dump_run_record(config))
        except FileExistsError:
            raise ConfigError(f"train.output {directory} holds another run; give another --output") from None

    _on_disk(directory, prepare)


def _on_disk(directory: Path, action: Callable[[], None]) -> None:
    """The action on rank 0; what the disk refuses is the same MachineError on every rank. Collective."""

    def guarded() -> None:
        try:
            action()
        except OSError as fault:
            reason = fault.strerror or fault
            raise MachineError(f"train.output {directory}: cannot be written ({reason}); choose another") from fault

    collectives.together(lambda: guarded() if collectives.is_main() else None)


def _seed(seed: int) -> None:
    """For reward functions that draw random numbers; ours never use global generators."""
    own = seed * 1_000_003 + collectives.rank()
    random.seed(own)
    np.random.seed(own % 2**32)
    torch.manual_seed(own)


def _leave_process_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
