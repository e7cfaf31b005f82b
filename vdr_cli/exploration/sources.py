"""The sources of the bonus, by name: what each one needs of a step, and the function that makes its numbers.

A source is a pure function in a file of its own. Here it is given the step's signals and its own settings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from vdr_cli.config import Config
from vdr_cli.exploration import disagreement
from vdr_cli.exploration.bonus import reduce


@dataclass(frozen=True)
class Signals:
    """A rank's completions as a source sees them: B rows, groups of `group_size` contiguous ones, on the CPU.

    The fields below `task_advantages` are None unless the source's `needs` names them.
    """

    group_size: int
    mask: Tensor  # (B, T) bool, valid tokens
    task_rewards: Tensor  # (B,), NaN where there is none
    solved: Tensor  # (B,) bool
    task_advantages: Tensor  # (B,)
    measure: Tensor | None = None
    """(B, T) or (B,) of the dropout members, nats."""


@dataclass(frozen=True)
class Numbers:
    """What a source says of the completions."""

    per_completion: Tensor  # (B,), for people and metrics
    b: Tensor
    """What the bonus is made from: (B,), or (B, T), 0 at padding."""


@dataclass(frozen=True)
class Source:
    """A way to compute a number per completion or token that a bonus is made from."""

    needs: frozenset[str]
    """Fields of `Signals` that it reads beside the rewards; nothing else is computed."""
    numbers: Callable[[Signals, Config], Numbers]
    quantity: Callable[[Config], str]
    """The numbers' name, for tables and warnings."""
    flat: Callable[[Config], str]
    """Why the numbers may not differ within any group."""


def _disagreement(signals: Signals, config: Config) -> Numbers:
    cfg, measure = config.disagreement, signals.measure
    assert measure is not None
    per_completion = reduce(measure, signals.mask, cfg.last_n)
    if cfg.credit == "sequence":
        return Numbers(per_completion, per_completion)
    credit = disagreement.token_credit(measure, signals.mask, cfg.measure, cfg.discount, cfg.last_n)
    return Numbers(per_completion, credit)


SOURCES = {
    "disagreement": Source(
        frozenset({"measure"}),
        _disagreement,
        lambda config: config.disagreement.measure,
        lambda config: (
            "groups of equal completions, or members that agree (disagreement.dropout is "
            f"{config.disagreement.dropout}, scope {config.disagreement.effective_scope})"
        ),
    ),
}


def source_of(config: Config) -> Source | None:
    """The source of the run's bonus; None for plain GRPO."""
    name = config.bonus_source
    return None if name == "none" else SOURCES[name]
