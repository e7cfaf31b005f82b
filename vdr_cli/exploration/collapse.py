"""Early warning: a line when a policy stops exploring, with the setting that the cause suggests.

Everything follows from the lines of metrics.jsonl: a resumed run, a run's last lines and its report say the same.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from vdr_cli.config import Config

START_STEPS = 5
"""Lines whose mean is the start: one line's entropy wanders by a tenth, and the first updates change little."""
WINDOW = 20
"""Lines whose mean is compared with the start: a single rollout of easy or hard prompts warns of nothing."""
ENTROPY_LEFT = 0.1
"""Share of the start's entropy. Rewards are bought with entropy, and where 94 % of it was spent 93 % of the gain had
been made (Cui et al. 2025, arXiv 2505.22617): below a tenth, little is left to buy with."""
NO_SIGNAL = 0.8
"""Share of groups whose rewards are all equal: with four of five groups idle, a step learns from a fifth of what it
samples."""
DISTINCT_LEFT = 0.25
"""Share of the start's distinct completions per group: three of four samples repeat what their group has already. A
policy that learns a task with few right answers loses half without harm: the starter's demo goes from 12 to 4."""
EVALUATIONS = 2
"""Evaluations in a row below the best one's pass@k. The upper ends of their 95 % intervals must be below it, and all
evaluations draw the same prompts and random numbers, so noise alone hardly does this twice."""

WORSE = 0.5
"""Share of the start's reward or pass@1 below which the policy has become worse, rather than narrower."""

PASS_AT = re.compile(r"eval/pass@(\d+)$")


@dataclass(frozen=True)
class Cures:
    """Advice for each cause, by this run's settings."""

    entropy: str
    unsolved: str
    solved: str
    distinct: str
    coverage: str
    worse: str
    """The policy solves less than at the start: it is not exploration that it lacks."""

    @classmethod
    def of(cls, config: Config) -> Cures:
        """The settings that are not in use yet."""
        grpo = config.grpo
        entropy = "set grpo.entropy_target to about half of what it was at the start"
        if grpo.entropy_target is not None:
            entropy = f"raise grpo.entropy_max, which is {grpo.entropy_max:g}"
        resample = "" if grpo.resample_groups else ", or set grpo.resample_groups"
        varied = "set grpo.advantage to pass_at_k, which rewards answers that the group lacks"
        if grpo.advantage == "pass_at_k":
            varied = "raise grpo.pass_k" if grpo.pass_k < config.rollout.group_size else "lower train.learning_rate"
        return cls(
            entropy=f"{entropy}, or lower train.learning_rate",
            unsolved=f"take easier prompts, raise rollout.group_size{resample}",
            solved=f"take harder prompts{resample}",
            distinct=f"{varied}, or set grpo.entropy_target" if grpo.entropy_target is None else varied,
            coverage=varied,
            worse="lower train.learning_rate"
            + ("" if grpo.beta else ", or set grpo.beta, which holds it near its start"),
        )


