"""Warnings about a bonus that does nothing, or too much."""

from __future__ import annotations

from dataclasses import dataclass

STEPS_BEFORE_WARNING = 20
"""Consecutive steps before a condition is reported."""


@dataclass
class BonusWatch:
    """Warns once when the bonus does nothing, and once when it outweighs the task, for many consecutive steps."""

    quantity: str
    """The source's numbers, as a warning calls them."""
    cause: str
    """The usual reason that they do not differ, and the settings that matter."""
    flat_after: int = STEPS_BEFORE_WARNING
    outweighed_after: int = STEPS_BEFORE_WARNING
    flat: int = 0
    """Consecutive steps so far without any spread."""
    outweighed: int = 0
    """Consecutive steps so far in which the bonus was larger than the task advantage."""
    warned: frozenset[str] = frozenset()

    def warning(self, spread: bool, bonus: float, task: float) -> str | None:
        """Count one step; the warning that is due, or None.

        spread: the measures differ within some group. bonus, task: mean absolute values over the step.
        """
        self.flat = 0 if spread else self.flat + 1
        self.outweighed = self.outweighed + 1 if bonus > task else 0
        if self.flat >= self.flat_after and "flat" not in self.warned:
            self.warned |= {"flat"}
            return (
                f"the {self.quantity} of the completions has not differed within any group for {self.flat} steps, so "
                f"the bonus is 0: {self.cause}"
            )
        if self.outweighed >= self.outweighed_after and "outweighed" not in self.warned:
            self.warned |= {"outweighed"}
            return (
                f"the bonus has been larger than the task advantage for {self.outweighed} steps: task rewards "
                "are equal in most groups, or bonus.weight is too large; lower it or give it a schedule"
            )
        return None
