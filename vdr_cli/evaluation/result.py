"""An evaluation's numbers: what was sampled, and the measures and intervals that follow from it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vdr_cli.samples import Prompt
from vdr_cli.stats.bootstrap import interval, resampled_ratios
from vdr_cli.stats.passk import pass_at_k

TURN_MEASURES = {
    "turns": "turns",
    "calls": "tool_calls",
    "failures": "tool_failures",
    "unreadable": "unreadable_calls",
    "cut_in_call": "cut_in_call",
}
"""Numbers of an episode (`environments.episodes.Counts`), and their names as means of an evaluation."""


@dataclass(frozen=True)
class EvalResult:
    """One model on N prompts with n completions each."""

    model: str
    ks: tuple[int, ...]
    seed: int
    prompts: list[Prompt]
    texts: list[list[str]]  # (N, n)
    classes: list[list[str]]  # (N, n) solution classes; the texts where no reward function knows any
    completion_ids: list[list[list[int]]]  # (N, n) token ids without padding
    task_reward: NDArray[np.float64]  # (N, n), NaN where every function returned None
    rewards: dict[str, NDArray[np.float64]]  # name: (N, n)
    solved: NDArray[np.bool_]  # (N, n)
    length: NDArray[np.int64]  # (N, n) tokens
    truncated: NDArray[np.bool_]  # (N, n)
    entropy_sum: NDArray[np.float64]  # (N, n) nats, summed over tokens
    distinct_by: str = "text"
    """Says where `classes` come from, in words."""
    known_classes: NDArray[np.float64] | None = None  # (N,) right classes that each prompt has, NaN: not known
    disagreement: NDArray[np.float64] | None = None  # (N, n) mean bald of the tokens, nats
    turns: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """(N, n) by the names of TURN_MEASURES; empty where a completion is one turn."""
    per_prompt: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """Further measures that were asked for: name to (N,), NaN where a prompt has none."""

    def pass_at(self, k: int) -> NDArray[np.float64]:
        """(N,) unbiased pass@k of each prompt."""
        return pass_at_k(self.solved.shape[1], self.solved.sum(1), k)

    def metrics(self) -> dict[str, float]:
        """The numbers of a table row; intervals are 95 %, by bootstrap over prompts."""
        draws = self.draws()
        numbers: dict[str, float] = {}
        for name, value in self.values().items():
            numbers[name] = value
            numbers[f"{name}_low"], numbers[f"{name}_high"] = interval(draws[name], len(self.prompts))
        return numbers

    def values(self) -> dict[str, float]:
        """Every measure over all prompts."""
        parts = self._parts()
        ratios = {name: np.atleast_1d(_ratio(sums.sum(), counts.sum())) for name, (sums, counts) in parts.items()}
        return {name: float(value[0]) for name, value in self._finished(ratios).items()}

    def draws(self) -> dict[str, NDArray[np.float64]]:
        """Every measure over resampled prompts, (R,); evaluations of as many prompts resample the same ones."""
        parts = self._parts()
        sums = np.stack([sums for sums, _ in parts.values()], axis=1)  # (N, K)
        counts = np.stack([counts for _, counts in parts.values()], axis=1)
        ratios = resampled_ratios(sums, counts, self.seed)  # (R, K)
        return self._finished({name: ratios[:, index] for index, name in enumerate(parts)})

    def _parts(self) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Each measure as (N,) sums and (N,) counts of what is summed: its value is the ratio of their totals."""
        centred = self.task_reward - self._mean_reward
        parts = {f"pass@{k}": _summed(self.pass_at(k)[:, None]) for k in self.ks}
        parts |= {"reward": _summed(self.task_reward), "reward_std": _summed(centred**2)}
        parts |= {f"rewards/{name}/mean": _summed(values) for name, values in self.rewards.items()}
        parts["mean_length"] = _summed(self.length)
        parts["truncated_share"] = _summed(self.truncated)
        parts["entropy"] = self.entropy_sum.sum(1), self.length.sum(1).astype(np.float64)  # a token
        found = np.array([[len(classes)] for classes in self.solutions()])  # (N, 1)
        parts["distinct_solved"] = _summed(found)
        if self.known_classes is not None:
            known = self.known_classes[:, None]
            parts["distinct_solved_share"] = _summed(found / np.where(known > 0, known, np.nan))
        if self.disagreement is not None:
            parts["disagreement"] = _summed(self.disagreement)
        parts |= {TURN_MEASURES[name]: _summed(values) for name, values in self.turns.items()}
        return parts | {name: _summed(values[:, None]) for name, values in self.per_prompt.items()}

    def _finished(self, ratios: dict[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
        """The mean square deviation from one number gives way to the standard deviation."""
        variance = ratios["reward_std"] - (ratios["reward"] - self._mean_reward) ** 2
        return ratios | {"reward_std": np.sqrt(np.maximum(variance, 0.0))}

    @property
    def _mean_reward(self) -> float:
        return float(_ratio(np.nansum(self.task_reward), np.isfinite(self.task_reward).sum()))

    def solutions(self) -> list[set[str]]:
        """The solution classes that each prompt's solved completions are of."""
        return [
            {one for one, solved in zip(classes, row, strict=True) if solved}
            for classes, row in zip(self.classes, self.solved, strict=True)
        ]

    def samples(self) -> dict[str, list[Any]]:
        """A row per completion, as columns."""
        n = self.solved.shape[1]
        columns: dict[str, list[Any]] = {
            "model": [self.model] * self.solved.size,
            "row": [prompt.row for prompt in self.prompts for _ in range(n)],
            "prompt": [prompt.value for prompt in self.prompts for _ in range(n)],
            "completion": [text for texts in self.texts for text in texts],
            "solution_class": [one for classes in self.classes for one in classes],
            "reward": self.task_reward.ravel().tolist(),
            "solved": self.solved.ravel().tolist(),
            "length": self.length.ravel().tolist(),
            "truncated": self.truncated.ravel().tolist(),
            "entropy": (self.entropy_sum / np.maximum(self.length, 1)).ravel().tolist(),
        }
        columns |= {f"rewards/{name}": values.ravel().tolist() for name, values in self.rewards.items()}
        if self.disagreement is not None:
            columns["disagreement"] = self.disagreement.ravel().tolist()
        columns |= {name: values.ravel().tolist() for name, values in self.turns.items()}
        return columns

    def record(self) -> dict[str, Any]:
        """This model's entry in the `--json` file."""
        counts = {"prompts": len(self.prompts), "samples": self.solved.shape[1]}
        return {"model": self.model, **counts, "distinct_by": self.distinct_by, **self.metrics()}


def paired_differences(results: Sequence[EvalResult]) -> list[dict[str, Any]]:
    """Every later model minus every earlier one, with 95 % intervals over prompts: both on the same resampled ones."""
    values, draws = [result.values() for result in results], [result.draws() for result in results]
    rows = []
    for first, second in itertools.combinations(range(len(results)), 2):
        row: dict[str, Any] = {"model": results[second].model, "minus": results[first].model}
        for name in (name for name in values[first] if name in values[second]):
            row[name] = values[second][name] - values[first][name]
            row[f"{name}_low"], row[f"{name}_high"] = interval(
                draws[second][name] - draws[first][name], len(results[first].prompts)
            )
        rows.append(row)
    return rows


def _summed(values: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(N,) sums and (N,) counts of the numbers among (N, n) values."""
    return np.nansum(values.astype(np.float64), axis=1), (~np.isnan(values.astype(np.float64))).sum(1).astype(float)


def _ratio(total: Any, count: Any) -> Any:
    return np.divide(total, count) if count else np.nan
