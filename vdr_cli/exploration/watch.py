"""Warnings about a bonus that does nothing, or too much."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

EVIDENCE = (
    "disagreement has not been shown to help; on one task each, --bonus novelty has (where most groups fail), and "
    "--bonus surprisal and counts with bonus.weight 0.3 (where problems have several right answers): docs/evidence.md"
)
"""Printed once, when a run begins that pays for disagreement."""

ROLLOUTS_BEFORE_WARNING = 20
"""Rollouts that a condition lasts before it is reported."""

UNSOLVED = "no completion reached rewards.solved_at"
CLOSED = {
    "not_failed": f"task rewards were equal in every group, and {UNSOLVED}",
    "some_correct": UNSOLVED,
    "correct": UNSOLVED,
    "incorrect": "every completion reached rewards.solved_at",
    "zero_variance": "task rewards differed in every group",
}
"""Gate to the reason that it is closed for every completion; gate all never is."""


@dataclass
class BonusWatch:
    """Warns once when the bonus has done nothing for many rollouts, and once when it has outweighed the task over them.

    Single steps swing: in a run whose policy the bonus ruined, it outweighed the task at every step only once no reward
    was left, and on the mean of 20 steps 26 steps before that.
    """

    quantity: str
    """The source's numbers, as a warning calls them."""
    cause: str
    """The usual reason that they do not differ, and the settings that matter."""
    gate: str = "all"
    """bonus.gate: causes and advice depend on it."""
    flat_after: int = ROLLOUTS_BEFORE_WARNING
    outweighed_after: int = ROLLOUTS_BEFORE_WARNING
    flat: int = 0
    """Consecutive rollouts so far without any spread."""
    closed: int = 0
    """Consecutive rollouts so far in which the gate was closed for every completion."""
    newest: deque[tuple[float, float]] = field(default_factory=deque)
    """Mean absolute bonus and task advantage of the last `outweighed_after` rollouts."""
    warned: frozenset[str] = frozenset()

    def warning(self, spread: bool, is_open: bool, bonus: float, task: float) -> str | None:
        """Count one rollout; the warning that is due, or None.

        spread: the measures differ within some group. is_open: the gate lets some completion's bonus through. bonus,
        task: mean absolute values over the rollout.
        """
        self.flat = 0 if spread else self.flat + 1
        self.closed = 0 if is_open else self.closed + 1
        self.newest.append((bonus, task))
        if len(self.newest) > self.outweighed_after:
            self.newest.popleft()
        if self.flat >= self.flat_after and "flat" not in self.warned:
            self.warned |= {"flat"}
            return (
                f"the {self.quantity} of the completions has not differed within any group for {self.flat} rollouts, "
                f"so the bonus is 0: {self.cause}"
            )
        if self.closed >= self.flat_after and "closed" not in self.warned:
            self.warned |= {"closed"}
            return (
                f"bonus.gate {self.gate} has been closed for all completions for {self.closed} rollouts, so the bonus "
                f"is 0: {CLOSED[self.gate]}"
            )
        if self._outweighs() and "outweighed" not in self.warned:
            self.warned |= {"outweighed"}
            gate = ", give it a schedule, or set bonus.gate to not_failed (no bonus in groups where nothing succeeded)"
            cure = gate if self.gate == "all" else " or give it a schedule"
            return (
                f"the bonus has been larger than the task advantage over the last {self.outweighed_after} rollouts: "
                "task rewards are equal in most groups, or bonus.weight is too large, and the bonus may lead the "
                f"policy away from the task; lower it{cure}"
            )
        return None

    def _outweighs(self) -> bool:
        """True when the last steps are there and the bonus was larger on average."""
        bonuses, tasks = zip(*self.newest, strict=True)
        return len(self.newest) == self.outweighed_after and sum(bonuses) > sum(tasks)
