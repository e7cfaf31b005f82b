"""Rewards that say nothing: a function that gives only 0 in the first rollouts, or only None in one."""

from __future__ import annotations

from collections.abc import Sequence

FIRST_ROLLOUTS = 3
"""Rollouts at the start of a run after which rewards that were all 0 are reported."""

NO_REWARD = -1.0
"""Stands for the largest reward of a rollout in which a function returned only None."""


class RewardWatch:
    """Reads the largest |reward| of each function, rollout by rollout, and writes a line where it says nothing.

    A function that catches its own errors and returns 0 (a missing package, a wrong column) looks like a hard task.
    """

    def __init__(self, names: Sequence[str], rollouts: int) -> None:
        """names: of the reward functions. rollouts: of the run."""
        self._zeros = dict.fromkeys(names, 0)
        self._silent = dict.fromkeys(names, 0)
        self._first, self._seen = min(FIRST_ROLLOUTS, rollouts), 0

    def warnings(self, largest: Sequence[float]) -> list[str]:
        """One line for each function that is worth one. largest: (F,) over all ranks, NO_REWARD for only None."""
        self._seen += 1
        lines = []
        for name, value in zip(self._zeros, largest, strict=True):
            self._zeros[name] += value == 0
            self._silent[name] += value == NO_REWARD
            if value == NO_REWARD and self._silent[name].bit_count() == 1:  # 1, 2, 4, ...: not a thousand times
                lines.append(self._silence(name))
            if self._seen == self._first == self._zeros[name]:
                lines.append(
                    f"reward {name} was 0 for every completion of the first {_rollouts(self._first)}: a task that is "
                    "too hard, a column that never matches, or an error that the function hides (look at completions/)"
                )
        return lines

    def _silence(self, name: str) -> str:
        count = self._silent[name]
        whole = len(self._zeros) == 1
        effect = "there is no reward to learn from" if whole else "only the other functions count"
        return f"reward {name} returned None for every completion, in {_rollouts(count)} so far: {effect}"


def _rollouts(count: int) -> str:
    return f"{count} rollout{'s' * (count > 1)}"
