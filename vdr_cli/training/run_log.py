"""The outputs of a run: metrics.jsonl, completions/, the terminal. Rank 0 writes and prints, other ranks are silent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from vdr_cli.config.schema import Config
from vdr_cli.data.completions import write_completions
from vdr_cli.data.metrics import read_metrics
from vdr_cli.engine import collectives
from vdr_cli.errors import MachineError
from vdr_cli.exploration.collapse import CollapseWatch
from vdr_cli.exploration.watch import BonusWatch
from vdr_cli.launch import watchdog
from vdr_cli.rewards.watch import NO_REWARD, RewardWatch
from vdr_cli.training.batch import Advantages, RewardedGroups
from vdr_cli.training.completion_table import completion_columns, shown_group
from vdr_cli.training.live import LiveView
from vdr_cli.training.metrics_writer import MetricsWriter
from vdr_cli.training.resources import Resources
from vdr_cli.training.state import LoopState

PREFIXES = ("disagreement/", "bonus/")
"""Beginnings of the names of the bonus's metrics: a run has one of them."""

MOST_APART = 0.05
"""Nats per token that rounding explains: bfloat16 gives about 0.007 on a 0.5B model."""


class RunLog:
    """One rank's log of a run. writer and view are None on every rank but rank 0; watch is None without a bonus."""

    def __init__(
        self,
        directory: Path,
        writer: MetricsWriter | None,
        view: LiveView | None,
        watch: BonusWatch | None,
        rewards: RewardWatch,
        collapse: CollapseWatch,
    ) -> None:
        self._directory, self._writer, self._view = directory, writer, view
        self._watch, self._rewards, self._collapse = watch, rewards, collapse

    def note(self, text: str) -> None:
        """Print a line for the user."""
        if self._view is not None:
            self._view.note(text)

    def begin(self, total_steps: int, done: int) -> None:
        """Start the clock of the live view. done: steps before this process."""
        if self._view is not None:
            self._view.start(total_steps, done)

    def truncate(self, step: int) -> None:
        """Drop the metrics after this step: a resumed run writes them again. What they warned of is not repeated."""
        if self._writer is not None:
            self._writer.truncate(step)
            for line in read_metrics(self._writer.path):
                self._collapse.warnings(line)

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Record held-out numbers apart from a step's: those before the first step, or those that a step still owed.

        Collective. Raises MachineError on every rank when the line of a step cannot be rewritten.
        """
        if step == 0:
            self._write(0, metrics)
        else:
            with collectives.agreed():
                if self._writer is not None:
                    self._writer.amend(step, metrics)
        self._warn_of_collapse(metrics)
        shown = [f"{name} {value:.3f}" for name, value in metrics.items() if not name.endswith(("_low", "_high"))]
        self.note(f"step {step}: {', '.join(shown)}")

    def step(
        self,
        res: Resources,
        state: LoopState,
        metrics: dict[str, float],
        batch: RewardedGroups,
        advantages: Advantages,
        save_completions: bool,
    ) -> None:
        """Record a step: its metrics, its completions if they are to be saved, a line on the terminal. Collective."""
        metrics = metrics | counters(state, len(res.prompts))
        if save_completions:
            with collectives.agreed():
                own = completion_columns(res, batch, advantages)
            self._save_completions(own, state.step, res)
        self._write(state.step, metrics)
        if self._view is not None:
            self._view.update(state.step, metrics, shown_group(res, batch, advantages))
        for line in self._rewards.warnings(largest_rewards(batch.rewards)):
            self.note(line)
        if warning := sampler_warning(res.config, state.step, metrics):
            self.note(warning)
        self._warn_of_collapse(metrics)
        if self._watch is not None and (warning := bonus_warning(self._watch, metrics)):
            self.note(warning)

    def finish_uploads(self) -> None:
        """Let Weights & Biases upload the rest, while the other ranks wait. Collective.

        When one rank exits with a code, launchers end the others with all their processes, the uploading one too.
        """
        watchdog.phase("upload")
        with collectives.agreed():
            if self._writer is not None:
                self._writer.finish_wandb()

    def _warn_of_collapse(self, metrics: dict[str, float]) -> None:
        for line in self._collapse.warnings(metrics):
            self.note(line)

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        """Append a line to metrics.jsonl. If the disk is full, warn; the line is written with the next one."""
        if self._writer is not None:
            try:
                self._writer.log(step, metrics)
            except MachineError as error:
                self.note(f"{error}; training continues")

    def _save_completions(self, own: dict[str, list[Any]], step: int, res: Resources) -> None:
        """Write completions/step_<n>.parquet with every rank's rows, in the order of the stream. Collective."""
        parts = collectives.gather_objects(own)
        if self._writer is None:
            return
        names = dict.fromkeys(name for part in parts for name in part)  # what a function logged need not be on all
        columns = {
            name: [value for part in parts for value in part.get(name, [None] * len(part["prompt"]))] for name in names
        }
        columns["group"] = [row // res.config.rollout.group_size for row in range(len(columns["prompt"]))]
        try:
            write_completions(self._directory / "completions", step, columns)
        except MachineError as error:  # a full disk must not end the training that the checkpoints protect
            self.note(str(error))


def counters(state: LoopState, rows: int) -> dict[str, float]:
    """The run so far: tokens as TRL counts them, of these the sampled ones, and passes over the rows of the data."""
    return {
        "num_tokens": float(state.prompt_tokens + state.tokens),
        "sampled_tokens": float(state.tokens),
        "epoch": state.drawn / rows,
    }


def largest_rewards(rewards: Tensor) -> list[float]:
    """The largest |reward| of each function over all ranks, NO_REWARD for only None. rewards: (B, F). Collective."""
    own: list[float] = rewards.abs().nan_to_num(NO_REWARD).amax(0).tolist()
    return collectives.all_reduce_max(own)


def sampler_warning(config: Config, step: int, metrics: dict[str, float]) -> str | None:
    """A line if sampler and policy disagree in the first step, where both have the same weights; None otherwise.

    step: optimizer steps done. Later updates of one rollout, completions drawn ahead and members are of other weights.
    """
    apart = metrics.get("sampling/sampling_logp_difference/mean", 0.0)
    other_weights = config.grpo.updates_per_rollout > 1 or config.rollout.ahead or config.rollout.members
    if step != 1 or other_weights or not apart > MOST_APART:
        return None
    return (
        f"sampler and policy are {apart:.3f} nats per token apart with the same weights: the model's numbers depend on "
        "how tokens are batched or cached, and its gradient is biased; grpo.importance_cap bounds the effect"
    )


def bonus_warning(watch: BonusWatch, metrics: dict[str, float]) -> str | None:
    """A warning once the bonus has not acted, or has acted too much, for a while; None while all is well."""
    of_bonus = {name.partition("/")[2]: value for name, value in metrics.items() if name.startswith(PREFIXES)}
    spread, is_open = (of_bonus.get(name, 0.0) > 0 for name in ("groups_with_spread", "gate_open"))
    bonus, task = of_bonus.get("bonus_abs"), metrics.get("advantage_abs")
    if bonus is None or task is None:  # the step's numbers are not finite: its refusal is reported instead
        return None
    return watch.warning(spread, is_open, bonus, task)
