"""Logs of reward functions, under TRL's names: `log_metric(name, value)` and `log_extra(column, values)`.

A run averages a metric over its calls on all ranks, and saves a column beside the completions. This file imports no
torch: a worker process records too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vdr_cli.errors import DataError

OWN_METRICS = {
    *("step", "num_tokens", "sampled_tokens", "epoch", "step_tokens", "step_prompt_tokens", "tokens_per_second"),
    *("reward", "reward_std", "solved", "frac_reward_zero_std", "advantage_abs", "step_time"),
    *("loss", "grad_norm", "learning_rate", "refused_steps", "entropy", "entropy_coef", "kl", "aux_loss"),
}
OWN_FAMILIES = {
    *("rewards", "completions", "episodes", "tools", "disagreement", "bonus", "denominator", "ratio", "clip_ratio"),
    *("covariance", "sampling", "time", "step_time_share", "tokens_per_second", "mfu", "eval"),
}
"""The run's own metrics (docs/metrics.md): whole names, and what stands before a slash. No function may log them."""

OWN_COLUMNS = {"step", "group"}
"""Columns that a file of completions gets last (data/completions.py)."""


@dataclass
class CallLog:
    """Log of one call of one function. Its two methods are the arguments that the function gets."""

    metrics: dict[str, list[float]] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def log_metric(self, name: str, value: float) -> None:
        """Record a number. Raises ValueError for a name of the run's own metrics, TypeError for no number."""
        name = _name("log_metric", name)
        family, slash, _ = name.partition("/")
        if name in OWN_METRICS or (slash and family in OWN_FAMILIES):
            raise ValueError(f"log_metric: {name} is the run's own metric (docs/metrics.md); choose another name")
        if isinstance(value, str):
            raise TypeError(f"log_metric: {name} must be a number, not {value[:30]!r}")
        self.metrics.setdefault(name, []).append(float(value))

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        """Record a column, one value per completion; another call for the same column appends, as in TRL."""
        name = _name("log_extra", column)
        if isinstance(values, str):
            raise TypeError(f"log_extra: {name} must be a list with one value per completion, not text")
        self.columns.setdefault(name, []).extend(_cell(value) for value in values)

    def take(self, other: CallLog) -> None:
        """Append what a copy in another process recorded."""
        for mine, theirs in ((self.metrics, other.metrics), (self.columns, other.columns)):
            for name, values in theirs.items():
                mine.setdefault(name, []).extend(values)  # type: ignore[attr-defined]


def log_in(arguments: dict[str, Any]) -> CallLog | None:
    """The log that these arguments of a function write to; None when they write to none."""
    owners = (getattr(arguments.get(name), "__self__", None) for name in ("log_metric", "log_extra"))
    return next((owner for owner in owners if isinstance(owner, CallLog)), None)


@dataclass(frozen=True)
class Logs:
    """Log of all functions about a rank's completions."""

    cells: list[dict[str, Any]] = field(default_factory=list)
    """(B,) the columns of each completion, absent where no call logged them."""
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Sum and number of the values of each metric."""

    def select(self, rows: Sequence[int]) -> Logs:
        """These completions. Metrics stay: a value belongs to a call, not to a completion."""
        return Logs([self.cells[row] for row in rows] if self.cells else [], self.metrics)


def joined(parts: Iterable[Logs]) -> Logs:
    """The completions of all parts in order, and their metrics together."""
    parts = list(parts)
    return Logs([cells for part in parts for cells in part.cells], summed(part.metrics for part in parts))


def summed(shares: Iterable[dict[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    """Sums and counts added up, in order; a share need not have every name."""
    total: dict[str, tuple[float, float]] = {}
    for share in shares:
        for name, (top, bottom) in share.items():
            old_top, old_bottom = total.get(name, (0.0, 0.0))
            total[name] = old_top + top, old_bottom + bottom
    return total


def logs_of(calls: Iterable[tuple[str, Sequence[int], CallLog]], count: int) -> Logs:
    """The logs of `count` completions from (label of the function, its call's rows, the call's log).

    Raises DataError, naming both, when two functions log the same column.
    """
    cells: list[dict[str, Any]] = [{} for _ in range(count)]
    owner: dict[str, str] = {}
    shares = []
    for label, rows, log in calls:
        shares.append({name: (sum(values), float(len(values))) for name, values in log.metrics.items()})
        for column, values in log.columns.items():
            if (other := owner.setdefault(column, label)) != label:
                raise DataError(f"{other} and {label} both log the column {column}; rename it in one of them")
            for row, value in zip(rows, values, strict=True):
                cells[row][column] = value
    return Logs(cells, summed(shares))


def _name(function: str, name: Any) -> str:
    if not isinstance(name, str) or not name or not name.isprintable():
        raise ValueError(f"{function}: {name!r:.40} is not a name; give a short text")
    return name


def _cell(value: Any) -> Any:
    """A number, a truth value, None, or the value's text."""
    if hasattr(value, "tolist"):  # NumPy's and torch's numbers
        value = value.tolist()
    if isinstance(value, int) and not isinstance(value, bool):
        return value if -(2**63) <= value < 2**63 else str(value)
    return value if value is None or isinstance(value, (bool, float, str)) else str(value)