@dataclass
class CollapseWatch:
    """Warns once for each cause. Feed it every line of metrics in order."""

    cures: Cures
    solved_at: float
    """Reward of a solved completion (rewards.solved_at)."""
    _start: dict[str, list[float]] = field(default_factory=dict)
    _newest: dict[str, deque[float]] = field(default_factory=dict)
    _best: dict[int, float] = field(default_factory=dict)
    """Highest held-out pass@k so far, by k."""
    _first: float | None = None
    """Held-out pass@1 of the first evaluation."""
    _below: int = 0
    """Evaluations in a row that are below the best."""
    _warned: set[str] = field(default_factory=set)

    def warnings(self, metrics: Mapping[str, object]) -> list[str]:
        """Take in one line; what is to be said now."""
        known = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
        found = {"coverage": self._coverage(known)}
        if "loss" in known or "frac_reward_zero_std" in known:  # a step's line, not an evaluation's alone
            for name in ("entropy", "completions/distinct", "frac_reward_zero_std", "reward"):
                if math.isfinite(known.get(name, math.nan)):
                    self._take(name, known[name])
            found |= {"entropy": self._entropy(), "signal": self._signal(), "distinct": self._distinct()}
        due = {cause: line for cause, line in found.items() if line and cause not in self._warned}
        self._warned |= set(due)
        return list(due.values())

    def _take(self, name: str, value: float) -> None:
        start = self._start.setdefault(name, [])
        if len(start) < START_STEPS:
            start.append(value)
        self._newest.setdefault(name, deque(maxlen=WINDOW)).append(value)

    def _now(self, name: str) -> float:
        """Mean of the newest lines; NaN while there are too few."""
        newest = self._newest.get(name, deque())
        return sum(newest) / WINDOW if len(newest) == WINDOW else math.nan

    def _at_start(self, name: str) -> float:
        start = self._start.get(name) or [math.nan]
        return sum(start) / len(start)

    def _entropy(self) -> str | None:
        now, start = self._now("entropy"), self._at_start("entropy")
        if not now < ENTROPY_LEFT * start:
            return None
        return (
            f"the policy has all but stopped exploring: its entropy is {now:.3g} nats per token over the last {WINDOW} "
            f"rollouts, {now / start:.0%} of the start's {start:.3g}; {self.cures.entropy}"
        )

    def _signal(self) -> str | None:
        share = self._now("frac_reward_zero_std")
        if not share > NO_SIGNAL:
            return None
        reward, start = self._now("reward"), self._at_start("reward")
        what, cure = (
            ("solved", self.cures.solved) if reward >= self.solved_at / 2 else ("not solved", self.cures.unsolved)
        )
        if reward < WORSE * start:
            cure = f"the mean reward was {start:.3g} at the start and is {reward:.3g}: {self.cures.worse}"
        return (
            f"{share:.0%} of the groups gave no signal over the last {WINDOW} rollouts: all their rewards are equal, "
            f"most of them {what}; {cure}"
        )

    def _distinct(self) -> str | None:
        now, start = self._now("completions/distinct"), self._at_start("completions/distinct")
        if not now < DISTINCT_LEFT * start:
            return None
        return (
            f"a group holds {now:.1f} different completions on average over the last {WINDOW} rollouts, against "
            f"{start:.1f} at the start: most samples repeat each other; {self.cures.distinct}"
        )

    def _coverage(self, metrics: Mapping[str, float]) -> str | None:
        """Held-out pass@k at the largest k, k > 1."""
        ks = [int(match[1]) for name in metrics if (match := PASS_AT.match(name))]
        k = max(ks, default=1)
        if k == 1:
            return None
        value, once = metrics[f"eval/pass@{k}"], metrics.get("eval/pass@1", math.nan)
        self._first = once if self._first is None else self._first
        best = self._best.get(k, -math.inf)
        self._best[k] = max(best, value)
        self._below = self._below + 1 if metrics.get(f"eval/pass@{k}_high", value) < best else 0
        if self._below < EVALUATIONS:
            return None
        cure = self.cures.coverage
        if once < WORSE * self._first:
            cure = f"pass@1 has fallen as well, from {self._first:.3f} to {once:.3f}: {self.cures.worse}"
        return (
            f"held-out pass@{k} has fallen from {best:.3f} to {value:.3f}: the policy solves fewer problems in {k} "
            f"tries than it did; {cure}"
        )


def watch_of(config: Config) -> CollapseWatch:
    """The watch of a run with these settings."""
    return CollapseWatch(Cures.of(config), config.rewards.solved_at)


def warnings_of(config: Config, lines: Iterable[Mapping[str, object]]) -> list[tuple[int, str]]:
    """(step, warning) of a whole run, from its lines of metrics.jsonl in order."""
    watch = watch_of(config)
    return [(int(str(line["step"])), warning) for line in lines for warning in watch.warnings(line)]
